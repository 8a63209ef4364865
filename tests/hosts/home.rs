//! A home that cannot be written.

use std::process::{Command, Stdio};

use grokpipe_tests::{command, demo_model, processes::binary};

use super::{ANSWER, Files, PROMPT, is_root, said, without_settings};

#[test]
fn a_cluster_runs_in_a_home_that_cannot_be_written() {
    if !is_root() || command("unshare").is_none() {
        return;
    }
    let files = Files::new();
    files.write("cluster.toml", &format!("[model]\npath = {:?}\n[[worker]]\nname = \"w1\"\n", demo_model()));
    let script = "mount --bind \"$HOME\" \"$HOME\" && mount -o remount,bind,ro \"$HOME\" && cd \"$HOME\" && \
                  ! touch file 2>/dev/null && exec \"$@\"";
    let mut up = Command::new("unshare");
    up.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(binary());
    up.args(["up", "--device", "cpu", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--once", PROMPT]);
    without_settings(&mut up);
    for name in ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_DATA_HOME"] {
        up.env_remove(name);
    }
    let output = up.env("HOME", files.path("")).stdin(Stdio::null()).output().expect("unshare runs");
    if said(&output).contains("mount: ") {
        return println!("skipped: nothing can be mounted here: {}", said(&output));
    }
    assert!(output.status.success() && said(&output).contains(ANSWER), "{}", said(&output));
}

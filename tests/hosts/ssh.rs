//! Workers that `up` starts over OpenSSH.

use std::process::{Command, Stdio};

use grokpipe_tests::{
    demo_model,
    processes::{binary, grokpipe},
};

use super::{ANSWER, PROMPT, Running, processes_with, said, sshd::Sshd, wait_for};

/// Where the far worker is, and how `ssh` gets there.
pub(crate) struct Way<'a> {
    pub(crate) host: &'a str,
    pub(crate) options: &'a [&'a str],
}

/// `up --once` with one worker here and one over SSH gives the answer, and leaves nothing there.
pub(crate) fn up_once(sshd: &Sshd, way: &Way<'_>, mut up: Command) {
    // Tells it from other workers on this machine.
    let name = format!("far-{}-{}", std::process::id(), sshd.port);
    sshd.files.write_private("cluster.secret", "a-secret-of-two-hosts\n");
    let text = format!(
        "[model]\npath = {:?}\n[cluster]\nsecret_file = \"cluster.secret\"\nssh_options = {:?}\n\
         [plan]\nsplit = \"even\"\n[[worker]]\nname = \"near\"\ndevice = \"cpu\"\n\
         [[worker]]\nname = {name:?}\nhost = {:?}\ndevice = \"cpu\"\nthreads = 1\nbinary = {:?}\n",
        demo_model(),
        way.options,
        way.host,
        binary(),
    );
    let config = sshd.files.write("cluster.toml", &text);
    let mut running = Running::default();
    up.args(["--config", &config]).stdin(Stdio::null());
    let up = running.start(up.stdout(sshd.files.log("up.out")).stderr(sshd.files.log("up.log")));
    let logs = || format!("{}\n{}", sshd.files.read("up.log"), sshd.log());
    let status = wait_for(|| up.try_wait().expect("a process of ours"), || format!("no end of up: {}", logs()));
    let text = sshd.files.read("up.out");
    assert!(status.success() && text.contains(ANSWER), "{status}: {text}\n{}", logs());
    assert!(sshd.log().contains("Accepted publickey"), "{}", logs());
    let left = || Some(processes_with(&name)).filter(Vec::is_empty);
    wait_for(left, || format!("left over there: {:?}", processes_with(&name)));
}

#[test]
fn up_starts_a_worker_over_ssh_and_ends_it() {
    let Some(sshd) = Sshd::here() else { return };
    let (port, known_hosts) = (sshd.port.to_string(), format!("UserKnownHostsFile={}", sshd.path("known_hosts")));
    let key = sshd.path("user_key");
    let ssh_options = ["-p", &port, "-i", &key, "-o", &known_hosts];
    let way = Way { host: "root@127.0.0.1", options: &ssh_options };
    up_once(&sshd, &way, grokpipe(["up", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--once", PROMPT]));
}

#[test]
fn a_program_that_is_missing_on_the_other_host_is_named() {
    let Some(sshd) = Sshd::here() else { return };
    let (port, known_hosts) = (sshd.port.to_string(), format!("UserKnownHostsFile={}", sshd.path("known_hosts")));
    let text = format!(
        "[model]\npath = {:?}\n[cluster]\nssh_options = {:?}\n[[worker]]\nname = \"far\"\nhost = \"root@127.0.0.1\"\n\
         binary = \"/no/such/grokpipe\"\n",
        demo_model(),
        ["-p", &port, "-i", &sshd.path("user_key"), "-o", &known_hosts],
    );
    let config = sshd.files.write("cluster.toml", &text);
    let ports = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let output = grokpipe(["up", "--config", &config]).args(ports).stdin(Stdio::null()).output().expect("up runs");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("there is no program /no/such/grokpipe on root@127.0.0.1"), "{}", said(&output));
}

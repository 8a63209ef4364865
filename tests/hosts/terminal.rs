//! A terminal that nobody reads, as after Ctrl-S.

use std::{
    fs,
    process::{Command, Stdio},
};

use grokpipe_tests::{
    command, demo_model,
    processes::{binary, grokpipe},
};

use super::{ANSWER, Files, PROMPT, Running, run, said, wait_for};

/// The only child of a process.
fn child_of(process: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_terminal_that_nobody_reads_stops_nothing() {
    if command("script").is_none() {
        return;
    }
    let files = Files::new();
    let config = format!(
        "[model]\npath = {:?}\n[plan]\nsplit = \"even\"\n[[worker]]\nname = \"w1\"\n[[worker]]\nname = \"w2\"\n",
        demo_model()
    );
    let config = files.write("cluster.toml", &config);
    // An address of loopback that is nobody else's: what the system chooses is said on the terminal only.
    let id = std::process::id();
    let host = format!("127.{}.{}.1", 200 + id / 256 % 50, id % 256);
    let (grpc, http) = (format!("{host}:7070"), format!("{host}:8080"));
    let up = format!("exec '{}' up --device cpu --config '{config}' --grpc {grpc} --http {http}", binary().display());
    // It gives `up` a terminal and copies what comes to its own output: a pipe that we do not read.
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--command", &up, "/dev/null"]).env("GROKPIPE_LOG", "trace");
    terminal.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = Running::default();
    let terminal = running.start(&mut terminal);
    let process = wait_for(|| child_of(terminal.id()), || "script starts nothing".into());
    let answer = || {
        let mut generate = grokpipe(["generate", PROMPT, "--server", &grpc, "--max-tokens", "8"]);
        generate.stdin(Stdio::null()).output().expect("generate runs")
    };
    wait_for(|| said(&answer()).contains(ANSWER).then_some(()), || format!("not serving: {}", said(&answer())));
    for number in 0..40 {
        let found = answer();
        assert!(found.status.success() && said(&found).contains(ANSWER), "request {number}: {}", said(&found));
    }
    let ready = Command::new("curl").args(["-sf", "--max-time", "60", &format!("http://{http}/readyz")]).status();
    assert!(ready.is_ok_and(|status| status.success()), "readyz does not answer");
    run("kill", &["-INT", &process.to_string()]).expect("a process of ours");
    // `script`, which nobody reads, does not get to collecting it.
    let ended = |status: String| status.lines().any(|line| line.starts_with("State:") && line.contains('Z'));
    let gone = || fs::read_to_string(format!("/proc/{process}/status")).map_or(true, ended).then_some(());
    wait_for(gone, || "up does not end when it is asked to".into());
}

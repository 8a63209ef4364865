//! What surrounds the processes of a cluster: several hosts with networks of their own, OpenSSH between them, limits of memory, homes
//! that cannot be written, terminals that nobody reads.
//!
//! Hosts are network namespaces on this machine, joined by a veth pair. Most of it needs root; without it tests are skipped.

mod alias;
mod firewall;
mod home;
mod ipv6;
mod namespaces;
mod network;
mod ssh;
mod sshd;
mod terminal;

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::{Duration, Instant},
};

use grokpipe_tests::processes::{PATIENCE, wait};

/// What is asked, and a word of the answer.
const PROMPT: &str = "The capital of France is";
const ANSWER: &str = "Paris";

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("{program} {}: {}", arguments.join(" "), said(&output))) }
}

/// Processes that end with the test.
#[derive(Default)]
struct Running(Vec<Child>);

impl Running {
    fn start(&mut self, command: &mut Command) -> &mut Child {
        self.0.push(command.spawn().expect("a process starts"));
        self.0.last_mut().expect("just pushed")
    }

    fn end(&mut self) {
        for mut child in self.0.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether this test may do what only root may; says so if not.
fn is_root() -> bool {
    let root = fs::metadata("/proc/self").expect("Linux").uid() == 0;
    if !root {
        println!("skipped: only root may do this");
    }
    root
}

/// A temporary folder with the files of a test.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).expect("a file in a temporary folder");
        self.path(name).display().to_string()
    }

    fn write_private(&self, name: &str, text: &str) {
        self.write(name, text);
        fs::set_permissions(self.path(name), Permissions::from_mode(0o600)).expect("a file of ours");
    }

    /// A log to write; [`Self::read`] has what is in it.
    fn log(&self, name: &str) -> File {
        File::create(self.path(name)).expect("a log")
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Waits until `holds` gives something; panics with what `otherwise` says when that takes too long.
fn wait_for<T>(mut holds: impl FnMut() -> Option<T>, otherwise: impl Fn() -> String) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = holds() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "{}", otherwise());
        wait(Duration::from_millis(100));
    }
}

/// Processes whose command line has this word.
fn processes_with(word: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("Linux").flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(word)).collect()
}

/// Removes the settings of this process from a command that is to have none.
fn without_settings(command: &mut Command) {
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("GROKPIPE")) {
        command.env_remove(key);
    }
    command.env("NO_COLOR", "1");
}

/// Whether this path is there; says that the test is skipped if not.
fn is_there(path: &Path, why: &str) -> bool {
    let found = path.exists();
    if !found {
        println!("skipped: {why}");
    }
    found
}

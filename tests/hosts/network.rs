//! Two network namespaces and a cable between them, and clusters whose processes are in them.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use grokpipe_tests::{command, demo_model, processes::binary};
use serde_json::Value;

use super::{ANSWER, Files, PROMPT, Running, run, said, wait_for, without_settings};

/// Which addresses the hosts have, and no others but loopback's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Two hosts; removed on drop.
pub(crate) struct TwoHosts {
    names: [String; 2],
    family: Family,
}

impl TwoHosts {
    /// `None` after saying that the test is skipped.
    pub(crate) fn make(family: Family) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        command("ip")?;
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let hosts = Self { names: ["a", "b"].map(|host| format!("grokpipe-{id}-{host}")), family };
        match hosts.join() {
            Ok(()) => Some(hosts),
            Err(reason) => {
                println!("skipped: no right to make network namespaces: {reason}");
                None
            }
        }
    }

    fn join(&self) -> Result<(), String> {
        let [a, b] = &self.names;
        run("ip", &["netns", "add", a])?;
        run("ip", &["netns", "add", b])?;
        run("ip", &["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (host, name) in self.names.iter().enumerate() {
            let address = match self.family {
                Family::V4 => format!("{}/24", self.ip(host)),
                Family::V6 => format!("{}/64", self.ip(host)),
            };
            let mut add = vec!["-n", name, "addr", "add", &address, "dev", "cable"];
            if self.family == Family::V6 {
                // Nobody else can have it, so nobody needs to be asked first.
                add.push("nodad");
            }
            run("ip", &add)?;
            run("ip", &["-n", name, "link", "set", "cable", "up"])?;
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    /// The address of host 0 or 1.
    pub(crate) fn ip(&self, host: usize) -> &'static str {
        match self.family {
            Family::V4 => ["10.213.77.1", "10.213.77.2"][host],
            Family::V6 => ["fd77::1", "fd77::2"][host],
        }
    }

    /// Its address and a port, as one writes it.
    pub(crate) fn address(&self, host: usize, port: u16) -> String {
        match self.family {
            Family::V4 => format!("{}:{port}", self.ip(host)),
            Family::V6 => format!("[{}]:{port}", self.ip(host)),
        }
    }

    /// A program on one of the hosts.
    pub(crate) fn command(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], program]).stdin(Stdio::null());
        without_settings(&mut command);
        command
    }

    /// `grokpipe` on one of the hosts, without the settings of this one.
    pub(crate) fn grokpipe(&self, host: usize, arguments: &[&str]) -> Command {
        let mut command = self.command(host, &binary().display().to_string());
        command.args(arguments);
        command
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

/// Settings of a cluster of the demo model with these workers and a secret.
pub(crate) fn settings(files: &Files, workers: &[&str]) -> String {
    files.write_private("cluster.secret", "a-secret-of-two-hosts\n");
    let workers: String = workers.iter().map(|name| format!("[[worker]]\nname = {name:?}\n")).collect();
    let model = demo_model();
    let text = format!(
        "[model]\npath = {model:?}\n[cluster]\nsecret_file = \"cluster.secret\"\n[kv]\ntokens = 1024\n\
         [plan]\nsplit = \"even\"\n{workers}"
    );
    files.write("cluster.toml", &text)
}

/// A coordinator on host 0, and whatever is started beside it.
pub(crate) struct HandStarted<'a> {
    pub(crate) hosts: &'a TwoHosts,
    pub(crate) files: &'a Files,
    pub(crate) config: String,
    /// Where the coordinator is.
    pub(crate) server: String,
    running: Running,
    logs: Vec<String>,
}

impl<'a> HandStarted<'a> {
    /// Starts the coordinator.
    pub(crate) fn coordinator(hosts: &'a TwoHosts, files: &'a Files, config: String) -> Self {
        let mut running = Running::default();
        let grpc = hosts.address(0, 0);
        let mut coordinator =
            hosts.grokpipe(0, &["coordinator", "--config", &config, "--grpc", &grpc, "--http", &grpc]);
        let coordinator = running.start(coordinator.stdout(Stdio::piped()).stderr(files.log("coordinator.log")));
        let mut line = String::new();
        BufReader::new(coordinator.stdout.take().expect("piped")).read_line(&mut line).expect("addresses");
        let addresses: Value = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{error}: {line:?} {}", files.read("coordinator.log")));
        let server = addresses["grpc"].as_str().expect("an address").to_owned();
        Self { hosts, files, config, server, running, logs: vec!["coordinator.log".into()] }
    }

    /// A worker that is not started yet, with its settings from this file.
    pub(crate) fn worker_command(&self, host: usize, name: &str, config: &str, more: &[&str]) -> Command {
        let arguments =
            ["worker", "--config", config, "--coordinator", &self.server, "--name", name, "--device", "cpu"];
        self.hosts.grokpipe(host, &[&arguments, more].concat())
    }

    /// Starts a worker.
    pub(crate) fn worker(&mut self, host: usize, name: &str, more: &[&str]) {
        let log = format!("{name}.log");
        let mut command = self.worker_command(host, name, &self.config, more);
        self.running.start(command.stdout(Stdio::null()).stderr(self.files.log(&log)));
        self.logs.push(log);
    }

    /// What all have logged.
    pub(crate) fn logs(&self) -> String {
        self.logs.iter().map(|name| format!("{name}:\n{}\n", self.files.read(name))).collect()
    }

    /// What `status` says from the other host, until it is as wanted.
    pub(crate) fn wait_for_status(&self, what: &str, wanted: impl Fn(bool, &str) -> bool) -> String {
        let status = || self.hosts.grokpipe(1, &["status", "--server", &self.server]).output().expect("status runs");
        let as_wanted = || {
            let found = status();
            wanted(found.status.success(), &said(&found)).then(|| said(&found))
        };
        wait_for(as_wanted, || format!("expected {what}, found {}\n{}", said(&status()), self.logs()))
    }

    /// Waits until it serves, and asks from the other host.
    pub(crate) fn serves(&self) {
        self.wait_for_status("a cluster that serves", |good, _| good);
        let arguments = ["generate", PROMPT, "--server", &self.server, "--max-tokens", "8", "--json"];
        let found = self.hosts.grokpipe(1, &arguments).output().expect("generate runs");
        assert!(found.status.success() && said(&found).contains(ANSWER), "{}\n{}", said(&found), self.logs());
    }
}

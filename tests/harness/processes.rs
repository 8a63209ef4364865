//! Clusters of real processes on loopback: the binary that users run, ports chosen by the system, everything ended on drop.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use grokpipe_proto::{
    snapshot::ClusterSnapshot,
    transport::{self, Keepalive, Net, Tcp},
    v1::{GetStatusRequest, cluster_service_client::ClusterServiceClient},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::root;

/// Longest that anything in a test may take to come up; ten times what it takes on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The `grokpipe` binary of this build; built if need be.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--workspace", "--bin", "grokpipe", "--locked", "--quiet"])
            .current_dir(root())
            .status()
            .expect("cargo runs");
        assert!(built.success(), "grokpipe does not build");
        // A test is target/<profile>/deps/<name>, a program target/<profile>/<name>.
        let own = std::env::current_exe().expect("a test has a path");
        let folder =
            own.ancestors().skip(1).find(|folder| !folder.ends_with("deps")).expect("it lies in target/<profile>");
        folder.join("grokpipe")
    })
}

/// `grokpipe` with these arguments, environment of settings cleared.
pub fn grokpipe<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(arguments: I) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments);
    with_clear_settings(command)
}

/// As [`grokpipe`], with so many file descriptors if a number is given.
fn limited<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(descriptors: Option<u64>, arguments: I) -> Command {
    let Some(descriptors) = descriptors else { return grokpipe(arguments) };
    let mut command = Command::new("sh");
    command.args(["-c", &format!(r#"ulimit -n {descriptors} && exec "$@""#), "sh"]).arg(binary()).args(arguments);
    with_clear_settings(command)
}

fn with_clear_settings(mut command: Command) -> Command {
    command.current_dir(root()).env("NO_COLOR", "1");
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("GROKPIPE__") {
            command.env_remove(key);
        }
    }
    command
}

/// How a cluster is started.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Model folder.
    pub model: PathBuf,
    /// Number of workers.
    pub workers: usize,
    /// `--device`.
    pub device: String,
    /// `--precision`.
    pub precision: String,
    /// `--threads` of each worker.
    pub threads: usize,
    /// Tokens in a chunk of prefill.
    pub prefill_chunk_tokens: usize,
    /// Tokens in the KV pool.
    pub kv_tokens: usize,
    /// File descriptors that each process may have, if not as many as this one.
    pub descriptors: Option<u64>,
    /// Filter of the workers' logs.
    pub log: String,
}

impl ClusterOptions {
    /// The demo model on the CPU, four workers of one thread.
    pub fn demo() -> Self {
        Self {
            model: crate::demo_model(),
            workers: 4,
            device: "cpu".into(),
            precision: "exact".into(),
            threads: 1,
            prefill_chunk_tokens: 64,
            kv_tokens: 4096,
            descriptors: None,
            log: "info".into(),
        }
    }
}

/// A coordinator and its workers. Dropping it ends them.
pub struct Cluster {
    options: ClusterOptions,
    folder: TempDir,
    coordinator: Child,
    workers: Vec<Option<Child>>,
    /// Where the coordinator's gRPC is.
    pub grpc: String,
    /// Where its HTTP is.
    pub http: String,
}

impl Cluster {
    /// Starts all processes and waits until the cluster serves.
    pub fn start(options: ClusterOptions) -> Self {
        let mut cluster = Self::start_coordinator(options);
        for index in 0..cluster.options.workers {
            cluster.start_worker(index);
        }
        cluster.wait_until("serving", |snapshot| snapshot.verdict().serving);
        cluster
    }

    /// Starts only the coordinator, which expects the workers w1, w2, …
    pub fn start_coordinator(options: ClusterOptions) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = folder.path().join("cluster.toml");
        std::fs::write(&config, config_text(&options)).expect("a file in a temporary folder");
        let log = File::create(folder.path().join("coordinator.log")).expect("a log");
        let mut coordinator = limited(options.descriptors, ["coordinator", "--config"])
            .arg(&config)
            .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
            .env("GROKPIPE_LOG", &options.log)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("the coordinator starts");
        let mut line = String::new();
        let stdout = coordinator.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the coordinator's addresses");
        let addresses: Value = serde_json::from_str(&line).unwrap_or_else(|error| {
            let log = std::fs::read_to_string(folder.path().join("coordinator.log")).unwrap_or_default();
            panic!("the coordinator gave no addresses ({error}): {line:?}\n{log}")
        });
        let address = |key: &str| addresses[key].as_str().expect("an address").to_owned();
        let workers = (0..options.workers).map(|_| None).collect();
        Self { grpc: address("grpc"), http: address("http"), options, folder, coordinator, workers }
    }

    /// Starts worker `w{index + 1}`.
    pub fn start_worker(&mut self, index: usize) {
        let model = self.options.model.clone();
        self.start_worker_of(index, &model);
    }

    /// Starts worker `w{index + 1}`, which reads this copy of the model; one more than there are is a spare.
    pub fn start_worker_of(&mut self, index: usize, model: &Path) {
        let name = format!("w{}", index + 1);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("{name}.log")))
            .expect("a log");
        let child = limited(
            self.options.descriptors,
            ["worker", "--coordinator", &self.grpc, "--name", &name, "--device", &self.options.device],
        )
        .arg("--model")
        .arg(model)
        .args(["--threads", &self.options.threads.to_string(), "--precision", &self.options.precision])
        // Workers that share an adapter say what they take of it.
        .args(if self.options.device == "cpu" { &[][..] } else { &["--memory", "1GiB"] })
        .env("GROKPIPE_LOG", &self.options.log)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("a worker starts");
        if index == self.workers.len() {
            self.workers.push(None);
        }
        self.workers[index] = Some(child);
    }

    /// Ends worker `index` as a power failure would.
    pub fn kill_worker(&mut self, index: usize) {
        let mut child = self.workers[index].take().expect("a running worker");
        child.kill().expect("a worker of ours");
        child.wait().expect("a worker of ours");
    }

    /// Process id of worker `index`.
    pub fn worker_pid(&self, index: usize) -> u32 {
        self.workers[index].as_ref().expect("a running worker").id()
    }

    /// Process id of the coordinator.
    pub fn coordinator_pid(&self) -> u32 {
        self.coordinator.id()
    }

    /// What worker `index` has logged.
    pub fn worker_log(&self, index: usize) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("w{}.log", index + 1))).unwrap_or_default()
    }

    /// The cluster as its coordinator sees it.
    pub fn snapshot(&self) -> ClusterSnapshot {
        let address = self.grpc.clone();
        runtime().block_on(async {
            let net: std::sync::Arc<dyn Net> = std::sync::Arc::new(Tcp);
            let channel = transport::connect(&net, &address, Keepalive::Client).await.expect("the coordinator answers");
            let answer = ClusterServiceClient::new(channel).get_status(GetStatusRequest {}).await.expect("a status");
            answer.into_inner().snapshot.expect("a snapshot").checked().expect("a good snapshot")
        })
    }

    /// Waits until the snapshot is as wanted; panics with the logs when that takes too long.
    pub fn wait_until(&self, what: &str, wanted: impl Fn(&ClusterSnapshot) -> bool) -> Duration {
        let started = Instant::now();
        loop {
            let snapshot = self.snapshot();
            if wanted(&snapshot) {
                return started.elapsed();
            }
            if started.elapsed() > PATIENCE {
                let logs: String = (0..self.workers.len()).map(|index| self.worker_log(index)).collect();
                let own = std::fs::read_to_string(self.folder.path().join("coordinator.log")).unwrap_or_default();
                panic!("not {what} within {PATIENCE:?}: {snapshot:#?}\n{own}\n{logs}");
            }
            wait(Duration::from_millis(50));
        }
    }

    /// `grokpipe generate --json` with these further arguments, not yet waited for.
    pub fn generate<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(&self, arguments: I) -> Child {
        grokpipe(["generate", "--server", &self.grpc, "--json"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("generate starts")
    }

    /// As [`Cluster::generate`], waited for and read; panics when it fails.
    pub fn generated<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(&self, arguments: I) -> Value {
        read_json(self.generate(arguments).wait_with_output().expect("generate ends"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.workers.iter_mut().flatten().chain([&mut self.coordinator]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Reads what a command with `--json` printed; panics with its complaints when it failed.
pub fn read_json(output: Output) -> Value {
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {complaints}", output.status);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}\n{complaints}", String::from_utf8_lossy(&output.stdout)))
}

/// Most memory that a process of ours has held at a time, in bytes.
pub fn peak_rss(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says the peak");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

/// Token ids under `key` of what `generate --json` printed.
pub fn token_ids(generated: &Value, key: &str) -> Vec<u32> {
    let ids = generated[key].as_array().unwrap_or_else(|| panic!("no {key} in {generated}"));
    ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// A runtime for the little that tests do over gRPC themselves.
pub fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Runtime::new().expect("a runtime"))
}

/// Waits on real time, for processes that know no other.
pub fn wait(time: Duration) {
    runtime().block_on(async { tokio::time::sleep(time).await });
}

fn config_text(options: &ClusterOptions) -> String {
    let mut text = format!(
        "[model]\npath = {:?}\n[kv]\ntokens = {}\n[plan]\nsplit = \"even\"\n[limits]\nprefill_chunk_tokens = {}\n",
        options.model, options.kv_tokens, options.prefill_chunk_tokens
    );
    for index in 1..=options.workers {
        text.push_str(&format!("[[worker]]\nname = \"w{index}\"\n"));
    }
    text
}

//! The cluster under chaos: coordinator and workers as processes, each started again when it ends, with a relay in front of each data
//! port and one between each worker and the coordinator.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use grokpipe_tests::{demo_model, processes::grokpipe};
use tokio::{
    process::Command,
    sync::watch,
    time::{Instant, sleep},
};

use crate::relay::Relay;

/// A process that ended is started again after this long, as `up` does.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// From then on a process counts as settled, and its memory and descriptors are compared with what they come to later.
const SETTLED_AFTER: Duration = Duration::from_secs(20);

/// One process of the cluster, in one life after the other.
pub(crate) struct Member {
    /// `coordinator`, `w1`, `w2`, …
    pub(crate) name: String,
    /// Reads of its model fail while this file exists.
    pub(crate) fail_reads: PathBuf,
    /// 0 while it has none.
    pid: AtomicU32,
}

/// What a process takes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Resident bytes.
    pub(crate) bytes: u64,
    /// Open descriptors.
    pub(crate) descriptors: usize,
}

impl Member {
    /// Its process, if it lives.
    pub(crate) fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// Sends it a signal, named as `kill` names it.
    pub(crate) async fn signal(&self, name: &str) {
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").args(["-s", name, &pid.to_string()]).status().await;
        }
    }

    /// What it takes now.
    pub(crate) fn usage(&self) -> Option<Usage> {
        let pid = self.pid()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let bytes = resident.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10;
        Some(Usage { bytes, descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() })
    }

    /// Keeps it alive until the cluster ends.
    async fn live(
        self: Arc<Self>,
        command: impl Fn() -> Command + Send,
        log: PathBuf,
        mut over: watch::Receiver<bool>,
    ) {
        while !*over.borrow() {
            let log = fs::File::options().create(true).append(true).open(&log).expect("a log in our folder");
            let mut command = command();
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
            let mut child = command.spawn().expect("grokpipe starts");
            self.pid.store(child.id().unwrap_or(0), Ordering::Relaxed);
            tokio::select! {
                _status = child.wait() => self.pid.store(0, Ordering::Relaxed),
                _ended = over.changed() => {
                    self.pid.store(0, Ordering::Relaxed);
                    let _ = child.kill().await;
                    return;
                }
            }
            sleep(RESTART_AFTER).await;
        }
    }
}

/// All of it. Ends with [`Cluster::end`].
pub(crate) struct Cluster {
    /// Where clients find the coordinator.
    pub(crate) grpc: String,
    /// The coordinator first.
    pub(crate) members: Vec<Arc<Member>>,
    /// In front of each worker's data port.
    pub(crate) data: Vec<Relay>,
    /// Between each worker and the coordinator.
    pub(crate) control: Vec<Relay>,
    over: watch::Sender<bool>,
    lives: Vec<tokio::task::JoinHandle<()>>,
}

impl Cluster {
    /// Starts it; logs and settings lie in `folder`.
    pub(crate) async fn start(workers: usize, folder: &Path) -> io::Result<Self> {
        let failing_reads = compile(&folder.join("reads.so")).await?;
        // Addresses of loopback that are nobody else's, so that ports can stay the same when processes do not.
        let id = std::process::id();
        let host = |number: usize| format!("127.{}.{}.{number}", 100 + id / 256 % 100, id % 256);
        let (grpc, http) = (format!("{}:7070", host(1)), format!("{}:8080", host(1)));
        let config = folder.join("cluster.toml");
        let mut text = format!(
            "[model]\npath = {:?}\n[coordinator]\nreplan_after = \"30s\"\n[kv]\ntokens = 8192\n[plan]\nsplit = \"even\"\n",
            demo_model()
        );
        for number in 1..=workers {
            text += &format!("[[worker]]\nname = \"w{number}\"\n");
        }
        fs::write(&config, text)?;

        let (over, ends) = watch::channel(false);
        let mut cluster = Self {
            grpc: grpc.clone(),
            members: Vec::new(),
            data: Vec::new(),
            control: Vec::new(),
            over,
            lives: Vec::new(),
        };
        let arguments =
            ["coordinator", "--grpc", &grpc, "--http", &http, "--config"].map(str::to_owned).into_iter().collect();
        cluster.add("coordinator".into(), arguments, &config, &failing_reads, folder, &ends);
        for number in 1..=workers {
            let listen = format!("{}:7101", host(10 + number));
            let (advertise, coordinator) =
                (format!("{}:7101", host(60 + number)), format!("{}:7070", host(110 + number)));
            cluster.data.push(Relay::open(advertise.clone(), listen.clone()).await?);
            cluster.control.push(Relay::open(coordinator.clone(), grpc.clone()).await?);
            let name = format!("w{number}");
            let arguments =
                ["worker", "--coordinator", &coordinator, "--name", &name, "--listen", &listen, "--advertise"];
            let more = [&advertise, "--device", "cpu", "--threads", "1", "--precision", "exact", "--config"];
            let arguments = arguments.into_iter().chain(more).map(str::to_owned).collect();
            cluster.add(name, arguments, &config, &failing_reads, folder, &ends);
        }
        Ok(cluster)
    }

    fn add(
        &mut self,
        name: String,
        arguments: Vec<String>,
        config: &Path,
        failing_reads: &Path,
        folder: &Path,
        ends: &watch::Receiver<bool>,
    ) {
        let fail_reads = folder.join(format!("{name}.fails"));
        let log = folder.join(format!("{name}.log"));
        let member = Arc::new(Member { name, fail_reads: fail_reads.clone(), pid: AtomicU32::new(0) });
        let (config, failing_reads) = (config.to_owned(), failing_reads.to_owned());
        let command = move || {
            let mut command = grokpipe(&arguments);
            command.arg(&config).env("LD_PRELOAD", &failing_reads).env("FAIL_READS", &fail_reads);
            Command::from(command)
        };
        self.lives.push(tokio::spawn(Arc::clone(&member).live(command, log, ends.clone())));
        self.members.push(member);
    }

    /// Ends all processes.
    pub(crate) async fn end(self) {
        self.over.send_replace(true);
        for life in self.lives {
            let _ = life.await;
        }
    }
}

/// The library that makes reads fail.
async fn compile(library: &Path) -> io::Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("chaos/reads.c");
    let mut compiler = Command::new("cc");
    let built = compiler.args(["-shared", "-fPIC", "-O2", "-o"]).arg(library).arg(source).arg("-ldl").status().await?;
    if built.success() { Ok(library.to_owned()) } else { Err(io::Error::other("cc does not compile chaos/reads.c")) }
}

/// How processes grow: each is compared with itself, since it settled in its present life.
#[derive(Default)]
pub(crate) struct Growth(Vec<Observed>);

#[derive(Default)]
struct Observed {
    pid: u32,
    since: Option<Instant>,
    first: Option<Usage>,
    last: Usage,
}

impl Growth {
    /// Looks at all members; to be called every few seconds.
    pub(crate) fn look(&mut self, members: &[Arc<Member>]) {
        self.0.resize_with(members.len(), Observed::default);
        for (seen, member) in self.0.iter_mut().zip(members) {
            let (Some(pid), Some(usage)) = (member.pid(), member.usage()) else { continue };
            if seen.pid != pid {
                *seen = Observed { pid, since: Some(Instant::now()), ..Observed::default() };
            }
            seen.last = usage;
            if seen.since.is_some_and(|since| since.elapsed() >= SETTLED_AFTER) {
                seen.first.get_or_insert(usage);
            }
        }
    }

    /// In words, a member each.
    pub(crate) fn text(&self, members: &[Arc<Member>]) -> String {
        let text = |(seen, member): (&Observed, &Arc<Member>)| {
            let first = seen.first.unwrap_or(seen.last);
            let life = seen.since.map_or(0, |since| since.elapsed().as_secs());
            format!(
                "{} {} to {} MB, {} to {} descriptors in {life} s",
                member.name,
                first.bytes >> 20,
                seen.last.bytes >> 20,
                first.descriptors,
                seen.last.descriptors
            )
        };
        self.0.iter().zip(members).map(text).collect::<Vec<_>>().join("; ")
    }
}

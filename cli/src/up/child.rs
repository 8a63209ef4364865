//! Keeps one process of the cluster alive: starts it, passes its lines on, starts it again a second after it died, and ends it
//! when the cluster ends.
//!
//! A process is asked to end by closing its standard input, which also happens when `up` itself dies, however it dies: no process
//! outlives its cluster. One that does not end within five seconds is killed.

use std::{process::ExitStatus, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{ChildStdin, Command},
    sync::mpsc,
    time,
};
use tokio_util::sync::CancellationToken;

use super::{command::Launch, screen::Screen};

/// Time between a process's death and its next start.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// Time that a process has to end by itself.
const GRACE: Duration = Duration::from_secs(5);
/// Longest line that is passed on whole.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// A pipe that stays open after its process has ended, held by a grandchild, is not waited for.
const PIPE_GRACE: Duration = Duration::from_millis(500);

/// What happened to a process.
#[derive(Debug)]
pub(crate) enum Event {
    /// It wrote a line to its standard output.
    Line {
        /// Which process.
        name: String,
        /// The line.
        text: String,
    },
    /// It ended by itself.
    Exited {
        /// Which process.
        name: String,
        /// Its exit code, if no signal ended it.
        code: Option<i32>,
        /// For people.
        how: String,
    },
    /// It could not be started.
    NotStarted {
        /// Which process.
        name: String,
        /// What the system said.
        error: std::io::Error,
    },
}

/// How a process ended once the cluster ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Which process.
    pub(crate) name: String,
    /// It had to be killed.
    pub(crate) killed: bool,
}

/// A process to keep alive.
pub(crate) struct Child {
    /// The worker's name, or `coordinator`.
    pub(crate) name: String,
    /// How to start it; asked each time.
    pub(crate) launch: Box<dyn Fn() -> Launch + Send + Sync>,
    /// Start it again when it died.
    pub(crate) restart: bool,
    /// Where its lines go.
    pub(crate) screen: Arc<Screen>,
    /// Where its events go.
    pub(crate) events: mpsc::Sender<Event>,
    /// The cluster ends.
    pub(crate) stop: CancellationToken,
}

impl Child {
    /// Keeps the process alive until the cluster ends, or, without restarts, until the process does.
    pub(crate) async fn supervise(self) -> Ended {
        loop {
            match self.run_once().await {
                Some(killed) => return Ended { name: self.name, killed },
                None if !self.restart => {
                    self.stop.cancelled().await;
                    return Ended { name: self.name, killed: false };
                }
                None => {}
            }
            tokio::select! {
                () = self.stop.cancelled() => return Ended { name: self.name, killed: false },
                () = time::sleep(RESTART_AFTER) => {}
            }
        }
    }

    /// One life of the process: `None` if it ended by itself, otherwise whether it had to be killed.
    async fn run_once(&self) -> Option<bool> {
        let launch = (self.launch)();
        let (mut process, stdin) = match start(launch.command(), launch.first_line.as_deref()).await {
            Ok(started) => started,
            Err(error) => {
                self.tell(Event::NotStarted { name: self.name.clone(), error }).await;
                return None;
            }
        };
        let lines = tokio::spawn(lines(process.stdout.take(), self.name.clone(), self.events.clone()));
        let log = tokio::spawn(relay(process.stderr.take(), self.name.clone(), Arc::clone(&self.screen)));
        let ended = tokio::select! {
            status = process.wait() => Some(status),
            () = self.stop.cancelled() => None,
        };
        if let Some(status) = ended {
            let _ = time::timeout(PIPE_GRACE, log).await;
            let _ = time::timeout(PIPE_GRACE, lines).await;
            let (code, how) = match status {
                Ok(status) => (status.code(), describe(status)),
                Err(error) => (None, error.to_string()),
            };
            self.tell(Event::Exited { name: self.name.clone(), code, how }).await;
            return None;
        }
        drop(stdin);
        let killed = time::timeout(GRACE, process.wait()).await.is_err();
        if killed {
            let _ = process.kill().await;
        }
        let _ = time::timeout(PIPE_GRACE, log).await;
        Some(killed)
    }

    async fn tell(&self, event: Event) {
        // Nobody listens any more once the cluster ends.
        let _ = self.events.send(event).await;
    }
}

async fn start(
    mut command: Command,
    first_line: Option<&str>,
) -> std::io::Result<(tokio::process::Child, Option<ChildStdin>)> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let mut process =
        command.spawn().map_err(|error| std::io::Error::new(error.kind(), format!("{program}: {error}")))?;
    let mut stdin = process.stdin.take();
    if let (Some(stdin), Some(line)) = (&mut stdin, first_line) {
        // A process that died at once says so by its exit.
        let _ = stdin.write_all(format!("{line}\n").as_bytes()).await;
        let _ = stdin.flush().await;
    }
    Ok((process, stdin))
}

async fn lines(pipe: Option<impl AsyncRead + Unpin>, name: String, events: mpsc::Sender<Event>) {
    let Some(pipe) = pipe else { return };
    let mut reader = BufReader::new(pipe);
    while let Some(text) = next_line(&mut reader).await {
        if events.send(Event::Line { name: name.clone(), text }).await.is_err() {
            break;
        }
    }
}

async fn relay(pipe: Option<impl AsyncRead + Unpin>, name: String, screen: Arc<Screen>) {
    let Some(pipe) = pipe else { return };
    let mut reader = BufReader::new(pipe);
    while let Some(text) = next_line(&mut reader).await {
        screen.say(&format!("{name} | {text}"));
    }
}

/// The next line, cut into pieces where it is longer than anybody reads.
async fn next_line(reader: &mut (impl AsyncBufReadExt + Unpin)) -> Option<String> {
    let mut bytes = Vec::new();
    match reader.take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes).await {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(String::from_utf8_lossy(&bytes).trim_end().to_owned()),
    }
}

fn describe(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return format!("was killed by signal {signal}");
    }
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => "ended".to_owned(),
    }
}

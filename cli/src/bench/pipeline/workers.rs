//! The workers of `bench pipeline`: this program again, as processes, which all end with the benchmark.

use std::{ffi::OsString, future, path::PathBuf, sync::Arc};

use grokpipe_bench::{
    BenchError,
    pipeline::{Launch, Workers},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    config::SecretText,
    up::{
        child::{self, Child},
        command,
        screen::Screen,
    },
};

/// Processes of workers.
pub(super) struct Processes {
    program: PathBuf,
    /// Flags of each worker: its weights, device, threads, precision and prefill.
    flags: Vec<OsString>,
    secret: SecretText,
    events: mpsc::Receiver<child::Event>,
    tell_events: mpsc::Sender<child::Event>,
    children: JoinSet<child::Ended>,
    screen: Arc<Screen>,
    stop: CancellationToken,
}

impl Processes {
    /// None yet.
    pub(super) fn new(program: PathBuf, flags: Vec<OsString>, secret: SecretText) -> Self {
        let (tell_events, events) = mpsc::channel(256);
        let (children, screen, stop) = (JoinSet::new(), Arc::new(Screen::new()), CancellationToken::new());
        Self { program, flags, secret, events, tell_events, children, screen, stop }
    }

    fn command(&self, launch: &Launch) -> command::Launch {
        let mut args: Vec<OsString> = ["worker", "--exit-with-stdin", "--secret-stdin", "--no-config", "--coordinator"]
            .map(OsString::from)
            .to_vec();
        args.extend([&launch.coordinator, "--name", &launch.name].map(OsString::from));
        args.extend(self.flags.iter().cloned());
        if let Some(bytes) = launch.memory_bytes {
            args.extend(["--memory-share".to_owned(), bytes.to_string()].map(OsString::from));
        }
        command::Launch::new(&self.program, args, self.secret.text().map(str::to_owned))
    }
}

impl Workers for Processes {
    fn start(&mut self, launch: Launch) {
        let command = self.command(&launch);
        let child = Child {
            name: launch.name,
            launch: Box::new(move || command.clone()),
            restart: false,
            screen: Arc::clone(&self.screen),
            events: self.tell_events.clone(),
            stop: self.stop.clone(),
        };
        self.children.spawn(child.supervise());
    }

    async fn lost(&mut self) -> BenchError {
        while let Some(event) = self.events.recv().await {
            match event {
                child::Event::Line { .. } => {}
                child::Event::NotStarted { name, error } => return BenchError::NotStarted { name, source: error },
                child::Event::Exited { name, code, how } => return BenchError::Exited { name, code, how },
            }
        }
        // No process is left whose end could be reported.
        future::pending().await
    }

    async fn end(&mut self) {
        self.stop.cancel();
        self.events.close();
        while let Some(ended) = self.children.join_next().await {
            if let Ok(ended) = ended
                && ended.killed
            {
                self.screen.say(&format!("{} did not end within 5 s and was killed", ended.name));
            }
        }
    }
}

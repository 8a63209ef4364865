//! When a long-lived process ends: at Ctrl-C, at SIGTERM, and, where `up` started it, when its standard input closes, as it does when
//! the process that started it is gone, however it ended.

use std::{
    io::{self, Read},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{error::CliError, stderr};

/// Standard input, watched from the start, so that an end is noticed also while a device is opened and measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stdin {
    closed: CancellationToken,
    /// Somebody waits for `closed`, and ends what is to be ended.
    is_attended: Arc<AtomicBool>,
}

impl Stdin {
    /// Watches standard input, if `wanted`. Until [`shutdown_token`] attends to it, its end is the process's end.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub(crate) fn watched(wanted: bool) -> Result<Self, CliError> {
        let stdin = Self::default();
        if wanted {
            let watched = stdin.clone();
            // A thread of its own: a blocked read must not hold up the runtime's end.
            thread::Builder::new()
                .name("stdin".to_owned())
                .spawn(move || watched.wait())
                .map_err(|error| CliError::failed("a thread could not start").because(error))?;
        }
        Ok(stdin)
    }

    fn wait(&self) {
        let mut buffer = [0_u8; 256];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
        self.closed.cancel();
        if !self.is_attended.load(Ordering::SeqCst) {
            stderr::flush();
            process::exit(0);
        }
    }
}

/// Says when to end.
///
/// # Errors
/// When the system registers no signal handler.
pub(crate) fn shutdown_token(stdin: &Stdin) -> Result<CancellationToken, CliError> {
    let refuse = |error: io::Error| CliError::failed("signals cannot be received").because(error);
    let token = CancellationToken::new();
    let ending = token.clone();
    let mut interrupts = signal(SignalKind::interrupt()).map_err(refuse)?;
    let mut terminations = signal(SignalKind::terminate()).map_err(refuse)?;
    // From here on the token is what ends the process; one that is cancelled already ends it at once.
    stdin.is_attended.store(true, Ordering::SeqCst);
    let closed = stdin.closed.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupts.recv() => tracing::info!("interrupted, ending"),
            _ = terminations.recv() => tracing::info!("asked to end"),
            () = closed.cancelled() => {}
            () = ending.cancelled() => {}
        }
        ending.cancel();
    });
    Ok(token)
}

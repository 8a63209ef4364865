//! Arguments and waits that several subcommands share.

use std::{
    io::{self, Read},
    path::PathBuf,
    thread,
    time::Duration,
};

use tokio::{runtime::Builder, time};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    config::{self, Layers},
    error::CliError,
};

/// Which configuration file to use.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ConfigArgs {
    /// Configuration file [default: cluster.toml if there is one, else the demo]
    #[arg(long, value_name = "F", env = "GROKPIPE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Use no configuration file, even where there is one
    #[arg(long, hide = true)]
    pub(crate) no_config: bool,
}

impl ConfigArgs {
    /// The layers below the flags.
    pub(crate) fn layers(&self) -> Layers {
        let mut layers = Layers::of_process(self.config.clone());
        layers.no_file = self.no_config;
        layers
    }
}

/// A value of `--device`.
pub(crate) fn parse_device(text: &str) -> Result<String, String> {
    config::device(text).ok_or_else(|| format!("expected {}", config::DEVICES))
}

/// Time that connections and tasks get to end once the process is to end.
const GRACE: Duration = Duration::from_secs(4);

/// Runs a long-lived part of a cluster on `threads` threads until it ends or is told to, see [`shutdown_token`].
///
/// # Errors
/// What `part` fails with.
pub(crate) fn serve<F, W>(threads: usize, with_stdin: bool, part: F) -> Result<(), CliError>
where
    F: FnOnce(CancellationToken) -> W,
    W: Future<Output = Result<(), CliError>>,
{
    let mut builder = if threads == 1 { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    let runtime =
        builder.enable_all().build().map_err(|error| CliError::failed("the runtime could not start").because(error))?;
    let ended = runtime.block_on(async {
        let shutdown = shutdown_token(with_stdin)?;
        let overdue = async {
            shutdown.cancelled().await;
            time::sleep(GRACE).await;
        };
        tokio::select! {
            ended = part(shutdown.clone()) => ended,
            () = overdue => {
                warn!("not everything ended within {} s", GRACE.as_secs());
                Ok(())
            }
        }
    });
    // A step that still runs on the device is not waited for.
    runtime.shutdown_background();
    ended
}

/// Says when to end: at Ctrl-C, at SIGTERM, and with `with_stdin` when standard input closes, as it does when the process that
/// started this one is gone, however it ended.
///
/// # Errors
/// When the system registers no signal handler or starts no thread.
pub(crate) fn shutdown_token(with_stdin: bool) -> Result<CancellationToken, CliError> {
    let refuse = |error: io::Error| CliError::failed("signals cannot be received").because(error);
    let token = CancellationToken::new();
    let ending = token.clone();
    let mut interrupts = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()).map_err(refuse)?;
    let mut terminations = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(refuse)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupts.recv() => tracing::info!("interrupted, ending"),
            _ = terminations.recv() => tracing::info!("asked to end"),
            () = ending.cancelled() => {}
        }
        ending.cancel();
    });
    if with_stdin {
        let ending = token.clone();
        // A thread of its own: a blocked read must not hold up the runtime's end.
        thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(move || {
                let mut buffer = [0_u8; 256];
                let mut stdin = io::stdin().lock();
                loop {
                    match stdin.read(&mut buffer) {
                        Ok(0) => break,
                        Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                        _ => {}
                    }
                }
                ending.cancel();
            })
            .map_err(|error| CliError::failed("a thread could not start").because(error))?;
    }
    Ok(token)
}

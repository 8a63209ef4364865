//! Arguments and waits that several subcommands share.

use std::{env, ffi::OsString, path::PathBuf, time::Duration};

use tokio::{runtime::Builder, time};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    config::{self, Layers},
    ending::{Stdin, shutdown_token},
    error::CliError,
    paths,
};

/// Which configuration file to use.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ConfigArgs {
    /// Configuration file [env: GROKPIPE_CONFIG] [default: cluster.toml if there is one, else the demo]
    #[arg(long, value_name = "F", value_parser = paths::parser())]
    config: Option<PathBuf>,
    /// Use no configuration file, even where there is one
    #[arg(long, hide = true)]
    pub(crate) no_config: bool,
}

impl ConfigArgs {
    /// The layers below the flags.
    pub(crate) fn layers(&self) -> Layers {
        // One whose home is not known stays as it is, and the message about it names it.
        let named =
            || variable_os("GROKPIPE_CONFIG").map(PathBuf::from).map(|path| paths::expanded(&path).unwrap_or(path));
        let mut layers = Layers::of_process(self.config.clone().or_else(named));
        layers.no_file = self.no_config;
        layers
    }
}

/// A variable of the environment; one that is empty counts as unset.
pub(crate) fn variable(name: &str) -> Option<String> {
    variable_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// As [`variable`], for values that need not be text.
pub(crate) fn variable_os(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.to_string_lossy().trim().is_empty())
}

/// A value of `--device`.
pub(crate) fn parse_device(text: &str) -> Result<String, String> {
    config::device(text).ok_or_else(|| format!("expected {}", config::DEVICES))
}

/// Time that connections and tasks get to end once the process is to end.
const GRACE: Duration = Duration::from_secs(4);

/// Runs a long-lived part of a cluster on `threads` threads until it ends or is told to, see `ending.rs`.
///
/// # Errors
/// What `part` fails with.
pub(crate) fn serve<F, W>(threads: usize, stdin: &Stdin, part: F) -> Result<(), CliError>
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
        let shutdown = shutdown_token(stdin)?;
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

//! Where log lines go and how they look: to standard error, readable on a terminal, one JSON object a line otherwise.
//!
//! `GROKPIPE_LOG` filters them (`info` by default, `warn,grokpipe_worker=debug`); `GROKPIPE_LOG_STYLE` (`pretty` or `json`)
//! overrides the choice, as `up` does for the processes whose lines it shows. `NO_COLOR` and `TERM=dumb` turn colours off.

use std::{
    env,
    io::{self, IsTerminal},
};

use tracing_subscriber::EnvFilter;

use crate::error::CliError;

/// Variable with the filter.
pub(crate) const FILTER: &str = "GROKPIPE_LOG";
/// Variable with the style.
pub(crate) const STYLE: &str = "GROKPIPE_LOG_STYLE";

/// Starts logging. `default_filter` holds where `GROKPIPE_LOG` says nothing.
///
/// # Errors
/// A usage error when `GROKPIPE_LOG` is no filter.
pub(crate) fn start(default_filter: &str) -> Result<(), CliError> {
    let wanted = env::var(FILTER).ok().filter(|text| !text.trim().is_empty());
    let text = wanted.as_deref().unwrap_or(default_filter);
    let filter = EnvFilter::builder().parse(text).map_err(|error| {
        CliError::usage(format!("{FILTER} is {text:?}"))
            .at(format!("environment variable {FILTER}"))
            .because(error)
            .advise("set it to a level or to levels by target, as info or warn,grokpipe_worker=debug")
    })?;
    // When nobody reads standard error any more, lines are lost; that must not end the process with a panic.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).log_internal_errors(false);
    let started = if is_pretty() {
        builder.with_ansi(has_colours()).try_init()
    } else {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    };
    started.map_err(|error| CliError::failed("logging could not start").because(error))
}

/// Whether log lines are for people.
pub(crate) fn is_pretty() -> bool {
    match env::var(STYLE).as_deref() {
        Ok("pretty") => true,
        Ok("json") => false,
        _ => io::stderr().is_terminal(),
    }
}

fn has_colours() -> bool {
    let off = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || env::var_os("TERM").is_some_and(|t| t == "dumb");
    !off && io::stderr().is_terminal()
}

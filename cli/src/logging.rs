//! Where log lines go and how they look: to standard error, readable on a terminal, one JSON object a line otherwise.
//!
//! `GROKPIPE_LOG` filters them (`info` by default, `warn,grokpipe_worker=debug`); `GROKPIPE_LOG_STYLE` (`pretty` or `json`)
//! overrides the choice, as `up` does for the processes whose lines it shows. `NO_COLOR` and `TERM=dumb` turn colours off.
//!
//! Nobody waits for a line to be read (`stderr.rs`).

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io::{self, IsTerminal},
};

use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::{common::variable, error::CliError, stderr};

/// Variable with the filter.
pub(crate) const FILTER: &str = "GROKPIPE_LOG";
/// Variable with the style.
pub(crate) const STYLE: &str = "GROKPIPE_LOG_STYLE";

/// Starts logging. `default_filter` holds where `GROKPIPE_LOG` says nothing.
///
/// # Errors
/// A usage error when `GROKPIPE_LOG` is no filter.
pub(crate) fn start(default_filter: &str) -> Result<(), CliError> {
    let wanted = variable(FILTER);
    let text = wanted.as_deref().unwrap_or(default_filter);
    let filter = EnvFilter::builder().parse(text).map_err(|error| {
        CliError::usage(format!("{FILTER} is {text:?}"))
            .at(format!("environment variable {FILTER}"))
            .because(error)
            .advise("set it to a level or to levels by target, as info or warn,grokpipe_worker=debug")
    })?;
    if let Some(style) = style().filter(|style| !matches!(style.as_str(), "pretty" | "json")) {
        return Err(CliError::usage(format!("{STYLE} is {style:?}"))
            .at(format!("environment variable {STYLE}"))
            .because("expected pretty or json"));
    }
    // A panic is told like everything else, and by the thread that must not wait.
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        let trace = if trace.status() == BacktraceStatus::Captured { format!("\n{trace}") } else { String::new() };
        stderr::line(&format!("{panic}{trace}"));
    }));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| stderr::Handle).log_internal_errors(false);
    let started = if is_pretty() {
        builder.with_ansi(has_colours()).try_init()
    } else {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    };
    started.map_err(|error| CliError::failed("logging could not start").because(error))
}

/// The line that stands for lines that nobody read in time.
pub(crate) fn lost_lines(count: u64) -> String {
    let text = format!("{count} lines before this one are lost: nobody read them");
    if is_pretty() {
        format!("{text}\n")
    } else {
        format!("{}\n", json!({"level": "WARN", "message": text, "lost": count}))
    }
}

fn style() -> Option<String> {
    variable(STYLE).map(|style| style.to_ascii_lowercase())
}

/// Whether log lines are for people.
pub(crate) fn is_pretty() -> bool {
    match style().as_deref() {
        Some("pretty") => true,
        Some("json") => false,
        _ => io::stderr().is_terminal(),
    }
}

fn has_colours() -> bool {
    let off = variable("NO_COLOR").is_some() || variable("TERM").is_some_and(|terminal| terminal == "dumb");
    !off && io::stderr().is_terminal()
}

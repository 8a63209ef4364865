//! How far long work over many bytes is.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::config::ByteSize;

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A bar on a terminal, a line every ten seconds otherwise, on standard error.
pub(crate) struct Screen {
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Screen {
    /// Shows nothing yet.
    pub(crate) fn new() -> Self {
        let bar = || {
            let bar = ProgressBar::no_length();
            let template = "{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left";
            match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        };
        Self { bar: io::stderr().is_terminal().then(bar), last_line: Instant::now() }
    }

    /// So many bytes of so many are done.
    pub(crate) fn show(&mut self, done: u64, total: u64) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            None if self.last_line.elapsed() >= LINE_INTERVAL => {
                self.last_line = Instant::now();
                // Nobody may read standard error any more; that is no reason to end.
                let _ = writeln!(io::stderr(), "{} of {}", ByteSize(done), ByteSize(total));
            }
            None => {}
        }
    }

    /// The work is over.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

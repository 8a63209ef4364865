//! What `bench stage` says of its runs: medians, and shares of what the memory gave around each. Knows neither stage nor clock.

use std::ops::Range;

use grokpipe_kernels::{Precision, Prefill};
use serde_json::{Value, json};

use super::super::{
    reads::{COUNTED, Reads},
    spread::{Spread, median},
};
use crate::{
    config::{precision_name, prefill_name},
    text::Table,
};

/// A test and its runs.
pub(super) struct Measured {
    pub(super) test: &'static str,
    pub(super) batch: u32,
    pub(super) prompt: u32,
    pub(super) tokens: u32,
    /// At least one.
    pub(super) runs: Vec<Run>,
}

/// One run of a test.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) seconds: f64,
    /// Bytes a second that the memory gave before and after, the mean.
    pub(super) bandwidth: f64,
}

impl Measured {
    /// Tokens a second.
    fn rates(&self) -> Spread {
        Spread::of(self.runs.iter().map(|run| self.rate(run)))
    }

    fn rate(&self, run: &Run) -> f64 {
        f64::from(self.tokens) / run.seconds
    }

    /// Bytes a second that the memory gave around the runs.
    fn bandwidth(&self) -> f64 {
        median(self.runs.iter().map(|run| run.bandwidth))
    }

    /// Share of it that tokens of so many bytes read: the median of the runs, each beside what the memory gave around it.
    fn share(&self, bytes_a_token: f64) -> f64 {
        median(self.runs.iter().map(|run| bytes_a_token * self.rate(run) / run.bandwidth))
    }
}

/// Bytes a second that the memory gave, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bandwidth {
    /// Before and after each run, the median.
    AroundRuns(f64),
    /// Once: the weights left no room to measure beside them.
    BeforeLoading(f64),
}

impl Bandwidth {
    fn gigabytes(self) -> f64 {
        let (Self::AroundRuns(bytes) | Self::BeforeLoading(bytes)) = self;
        bytes / 1e9
    }

    fn when(self) -> &'static str {
        match self {
            Self::AroundRuns(_) => "around each run",
            Self::BeforeLoading(_) => "before loading",
        }
    }
}

/// What `bench stage` says.
pub(super) struct Report {
    pub(super) model: String,
    pub(super) device: String,
    pub(super) threads: usize,
    pub(super) precision: Precision,
    pub(super) prefill: Prefill,
    pub(super) layers: Range<u32>,
    pub(super) weights_bytes: u64,
    pub(super) load_seconds: f64,
    /// Of this process, with what measuring the bandwidth takes, where the system tells.
    pub(super) peak_memory: Option<u64>,
    pub(super) bandwidth: Bandwidth,
    pub(super) reads: Reads,
    pub(super) results: Vec<Measured>,
}

impl Report {
    /// Bytes that each token of a measurement reads.
    fn bytes_a_token(&self, measured: &Measured) -> f64 {
        match measured.test {
            "decode" => self.reads.step_bytes(measured.batch) / f64::from(measured.batch),
            _ => self.reads.prompt_bytes(measured.prompt) / f64::from(measured.prompt),
        }
    }

    /// Multiply-adds of each token of a measurement, without the head's.
    fn multiply_adds_a_token(&self, measured: &Measured) -> f64 {
        match measured.test {
            "decode" => self.reads.multiply_adds(1, 1),
            _ => self.reads.multiply_adds(measured.prompt, 1) / f64::from(measured.prompt),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let results: Vec<Value> = self
            .results
            .iter()
            .map(|measured| {
                let Spread { median: rate, least, most } = measured.rates();
                let bytes = self.bytes_a_token(measured);
                json!({
                    "test": measured.test,
                    "batch": measured.batch,
                    "prompt": measured.prompt,
                    "tokens_per_second": rate,
                    "tokens_per_second_least": least,
                    "tokens_per_second_most": most,
                    "bytes_per_token": bytes,
                    "gigabytes_per_second": bytes * rate / 1e9,
                    "read_gigabytes_per_second": measured.bandwidth() / 1e9,
                    "share_of_bandwidth": measured.share(bytes),
                    "gigaflops_per_second": 2e-9 * self.multiply_adds_a_token(measured) * rate,
                })
            })
            .collect();
        json!({
            "machine": {
                "device": self.device,
                "threads": self.threads,
                "read_gigabytes_per_second": self.bandwidth.gigabytes(),
                "read_measured": self.bandwidth.when(),
            },
            "model": self.model,
            "precision": precision_name(self.precision),
            "prefill": prefill_name(self.prefill),
            "layers": [self.layers.start, self.layers.end],
            "weights_bytes": self.weights_bytes,
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": self.peak_memory,
            "bytes_counted": COUNTED,
            "load_gigabytes_per_second": self.weights_bytes as f64 / self.load_seconds / 1e9,
            "results": results,
        })
    }

    pub(super) fn render(&self) -> String {
        let gigabytes = self.weights_bytes as f64 / 1e9;
        let mut text = format!("{}, layers {}..{}, {}\n", self.model, self.layers.start, self.layers.end, self.device);
        let rate = gigabytes / self.load_seconds;
        let peak =
            self.peak_memory.map_or(String::new(), |bytes| format!(", peak memory {:.2} GB", bytes as f64 / 1e9));
        text += &format!("loaded {gigabytes:.2} GB in {:.1} s, {rate:.1} GB/s{peak}\n", self.load_seconds);
        let (precision, prefill) = (precision_name(self.precision), prefill_name(self.prefill));
        let (gigabytes, when) = (self.bandwidth.gigabytes(), self.bandwidth.when());
        text +=
            &format!("precision {precision}, prefill {prefill}; memory reads {gigabytes:.1} GB/s, measured {when}\n\n");
        let mut table =
            Table::new(&["test", "tokens/s", "least", "most", "a token", "reads", "GB/s", "of memory", "GFLOP/s"]);
        for measured in &self.results {
            let Spread { median: rate, least, most } = measured.rates();
            let bytes = self.bytes_a_token(measured);
            let name = match measured.test {
                "decode" => format!("decode × {}", measured.batch),
                _ => format!("prefill {}", measured.prompt),
            };
            table.row(vec![
                name,
                format!("{rate:.1}"),
                format!("{least:.1}"),
                format!("{most:.1}"),
                format!("{:.2} ms", 1e3 / rate),
                format!("{:.3} GB", bytes / 1e9),
                format!("{:.1}", bytes * rate / 1e9),
                format!("{:.0} %", 100.0 * measured.share(bytes)),
                format!("{:.0}", 2e-9 * self.multiply_adds_a_token(measured) * rate),
            ]);
        }
        text + &format!("{table}\nbytes are counted {COUNTED}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_compared_with_what_the_memory_gave_around_it() {
        let run = |seconds, bandwidth| Run { seconds, bandwidth };
        // Twice as fast while the memory was: the share is the same, whatever the medians of both are.
        let runs = vec![run(2.0, 100.0), run(1.0, 200.0), run(4.0, 50.0), run(1.0, 200.0), run(8.0, 25.0)];
        let measured = Measured { test: "decode", batch: 1, prompt: 0, tokens: 8, runs };
        assert_eq!((measured.rates(), measured.bandwidth()), (Spread { median: 4.0, least: 1.0, most: 8.0 }, 100.0));
        assert_eq!(measured.share(10.0), 0.4);
        // Where shares differ, theirs is the middle, and not that of the middle rate in the middle bandwidth.
        let measured = Measured { runs: vec![run(1.0, 100.0), run(2.0, 100.0), run(4.0, 25.0)], ..measured };
        assert_eq!((measured.rates().median, measured.bandwidth(), measured.share(25.0)), (4.0, 100.0, 2.0));
    }
}

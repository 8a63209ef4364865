//! What the runs of a stage come to: medians, and shares of what the memory gave around each. Knows neither stage nor clock.

use std::ops::Range;

use grokpipe_kernels::{Precision, Prefill};
use serde_json::{Value, json};

use crate::{COUNTED, Reads, Spread, median};

/// A test and its runs.
pub struct Measured {
    /// `decode` or `prefill`.
    pub test: &'static str,
    /// Sequences.
    pub batch: u32,
    /// Tokens of the prompt; 0 for decodes.
    pub prompt: u32,
    /// Tokens of a run.
    pub tokens: u32,
    /// At least one.
    pub runs: Vec<Run>,
}

/// One run of a test.
#[derive(Clone, Copy)]
pub struct Run {
    /// How long it took.
    pub seconds: f64,
    /// Bytes a second that the memory gave before and after, the mean.
    pub bandwidth: f64,
}

impl Measured {
    /// Tokens a second.
    pub fn rates(&self) -> Spread {
        Spread::of(self.runs.iter().map(|run| self.rate(run)))
    }

    fn rate(&self, run: &Run) -> f64 {
        f64::from(self.tokens) / run.seconds
    }

    /// Bytes a second that the memory gave around the runs.
    fn bandwidth(&self) -> f64 {
        median(self.runs.iter().map(|run| run.bandwidth))
    }

    /// Share of it that tokens of so many bytes read: the median of the runs, each against what the memory gave around it.
    pub fn share(&self, bytes_a_token: f64) -> f64 {
        median(self.runs.iter().map(|run| bytes_a_token * self.rate(run) / run.bandwidth))
    }
}

/// Bytes a second that the memory gave, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bandwidth {
    /// Before and after each run, the median.
    AroundRuns(f64),
    /// Once: the weights left no room to measure next to them.
    BeforeLoading(f64),
}

impl Bandwidth {
    /// In units of 10^9 bytes a second.
    pub fn gigabytes(self) -> f64 {
        let (Self::AroundRuns(bytes) | Self::BeforeLoading(bytes)) = self;
        bytes / 1e9
    }

    /// When it was measured, for people.
    pub fn when(self) -> &'static str {
        match self {
            Self::AroundRuns(_) => "around each run",
            Self::BeforeLoading(_) => "before loading",
        }
    }
}

/// Everything that was measured.
pub struct Report {
    /// Name of the model.
    pub model: String,
    /// What computed, for people.
    pub device: String,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// How exactly products were computed.
    pub precision: Precision,
    /// How the device computes steps of many rows.
    pub prefill: Prefill,
    /// What ran.
    pub layers: Range<u32>,
    /// Bytes of weights on the device.
    pub weights_bytes: u64,
    /// How long loading took.
    pub load_seconds: f64,
    /// Of this process, with what measuring the bandwidth takes, where the system tells.
    pub peak_memory: Option<u64>,
    /// What the memory gave.
    pub bandwidth: Bandwidth,
    /// What steps read.
    pub reads: Reads,
    /// The tests, in order.
    pub results: Vec<Measured>,
}

impl Report {
    /// Bytes that each token of a measurement reads.
    pub fn bytes_a_token(&self, measured: &Measured) -> f64 {
        match measured.test {
            "decode" => self.reads.step_bytes(measured.batch) / f64::from(measured.batch),
            _ => self.reads.prompt_bytes(measured.prompt) / f64::from(measured.prompt),
        }
    }

    /// Multiply-adds of each token of a measurement, without the head's.
    pub fn multiply_adds_a_token(&self, measured: &Measured) -> f64 {
        match measured.test {
            "decode" => self.reads.multiply_adds(1, 1),
            _ => self.reads.multiply_adds(measured.prompt, 1) / f64::from(measured.prompt),
        }
    }

    /// As one JSON object.
    pub fn to_json(&self) -> Value {
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
            "precision": self.precision.name(),
            "prefill": self.prefill.name(),
            "layers": [self.layers.start, self.layers.end],
            "weights_bytes": self.weights_bytes,
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": self.peak_memory,
            "bytes_counted": COUNTED,
            "load_gigabytes_per_second": self.weights_bytes as f64 / self.load_seconds / 1e9,
            "results": results,
        })
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

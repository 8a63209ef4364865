//! What was measured, in numbers: rates, what a hop costs, where the time went. Pure.
//!
//! Steps are paired: each was run by one worker and by several, right after one another. On a machine whose speed wavers, the
//! difference within a pair says what the hops cost; two averages taken at different times would not.

use std::ops::Range;

use grokpipe_kernels::{Precision, Prefill};
use grokpipe_proto::{snapshot::Prediction, v1::StageTiming};
use serde_json::{Value, json};

use super::workload::Test;
use crate::{COUNTED, Reads, Spread, median};

/// One worker's part in the frames of a test, in microseconds.
#[derive(Debug, Default)]
pub struct StageTimes {
    /// Its name.
    pub worker: String,
    /// What it ran.
    pub layers: Range<u32>,
    /// In the executor.
    pub compute: Vec<f64>,
    /// In the queue.
    pub queue: Vec<f64>,
    /// On the link that leads to it; none before a link's first answer.
    pub wire: Vec<f64>,
}

/// One arrangement in one test.
#[derive(Debug, Default)]
pub struct Timed {
    /// Seconds of each step that counts, run by run.
    pub runs: Vec<Vec<f64>>,
    /// By worker, in the order of their layers.
    pub stages: Vec<StageTimes>,
    /// Tokens a second that a plan of these workers predicts.
    pub predicted: Option<f64>,
}

impl Timed {
    /// Takes note of a frame's way.
    pub(crate) fn frame(&mut self, timings: &[StageTiming]) {
        self.stages.resize_with(timings.len().max(self.stages.len()), StageTimes::default);
        for (stage, timing) in self.stages.iter_mut().zip(timings) {
            stage.worker.clone_from(&timing.worker);
            stage.layers = timing.layer_start..timing.layer_end;
            stage.compute.push(timing.compute_us as f64);
            stage.queue.push(timing.queue_us as f64);
            // Unknown before a link's first answer.
            stage.wire.extend((timing.wire_us > 0).then_some(timing.wire_us as f64));
        }
    }

    /// Tokens a second of the runs of a test.
    pub fn rates(&self, test: Test) -> Spread {
        Spread::of(self.runs.iter().map(|steps| f64::from(test.tokens()) / steps.iter().sum::<f64>()))
    }

    /// What was predicted of a test, if anything was, and what was measured.
    pub fn prediction(&self, test: Test) -> Option<Prediction> {
        self.predicted.map(|predicted| Prediction { predicted, measured: Some(self.rates(test).median) })
    }
}

/// Both arrangements in one test.
#[derive(Debug)]
pub struct Tested {
    /// Which test.
    pub test: Test,
    /// One worker.
    pub alone: Timed,
    /// Several.
    pub split: Timed,
}

/// What one hop costs a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HopCost {
    /// Seconds.
    pub seconds: f64,
    /// Of the step of one worker.
    pub share: f64,
    /// The share by run.
    pub spread: Spread,
}

impl Tested {
    /// What one of so many hops costs, by pairs of steps.
    pub fn hop_cost(&self, hops: f64) -> HopCost {
        let pairs = self.alone.runs.iter().zip(&self.split.runs);
        let by_run: Vec<Vec<f64>> =
            pairs.map(|(alone, split)| alone.iter().zip(split).map(|(a, b)| (b - a) / hops).collect()).collect();
        let step = median(self.alone.runs.concat());
        let seconds = median(by_run.concat());
        let spread = Spread::of(by_run.into_iter().map(|run| median(run) / step));
        HopCost { seconds, share: seconds / step, spread }
    }
}

/// Everything that was found.
pub struct Report {
    /// Name of the model.
    pub model: String,
    /// What the workers compute on, as they say.
    pub device: String,
    /// Threads of each worker.
    pub threads: u32,
    /// How exactly products were computed.
    pub precision: Precision,
    /// How the workers compute steps of many rows, as they say.
    pub prefill: Prefill,
    /// Layers of either arrangement.
    pub layers: Range<u32>,
    /// Workers of the split one.
    pub workers: u32,
    /// Bytes a second that a worker read at its start.
    pub bandwidth: f64,
    /// Bytes that steps read.
    pub reads: Reads,
    /// The tests, in order.
    pub tests: Vec<Tested>,
    /// Frames whose hidden states were compared.
    pub compared: usize,
    /// The first place where they were not the same bytes.
    pub difference: Option<String>,
}

impl Report {
    /// Both arrangements of every test, with their numbers of workers.
    pub fn rows(&self) -> impl Iterator<Item = (Test, u32, &Timed)> {
        let both = |tested: &'_ Tested| [(tested.test, 1), (tested.test, self.workers)];
        self.tests.iter().flat_map(move |tested| {
            both(tested)
                .into_iter()
                .zip([&tested.alone, &tested.split])
                .map(|((test, count), timed)| (test, count, timed))
        })
    }

    /// Hops that the split arrangement has and the other has not.
    pub fn hops(&self) -> f64 {
        f64::from(self.workers.max(2) - 1)
    }

    /// Bytes that each token of a test reads.
    pub fn bytes_a_token(&self, test: Test) -> f64 {
        match test {
            Test::Decode { batch, .. } => self.reads.step_bytes(batch) / f64::from(batch),
            Test::Prefill { prompt } => self.reads.prompt_bytes(prompt) / f64::from(prompt),
        }
    }

    /// As one JSON object.
    pub fn to_json(&self) -> Value {
        let results = self.rows().map(|(test, workers, timed)| {
            let rates = timed.rates(test);
            let bytes = self.bytes_a_token(test);
            let stage = |stage: &StageTimes| {
                json!({
                    "worker": stage.worker,
                    "layers": [stage.layers.start, stage.layers.end],
                    "compute_milliseconds": median(stage.compute.clone()) / 1e3,
                    "queue_milliseconds": median(stage.queue.clone()) / 1e3,
                    "wire_milliseconds": median(stage.wire.clone()) / 1e3,
                })
            };
            json!({
                "test": test.name(),
                "workers": workers,
                "batch": test.batch(),
                "prompt": test.prompt(),
                "tokens_per_second": rates.median,
                "tokens_per_second_least": rates.least,
                "tokens_per_second_most": rates.most,
                "bytes_per_token": bytes,
                "gigabytes_per_second": bytes * rates.median / 1e9,
                "share_of_bandwidth": bytes * rates.median / self.bandwidth,
                "predicted_tokens_per_second": timed.predicted,
                "difference_percent": timed.prediction(test).and_then(Prediction::difference_percent),
                "stages": timed.stages.iter().map(stage).collect::<Vec<_>>(),
            })
        });
        let hops: Vec<Value> = self
            .tests
            .iter()
            .map(|tested| {
                let cost = tested.hop_cost(self.hops());
                json!({
                    "test": tested.test.name(),
                    "batch": tested.test.batch(),
                    "prompt": tested.test.prompt(),
                    "cost_milliseconds": 1e3 * cost.seconds,
                    "cost_percent": 100.0 * cost.share,
                    "cost_percent_least": 100.0 * cost.spread.least,
                    "cost_percent_most": 100.0 * cost.spread.most,
                })
            })
            .collect();
        json!({
            "machine": {
                "device": self.device,
                "threads": self.threads,
                "read_gigabytes_per_second": self.bandwidth / 1e9,
            },
            "model": self.model,
            "precision": self.precision.name(),
            "prefill": self.prefill.name(),
            "layers": [self.layers.start, self.layers.end],
            "workers": self.workers,
            "bytes_counted": COUNTED,
            "results": results.collect::<Vec<_>>(),
            // Of the first test, a single stream unless another was asked for.
            "hop_cost_percent": hops.first().map(|hop| hop["cost_percent"].clone()),
            "hop_cost_milliseconds": hops.first().map(|hop| hop["cost_milliseconds"].clone()),
            "hops": hops,
            "hidden_states_compared": self.compared,
            "hidden_states_equal": self.difference.is_none(),
        })
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_kernels::SyntheticWeights;
    use grokpipe_model::ModelConfig;

    use super::*;

    /// Steps of one worker that waver, and of three that take 2 ms more each time.
    fn report() -> Report {
        let runs = [[0.1, 0.2, 0.1], [0.2, 0.3, 0.1], [0.3, 0.1, 0.1]];
        let plus = |more: f64| runs.iter().map(|run| run.iter().map(|step| step + more).collect()).collect();
        let timing = |worker: &str, wire_us| StageTiming {
            worker: worker.into(),
            compute_us: 900,
            wire_us,
            ..StageTiming::default()
        };
        let mut split = Timed { runs: plus(0.002), stages: Vec::new(), predicted: Some(8.0) };
        split.frame(&[timing("w1", 0), timing("w2", 50), timing("w3", 70)]);
        split.frame(&[timing("w1", 60), timing("w2", 50), timing("w3", 70)]);
        let config = ModelConfig::grok_1();
        let weights = SyntheticWeights::new(config.clone(), 1);
        Report {
            model: config.name.clone(),
            device: "cpu".into(),
            threads: 1,
            precision: Precision::Fast,
            prefill: Prefill::Invariant,
            layers: 0..3,
            workers: 3,
            bandwidth: 1e9,
            reads: Reads::of(&config, &weights, &(0..3), false).unwrap(),
            tests: vec![Tested {
                test: Test::Decode { batch: 1, tokens: 3 },
                alone: Timed { runs: plus(0.0), stages: Vec::new(), predicted: Some(8.0) },
                split,
            }],
            compared: 12,
            difference: None,
        }
    }

    #[test]
    fn a_hop_costs_what_pairs_of_steps_differ_by() {
        let cost = report().tests[0].hop_cost(2.0);
        assert!((cost.seconds - 0.001).abs() < 1e-9 && (cost.share - 0.01).abs() < 1e-9, "{cost:?}");
        assert!((cost.spread.most - cost.spread.least).abs() < 1e-9, "{cost:?}");
    }

    #[test]
    fn facts_are_in_the_json() {
        let mut report = report();
        let json = report.to_json();
        assert_eq!((&json["results"][0]["workers"], &json["results"][1]["workers"]), (&json!(1), &json!(3)));
        assert_eq!(
            json["results"][1]["stages"][0]["wire_milliseconds"], 0.06,
            "a wire time that is unknown is left out"
        );
        assert_eq!(json["hidden_states_equal"], true);
        assert!((json["hop_cost_percent"].as_f64().unwrap() - 1.0).abs() < 1e-6);
        assert!((json["results"][0]["tokens_per_second"].as_f64().unwrap() - 3.0 / 0.5).abs() < 1e-9);
        assert!((json["results"][0]["difference_percent"].as_f64().unwrap() + 25.0).abs() < 1e-9);
        report.difference = Some("here".into());
        assert_eq!(report.to_json()["hidden_states_equal"], false);
    }
}

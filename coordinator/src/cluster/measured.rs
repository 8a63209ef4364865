//! Compares a plan's predicted speed with recent steps. Pure: times come in as figures.
//!
//! A plan predicts how long each stage, with its hop, takes for a step of n tokens. For each such step that returns, the total time and
//! each stage's computing and queueing times are known; the rest is spent in the hops, one a stage. From the medians, the slowest stage
//! gives the speed with every stage busy, and the sum of all stages the speed of one stream.

use std::collections::VecDeque;

use super::messages::StageTiming;

/// Steps that are remembered.
const STEPS_MAX: usize = 256;
/// With fewer nothing is said.
const STEPS_MIN: usize = 32;

/// Tokens a second, by recent steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Speed {
    /// With every stage busy.
    pub(super) tokens_per_second: f64,
    /// Of one stream alone.
    pub(super) stream_tokens_per_second: f64,
}

/// Recent steps of one plan.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    /// Seconds in each stage's executor, and in a hop.
    recent: VecDeque<(Vec<f64>, f64)>,
}

impl Measured {
    /// A step that was under way for so long.
    pub(super) fn step(&mut self, seconds: f64, timings: &[StageTiming]) {
        if timings.is_empty() || self.recent.front().is_some_and(|(stages, _)| stages.len() != timings.len()) {
            return;
        }
        let compute: Vec<f64> = timings.iter().map(|timing| timing.compute_us as f64 / 1e6).collect();
        let queued: f64 = timings.iter().map(|timing| timing.queue_us as f64 / 1e6).sum();
        let hop = (seconds - queued - compute.iter().sum::<f64>()).max(0.0) / timings.len() as f64;
        if self.recent.len() == STEPS_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((compute, hop));
    }

    /// What the steps of `batch_tokens` give, once there were enough of them.
    pub(super) fn speed(&self, batch_tokens: u32) -> Option<Speed> {
        if self.recent.len() < STEPS_MIN {
            return None;
        }
        let hop = median(self.recent.iter().map(|(_, hop)| *hop));
        let stages = self.recent.front()?.0.len();
        let stage =
            |index: usize| median(self.recent.iter().filter_map(|(stages, _)| stages.get(index).copied())) + hop;
        let times: Vec<f64> = (0..stages).map(stage).collect();
        let slowest = times.iter().copied().fold(0.0, f64::max);
        let all: f64 = times.iter().sum();
        let batch = f64::from(batch_tokens);
        (slowest > 0.0).then(|| Speed { tokens_per_second: batch / slowest, stream_tokens_per_second: batch / all })
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step through stages with these computing times in microseconds, 50 of waiting before each and 100 for each hop.
    fn step(measured: &mut Measured, compute: &[u64]) {
        let timing = |&compute_us: &u64| StageTiming { compute_us, queue_us: 50, ..StageTiming::default() };
        let timings: Vec<StageTiming> = compute.iter().map(timing).collect();
        let under_way = compute.iter().map(|compute| compute + 50 + 100).sum::<u64>();
        measured.step(under_way as f64 / 1e6, &timings);
    }

    #[test]
    fn the_slowest_stage_and_the_sum_are_told_once_there_were_enough_steps() {
        let mut measured = Measured::default();
        for count in 1..=STEPS_MIN {
            assert_eq!(measured.speed(1), None, "after {} steps", count - 1);
            // One step in four is disturbed.
            step(&mut measured, if count % 4 == 0 { &[90_000, 90_000] } else { &[900, 1900] });
        }
        let speed = measured.speed(1).unwrap();
        assert!((speed.tokens_per_second - 500.0).abs() < 1e-6, "{speed:?}");
        assert!((speed.stream_tokens_per_second - 1.0 / 0.003).abs() < 1e-6, "{speed:?}");
        assert!((measured.speed(4).unwrap().tokens_per_second - 2000.0).abs() < 1e-6);
    }

    #[test]
    fn old_steps_are_forgotten_and_odd_ones_left_out() {
        let mut measured = Measured::default();
        (0..STEPS_MAX).for_each(|_| step(&mut measured, &[900]));
        step(&mut measured, &[1, 1]);
        measured.step(1.0, &[]);
        assert!((measured.speed(1).unwrap().tokens_per_second - 1000.0).abs() < 1e-6);
        (0..STEPS_MAX).for_each(|_| step(&mut measured, &[1900]));
        assert!((measured.speed(1).unwrap().tokens_per_second - 500.0).abs() < 1e-6);
        // Clocks that contradict each other make no negative hop.
        let mut measured = Measured::default();
        let timing = StageTiming { compute_us: 1000, ..StageTiming::default() };
        (0..STEPS_MIN).for_each(|_| measured.step(0.0005, std::slice::from_ref(&timing)));
        assert!((measured.speed(1).unwrap().tokens_per_second - 1000.0).abs() < 1e-6);
    }
}

//! How long a step of a stage may take before its device counts as hung. Pure: times come in as figures.
//!
//! Ten times the 99th percentile of its recent steps of that size, and at least three seconds. Sizes are classes of rows, by powers
//! of two. A size that has not been seen yet goes by the nearest smaller one, row for row, since rows one after the other are the
//! slowest way to compute them; else by a larger one.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

/// No step is held to less: a scheduler's hiccup or a page fault on a slow disk is no hang.
const FLOOR: Duration = Duration::from_secs(3);
/// For a stage that has not finished a step yet: its first one reads all weights, perhaps from a disk, and compiles pipelines.
const UNPROVEN: Duration = Duration::from_secs(60);
const FACTOR: f64 = 10.0;
/// Steps of a size that are remembered.
const STEPS_MAX: usize = 128;

/// What the steps of one stage took lately.
#[derive(Clone, Debug, Default)]
pub(super) struct StepTimes {
    /// Rows and seconds, by the power of two that the rows reach.
    classes: BTreeMap<u32, VecDeque<(u64, f64)>>,
}

impl StepTimes {
    /// A step of `rows` rows took `seconds`.
    pub(super) fn record(&mut self, rows: u64, seconds: f64) {
        if rows == 0 || !seconds.is_finite() {
            return;
        }
        let class = self.classes.entry(rows.ilog2()).or_default();
        if class.len() == STEPS_MAX {
            class.pop_front();
        }
        class.push_back((rows, seconds));
    }

    /// Longest time that a step of `rows` rows may take.
    pub(super) fn limit(&self, rows: u64) -> Duration {
        let rows = rows.max(1);
        let usual = self.usual(rows);
        usual.map_or(UNPROVEN, |seconds| {
            Duration::try_from_secs_f64(FACTOR * seconds).unwrap_or(Duration::MAX).max(FLOOR)
        })
    }

    /// The 99th percentile for `rows` rows, in seconds; `None` before the first step.
    pub(super) fn usual(&self, rows: u64) -> Option<f64> {
        let class = rows.max(1).ilog2();
        if let Some(steps) = self.classes.get(&class) {
            return Some(percentile_99(steps.iter().map(|(_, seconds)| *seconds)));
        }
        if let Some((_, steps)) = self.classes.range(..class).next_back() {
            let a_row = percentile_99(steps.iter().map(|(rows, seconds)| seconds / *rows as f64));
            return Some(a_row * rows as f64);
        }
        let (_, steps) = self.classes.range(class..).next()?;
        Some(percentile_99(steps.iter().map(|(_, seconds)| *seconds)))
    }
}

fn percentile_99(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let index = (values.len() * 99).div_ceil(100).saturating_sub(1);
    values.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_may_take_ten_times_what_nearly_all_of_its_size_took() {
        let mut times = StepTimes::default();
        assert_eq!(times.limit(1), UNPROVEN);
        for step in 1..=100 {
            times.record(1, if step == 50 { 90.0 } else { 0.5 });
            times.record(8, 2.0);
        }
        // Rows, seconds.
        let cases = [(1, 5.0), (8, 20.0), (15, 20.0), (4, 20.0), (64, 160.0)];
        for (rows, seconds) in cases {
            assert_eq!(times.limit(rows), Duration::from_secs_f64(seconds), "{rows} rows");
        }
    }

    #[test]
    fn a_fast_stage_is_not_held_to_milliseconds_and_old_steps_are_forgotten() {
        let mut times = StepTimes::default();
        times.record(1, 0.001);
        assert_eq!((times.limit(1), times.limit(512)), (FLOOR, Duration::from_secs_f64(5.12)));
        (0..STEPS_MAX).for_each(|_| times.record(1, 1.0));
        assert_eq!(times.limit(1), Duration::from_secs(10));
        times.record(1, f64::NAN);
        times.record(0, 100.0);
        assert_eq!(times.limit(1), Duration::from_secs(10));
        let mut times = StepTimes::default();
        times.record(1, 1e300);
        assert!(times.limit(2) > Duration::from_secs(1 << 40));
    }
}

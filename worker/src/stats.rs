//! What a stage has done lately, for heartbeats.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use grokpipe_proto::{
    snapshot::{NodeStats, SnapshotMemory},
    v1::Heartbeat,
};
use tokio::time::Instant;

/// Rates are over this long.
const WINDOW: Duration = Duration::from_secs(5);
/// More steps than this in the window are thinned out at the old end; a bound on memory, far above real rates.
const MOST_STEPS: usize = 8192;

#[derive(Clone, Copy, Debug)]
struct StepDone {
    at: Instant,
    rows: usize,
    compute: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    frames_total: u64,
    recent: VecDeque<StepDone>,
    weights_bytes: u64,
    kv_bytes: u64,
    queue_depth: u32,
    /// Steps that were given to the device and have not ended: when that was, and their rows; oldest first.
    running: BTreeMap<u64, (Instant, usize)>,
    next_step: u64,
}

/// A step that was given to the device; dropping it says that it has ended.
#[derive(Debug)]
pub struct RunningStep {
    stats: Arc<Stats>,
    step: u64,
}

impl Drop for RunningStep {
    fn drop(&mut self) {
        self.stats.inner().running.remove(&self.step);
    }
}

/// Counters of one worker.
#[derive(Debug)]
pub struct Stats {
    started: Instant,
    inner: Mutex<Inner>,
}

impl Default for Stats {
    fn default() -> Self {
        Self { started: Instant::now(), inner: Mutex::default() }
    }
}

impl Stats {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new assignment: counts start again.
    pub fn start_epoch(&self, weights_bytes: u64, kv_bytes: u64) {
        let mut inner = self.inner();
        // Steps of an earlier epoch may still hold the device.
        let (running, next_step) = (std::mem::take(&mut inner.running), inner.next_step);
        *inner = Inner { weights_bytes, kv_bytes, running, next_step, ..Inner::default() };
    }

    /// A step is given to the device now. What is returned goes with it, and ends when it ends, whoever still waits for it.
    pub fn begin_step(self: &Arc<Self>, rows: usize) -> RunningStep {
        let mut inner = self.inner();
        let step = inner.next_step;
        inner.next_step += 1;
        inner.running.insert(step, (Instant::now(), rows));
        RunningStep { stats: Arc::clone(self), step }
    }

    /// A step has ended now.
    pub fn step_done(&self, rows: usize, compute: Duration) {
        let mut inner = self.inner();
        inner.frames_total += 1;
        if inner.recent.len() == MOST_STEPS {
            inner.recent.pop_front();
        }
        inner.recent.push_back(StepDone { at: Instant::now(), rows, compute });
    }

    /// Frames waiting now.
    pub fn queue_depth(&self, depth: usize) {
        self.inner().queue_depth = depth as u32;
    }

    /// The figures of now.
    pub fn heartbeat(&self, memory_bytes: u64, rss_bytes: Option<u64>) -> Heartbeat {
        let mut inner = self.inner();
        let now = Instant::now();
        while inner.recent.front().is_some_and(|step| now.duration_since(step.at) > WINDOW) {
            inner.recent.pop_front();
        }
        let busy: Duration = inner.recent.iter().map(|step| step.compute).sum();
        let rows: usize = inner.recent.iter().map(|step| step.rows).sum();
        let mut times: Vec<Duration> = inner.recent.iter().map(|step| step.compute).collect();
        let middle = times.len() / 2;
        let oldest = inner.running.values().next();
        let step_age_seconds = oldest.map_or(0.0, |(since, _)| now.duration_since(*since).as_secs_f64());
        let step_rows = oldest.map_or(0, |(_, rows)| *rows as u64);
        let p50 = (!times.is_empty()).then(|| times.select_nth_unstable(middle).1.as_secs_f64());
        let memory = SnapshotMemory {
            weights_bytes: Some(inner.weights_bytes),
            kv_bytes: Some(inner.kv_bytes),
            free_bytes: Some(memory_bytes.saturating_sub(inner.weights_bytes + inner.kv_bytes)),
            rss_bytes,
        };
        let stats = NodeStats {
            memory: Some(memory),
            tokens_per_second: Some(rows as f64 / WINDOW.as_secs_f64()),
            step_seconds_p50: p50,
            queue_depth: Some(inner.queue_depth),
            idle_ratio: Some((1.0 - busy.as_secs_f64() / WINDOW.as_secs_f64()).clamp(0.0, 1.0)),
            uptime_seconds: Some(now.duration_since(self.started).as_secs()),
        };
        Heartbeat { frames_total: inner.frames_total, step_age_seconds, step_rows, stats: Some(stats) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_step_given_to_the_device_is_told_with_its_age_until_it_ends_whatever_epoch_begins() {
        let stats = Arc::new(Stats::default());
        let step = stats.begin_step(5);
        tokio::time::advance(Duration::from_secs(7)).await;
        stats.start_epoch(1, 1);
        let beat = stats.heartbeat(10, None);
        assert_eq!((beat.step_rows, beat.step_age_seconds), (5, 7.0));
        let behind = stats.begin_step(1);
        tokio::time::advance(Duration::from_secs(2)).await;
        let beat = stats.heartbeat(10, None);
        assert_eq!((beat.step_rows, beat.step_age_seconds), (5, 9.0), "the oldest");
        drop((step, behind));
        let beat = stats.heartbeat(10, None);
        assert_eq!((beat.step_rows, beat.step_age_seconds), (0, 0.0));
    }

    #[tokio::test(start_paused = true)]
    async fn rates_cover_the_last_five_seconds() {
        let stats = Stats::default();
        stats.start_epoch(100, 20);
        stats.step_done(50, Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(4)).await;
        stats.step_done(10, Duration::from_millis(500));
        assert_eq!(stats.heartbeat(1000, Some(7)).frames_total, 2);
        let figures = || stats.heartbeat(1000, Some(7)).stats.unwrap();
        let now = figures();
        assert_eq!((now.tokens_per_second, now.memory().free_bytes), (Some(12.0), Some(880)));
        assert!((now.idle_ratio.unwrap() - 0.7).abs() < 1e-9);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(figures().tokens_per_second, Some(2.0));
        tokio::time::advance(Duration::from_secs(9)).await;
        let idle = figures();
        assert_eq!((idle.tokens_per_second, idle.idle_ratio, idle.step_seconds_p50), (Some(0.0), Some(1.0), None));
        assert_eq!(idle.uptime_seconds, Some(15));
    }
}

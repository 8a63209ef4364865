//! The snapshot as HTTP shows it: the last one published, unless it is too old to be true.
//!
//! A coordinator whose engine hangs or has ended must not keep saying "serving". So [`SnapshotView::follow`] notes when each
//! snapshot arrives, and [`SnapshotView::current`] replaces the verdict of one that should have been followed by another.

use std::{sync::Arc, time::Duration};

use grokpipe_proto::{
    ids::LayerRange,
    snapshot::{ClusterSnapshot, NodeStats, Verdict, VerdictPhase},
};
use tokio::{sync::watch, time::Instant};

/// Five missed publications: a busy machine misses one or two, not five.
const STALE_AFTER: Duration = Duration::from_secs(5);

/// The latest snapshot and when it came.
#[derive(Clone, Debug)]
pub(super) struct SnapshotView {
    snapshots: watch::Receiver<Arc<ClusterSnapshot>>,
    /// `None` until [`SnapshotView::follow`] runs.
    arrived: Arc<watch::Sender<Option<Instant>>>,
}

impl SnapshotView {
    pub(super) fn new(snapshots: watch::Receiver<Arc<ClusterSnapshot>>) -> Self {
        Self { snapshots, arrived: Arc::new(watch::Sender::new(None)) }
    }

    /// Notes each arrival; ends with the publisher.
    pub(super) async fn follow(mut self) {
        loop {
            self.arrived.send_replace(Some(Instant::now()));
            if self.snapshots.changed().await.is_err() {
                return;
            }
        }
    }

    /// A receiver of its own, for a stream.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<ClusterSnapshot>> {
        self.snapshots.clone()
    }

    /// What is known now.
    pub(super) fn current(&self) -> Arc<ClusterSnapshot> {
        self.doubted().unwrap_or_else(|| self.snapshots.borrow().clone())
    }

    /// The last snapshot, marked as old; `None` while it can be trusted.
    pub(super) fn doubted(&self) -> Option<Arc<ClusterSnapshot>> {
        let age = self.arrived.borrow().map(|arrived| arrived.elapsed()).unwrap_or_default();
        let text = if self.snapshots.has_changed().is_err() {
            "Down: the coordinator has stopped".to_owned()
        } else if age > STALE_AFTER {
            format!("Down: the coordinator has reported nothing for {} s", age.as_secs())
        } else {
            return None;
        };
        let snapshot = ClusterSnapshot::clone(&self.snapshots.borrow());
        Some(Arc::new(aged(snapshot, text, age.as_secs_f64())))
    }
}

/// A snapshot of `seconds` ago that may no longer hold: ages have grown, and figures other than memory are unknown.
fn aged(mut snapshot: ClusterSnapshot, text: String, seconds: f64) -> ClusterSnapshot {
    let missing_layers = LayerRange::new(0, snapshot.model().layers);
    snapshot.verdict = Some(Verdict::new(VerdictPhase::Down, text, missing_layers));
    for node in &mut snapshot.nodes {
        for age in [&mut node.heartbeat_age_seconds, &mut node.last_error_age_seconds] {
            *age = age.map(|age| age + seconds);
        }
        node.stats = node.stats.map(|stats| NodeStats { memory: stats.memory, ..NodeStats::default() });
    }
    for event in &mut snapshot.events {
        event.age_seconds += seconds;
    }
    snapshot
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::tests::serving;

    #[tokio::test(start_paused = true)]
    async fn silent_engine_is_not_serving() {
        let mut before = serving();
        before.nodes[0].heartbeat_age_seconds = Some(0.5);
        before.nodes[0].stats = Some(NodeStats { tokens_per_second: Some(9.0), ..NodeStats::default() });
        let (publish, snapshots) = watch::channel(Arc::new(before));
        let view = SnapshotView::new(snapshots);
        tokio::spawn(view.clone().follow());
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(view.current().verdict().serving, "five seconds are not yet silence");
        tokio::time::sleep(Duration::from_secs(2)).await;
        let current = view.current();
        assert!(!current.verdict().serving);
        assert_eq!(current.verdict().text, "Down: the coordinator has reported nothing for 7 s");
        assert_eq!(current.verdict().missing_layers, [LayerRange::new(0, 64).expect("64 layers").into()]);

        let node = &current.nodes[0];
        assert_eq!(
            (node.heartbeat_age_seconds, node.stats().tokens_per_second),
            (Some(7.5), None),
            "old figures do not pass as new"
        );

        publish.send_replace(Arc::new(serving()));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(view.current().verdict().serving, "and it is believed again");
    }

    #[tokio::test]
    async fn ended_engine_is_not_serving() {
        let (publish, snapshots) = watch::channel(Arc::new(serving()));
        let view = SnapshotView::new(snapshots);
        assert!(view.current().verdict().serving);
        drop(publish);
        assert_eq!(view.current().verdict().text, "Down: the coordinator has stopped");
    }
}

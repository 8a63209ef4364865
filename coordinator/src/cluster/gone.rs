//! How long workers that have left are remembered.
//!
//! People want to see which worker was lost, but the list must not grow with every name ever used. Workers that the configuration
//! names, and those of the plan in force, are always remembered.

use std::time::Duration;

use grokpipe_proto::ids::WorkerName;

use super::Cluster;

/// A worker that has been gone for this long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Most workers that are gone and remembered; beyond them, the one gone longest is forgotten.
const GONE_MAX: usize = 16;
/// Most workers at a time, as in the configuration.
pub(super) const PRESENT_MAX: usize = 256;

impl Cluster {
    /// Forgets workers that have been gone for long.
    pub(super) fn forget_gone(&mut self, now: Duration) {
        let expected = |name: &WorkerName| self.settings.expected.iter().any(|worker| *name == *worker.name);
        let gone = self
            .nodes
            .iter()
            .filter(|(name, node)| !node.present && !expected(name) && !self.runs_stage(name.as_str()));
        let mut gone: Vec<(Duration, WorkerName)> = gone.map(|(name, node)| (node.last_heard, name.clone())).collect();
        gone.sort_by(|a, b| b.cmp(a));
        for (index, (heard, name)) in gone.into_iter().enumerate() {
            if index >= GONE_MAX || now.saturating_sub(heard) > FORGET_AFTER {
                self.nodes.remove(&name);
            }
        }
    }

    pub(super) fn present_count(&self) -> usize {
        self.nodes.values().filter(|node| node.present).count()
    }
}

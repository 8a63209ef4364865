//! The one view of the cluster that page, health routes, `grokpipe status` and gRPC all show.
//!
//! `snapshot.proto` defines it, and `build.rs` makes its JSON. Here are the names that the rest of the program uses, the check of a
//! snapshot that came over the network, and how its parts are put in words. This module does not know how the figures were measured;
//! workers and coordinator fill them in.

pub(crate) mod json;
mod prediction;
mod verdict;

use std::fmt;

use serde::Serialize;

use crate::ids::LayerRange;
pub use crate::v1::{
    ClusterSnapshot, NodeState, NodeStats, SnapshotEvent, SnapshotLoad, SnapshotMemory, SnapshotModel, SnapshotNode,
    SnapshotPlan, SnapshotRequests, SnapshotStage, Verdict, VerdictPhase,
};
pub use prediction::Prediction;
pub use verdict::{VerdictInput, verdict};

/// Most events in a snapshot.
pub const EVENTS_MAX: usize = 32;

/// Why a received snapshot cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// A part that every snapshot has is absent.
    #[error("expected \"{field}\" in the cluster snapshot, found none")]
    Missing {
        /// The part.
        field: &'static str,
    },
    /// A range without a layer.
    #[error("expected a layer range [start, end) with start < end, found [{start}, {end})")]
    Range {
        /// Start found.
        start: u32,
        /// End found.
        end: u32,
    },
    /// A value of an enumeration that this build does not know.
    #[error("expected a known \"{field}\", found number {found}")]
    Unknown {
        /// The field.
        field: &'static str,
        /// Number found.
        found: i32,
    },
}

impl ClusterSnapshot {
    /// A snapshot from another process, once it is known to be complete: it has a verdict, a model and counts of requests, every state
    /// is known to this build, and every range has a layer.
    ///
    /// # Errors
    /// [`SnapshotError`], which names the field.
    pub fn checked(self) -> Result<Self, SnapshotError> {
        let missing = |field| SnapshotError::Missing { field };
        let verdict = self.verdict.as_ref().ok_or(missing("verdict"))?;
        self.model.as_ref().ok_or(missing("model"))?;
        self.requests.as_ref().ok_or(missing("requests"))?;
        if verdict.phase() == VerdictPhase::Unspecified {
            return Err(SnapshotError::Unknown { field: "verdict.phase", found: verdict.phase });
        }
        for node in &self.nodes {
            if node.state() == NodeState::Unspecified {
                return Err(SnapshotError::Unknown { field: "nodes.state", found: node.state });
            }
        }
        let mut ranges: Vec<&crate::v1::LayerRange> = verdict.missing_layers.iter().collect();
        ranges.extend(self.nodes.iter().filter_map(|node| node.layers.as_ref()));
        for stage in self.plan.iter().flat_map(|plan| &plan.stages) {
            ranges.push(stage.layers.as_ref().ok_or(missing("plan.stages.layers"))?);
        }
        match ranges.into_iter().find(|range| range.start >= range.end) {
            Some(&crate::v1::LayerRange { start, end }) => Err(SnapshotError::Range { start, end }),
            None => Ok(self),
        }
    }

    /// Whether the cluster serves. A snapshot without a verdict does not.
    pub fn verdict(&self) -> &Verdict {
        const NONE: &Verdict = &Verdict { serving: false, text: String::new(), missing_layers: Vec::new(), phase: 0 };
        self.verdict.as_ref().unwrap_or(NONE)
    }

    /// The model served.
    pub fn model(&self) -> &SnapshotModel {
        const NONE: &SnapshotModel = &SnapshotModel { name: String::new(), layers: 0 };
        self.model.as_ref().unwrap_or(NONE)
    }

    /// Requests in the coordinator.
    pub fn requests(&self) -> SnapshotRequests {
        self.requests.unwrap_or_default()
    }
}

impl SnapshotNode {
    /// A node of which nothing but its name and state is known.
    pub fn new(name: impl Into<String>, state: NodeState) -> Self {
        Self { name: name.into(), state: state.into(), ..Self::default() }
    }

    /// Layers assigned to it; `None` for a spare.
    pub fn layers(&self) -> Option<LayerRange> {
        self.layers.and_then(|range| range.try_into().ok())
    }

    /// How much of its layers it has loaded.
    pub fn load(&self) -> SnapshotLoad {
        self.load.unwrap_or_default()
    }

    /// What it last said of itself.
    pub fn stats(&self) -> NodeStats {
        self.stats.unwrap_or_default()
    }
}

impl SnapshotStage {
    /// Its layers.
    pub fn layers(&self) -> Option<LayerRange> {
        self.layers.and_then(|range| range.try_into().ok())
    }
}

impl SnapshotLoad {
    /// Share loaded, 0 to 1; `None` while the total is unknown.
    pub fn ratio(self) -> Option<f64> {
        match (self.bytes, self.bytes_total) {
            (Some(_), Some(0)) => Some(1.0),
            (Some(bytes), Some(total)) => Some((bytes as f64 / total as f64).min(1.0)),
            _ => None,
        }
    }
}

impl NodeStats {
    /// Its memory.
    pub fn memory(&self) -> SnapshotMemory {
        self.memory.unwrap_or_default()
    }

    /// Without figures that no honest worker sends: they become unknown.
    #[must_use]
    pub fn plausible(mut self) -> Self {
        for figure in [&mut self.tokens_per_second, &mut self.step_seconds_p50, &mut self.idle_ratio] {
            *figure = figure.filter(|value| value.is_finite() && *value >= 0.0);
        }
        self.idle_ratio = self.idle_ratio.filter(|ratio| *ratio <= 1.0);
        self
    }
}

/// The word in JSON, on the page and in tables: "ready".
impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests;

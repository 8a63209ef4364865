//! The one view of the cluster that page, health routes, `grokpipe status` and gRPC all show.
//!
//! This module decides the words and the JSON of that view: field names, units, and that an unknown figure is `null`, never 0.
//! Sizes are bytes, times seconds, layer ranges half-open `[start, end)`. Fields are added, never renamed.
//! It does not know how the figures were measured; the coordinator fills them in. Times are ages, not clock readings, so that
//! two machines whose clocks differ still agree.

mod convert;
mod prediction;
mod verdict;

use serde::{Deserialize, Serialize};

pub use convert::SnapshotError;
pub use prediction::Prediction;
pub use verdict::{VerdictInput, verdict};

/// The whole cluster at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterSnapshot {
    /// Name of the cluster, from its configuration.
    pub cluster: String,
    /// Whether requests are served, in words.
    pub verdict: Verdict,
    /// The model served.
    pub model: SnapshotModel,
    /// Who runs which layers; `None` before the first plan.
    pub plan: Option<SnapshotPlan>,
    /// Every worker that has ever joined, in the order of the stages, then by name.
    pub nodes: Vec<SnapshotNode>,
    /// Requests in the coordinator.
    pub requests: SnapshotRequests,
    /// What happened lately, latest last; at most [`EVENTS_MAX`].
    pub events: Vec<SnapshotEvent>,
}

/// Most events that a snapshot carries.
pub const EVENTS_MAX: usize = 32;

/// Whether the cluster serves, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// All layers are covered by ready stages.
    pub serving: bool,
    /// The first word of [`Verdict::text`], for programs.
    pub phase: VerdictPhase,
    /// One line for people.
    pub text: String,
    /// Layers that no ready stage covers, in order, neighbours merged.
    pub missing_layers: Vec<LayerSpan>,
}

/// What the cluster is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictPhase {
    /// No plan yet: workers are missing, or their memory does not suffice.
    Waiting,
    /// Every stage has a live node; some still read their layers, or no token has gone through them yet.
    Loading,
    /// All layers are covered and loaded, and a token went through them.
    Serving,
    /// A planned stage has no live node, or the stages do not reach each other.
    Down,
}

/// Layers `[start, end)`; in JSON an array of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "[u32; 2]", try_from = "[u32; 2]")]
pub struct LayerSpan {
    start: u32,
    end: u32,
}

impl LayerSpan {
    /// The layers `start..end`.
    ///
    /// # Errors
    /// [`SnapshotError::Span`] when `end` comes before `start`.
    pub fn new(start: u32, end: u32) -> Result<Self, SnapshotError> {
        if end < start { Err(SnapshotError::Span { start, end }) } else { Ok(Self { start, end }) }
    }

    /// First layer.
    pub fn start(self) -> u32 {
        self.start
    }

    /// The layer after the last one.
    pub fn end(self) -> u32 {
        self.end
    }

    /// Number of layers.
    pub fn count(self) -> u32 {
        self.end - self.start
    }
}

impl From<LayerSpan> for [u32; 2] {
    fn from(span: LayerSpan) -> Self {
        [span.start, span.end]
    }
}

impl TryFrom<[u32; 2]> for LayerSpan {
    type Error = SnapshotError;

    fn try_from([start, end]: [u32; 2]) -> Result<Self, SnapshotError> {
        Self::new(start, end)
    }
}

/// For people, both ends inclusive: "layer 7", "layers 32–47", "no layers".
impl std::fmt::Display for LayerSpan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.count() {
            0 => write!(f, "no layers"),
            1 => write!(f, "layer {}", self.start),
            _ => write!(f, "layers {}–{}", self.start, self.end - 1),
        }
    }
}

/// The model served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotModel {
    /// Its name.
    pub name: String,
    /// Number of layers.
    pub layers: u32,
}

/// The plan in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotPlan {
    /// Number of the plan; each new plan counts up.
    pub epoch: u64,
    /// What the planner expects with every stage busy.
    pub predicted_tokens_per_second: Option<f64>,
    /// The same by recent steps; `None` while there are too few of them.
    pub measured_tokens_per_second: Option<f64>,
    /// What the planner expects of one stream alone.
    pub predicted_stream_tokens_per_second: Option<f64>,
    /// The same by recent steps.
    pub measured_stream_tokens_per_second: Option<f64>,
    /// In the order in which a token passes them.
    pub stages: Vec<SnapshotStage>,
}

/// One stage of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStage {
    /// Name of the node.
    pub node: String,
    /// Its layers.
    pub layers: LayerSpan,
}

/// What a node is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Connected, without layers yet.
    Joining,
    /// Reads its layers.
    Loading,
    /// Runs frames.
    Ready,
    /// A spare without layers.
    Standby,
    /// Finishes its requests and takes no new ones.
    Draining,
    /// Lost.
    Down,
    /// Connected, but left out of plans; its last error says why.
    Excluded,
}

impl NodeState {
    /// The word in JSON and on the page.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Draining => "draining",
            Self::Down => "down",
            Self::Excluded => "excluded",
        }
    }
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotNode {
    /// Its name, unique in the cluster.
    pub name: String,
    /// What it is doing.
    pub state: NodeState,
    /// Layers assigned to it; `None` for a spare.
    pub layers: Option<LayerSpan>,
    /// Where other stages reach it, `host:port`.
    pub address: Option<String>,
    /// Backend and adapter.
    pub device: Option<String>,
    /// Process id on its own machine.
    pub pid: Option<u32>,
    /// Memory in use and free.
    pub memory: SnapshotMemory,
    /// How much of its layers it has read.
    pub load: SnapshotLoad,
    /// Tokens that passed through it lately, per second.
    pub tokens_per_second: Option<f64>,
    /// Median time of one step.
    pub step_seconds_p50: Option<f64>,
    /// Seconds since it was last heard of.
    pub heartbeat_age_seconds: Option<f64>,
    /// What last went wrong; kept after the node has returned.
    pub last_error: Option<String>,
    /// Seconds since then.
    pub last_error_age_seconds: Option<f64>,
    /// Frames that wait at it.
    pub queue_depth: Option<u32>,
    /// Share of the time that it waited for frames, 0 to 1.
    pub idle_ratio: Option<f64>,
    /// How often it has joined.
    pub joins: u32,
}

impl SnapshotNode {
    /// A node of which nothing but its name and state is known.
    pub fn new(name: impl Into<String>, state: NodeState) -> Self {
        Self {
            name: name.into(),
            state,
            layers: None,
            address: None,
            device: None,
            pid: None,
            memory: SnapshotMemory::default(),
            load: SnapshotLoad::default(),
            tokens_per_second: None,
            step_seconds_p50: None,
            heartbeat_age_seconds: None,
            last_error: None,
            last_error_age_seconds: None,
            queue_depth: None,
            idle_ratio: None,
            joins: 0,
        }
    }
}

/// A node's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMemory {
    /// Weights on the device.
    pub weights_bytes: Option<u64>,
    /// The pool of KV blocks.
    pub kv_bytes: Option<u64>,
    /// What is left of what the node offered.
    pub free_bytes: Option<u64>,
    /// Resident size of the process.
    pub rss_bytes: Option<u64>,
}

/// How much of its layers a node has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotLoad {
    /// Bytes read.
    pub bytes: Option<u64>,
    /// Bytes to read.
    pub bytes_total: Option<u64>,
}

impl SnapshotLoad {
    /// Share read, 0 to 1; `None` while the total is unknown.
    pub fn ratio(self) -> Option<f64> {
        match (self.bytes, self.bytes_total) {
            (Some(_), Some(0)) => Some(1.0),
            (Some(bytes), Some(total)) => Some((bytes as f64 / total as f64).min(1.0)),
            _ => None,
        }
    }
}

/// Requests in the coordinator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequests {
    /// In the pipeline.
    pub running: u32,
    /// In the queue.
    pub waiting: u32,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotEvent {
    /// Counts up without gaps.
    pub id: u64,
    /// Seconds since then.
    pub age_seconds: f64,
    /// Stable code: `worker_lost`, `plan_changed`.
    pub code: String,
    /// The node concerned, if it is one.
    pub node: Option<String>,
    /// For people.
    pub text: String,
}

#[cfg(test)]
mod tests;

//! What workers and coordinator say to each other, independent of the protocol. `api/wire.rs` translates.

use bytes::Bytes;
use grokpipe_proto::{
    ids::{Generation, MicroBatchId, PlanEpoch, SequenceId},
    link_token::LinkToken,
    snapshot::NodeStats,
};

/// What a worker says of itself when it joins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hello {
    /// Unique within the cluster.
    pub name: String,
    /// A restarted process has a larger one.
    pub generation: Generation,
    /// Lowest protocol version that it speaks.
    pub version_min: u32,
    /// Highest protocol version that it speaks.
    pub version_max: u32,
    /// What computes, for people.
    pub device: String,
    /// Equal fingerprints give equal bits.
    pub fingerprint: String,
    /// Bytes that it may fill with weights, KV and scratch.
    pub memory_bytes: u64,
    /// Bytes a second, measured at start.
    pub read_bandwidth: f64,
    /// Multiply-adds times two a second, measured at start.
    pub flop_rate: f64,
    /// Where the previous stage finds it: host:port.
    pub data_address: String,
    /// Process id, for people.
    pub pid: u32,
    /// Version and source revision of its program.
    pub build: String,
    /// Digest of the model that it would load from.
    pub model_digest: String,
    /// First layer that it holds already.
    pub held_layer_start: u32,
    /// The layer after the last one that it holds; equal to the first if there are none.
    pub held_layer_end: u32,
    /// What people should know of its device.
    pub notes: Vec<String>,
    /// How fast products are, by the matrices' format. A format that is absent goes by the two rates above.
    pub format_rates: Vec<FormatRate>,
    /// Fixed costs of a step.
    pub step_overhead: StepOverhead,
}

/// How fast products with matrices of one format are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FormatRate {
    /// Name of the format.
    pub format: String,
    /// Stored bytes of weights a second when one row is multiplied.
    pub decode_bytes_per_second: f64,
    /// Multiply-adds times two a second when many rows are multiplied.
    pub prefill_flops_per_second: f64,
}

/// Fixed costs of a step, without reading and multiplying weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOverhead {
    /// Seconds a step.
    pub step_seconds: f64,
    /// Seconds a layer.
    pub layer_seconds: f64,
    /// Seconds a token that the last stage draws.
    pub draw_seconds: f64,
}

/// The answer to a hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Protocol version that both will speak.
    pub version: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// Generation of the coordinator.
    pub coordinator_generation: Generation,
    /// Time between heartbeats, in milliseconds.
    pub heartbeat_interval_ms: u32,
}

/// What a worker says once it has joined.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// It is alive.
    Heartbeat(Heartbeat),
    /// It has loaded more.
    LoadProgress(LoadProgress),
    /// Its stage is ready.
    StageReady(StageReady),
    /// Its stage could not be made ready, or broke.
    StageFailed(StageFailed),
    /// Its stage cannot reach the next one.
    StageBlocked(StageBlocked),
    /// A frame was refused for good.
    FrameFailed(FrameFailed),
}

/// Sent by a worker as long as it lives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Heartbeat {
    /// Frames computed since the last assignment.
    pub frames_total: u64,
    /// How long ago the oldest step that has not ended was given to the device, in seconds; 0 when there is none.
    pub step_age_seconds: f64,
    /// Rows of that step.
    pub step_rows: u64,
    /// Figures that are shown as they come; nothing is decided by them.
    pub stats: NodeStats,
}

/// How much a stage has loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Plan epoch of the assignment.
    pub plan_epoch: PlanEpoch,
    /// Generation of the coordinator that gave it.
    pub coordinator_generation: Generation,
    /// Bytes loaded.
    pub bytes: u64,
    /// Bytes to load.
    pub bytes_total: u64,
}

/// Layers are on the device, and the link to the next stage stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageReady {
    /// Plan epoch of the assignment.
    pub plan_epoch: PlanEpoch,
    /// Generation of the coordinator that gave it.
    pub coordinator_generation: Generation,
    /// What was loaded.
    pub contents: Vec<ContentSum>,
}

/// The sum of the stored numbers of a part of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContentSum {
    /// Number of the part, see `grokpipe_model::contents::Part::from_index`.
    pub part: u32,
    /// Sixteen bytes; others are ignored.
    pub sum: Bytes,
    /// Whether a manifest next to the worker's files says the same.
    pub confirmed: bool,
}

/// A stage could not be made ready, or broke.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageFailed {
    /// Plan epoch of the assignment.
    pub plan_epoch: PlanEpoch,
    /// Generation of the coordinator that gave it.
    pub coordinator_generation: Generation,
    /// What was expected and what was found.
    pub message: String,
    /// Whether the same assignment may succeed when tried again.
    pub retryable: bool,
    /// Whether memory did not suffice.
    pub is_out_of_memory: bool,
    /// The worker at the other end when a link broke; empty otherwise.
    pub lost_peer: String,
}

/// A stage has its layers but cannot reach whom it hands its results to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageBlocked {
    /// Plan epoch of the assignment.
    pub plan_epoch: PlanEpoch,
    /// Generation of the coordinator that gave it.
    pub coordinator_generation: Generation,
    /// Name of the next stage's worker; empty when it is the coordinator.
    pub peer: String,
    /// Where it was tried, and what the system said.
    pub reason: String,
}

/// A frame was refused for good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameFailed {
    /// Plan epoch of the frame.
    pub plan_epoch: PlanEpoch,
    /// Generation of the coordinator that sent it.
    pub coordinator_generation: Generation,
    /// The micro-batch.
    pub micro_batch_id: MicroBatchId,
    /// What was expected and what was found.
    pub message: String,
    /// Name of the worker that refused.
    pub worker: String,
}

/// What the coordinator sends a worker that has joined.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Run these layers.
    Assign(Assignment),
    /// No layers under this epoch; it may keep what it holds.
    Release {
        /// The plan epoch.
        plan_epoch: PlanEpoch,
    },
}

/// The layers that a worker runs under an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// The plan epoch.
    pub plan_epoch: PlanEpoch,
    /// Generation of the coordinator.
    pub coordinator_generation: Generation,
    /// First layer.
    pub layer_start: u32,
    /// The layer after the last one.
    pub layer_end: u32,
    /// Digest of the model; a worker that has another one refuses.
    pub model_digest: String,
    /// Name of the model, for messages.
    pub model_name: String,
    /// Where the next stage is; empty for the last stage, which delivers to the coordinator.
    pub next_address: String,
    /// Name of the next stage's worker.
    pub next_worker: String,
    /// Generation of the previous stage's process, or of the coordinator for the first stage.
    pub previous_generation: Generation,
    /// KV blocks of the pool.
    pub kv_blocks: u32,
    /// Most tokens that a frame may carry.
    pub max_batch_tokens: u32,
    /// Most frames that may wait at a stage.
    pub max_frames_in_flight: u32,
    /// What the previous stage presents.
    pub link_token: LinkToken,
    /// What this stage presents to the next one, or to the coordinator.
    pub next_token: LinkToken,
}

/// What the last stage computed from a micro-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchResult {
    /// Plan epoch of the frame.
    pub plan_epoch: PlanEpoch,
    /// Generation of the last stage's process.
    pub sender_generation: Generation,
    /// The micro-batch.
    pub micro_batch_id: MicroBatchId,
    /// One for each sequence that wanted one.
    pub tokens: Vec<DrawnToken>,
    /// Every stage's step, in stage order.
    pub timings: Vec<StageTiming>,
}

/// A token that was drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DrawnToken {
    /// The sequence.
    pub sequence: SequenceId,
    /// The token.
    pub token_id: u32,
    /// Natural logarithm of its probability before temperature and filters.
    pub logprob: f32,
}

/// One stage's step, by that stage's own monotonic clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageTiming {
    /// Name of the worker.
    pub worker: String,
    /// First of its layers.
    pub layer_start: u32,
    /// The layer after the last one.
    pub layer_end: u32,
    /// Microseconds in the stage's queue.
    pub queue_us: u64,
    /// Microseconds in the executor.
    pub compute_us: u64,
}

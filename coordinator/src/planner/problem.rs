//! What the planner is asked and what it answers: plain figures, no names of machines beyond a label, no clocks.
//!
//! All sizes are bytes, all times seconds, all rates per second. The caller measures; nothing here knows how.

use std::{collections::BTreeMap, ops::Range};

use grokpipe_model::Bytes;
use grokpipe_proto::ids::LayerRange;
use thiserror::Error;

/// Most layers that a problem may have: the solver's tables grow with their square.
pub const LAYERS_MAX: usize = 256;

/// Most workers that a problem may have.
pub const WORKERS_MAX: usize = 256;

/// Products with matrices of one format.
#[derive(Clone, Debug, PartialEq)]
pub struct ProductCost {
    /// Name of the format, by which [`WorkerResources::rates`] knows how fast they are.
    pub format: String,
    /// Stored bytes of the matrices.
    pub bytes: u64,
    /// Whether these are all experts of a layer, of which a step reads the share that its batch touches. Other matrices are read whole.
    pub of_experts: bool,
    /// Floating-point operations a token (a multiply-add counts two).
    pub flops_per_token: f64,
}

/// Bytes and arithmetic of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCost {
    /// Bytes that the layer's weights take on the device.
    pub weight_bytes: u64,
    /// What a step computes with them. A layer may mix formats.
    pub products: Vec<ProductCost>,
}

/// Bytes and arithmetic of the head (final norm and output projection), which the last stage has.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadCost {
    /// Bytes on the device; all of them are read in every step.
    pub weight_bytes: u64,
    /// As [`ProductCost::format`].
    pub format: String,
    /// Floating-point operations a token.
    pub flops_per_token: f64,
}

/// Working memory of a stage, besides weights and KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchCost {
    /// Bytes that every stage needs.
    pub stage_bytes: u64,
    /// Further bytes that the stage with the head needs (logits).
    pub head_bytes: u64,
}

/// What it costs to hand hidden states to the next stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCost {
    /// Fixed time a hop.
    pub seconds_per_hop: f64,
    /// Bandwidth of a link.
    pub bytes_per_second: f64,
}

/// How fast a worker's products with matrices of one format are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Stored bytes a second that a product of one row gets through.
    pub bytes_per_second: f64,
    /// Floating-point operations a second of a product of many rows.
    pub flops_per_second: f64,
}

/// What a step of a worker takes besides its products.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overhead {
    /// Seconds a step.
    pub step_seconds: f64,
    /// Seconds a layer.
    pub layer_seconds: f64,
    /// Seconds for each token that the last stage draws.
    pub draw_seconds: f64,
}

/// One worker, as it described itself.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerResources {
    /// For messages.
    pub name: String,
    /// Memory that it may fill with weights, KV and scratch.
    pub memory_bytes: u64,
    /// Measured read bandwidth of that memory, bytes a second. With `flop_rate` the rate of formats that are not in `rates`.
    pub read_bandwidth: f64,
    /// Measured arithmetic, floating-point operations a second.
    pub flop_rate: f64,
    /// Measured rates of products, by format.
    pub rates: BTreeMap<String, Rate>,
    /// What a step takes besides products.
    pub overhead: Overhead,
    /// The layers that this worker must run, no more and no fewer; `None` leaves it to the planner.
    pub pinned_layers: Option<Range<u32>>,
    /// The layers that it has loaded already; `None` when it has none.
    pub held_layers: Option<Range<u32>>,
}

/// What is to be best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The slowest stage is as fast as possible: most tokens a second with a full pipeline.
    Throughput,
    /// The sum of the stages is as small as possible: one stream as fast as possible.
    Latency,
}

/// A stage of the plan in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousStage {
    /// Index into [`Problem::workers`].
    pub worker: usize,
    /// The layers that it runs.
    pub layers: LayerRange,
}

/// The question.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// All layers of the model, in order.
    pub layers: Vec<LayerCost>,
    /// Experts a layer.
    pub num_experts: u32,
    /// Experts that a token uses.
    pub num_experts_per_tok: u32,
    /// The head, on the last stage.
    pub head: HeadCost,
    /// Bytes of KV cache that one token takes in one layer.
    pub kv_bytes_per_token_per_layer: u64,
    /// Tokens that the KV pool must hold, on every stage.
    pub kv_tokens: u64,
    /// Working memory a stage.
    pub scratch: ScratchCost,
    /// Bytes that one token takes on the wire between stages.
    pub hidden_bytes_per_token: u64,
    /// The workers to choose from.
    pub workers: Vec<WorkerResources>,
    /// Links between stages.
    pub link: LinkCost,
    /// Tokens a micro-batch, for which the plan is to be best.
    pub batch_tokens: u32,
    /// What is to be best.
    pub objective: Objective,
    /// The plan in force, without the stages whose workers are gone. Moving layers costs time, so a plan that is good enough stays.
    pub previous: Option<Vec<PreviousStage>>,
}

/// One stage of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStage {
    /// Index into [`Problem::workers`].
    pub worker: usize,
    /// The layers that it runs.
    pub layers: LayerRange,
    /// Device bytes of these layers' weights, and of the head on the last stage.
    pub weight_bytes: u64,
    /// Device bytes of the KV pool.
    pub kv_bytes: u64,
    /// Device bytes of working memory.
    pub scratch_bytes: u64,
    /// The three together; never over the worker's memory.
    pub memory_bytes: u64,
    /// Predicted time of a micro-batch of [`Problem::batch_tokens`] in this stage, its hop included.
    pub step_seconds: f64,
    /// Layers of this stage that the worker does not hold yet.
    pub layers_to_load: u32,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The stages in order; together they cover every layer once.
    pub stages: Vec<PlannedStage>,
    /// Workers without a stage, by index, ascending.
    pub standby: Vec<usize>,
    /// Tokens a second when every stage always has a micro-batch of [`Problem::batch_tokens`].
    pub predicted_tokens_per_second: f64,
    /// Tokens a second of one stream alone: one token at a time through all stages.
    pub predicted_stream_tokens_per_second: f64,
}

/// A run of layers that no worker has room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The layers.
    pub layers: Range<u32>,
    /// Bytes of their weights and KV, and of the head if the last layer is among them.
    pub bytes: u64,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Refusal {
    /// Nobody to run anything.
    #[error("no workers to place {layers} layers on")]
    NoWorkers {
        /// Layers of the model.
        layers: usize,
    },
    /// A model without layers.
    #[error("the model has no layers")]
    NoLayers,
    /// The problem is beyond the solver's tables.
    #[error("expected at most {limit} {what}, found {found}")]
    TooLarge {
        /// "layers" or "workers".
        what: &'static str,
        /// How many there may be.
        limit: usize,
        /// How many there are.
        found: usize,
    },
    /// A worker's measurement makes no sense.
    #[error("expected {expected} {figure} of worker {worker:?}, found {value}")]
    BadWorkerFigure {
        /// Name of the worker.
        worker: String,
        /// What would make sense.
        expected: &'static str,
        /// Name of the figure.
        figure: String,
        /// What it is.
        value: f64,
    },
    /// A figure of the model, the links or the batch makes no sense.
    #[error("expected {expected} as {figure}, found {value}")]
    BadFigure {
        /// Name of the figure.
        figure: &'static str,
        /// What would make sense.
        expected: &'static str,
        /// What it is.
        value: f64,
    },
    /// A pin names layers that the model does not have, or none.
    #[error("worker {worker:?} is pinned to {}, expected some of the model's {num_layers} layers", in_words(pinned))]
    PinOutOfRange {
        /// Name of the worker.
        worker: String,
        /// Its pin.
        pinned: Range<u32>,
        /// Layers of the model.
        num_layers: u32,
    },
    /// Two workers are pinned to one layer.
    #[error(
        "workers {first:?} ({}) and {second:?} ({}) are pinned to the same layers",
        in_words(first_pinned),
        in_words(second_pinned)
    )]
    PinsOverlap {
        /// Name of the worker whose pin begins first.
        first: String,
        /// Its pin.
        first_pinned: Range<u32>,
        /// Name of the other.
        second: String,
        /// Its pin.
        second_pinned: Range<u32>,
    },
    /// The pins leave layers out for which there are too few other workers: one runs a single run of layers.
    #[error(
        "the workers' pins leave out {}: expected a worker without a pin for each of these {} ranges, found {unpinned}",
        gaps.iter().map(in_words).collect::<Vec<_>>().join(", "),
        gaps.len()
    )]
    PinsLeaveGaps {
        /// The layers, in order.
        gaps: Vec<Range<u32>>,
        /// Workers without a pin.
        unpinned: usize,
    },
    /// A pinned range is too large for its worker.
    #[error("worker {worker:?} is to run {}, which need {}; it has {}: {} are missing", in_words(pinned), Bytes(*needed_bytes), Bytes(*memory_bytes), Bytes(*missing_bytes))]
    PinDoesNotFit {
        /// Name of the worker.
        worker: String,
        /// Its pin.
        pinned: Range<u32>,
        /// Weights, KV and scratch of the range.
        needed_bytes: u64,
        /// What the worker has.
        memory_bytes: u64,
        /// The difference.
        missing_bytes: u64,
    },
    /// The workers' memory does not hold the model, however it is split.
    #[error(
        "{} are missing: no worker has room for {}; all layers, head and KV need {} beside scratch, {} {}",
        Bytes(*missing_bytes),
        describe_holes(holes),
        Bytes(*needed_bytes),
        if *workers == 1 { "one worker has".to_owned() } else { format!("{workers} workers have") },
        Bytes(*memory_bytes)
    )]
    DoesNotFit {
        /// Bytes of all holes. The least possible for up to [`super::EXACT_WORKERS_MAX`] unpinned workers; beyond that it may be more.
        missing_bytes: u64,
        /// The layers that are left over in the best packing, in order.
        holes: Vec<Hole>,
        /// Bytes of all weights on devices, the head and the KV.
        needed_bytes: u64,
        /// Memory of all workers.
        memory_bytes: u64,
        /// How many workers there are.
        workers: usize,
    },
}

impl Refusal {
    /// Whether more memory would help.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::DoesNotFit { .. } | Self::PinDoesNotFit { .. })
    }
}

/// "layers 3–6".
fn in_words(layers: &Range<u32>) -> String {
    LayerRange::try_from(layers.clone()).map_or_else(|_empty| "no layers".to_owned(), |layers| layers.to_string())
}

/// "layers 3–6 (12.0 GiB), layer 9 (3.0 GiB)".
fn describe_holes(holes: &[Hole]) -> String {
    let holes: Vec<String> =
        holes.iter().map(|hole| format!("{} ({})", in_words(&hole.layers), Bytes(hole.bytes))).collect();
    holes.join(", ")
}

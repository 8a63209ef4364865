//! What the coordinator knows of the model: sizes and bytes, no weights.

use std::{ops::Range, time::Duration};

use grokpipe_model::{Model, ModelConfig, WeightSource};

use crate::planner::{HeadCost, LayerCost, LinkCost, Objective, PreviousStage, Problem, ScratchCost, WorkerResources};

/// Bytes and sizes of a model, enough to plan.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// The model's sizes.
    pub config: ModelConfig,
    /// Equal on every node that has the same model.
    pub digest: String,
    layer_bytes: Vec<u64>,
    head_bytes: u64,
}

/// What a plan is to make room for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanWishes {
    /// Tokens in the KV pool, over all sequences.
    pub kv_tokens: u64,
    /// Most tokens in a frame.
    pub max_batch_tokens: usize,
    /// Tokens that usually run together, for the cost of a step.
    pub batch_tokens: u32,
    /// What to minimise.
    pub objective: Objective,
}

/// A hop between two nodes of a plain Ethernet: round trip and rate of 1 Gbit/s, until links are measured.
const LINK: LinkCost = LinkCost { seconds_per_hop: 200e-6, bytes_per_second: 117e6 };
/// Room beside weights, KV and activations: the process itself, its pipelines and staging buffers.
const PROCESS_BYTES: u64 = 64 << 20;

/// Rows of logits that a stage computes at a time, whatever the frame.
const LOGIT_ROWS: usize = 32;

impl ModelFacts {
    /// Facts of a model whose layers take `layer_bytes` each, with a head in f32.
    pub fn new(config: ModelConfig, digest: String, layer_bytes: Vec<u64>) -> Self {
        let head_bytes = (config.vocab_size as u64) * (config.hidden_size as u64) * 4;
        Self { config, digest, layer_bytes, head_bytes }
    }

    /// Reads sizes from the names and lengths of a model's files; opens no weights.
    pub fn of(model: &Model) -> Self {
        let config = model.config().clone();
        let layers = 0..config.num_hidden_layers;
        let layer_bytes = layers.map(|layer| model.stored_bytes(layer..layer + 1, false)).collect();
        Self { head_bytes: model.stored_bytes(0..0, true), ..Self::new(config, model.digest(), layer_bytes) }
    }

    /// Bytes that a token takes in one layer's KV, keys and values in f32.
    pub fn kv_bytes_per_token_per_layer(&self) -> u64 {
        2 * 4 * (self.config.num_key_value_heads as u64) * (self.config.head_dim as u64)
    }

    /// The activations of a stage: what a layer keeps for every token of a frame, and the logits of the last stage.
    fn scratch(&self, max_batch_tokens: usize) -> ScratchCost {
        let config = &self.config;
        let per_token = 6 * config.hidden_size
            + 2 * config.num_attention_heads * config.head_dim
            + config.num_experts_per_tok * (config.intermediate_size + config.hidden_size);
        let bytes = |values: usize| (values as u64).saturating_mul(4).saturating_mul(max_batch_tokens as u64);
        ScratchCost {
            stage_bytes: bytes(per_token).saturating_add(PROCESS_BYTES),
            head_bytes: (config.vocab_size as u64) * 4 * LOGIT_ROWS.min(max_batch_tokens) as u64,
        }
    }

    /// The planner's problem for these workers.
    pub fn problem(
        &self,
        wishes: &PlanWishes,
        workers: Vec<WorkerResources>,
        previous: Option<Vec<PreviousStage>>,
    ) -> Problem {
        let config = &self.config;
        let heads = (config.num_attention_heads * config.head_dim) as u64;
        let kv_heads = (config.num_key_value_heads * config.head_dim) as u64;
        let hidden = config.hidden_size as u64;
        let attention = hidden * (2 * heads + 2 * kv_heads);
        let expert = 3 * hidden * config.intermediate_size as u64;
        let active = attention + expert * config.num_experts_per_tok as u64;
        let layers = self.layer_bytes.iter().map(|&weight_bytes| {
            let expert_read_bytes = weight_bytes.saturating_sub(attention.min(weight_bytes));
            LayerCost {
                weight_bytes,
                read_bytes_fixed: weight_bytes - expert_read_bytes,
                expert_read_bytes,
                flops_per_token: 2.0 * active as f64,
            }
        });
        Problem {
            layers: layers.collect(),
            num_experts: config.num_experts as u32,
            num_experts_per_tok: config.num_experts_per_tok as u32,
            embedding_bytes: self.head_bytes,
            head: HeadCost {
                weight_bytes: self.head_bytes,
                flops_per_token: 2.0 * config.vocab_size as f64 * config.hidden_size as f64,
            },
            kv_bytes_per_token_per_layer: self.kv_bytes_per_token_per_layer(),
            kv_tokens: wishes.kv_tokens,
            scratch: self.scratch(wishes.max_batch_tokens),
            hidden_bytes_per_token: hidden * 4,
            workers,
            link: LINK,
            batch_tokens: wishes.batch_tokens,
            objective: wishes.objective,
            previous,
        }
    }
}

/// How long a step may take before the pipeline counts as stuck: far above any real step, far below a client's patience.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// Layers for people: `16..32`.
pub fn layers_text(layers: &Range<u32>) -> String {
    format!("{}..{}", layers.start, layers.end)
}

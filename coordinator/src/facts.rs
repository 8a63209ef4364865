//! What the coordinator knows of the model (sizes, formats and bytes, no weights) and of a worker, as the planner wants it.

use std::ops::Range;

use grokpipe_model::{
    Model, ModelConfig, ModelError, TensorName, WeightSource, contents::PartSum, footprint, layer_matrices,
};

use crate::cluster::messages::{FormatRate, Hello};
use crate::planner::{
    HeadCost, LayerCost, LinkCost, Objective, Overhead, PreviousStage, Problem, ProductCost, Rate, ScratchCost,
    WorkerResources,
};

/// Bytes and sizes of a model, enough to plan.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// The model's sizes.
    pub config: ModelConfig,
    /// Equal on every node that has the same model.
    pub digest: String,
    /// Checksums from a manifest next to the coordinator's files.
    pub contents: Vec<PartSum>,
    layers: Vec<LayerCost>,
    head: HeadCost,
}

/// What a plan must make room for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanRequirements {
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
/// Memory besides weights, KV and activations: the process itself, its pipelines and staging buffers.
const PROCESS_BYTES: u64 = 64 << 20;

/// Format of the embedding, which is the head.
const HEAD_FORMAT: &str = "f32";
/// Format of layers of which only the bytes are known.
const LAYER_FORMAT: &str = "int8";

impl ModelFacts {
    /// Facts of a model whose layers take `layer_bytes` each, attention a byte a number and the experts the rest, with a head in f32.
    pub fn new(config: ModelConfig, digest: String, layer_bytes: Vec<u64>) -> Self {
        let heads = (config.num_attention_heads * config.head_dim) as u64;
        let kv_heads = (config.num_key_value_heads * config.head_dim) as u64;
        let hidden = config.hidden_size as u64;
        let attention = hidden * (2 * heads + 2 * kv_heads);
        let chosen = 3 * hidden * config.intermediate_size as u64 * config.num_experts_per_tok as u64;
        let product = |bytes, of_experts, numbers: u64| ProductCost {
            format: LAYER_FORMAT.to_owned(),
            bytes,
            of_experts,
            flops_per_token: 2.0 * numbers as f64,
        };
        let layer = |weight_bytes: u64| {
            let fixed = attention.min(weight_bytes);
            let products = vec![product(fixed, false, attention), product(weight_bytes - fixed, true, chosen)];
            LayerCost { weight_bytes, products }
        };
        let head_bytes = (config.vocab_size as u64) * hidden * 4;
        let layers = layer_bytes.into_iter().map(layer).collect();
        Self { head: head(&config, head_bytes, HEAD_FORMAT.to_owned()), config, digest, contents: Vec::new(), layers }
    }

    /// Facts of a model's files; opens tensors for their formats, reads no weights.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn of(model: &Model) -> Result<Self, ModelError> {
        Self::of_weights(model.config().clone(), model.digest(), model)
    }

    /// As [`ModelFacts::of`], for weights of any source.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn of_weights(config: ModelConfig, digest: String, weights: &dyn WeightSource) -> Result<Self, ModelError> {
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let weight_bytes = weights.stored_bytes(layer..layer + 1, false);
            let mut products: Vec<ProductCost> = Vec::new();
            for spec in layer_matrices(weights, layer)? {
                let of_experts = spec.experts > 1;
                let used = if of_experts { config.num_experts_per_tok } else { 1 };
                let flops = 2.0 * (used * spec.inputs * spec.outputs) as f64;
                let (format, bytes) = (spec.format.name(), spec.stored_bytes());
                match products.iter_mut().find(|known| known.format == format && known.of_experts == of_experts) {
                    Some(known) => {
                        known.bytes += bytes;
                        known.flops_per_token += flops;
                    }
                    None => products.push(ProductCost { format, bytes, of_experts, flops_per_token: flops }),
                }
            }
            layers.push(LayerCost { weight_bytes, products });
        }
        let format = weights.matrix(&TensorName::Head)?.spec().format.name();
        let contents = weights.record().map(|record| record.sums().collect()).unwrap_or_default();
        Ok(Self { head: head(&config, weights.stored_bytes(0..0, true), format), config, digest, contents, layers })
    }

    /// The model without its other layers and without its head, for measurements of a part.
    pub fn part(mut self, layers: Range<u32>) -> Self {
        self.layers = self.layers.get(layers.start as usize..layers.end as usize).unwrap_or_default().to_vec();
        self.head = HeadCost { weight_bytes: 0, flops_per_token: 0.0, ..self.head };
        self
    }

    fn scratch(&self, max_batch_tokens: usize) -> ScratchCost {
        ScratchCost {
            stage_bytes: footprint::activation_bytes(&self.config, max_batch_tokens).saturating_add(PROCESS_BYTES),
            head_bytes: footprint::logit_bytes(&self.config, max_batch_tokens),
        }
    }

    /// The planner's problem for these workers.
    pub fn problem(
        &self,
        requirements: &PlanRequirements,
        workers: Vec<WorkerResources>,
        previous: Option<Vec<PreviousStage>>,
    ) -> Problem {
        let config = &self.config;
        Problem {
            layers: self.layers.clone(),
            num_experts: config.num_experts as u32,
            num_experts_per_tok: config.num_experts_per_tok as u32,
            head: self.head.clone(),
            kv_bytes_per_token_per_layer: footprint::kv_bytes_per_token_per_layer(config),
            kv_tokens: requirements.kv_tokens,
            scratch: self.scratch(requirements.max_batch_tokens),
            hidden_bytes_per_token: 4 * config.hidden_size as u64,
            workers,
            link: LINK,
            batch_tokens: requirements.batch_tokens,
            objective: requirements.objective,
            previous,
        }
    }
}

/// What a worker said of itself, as the planner wants it: free to run any layers, holding none.
pub fn resources(hello: &Hello) -> WorkerResources {
    let rate = |rate: &FormatRate| {
        let measured =
            Rate { bytes_per_second: rate.decode_bytes_per_second, flops_per_second: rate.prefill_flops_per_second };
        (rate.format.clone(), measured)
    };
    let overhead = hello.step_overhead;
    WorkerResources {
        name: hello.name.clone(),
        memory_bytes: hello.memory_bytes,
        read_bandwidth: hello.read_bandwidth,
        flop_rate: hello.flop_rate,
        rates: hello.format_rates.iter().map(rate).collect(),
        overhead: Overhead {
            step_seconds: overhead.step_seconds,
            layer_seconds: overhead.layer_seconds,
            draw_seconds: overhead.draw_seconds,
        },
        pinned_layers: None,
        held_layers: None,
    }
}

fn head(config: &ModelConfig, weight_bytes: u64, format: String) -> HeadCost {
    HeadCost { weight_bytes, format, flops_per_token: 2.0 * config.vocab_size as f64 * config.hidden_size as f64 }
}

//! What a step reads: bytes of weights, by how many tokens it has.

use std::ops::Range;

use grokpipe_model::{LayerTensor, ModelConfig, TensorName, WeightSource, layer_matrices};

use super::CHUNK_ROWS;
use crate::error::CliError;

/// Bytes of weights that steps read.
pub(super) struct Reads {
    /// By every step: attention, router, norms, head.
    fixed: u64,
    /// All experts of all layers.
    experts: u64,
    num_experts: usize,
    chosen: usize,
    /// Weights that work on a token, without those of the head.
    pub(super) active: f64,
}

impl Reads {
    /// Of these layers, with the head if `has_head`.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub(super) fn of(
        config: &ModelConfig,
        weights: &dyn WeightSource,
        layers: &Range<u32>,
        has_head: bool,
    ) -> Result<Self, CliError> {
        let (mut fixed, mut experts, mut active) = (0, 0, 0.0);
        let chosen = config.num_experts_per_tok;
        for layer in layers.clone() {
            let norms = LayerTensor::ALL.into_iter().filter(|tensor| !tensor.is_matrix()).count();
            fixed += (norms * 4 * config.hidden_size) as u64;
            for spec in layer_matrices(weights, layer)? {
                let numbers = (spec.inputs * spec.outputs) as f64;
                active += if spec.experts == 1 { numbers } else { chosen as f64 * numbers };
                *(if spec.experts == 1 { &mut fixed } else { &mut experts }) += spec.stored_bytes();
            }
        }
        if has_head {
            fixed += weights.matrix(&TensorName::Head)?.spec().weight_bytes();
        }
        Ok(Self { fixed, experts, num_experts: config.num_experts, chosen, active })
    }

    /// Bytes of a step of this many tokens, if each chooses its experts at random.
    pub(super) fn step_bytes(&self, tokens: u32) -> f64 {
        let left_out = 1.0 - self.chosen as f64 / self.num_experts as f64;
        self.fixed as f64 + self.experts as f64 * (1.0 - left_out.powi(tokens as i32))
    }

    /// Bytes of a prompt of this many tokens, chunk after chunk.
    pub(super) fn prompt_bytes(&self, tokens: u32) -> f64 {
        let rest = tokens % CHUNK_ROWS;
        let whole = f64::from(tokens / CHUNK_ROWS) * self.step_bytes(CHUNK_ROWS);
        whole + if rest > 0 { self.step_bytes(rest) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_kernels::SyntheticWeights;

    use super::*;

    #[test]
    fn a_token_reads_two_experts_of_eight_and_many_read_all() {
        let config = ModelConfig::grok_1();
        let weights = SyntheticWeights::new(config.clone(), 1);
        let reads = Reads::of(&config, &weights, &(0..1), false).unwrap();
        // 2 experts of 3 * 6144 * 32768, attention of 88,080,384, and under 3 MB of scales, router and norms.
        let numbers = f64::from(2 * 3 * 6144 * 32_768 + 88_080_384);
        let one = reads.step_bytes(1);
        assert!((numbers..numbers + 3e6).contains(&one), "{one}");
        let all = f64::from(88_080_384) + 8.0 * 3.0 * 6144.0 * 32_768.0;
        assert!((reads.step_bytes(64) / all - 1.0).abs() < 1e-3);
        // A chunk reads them, whatever the chunks before it read.
        assert_eq!(reads.prompt_bytes(100), reads.step_bytes(100));
        assert_eq!(reads.prompt_bytes(1025), 2.0 * reads.step_bytes(512) + one);
    }
}

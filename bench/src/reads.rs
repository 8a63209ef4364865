//! What a step reads: bytes of weights, by how many tokens it has.

use std::ops::Range;

use grokpipe_model::{LayerTensor, ModelConfig, TensorName, WeightSource};

use crate::{BenchError, CHUNK_ROWS};

/// How the bytes of experts are counted where several tokens share a step.
pub const COUNTED: &str = "as if each token chose its experts at random";

/// Weights that steps read and multiply with.
#[derive(Clone, Debug)]
pub struct Reads {
    /// Those that every row meets.
    all: Part,
    /// Those that only rows with wanted logits meet: the last layer's beyond attention, and the head. Without the head there are none.
    wanted: Part,
    num_experts: usize,
    chosen: usize,
}

/// Some of the weights.
#[derive(Clone, Debug, Default)]
struct Part {
    /// Bytes that a step reads, whatever its rows.
    fixed: u64,
    /// Bytes of all experts.
    experts: u64,
    /// Numbers that work on a row, without those of the head.
    active: f64,
}

impl Reads {
    /// Of these layers, with the head if `has_head`.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn of(
        config: &ModelConfig,
        weights: &dyn WeightSource,
        layers: &Range<u32>,
        has_head: bool,
    ) -> Result<Self, BenchError> {
        let (mut all, mut wanted) = (Part::default(), Part::default());
        let chosen = config.num_experts_per_tok;
        for layer in layers.clone() {
            let is_last = has_head && layer + 1 == layers.end;
            for tensor in LayerTensor::ALL {
                let before = matches!(
                    tensor,
                    LayerTensor::PreAttentionNorm | LayerTensor::Query | LayerTensor::Key | LayerTensor::Value
                );
                let part = if is_last && !before { &mut wanted } else { &mut all };
                if !tensor.is_matrix() {
                    part.fixed += 4 * config.hidden_size as u64;
                    continue;
                }
                let matrix = weights.matrix(&TensorName::Layer(layer, tensor))?;
                let spec = matrix.spec();
                let numbers = (spec.inputs * spec.outputs) as f64;
                part.active += if spec.experts == 1 { numbers } else { chosen as f64 * numbers };
                *(if spec.experts == 1 { &mut part.fixed } else { &mut part.experts }) += spec.stored_bytes();
            }
        }
        if has_head {
            wanted.fixed += weights.matrix(&TensorName::Head)?.spec().weight_bytes();
        }
        Ok(Self { all, wanted, num_experts: config.num_experts, chosen })
    }

    /// Bytes of a step of this many tokens, all of them wanted, if each chooses its experts at random.
    pub fn step_bytes(&self, tokens: u32) -> f64 {
        self.part_bytes(&self.all, tokens) + self.part_bytes(&self.wanted, tokens)
    }

    /// Bytes of a prompt of this many tokens, chunk after chunk, of which the last token is wanted.
    pub fn prompt_bytes(&self, tokens: u32) -> f64 {
        let whole = f64::from(tokens / CHUNK_ROWS) * self.part_bytes(&self.all, CHUNK_ROWS);
        whole + self.part_bytes(&self.all, tokens % CHUNK_ROWS) + self.part_bytes(&self.wanted, tokens.min(1))
    }

    /// Multiply-adds of this many tokens, without those of the head.
    pub fn multiply_adds(&self, tokens: u32, wanted: u32) -> f64 {
        f64::from(tokens) * self.all.active + f64::from(wanted) * self.wanted.active
    }

    fn part_bytes(&self, part: &Part, rows: u32) -> f64 {
        if rows == 0 {
            return 0.0;
        }
        let left_out = 1.0 - self.chosen as f64 / self.num_experts as f64;
        part.fixed as f64 + part.experts as f64 * (1.0 - left_out.powi(rows as i32))
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

    #[test]
    fn a_prompt_has_one_row_in_the_last_layer_beyond_attention() {
        let mut config = ModelConfig::grok_1();
        config.num_hidden_layers = 2;
        let weights = SyntheticWeights::new(config.clone(), 1);
        let stage = |layers, head| Reads::of(&config, &weights, &layers, head).unwrap();
        let (both, middle, last) = (stage(0..2, true), stage(0..1, false), stage(1..2, true));
        let experts = f64::from(2 * 3 * 6144 * 32_768);
        let (early, late) = (f64::from(6144 * (6144 + 2 * 1024)), f64::from(6144 * 6144 + 6144 * 8) + experts);
        assert_eq!(middle.multiply_adds(10, 1), 10.0 * (early + late));
        assert_eq!(last.multiply_adds(10, 1), 10.0 * early + late);
        assert_eq!(both.multiply_adds(10, 10), 20.0 * (early + late));
        // Decode reads all, a prompt two experts of the last layer and the head once.
        assert_eq!(both.step_bytes(3), middle.step_bytes(3) + last.step_bytes(3));
        // The head is f32; all else takes a byte a number.
        let (head, rest) = (f64::from(131_072 * 6144) * 4.0, last.multiply_adds(2, 1));
        let read = last.prompt_bytes(100);
        assert!((head + early + experts..head + rest).contains(&read), "{read}");
    }
}

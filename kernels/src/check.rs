//! Is a device batch-invariant? One row alone and the same row among 33, compared bit by bit; among fewer where the device says itself
//! that steps of so many are not ([`crate::DeviceInfo::invariant_below`]).
//!
//! Run when a worker joins, on a small layer from a seed, whose sizes take every path of a backend: groups that divide nothing,
//! several heads a key head, all experts in use. A device that fails must not serve: its tokens would depend on who else asks.

use grokpipe_model::ModelConfig;

use crate::{
    Backend, Batch, KV_BLOCK_TOKENS, KernelError, Row, StageOptions, StepInput, StepOutput, SyntheticWeights, Trace,
    batch::single_tokens, forward::Layers,
};

/// Rows of the larger batch, at most: one more than any power of two that a kernel may have as a block of rows.
const ROWS: usize = 33;
/// Which of them is also computed alone.
const ROW: usize = 20;

/// What the check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchInvariance {
    /// The first place where bits differed; `None` when they were equal everywhere.
    pub difference: Option<String>,
}

impl BatchInvariance {
    /// Whether a row's bits did not depend on other rows.
    pub fn holds(&self) -> bool {
        self.difference.is_none()
    }
}

/// Runs the check.
///
/// # Errors
/// What the device reports; a difference is no error but a result.
pub fn check_batch_invariance<B: Backend>(backend: &mut B) -> Result<BatchInvariance, KernelError> {
    let config = small();
    let weights = SyntheticWeights::new(config.clone(), 1);
    let options = StageOptions { kv_blocks: 2 * ROWS as u32, max_rows: ROWS, head: true, logit_rows: ROWS };
    let range = 0..config.num_hidden_layers;
    let layers = Layers::load(backend, &config, &weights, range, options, &mut |_, _| ())?;
    // Loading may change what the device promises.
    let count = backend.info().invariant_below.map_or(ROWS, |rows| ROWS.min(rows - 1));
    let mut check = Check { backend, weights, layers };

    // A token of a sequence of its own, alone and among others.
    let alone = check.run(&sequences(ROW, 1), ROW)?;
    let among = check.run(&sequences(0, count), 0)?;
    let mut difference = check.compare("as a sequence", &alone, 0, &among, ROW);

    // A token within a sequence, alone after a chunk and in one chunk with all.
    check.run(&one_sequence(0, ROW, 0), 0)?;
    let alone = check.run(&one_sequence(ROW, 1, 0), ROW)?;
    let among = check.run(&one_sequence(0, count, ROWS as u32), 0)?;
    difference = difference.or_else(|| check.compare("within a sequence", &alone, 0, &among, ROW));
    Ok(BatchInvariance { difference })
}

/// The small model on the device.
struct Check<'a, B: Backend> {
    backend: &'a mut B,
    weights: SyntheticWeights,
    layers: Layers<B>,
}

impl<B: Backend> Check<'_, B> {
    /// Hidden states after every layer, and logits, of a step whose token ids are the check's from `first` on.
    fn run(&mut self, batch: &Batch, first: usize) -> Result<(Trace, Vec<f32>), KernelError> {
        let vocab = self.weights.config().vocab_size as u32;
        let count = batch.rows.len() as u32;
        let ids: Vec<u32> = (first as u32..first as u32 + count).map(|i| 1 + i * 7 % (vocab - 1)).collect();
        let wanted: Vec<u32> = (0..count).collect();
        let mut trace = Trace::default();
        let input = StepInput::TokenIds(&ids);
        let out = self.layers.run(self.backend, &self.weights, batch, input, &wanted, Some(&mut trace))?;
        let (StepOutput::Logits(logits) | StepOutput::HiddenStates(logits)) = out;
        Ok((trace, logits))
    }

    /// Where row `a` of one step and row `b` of another differ.
    fn compare(
        &self,
        how: &str,
        one: &(Trace, Vec<f32>),
        a: usize,
        many: &(Trace, Vec<f32>),
        b: usize,
    ) -> Option<String> {
        let config = self.weights.config();
        let row = |values: &[f32], rows: usize, row: usize, width: usize, layer: usize| {
            values[(layer * rows + row) * width..][..width].to_vec()
        };
        let rows = |step: &(Trace, Vec<f32>)| step.1.len() / config.vocab_size;
        let hidden = (0..config.num_hidden_layers as usize).find_map(|layer| {
            let width = config.hidden_size;
            let x = row(&one.0.hidden, rows(one), a, width, layer);
            let y = row(&many.0.hidden, rows(many), b, width, layer);
            compare(&format!("{how}, hidden states after layer {layer}"), &x, &y)
        });
        hidden.or_else(|| {
            let width = config.vocab_size;
            let (x, y) = (row(&one.1, rows(one), a, width, 0), row(&many.1, rows(many), b, width, 0));
            compare(&format!("{how}, logits"), &x, &y)
        })
    }
}

fn compare(what: &str, alone: &[f32], among: &[f32]) -> Option<String> {
    let index = alone.iter().zip(among).position(|(a, b)| a.to_bits() != b.to_bits())?;
    let (alone, among) = (alone[index], among[index]);
    Some(format!("{what} differ at component {index}: {alone:e} alone, {among:e} among others"))
}

/// Sequences `first..first + count`, each a token at position 0 in a block of its own.
fn sequences(first: usize, count: usize) -> Batch {
    Batch { block_tables: (first as u32..(first + count) as u32).collect(), ..single_tokens(count) }
}

/// Positions `first..first + count` of one sequence, whose blocks are `block` and those after it.
fn one_sequence(first: usize, count: usize, block: u32) -> Batch {
    let blocks = (first + count).div_ceil(KV_BLOCK_TOKENS) as u32;
    Batch {
        rows: (first..first + count)
            .map(|position| Row { position: position as u32, table_offset: 0, attended: true })
            .collect(),
        block_tables: (block..block + blocks).collect(),
    }
}

/// A small model with awkward sizes.
fn small() -> ModelConfig {
    ModelConfig {
        name: "batch-invariance check".into(),
        vocab_size: 131,
        hidden_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 16,
        intermediate_size: 136,
        num_experts: 8,
        num_experts_per_tok: 2,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        embedding_multiplier: 9.8,
        output_multiplier: 0.577_350_26,
        attention_multiplier: 0.25,
        attention_logit_cap: 30.0,
        max_position_embeddings: 8 * KV_BLOCK_TOKENS,
        pad_token_id: 0,
        eos_token_id: 2,
        scale_groups_row_parallel: 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_batch_invariant() {
        for backend in &mut crate::cpu::tests::backends() {
            let name = backend.info().name.clone();
            assert_eq!(check_batch_invariance(backend).unwrap().difference, None, "{name}");
        }
    }

    #[test]
    fn a_difference_of_one_bit_is_found_and_placed() {
        let difference = compare("logits", &[1.0, 2.0], &[1.0, 2.0000002]).unwrap();
        assert!(difference.starts_with("logits differ at component 1"), "{difference}");
        assert!(compare("logits", &[0.0], &[-0.0]).is_some());
    }
}

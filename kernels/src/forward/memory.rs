//! How much device memory a stage surely takes, from the configuration alone: its weights and its KV. What steps hold beside them is
//! small, and counted by the planner.

use std::ops::Range;

use grokpipe_model::{Bytes, ModelConfig};

use super::StageOptions;
use crate::{KV_BLOCK_TOKENS, KernelError};

/// Scale groups are filled up to a multiple of this many inputs.
const GROUP_MULTIPLE: u64 = 16;

/// Bytes on a device. Nothing here overflows: what does not fit in 64 bits is the largest number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights as they lie on the device: as stored, with filled groups, and scales in f32.
    pub weights_bytes: u64,
    /// Keys and values of all slots.
    pub kv_bytes: u64,
}

impl MemoryNeed {
    /// The need of a stage whose weights are `stored_bytes` in the model's files.
    pub(super) fn new(config: &ModelConfig, stored_bytes: u64, layers: Range<u32>, options: StageOptions) -> Self {
        let head = options.has_head(config, &layers);
        let count = u64::from(layers.end.saturating_sub(layers.start));
        let slots = u64::from(options.kv_blocks) * KV_BLOCK_TOKENS as u64;
        let head_bytes = if head { filling(config.hidden_size, config.vocab_size, None) } else { 0 };
        let filled = layer_filling(config).saturating_mul(count).saturating_add(head_bytes);
        Self {
            weights_bytes: stored_bytes.saturating_add(filled),
            kv_bytes: product(&[slots, kv_width(config), 2 * 4, count]),
        }
    }

    /// Refuses a stage that needs more than there is, before hours of loading end in the same. 0 available bytes are an unknown number.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn check(self, layers: &Range<u32>, available_bytes: u64, device: &str) -> Result<(), KernelError> {
        let needed_bytes = self.total_bytes();
        if available_bytes == 0 || needed_bytes <= available_bytes {
            return Ok(());
        }
        let (Range { start, end }, kv) = (layers, Bytes(self.kv_bytes));
        let (what, device) = (format!("a stage of layers {start}..{end} with a KV pool of {kv}"), device.to_owned());
        Err(KernelError::OutOfMemory { what, needed_bytes, available_bytes, device })
    }

    /// Weights and KV together.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.kv_bytes)
    }
}

fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1u64, |total, &factor| total.saturating_mul(factor))
}

fn kv_width(config: &ModelConfig) -> u64 {
    product(&[config.num_key_value_heads as u64, config.head_dim as u64])
}

/// What a matrix takes beside its stored bytes, at most: groups filled up, and scales in f32 (they are stored in 16 bits).
fn filling(inputs: usize, outputs: usize, groups: Option<usize>) -> u64 {
    let (inputs, outputs) = (inputs as u64, outputs as u64);
    let (count, scale, number) = match groups {
        None => (1, 0, 4),
        Some(groups) => ((groups as u64).max(1), 2, 1),
    };
    let filled = product(&[count, inputs.div_ceil(count).next_multiple_of(GROUP_MULTIPLE)]).saturating_sub(inputs);
    product(&[product(&[filled, number]).saturating_add(scale * count), outputs])
}

fn layer_filling(config: &ModelConfig) -> u64 {
    let (hidden, ffn, experts) = (config.hidden_size, config.intermediate_size, config.num_experts as u64);
    let attention = config.num_attention_heads.saturating_mul(config.head_dim);
    let kv = kv_width(config) as usize;
    let groups = Some(config.scale_groups_row_parallel);
    [
        filling(hidden, attention, Some(1)),
        product(&[2, filling(hidden, kv, Some(1))]),
        filling(attention, hidden, groups),
        product(&[2, experts, filling(hidden, ffn, Some(1))]),
        product(&[experts, filling(ffn, hidden, groups)]),
        filling(hidden, config.num_experts, None),
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_of_grok_1_takes_what_its_numbers_take() {
        let config = ModelConfig::grok_1();
        let options = StageOptions { kv_blocks: 512, max_rows: 1, head: true, logit_rows: 1 };
        let need = MemoryNeed::new(&config, 4_922_163_200, 0..1, options);
        // 4,919,992,320 parameters a layer: int8 but for the router and the norms, and a few MB of scales.
        assert!((4_919_992_320..4_930_000_000).contains(&need.weights_bytes), "{need:?}");
        assert_eq!(need.kv_bytes, 8192 * 1024 * 4 * 2);
        let last = MemoryNeed::new(&config, 4_922_163_200 + 131_072 * 6144 * 4, 63..64, options);
        assert_eq!(last.weights_bytes - need.weights_bytes, 131_072 * 6144 * 4);
    }

    #[test]
    fn a_stage_may_take_all_there_is_and_no_more() {
        let need = MemoryNeed { weights_bytes: 8, kv_bytes: 2 };
        let check = |available_bytes| need.check(&(3..4), available_bytes, "d");
        assert!(check(10).is_ok() && check(0).is_ok());
        let refused = check(9).unwrap_err();
        assert!(matches!(refused, KernelError::OutOfMemory { needed_bytes: 10, available_bytes: 9, .. }), "{refused}");
        assert!(
            refused.to_string().contains("a stage of layers 3..4 with a KV pool of 2 B needs 10 B, d has 9 B"),
            "{refused}"
        );
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let mut config = ModelConfig::grok_1();
        (config.hidden_size, config.intermediate_size) = (usize::MAX / 32, usize::MAX / 32);
        assert_eq!(MemoryNeed::new(&config, u64::MAX / 2, 0..64, StageOptions::default()).total_bytes(), u64::MAX);
    }
}

//! How much device memory a stage surely takes, from the configuration alone: its weights and its KV. What steps hold beside them is
//! small, and counted by the planner.

use std::ops::Range;

use grokpipe_model::{Bytes, ModelConfig, footprint};

use super::StageOptions;
use crate::KernelError;

/// Bytes on a device. Nothing here overflows: what does not fit in 64 bits is the largest number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights as they lie on the device: as stored, with padded groups, and scales in f32.
    pub weights_bytes: u64,
    /// Keys and values of all slots.
    pub kv_bytes: u64,
}

impl MemoryNeed {
    /// The need of a stage whose weights are `stored_bytes` in the model's files.
    pub(super) fn new(config: &ModelConfig, stored_bytes: u64, layers: Range<u32>, options: StageOptions) -> Self {
        let head = options.has_head(config, &layers);
        let count = layers.end.saturating_sub(layers.start);
        let of_head = if head { footprint::head_padding(config) } else { 0 };
        let padding = footprint::layer_padding(config).saturating_mul(u64::from(count)).saturating_add(of_head);
        Self {
            weights_bytes: stored_bytes.saturating_add(padding),
            kv_bytes: footprint::kv_bytes(config, count, options.kv_blocks),
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

//! Which format each tensor gets. Norms and routers stay F32 in all of them: they are small, and they decide.
//!
//! A format alone is used for every matrix, embedding and head included. `mixed` is llama.cpp's rule for Q4_K_M:
//!
//! - the head, or the embedding where it is the head too: Q6_K; an embedding beside a head of its own: Q4_K;
//! - `ffn_down`: Q6_K in the first and in the last eighth of the layers and in every third one between them, else Q4_K;
//! - with 8 experts `attn_k` and `attn_v` are Q8_0 and `attn_output` is Q5_K: beside the experts they weigh nothing. With another
//!   number of experts `attn_v` follows the rule of `ffn_down`;
//! - all else: Q4_K.

use crate::{BlockType, LayerTensor, ModelConfig, TensorName};

/// The formats of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the formats' own names")]
pub enum Mix {
    Q8_0,
    Q4_0,
    Q4K,
    Q6K,
    Bf16,
    /// Q4_K_M.
    Mixed,
}

/// Name, the format of most matrices, and the number that llama.cpp has for a file of this kind.
const TABLE: [(Mix, &str, BlockType, u32); 6] = [
    (Mix::Q8_0, "q8_0", BlockType::Q8_0, 7),
    (Mix::Q4_0, "q4_0", BlockType::Q4_0, 2),
    (Mix::Q4K, "q4_k", BlockType::Q4K, 14),
    (Mix::Q6K, "q6_k", BlockType::Q6K, 18),
    (Mix::Bf16, "bf16", BlockType::Bf16, 32),
    (Mix::Mixed, "mixed", BlockType::Q4K, 15),
];

impl Mix {
    /// All names.
    pub fn names() -> [&'static str; 6] {
        TABLE.map(|row| row.1)
    }

    /// The mix of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.into_iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// llama.cpp's number of it, `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        TABLE[self as usize].3
    }

    /// The format of a matrix that is not a router.
    pub(super) fn format(self, name: &TensorName, config: &ModelConfig, has_head: bool) -> BlockType {
        let most = TABLE[self as usize].2;
        if self != Self::Mixed {
            return most;
        }
        let eight = config.num_experts == 8;
        match name {
            TensorName::Head => BlockType::Q6K,
            TensorName::Embedding if !has_head => BlockType::Q6K,
            TensorName::Layer(_, LayerTensor::Key | LayerTensor::Value) if eight => BlockType::Q8_0,
            TensorName::Layer(_, LayerTensor::AttentionOutput) if eight => BlockType::Q5K,
            TensorName::Layer(layer, LayerTensor::MoeDown | LayerTensor::Value)
                if has_more_bits(*layer, config.num_hidden_layers) =>
            {
                BlockType::Q6K
            }
            _ => most,
        }
    }
}

/// The layers at both ends, and every third one between them.
fn has_more_bits(layer: u32, layers: u32) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stands_in_the_order_of_the_variants() {
        for (index, (mix, name, ..)) in TABLE.into_iter().enumerate() {
            assert_eq!(mix as usize, index);
            assert_eq!(Mix::from_name(name), Some(mix));
        }
        assert_eq!(Mix::from_name("Q8_0"), None);
    }

    #[test]
    fn grok_1_is_mixed_as_llama_cpp_mixes_it() {
        let config = ModelConfig::grok_1();
        let of = |name| Mix::Mixed.format(&name, &config, false);
        let down = |layer| of(TensorName::Layer(layer, LayerTensor::MoeDown));
        let more: Vec<u32> = (0..64).filter(|layer| down(*layer) == BlockType::Q6K).collect();
        let between = (10..56).step_by(3);
        assert_eq!(more, (0..8).chain(between).chain(56..64).collect::<Vec<_>>());
        assert_eq!(down(8), BlockType::Q4K);
        let layer = |tensor| of(TensorName::Layer(0, tensor));
        assert_eq!([layer(LayerTensor::Key), layer(LayerTensor::Value)], [BlockType::Q8_0; 2]);
        assert_eq!(layer(LayerTensor::AttentionOutput), BlockType::Q5K);
        assert_eq!([layer(LayerTensor::Query), layer(LayerTensor::MoeGate)], [BlockType::Q4K; 2]);
        assert_eq!(of(TensorName::Embedding), BlockType::Q6K);
        assert_eq!(Mix::Mixed.format(&TensorName::Embedding, &config, true), BlockType::Q4K);
        let four = ModelConfig { num_experts: 4, ..config };
        let of = |tensor| Mix::Mixed.format(&TensorName::Layer(0, tensor), &four, true);
        assert_eq!([of(LayerTensor::Value), of(LayerTensor::Key)], [BlockType::Q6K, BlockType::Q4K]);
    }
}

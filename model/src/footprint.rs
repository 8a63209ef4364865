//! What running a model takes in memory, by its configuration alone: the one place for sizes that the planner, the workers and the
//! kernels must agree on.
//!
//! Knows nothing of machines. Nothing here overflows: a size that does not fit in 64 bits is the largest number.

use crate::ModelConfig;

/// Tokens in a KV block. A plan may not change it: slots, replays and prefix sharing count in whole blocks.
pub const KV_BLOCK_TOKENS: u32 = 16;
/// Rows of logits that a stage computes at a time, however many a frame asks for.
pub const LOGIT_ROWS: usize = 32;
/// Scale groups are padded to a multiple of this many inputs on a device.
const GROUP_MULTIPLE: u64 = 16;
/// Bytes of an f32.
const F32: u64 = 4;

/// KV blocks of a pool for so many tokens, all sequences together.
pub fn kv_blocks(tokens: u64) -> u32 {
    u32::try_from(tokens.div_ceil(u64::from(KV_BLOCK_TOKENS))).unwrap_or(u32::MAX)
}

/// Bytes of one token's keys and values in one layer, in f32.
pub fn kv_bytes_per_token_per_layer(config: &ModelConfig) -> u64 {
    product(&[2 * F32, kv_width(config)])
}

/// Bytes of keys and values of `layers` layers in a pool of `blocks` blocks.
pub fn kv_bytes(config: &ModelConfig, layers: u32, blocks: u32) -> u64 {
    let slots = product(&[u64::from(blocks), u64::from(KV_BLOCK_TOKENS)]);
    product(&[kv_bytes_per_token_per_layer(config), u64::from(layers), slots])
}

/// Bytes of the activations that a stage keeps for a frame of so many tokens, without logits.
pub fn activation_bytes(config: &ModelConfig, tokens: usize) -> u64 {
    let (hidden, ffn) = (config.hidden_size as u64, config.intermediate_size as u64);
    let per_token = product(&[6, hidden])
        .saturating_add(product(&[2, config.num_attention_heads as u64, config.head_dim as u64]))
        .saturating_add(product(&[config.num_experts_per_tok as u64, ffn.saturating_add(hidden)]));
    product(&[F32, per_token, tokens as u64])
}

/// Bytes of the logits that the last stage holds for a frame of so many tokens.
pub fn logit_bytes(config: &ModelConfig, tokens: usize) -> u64 {
    product(&[F32, config.vocab_size as u64, LOGIT_ROWS.min(tokens) as u64])
}

/// Bytes that a layer's matrices take on a device beyond their stored bytes, at most: padded groups, and scales in f32, which are
/// stored in 16 bits.
pub fn layer_padding(config: &ModelConfig) -> u64 {
    let (hidden, ffn, experts) = (config.hidden_size, config.intermediate_size, config.num_experts as u64);
    let attention = config.num_attention_heads.saturating_mul(config.head_dim);
    let kv = kv_width(config) as usize;
    let groups = Some(config.scale_groups_row_parallel);
    [
        padding(hidden, attention, Some(1)),
        product(&[2, padding(hidden, kv, Some(1))]),
        padding(attention, hidden, groups),
        product(&[2, experts, padding(hidden, ffn, Some(1))]),
        product(&[experts, padding(ffn, hidden, groups)]),
        padding(hidden, config.num_experts, None),
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

/// Bytes that the head takes on a device beyond its stored bytes, at most.
pub fn head_padding(config: &ModelConfig) -> u64 {
    padding(config.hidden_size, config.vocab_size, None)
}

fn kv_width(config: &ModelConfig) -> u64 {
    product(&[config.num_key_value_heads as u64, config.head_dim as u64])
}

/// For a matrix of int8 with so many groups of scales, or of f32.
fn padding(inputs: usize, outputs: usize, groups: Option<usize>) -> u64 {
    let (inputs, outputs) = (inputs as u64, outputs as u64);
    let (count, scale, number) = match groups {
        None => (1, 0, F32),
        Some(groups) => ((groups as u64).max(1), 2, 1),
    };
    let padded = product(&[count, inputs.div_ceil(count).next_multiple_of(GROUP_MULTIPLE)]).saturating_sub(inputs);
    product(&[product(&[padded, number]).saturating_add(scale * count), outputs])
}

fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |total: u64, &factor| total.saturating_mul(factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grok_1_takes_what_is_published_of_it() {
        let config = ModelConfig::grok_1();
        // 8 key and value heads of 128 numbers, keys and values, 4 bytes each.
        assert_eq!(kv_bytes_per_token_per_layer(&config), 8192);
        assert_eq!(kv_bytes(&config, 64, kv_blocks(8192)), 8192 * 8192 * 64);
        assert_eq!(logit_bytes(&config, 512), 32 * 131_072 * 4);
        assert_eq!(logit_bytes(&config, 7), 7 * 131_072 * 4);
        // A few MB of scales.
        assert!((1..10_000_000).contains(&layer_padding(&config)), "{}", layer_padding(&config));
    }

    #[test]
    fn blocks_hold_all_tokens_and_no_block_more() {
        for (tokens, blocks) in [(0, 0), (1, 1), (16, 1), (17, 2), (8192, 512), (u64::MAX, u32::MAX)] {
            assert_eq!(kv_blocks(tokens), blocks, "{tokens}");
        }
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let mut config = ModelConfig::grok_1();
        (config.hidden_size, config.intermediate_size) = (usize::MAX / 32, usize::MAX / 32);
        assert_eq!((layer_padding(&config), activation_bytes(&config, 8192)), (u64::MAX, u64::MAX));
        config.num_key_value_heads = usize::MAX;
        assert_eq!(kv_bytes(&config, u32::MAX, u32::MAX), u64::MAX);
    }
}

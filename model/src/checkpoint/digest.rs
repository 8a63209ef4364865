//! What a model is, in one text, and that text's SHA-256: equal for equal models, whatever their path.
//!
//! The text has a line for each size and each tensor, and a first line that says how it is written. What it says may change only with
//! that line, since workers of different builds compare digests. It knows names, formats and lengths; what the numbers are, it does not.

use sha2::{Digest, Sha256};

use crate::ModelConfig;

/// How the text is written.
const VERSION: &str = "grokpipe model 1";

/// A tensor's line.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// Where the files say it; a pickle's follows from its length.
    pub(super) format: Option<String>,
}

/// The text of a model whose files are of this kind.
pub(super) fn text(config: &ModelConfig, kind: &str, tensors: impl Iterator<Item = Line>) -> String {
    // Named one by one, so that a new size has to be thought of here.
    let ModelConfig {
        name,
        vocab_size,
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        intermediate_size,
        num_experts,
        num_experts_per_tok,
        rope_theta,
        rms_norm_eps,
        embedding_multiplier,
        output_multiplier,
        attention_multiplier,
        attention_logit_cap,
        max_position_embeddings,
        pad_token_id,
        eos_token_id,
        scale_groups_row_parallel,
    } = config;
    // Floats by their bits: how a number is printed is no part of it.
    let bits = |number: &f32| format!("{:08x}", number.to_bits());
    let sizes = [
        ("name", format!("{name:?}")),
        ("vocab_size", vocab_size.to_string()),
        ("hidden_size", hidden_size.to_string()),
        ("num_hidden_layers", num_hidden_layers.to_string()),
        ("num_attention_heads", num_attention_heads.to_string()),
        ("num_key_value_heads", num_key_value_heads.to_string()),
        ("head_dim", head_dim.to_string()),
        ("intermediate_size", intermediate_size.to_string()),
        ("num_experts", num_experts.to_string()),
        ("num_experts_per_tok", num_experts_per_tok.to_string()),
        ("rope_theta", bits(rope_theta)),
        ("rms_norm_eps", bits(rms_norm_eps)),
        ("embedding_multiplier", bits(embedding_multiplier)),
        ("output_multiplier", bits(output_multiplier)),
        ("attention_multiplier", bits(attention_multiplier)),
        ("attention_logit_cap", bits(attention_logit_cap)),
        ("max_position_embeddings", max_position_embeddings.to_string()),
        ("pad_token_id", pad_token_id.to_string()),
        ("eos_token_id", eos_token_id.to_string()),
        ("scale_groups_row_parallel", scale_groups_row_parallel.to_string()),
    ];
    let mut text = format!("{VERSION}\n");
    for (size, value) in sizes {
        text.push_str(&format!("{size} {value}\n"));
    }
    text.push_str(&format!("files {kind}\n"));
    for Line { name, bytes, format } in tensors {
        text.push_str(&format!("tensor {name} {bytes} {}\n", format.as_deref().unwrap_or("-")));
    }
    text
}

/// Its SHA-256, in hex.
pub(super) fn of(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Bytes in hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever changes this has to change [`VERSION`]: builds on both sides of the change would take the same model for two.
    #[test]
    fn the_text_of_grok_1_is_written_as_ever() {
        let line = |name: &str, bytes, format: Option<&str>| Line {
            name: name.into(),
            bytes,
            format: format.map(str::to_owned),
        };
        let tensors = [line("a", 7, None), line("b", 1 << 40, Some("Q8_0"))];
        let text = text(&ModelConfig::grok_1(), "pickles", tensors.into_iter());
        let expected = "grokpipe model 1\nname \"grok-1\"\nvocab_size 131072\nhidden_size 6144\nnum_hidden_layers 64\n\
                        num_attention_heads 48\nnum_key_value_heads 8\nhead_dim 128\nintermediate_size 32768\n\
                        num_experts 8\nnum_experts_per_tok 2\nrope_theta 461c4000\nrms_norm_eps 3727c5ac\n\
                        embedding_multiplier 429cc470\noutput_multiplier 3f13cd3a\nattention_multiplier 3db504f4\n\
                        attention_logit_cap 41f00000\nmax_position_embeddings 8192\npad_token_id 0\neos_token_id 2\n\
                        scale_groups_row_parallel 8\nfiles pickles\ntensor a 7 -\ntensor b 1099511627776 Q8_0\n";
        assert_eq!(text, expected);
        assert_eq!(of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

//! The `config.json` of the Hugging Face copies of Grok-1.
//!
//! Only sizes are read from it. Their other values differ from xAI's (activation, rotary base, multipliers), and the arithmetic
//! here is xAI's, so everything else is as published.

use serde_json::{Map, Value};

use crate::{ModelConfig, ModelError, config::Foreign};

/// xAI's keys by the names there.
const KEYS: Foreign = Foreign {
    names: &[
        ("vocab_size", "vocab_size"),
        ("d_model", "hidden_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_q_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("key_size", "head_dim"),
        ("ffn_size", "intermediate_size"),
        ("num_experts", "num_experts"),
        ("num_selected_experts", "num_experts_per_tok"),
        ("sequence_len", "max_position_embeddings"),
    ],
};

/// The configuration that this object describes.
///
/// # Errors
/// [`ModelError`] naming the key, what was expected and what was found.
pub(crate) fn config(object: &Map<String, Value>, place: &str) -> Result<ModelConfig, ModelError> {
    let model_type = object.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if !model_type.contains("grok") {
        let found: String = model_type.chars().take(60).collect();
        return Err(ModelError::invalid(
            format!("{place}: model_type"),
            "a model of Grok-1's kind",
            format!("{found:?}"),
        ));
    }
    let mut values = Map::new();
    for (ours, theirs) in KEYS.names {
        if let Some(value) = object.get(*theirs) {
            values.insert((*ours).to_owned(), value.clone());
        }
    }
    if let (Some(longest), None) = (object.get("max_sequence_length"), values.get("sequence_len")) {
        values.insert("sequence_len".to_owned(), longest.clone());
    }
    let size = |key: &str| values.get(key).and_then(Value::as_u64);
    if let (None, Some(width), Some(heads)) = (values.get("key_size"), size("d_model"), size("num_q_heads"))
        && let Some(head) = width.checked_div(heads)
    {
        values.insert("key_size".to_owned(), head.into());
    }
    let published = ModelConfig::grok_1();
    let defaults: [(&str, Value); 5] = [
        ("name", "grok-1".into()),
        ("num_kv_heads", published.num_key_value_heads.into()),
        ("num_experts", published.num_experts.into()),
        ("num_selected_experts", published.num_experts_per_tok.into()),
        ("sequence_len", published.max_position_embeddings.into()),
    ];
    for (key, value) in defaults {
        values.entry(key).or_insert(value);
    }
    ModelConfig::from_foreign(values, &KEYS, place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<ModelConfig, ModelError> {
        config(&serde_json::from_str(text).unwrap(), "config.json")
    }

    #[test]
    fn sizes_are_theirs_and_all_else_is_as_published() {
        let text = r#"{"model_type": "grok-1", "vocab_size": 131072, "hidden_size": 6144, "intermediate_size": 32768,
            "num_hidden_layers": 64, "num_attention_heads": 48, "num_key_value_heads": 8, "rope_theta": 100000.0,
            "hidden_act": "silu", "max_position_embeddings": 8192, "embedding_multiplier_scale": 78.0}"#;
        let published = ModelConfig { scale_groups_row_parallel: 1, ..ModelConfig::grok_1() };
        assert_eq!(of(text).unwrap(), published);
    }

    #[test]
    fn refusals_name_their_keys() {
        for (text, wanted) in [
            (r#"{"model_type": "llama"}"#, "model_type"),
            (r#"{"model_type": "grok-1"}"#, "vocab_size"),
            (r#"{"model_type": "grok", "vocab_size": 9, "hidden_size": 0}"#, "hidden_size"),
            (r#"{"model_type": 7}"#, "model_type"),
        ] {
            let message = of(text).unwrap_err().to_string();
            assert!(message.contains(wanted), "{text}: {message}");
        }
    }
}

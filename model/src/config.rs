//! Sizes and constants of a model of Grok-1's architecture.
//!
//! A configuration that exists has been checked: every size is in range, divides what it must divide, and no product of sizes
//! overflows. What the sizes are used for is decided elsewhere.

use serde_json::{Map, Value};

use crate::ModelError;

/// Everything about the architecture that may differ between models. All sizes were checked when it was made.
///
/// Fields have the field's standard names; `config.json` of the small checkpoints has xAI's (`d_model`, `num_q_heads`, …).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Name for people and for the API.
    pub name: String,
    /// Rows of the embedding, outputs of the head.
    pub vocab_size: usize,
    /// Width of the residual stream (`d_model`).
    pub hidden_size: usize,
    /// Layers (`num_layers`).
    pub num_hidden_layers: u32,
    /// Query heads (`num_q_heads`).
    pub num_attention_heads: usize,
    /// Key and value heads (`num_kv_heads`); query head `i` uses key head `i / (num_attention_heads / num_key_value_heads)`.
    pub num_key_value_heads: usize,
    /// Components of a head (`key_size`); even.
    pub head_dim: usize,
    /// Width of an expert (`ffn_size`).
    pub intermediate_size: usize,
    /// Experts a layer.
    pub num_experts: usize,
    /// Experts that a token uses (`num_selected_experts`).
    pub num_experts_per_tok: usize,
    /// Base of the rotary embedding (`rope_base`).
    pub rope_theta: f32,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Factor on embedding rows (`embedding_multiplier_scale`).
    pub embedding_multiplier: f32,
    /// Factor on the logits (`output_multiplier_scale`).
    pub output_multiplier: f32,
    /// Factor on `q . k` (`attn_output_multiplier`, despite that name).
    pub attention_multiplier: f32,
    /// Attention logits are capped by `cap * tanh(x / cap)`.
    pub attention_logit_cap: f32,
    /// Longest sequence (`sequence_len`).
    pub max_position_embeddings: usize,
    /// Never attended to, never drawn.
    pub pad_token_id: u32,
    /// Ends a generation.
    pub eos_token_id: u32,
    /// Scale groups of the two row-parallel matrices.
    pub scale_groups_row_parallel: usize,
}

/// Keys of `config.json`; the last four may be missing.
const KEYS: [&str; 22] = [
    "name",
    "vocab_size",
    "d_model",
    "num_layers",
    "num_q_heads",
    "num_kv_heads",
    "key_size",
    "widening_factor",
    "ffn_size",
    "num_experts",
    "num_selected_experts",
    "rope_base",
    "rms_norm_eps",
    "embedding_multiplier_scale",
    "output_multiplier_scale",
    "attn_output_multiplier",
    "attn_logit_cap",
    "sequence_len",
    "pad_token",
    "eos_token",
    "scale_groups_row_parallel",
    "num_files",
];
/// Keys that say how the reference ran the model; they are known and change nothing.
const UNUSED_KEYS: [&str; 2] = ["mesh", "prefill_bucket"];

/// Scale groups of the published checkpoint's row-parallel matrices: one a device of its mesh.
const PUBLISHED_GROUPS: usize = 8;
/// Tensors beside the layers, and tensors a layer.
const TENSORS: (u64, u64) = (2, 12);

impl ModelConfig {
    /// Grok-1 as xAI published it.
    pub fn grok_1() -> Self {
        Self {
            name: "grok-1".to_owned(),
            vocab_size: 131_072,
            hidden_size: 6144,
            num_hidden_layers: 64,
            num_attention_heads: 48,
            num_key_value_heads: 8,
            head_dim: 128,
            intermediate_size: 32_768,
            num_experts: 8,
            num_experts_per_tok: 2,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            embedding_multiplier: 78.383_67,
            output_multiplier: 0.577_350_26,
            attention_multiplier: 0.088_388_35,
            attention_logit_cap: 30.0,
            max_position_embeddings: 8192,
            pad_token_id: 0,
            eos_token_id: 2,
            scale_groups_row_parallel: PUBLISHED_GROUPS,
        }
    }

    /// Reads the text of a `config.json` with xAI's keys; `place` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] naming the key, what was expected and what was found.
    pub fn from_json(text: &str, place: &str) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| ModelError::invalid(place, "a JSON object", error.to_string()))?;
        let Value::Object(object) = value else {
            return Err(ModelError::invalid(place, "a JSON object", "another value"));
        };
        let reader = Reader { object: &object, place, foreign: &OWN };
        reader.refuse_unknown_keys()?;
        let config = reader.config()?;
        config.check(&reader)?;
        reader.check_derived(&config)?;
        Ok(config)
    }

    /// A configuration out of `values` by xAI's names, which a file has under other names; what it lacks is as published.
    pub(crate) fn from_foreign(
        mut values: Map<String, Value>,
        foreign: &Foreign,
        place: &str,
    ) -> Result<Self, ModelError> {
        let published = Self::grok_1();
        let defaults: [(&str, Value); 8] = [
            ("rope_base", published.rope_theta.into()),
            ("rms_norm_eps", published.rms_norm_eps.into()),
            ("embedding_multiplier_scale", published.embedding_multiplier.into()),
            ("output_multiplier_scale", published.output_multiplier.into()),
            ("attn_output_multiplier", published.attention_multiplier.into()),
            ("attn_logit_cap", published.attention_logit_cap.into()),
            ("pad_token", published.pad_token_id.into()),
            ("eos_token", published.eos_token_id.into()),
        ];
        for (key, value) in defaults {
            values.entry(key).or_insert(value);
        }
        // Scales lie within the numbers there.
        values.insert("scale_groups_row_parallel".to_owned(), 1.into());
        let reader = Reader { object: &values, place, foreign };
        let config = reader.config()?;
        config.check(&reader)?;
        Ok(config)
    }

    /// Numbers in the model, the tied embedding counted once.
    pub fn parameters(&self) -> u64 {
        let (d, f) = (self.hidden_size as u64, self.intermediate_size as u64);
        let q = (self.num_attention_heads * self.head_dim) as u64;
        let kv = (self.num_key_value_heads * self.head_dim) as u64;
        let experts = self.num_experts as u64;
        let layer = 2 * d * q + 2 * d * kv + experts * (3 * d * f + d) + 4 * d;
        layer * u64::from(self.num_hidden_layers) + self.vocab_size as u64 * d + d
    }

    /// Width of keys, and of values, of one token in one layer.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Sizes so large that products of them could overflow, or that do not divide as they must, are refused here once.
    fn check(&self, reader: &Reader<'_>) -> Result<(), ModelError> {
        let bad = |key: &str, expected: String, found: String| Err(reader.bad(key, expected, found));
        if !self.head_dim.is_multiple_of(2) {
            return bad("key_size", "an even number".into(), self.head_dim.to_string());
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a multiple of num_kv_heads ({})", self.num_key_value_heads);
            return bad("num_q_heads", expected, self.num_attention_heads.to_string());
        }
        if self.num_experts_per_tok > self.num_experts {
            let expected = format!("at most num_experts ({})", self.num_experts);
            return bad("num_selected_experts", expected, self.num_experts_per_tok.to_string());
        }
        let rows = [
            ("ffn_size", self.intermediate_size),
            ("num_q_heads * key_size", self.num_attention_heads * self.head_dim),
        ];
        for (key, inputs) in rows {
            if !inputs.is_multiple_of(self.scale_groups_row_parallel) {
                let expected = format!("a multiple of scale_groups_row_parallel ({})", self.scale_groups_row_parallel);
                return bad(key, expected, inputs.to_string());
            }
        }
        for (key, id) in [("pad_token", self.pad_token_id), ("eos_token", self.eos_token_id)] {
            if id as usize >= self.vocab_size {
                return bad(key, format!("an id below vocab_size ({})", self.vocab_size), id.to_string());
            }
        }
        Ok(())
    }
}

/// The width of an expert that xAI's code derives from the widening factor: two thirds, rounded up to a multiple of 8.
fn ffn_size(widening_factor: f64, hidden_size: usize) -> u64 {
    let n = (widening_factor * hidden_size as f64) as u64 * 2 / 3;
    n.next_multiple_of(8)
}

/// How another program calls what a configuration holds: xAI's name, and the other.
pub(crate) struct Foreign {
    pub(crate) names: &'static [(&'static str, &'static str)],
}

/// xAI's names themselves.
const OWN: Foreign = Foreign { names: &[] };

struct Reader<'a> {
    object: &'a Map<String, Value>,
    place: &'a str,
    /// The names that messages use.
    foreign: &'a Foreign,
}

impl Reader<'_> {
    fn bad(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> ModelError {
        let shown = self.foreign.names.iter().find(|(ours, _)| *ours == key).map_or(key, |(_, theirs)| theirs);
        ModelError::invalid(format!("{}: {shown}", self.place), expected, found)
    }

    fn refuse_unknown_keys(&self) -> Result<(), ModelError> {
        let known = |key: &str| KEYS.contains(&key) || UNUSED_KEYS.contains(&key);
        let Some(unknown) = self.object.keys().find(|key| !known(key)) else { return Ok(()) };
        let near = KEYS
            .iter()
            .chain(&UNUSED_KEYS)
            .min_by_key(|key| distance(unknown, key))
            .filter(|key| distance(unknown, key) <= 3);
        let hint = near.map_or_else(String::new, |key| format!(" (did you mean {key:?}?)"));
        let shown: String = unknown.chars().take(64).collect();
        Err(ModelError::invalid(self.place, "known keys", format!("{shown:?}{hint}")))
    }

    fn value(&self, key: &str) -> Result<&Value, ModelError> {
        self.object.get(key).ok_or_else(|| self.bad(key, "a value", "none"))
    }

    fn size(&self, key: &str, most: u64) -> Result<usize, ModelError> {
        let value = self.value(key)?;
        match value.as_u64() {
            Some(size) if (1..=most).contains(&size) => Ok(size as usize),
            _ => Err(self.bad(key, format!("a whole number from 1 to {most}"), shortened(value))),
        }
    }

    fn id(&self, key: &str) -> Result<u32, ModelError> {
        let value = self.value(key)?;
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| self.bad(key, "a token id", shortened(value)))
    }

    fn factor(&self, key: &str) -> Result<f32, ModelError> {
        let value = self.value(key)?;
        let factor = value.as_f64().map(|factor| factor as f32).filter(|factor| factor.is_finite() && *factor > 0.0);
        factor.ok_or_else(|| self.bad(key, "a positive number", shortened(value)))
    }

    fn config(&self) -> Result<ModelConfig, ModelError> {
        let name = self.value("name")?;
        let name = name
            .as_str()
            .filter(|name| (1..=128).contains(&name.chars().count()) && !name.chars().any(char::is_control));
        Ok(ModelConfig {
            name: name.ok_or_else(|| self.bad("name", "a text of 1 to 128 characters", "another value"))?.to_owned(),
            vocab_size: self.size("vocab_size", 1 << 22)?,
            hidden_size: self.size("d_model", 1 << 16)?,
            num_hidden_layers: self.size("num_layers", 256)? as u32,
            num_attention_heads: self.size("num_q_heads", 1024)?,
            num_key_value_heads: self.size("num_kv_heads", 1024)?,
            head_dim: self.size("key_size", 1024)?,
            intermediate_size: self.size("ffn_size", 1 << 20)?,
            num_experts: self.size("num_experts", 256)?,
            num_experts_per_tok: self.size("num_selected_experts", 16)?,
            rope_theta: self.factor("rope_base")?,
            rms_norm_eps: self.factor("rms_norm_eps")?,
            embedding_multiplier: self.factor("embedding_multiplier_scale")?,
            output_multiplier: self.factor("output_multiplier_scale")?,
            attention_multiplier: self.factor("attn_output_multiplier")?,
            attention_logit_cap: self.factor("attn_logit_cap")?,
            max_position_embeddings: self.size("sequence_len", 1 << 20)?,
            pad_token_id: self.id("pad_token")?,
            eos_token_id: self.id("eos_token")?,
            scale_groups_row_parallel: match self.object.get("scale_groups_row_parallel") {
                None => PUBLISHED_GROUPS,
                Some(_) => self.size("scale_groups_row_parallel", 64)?,
            },
        })
    }

    /// What follows from other values must agree with them.
    fn check_derived(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let widening = self.value("widening_factor")?;
        let factor = widening.as_f64().filter(|factor| factor.is_finite() && *factor > 0.0 && *factor <= 1024.0);
        let factor =
            factor.ok_or_else(|| self.bad("widening_factor", "a positive number up to 1024", shortened(widening)))?;
        let expected = ffn_size(factor, config.hidden_size);
        if expected != config.intermediate_size as u64 {
            let expected = format!("{expected}, as widening_factor {factor} and d_model {} give", config.hidden_size);
            return Err(self.bad("ffn_size", expected, config.intermediate_size.to_string()));
        }
        let files = TENSORS.0 + TENSORS.1 * u64::from(config.num_hidden_layers);
        match self.object.get("num_files") {
            Some(found) if found.as_u64() != Some(files) => {
                let expected = format!("{files} for {} layers", config.num_hidden_layers);
                Err(self.bad("num_files", expected, shortened(found)))
            }
            _ => Ok(()),
        }
    }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// Edits that turn one word into the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    // A key far longer than any known one is near none; its length is somebody else's choice.
    if a.len() > 64 {
        return usize::MAX;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo() -> Value {
        serde_json::json!({
            "name": "t", "vocab_size": 512, "d_model": 64, "num_layers": 4, "num_q_heads": 4, "num_kv_heads": 2,
            "key_size": 16, "widening_factor": 2, "ffn_size": 88, "num_experts": 8, "num_selected_experts": 2,
            "rope_base": 10000, "rms_norm_eps": 1e-5, "embedding_multiplier_scale": 78.4, "output_multiplier_scale": 0.577,
            "attn_output_multiplier": 0.25, "attn_logit_cap": 30.0, "sequence_len": 128, "pad_token": 0, "eos_token": 2,
            "mesh": [1, 1], "scale_groups_row_parallel": 1, "prefill_bucket": 48, "num_files": 50
        })
    }

    #[test]
    fn grok_1_has_the_published_number_of_parameters() {
        let grok = ModelConfig::grok_1();
        // Counted with every norm and router: spec §1 gives 4,919,992,320 a layer and 805,306,368 for the embedding.
        assert_eq!(grok.parameters(), 64 * 4_919_992_320 + 805_306_368 + 6144);
        assert_eq!(ffn_size(8.0, 6144), 32_768);
        let nothing = Map::new();
        assert!(grok.check(&Reader { object: &nothing, place: "grok-1", foreign: &OWN }).is_ok());
    }

    #[test]
    fn a_good_configuration_is_read() {
        let config = ModelConfig::from_json(&demo().to_string(), "config.json").unwrap();
        assert_eq!((config.hidden_size, config.num_hidden_layers, config.intermediate_size), (64, 4, 88));
        assert_eq!(config.scale_groups_row_parallel, 1);
    }

    #[test]
    fn optional_keys_may_be_missing() {
        let mut value = demo();
        for key in ["mesh", "prefill_bucket", "num_files"] {
            value.as_object_mut().unwrap().remove(key);
        }
        assert!(ModelConfig::from_json(&value.to_string(), "config.json").is_ok());
        value.as_object_mut().unwrap().remove("scale_groups_row_parallel");
        assert_eq!(ModelConfig::from_json(&value.to_string(), "config.json").unwrap().scale_groups_row_parallel, 8);
    }

    #[test]
    fn every_other_key_is_named_when_it_is_missing() {
        let optional = ["mesh", "prefill_bucket", "num_files", "scale_groups_row_parallel"];
        for key in demo().as_object().unwrap().keys().filter(|key| !optional.contains(&key.as_str())) {
            let mut value = demo();
            value.as_object_mut().unwrap().remove(key);
            let error = ModelConfig::from_json(&value.to_string(), "config.json").unwrap_err().to_string();
            assert!(error.contains(key.as_str()) && error.contains("found none"), "{key}: {error}");
        }
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases: &[(&str, Value, &str)] = &[
            ("vocab_size", 0.into(), "1 to"),
            ("vocab_size", (-1).into(), "1 to"),
            ("vocab_size", 1e30.into(), "1 to"),
            ("vocab_size", u64::MAX.into(), "1 to"),
            ("vocab_size", "512".into(), "1 to"),
            ("d_model", 0.into(), "1 to"),
            ("d_model", 2.5.into(), "1 to"),
            ("d_model", Value::Null, "1 to"),
            ("num_layers", 0.into(), "1 to 256"),
            ("num_layers", 100_000.into(), "1 to 256"),
            ("num_q_heads", 3.into(), "multiple of num_kv_heads"),
            ("num_kv_heads", 0.into(), "1 to"),
            ("key_size", 15.into(), "an even number"),
            ("ffn_size", 96.into(), "expected 88"),
            ("widening_factor", 0.into(), "positive"),
            ("widening_factor", (-2).into(), "positive"),
            ("widening_factor", 3.into(), "expected 128"),
            ("num_experts", 0.into(), "1 to"),
            ("num_selected_experts", 9.into(), "at most num_experts"),
            ("rope_base", 0.into(), "positive"),
            ("rms_norm_eps", (-1e-5).into(), "positive"),
            ("rms_norm_eps", 1e-60.into(), "positive"),
            ("embedding_multiplier_scale", 1e300.into(), "positive"),
            ("output_multiplier_scale", Value::Bool(true), "positive"),
            ("attn_logit_cap", "30".into(), "positive"),
            ("sequence_len", 0.into(), "1 to"),
            ("pad_token", 512.into(), "below vocab_size"),
            ("eos_token", (-1).into(), "a token id"),
            ("scale_groups_row_parallel", 3.into(), "multiple of scale_groups"),
            ("scale_groups_row_parallel", 0.into(), "1 to 64"),
            ("num_files", 49.into(), "50 for 4 layers"),
            ("name", "".into(), "1 to 128"),
            ("name", "a\nb".into(), "1 to 128"),
            ("d_modle", 64.into(), "did you mean \"d_model\"?"),
            ("temperature", 1.into(), "known keys"),
        ];
        for (key, value, expected) in cases {
            let mut config = demo();
            config[*key] = value.clone();
            let error = ModelConfig::from_json(&config.to_string(), "config.json").expect_err(key).to_string();
            assert!(error.contains(expected), "{key} = {value}: {error}");
        }
        for text in ["", "[]", "{", "null", "{\"model_type\": \"grok-1\"}"] {
            assert!(ModelConfig::from_json(text, "config.json").is_err(), "{text:?}");
        }
    }
}

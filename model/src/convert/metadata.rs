//! What the file says about the model: sizes and multipliers with llama.cpp's names, and the vocabulary.
//!
//! The vocabulary of a GGUF model that has one is copied; any other's is made from `tokenizer.model`. One that has not as many pieces
//! as the embedding has rows is left out, since llama.cpp refuses such files.

use std::collections::BTreeMap;

use super::{
    header::{Metadata, Value},
    mix::Mix,
    plan::Plan,
};
use crate::{
    Format, Model, ModelConfig, ModelError,
    checkpoint::gguf,
    tokenizer::{PieceKind, Tokenizer},
};

/// The version of ggml's blocks.
const QUANTIZATION_VERSION: u32 = 2;

/// Metadata, and why there is no vocabulary in it, if there is none.
pub(super) fn of(model: &Model, plan: &Plan, mix: Mix) -> Result<(Metadata, Option<String>), ModelError> {
    let mut metadata = Metadata::default();
    sizes(&mut metadata, model.config());
    metadata.add("general.file_type", &Value::U32(mix.file_type()));
    // As llama.cpp has it: floats alone have no version.
    let is_float = |format| format == Format::F32 || mix == Mix::Bf16;
    if !plan.tensors.iter().all(|tensor| is_float(tensor.format)) {
        metadata.add("general.quantization_version", &Value::U32(QUANTIZATION_VERSION));
    }
    let why_none = match vocabulary(model)? {
        Ok(vocabulary) => {
            vocabulary.iter().for_each(|(key, value)| metadata.add(key, value));
            None
        }
        Err(why) => {
            metadata.add("tokenizer.ggml.model", &Value::Text("none".to_owned()));
            let config = model.config();
            for (key, id) in [("eos", config.eos_token_id), ("padding", config.pad_token_id)] {
                metadata.add(&format!("tokenizer.ggml.{key}_token_id"), &Value::U32(id));
            }
            Some(why)
        }
    };
    Ok((metadata, why_none))
}

fn sizes(metadata: &mut Metadata, config: &ModelConfig) {
    metadata.add("general.architecture", &Value::Text("grok".to_owned()));
    metadata.add("general.name", &Value::Text(config.name.clone()));
    let (width, heads) = (config.hidden_size, config.num_attention_heads);
    for (key, size) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("block_count", config.num_hidden_layers as usize),
        ("embedding_length", width),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("expert_count", config.num_experts),
        ("expert_used_count", config.num_experts_per_tok),
    ] {
        // Sizes of a configuration are below 2^22.
        metadata.add(&format!("grok.{key}"), &Value::U32(size as u32));
    }
    for (key, factor) in [
        ("rope.freq_base", config.rope_theta),
        ("attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        ("embedding_scale", config.embedding_multiplier),
        ("logit_scale", config.output_multiplier),
        ("attention.output_scale", config.attention_multiplier),
        ("attn_logit_softcapping", config.attention_logit_cap),
    ] {
        metadata.add(&format!("grok.{key}"), &Value::F32(factor));
    }
}

/// The keys of a vocabulary, sorted, so that a copy of a copy is the same file.
type Vocabulary = BTreeMap<String, Value>;

/// The model's vocabulary, or why there is none.
fn vocabulary(model: &Model) -> Result<Result<Vocabulary, String>, ModelError> {
    let rows = model.config().vocab_size;
    let unequal = |pieces: usize| format!("the tokenizer has {pieces} pieces, the model {rows} rows");
    if let Some(header) = model.gguf_header()? {
        let own = match header.metadata.get("tokenizer.ggml.tokens") {
            Some(gguf::Value::Texts(pieces)) if pieces.len() == rows => {
                let own = header.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
                let own = own.map(|(key, value)| Ok((key.clone(), copied(key, value)?)));
                Some(Ok(own.collect::<Result<_, ModelError>>()?))
            }
            Some(gguf::Value::Texts(pieces)) => Some(Err(unequal(pieces.len()))),
            _ => None,
        };
        if let Some(vocabulary) = own {
            return Ok(vocabulary);
        }
    }
    let Some(path) = model.tokenizer_path() else {
        return Ok(Err("there is no tokenizer.model beside the model".to_owned()));
    };
    let tokenizer = Tokenizer::open(&path)?;
    let pieces = tokenizer.pieces();
    if pieces.len() != rows {
        return Ok(Err(unequal(pieces.len())));
    }
    let place = |wanted: &dyn Fn(&str, PieceKind) -> bool| {
        pieces.iter().position(|piece| wanted(&piece.text, piece.kind)).map(|id| Value::U32(id as u32))
    };
    let begin = place(&|text, kind| kind == PieceKind::Control && matches!(text, "[BOS]" | "<s>"));
    let unknown = place(&|_, kind| kind == PieceKind::Unknown);
    let texts = pieces.iter().map(|piece| piece.text.clone()).collect();
    let keys = [
        ("model", Some(Value::Text("llama".to_owned()))),
        ("pre", Some(Value::Text("default".to_owned()))),
        ("tokens", Some(Value::Texts(texts))),
        ("scores", Some(Value::F32s(pieces.iter().map(|piece| piece.score).collect()))),
        ("token_type", Some(Value::I32s(pieces.iter().map(|piece| piece.kind.number()).collect()))),
        ("bos_token_id", begin),
        ("eos_token_id", Some(Value::U32(model.config().eos_token_id))),
        ("unknown_token_id", unknown),
        ("padding_token_id", Some(Value::U32(model.config().pad_token_id))),
        // Grok-1 was trained without either at the beginning or the end of a prompt.
        ("add_bos_token", Some(Value::Bool(false))),
        ("add_eos_token", Some(Value::Bool(false))),
        ("add_space_prefix", Some(Value::Bool(tokenizer.puts_space_in_front()))),
    ];
    Ok(Ok(keys.into_iter().filter_map(|(key, value)| Some((format!("tokenizer.ggml.{key}"), value?))).collect()))
}

/// A value of another GGUF file, with the widths that llama.cpp writes.
fn copied(key: &str, value: &gguf::Value) -> Result<Value, ModelError> {
    let too_wide = |found: String| ModelError::invalid(key, "a whole number of 32 bits", found);
    Ok(match value {
        gguf::Value::Integer(number) => match (u32::try_from(*number), i32::try_from(*number)) {
            (Ok(number), _) => Value::U32(number),
            (_, Ok(number)) => Value::I32(number),
            _ => return Err(too_wide(number.to_string())),
        },
        gguf::Value::Float(number) => Value::F32(*number as f32),
        gguf::Value::Bool(value) => Value::Bool(*value),
        gguf::Value::Text(text) => Value::Text(text.clone()),
        gguf::Value::Integers(numbers) => {
            let narrow = |number: &i64| i32::try_from(*number).or(Err(too_wide(number.to_string())));
            Value::I32s(numbers.iter().map(narrow).collect::<Result<_, _>>()?)
        }
        gguf::Value::Floats(numbers) => Value::F32s(numbers.clone()),
        gguf::Value::Texts(texts) => Value::Texts(texts.clone()),
    })
}

//! Opens a GGUF model: finds the parts of a split file, and reads the sizes of Grok-1's architecture from its metadata.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde_json::{Map, Number, Value as Json};

use super::{
    files::{self, Files},
    gguf::{self, Header, Value},
    header::parsed,
    kind::{self, FileKind},
    storage::Storage,
};
use crate::{ModelConfig, ModelError, config::Foreign};

pub(crate) const EXTENSION: &str = ".gguf";
/// The kind of vocabulary that is read, as GGUF names it: SentencePiece's BPE.
pub(crate) const VOCABULARY: &str = "llama";
/// Most parts of a split file.
pub(crate) const MOST_PARTS: u32 = 4096;

/// The keys of the metadata by xAI's names, and what holds where the file does not say: the published model's values. Older files
/// lack the multipliers.
const KEYS: Foreign = Foreign {
    names: &[
        ("vocab_size", "grok.vocab_size"),
        ("d_model", "grok.embedding_length"),
        ("num_layers", "grok.block_count"),
        ("num_q_heads", "grok.attention.head_count"),
        ("num_kv_heads", "grok.attention.head_count_kv"),
        ("key_size", "grok.attention.key_length"),
        ("ffn_size", "grok.feed_forward_length"),
        ("num_experts", "grok.expert_count"),
        ("num_selected_experts", "grok.expert_used_count"),
        ("rope_base", "grok.rope.freq_base"),
        ("rms_norm_eps", "grok.attention.layer_norm_rms_epsilon"),
        ("embedding_multiplier_scale", "grok.embedding_scale"),
        ("output_multiplier_scale", "grok.logit_scale"),
        ("attn_output_multiplier", "grok.attention.output_scale"),
        ("attn_logit_cap", "grok.attn_logit_softcapping"),
        ("sequence_len", "grok.context_length"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
    ],
};

/// What would change the arithmetic and Grok-1 does not have, and the values that change nothing; true counts as 1.
const NEUTRAL: [(&str, &[f64]); 21] = [
    ("grok.final_logit_softcapping", &[0.0]),
    ("grok.attention.temperature_length", &[0.0]),
    ("grok.attention.clamp_kqv", &[0.0]),
    ("grok.attention.max_alibi_bias", &[0.0]),
    ("grok.attention.sliding_window", &[0.0]),
    ("grok.attention.scale", &[0.0]),
    ("grok.attention.causal", &[1.0]),
    ("grok.residual_scale", &[0.0, 1.0]),
    ("grok.use_parallel_residual", &[0.0]),
    ("grok.swin_norm", &[0.0]),
    ("grok.expert_shared_count", &[0.0]),
    ("grok.expert_weights_scale", &[0.0, 1.0]),
    // 1 is a softmax over all experts.
    ("grok.expert_gating_func", &[0.0, 1.0]),
    ("grok.expert_group_count", &[0.0, 1.0]),
    ("grok.leading_dense_block_count", &[0.0]),
    ("grok.interleave_moe_layer_step", &[0.0, 1.0]),
    ("grok.rope.scaling.factor", &[0.0, 1.0]),
    ("grok.rope.scale_linear", &[0.0, 1.0]),
    ("grok.rope.scaling.attn_factor", &[1.0]),
    ("tokenizer.ggml.remove_extra_whitespaces", &[0.0]),
    ("tokenizer.ggml.add_sep_token", &[0.0]),
];

/// Keys of the architecture that are known and change nothing: llama.cpp reads some and uses none of them for Grok-1, and the factor
/// of expert weights that add up to 1 is undone by the norm behind them.
const WITHOUT_EFFECT: [&str; 6] = [
    "grok.router_logit_softcapping",
    "grok.expert_weights_norm",
    "grok.expert_feed_forward_length",
    "grok.tensor_data_layout",
    "grok.rope.dimension_count",
    "grok.attention.value_length",
];

/// A model of GGUF files, whose headers were read.
pub(super) struct Opened {
    pub(super) config: ModelConfig,
    pub(super) files: Files,
    /// Whether a vocabulary of the kind that is read is in it.
    pub(super) has_vocabulary: bool,
}

/// The GGUF file of a folder that holds nothing else to run: its only one, or the first part of its only split one. Files without a
/// name that says so are looked into where no name does.
pub(super) fn only_model_of(storage: &dyn Storage, folder: &Path) -> Result<Option<String>, ModelError> {
    let io = |source| ModelError::Io { path: folder.to_owned(), source };
    let found: Vec<String> =
        storage.list("").map_err(io)?.unwrap_or_default().into_iter().map(|(name, _)| name).collect();
    let other = |name: &String| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    if found.iter().any(other) || files::checkpoint_in(storage)?.is_some() {
        return Ok(None);
    }
    // Of a split one any part stands for all of them, so that a missing first part is missed.
    let mut models: BTreeSet<String> = found.iter().filter(|name| is_gguf(name)).map(|name| first_part(name)).collect();
    if models.is_empty() {
        models = files::of_kind(storage, &found, FileKind::Gguf).into_iter().collect();
    }
    let mut models = models.into_iter();
    match (models.next(), models.next()) {
        (Some(one), Some(other)) => {
            let found = format!("{one:?} and {other:?}");
            Err(ModelError::invalid(folder.display().to_string(), "one GGUF model, or the name of one", found))
        }
        (one, _) => Ok(one),
    }
}

/// Whether a name says that it is a GGUF file's.
pub(crate) fn is_gguf(name: &str) -> bool {
    split_extension(name).is_some()
}

/// What stands before the extension, in either case, and the extension.
fn split_extension(name: &str) -> Option<(&str, &str)> {
    let (rest, extension) = name.split_at_checked(name.len().checked_sub(EXTENSION.len())?)?;
    extension.eq_ignore_ascii_case(EXTENSION).then_some((rest, extension))
}

/// The name of a part: `PREFIX-00001-of-00009.gguf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    prefix: &'a str,
    number: u32,
    count: u32,
    extension: &'a str,
}

impl PartName<'_> {
    /// The names of all parts; of a count that cannot be, this one's alone.
    pub(crate) fn all(&self) -> impl Iterator<Item = String> {
        let numbers = if self.count <= MOST_PARTS { 1..=self.count } else { self.number..=self.number };
        numbers.map(|number| self.sibling(number))
    }

    /// The name of the part of this number.
    fn sibling(&self, number: u32) -> String {
        let Self { prefix, count, extension, .. } = self;
        format!("{prefix}{}{extension}", part_suffix(number, *count))
    }
}

/// What a part's name is made of; `None` for other names.
pub(crate) fn part_of(name: &str) -> Option<PartName<'_>> {
    let (rest, extension) = split_extension(name)?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| if text.len() == 5 { text.parse().ok() } else { None };
    Some(PartName { prefix, number: digits(number)?, count: digits(count)?, extension })
}

/// The part that has the metadata: the first of a split file, or the file itself.
pub(crate) fn first_part(file: &str) -> String {
    part_of(file).map_or_else(|| file.to_owned(), |part| part.sibling(1))
}

/// The path of a file without the number and the count of a part.
pub(crate) fn unsplit(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    match part_of(&name.to_string_lossy()) {
        None => path.to_owned(),
        Some(PartName { number, count, extension, .. }) => {
            let bytes = name.as_encoded_bytes();
            let prefix = &bytes[..bytes.len() - part_suffix(number, count).len() - extension.len()];
            #[cfg(unix)]
            let mut unsplit = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(prefix).to_owned();
            #[cfg(not(unix))]
            let mut unsplit = std::ffi::OsString::from(String::from_utf8_lossy(prefix).into_owned());
            unsplit.push(extension);
            path.with_file_name(unsplit)
        }
    }
}

/// What stands between the prefix and the extension of a part's name.
pub(crate) fn part_suffix(number: u32, count: u32) -> String {
    format!("-{number:05}-of-{count:05}")
}

/// Refuses a split file of which parts are not there, and names them.
fn check_parts(storage: &dyn Storage, part: &PartName<'_>) -> Result<(), ModelError> {
    if !(1..=MOST_PARTS).contains(&part.count) {
        return Ok(());
    }
    let first = part.sibling(1);
    let io = |source| ModelError::Io { path: storage.path(&first), source };
    let found: BTreeSet<String> =
        storage.list("").map_err(io)?.unwrap_or_default().into_iter().map(|(name, _)| name).collect();
    let missing: Vec<String> =
        (1..=part.count).map(|number| part.sibling(number)).filter(|name| !found.contains(name)).collect();
    let Some(one) = missing.first() else { return Ok(()) };
    // What is there and is no file says itself what it is.
    if let Err(source) = storage.open(one)
        && source.kind() != std::io::ErrorKind::NotFound
    {
        return Err(ModelError::Io { path: storage.path(one), source });
    }
    let others =
        if missing.len() > 1 { format!(" and {} others missing", missing.len() - 1) } else { " missing".to_owned() };
    let expected = format!("all {} parts of {}", part.count, part.prefix);
    Err(ModelError::invalid(storage.path(&first).display().to_string(), expected, format!("{one}{others}")))
}

/// Opens the model of this file, or of the parts that it is one of.
pub(super) fn open(storage: &dyn Storage, file: &str) -> Result<Opened, ModelError> {
    let first = first_part(file);
    if let Some(part) = part_of(&first) {
        check_parts(storage, &part)?;
    }
    let path = storage.path(&first);
    let place = path.display().to_string();
    let header = read(storage, &first)?;
    let config = config(&header, &place)?;
    let has_vocabulary =
        is_text(&header, "tokenizer.ggml.model", VOCABULARY) && header.metadata.contains_key("tokenizer.ggml.tokens");
    let count = match header.metadata.get("split.count") {
        // llama.cpp leaves a count of 0 in a file that it merged.
        None | Some(Value::Integer(0)) => 1,
        Some(Value::Integer(count)) if (1..=i128::from(MOST_PARTS)).contains(count) => *count as u32,
        Some(other) => {
            let expected = format!("1 to {MOST_PARTS} parts");
            return Err(ModelError::invalid(format!("{place}: split.count"), expected, other.to_string()));
        }
    };
    let total = header.metadata.get("split.tensors.count").cloned();
    let mut headers = vec![(first.clone(), header.tensors)];
    if count > 1 {
        let Some(part) = part_of(&first) else {
            let expected = format!("the name of part 1 of {count}, as NAME-00001-of-{count:05}.gguf");
            return Err(ModelError::invalid(place, expected, format!("{first:?}")));
        };
        if part.count != count {
            let expected = format!("{} parts, as its name says", part.count);
            return Err(ModelError::invalid(format!("{place}: split.count"), expected, count.to_string()));
        }
        for number in 2..=count {
            let name = part.sibling(number);
            let header = read(storage, &name)?;
            let says = (header.metadata.get("split.no"), header.metadata.get("split.count"));
            let wanted = (Value::Integer(i128::from(number) - 1), Value::Integer(count.into()));
            if says != (Some(&wanted.0), Some(&wanted.1)) {
                let place = storage.path(&name).display().to_string();
                let expected = format!("part {number} of {count}");
                let says = [says.0, says.1].map(|value| value.map_or("none".to_owned(), Value::to_string));
                return Err(ModelError::invalid(
                    place,
                    expected,
                    format!("split.no and split.count {}", says.join(", ")),
                ));
            }
            headers.push((name, header.tensors));
        }
    }
    let found: usize = headers.iter().map(|(_, tensors)| tensors.len()).sum();
    if let Some(Value::Integer(total)) = total
        && total != found as i128
    {
        return Err(ModelError::invalid(place, format!("{total} tensors in {count} parts"), found.to_string()));
    }
    let files = Files::in_gguf(headers, &config, &path)?;
    Ok(Opened { config, files, has_vocabulary })
}

fn is_text(header: &Header, key: &str, expected: &str) -> bool {
    matches!(header.metadata.get(key), Some(Value::Text(text)) if text == expected)
}

/// The header of one file.
pub(crate) fn read(storage: &dyn Storage, file: &str) -> Result<Header, ModelError> {
    let path = storage.path(file);
    let open = kind::open(storage, file)?;
    match FileKind::of(&*open) {
        Ok(FileKind::Gguf) | Err(_) => {}
        // Too short, or torn: the reader says where.
        Ok(FileKind::Other) => {}
        Ok(found) => return Err(kind::unfit(&path, "GGUF", found)),
    }
    parsed(&*open, &path, gguf::read, |error| {
        ModelError::invalid(format!("{}: {}", path.display(), error.place), error.expected, error.found)
    })
}

fn config(header: &Header, place: &str) -> Result<ModelConfig, ModelError> {
    let metadata = &header.metadata;
    match metadata.get("general.architecture") {
        Some(Value::Text(architecture)) if architecture == "grok" => {}
        other => {
            let found = match other {
                Some(Value::Text(text)) => format!("{:?}", text.chars().take(60).collect::<String>()),
                _ => "none".to_owned(),
            };
            return Err(ModelError::invalid(format!("{place}: general.architecture"), "\"grok\"", found));
        }
    }
    for (key, neutral) in NEUTRAL {
        let is_neutral = |value: &Value| number_of(value).is_some_and(|number| neutral.contains(&number));
        if let Some(value) = metadata.get(key).filter(|value| !is_neutral(value)) {
            return Err(ModelError::invalid(format!("{place}: {key}"), "none, as Grok-1 has none", value.to_string()));
        }
    }
    let scaling = "grok.rope.scaling.type";
    // What "linear" does, the factor says.
    let is_neutral = ["none", "linear"].iter().any(|kind| is_text(header, scaling, kind));
    if let Some(value) = metadata.get(scaling).filter(|_| !is_neutral) {
        return Err(ModelError::invalid(format!("{place}: {scaling}"), "none, as Grok-1 has none", value.to_string()));
    }
    let is_known = |key: &String| {
        KEYS.names.iter().any(|(_, known)| key == known)
            || NEUTRAL.iter().any(|(known, _)| key == known)
            || WITHOUT_EFFECT.contains(&key.as_str())
            || key == scaling
    };
    let unknown: Vec<&String> = metadata.keys().filter(|key| key.starts_with("grok.") && !is_known(key)).collect();
    if !unknown.is_empty() {
        tracing::warn!(keys = ?unknown, "{place}: keys of the architecture that are not known are left aside");
    }
    let mut values = Map::new();
    for (ours, theirs) in KEYS.names {
        if let Some(value) = metadata.get(*theirs) {
            values.insert((*ours).to_owned(), json(value));
        }
    }
    let number = |key: &str| match metadata.get(key) {
        Some(Value::Integer(number)) => i64::try_from(*number).ok(),
        _ => None,
    };
    // Sizes that older files do not say, but imply.
    if !values.contains_key("key_size") {
        let implied = || {
            let (width, heads) = (number("grok.embedding_length")?, number("grok.attention.head_count")?);
            width.checked_div(heads)
        };
        if let Some(size) = number("grok.rope.dimension_count").or_else(implied) {
            values.insert("key_size".to_owned(), size.into());
        }
    }
    // Where a file says them of its own, they must be what the model has: a head is rotated as a whole, and its values are as wide.
    if let Some(size) = values.get("key_size").and_then(Json::as_i64) {
        for key in ["grok.rope.dimension_count", "grok.attention.value_length"] {
            if metadata.contains_key(key) && number(key) != Some(size) {
                let found = metadata.get(key).map(json).unwrap_or_default();
                return Err(ModelError::invalid(
                    format!("{place}: {key}"),
                    format!("{size}, as heads are"),
                    found.to_string(),
                ));
            }
        }
    }
    if !values.contains_key("vocab_size")
        && let Some(rows) = header.tensors.get("token_embd.weight").and_then(|entry| entry.shape.first())
    {
        values.insert("vocab_size".to_owned(), (*rows).into());
    }
    let name = match metadata.get("general.name") {
        Some(Value::Text(name)) => name.chars().filter(|char| !char.is_control()).take(60).collect(),
        _ => String::new(),
    };
    values.insert("name".to_owned(), Json::String(if name.is_empty() { "grok-1".to_owned() } else { name }));
    let config = ModelConfig::from_foreign(values, &KEYS, place)?;
    if config.rope_theta != ModelConfig::grok_1().rope_theta {
        tracing::warn!(found = config.rope_theta, "{place}: grok.rope.freq_base is not Grok-1's 10000");
    }
    Ok(config)
}

fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(value) => Some(f64::from(u8::from(*value))),
        value => json(value).as_f64(),
    }
}

fn json(value: &Value) -> Json {
    match value {
        Value::Integer(number) => i64::try_from(*number).map_or(Json::Null, Json::from),
        Value::Float(number) => Number::from_f64(*number).map_or(Json::Null, Json::Number),
        Value::Text(text) => Json::String(text.chars().take(60).collect()),
        Value::Bool(value) => Json::Bool(*value),
        Value::Integers(_) | Value::Floats(_) | Value::Texts(_) => Json::Array(Vec::new()),
    }
}

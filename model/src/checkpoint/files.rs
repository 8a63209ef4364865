//! Which file of a model holds which tensor, by names and lengths alone.
//!
//! Knows the ways in which a model lies in a folder. What a pickle holds is not looked at here; of other files the headers are read,
//! since they say where in the file each tensor lies.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Deserialize;

use super::{
    gguf,
    header::parsed,
    kind::{self, FileKind},
    names::Family,
    safetensors::{self, Entry},
    storage::Storage,
};
use crate::{Format, Layout, ModelConfig, ModelError, TensorName, TensorShape};

const CHECKPOINT: &str = "ckpt-0";
/// Where else the tensors of a checkpoint may lie; `""` is the folder itself.
const CHECKPOINTS: [&str; 3] = ["ckpt", "ckpt/ckpt-0", ""];
/// Most files of a folder that are looked into.
const MOST_LOOKED_INTO: usize = 256;
pub(super) const INDEX: &str = ".safetensors.index.json";
const SAFETENSORS: [&str; 2] = ["model.safetensors", "weights.safetensors"];
/// Longest index: 770 names need about 100 KB.
const LONGEST_INDEX: u64 = 4 << 20;
/// Longest name of a file that an index may name, as file systems have it.
const LONGEST_NAME: usize = 255;
/// Most files that an index may name.
const MOST_FILES: usize = 4096;

/// Where the tensors are.
pub(super) enum Files {
    /// One pickle a tensor, in `ckpt-0/`: file name and length by tensor.
    Pickles(BTreeMap<TensorName, (String, u64)>),
    /// Files whose headers say where each tensor lies.
    Placed {
        /// Name of the file format.
        kind: &'static str,
        /// Place by tensor.
        tensors: BTreeMap<TensorName, Placed>,
    },
}

/// Where a tensor lies, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// How its numbers are stored.
    pub(super) format: Format,
    /// Which index runs fastest.
    pub(super) layout: Layout,
    /// Its parts, one after the other: one, or one an expert, all of the same length.
    pub(super) parts: Vec<Part>,
}

/// A stretch of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Its name, relative to the model.
    pub(super) file: String,
    /// Where it begins.
    pub(super) offset: u64,
    /// Its length in bytes.
    pub(super) length: u64,
}

/// A tensor as some file's header has it.
#[derive(Clone, Debug)]
struct Found {
    shape: Vec<u64>,
    format: Format,
    part: Part,
}

type FoundByName = BTreeMap<String, Found>;

impl Files {
    /// Looks for `ckpt-0/`, then for an index, then for a single file.
    pub(super) fn find(storage: &dyn Storage, folder: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let list =
            |name: &str| storage.list(name).map_err(|source| ModelError::Io { path: storage.path(name), source });
        if let Some(checkpoint) = checkpoint_in(storage)? {
            let found = list(checkpoint)?.unwrap_or_default();
            return pickles(storage, checkpoint, &found, config);
        }
        let found: Vec<String> = list("")?.unwrap_or_default().into_iter().map(|(file, _)| file).collect();
        let indices: Vec<&String> = found.iter().filter(|file| file.ends_with(INDEX)).collect();
        match indices[..] {
            [] => {}
            [index] => return indexed(storage, index, config),
            _ => {
                let place = folder.display().to_string();
                return Err(ModelError::invalid(place, format!("one *{INDEX}"), format!("{}", indices.len())));
            }
        }
        match SAFETENSORS.into_iter().find(|name| found.iter().any(|file| file == name)) {
            Some(file) => Self::in_safetensors(storage, file, config),
            None => match &of_kind(storage, &found, FileKind::Safetensors)[..] {
                [file] => Self::in_safetensors(storage, file, config),
                _ => {
                    let expected = format!("ckpt-0/, *{INDEX}, model.safetensors, weights.safetensors or *.gguf in it");
                    Err(ModelError::invalid(folder.display().to_string(), expected, "none of them"))
                }
            },
        }
    }

    /// All tensors in this one file.
    pub(super) fn in_safetensors(storage: &dyn Storage, file: &str, config: &ModelConfig) -> Result<Self, ModelError> {
        matched("safetensors", header(storage, file)?, config, &storage.path(file))
    }

    /// All tensors of GGUF files, whose headers were read.
    pub(super) fn in_gguf(
        headers: Vec<(String, BTreeMap<String, gguf::Entry>)>,
        config: &ModelConfig,
        path: &Path,
    ) -> Result<Self, ModelError> {
        let mut found = FoundByName::new();
        for (file, entries) in headers {
            for (name, gguf::Entry { shape, format, offset, length }) in entries {
                // Frequencies that some converters add; ours follow from the configuration.
                if name.starts_with("rope_freqs") {
                    continue;
                }
                let part = Part { file: file.clone(), offset, length };
                if let Some(other) = found.insert(name.clone(), Found { shape, format, part }) {
                    let place = format!("{}: {}", path.display(), shortened(&name));
                    let both = format!("it in {:?} and in {file:?}", other.part.file);
                    return Err(ModelError::invalid(place, "each tensor once", both));
                }
            }
        }
        matched("gguf", found, config, path)
    }

    /// Where a tensor lies; the head where the embedding does, unless the files have one of its own.
    pub(super) fn placed(&self, name: &TensorName) -> Option<&Placed> {
        match self {
            Self::Pickles(_) => None,
            Self::Placed { tensors, .. } => tied(name, |name| tensors.get(name)),
        }
    }

    /// The file of a tensor, relative to the model; the first if there are several.
    pub(super) fn file(&self, name: &TensorName) -> Option<&str> {
        match self {
            Self::Pickles(files) => tied(name, |name| files.get(name)).map(|(file, _)| file.as_str()),
            Self::Placed { .. } => self.placed(name).and_then(|placed| placed.parts.first()).map(|part| &*part.file),
        }
    }

    /// All files of a tensor, each once, relative to the model.
    pub(super) fn of(&self, name: &TensorName) -> BTreeSet<&str> {
        match self {
            Self::Pickles(_) => self.file(name).into_iter().collect(),
            Self::Placed { .. } => {
                let parts = self.placed(name).map_or(&[][..], |placed| &placed.parts);
                parts.iter().map(|part| part.file.as_str()).collect()
            }
        }
    }

    /// All files that hold tensors, each once, relative to the model.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        match self {
            Self::Pickles(files) => files.values().map(|(file, _)| file.as_str()).collect(),
            Self::Placed { tensors, .. } => {
                tensors.values().flat_map(|placed| &placed.parts).map(|part| part.file.as_str()).collect()
            }
        }
    }

    /// Bytes of a tensor on disk.
    pub(super) fn bytes(&self, name: &TensorName) -> u64 {
        match self {
            Self::Pickles(files) => tied(name, |name| files.get(name)).map_or(0, |(_, length)| *length),
            Self::Placed { .. } => {
                let parts = self.placed(name).map_or(&[][..], |placed| &placed.parts);
                parts.iter().map(|part| part.length).sum()
            }
        }
    }

    /// Name of the file format.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Pickles(_) => "pickles",
            Self::Placed { kind, .. } => kind,
        }
    }

    /// Whether the files have a head of its own beside the embedding.
    pub(super) fn has_head(&self) -> bool {
        matches!(self, Self::Placed { tensors, .. } if tensors.contains_key(&TensorName::Head))
    }
}

/// The head is the embedding, unless there is one of its own.
fn tied<T>(name: &TensorName, get: impl Fn(&TensorName) -> Option<T>) -> Option<T> {
    get(name).or_else(|| if *name == TensorName::Head { get(&TensorName::Embedding) } else { None })
}

/// Where a checkpoint's tensors lie, relative to the storage: `ckpt-0/` if there is one, else where a tensor is.
pub(crate) fn checkpoint_in(storage: &dyn Storage) -> Result<Option<&'static str>, ModelError> {
    let list = |name: &str| storage.list(name).map_err(|source| ModelError::Io { path: storage.path(name), source });
    if list(CHECKPOINT)?.is_some() {
        return Ok(Some(CHECKPOINT));
    }
    for folder in CHECKPOINTS {
        if list(folder)?.is_some_and(|found| found.iter().any(|(name, _)| is_tensor(name))) {
            return Ok(Some(folder));
        }
    }
    Ok(None)
}

/// Whether this is the name of a tensor's file: `tensor00000_000`.
pub(crate) fn is_tensor(name: &str) -> bool {
    let digits = |text: &str, count| text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = name.strip_prefix("tensor").and_then(|rest| rest.split_once('_'));
    number.is_some_and(|(tensor, host)| digits(tensor, 5) && digits(host, 3))
}

/// Those of these files that are of a kind by their content.
pub(super) fn of_kind(storage: &dyn Storage, names: &[String], kind: FileKind) -> Vec<String> {
    let is_one =
        |name: &&String| storage.open(name).and_then(|file| FileKind::of(&*file)).is_ok_and(|found| found == kind);
    names.iter().take(MOST_LOOKED_INTO).filter(is_one).cloned().collect()
}

/// Pairs the files of `ckpt-0/` with tensors, by number.
fn pickles(
    storage: &dyn Storage,
    checkpoint: &str,
    found: &[(String, u64)],
    config: &ModelConfig,
) -> Result<Files, ModelError> {
    let names = TensorName::in_file_order(config.num_hidden_layers);
    let place = || storage.path(checkpoint).display().to_string();
    let within = |file: &str| if checkpoint.is_empty() { file.to_owned() } else { format!("{checkpoint}/{file}") };
    let expected: BTreeMap<String, TensorName> =
        names.into_iter().enumerate().map(|(index, name)| (format!("tensor{index:05}_000"), name)).collect();
    let mut files = BTreeMap::new();
    for (file, length) in found.iter().filter(|(file, _)| file.starts_with("tensor")) {
        let Some(name) = expected.get(file) else {
            return Err(ModelError::invalid(
                place(),
                format!("{} tensor files", expected.len()),
                format!("one more: {file:?}"),
            ));
        };
        files.insert(*name, (within(file), *length));
    }
    match expected.iter().find(|(_, name)| !files.contains_key(name)) {
        None => Ok(Files::Pickles(files)),
        Some((file, name)) => {
            let expected = format!("{} tensor files with {file} ({name})", expected.len());
            let found = match storage.open(&within(file)) {
                // It is there, and no file.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => error.to_string(),
                _ => format!("{} without it", files.len()),
            };
            Err(ModelError::invalid(place(), expected, found))
        }
    }
}

fn header(storage: &dyn Storage, file: &str) -> Result<FoundByName, ModelError> {
    let path = storage.path(file);
    let open = kind::open(storage, file)?;
    let entries = parsed(&*open, &path, safetensors::read, |error| {
        ModelError::invalid(format!("{}: {}", path.display(), error.place), error.expected, error.found)
    })?;
    let found = entries.into_iter().map(|(name, Entry { shape, format, offset, length })| {
        (name, Found { shape, format, part: Part { file: file.to_owned(), offset, length } })
    });
    Ok(found.collect())
}

/// Pairs tensors with the model's, by name; none may be missing, of another shape, or left over.
fn matched(kind: &'static str, mut found: FoundByName, config: &ModelConfig, path: &Path) -> Result<Files, ModelError> {
    let family = Family::of(found.keys());
    let mut tensors = BTreeMap::new();
    for name in TensorName::in_file_order(config.num_hidden_layers) {
        let placed = match family {
            None => own(&name, &mut found, config, path)?,
            Some(family) => foreign(family, &name, &mut found, config, path)?,
        };
        tensors.insert(name, placed);
    }
    if let Some(family) = family
        && family.names(&TensorName::Head).whole.iter().any(|head| found.contains_key(head))
    {
        tensors.insert(TensorName::Head, foreign(family, &TensorName::Head, &mut found, config, path)?);
    }
    match found.keys().next() {
        None => Ok(Files::Placed { kind, tensors }),
        Some(surplus) => {
            let place = path.display().to_string();
            Err(ModelError::invalid(place, "only the model's tensors", format!("{:?}", shortened(surplus))))
        }
    }
}

/// A tensor with xAI's name, in f32.
fn own(name: &TensorName, found: &mut FoundByName, config: &ModelConfig, path: &Path) -> Result<Placed, ModelError> {
    let place = || format!("{}: {name}", path.display());
    let Some(Found { shape, format, part }) = found.remove(&name.to_string()) else {
        return Err(ModelError::invalid(place(), "this tensor", "none"));
    };
    let expected = name.shape(config);
    check_shape(&expected.dimensions(), &shape, place)?;
    if format != Format::F32 {
        return Err(ModelError::invalid(place(), "dtype F32", format.to_string()));
    }
    let layout = if let TensorShape::Matrix { layout, .. } = expected { layout } else { Layout::OutIn };
    Ok(Placed { format, layout, parts: vec![part] })
}

/// A tensor with another program's name, a matrix output by output.
fn foreign(
    family: Family,
    name: &TensorName,
    found: &mut FoundByName,
    config: &ModelConfig,
    path: &Path,
) -> Result<Placed, ModelError> {
    let names = family.names(name);
    let (experts, one) = match name.shape(config) {
        TensorShape::Vector(length) => (None, vec![length as u64]),
        TensorShape::Matrix { experts, inputs, outputs, .. } => (experts, vec![outputs as u64, inputs as u64]),
    };
    let place = |name: &str| format!("{}: {}", path.display(), name);
    if let Some((name, Found { shape, format, part })) = names.whole.iter().find_map(|name| found.remove_entry(name)) {
        let expected: Vec<u64> = experts.map(|experts| experts as u64).into_iter().chain(one).collect();
        check_shape(&expected, &shape, || place(&name))?;
        return Ok(Placed { format, layout: Layout::OutIn, parts: vec![part] });
    }
    let (Some(expert), Some(experts)) = (names.expert, experts) else {
        let expected = names.whole.join(" or ");
        return Err(ModelError::invalid(path.display().to_string(), format!("tensor {expected}"), "none"));
    };
    let mut format = None;
    let mut parts = Vec::new();
    for name in (0..experts).map(expert) {
        let Some(tensor) = found.remove(&name) else {
            let also = names.whole.first().map_or_else(String::new, |whole| format!(" or {whole}"));
            return Err(ModelError::invalid(path.display().to_string(), format!("tensor {name}{also}"), "none"));
        };
        check_shape(&one, &tensor.shape, || place(&name))?;
        let first = *format.get_or_insert(tensor.format);
        if tensor.format != first {
            let expected = format!("{first}, as the experts before it");
            return Err(ModelError::invalid(place(&name), expected, tensor.format.to_string()));
        }
        parts.push(tensor.part);
    }
    Ok(Placed { format: format.unwrap_or(Format::F32), layout: Layout::OutIn, parts })
}

fn check_shape(expected: &[u64], found: &[u64], place: impl Fn() -> String) -> Result<(), ModelError> {
    if expected == found {
        return Ok(());
    }
    Err(ModelError::invalid(place(), format!("shape {expected:?}"), format!("{found:?}")))
}

/// A `*.safetensors.index.json`: which file holds which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files that an index names. Where it and the files' own headers disagree, the model is refused.
fn indexed(storage: &dyn Storage, file: &str, config: &ModelConfig) -> Result<Files, ModelError> {
    let path = storage.path(file);
    let place = || path.display().to_string();
    let Index { weight_map } = read_index(storage, file, &path)?;
    let files: BTreeSet<&String> = weight_map.values().collect();
    if files.len() > MOST_FILES {
        return Err(ModelError::invalid(place(), format!("at most {MOST_FILES} files"), files.len().to_string()));
    }
    // A name with a folder in it could lead out of the model's.
    let plain = |name: &str| {
        let can_be_a_file = name.len() <= LONGEST_NAME && !name.contains(char::is_control);
        name.ends_with(".safetensors") && can_be_a_file && !name.contains(['/', '\\', ':'])
    };
    if let Some(name) = files.iter().find(|name| !plain(name)) {
        return Err(ModelError::invalid(
            place(),
            "names of .safetensors files beside it",
            format!("{:?}", shortened(name)),
        ));
    }
    let mut found = FoundByName::new();
    for file in files {
        for (name, entry) in header(storage, file)? {
            let says = weight_map.get(&name);
            if says != Some(file) {
                let says = says.map_or("none".to_owned(), |says| format!("{:?}", shortened(says)));
                let expected = format!("{:?} for {:?}, which is in it", shortened(file), shortened(&name));
                return Err(ModelError::invalid(place(), expected, says));
            }
            found.insert(name, entry);
        }
    }
    if let Some((name, file)) = weight_map.iter().find(|(name, _)| !found.contains_key(*name)) {
        let expected = format!("{:?} in {:?}, as it says", shortened(name), shortened(file));
        return Err(ModelError::invalid(place(), expected, "no such tensor"));
    }
    matched("safetensors", found, config, &path)
}

fn read_index(storage: &dyn Storage, file: &str, path: &Path) -> Result<Index, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let place = || path.display().to_string();
    let open = kind::open(storage, file)?;
    if open.length() > LONGEST_INDEX {
        let expected = format!("at most {LONGEST_INDEX} bytes");
        return Err(ModelError::invalid(place(), expected, format!("{} bytes", open.length())));
    }
    let mut text = vec![0; open.length() as usize];
    open.read_exact_at(&mut text, 0).map_err(io)?;
    serde_json::from_slice(&text)
        .map_err(|error| ModelError::invalid(place(), "a JSON object with weight_map", shortened(&error.to_string())))
}

/// What others wrote, short enough for a message.
fn shortened(text: &str) -> String {
    text.chars().take(120).collect()
}

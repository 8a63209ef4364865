//! Which file of a model holds which tensor, by names and lengths alone.
//!
//! Knows the three ways in which a model lies in a folder. What a pickle holds is not looked at here; of safetensors the headers are
//! read, since they say where in the file each tensor lies.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Deserialize;

use super::{
    safetensors::{self, Entry},
    storage::Storage,
};
use crate::{ModelConfig, ModelError, TensorName};

const CHECKPOINT: &str = "ckpt-0";
const INDEX: &str = ".safetensors.index.json";
const SAFETENSORS: [&str; 2] = ["model.safetensors", "weights.safetensors"];
/// Longest index: 770 names need about 100 KB.
const LONGEST_INDEX: u64 = 4 << 20;
/// Most files that an index may name.
const MOST_FILES: usize = 4096;

/// Where the tensors are.
pub(super) enum Files {
    /// One pickle a tensor, in `ckpt-0/`: file name and length by tensor.
    Pickles(BTreeMap<TensorName, (String, u64)>),
    /// One or more safetensors files: file name and place in it by tensor.
    Safetensors(BTreeMap<TensorName, (String, Entry)>),
}

impl Files {
    /// Looks for `ckpt-0/`, then for an index, then for a single file.
    pub(super) fn find(storage: &dyn Storage, folder: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let list =
            |name: &str| storage.list(name).map_err(|source| ModelError::Io { path: storage.path(name), source });
        if let Some(found) = list(CHECKPOINT)? {
            return pickles(&found, config, &storage.path(CHECKPOINT));
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
            None => {
                let expected = format!("ckpt-0/, *{INDEX}, model.safetensors or weights.safetensors in it");
                Err(ModelError::invalid(folder.display().to_string(), expected, "none of them"))
            }
        }
    }

    /// All tensors in this one file.
    pub(super) fn in_safetensors(storage: &dyn Storage, file: &str, config: &ModelConfig) -> Result<Self, ModelError> {
        let found = header(storage, file)?.into_iter().map(|(name, entry)| (name, (file.to_owned(), entry))).collect();
        matched(found, config, &storage.path(file))
    }

    /// The file of a tensor, relative to the model.
    pub(super) fn file(&self, name: &TensorName) -> Option<&str> {
        match self {
            Self::Pickles(files) => files.get(name).map(|(file, _)| file.as_str()),
            Self::Safetensors(tensors) => tensors.get(name).map(|(file, _)| file.as_str()),
        }
    }

    /// Bytes of a tensor on disk.
    pub(super) fn bytes(&self, name: &TensorName) -> u64 {
        match self {
            Self::Pickles(files) => files.get(name).map_or(0, |(_, length)| *length),
            Self::Safetensors(tensors) => tensors.get(name).map_or(0, |(_, entry)| entry.length),
        }
    }

    /// Name of the file format.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Pickles(_) => "pickles",
            Self::Safetensors(_) => "safetensors",
        }
    }
}

/// Pairs the files of `ckpt-0/` with tensors, by number.
fn pickles(found: &[(String, u64)], config: &ModelConfig, folder: &Path) -> Result<Files, ModelError> {
    let names = TensorName::in_file_order(config.num_hidden_layers);
    let place = || folder.display().to_string();
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
        files.insert(*name, (format!("{CHECKPOINT}/{file}"), *length));
    }
    match expected.iter().find(|(_, name)| !files.contains_key(name)) {
        None => Ok(Files::Pickles(files)),
        Some((file, name)) => {
            let expected = format!("{} tensor files with {file} ({name})", expected.len());
            Err(ModelError::invalid(place(), expected, format!("{} without it", files.len())))
        }
    }
}

fn header(storage: &dyn Storage, file: &str) -> Result<BTreeMap<String, Entry>, ModelError> {
    let path = storage.path(file);
    let open = storage.open(file).map_err(|source| ModelError::Io { path: path.clone(), source })?;
    safetensors::read(&*open).map_err(|error| {
        ModelError::invalid(format!("{}: {}", path.display(), error.place), error.expected, error.found)
    })
}

/// Pairs tensors with the model's, by name; none may be missing, of another shape, or left over.
fn matched(
    mut found: BTreeMap<String, (String, Entry)>,
    config: &ModelConfig,
    path: &Path,
) -> Result<Files, ModelError> {
    let mut tensors = BTreeMap::new();
    for name in TensorName::in_file_order(config.num_hidden_layers) {
        let place = || format!("{}: {name}", path.display());
        let tensor =
            found.remove(&name.to_string()).ok_or_else(|| ModelError::invalid(place(), "this tensor", "none"))?;
        let dimensions = name.shape(config).dimensions();
        if tensor.1.shape != dimensions {
            return Err(ModelError::invalid(place(), format!("shape {dimensions:?}"), format!("{:?}", tensor.1.shape)));
        }
        tensors.insert(name, tensor);
    }
    match found.keys().next() {
        None => Ok(Files::Safetensors(tensors)),
        Some(surplus) => {
            let place = path.display().to_string();
            Err(ModelError::invalid(place, "only the model's tensors", format!("{:?}", shortened(surplus))))
        }
    }
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
    let plain = |name: &str| name.ends_with(".safetensors") && !name.contains(['/', '\\', ':', '\0']);
    if let Some(name) = files.iter().find(|name| !plain(name)) {
        return Err(ModelError::invalid(
            place(),
            "names of .safetensors files beside it",
            format!("{:?}", shortened(name)),
        ));
    }
    let mut found = BTreeMap::new();
    for file in files {
        for (name, entry) in header(storage, file)? {
            let says = weight_map.get(&name);
            if says != Some(file) {
                let says = says.map_or("none".to_owned(), |says| format!("{:?}", shortened(says)));
                let expected = format!("{:?} for {:?}, which is in it", shortened(file), shortened(&name));
                return Err(ModelError::invalid(place(), expected, says));
            }
            found.insert(name, (file.clone(), entry));
        }
    }
    matched(found, config, &path)
}

fn read_index(storage: &dyn Storage, file: &str, path: &Path) -> Result<Index, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let place = || path.display().to_string();
    let open = storage.open(file).map_err(io)?;
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

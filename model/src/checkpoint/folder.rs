//! Which folder a person means who names a model's: that with its files, one above it, or one of a download's cache.
//!
//! A folder that holds a model itself is never left for one within it. Where several within it hold one, the person has to say which.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use super::{
    files::{self, INDEX},
    open_gguf,
    storage::{Folder, Storage},
};
use crate::ModelError;

/// Most folders that are looked into.
const MOST: usize = 256;
/// Where Hugging Face's cache has a model's files, by revision.
const SNAPSHOTS: &str = "snapshots";
/// Which revision was asked for last.
const REVISION: &str = "refs/main";

/// The folder with the model's files: `path`, or the only folder within it that holds a model. `path` itself where there is none, for
/// its readers to refuse.
pub(crate) fn of_model(path: &Path) -> Result<PathBuf, ModelError> {
    if holds_model(path) {
        return Ok(path.to_owned());
    }
    let snapshots = path.join(SNAPSHOTS);
    if let Ok(revision) = fs::read_to_string(path.join(REVISION)) {
        let current = snapshots.join(revision.trim());
        if current.parent() == Some(&snapshots) && holds_model(&current) {
            return Ok(current);
        }
    }
    let found = [models_within(&snapshots), models_within(path)].concat();
    match &found[..] {
        [] => Ok(path.to_owned()),
        [one] => Ok(one.clone()),
        [one, other, ..] => {
            let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let found = format!("{} of them, {:?} and {:?} among them", found.len(), name(one), name(other));
            Err(ModelError::invalid(path.display().to_string(), "one model in it, or the folder of one", found))
        }
    }
}

/// The folder above, by name where the path has one.
pub(crate) fn above(folder: &Path) -> PathBuf {
    match folder.components().next_back() {
        Some(Component::Normal(_)) => match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        },
        _ => folder.join(".."),
    }
}

fn models_within(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut found: Vec<PathBuf> =
        paths.filter(|path| !is_hidden(path) && path.is_dir()).take(MOST).filter(|path| holds_model(path)).collect();
    found.sort();
    found
}

/// Whether the names of a folder's files are those of a model's. What cannot be read holds none.
fn holds_model(path: &Path) -> bool {
    let storage = Folder(path.to_owned());
    let named = |name: &str| open_gguf::is_gguf(name) || name.ends_with(".safetensors") || name.ends_with(INDEX);
    files::checkpoint_in(&storage).is_ok_and(|found| found.is_some())
        || storage.list("").is_ok_and(|found| found.unwrap_or_default().iter().any(|(name, _)| named(name)))
}

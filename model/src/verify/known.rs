//! What is known of a model's files before they are read: which there must be, their lengths and their checksums.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
};

use crate::{
    ModelError,
    checkpoint::{files::is_tensor, folder, open_gguf, published, storage::open_regular},
    manifest::{self, Manifest},
};

/// Who says what a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// xAI's publication.
    Published,
    /// This `.sha256` file.
    Manifest(PathBuf),
    /// The name of the blob in a cache.
    Cache,
    /// What Hugging Face's downloader noted.
    Download,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Published => f.write_str("xAI's publication"),
            Self::Manifest(path) => f.write_str(&path.file_name().unwrap_or_default().to_string_lossy()),
            Self::Cache => f.write_str("its name in the cache"),
            Self::Download => f.write_str("the note of its download"),
        }
    }
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Length(u64, Source),
    Sha256(String, Source),
}

/// Most files of a folder.
const MOST_FILES: usize = 1 << 16;
/// Longest note of a download.
const LONGEST_NOTE: u64 = 4096;

/// The files of a model, present or not.
pub(super) struct Known {
    pub(super) files: Vec<(PathBuf, Vec<Expected>)>,
    /// What was named.
    path: PathBuf,
}

impl Known {
    /// What is known of the model at `path`.
    pub(super) fn of(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let found = fs::metadata(path).map_err(io)?;
        let mut files: BTreeMap<PathBuf, Vec<Expected>> = BTreeMap::new();
        let root = if found.is_dir() {
            let root = folder::of_model(path)?;
            for folder in ["", "ckpt-0", "ckpt", "ckpt/ckpt-0"].map(|name| root.join(name)) {
                files_in(&folder, &mut files)?;
            }
            root
        } else {
            open_regular(path).map_err(io)?;
            for part in parts_of(path) {
                files.insert(part, Vec::new());
            }
            path.parent().map(Path::to_owned).unwrap_or_default()
        };
        let folders: BTreeSet<PathBuf> =
            files.keys().filter_map(|file| file.parent().map(Path::to_owned)).chain([root.clone()]).collect();
        for folder in folders {
            for path in manifests_in(&folder) {
                of_manifest(&path, &mut files, found.is_dir())?;
            }
        }
        if found.is_dir() {
            of_publication(&root, &mut files);
        }
        for (file, expected) in &mut files {
            expected.extend(of_cache(file).map(|sum| Expected::Sha256(sum, Source::Cache)));
            expected.extend(of_download(file).map(|sum| Expected::Sha256(sum, Source::Download)));
        }
        if files.is_empty() {
            return Err(ModelError::invalid(path.display().to_string(), "files of a model", "none"));
        }
        Ok(Self { files: files.into_iter().collect(), path: path.to_owned() })
    }

    /// Where the manifest would be of what cannot be opened.
    pub(super) fn manifest(&self) -> PathBuf {
        if self.path.is_dir() {
            return self.path.join(manifest::NAME);
        }
        let mut path = open_gguf::unsplit(&self.path).into_os_string();
        path.push(manifest::EXTENSION);
        path.into()
    }
}

/// Files that lie in this folder, but for hidden ones, manifests and what is unfinished.
fn files_in(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<Expected>>) -> Result<(), ModelError> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.filter_map(Result::ok).take(MOST_FILES) {
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let path = entry.path();
        let is_other = text.starts_with('.') || text.ends_with(manifest::EXTENSION) || text.ends_with(".partial");
        // A folder under a tensor's name is one in its place.
        if is_other || (path.is_dir() && !is_tensor(&text)) {
            continue;
        }
        files.insert(path, Vec::new());
    }
    Ok(())
}

/// The file, or all parts of the split one that it is a part of.
fn parts_of(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match open_gguf::part_of(&name) {
        // The text of a name that is none finds no other part; the reader finds them.
        Some(part) if path.file_name().is_some_and(|name| name.to_str().is_some()) => {
            part.all().map(|name| path.with_file_name(name)).collect()
        }
        _ => vec![path.to_owned()],
    }
}

fn manifests_in(folder: &Path) -> Vec<PathBuf> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_manifest = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with('.') && (name.ends_with(manifest::EXTENSION) || name == "SHA256SUMS")
    };
    let mut found: Vec<PathBuf> =
        entries.filter_map(Result::ok).map(|entry| entry.path()).filter(is_manifest).collect();
    found.sort();
    found
}

/// Takes in what a manifest says; of files that were not found too, where a folder is asked for.
fn of_manifest(
    path: &Path,
    files: &mut BTreeMap<PathBuf, Vec<Expected>>,
    also_missing: bool,
) -> Result<(), ModelError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    for (name, checksum) in Manifest::read(path)?.files {
        let file = match name {
            Some(name) => plain(folder, &manifest::path_of(Path::new(""), &name)),
            None => Some(path.with_extension("")),
        };
        let Some(file) = file else { continue };
        let expected = Expected::Sha256(checksum, Source::Manifest(path.to_owned()));
        match files.iter_mut().find(|(known, _)| plain(Path::new(""), known) == plain(Path::new(""), &file)) {
            Some((_, known)) => known.push(expected),
            None if also_missing => {
                files.insert(file, vec![expected]);
            }
            None => {}
        }
    }
    Ok(())
}

/// The path without `.`; `None` for a name that leads out of the folder.
fn plain(folder: &Path, name: &Path) -> Option<PathBuf> {
    use std::path::Component;
    let mut path = folder.to_owned();
    for component in name.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) if folder.as_os_str().is_empty() => path.push(component),
            Component::ParentDir if folder.as_os_str().is_empty() => path.push(component),
            _ => return None,
        }
    }
    Some(path)
}

/// xAI's checkpoint has no configuration beside it: 770 files of known lengths, and one tokenizer.
fn of_publication(root: &Path, files: &mut BTreeMap<PathBuf, Vec<Expected>>) {
    let Some(folder) = published::folder(root) else { return };
    for (name, length) in published::lengths() {
        files.entry(folder.join(name)).or_default().push(Expected::Length(length, Source::Published));
    }
    let (name, length, checksum) = published::TOKENIZER;
    if let Some(expected) = files.get_mut(&root.join(name)) {
        expected.push(Expected::Length(length, Source::Published));
        expected.push(Expected::Sha256(checksum.to_owned(), Source::Published));
    }
}

/// The checksum that is a blob's name: in Hugging Face's cache, and, behind `sha256-`, in Ollama's.
fn of_cache(path: &Path) -> Option<String> {
    let real = fs::canonicalize(path).ok()?;
    let name = real.file_name()?.to_str()?;
    let name = name.strip_prefix("sha256-").unwrap_or(name);
    manifest::is_sha256(name).then(|| name.to_ascii_lowercase())
}

/// The checksum that Hugging Face's downloader noted, in `.cache/huggingface/download/NAME.metadata` of the folder that it filled.
fn of_download(path: &Path) -> Option<String> {
    for folder in path.ancestors().skip(1).take(3) {
        let name = path.strip_prefix(folder).ok()?;
        let mut note = folder.join(".cache/huggingface/download").join(name).into_os_string();
        note.push(".metadata");
        if fs::metadata(&note).is_ok_and(|found| found.is_file() && found.len() <= LONGEST_NOTE) {
            // The revision, then the checksum of what Git LFS has; of other files another kind of one.
            let text = fs::read_to_string(&note).ok()?;
            return text.lines().nth(1).map(str::trim).filter(|sum| manifest::is_sha256(sum)).map(str::to_owned);
        }
    }
    None
}

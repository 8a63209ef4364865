//! Checks the files of a model: lengths, SHA-256 where one is known, and whether the numbers have holes.
//!
//! What is known of a file: the lengths of xAI's files as they were published and the checksum of their tokenizer, every `.sha256` file
//! beside it, its name in a cache of Hugging Face or of Ollama, and what Hugging Face's downloader noted of it. A file of which no
//! checksum is known is read as a model is, tensor by tensor, and is as good as its numbers look. Nothing here changes a file but a
//! manifest that is asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use crate::{
    LayerTensor, Model, ModelError, TensorName,
    checkpoint::{kind::FileKind, storage::open_regular},
    contents::{self, Part, Sum},
    manifest::{self, Manifest},
};

mod known;
#[cfg(test)]
mod tests;

pub use known::Source;
use known::{Expected, Known};

/// How a file was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its checksum is the one that this says.
    Confirmed(Source),
    /// No checksum is known; nothing is wrong with its length, and its numbers have no holes.
    Plausible,
    /// What is wrong with it.
    Damaged(String),
}

/// A file of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Its path.
    pub path: PathBuf,
    /// Its length; 0 when it is missing.
    pub bytes: u64,
    /// Its checksum, where it was computed.
    pub sha256: Option<String>,
    /// How it was found.
    pub state: State,
}

/// What was found of a model.
#[derive(Clone, Debug)]
pub struct Verified {
    /// Its files, sorted.
    pub files: Vec<Checked>,
    /// What is wrong with the model beyond one of its files.
    pub damage: Vec<String>,
    /// Where its manifest is, or would be.
    pub manifest: PathBuf,
    sums: BTreeMap<Part, Sum>,
}

impl Verified {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.damage.is_empty() && self.files.iter().all(|file| !matches!(file.state, State::Damaged(_)))
    }

    /// Whether a checksum was known of every file.
    pub fn is_confirmed(&self) -> bool {
        self.is_good() && self.files.iter().all(|file| matches!(file.state, State::Confirmed(_)))
    }

    /// Writes the manifest of the files as they are.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] when something is wrong with the model; [`ModelError::Io`].
    pub fn write_manifest(&self) -> Result<(), ModelError> {
        let place = || self.manifest.display().to_string();
        if !self.is_good() {
            return Err(ModelError::invalid(place(), "a model that is whole, to write its manifest", "a damaged one"));
        }
        let folder = self.manifest.parent().unwrap_or(Path::new(""));
        let mut files = Vec::new();
        for file in &self.files {
            let name = file.path.strip_prefix(folder).unwrap_or(&file.path).as_os_str().as_encoded_bytes();
            if name.contains(&b'\n') {
                return Err(ModelError::invalid(place(), "names of one line", file.path.display().to_string()));
            }
            if let Some(checksum) = &file.sha256 {
                files.push((Some(name.to_vec()), checksum.clone()));
            }
        }
        Manifest { files, sums: self.sums.clone() }.write(&self.manifest)
    }
}

/// How to verify.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Files, or tensors, that are read at a time.
    pub threads: usize,
    /// Whether a manifest is to be written: then everything is summed, whatever is known.
    pub everything: bool,
}

/// Checks the files of the model at `path`; `progress` is told the bytes done and the bytes in all.
///
/// # Errors
/// [`ModelError`] when there are no files at `path` to check. What is wrong with them is part of the answer.
pub fn verify(path: &Path, options: Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Verified, ModelError> {
    let known = Known::of(path)?;
    let model = Model::open(path);
    let manifest = match &model {
        Ok(model) => model.manifest_path(),
        Err(_) => known.manifest(),
    };
    let mut files: Vec<(Checked, Vec<Expected>)> = known.files.into_iter().map(looked_at).collect();

    // First what has a checksum; of what has none, the numbers tell.
    let hashed: Vec<usize> = (0..files.len())
        .filter(|index| {
            let (file, expected) = &files[*index];
            file.state == State::Plausible && (options.everything || !expected.is_empty())
        })
        .collect();
    let mut total: u64 = hashed.iter().map(|index| files[*index].0.bytes).sum();
    let paths: Vec<PathBuf> = hashed.iter().map(|index| files[*index].0.path.clone()).collect();
    let found = in_parallel(options.threads, &paths, |path, tell| manifest::sha256_of(path, tell), &mut |done| {
        progress(done, total)
    });
    for (index, found) in hashed.into_iter().zip(found) {
        let (file, expected) = &mut files[index];
        match found {
            Err(error) => file.state = State::Damaged(format!("it cannot be read: {error}")),
            Ok(checksum) => {
                file.state = compared(&checksum, expected);
                file.sha256 = Some(checksum);
            }
        }
    }
    let mut files: Vec<Checked> = files.into_iter().map(|(file, _)| file).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));

    let mut damage = Vec::new();
    let mut sums = BTreeMap::new();
    match model {
        Err(error) => damage.push(error.to_string()),
        Ok(model) => {
            let confirmed: BTreeSet<PathBuf> = files
                .iter()
                .filter(|file| matches!(file.state, State::Confirmed(_)))
                .map(|file| file.path.clone())
                .collect();
            let is_confirmed = |name: &TensorName| {
                let paths = model.files_of(name);
                !paths.is_empty() && paths.iter().all(|path| confirmed.contains(path))
            };
            let all = tensors_of(&model);
            let wanted: Vec<TensorName> =
                all.iter().filter(|name| options.everything || !is_confirmed(name)).copied().collect();
            let before = total;
            total += wanted.iter().map(|name| model.tensor_bytes(name)).sum::<u64>();
            let found = in_parallel(
                options.threads,
                &wanted,
                |name, tell| {
                    let summed = contents::sum_of(name, &model);
                    tell(model.tensor_bytes(name));
                    summed
                },
                &mut |done| progress(before + done, total),
            );
            let mut whole = BTreeMap::new();
            for (name, found) in wanted.iter().zip(found) {
                let wrong = match found {
                    Err(error) => Some(error),
                    // The model's own zeros, where its files are as they were published.
                    Ok((sum, hole)) => {
                        whole.insert(*name, sum);
                        hole.filter(|_| !is_confirmed(name))
                    }
                };
                if let Some(wrong) = wrong {
                    blame(&mut files, &mut damage, &model.files_of(name), wrong);
                }
            }
            if options.everything {
                sums = model.parts().into_iter().filter_map(|part| Some((part, sum_of_part(part, &whole)?))).collect();
            }
        }
    }
    Ok(Verified { files, damage, manifest, sums })
}

/// Says what is wrong with a tensor of its file where it has one, else of the model.
fn blame(files: &mut [Checked], damage: &mut Vec<String>, paths: &[PathBuf], wrong: ModelError) {
    let text = wrong.to_string();
    let named = |file: &&mut Checked| paths.contains(&file.path) && text.starts_with(&*file.path.display().to_string());
    match files.iter_mut().find(named) {
        Some(Checked { state: State::Damaged(_), .. }) => {}
        Some(file) => {
            let short = text.strip_prefix(&*file.path.display().to_string()).unwrap_or(&text);
            file.state = State::Damaged(short.trim_start_matches([':', ' ']).to_owned());
        }
        None => damage.push(text),
    }
}

fn tensors_of(model: &Model) -> Vec<TensorName> {
    let mut all = Vec::new();
    for part in model.parts() {
        match part {
            Part::Layer(layer) => all.extend(LayerTensor::ALL.map(|tensor| TensorName::Layer(layer, tensor))),
            Part::Embedding => all.push(TensorName::Embedding),
            Part::Head => all.push(TensorName::Head),
            Part::FinalNorm => all.push(TensorName::FinalNorm),
        }
    }
    all
}

fn sum_of_part(part: Part, tensors: &BTreeMap<TensorName, Sum>) -> Option<Sum> {
    match part {
        Part::Embedding => tensors.get(&TensorName::Embedding).copied(),
        Part::Head => tensors.get(&TensorName::Head).copied(),
        Part::FinalNorm => tensors.get(&TensorName::FinalNorm).copied(),
        Part::Layer(layer) => {
            let sum = |tensor| Some((tensor, *tensors.get(&TensorName::Layer(layer, tensor))?));
            Some(Sum::of_layer(&LayerTensor::ALL.into_iter().map(sum).collect::<Option<Vec<_>>>()?))
        }
    }
}

/// What a file is without reading it through.
fn looked_at((path, expected): (PathBuf, Vec<Expected>)) -> (Checked, Vec<Expected>) {
    let damaged =
        |bytes, reason: String| Checked { path: path.clone(), bytes, sha256: None, state: State::Damaged(reason) };
    let checked = match open_regular(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => damaged(0, "it is missing".to_owned()),
        Err(error) => damaged(0, error.to_string()),
        Ok(file) => {
            let bytes = file.length();
            let lengths = expected.iter().filter_map(|expected| match expected {
                Expected::Length(length, source) if *length != bytes => {
                    Some(format!("it has {bytes} bytes, {length} by {source}"))
                }
                _ => None,
            });
            match FileKind::of(&*file) {
                Err(error) => damaged(bytes, format!("it cannot be read: {error}")),
                Ok(kind @ FileKind::Pointer { .. }) => damaged(bytes, format!("it is {kind}")),
                Ok(_) => match lengths.into_iter().next() {
                    Some(reason) => damaged(bytes, reason),
                    None => Checked { path: path.clone(), bytes, sha256: None, state: State::Plausible },
                },
            }
        }
    };
    let checksums = expected.into_iter().filter(|expected| matches!(expected, Expected::Sha256(..)));
    (checked, checksums.collect())
}

fn compared(checksum: &str, expected: &[Expected]) -> State {
    let mut confirmed = None;
    for expected in expected {
        let Expected::Sha256(wanted, source) = expected else { continue };
        if wanted != checksum {
            return State::Damaged(format!("its SHA-256 is {checksum}, {wanted} by {source}"));
        }
        confirmed.get_or_insert(source);
    }
    confirmed.map_or(State::Plausible, |source| State::Confirmed(source.clone()))
}

/// Does something with each of these, several at a time; `progress` is told the bytes done of all.
fn in_parallel<T: Sync, R: Send>(
    threads: usize,
    tasks: &[T],
    work: impl Fn(&T, &dyn Fn(u64)) -> R + Sync,
    progress: &mut dyn FnMut(u64),
) -> Vec<R> {
    /// What a thread says.
    enum Said<R> {
        Bytes(u64),
        Done(usize, R),
    }
    let next = AtomicUsize::new(0);
    let (say, heard) = mpsc::sync_channel(64);
    let mut results: Vec<Option<R>> = tasks.iter().map(|_| None).collect();
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, tasks.len().max(1)) {
            let (say, next, work) = (say.clone(), &next, &work);
            scope.spawn(move || {
                while let Some((index, task)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    tasks.get(index).map(|task| (index, task))
                } {
                    let done = work(task, &|bytes| drop(say.send(Said::Bytes(bytes))));
                    drop(say.send(Said::Done(index, done)));
                }
            });
        }
        drop(say);
        let mut bytes = 0;
        for said in heard {
            match said {
                Said::Bytes(more) => {
                    bytes += more;
                    progress(bytes);
                }
                Said::Done(index, result) => results[index] = Some(result),
            }
        }
    });
    results.into_iter().flatten().collect()
}

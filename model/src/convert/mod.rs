//! Writes any model that can be opened as a GGUF file, or as the parts of a split one.
//!
//! Tensors are written one after the other in the order of the layers, each in pieces, so that memory does not depend on the
//! model's size. All is written under temporary names, which become the real ones when everything is there. A small journal beside
//! them holds the checksum up to each finished tensor: a conversion that was interrupted, however, verifies what it finds and goes
//! on behind the last tensor that is whole. Which format a tensor gets is decided in `mix.rs`, what becomes of its numbers in
//! `rows.rs`; this file knows the order of things only.

mod header;
mod journal;
mod metadata;
mod mix;
mod output;
mod parts;
mod plan;
mod rows;

use std::{
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

pub use mix::Mix;
pub use plan::{Note, Reason};

use crate::{Model, ModelError, TensorName, TensorShape, WeightSource};
use journal::Journal;
use output::{Checksum, Output};
use parts::{Part, Record};
use plan::{Plan, Tensor};

/// How to convert.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The formats.
    pub mix: Mix,
    /// No file is to be longer than this.
    pub split_max_bytes: Option<u64>,
    /// Threads that compute.
    pub threads: usize,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The files, with length and SHA-256 in hex.
    pub files: Vec<(PathBuf, u64, String)>,
    /// The file with these checksums, as `sha256sum -c` reads them.
    pub checksums: PathBuf,
    /// Bytes that an earlier, interrupted conversion had written.
    pub resumed_bytes: u64,
    /// Tensors that could not be carried over as asked.
    pub notes: Vec<Note>,
    /// Why the file has no tokenizer, if it has none.
    pub no_tokenizer: Option<String>,
}

impl Report {
    /// Lists a tensor some of whose numbers became zero.
    fn note_lost(&mut self, tensor: &Tensor, count: usize) {
        if count > 0 {
            self.notes.push(Note { tensor: tensor.label.clone(), reason: Reason::TooSmall { count } });
        }
    }
}

/// Converts `model` to `out`, or to parts named after it. `progress` is told bytes done and bytes in all.
///
/// # Errors
/// [`ModelError`] when the model is damaged or holds a number that the format cannot, when `out` exists or is no name of a GGUF
/// file, when a tensor alone is longer than a part may be, and when a file cannot be written. What was finished by then is kept, and
/// the same call goes on from there, as long as the model's files are as they were.
pub fn convert(
    model: &Model,
    out: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report, ModelError> {
    parts::check_name(out)?;
    let output = Output::new(out);
    output.check_folder()?;
    let plan = Plan::of(model, options.mix)?;
    let (metadata, no_tokenizer) = metadata::of(model, &plan, options.mix)?;
    let parts = parts::cut(&metadata, &plan.tensors, out, options.split_max_bytes)?;
    let mut journal = Journal::open(&output, &fingerprint(model, &parts)?, &parts)?;
    let total = parts.iter().map(Part::length).sum();
    let mut done = 0;
    let mut report =
        Report { files: Vec::new(), checksums: output.checksums(), resumed_bytes: 0, notes: plan.notes, no_tokenizer };
    for (index, part) in parts.iter().enumerate() {
        let mut file = output.resume(part, journal.found(index), &mut |bytes| progress(done + bytes, total))?;
        report.resumed_bytes += file.written();
        for (tensor, record) in part.tensors.iter().zip(journal.found(index).iter().take(file.finished()).skip(1)) {
            report.note_lost(tensor, record.lost);
        }
        if file.finished() == 0 {
            file.write(&part.header)?;
            journal.record(index, 0, &Record { checksum: file.finish_one(), lost: 0 })?;
        }
        while let Some(tensor) = part.tensors.get(file.finished() - 1) {
            let lost = rows::write(model, tensor, options.threads, &mut |bytes| {
                file.write(bytes)?;
                progress(done + file.written(), total);
                Ok(())
            })?;
            file.pad()?;
            report.note_lost(tensor, lost);
            journal.record(index, file.finished(), &Record { checksum: file.finish_one(), lost })?;
        }
        done += file.written();
        report.files.push((part.path.clone(), file.written(), file.close()?));
    }
    journal.sync()?;
    output.publish(&parts, &report.files)?;
    journal.remove()?;
    Ok(report)
}

/// Whether a conversion to `out` was begun and can be continued.
pub fn is_unfinished(out: &Path) -> bool {
    Output::new(out).journal().is_file()
}

/// Tells one conversion from another: the model's sizes, its files with the times of their last change, the numbers of all norms,
/// which training moves in every layer, and what the files to be written begin with. Times alone can be carried from one file to
/// another, and to hash all the weights would mean to read them twice.
fn fingerprint(model: &Model, parts: &[Part]) -> Result<String, ModelError> {
    let mut sum = Checksum::default();
    sum.add(model.digest().as_bytes());
    for part in parts {
        // The name alone: the folder may be called otherwise the next time.
        sum.add(part.path.file_name().unwrap_or_default().as_encoded_bytes());
        sum.add(&part.header);
    }
    for (file, changed) in model.files_changed()? {
        let since = changed.map(|time| time.duration_since(UNIX_EPOCH).unwrap_or_else(|before| before.duration()));
        sum.add(format!("|{file}:{since:?}").as_bytes());
    }
    for name in TensorName::in_file_order(model.config().num_hidden_layers) {
        if let TensorShape::Vector(_) = name.shape(model.config()) {
            model.vector(&name)?.iter().for_each(|number| sum.add(&number.to_le_bytes()));
        }
    }
    Ok(sum.hex())
}

#[cfg(test)]
mod tests;

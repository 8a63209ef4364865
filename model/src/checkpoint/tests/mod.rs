//! The readers against the goldens, against a tiny model written here, and against every kind of damage.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::*;

pub(crate) mod build;
mod downloads;
pub(crate) mod failing;
mod goldens;
mod hostile_files;
mod hostile_gguf;
mod hostile_pickles;
mod hostile_programs;
mod hostile_safetensors;
pub(crate) mod hugging_face;
mod mutations;
mod published;
mod reads;
pub(crate) mod tiny;

/// A golden model's folder; `None`, said on stderr, where the goldens are not at hand.
fn golden(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let shared = std::env::var_os("GROKPIPE_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let folder = shared.join("golden").join(name);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: no {}", folder.display());
    None
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

/// A file in memory.
struct Memory<'a>(&'a [u8]);

impl ReadAt for Memory<'_> {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let begin = usize::try_from(offset).map_err(io::Error::other)?;
        let piece = begin.checked_add(out.len()).and_then(|end| self.0.get(begin..end));
        out.copy_from_slice(piece.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A refusal says what was expected and what was found, in a message of bearable length without control characters.
#[track_caller]
fn assert_refused(case: &str, message: &str, wanted: &str) {
    assert!(message.contains("expected ") && message.contains("found "), "{case}: {message}");
    assert!(message.contains(wanted), "{case}: {wanted:?} is not in {message:?}");
    assert!(message.len() < 1500 && !message.contains(char::is_control), "{case}: {message:?}");
}

//! Why the header of a file was refused; the same for every format that has one. What could not be read was not refused: the same
//! file may be good a moment later.

use std::{
    io,
    path::Path,
    sync::{Mutex, PoisonError},
};

use super::storage::ReadAt;
use crate::{ModelError, error::printable};

/// Has `parse` read the header of the file at `path`; `refuse` words what is wrong with it.
///
/// # Errors
/// [`ModelError::Io`] if a read failed, else what `refuse` makes of the parser's error.
pub(super) fn parsed<T, E>(
    file: &dyn ReadAt,
    path: &Path,
    parse: impl FnOnce(&dyn ReadAt) -> Result<T, E>,
    refuse: impl FnOnce(E) -> ModelError,
) -> Result<T, ModelError> {
    let file = Watched { file, failed: Mutex::new(None) };
    parse(&file).map_err(|error| match file.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(source) => ModelError::Io { path: path.to_owned(), source },
        None => refuse(error),
    })
}

/// A file that keeps the error of its last read, if that failed.
struct Watched<'a> {
    file: &'a dyn ReadAt,
    failed: Mutex<Option<io::Error>>,
}

impl ReadAt for Watched<'_> {
    fn length(&self) -> u64 {
        self.file.length()
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let read = self.file.read_exact_at(out, offset);
        let copy = read.as_ref().err().map(|error| match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(error.kind(), error.to_string()),
        });
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = copy;
        read
    }
}

/// What was wrong with a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: expected {expected}, found {found}")]
pub struct HeaderError {
    /// Byte, key or tensor.
    pub place: String,
    /// What it should have been.
    pub expected: String,
    /// What it was.
    pub found: String,
}

/// A refusal in bearable length: names and what a parser quotes of them are somebody else's text.
pub(super) fn refuse<T>(
    place: impl Into<String>,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> Result<T, HeaderError> {
    let short = |text: String| printable(text.chars().take(200).collect());
    Err(HeaderError { place: short(place.into()), expected: expected.into(), found: short(found.into()) })
}

//! What can be wrong with a model's files.

use std::path::PathBuf;

use thiserror::Error;

/// Why a model, one of its files, or a text was refused. Messages name what was expected, what was found, and where.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file could not be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file or value is not what it should be.
    #[error("{place}: expected {expected}, found {found}")]
    Invalid {
        /// File, and the place in it.
        place: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
}

impl ModelError {
    /// A [`ModelError::Invalid`] that can be printed: names and values in it are somebody else's text.
    pub(crate) fn invalid(place: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        let found = found.into().chars().take(LONGEST_FOUND).collect();
        Self::Invalid { place: printable(place.into()), expected: printable(expected.into()), found: printable(found) }
    }
}

/// Most characters of what was found: two file names and some words.
const LONGEST_FOUND: usize = 600;

/// The text without control characters, which could take over a terminal.
pub(crate) fn printable(text: String) -> String {
    if text.contains(char::is_control) { text.replace(char::is_control, "?") } else { text }
}

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
    /// Shorthand for [`ModelError::Invalid`].
    pub(crate) fn invalid(place: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Invalid { place: place.into(), expected: expected.into(), found: found.into() }
    }
}

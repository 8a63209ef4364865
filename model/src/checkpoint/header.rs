//! Why the header of a file was refused; the same for every format that has one.

use crate::error::printable;

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

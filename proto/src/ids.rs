//! The identities that coordinator and workers exchange, each as a type of its own, so that two of them cannot be swapped.
//!
//! This file decides which names a worker may have and how a range of layers is printed. It does not know who hands out numbers.

use std::{
    borrow::Borrow,
    fmt,
    ops::{Deref, Range},
    str::FromStr,
    sync::Arc,
};

use crate::{bounds, v1};

/// A number with a meaning: ordered, printed as the number, never mixed with another.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<u64> for $name {
            fn from(number: u64) -> Self {
                Self(number)
            }
        }

        impl From<$name> for u64 {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

number! {
    /// One life of a process: a restarted worker or coordinator has a greater one. 0 stands for none.
    Generation
}
number! {
    /// A plan: each new one counts up. 0 stands for none.
    PlanEpoch
}
number! {
    /// A sequence of tokens with its place in the KV pools, unique within a coordinator's process.
    SequenceId
}
number! {
    /// A micro-batch, unique within a coordinator's process.
    MicroBatchId
}

/// The name of a worker: 1 to [`bounds::NAME_BYTES_MAX`] characters of a-z, 0-9, '.', '_' and '-'. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerName(Arc<str>);

/// A text that cannot be the name of a worker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {}, found {found:?}", WorkerName::EXPECTED)]
pub struct BadName {
    /// The text, cut after 80 characters.
    pub found: String,
}

impl WorkerName {
    /// The rule in words, for messages.
    pub const EXPECTED: &str = "1 to 64 characters of a-z, 0-9, '.', '_' and '-'";

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for WorkerName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        if (1..=bounds::NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(BadName { found: text.chars().take(80).collect() })
        }
    }
}

impl fmt::Display for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// As a text is, so that lists of names read well.
impl fmt::Debug for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Readable wherever text is.
impl Deref for WorkerName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<&str> for WorkerName {
    fn eq(&self, text: &&str) -> bool {
        *self.0 == **text
    }
}

impl PartialEq<str> for WorkerName {
    fn eq(&self, text: &str) -> bool {
        *self.0 == *text
    }
}

/// A map with names as keys is searched by text.
impl Borrow<str> for WorkerName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Layers `start..end`, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerRange {
    start: u32,
    end: u32,
}

/// A range without a layer, or one that ends before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a range of at least one layer, found {start}..{end}")]
pub struct BadRange {
    /// First layer.
    pub start: u32,
    /// The layer after the last one.
    pub end: u32,
}

impl LayerRange {
    /// Layers `start..end`.
    ///
    /// # Errors
    /// [`BadRange`] when there is no layer in it.
    pub fn new(start: u32, end: u32) -> Result<Self, BadRange> {
        if start < end { Ok(Self { start, end }) } else { Err(BadRange { start, end }) }
    }

    /// First layer.
    pub fn start(self) -> u32 {
        self.start
    }

    /// The layer after the last one.
    pub fn end(self) -> u32 {
        self.end
    }

    /// Number of layers, at least 1.
    pub fn count(self) -> u32 {
        self.end - self.start
    }

    /// The same range, longer where `end` lies behind it.
    #[must_use]
    pub fn through(self, end: u32) -> Self {
        Self { start: self.start, end: self.end.max(end) }
    }

    /// The numbers without the noun, for lists and tables: "7", "32–47".
    pub fn numbers(self) -> String {
        match self.count() {
            1 => self.start.to_string(),
            _ => format!("{}–{}", self.start, self.end - 1),
        }
    }

    /// Every layer in turn.
    pub fn iter(self) -> Range<u32> {
        self.start..self.end
    }
}

/// For people, both ends inclusive: "layer 7", "layers 32–47".
impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.count() == 1 { "layer" } else { "layers" }, self.numbers())
    }
}

impl TryFrom<Range<u32>> for LayerRange {
    type Error = BadRange;

    fn try_from(range: Range<u32>) -> Result<Self, BadRange> {
        Self::new(range.start, range.end)
    }
}

impl TryFrom<v1::LayerRange> for LayerRange {
    type Error = BadRange;

    fn try_from(range: v1::LayerRange) -> Result<Self, BadRange> {
        Self::new(range.start, range.end)
    }
}

impl From<LayerRange> for v1::LayerRange {
    fn from(range: LayerRange) -> Self {
        Self { start: range.start, end: range.end }
    }
}

impl From<LayerRange> for Range<u32> {
    fn from(range: LayerRange) -> Self {
        range.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        for name in ["w1", "a", "gpu-box_2.lan", &"x".repeat(64)] {
            assert_eq!(name.parse::<WorkerName>().map(|name| name.to_string()), Ok(name.to_owned()));
        }
        for text in ["", "W1", "w 1", "wörker", "w/1", "w\n", &"x".repeat(65)] {
            assert!(text.parse::<WorkerName>().is_err(), "{text:?}");
        }
        let long = "X".repeat(1000).parse::<WorkerName>().expect_err("too long");
        assert_eq!(long.found.len(), 80);
    }

    #[test]
    fn a_range_has_a_layer_and_is_printed_with_both_ends_inclusive() {
        let print = |start, end| LayerRange::new(start, end).map(|range| range.to_string());
        assert_eq!(print(7, 8), Ok("layer 7".into()));
        assert_eq!(print(32, 48), Ok("layers 32–47".into()));
        assert!(print(3, 3).is_err() && print(4, 3).is_err());
    }
}

//! What the JSON of the snapshot does differently from what serde derives. `build.rs` attaches these functions to the fields.

use serde::{Serialize, Serializer};

use crate::v1::LayerRange;

/// An enum value, which generated messages hold as a number, as its word.
pub(crate) fn word<E, S>(number: &i32, serializer: S) -> Result<S::Ok, S::Error>
where
    E: TryFrom<i32> + Default + Serialize,
    S: Serializer,
{
    E::try_from(*number).unwrap_or_default().serialize(serializer)
}

/// A part that is always an object: without it, every figure in it is null.
pub(crate) fn or_unknown<T, S>(part: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Default + Serialize,
    S: Serializer,
{
    part.unwrap_or_default().serialize(serializer)
}

impl From<LayerRange> for [u32; 2] {
    fn from(range: LayerRange) -> Self {
        [range.start, range.end]
    }
}

//! What is known of a model's contents before they are read: the sums in the manifest beside it.

use std::collections::BTreeMap;

use super::{Part, PartSum, Sum};
use crate::ModelError;

/// The sums that a manifest has, and which part the head is.
#[derive(Clone, Debug)]
pub struct Record {
    head: Part,
    sums: BTreeMap<Part, Sum>,
    /// The manifest, for messages.
    place: String,
}

impl Record {
    /// These sums, said at `place`. The head is the embedding, unless the model has one of its own.
    pub fn new(has_own_head: bool, sums: BTreeMap<Part, Sum>, place: String) -> Self {
        Self { head: if has_own_head { Part::Head } else { Part::Embedding }, sums, place }
    }

    /// Which part the head is.
    pub fn head(&self) -> Part {
        self.head
    }

    /// The sums that are recorded.
    pub fn sums(&self) -> impl Iterator<Item = PartSum> {
        self.sums.iter().map(|(part, sum)| PartSum { part: *part, sum: *sum, confirmed: true })
    }

    /// Holds what was loaded to what is recorded.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] when the two differ.
    pub fn confirm(&self, part: Part, sum: Sum) -> Result<PartSum, ModelError> {
        match self.sums.get(&part) {
            Some(recorded) if *recorded != sum => {
                let expected = format!("{part} with the sum {recorded}, as it says");
                let advice = "the files are not what they were: `grokpipe verify` says which";
                Err(ModelError::invalid(&*self.place, expected, format!("{sum}; {advice}")))
            }
            recorded => Ok(PartSum { part, sum, confirmed: recorded.is_some() }),
        }
    }
}

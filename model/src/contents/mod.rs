//! What the numbers of a model are, summed while they pass by on their way to a device; so two copies of a layer that differ are noticed
//! without reading anything twice.
//!
//! A sum is XXH3 with 128 bits over the stored bytes in their order, then over the scales: a worker speaks of its own files, so that
//! nothing is gained by a sum that cannot be forged, and SHA-256 would take longer than reading does. Equal files give equal sums on
//! every device; another format of the same model gives others.
//!
//! **Zeros.** 4096 zero bytes and more that are not whole rows of a matrix are refused: that is what an unfinished download of the full
//! length has in it, and its tokens would be wrong without a word. Whole rows may be zero, as they are of inputs that training let
//! die, of experts that were cut out, and of pieces of the vocabulary that no text had. A hole that covers whole rows exactly is taken for
//! such, and only a comparison of sums finds it. Where a manifest confirms the sum, the zeros are the model's own.

use std::{fmt, sync::Mutex};

use xxhash_rust::xxh3::Xxh3;

use crate::{LayerTensor, MatrixSource, MatrixSpec, ModelError, TensorName, WeightSource};

mod record;
mod zeros;

pub use record::Record;
use zeros::{Run, Zeros};

/// The sum of some numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sum([u8; Sum::BYTES]);

impl Sum {
    /// Its length.
    pub const BYTES: usize = 16;

    /// The sum that these bytes are; `None` for another number of them.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Of the sum's hexadecimal digits.
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        let digits = Some(text).filter(|text| text.len() == 2 * Self::BYTES && text.is_ascii())?;
        u128::from_str_radix(digits, 16).ok().map(|number| Self(number.to_be_bytes()))
    }

    /// Of the numbers of a vector.
    pub fn of_vector(values: &[f32]) -> Self {
        let mut hash = Xxh3::new();
        floats(&mut hash, values);
        Self::of_hash(&hash)
    }

    /// Of a layer, by the sums of its tensors in any order. One that is not among them counts as one without numbers.
    pub fn of_layer(tensors: &[(LayerTensor, Self)]) -> Self {
        let mut hash = Xxh3::new();
        for tensor in LayerTensor::ALL {
            let sum = tensors.iter().find(|(name, _)| *name == tensor).map(|(_, sum)| sum.0);
            hash.update(&sum.unwrap_or_default());
        }
        Self::of_hash(&hash)
    }

    fn of_hash(hash: &Xxh3) -> Self {
        Self(hash.digest128().to_be_bytes())
    }
}

/// In hex.
impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sum({self})")
    }
}

/// What is summed as one: a layer, or a tensor beside the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// A layer.
    Layer(u32),
    /// The embedding, which is the head of most models.
    Embedding,
    /// A head of its own.
    Head,
    /// The norm before the head.
    FinalNorm,
}

impl Part {
    /// Its number in a model of so many layers: layers first.
    pub fn index(self, layers: u32) -> u32 {
        match self {
            Self::Layer(layer) => layer,
            Self::Embedding => layers,
            Self::Head => layers + 1,
            Self::FinalNorm => layers + 2,
        }
    }

    /// The part of this number in a model of so many layers.
    pub fn from_index(index: u32, layers: u32) -> Option<Self> {
        match index.checked_sub(layers) {
            None => Some(Self::Layer(index)),
            Some(0) => Some(Self::Embedding),
            Some(1) => Some(Self::Head),
            Some(2) => Some(Self::FinalNorm),
            Some(_) => None,
        }
    }

    /// The part that a [`Part`] is written as.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        match text.strip_prefix("layer ") {
            Some(layer) => layer.parse().ok().map(Self::Layer),
            None => [Self::Embedding, Self::Head, Self::FinalNorm].into_iter().find(|part| part.to_string() == text),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer) => write!(f, "layer {layer}"),
            Self::Embedding => f.write_str("embedding"),
            Self::Head => f.write_str("head"),
            Self::FinalNorm => f.write_str("final norm"),
        }
    }
}

/// The sum of a part, by whoever loaded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartSum {
    /// Which part.
    pub part: Part,
    /// Its sum.
    pub sum: Sum,
    /// Whether a manifest beside the model says the same.
    pub confirmed: bool,
}

/// A matrix whose numbers are summed as they are read.
pub struct Summed {
    source: Box<dyn MatrixSource>,
    state: Mutex<State>,
}

struct State {
    numbers: Xxh3,
    /// How far the numbers were summed.
    next: u64,
    zeros: Zeros,
    scales: Option<Sum>,
}

/// Bytes that are read at a time where a reader left some out.
const PIECE: usize = 1 << 20;

impl Summed {
    /// Sums what is read of this matrix.
    pub fn new(source: Box<dyn MatrixSource>) -> Self {
        let state = State { numbers: Xxh3::new(), next: 0, zeros: Zeros::default(), scales: None };
        Self { source, state: Mutex::new(state) }
    }

    /// The sum of the whole matrix, of which what was not read in order is read now, and the zeros in it that are no numbers.
    ///
    /// # Errors
    /// As [`MatrixSource::read`].
    pub fn finish(self) -> Result<(Sum, Option<ModelError>), ModelError> {
        let total = self.spec().weight_bytes();
        let mut piece = Vec::new();
        loop {
            let next = self.state().next;
            if next >= total {
                break;
            }
            piece.resize(PIECE.min((total - next) as usize), 0);
            self.read(next, &mut piece)?;
        }
        if self.state().scales.is_none() {
            self.scales()?;
        }
        let state = self.state();
        let hole = state.zeros.holes(self.spec()).next().map(|found| hole(&*self.source, found));
        let mut hash = state.numbers.clone();
        if let Some(scales) = state.scales {
            hash.update(scales.as_bytes());
        }
        Ok((Sum::of_hash(&hash), hole))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl MatrixSource for Summed {
    fn spec(&self) -> &MatrixSpec {
        self.source.spec()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        self.source.read(offset, out)?;
        let mut state = self.state();
        // What was summed already, or lies behind a gap, is not summed here.
        let known = state.next.checked_sub(offset).and_then(|known| usize::try_from(known).ok());
        if let Some(new) = known.and_then(|known| out.get(known..)) {
            state.numbers.update(new);
            state.zeros.add(new);
            state.next += new.len() as u64;
        }
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        let scales = self.source.scales()?;
        let mut state = self.state();
        if state.scales.is_none() {
            let mut hash = Xxh3::new();
            floats(&mut hash, &scales);
            state.scales = Some(Sum::of_hash(&hash));
        }
        Ok(scales)
    }

    fn place(&self, offset: u64) -> String {
        self.source.place(offset)
    }
}

fn floats(hash: &mut Xxh3, values: &[f32]) {
    let mut bytes = Vec::with_capacity(4 * 1024);
    for values in values.chunks(1024) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        hash.update(&bytes);
    }
}

fn hole(source: &dyn MatrixSource, Run { start, length }: Run) -> ModelError {
    let found = format!("{length} zeros, a hole as an unfinished download leaves: fetch the file again");
    ModelError::invalid(source.place(start), "numbers", found)
}

/// Reads a tensor for its sum alone. Also gives the zeros in it that are no numbers.
///
/// # Errors
/// As [`WeightSource::matrix`] and [`Summed::finish`].
pub fn sum_of(name: &TensorName, weights: &dyn WeightSource) -> Result<(Sum, Option<ModelError>), ModelError> {
    let is_matrix = match name {
        TensorName::Embedding | TensorName::Head => true,
        TensorName::FinalNorm => false,
        TensorName::Layer(_, tensor) => tensor.is_matrix(),
    };
    if is_matrix {
        Summed::new(weights.matrix(name)?).finish()
    } else {
        Ok((Sum::of_vector(&weights.vector(name)?), None))
    }
}

#[cfg(test)]
mod tests;

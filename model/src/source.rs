//! Where weights come from, as the backends see it: one matrix or vector at a time, read in pieces.
//!
//! Decides nothing about files or networks: a checkpoint on disk, generated weights for a benchmark and (later) a peer or an
//! object store all look like this. A reader takes bytes in bounded pieces, so that loading never needs a second copy of a model.

use std::{fmt, ops::Range};

use crate::{BlockType, LayerTensor, ModelError, TensorName, contents::Record};

/// How the numbers of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floats, little-endian.
    F32,
    /// Signed bytes; `w[k, n] = q[k, n] * scale[k / (inputs / groups), n]`, one scale per group of inputs and per output.
    Int8 {
        /// Scale groups along the inputs: 1, or 8 for the row-parallel matrices of the published checkpoint.
        groups: usize,
    },
    /// Blocks along the inputs, as in GGUF files; always with [`Layout::OutIn`].
    Blocks(BlockType),
}

impl Format {
    /// Bytes of so many neighbouring numbers; `None` when they are no whole blocks.
    pub fn row_bytes(self, count: usize) -> Option<usize> {
        self.row_bytes_u64(count as u64).and_then(|bytes| usize::try_from(bytes).ok())
    }

    /// One word for it: `f32`, `int8`, or a type of GGUF files in lower case. Scale groups make no other format.
    pub fn name(self) -> String {
        match self {
            Self::F32 => "f32".to_owned(),
            Self::Int8 { .. } => "int8".to_owned(),
            Self::Blocks(kind) => kind.name().to_lowercase(),
        }
    }

    /// As [`Format::row_bytes`], for numbers out of a file; `None` also when that many bytes cannot be counted.
    pub fn row_bytes_u64(self, count: u64) -> Option<u64> {
        match self {
            Self::F32 => count.checked_mul(4),
            Self::Int8 { .. } => Some(count),
            Self::Blocks(kind) => {
                let (weights, bytes) = (kind.weights() as u64, kind.bytes() as u64);
                if count.is_multiple_of(weights) { (count / weights).checked_mul(bytes) } else { None }
            }
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("F32"),
            Self::Int8 { groups: 1 } => f.write_str("int8, 1 scale group"),
            Self::Int8 { groups } => write!(f, "int8, {groups} scale groups"),
            Self::Blocks(kind) => f.write_str(kind.name()),
        }
    }
}

/// Which index runs fastest in the stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[experts, inputs, outputs]`, outputs fastest: xAI's checkpoint.
    InOut,
    /// `[experts, outputs, inputs]`, inputs fastest: the embedding, used as the head.
    OutIn,
}

/// Shape and storage of a matrix, or of a stack of one matrix an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixSpec {
    /// Name in the checkpoint, for messages.
    pub name: String,
    /// Stacked matrices; 1 for an ordinary one.
    pub experts: usize,
    /// Length of the input vector.
    pub inputs: usize,
    /// Length of the output vector.
    pub outputs: usize,
    /// How the numbers are stored.
    pub format: Format,
    /// Which index runs fastest.
    pub layout: Layout,
}

impl MatrixSpec {
    /// Bytes of the stored numbers, without scales.
    pub fn weight_bytes(&self) -> u64 {
        // A matrix was checked to have rows of whole blocks.
        let row = self.format.row_bytes_u64(self.inputs as u64).unwrap_or_default();
        (self.experts as u64) * (self.outputs as u64) * row
    }

    /// Bytes of the stored numbers and of their scales in f32: what a product reads.
    pub fn stored_bytes(&self) -> u64 {
        self.weight_bytes() + 4 * self.scale_count() as u64
    }

    /// Number of scales beside the numbers: `experts * groups * outputs`, 0 for floats and blocks.
    pub fn scale_count(&self) -> usize {
        match self.format {
            Format::F32 | Format::Blocks(_) => 0,
            Format::Int8 { groups } => self.experts * groups * self.outputs,
        }
    }
}

/// One matrix, readable in pieces. Shapes were checked when it was opened.
pub trait MatrixSource: Send + Sync {
    /// Shape and storage.
    fn spec(&self) -> &MatrixSpec;

    /// Fills `out` with the stored bytes from `offset` on.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the bytes cannot be read.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError>;

    /// The scales as f32, `[experts, groups, outputs]`; empty for floats and for blocks, which hold their own.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the bytes cannot be read; [`ModelError`] naming the tensor when a scale is not finite.
    fn scales(&self) -> Result<Vec<f32>, ModelError>;

    /// Where the stored byte at this offset is, for messages.
    fn place(&self, offset: u64) -> String {
        format!("{}: byte {offset}", self.spec().name)
    }
}

/// All tensors of one model, each opened when asked for and not before.
pub trait WeightSource: Send + Sync {
    /// A matrix by name.
    ///
    /// # Errors
    /// [`ModelError`] when the tensor is missing, damaged, or not of the shape that the configuration asks for.
    fn matrix(&self, name: &TensorName) -> Result<Box<dyn MatrixSource>, ModelError>;

    /// A norm's scale, f32, `[hidden_size]`.
    ///
    /// # Errors
    /// As [`WeightSource::matrix`].
    fn vector(&self, name: &TensorName) -> Result<Vec<f32>, ModelError>;

    /// Rows of the embedding for these ids, f32, `[ids.len(), hidden_size]`, not multiplied by anything. Only these rows are read.
    ///
    /// # Errors
    /// As [`WeightSource::matrix`], and [`ModelError`] when an id is not in the vocabulary.
    fn embedding_rows(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError>;

    /// Stored bytes of these layers, and of the head if `with_head`, without opening them: for plans and progress.
    fn stored_bytes(&self, layers: Range<u32>, with_head: bool) -> u64;

    /// What is known of the contents beforehand. `None` of weights that are not stored anywhere: these are not summed.
    fn record(&self) -> Option<&Record> {
        None
    }
}

/// Shapes and formats of a layer's matrices.
///
/// # Errors
/// As [`WeightSource::matrix`].
pub fn layer_matrices(source: &dyn WeightSource, layer: u32) -> Result<Vec<MatrixSpec>, ModelError> {
    let matrices = LayerTensor::ALL.into_iter().filter(|tensor| tensor.is_matrix());
    matrices.map(|tensor| Ok(source.matrix(&TensorName::Layer(layer, tensor))?.spec().clone())).collect()
}

//! What will be written: every tensor with its GGUF name, its sizes and its format, and what cannot be carried over as asked.
//!
//! Opens each tensor of the source once, so that a model that lacks something is refused before anything is written. Reads scales,
//! no weights.

use std::fmt;

use half::f16;

use super::mix::Mix;
use crate::{
    BlockType, Format, LayerTensor, MatrixSource, Model, ModelError, TensorName, TensorShape, WeightSource,
    checkpoint::gguf_name,
};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) name: TensorName,
    /// Its name in the file.
    pub(super) label: String,
    /// Sizes, fastest first.
    pub(super) sizes: Vec<u64>,
    pub(super) format: Format,
    pub(super) bytes: u64,
}

/// A tensor that could not be carried over as asked, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Its name in the file.
    pub tensor: String,
    /// What became of it.
    pub reason: Reason,
}

/// Why a tensor is not what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its rows are no whole blocks, so that it is written as F16.
    RowsOfParts {
        /// Length of a row.
        row: usize,
        /// The format that it does not fit.
        wanted: BlockType,
    },
    /// Groups of scales end within blocks: those blocks were quantised anew.
    GroupsCutBlocks {
        /// Inputs that share a scale.
        group: usize,
    },
    /// Scales that no half is equal to: their blocks were quantised anew.
    ScalesNotHalves {
        /// How many.
        count: usize,
        /// Of how many.
        of: usize,
    },
    /// Numbers that became zero, since no half is as small as the scale that they would need.
    TooSmall {
        /// How many.
        count: usize,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RowsOfParts { row, wanted } => {
                write!(f, "F16: rows of {row} are no whole {} blocks of {}", wanted.name(), wanted.weights())
            }
            Self::GroupsCutBlocks { group } => {
                write!(f, "quantised anew where scale groups of {group} inputs end within a block of 32")
            }
            Self::ScalesNotHalves { count, of } => {
                write!(f, "quantised anew where a scale is not exact in F16: {count} of {of}")
            }
            Self::TooSmall { count } => write!(f, "{count} numbers became zero, too small for the format"),
        }
    }
}

/// All tensors in the order of the file.
pub(super) struct Plan {
    pub(super) tensors: Vec<Tensor>,
    pub(super) notes: Vec<Note>,
}

impl Plan {
    pub(super) fn of(model: &Model, mix: Mix) -> Result<Self, ModelError> {
        let config = model.config();
        let head = model.has_own_head().then_some(TensorName::Head);
        let layers = (0..config.num_hidden_layers)
            .flat_map(|layer| LayerTensor::ALL.map(|tensor| TensorName::Layer(layer, tensor)));
        let names = [TensorName::Embedding].into_iter().chain(layers).chain([TensorName::FinalNorm]).chain(head);
        let mut plan = Self { tensors: Vec::new(), notes: Vec::new() };
        for name in names {
            let label = gguf_name(&name);
            let mut note = |reason| plan.notes.push(Note { tensor: label.clone(), reason });
            let (sizes, format) = match name.shape(config) {
                TensorShape::Vector(length) => (vec![length as u64], Format::F32),
                TensorShape::Matrix { experts, inputs, outputs, .. } => {
                    let matrix = model.matrix(&name)?;
                    let experts = experts.map(|experts| experts as u64);
                    let sizes = [inputs as u64, outputs as u64].into_iter().chain(experts).collect();
                    (sizes, format_of(&name, &*matrix, mix.format(&name, config, head.is_some()), &mut note)?)
                }
            };
            let bytes = stored_bytes(&sizes, format)
                .ok_or_else(|| ModelError::invalid(&*label, "a tensor that fits a file", format!("{sizes:?}")))?;
            plan.tensors.push(Tensor { name, label, sizes, format, bytes });
        }
        Ok(plan)
    }
}

fn stored_bytes(sizes: &[u64], format: Format) -> Option<u64> {
    let (row, rest) = sizes.split_first()?;
    rest.iter().try_fold(format.row_bytes_u64(*row)?, |bytes, size| bytes.checked_mul(*size))
}

fn format_of(
    name: &TensorName,
    matrix: &dyn MatrixSource,
    wanted: BlockType,
    note: &mut dyn FnMut(Reason),
) -> Result<Format, ModelError> {
    if matches!(name, TensorName::Layer(_, LayerTensor::Router)) {
        return Ok(Format::F32);
    }
    let spec = matrix.spec();
    if !spec.inputs.is_multiple_of(wanted.weights()) {
        note(Reason::RowsOfParts { row: spec.inputs, wanted });
        return Ok(Format::Blocks(BlockType::F16));
    }
    if let (Format::Int8 { groups }, BlockType::Q8_0) = (spec.format, wanted) {
        let group = spec.inputs / groups.max(1);
        if !group.is_multiple_of(wanted.weights()) {
            note(Reason::GroupsCutBlocks { group });
        }
        let scales = matrix.scales()?;
        let count = scales.iter().filter(|scale| exact_half(**scale).is_none()).count();
        if count > 0 {
            note(Reason::ScalesNotHalves { count, of: scales.len() });
        }
    }
    Ok(Format::Blocks(wanted))
}

/// The half that is this very number, if there is one.
pub(super) fn exact_half(number: f32) -> Option<f16> {
    let half = f16::from_f32(number);
    (half.to_f32() == number).then_some(half)
}

//! Rows as 8-bit numbers for products of precision `fast`, and as halves for those of prefill `fast`.
//!
//! They are made when the first product needs them and serve the ones that follow, until the rows are written again.

use super::{
    GpuActivations,
    batch::grow,
    matrix::WORKGROUPS_MAX,
    memory::{GpuBuffer, Memory},
    pipelines::Kernel,
    recorder::Recorder,
    shape, workgroups,
};
use crate::{
    Precision,
    ops::quantise::{self, BLOCK},
};

/// What a product reads of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rounding {
    /// The rows as they are.
    None,
    Bytes,
    Halves,
}

impl Rounding {
    /// What a product of this precision reads.
    pub(super) fn of(precision: Precision) -> Self {
        match precision {
            Precision::Exact => Self::None,
            Precision::Fast => Self::Bytes,
        }
    }
}

/// See the module's page. Buffers grow when a step needs more and are kept.
#[derive(Default)]
pub(super) struct RoundedRows {
    numbers: Option<GpuBuffer>,
    factors: Option<GpuBuffer>,
    /// What was made of the buffer that the recorder watches, and of how many rows.
    made: Option<(Rounding, usize)>,
}

impl RoundedRows {
    /// Rounds the rows of `x` unless that was done.
    pub(super) fn make(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        rounding: Rounding,
        x: &GpuActivations,
        rows: usize,
    ) {
        let is_made = self.made.is_some_and(|(made, of)| made == rounding && rows <= of);
        if rounding == Rounding::None || is_made && recorder.is_as_watched(&x.buffer) {
            return;
        }
        if rows > WORKGROUPS_MAX {
            return recorder.refuse(shape("rows of a product", &format!("at most {WORKGROUPS_MAX}"), rows));
        }
        let (blocks, quads) = (x.width / BLOCK, x.width.div_ceil(4));
        let (what, number_words, factor_words) = match rounding {
            Rounding::Halves => ("inputs as halves", quads * 2, 1),
            _ => ("inputs in 8 bits", blocks * (BLOCK / 4), blocks * 2),
        };
        let numbers = grow(&mut self.numbers, memory, recorder, what, rows * number_words);
        let factors = numbers.and_then(|numbers| {
            grow(&mut self.factors, memory, recorder, what, rows * factor_words).map(|factors| (numbers, factors))
        });
        let (numbers, factors) = match factors {
            Ok(buffers) => buffers,
            Err(error) => return recorder.refuse(error),
        };
        let buffers = [&x.buffer, numbers, factors];
        if rounding == Rounding::Halves {
            let params = quantise::HalvesParams { inputs: x.width as u32 };
            recorder.dispatch(Kernel::QuantiseHalves, &params, &buffers, [rows as u32, 1, 1], 0);
        } else {
            let params = quantise::Params { blocks: blocks as u32 };
            let groups = [workgroups(blocks), rows as u32, 1];
            recorder.dispatch(Kernel::Quantise, &params, &buffers, groups, 0);
        }
        recorder.watch(&x.buffer);
        self.made = Some((rounding, rows));
    }

    /// The bindings of a product's inputs: numbers and factors, or the rows as they are.
    pub(super) fn bindings<'a>(&'a self, rounding: Rounding, x: &'a GpuActivations) -> [&'a GpuBuffer; 2] {
        match (rounding, &self.numbers, &self.factors) {
            (Rounding::Bytes | Rounding::Halves, Some(numbers), Some(factors)) => [numbers, factors],
            _ => [&x.buffer, &x.buffer],
        }
    }
}

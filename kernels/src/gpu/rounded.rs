//! Rows as 8-bit numbers, for products of precision `fast`.
//!
//! They are made when the first product needs them and serve the ones that follow, until the rows are written again.

use super::{
    GpuActivations,
    batch::grow,
    matrix::{GpuMatrix, WORKGROUPS_MAX},
    memory::{GpuBuffer, Memory},
    pipelines::Kernel,
    recorder::Recorder,
    shape, workgroups,
};
use crate::{
    Precision,
    ops::quantise::{self, BLOCK},
};

/// See the module's page. Buffers grow when a step needs more and are kept.
#[derive(Default)]
pub(super) struct RoundedRows {
    numbers: Option<GpuBuffer>,
    factors: Option<GpuBuffer>,
    /// Rows of the buffer that the recorder watches.
    rows: usize,
}

impl RoundedRows {
    /// Rounds the rows of `x` if products with `matrix` need that and it was not done.
    pub(super) fn make(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        precision: Precision,
        matrix: &GpuMatrix,
        x: &GpuActivations,
        rows: usize,
    ) {
        let is_done = rows <= self.rows && recorder.is_as_watched(&x.buffer);
        if matrix.shape.precision(precision) == Precision::Exact || is_done {
            return;
        }
        if rows > WORKGROUPS_MAX {
            return recorder.refuse(shape("rows of a product", &format!("at most {WORKGROUPS_MAX}"), rows));
        }
        let blocks = x.width / BLOCK;
        let what = "inputs in 8 bits";
        let numbers = grow(&mut self.numbers, memory, recorder, what, rows * blocks * (BLOCK / 4));
        let factors = numbers.and_then(|numbers| {
            grow(&mut self.factors, memory, recorder, what, rows * blocks * 2).map(|factors| (numbers, factors))
        });
        let (numbers, factors) = match factors {
            Ok(buffers) => buffers,
            Err(error) => return recorder.refuse(error),
        };
        let params = quantise::Params { blocks: blocks as u32 };
        let groups = [workgroups(blocks), rows as u32, 1];
        recorder.dispatch(Kernel::Quantise, &params, &[&x.buffer, numbers, factors], groups, 0);
        recorder.watch(&x.buffer);
        self.rows = rows;
    }

    /// The bindings of a product's inputs: the numbers, or the rows as they are.
    pub(super) fn bindings<'a>(
        &'a self,
        precision: Precision,
        matrix: &GpuMatrix,
        x: &'a GpuActivations,
    ) -> [&'a GpuBuffer; 2] {
        match (matrix.shape.precision(precision), &self.numbers, &self.factors) {
            (Precision::Fast, Some(numbers), Some(factors)) => [numbers, factors],
            _ => [&x.buffer, &x.buffer],
        }
    }
}

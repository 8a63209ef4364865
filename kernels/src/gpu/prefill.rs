//! Prefill `fast`: products of many rows with cooperative matrices. Whether they work on a device, and what a matrix needs for them.
//!
//! The one idea: rows and weights are rounded to halves, their products are added in f32. Both operands lose 2^-11 of themselves,
//! and the order of a sum is the device's, so a row's bits may depend on the other rows of its step. Decides by which power of two the
//! weights of a matrix are multiplied so that halves can hold them.

use grokpipe_model::{Format, Layout, MatrixSource, MatrixSpec, ModelError};

use super::{
    GpuActivations, GpuBackend, GpuMatrix,
    cooperative::{Cooperative, PLACES, ROWS_MIN},
    matrix::LANES,
    memory::words,
    pipelines::{Kernel, OF_PREFILL_FAST},
    rounded::Rounding,
    shaders::{CooperativeMatmulParams, LargestParams},
};
use crate::{Backend, KV_BLOCK_TOKENS, KernelError, batch::single_tokens, ops::matmul};

/// What a fingerprint says of kernels and their version, before its first space.
const PREFILL_FAST: &str = "+prefill-fast/1 ";
/// Exponent of the largest weight, and of a row's largest input, as a half: one less than halves can have.
const EXPONENT: u32 = 14;

/// The power of two that brings the magnitude of these bits to 2^14..2^15; 1 for what is not finite, which stays so as a half. Both it
/// and its inverse are normal numbers.
fn power_for(bits: u32) -> f32 {
    match bits >> 23 {
        255 => 1.0,
        exponent => f32::from_bits((2 * 127 + EXPONENT - exponent).clamp(1, 253) << 23),
    }
}

impl GpuBackend {
    /// Takes cooperative matrices into use, if they do on this device what the kernels need. An adapter says that it has them, but not
    /// that its driver compiles these kernels or loads matrices as they expect, and a wrong product would show nowhere.
    ///
    /// # Errors
    /// Those of allocations; [`KernelError::DeviceLost`].
    pub(super) fn try_cooperative(&mut self, cooperative: Cooperative) -> Result<(), KernelError> {
        for inputs in [96, 100] {
            if let Some(reason) = self.refusal_of_cooperative(cooperative, inputs)? {
                tracing::warn!(device = %self.info.name, reason, "prefill is not fast: the device does not multiply cooperative matrices");
                self.cooperative = None;
                return Ok(());
            }
        }
        self.cooperative = Some(cooperative);
        self.info.fingerprint = self.info.fingerprint.replacen(" ", PREFILL_FAST, 1);
        self.info.invariant_below = Some(ROWS_MIN);
        Ok(())
    }

    /// Why cooperative matrices cannot be used: the driver refuses a kernel, or products of whole numbers, which both halves and sums in
    /// f32 hold exactly, are not what they should be.
    fn refusal_of_cooperative(
        &mut self,
        cooperative: Cooperative,
        inputs: usize,
    ) -> Result<Option<String>, KernelError> {
        const ROWS: usize = 65;
        const OUTPUTS: usize = 70;
        // Not yet, so that what the driver refuses is no failure of the device.
        self.cooperative = None;
        let mut matrix = self.load_matrix(&WholeNumbers::new(inputs, OUTPUTS), &mut |_| ())?;
        let variant = Self::cooperative_variant(&matrix, cooperative);
        let kernels = [
            Kernel::MatmulCooperative(variant),
            Kernel::GatedGeluCooperative(variant),
            Kernel::ExpertDownCooperative(variant),
            Kernel::LargestWeight(matrix.shape.held),
        ];
        for kernel in kernels.into_iter().chain(OF_PREFILL_FAST) {
            if let Some(reason) = self.recorder.refusal(kernel)? {
                return Ok(Some(format!("its driver refuses {kernel:?}: {reason}")));
            }
        }
        let batch = single_tokens(ROWS);
        let mut kv = self.kv_pool(1, ROWS * KV_BLOCK_TOKENS, 1)?;
        let (mut x, mut out) = (self.activations(ROWS, inputs)?, self.activations(ROWS, OUTPUTS)?);
        let values: Vec<f32> = (0..ROWS * inputs).map(|i| (i * i % 17) as f32 - 8.0).collect();
        self.cooperative = Some(cooperative);
        self.prepare_cooperative(&mut matrix)?;
        self.begin(&batch, &mut kv)?;
        self.write(&values, &mut x)?;
        self.matmul(&x, &matrix, 1.0, &mut out);
        let found = self.finish(&[(&out, ROWS)])?;
        let product =
            |row: &[f32], n| (0..).zip(row).map(|(k, x)| x * WholeNumbers::at(k * OUTPUTS as u64 + n)).sum::<f32>();
        let want = values.chunks(inputs).flat_map(|row| (0..OUTPUTS as u64).map(move |n| product(row, n)));
        let right = found.iter().flatten().copied().eq(want);
        Ok((!right).then(|| "products are not what they should be".to_owned()))
    }

    /// Prepares a loaded matrix: finds the power of two of its weights and compiles its kernels.
    ///
    /// # Errors
    /// Those of an allocation and of compiling; [`KernelError::DeviceLost`].
    pub(super) fn prepare_cooperative(&mut self, matrix: &mut GpuMatrix) -> Result<(), KernelError> {
        let Some(cooperative) = self.cooperative else { return Ok(()) };
        let variant = Self::cooperative_variant(matrix, cooperative);
        if matrix.shape.experts == 1 {
            self.recorder.compile(Kernel::MatmulCooperative(variant))?;
        } else {
            self.recorder.compile(Kernel::GatedGeluCooperative(variant))?;
            self.recorder.compile(Kernel::ExpertDownCooperative(variant))?;
        }
        self.recorder.begin(true);
        let largest = self.memory.allocate("the largest weight", words(&[1]))?;
        for shard in &matrix.shards {
            let params = LargestParams {
                inputs: matrix.shape.inputs as u32,
                groups: matrix.shape.groups as u32,
                blocks: shard.blocks.len() as u32,
            };
            let buffers = [&shard.chunks, shard.scales(), &largest];
            let groups = [shard.blocks.len() as u32, shard.experts.len() as u32, 1];
            let work = (shard.blocks.len() * LANES * shard.experts.len() * matrix.shape.inputs) as u64;
            self.recorder.dispatch(Kernel::LargestWeight(matrix.shape.held), &params, &buffers, groups, work);
        }
        let read = self.recorder.read_back::<u32>(&[(&largest, 1)])?;
        self.recorder.forget_bind_groups();
        matrix.factor = power_for(read[0][0]);
        Ok(())
    }

    pub(super) fn cooperative_matmul(
        &mut self,
        cooperative: Cooperative,
        x: &GpuActivations,
        w: &GpuMatrix,
        op: matmul::Params,
        out: &GpuActivations,
    ) {
        let kernel = Kernel::MatmulCooperative(Self::cooperative_variant(w, cooperative));
        let rows = self.rows;
        self.rounded.make(&mut self.memory, &mut self.recorder, Rounding::Halves, x, rows);
        let [halves, factors] = self.rounded.bindings(Rounding::Halves, x);
        for shard in &w.shards {
            let column_begin = (shard.blocks.start * LANES) as u32;
            let params = CooperativeMatmulParams { op, rows: rows as u32, column_begin, weights_factor: w.factor };
            let groups = [rows.div_ceil(PLACES) as u32, shard.blocks.len() as u32, 1];
            let work = (rows * w.shape.inputs) as u64 * (shard.blocks.len() * LANES) as u64;
            let buffers = [halves, factors, &shard.chunks, shard.scales(), &out.buffer];
            self.recorder.dispatch(kernel, &params, &buffers, groups, work);
        }
    }
}

/// A matrix of whole numbers.
pub(super) struct WholeNumbers(MatrixSpec);

impl WholeNumbers {
    pub(super) fn new(inputs: usize, outputs: usize) -> Self {
        let (name, format) = ("a trial of cooperative matrices".to_owned(), Format::Int8 { groups: 1 });
        Self(MatrixSpec { name, experts: 1, inputs, outputs, format, layout: Layout::InOut })
    }

    /// The number at this place.
    fn at(place: u64) -> f32 {
        (place * place % 251) as f32 - 125.0
    }
}

impl MatrixSource for WholeNumbers {
    fn spec(&self) -> &MatrixSpec {
        &self.0
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        for (byte, place) in out.iter_mut().zip(offset..) {
            *byte = Self::at(place) as i8 as u8;
        }
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0; self.0.outputs])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_of_two_brings_the_largest_weight_into_the_range_of_halves() {
        for largest in [1.0f32, 1.999, 0.013, 65_504.0, 3.0e38, 1.0e-30] {
            let scaled = largest * power_for(largest.to_bits());
            assert!((16_384.0..32_768.0).contains(&scaled), "{largest}: {scaled}");
        }
        for largest in [0.0, 1.0e-42] {
            let power = power_for(f32::to_bits(largest));
            assert!(power.is_normal() && power.recip().is_normal() && power * largest < 32_768.0, "{power}");
        }
        assert_eq!([f32::INFINITY, f32::NAN].map(|largest| power_for(largest.to_bits())), [1.0; 2]);
    }
}

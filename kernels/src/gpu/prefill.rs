//! Prefill `fast`: products of many rows with cooperative matrices, and what a matrix needs for them.
//!
//! The one idea: rows and weights are rounded to halves, their products are added in f32. Both operands lose 2^-11 of themselves,
//! and the order of a sum is the device's, so a row's bits may depend on the other rows of its step and on which are wanted. Decides by
//! which power of two the weights of a matrix are multiplied so that halves can hold them. Every matrix has its usual kernels too, so
//! that a device can give cooperative matrices up as long as it loads; what it says of itself follows.

use super::{
    GpuActivations, GpuBackend, GpuMatrix,
    cooperative::{Cooperative, PLACES, ROWS_MIN},
    matrix::LANES,
    memory::words,
    pipelines::{Kernel, OF_PREFILL_FAST},
    rounded::Rounding,
    shaders::{CooperativeMatmulParams, LargestParams},
};
use crate::{KernelError, device::PREFILL_FAST, ops::matmul};

/// Version of the kernels' arithmetic, for fingerprints.
const VERSION: u32 = 1;
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
    /// Takes cooperative matrices into use, or out of it.
    pub(super) fn use_cooperative(&mut self, cooperative: Option<Cooperative>) {
        let kernel_set = format!("{PREFILL_FAST}{VERSION} ");
        let without = self.info.fingerprint.replacen(&kernel_set, " ", 1);
        self.info.fingerprint = if cooperative.is_some() { without.replacen(' ', &kernel_set, 1) } else { without };
        self.info.invariant_below = cooperative.map(|_| ROWS_MIN);
        self.cooperative = cooperative;
    }

    /// Leaves all products to the usual kernels from now on.
    pub(super) fn give_up_cooperative(&mut self, reason: &str) {
        tracing::warn!(device = %self.info.name, reason, "prefill is not fast: the device does not multiply cooperative matrices");
        self.use_cooperative(None);
    }

    /// Prepares a loaded matrix: compiles the kernels for what is held so and finds the power of two of its weights. Gives
    /// cooperative matrices up where the driver refuses one of the kernels.
    ///
    /// # Errors
    /// Those of an allocation; [`KernelError::DeviceLost`].
    pub(super) fn prepare_cooperative(&mut self, matrix: &mut GpuMatrix) -> Result<(), KernelError> {
        let Some(cooperative) = self.cooperative else { return Ok(()) };
        let variant = Self::cooperative_variant(matrix, cooperative);
        // Those of experts and of a single matrix: a device that multiplied one that is held so before it joins has seen all.
        for kernel in variant.kernels().into_iter().chain(OF_PREFILL_FAST) {
            if let Some(reason) = self.recorder.refusal(kernel)? {
                self.give_up_cooperative(&format!("its driver refuses {kernel:?}: {reason}"));
                return Ok(());
            }
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
            let params = |block_begin| CooperativeMatmulParams {
                op,
                rows: rows as u32,
                column_begin,
                block_begin,
                weights_factor: w.factor,
            };
            let groups = [rows.div_ceil(PLACES) as u32, shard.blocks.len() as u32, 1];
            let work = (rows * w.shape.inputs) as u64 * (shard.blocks.len() * LANES) as u64;
            let buffers = [halves, factors, &shard.chunks, shard.scales(), &out.buffer];
            self.recorder.dispatch_blocks(kernel, params, &buffers, groups, work);
        }
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

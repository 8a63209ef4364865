//! Prefill `fast`: products of many rows with cooperative matrices, which hardware has units of its own for (tensor cores).
//!
//! Decides whether an adapter has what the kernels need, and by which power of two the weights of a matrix are multiplied so that
//! halves can hold them. The one idea: rows and weights are rounded to halves, their products are added in f32. Both operands lose
//! 2^-11 of themselves, and the order of a sum is the device's, so a row's bits may depend on the other rows of its step.

use grokpipe_model::{Format, Layout, MatrixSource, MatrixSpec, ModelError};
use wgpu::{Adapter, AdapterInfo, CooperativeMatrixProperties, CooperativeScalarType, Features, Limits};

use super::{
    GpuActivations, GpuBackend, GpuMatrix, GpuSelection,
    experts::{EXPERTS_MAX, tiles, work},
    matrix::{LANES, Shard},
    memory::{GpuBuffer, words},
    pipelines::{CooperativeVariant, Kernel, OF_PREFILL_FAST},
    rounded::Rounding,
    shaders::{CooperativeExpertParams, CooperativeMatmulParams, LargestParams},
};
use crate::{
    Backend, Batch, KV_BLOCK_TOKENS, KernelError, Row,
    ops::{expert_down, gated_gelu, matmul},
};

/// Rows from which a step's products are made with cooperative matrices. These have room for 64 rows: with fewer than half of
/// them, more than half of the work would be for nothing.
pub(super) const ROWS_MIN: usize = 32;
/// Rows, or pairs, of a workgroup.
pub(super) const PLACES: usize = 64;
/// Memory of a workgroup: places, staged rows and weights, and results.
const WORKGROUP_BYTES: u32 = 4 * 64 + 2 * 64 * 10 * 8 + 4 * 1024;
/// What a fingerprint says of kernels and their version, before its first space.
const PREFILL_FAST: &str = "+prefill-fast/1 ";
/// Exponent of the largest weight, and of a row's largest input, as a half: one less than halves can have.
const EXPONENT: u32 = 14;

/// Rows and columns of a cooperative matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Edge {
    Eight,
    Sixteen,
}

impl Edge {
    fn length(self) -> u32 {
        match self {
            Self::Eight => 8,
            Self::Sixteen => 16,
        }
    }

    /// Subgroups that a workgroup has work for, each with two by two tiles.
    fn units(self) -> u32 {
        (PLACES as u32 / (2 * self.length())).pow(2)
    }
}

/// How a device multiplies cooperative matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cooperative {
    pub(super) edge: Edge,
    /// Threads of a workgroup: as many subgroups of the smallest size as there is work for, or as fit.
    pub(super) threads: u32,
}

impl Cooperative {
    /// Features that the kernels need.
    pub(super) const FEATURES: Features =
        Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SHADER_F16).union(Features::SUBGROUP);

    /// What an adapter offers to a device of these limits; `None` when the portable kernels have to do. Only by Vulkan: what naga 30
    /// makes of these kernels for Metal loads from arrays of scalars alone.
    pub(super) fn of(adapter: &Adapter, info: &AdapterInfo, limits: &Limits) -> Option<Self> {
        let fits = info.backend == wgpu::Backend::Vulkan
            && adapter.features().contains(Self::FEATURES)
            && WORKGROUP_BYTES <= limits.max_compute_workgroup_storage_size;
        let subgroups = [info.subgroup_min_size, info.subgroup_max_size];
        let most = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
        Self::choose(&adapter.cooperative_matrix_properties(), subgroups, most).filter(|_| fits)
    }

    /// The larger of the matrices that there are kernels for. A workgroup has to be whole subgroups, of whatever size between the
    /// smallest and the largest the driver takes.
    fn choose(offered: &[CooperativeMatrixProperties], [smallest, largest]: [u32; 2], most: u32) -> Option<Self> {
        [Edge::Sixteen, Edge::Eight].into_iter().find_map(|edge| {
            let is_there = offered.iter().any(|matrices| {
                [matrices.m_size, matrices.n_size, matrices.k_size] == [edge.length(); 3]
                    && (matrices.ab_type, matrices.cr_type) == (CooperativeScalarType::F16, CooperativeScalarType::F32)
            });
            // With fewer subgroups than there is work for, each does several units.
            let threads = edge.units().checked_mul(smallest)?.min(most);
            let whole = threads > 0
                && [smallest, largest].iter().all(|size| size.is_power_of_two() && threads.is_multiple_of(*size));
            (is_there && whole).then_some(Self { edge, threads })
        })
    }
}

/// The power of two that brings the magnitude of these bits to 2^14..2^15; 1 for what is not finite, which stays so as a half. Both it
/// and its inverse are normal numbers.
fn power_for(bits: u32) -> f32 {
    match bits >> 23 {
        255 => 1.0,
        exponent => f32::from_bits((2 * 127 + EXPONENT - exponent).clamp(1, 253) << 23),
    }
}

impl GpuBackend {
    /// How this step's products use cooperative matrices; `None` for few rows and where they are not in use.
    pub(super) fn cooperative(&self) -> Option<Cooperative> {
        self.cooperative.filter(|_| self.rows >= ROWS_MIN)
    }

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
    /// f32 hold exactly, are not those of the portable kernel.
    fn refusal_of_cooperative(
        &mut self,
        cooperative: Cooperative,
        inputs: usize,
    ) -> Result<Option<String>, KernelError> {
        const ROWS: usize = 65;
        const OUTPUTS: usize = 70;
        self.cooperative = None;
        let mut matrix = self.load_matrix(&WholeNumbers::new(inputs, OUTPUTS), &mut |_| ())?;
        let variant = CooperativeVariant::of(&matrix, cooperative);
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
        let row = |row| Row { position: 0, table_offset: row, attended: true };
        let batch = Batch { rows: (0..ROWS as u32).map(row).collect(), block_tables: (0..ROWS as u32).collect() };
        let mut kv = self.kv_pool(1, ROWS * KV_BLOCK_TOKENS, 1)?;
        let (mut x, mut out) = (self.activations(ROWS, inputs)?, self.activations(ROWS, OUTPUTS)?);
        let values: Vec<f32> = (0..ROWS * inputs).map(|i| (i * i % 17) as f32 - 8.0).collect();
        let mut product = |backend: &mut Self, matrix: &GpuMatrix| {
            backend.begin(&batch, &mut kv)?;
            backend.write(&values, &mut x)?;
            backend.matmul(&x, matrix, 1.0, &mut out);
            backend.finish(&[(&out, ROWS)])
        };
        let want = product(self, &matrix)?;
        self.cooperative = Some(cooperative);
        self.prepare_cooperative(&mut matrix)?;
        let found = product(self, &matrix)?;
        Ok((found != want).then(|| "products are not what they should be".to_owned()))
    }

    /// Prepares a loaded matrix: finds the power of two of its weights and compiles its kernels.
    ///
    /// # Errors
    /// Those of an allocation and of compiling; [`KernelError::DeviceLost`].
    pub(super) fn prepare_cooperative(&mut self, matrix: &mut GpuMatrix) -> Result<(), KernelError> {
        let Some(cooperative) = self.cooperative else { return Ok(()) };
        let variant = CooperativeVariant::of(matrix, cooperative);
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
        let kernel = Kernel::MatmulCooperative(CooperativeVariant::of(w, cooperative));
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

    pub(super) fn cooperative_gate_up(
        &mut self,
        cooperative: Cooperative,
        x: &GpuActivations,
        selection: &GpuSelection,
        [gate, up]: [&GpuMatrix; 2],
        op: gated_gelu::Params,
        out: &GpuActivations,
    ) {
        // A kernel knows one way to hold weights, and shards are cut by it.
        let alike = gate.shape == up.shape;
        let variant = CooperativeVariant::of(up, cooperative);
        let (kernel, gates) = match alike {
            true => (Kernel::GatedGeluCooperative(variant), gate),
            false => (Kernel::GatedGeluCooperativeOfGate(variant), up),
        };
        if !alike {
            self.cooperative_products(cooperative, x, selection, selection.chosen, gate, &out.buffer);
        }
        let (rows, pairs) = (self.rows, self.rows * selection.chosen);
        self.rounded.make(&mut self.memory, &mut self.recorder, Rounding::Halves, x, rows);
        let [halves, factors] = self.rounded.bindings(Rounding::Halves, x);
        let op = gated_gelu::Params { groups: up.shape.groups as u32, ..op };
        for (gates, ups) in gates.shards.iter().zip(&up.shards) {
            let params = expert_params(op, selection.chosen, ups, [gate.factor, up.factor]);
            let (choice, out) = (&selection.tiles, &out.buffer);
            let buffers = [halves, factors, choice, &gates.chunks, gates.scales(), &ups.chunks, ups.scales(), out];
            let groups = expert_groups(pairs, up, ups);
            let work = if alike { 2 } else { 1 } * work(pairs, up, ups);
            self.recorder.dispatch(kernel, &params.to_words(), &buffers, groups, work);
        }
    }

    /// `out[p] = x[p / pairs_a_row] @ matrix[e]` for each pair.
    pub(super) fn cooperative_products(
        &mut self,
        cooperative: Cooperative,
        x: &GpuActivations,
        selection: &GpuSelection,
        pairs_a_row: usize,
        matrix: &GpuMatrix,
        out: &GpuBuffer,
    ) {
        let kernel = Kernel::ExpertDownCooperative(CooperativeVariant::of(matrix, cooperative));
        let pairs = self.rows * selection.chosen;
        self.rounded.make(&mut self.memory, &mut self.recorder, Rounding::Halves, x, pairs / pairs_a_row);
        let [halves, factors] = self.rounded.bindings(Rounding::Halves, x);
        let op = expert_down::Params {
            inputs: matrix.shape.inputs as u32,
            outputs: matrix.shape.outputs as u32,
            groups: matrix.shape.groups as u32,
            chosen: selection.chosen as u32,
        };
        for shard in &matrix.shards {
            let params = expert_params(op, pairs_a_row, shard, [matrix.factor; 2]);
            let buffers = [halves, factors, &selection.tiles, &shard.chunks, shard.scales(), out];
            let groups = expert_groups(pairs, matrix, shard);
            self.recorder.dispatch(kernel, &params.to_words(), &buffers, groups, work(pairs, matrix, shard));
        }
    }
}

fn expert_params<P>(op: P, pairs_a_row: usize, shard: &Shard, factors: [f32; 2]) -> CooperativeExpertParams<P> {
    CooperativeExpertParams {
        op,
        expert_begin: shard.experts.start as u32,
        expert_count: shard.experts.len() as u32,
        column_begin: (shard.blocks.start * LANES) as u32,
        blocks: shard.blocks.len() as u32,
        pairs_a_row: pairs_a_row as u32,
        factors,
    }
}

fn expert_groups(pairs: usize, matrix: &GpuMatrix, shard: &Shard) -> [u32; 3] {
    [tiles(pairs, matrix.shape.experts.min(EXPERTS_MAX), PLACES) as u32, shard.blocks.len() as u32, 1]
}

/// A matrix of whole numbers.
pub(super) struct WholeNumbers(MatrixSpec);

impl WholeNumbers {
    pub(super) fn new(inputs: usize, outputs: usize) -> Self {
        let (name, format) = ("a trial of cooperative matrices".to_owned(), Format::Int8 { groups: 1 });
        Self(MatrixSpec { name, experts: 1, inputs, outputs, format, layout: Layout::InOut })
    }
}

impl MatrixSource for WholeNumbers {
    fn spec(&self) -> &MatrixSpec {
        &self.0
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        for (byte, place) in out.iter_mut().zip(offset..) {
            *byte = (place * place % 251) as u8;
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

    fn matrices(
        edge: u32,
        ab_type: CooperativeScalarType,
        cr_type: CooperativeScalarType,
    ) -> CooperativeMatrixProperties {
        let saturating_accumulation = false;
        CooperativeMatrixProperties {
            m_size: edge,
            n_size: edge,
            k_size: edge,
            ab_type,
            cr_type,
            saturating_accumulation,
        }
    }

    #[test]
    fn the_larger_matrices_with_sums_in_f32_are_taken() {
        use CooperativeScalarType::{F16, F32};
        let [small, large] = [8, 16].map(|edge| matrices(edge, F16, F32));
        let chosen = |offered: &[_], subgroups| Cooperative::choose(offered, subgroups, 256);
        let of = |edge, threads| Some(Cooperative { edge, threads });
        assert_eq!(chosen(&[small, large], [32, 32]), of(Edge::Sixteen, 128));
        assert_eq!(chosen(&[small], [8, 8]), of(Edge::Eight, 128));
        // Half as many subgroups as there is work for: more threads a workgroup does not have.
        assert_eq!(chosen(&[small], [32, 32]), of(Edge::Eight, 256));
        // Two subgroups of 64 then have two units each.
        assert_eq!(chosen(&[large], [32, 64]), of(Edge::Sixteen, 128));
        // Three numbers that cannot be had: sums in halves, products of f32, a workgroup that is no whole subgroup.
        assert_eq!(chosen(&[matrices(16, F16, F16), matrices(8, F32, F32)], [32, 32]), None);
        assert_eq!(chosen(&[large], [4, 128]), None);
        let uneven = CooperativeMatrixProperties { k_size: 8, ..large };
        assert_eq!(chosen(&[uneven], [32, 32]), None);
    }

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

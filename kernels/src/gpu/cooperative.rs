//! Cooperative matrices, which hardware has units of its own for (tensor cores): what prefill `fast` needs of an adapter.
//!
//! Decides whether an adapter has it, and how a workgroup is laid out for it. Believes what the adapter says; `trial.rs` does not.

use wgpu::{Adapter, AdapterInfo, CooperativeMatrixProperties, CooperativeScalarType, Features, Limits};

/// Rows from which a step's products are made with cooperative matrices. These have room for 64 rows: with fewer than half of
/// them, more than half of the work would be for nothing.
pub(super) const ROWS_MIN: usize = 32;
/// Rows, or pairs, of a workgroup.
pub(super) const PLACES: usize = 64;
/// Memory of a workgroup: places, staged rows and weights, and results.
const WORKGROUP_BYTES: u32 = 4 * 64 + 2 * 64 * 10 * 8 + 4 * 1024;
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
}

//! The shaders, and the uniform parameters that each is given.
//!
//! A uniform begins with the operation's own `Params`, which the reference and the CPU backend share; what a dispatch needs
//! besides (rows, shard, offsets) follows.

use bytemuck::{Pod, Zeroable};

use super::cooperative::{Cooperative, Edge};
use crate::{
    Precision,
    ops::{attention, expert_down, gated_gelu, gather, matmul, moe_router, quantise, rms_norm, rope},
};

/// A shader's source and how its bindings are used. Its entry point has its name.
#[derive(Clone, Copy, Debug)]
pub struct Shader {
    /// Name of file, entry point and label.
    pub name: &'static str,
    text: &'static str,
    joined: Joined,
    /// Size of its uniform parameters in Rust.
    pub params_bytes: usize,
    /// Whether each storage binding, from binding 1 on, is written.
    pub written: &'static [bool],
}

/// What a shader is joined with: WGSL cannot give an array of weights to a function, so each such array gets functions of its own.
#[derive(Clone, Copy, Debug)]
enum Joined {
    Alone,
    /// Reductions over a workgroup's threads.
    Lanes(Lanes),
    /// Products of rows with the bindings of these names.
    Products(Precision, &'static [&'static str]),
    /// The same for pairs of rows and experts.
    PairProducts(Precision, &'static [&'static str]),
    /// Products of rows, by cooperative matrices.
    CooperativeProducts(Edge, &'static [&'static str]),
    /// The same for pairs of rows and experts.
    CooperativePairProducts(Edge, &'static [&'static str]),
    /// No products, but the weights of these names are read.
    Weights(&'static [&'static str]),
}

/// How the threads of a workgroup reduce their numbers to one. The bits of a result do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lanes {
    /// Through the workgroup's memory, on any device.
    Memory,
    /// By shuffles within subgroups, where [`super::probe`] found that these work.
    Subgroups,
}

/// A file that shaders are joined with.
macro_rules! shared {
    ($folder:literal / $name:literal) => {
        include_str!(concat!("../ops/", $folder, "/", $name, ".wgsl"))
    };
    ($name:literal) => {
        shared!("product" / $name)
    };
}

impl Shader {
    /// The whole text: the shader's file, and what it is joined with. `MATRIX` in files that stand for one matrix becomes its name.
    pub fn source(&self) -> String {
        let portable = |precision| match precision {
            Precision::Exact => (shared!("inputs"), [shared!("product"), shared!("sums")]),
            Precision::Fast => (shared!("inputs_fast"), [shared!("product_fast"), shared!("sums")]),
        };
        let tiles = |edge| match edge {
            Edge::Eight => shared!("tiles_8"),
            Edge::Sixteen => shared!("tiles_16"),
        };
        // Files for all matrices, and those for each one beside `matrix`.
        let (files, each, names): (Vec<_>, Vec<_>, _) = match self.joined {
            Joined::Alone => return self.text.to_owned(),
            Joined::Lanes(lanes) => {
                let reduce = match lanes {
                    Lanes::Memory => shared!("lanes" / "lanes_memory"),
                    Lanes::Subgroups => shared!("lanes" / "lanes_subgroup"),
                };
                return [self.text, shared!("lanes" / "lanes"), reduce].concat();
            }
            Joined::Products(precision, names) => {
                let (inputs, each) = portable(precision);
                (vec![inputs], each.to_vec(), names)
            }
            Joined::PairProducts(precision, names) => {
                let (inputs, each) = portable(precision);
                (vec![shared!("pairs"), shared!("gelu"), inputs], each.to_vec(), names)
            }
            Joined::CooperativeProducts(edge, names) => {
                (vec![tiles(edge), shared!("cooperative")], vec![shared!("product_cooperative")], names)
            }
            Joined::CooperativePairProducts(edge, names) => (
                vec![shared!("pairs_cooperative"), shared!("gelu"), tiles(edge), shared!("cooperative")],
                vec![shared!("product_cooperative")],
                names,
            ),
            Joined::Weights(names) => (Vec::new(), Vec::new(), names),
        };
        let mut source = [self.text, shared!("columns")].concat();
        source.extend(files);
        for name in names {
            source.extend(
                [shared!("matrix")].into_iter().chain(each.iter().copied()).map(|file| file.replace("MATRIX", name)),
            );
        }
        source
    }

    /// The same with another text, and joined with nothing more.
    #[cfg(test)]
    pub(super) fn with_text(self, text: String) -> Self {
        Self { text: text.leak(), joined: Joined::Alone, ..self }
    }

    /// Features of a device that it needs; none but for what others can stand in for.
    pub fn features(&self) -> wgpu::Features {
        match self.joined {
            Joined::Lanes(Lanes::Subgroups) => wgpu::Features::SUBGROUP,
            Joined::CooperativeProducts(..) | Joined::CooperativePairProducts(..) => Cooperative::FEATURES,
            _ => wgpu::Features::empty(),
        }
    }
}

macro_rules! shaders {
    ($($constant:ident = $op:literal / $name:literal, $joined:expr, $params:ty, [$($written:literal),*];)*) => {
        $(
            pub(super) const $constant: Shader = Shader {
                name: $name,
                text: include_str!(concat!("../ops/", $op, "/", $name, ".wgsl")),
                joined: $joined,
                params_bytes: size_of::<$params>(),
                written: &[$($written),*],
            };
        )*
        /// Every shader of the package, for tools and tests.
        pub const SHADERS: &[Shader] = &[$($constant),*];
    };
}

shaders! {
    MATMUL = "matmul" / "matmul", Joined::Products(Precision::Exact, &["weights"]), MatmulParams, [false, false, false, false, true];
    GATED_GELU = "gated_gelu" / "gated_gelu", Joined::PairProducts(Precision::Exact, &["gate", "up"]), ExpertParams<gated_gelu::Params>,
        [false, false, false, false, false, false, false, true];
    EXPERT_DOWN = "expert_down" / "expert_down", Joined::PairProducts(Precision::Exact, &["down"]), ExpertParams<expert_down::Params>,
        [false, false, false, false, false, true];
    MATMUL_FAST = "matmul" / "matmul", Joined::Products(Precision::Fast, &["weights"]), MatmulParams, [false, false, false, false, true];
    GATED_GELU_FAST = "gated_gelu" / "gated_gelu", Joined::PairProducts(Precision::Fast, &["gate", "up"]), ExpertParams<gated_gelu::Params>,
        [false, false, false, false, false, false, false, true];
    EXPERT_DOWN_FAST = "expert_down" / "expert_down", Joined::PairProducts(Precision::Fast, &["down"]), ExpertParams<expert_down::Params>,
        [false, false, false, false, false, true];
    MATMUL_COOPERATIVE_8 = "matmul" / "matmul_cooperative", Joined::CooperativeProducts(Edge::Eight, &["weights"]),
        CooperativeMatmulParams, [false, false, false, false, true];
    MATMUL_COOPERATIVE_16 = "matmul" / "matmul_cooperative", Joined::CooperativeProducts(Edge::Sixteen, &["weights"]),
        CooperativeMatmulParams, [false, false, false, false, true];
    GATED_GELU_COOPERATIVE_8 = "gated_gelu" / "gated_gelu_cooperative",
        Joined::CooperativePairProducts(Edge::Eight, &["gate", "up"]), CooperativeExpertParams<gated_gelu::Params>,
        [false, false, false, false, false, false, false, true];
    GATED_GELU_COOPERATIVE_16 = "gated_gelu" / "gated_gelu_cooperative",
        Joined::CooperativePairProducts(Edge::Sixteen, &["gate", "up"]), CooperativeExpertParams<gated_gelu::Params>,
        [false, false, false, false, false, false, false, true];
    EXPERT_DOWN_COOPERATIVE_8 = "expert_down" / "expert_down_cooperative",
        Joined::CooperativePairProducts(Edge::Eight, &["down"]), CooperativeExpertParams<expert_down::Params>,
        [false, false, false, false, false, true];
    EXPERT_DOWN_COOPERATIVE_16 = "expert_down" / "expert_down_cooperative",
        Joined::CooperativePairProducts(Edge::Sixteen, &["down"]), CooperativeExpertParams<expert_down::Params>,
        [false, false, false, false, false, true];
    LARGEST_WEIGHT = "matmul" / "largest_weight", Joined::Weights(&["weights"]), LargestParams, [false, false, true];
    QUANTISE_HALVES = "quantise" / "quantise_halves", Joined::Alone, quantise::HalvesParams, [false, true, true];
    QUANTISE = "quantise" / "quantise", Joined::Alone, quantise::Params, [false, true, true];
    EXPERT_COMBINE = "expert_down" / "expert_combine", Joined::Alone, CombineParams, [false, false, true];
    MOE_ROUTER = "moe_router" / "moe_router", Joined::Alone, moe_router::Params, [false, false, true, true];
    EXPERT_TILES = "moe_router" / "expert_tiles", Joined::Alone, TilesParams, [false, true];
    RMS_NORM = "rms_norm" / "rms_norm", Joined::Lanes(Lanes::Memory), rms_norm::Params, [false, false, true];
    RMS_NORM_SUBGROUP = "rms_norm" / "rms_norm", Joined::Lanes(Lanes::Subgroups), rms_norm::Params, [false, false, true];
    SUBGROUP_PROBE = "subgroup_probe" / "subgroup_probe", Joined::Lanes(Lanes::Subgroups), ProbeParams, [true];
    READ_WORDS = "read_words" / "read_words", Joined::Alone, ReadParams, [false, true];
    ROPE = "rope" / "rope", Joined::Alone, RopeParams, [true, false, false, false, false, true, true];
    MARK_SLOTS = "attention" / "mark_slots", Joined::Alone, MarkParams, [false, true];
    ATTENTION = "attention" / "attention", Joined::Lanes(Lanes::Memory), AttentionUniform,
        [false, false, false, false, false, false, true, true];
    ATTENTION_SUBGROUP = "attention" / "attention", Joined::Lanes(Lanes::Subgroups), AttentionUniform,
        [false, false, false, false, false, false, true, true];
    ATTENTION_COMBINE = "attention" / "attention_combine", Joined::Alone, AttentionCombineParams, [false, false, true];
    GATHER = "gather" / "gather", Joined::Alone, GatherParams, [false, false, true];
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MatmulParams {
    pub(super) op: matmul::Params,
    pub(super) rows: u32,
    pub(super) column_begin: u32,
    /// First block of the dispatch in the shard.
    pub(super) block_begin: u32,
}

/// What a dispatch of an expert kernel has of its matrix.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ExpertShard {
    pub(super) expert_begin: u32,
    pub(super) expert_count: u32,
    pub(super) column_begin: u32,
    pub(super) blocks: u32,
    /// Pairs that share a row of inputs.
    pub(super) pairs_a_row: u32,
    /// First block of the dispatch in the shard, an expert.
    pub(super) block_begin: u32,
}

/// Parameters of the two expert kernels: the operation's, and the shard.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ExpertParams<P> {
    pub(super) op: P,
    /// Pairs or tiles.
    pub(super) items: u32,
    pub(super) shard: ExpertShard,
}

impl<P: Pod> ExpertParams<P> {
    /// The words as the shader sees them. Both operations' parameters are four words.
    pub(super) fn to_words(self) -> [u32; 11] {
        let mut out = [0; 11];
        out[..4].copy_from_slice(bytemuck::cast_slice(bytemuck::bytes_of(&self.op)));
        out[4] = self.items;
        out[5..].copy_from_slice(bytemuck::cast_ref::<_, [u32; 6]>(&self.shard));
        out
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct CooperativeMatmulParams {
    pub(super) op: matmul::Params,
    pub(super) rows: u32,
    pub(super) column_begin: u32,
    /// First block of the dispatch in the shard.
    pub(super) block_begin: u32,
    /// Power of two of the weights.
    pub(super) weights_factor: f32,
}

/// [`ExpertParams`] of prefill `fast`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CooperativeExpertParams<P> {
    pub(super) op: P,
    pub(super) shard: ExpertShard,
    /// Powers of two of the weights, of both matrices where there are two.
    pub(super) factors: [f32; 2],
}

impl<P: Pod> CooperativeExpertParams<P> {
    /// As [`ExpertParams::to_words`].
    pub(super) fn to_words(self) -> [u32; 12] {
        let mut out = [0; 12];
        out[..4].copy_from_slice(bytemuck::cast_slice(bytemuck::bytes_of(&self.op)));
        out[4..10].copy_from_slice(bytemuck::cast_ref::<_, [u32; 6]>(&self.shard));
        out[10..].copy_from_slice(&self.factors.map(f32::to_bits));
        out
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct LargestParams {
    pub(super) inputs: u32,
    pub(super) groups: u32,
    pub(super) blocks: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct CombineParams {
    pub(super) outputs: u32,
    pub(super) chosen: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct TilesParams {
    pub(super) pairs: u32,
    pub(super) num_experts: u32,
    pub(super) tiles: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ProbeParams {
    pub(super) factor: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ReadParams {
    pub(super) chunks: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct RopeParams {
    /// Of the queries.
    pub(super) op: rope::Params,
    pub(super) kv_heads: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MarkParams {
    pub(super) rows: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct AttentionUniform {
    pub(super) op: attention::Params,
    pub(super) row_begin: u32,
    pub(super) blocks: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct AttentionCombineParams {
    pub(super) heads: u32,
    pub(super) head_dim: u32,
    pub(super) row_begin: u32,
    pub(super) blocks: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct GatherParams {
    pub(super) op: gather::Params,
    pub(super) begin: u32,
}

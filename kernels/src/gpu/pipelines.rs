//! The kernels: shaders with their constants, and the pipelines that a device has made of them.
//!
//! Kernels that multiply by weights come in one variant for each way in which weights are held; a device compiles those that its
//! matrices need when these are loaded, and all others when it is opened, but for the one that measures its memory. So a driver that cannot
//! compile one says so before the first step.

use std::collections::{HashMap, HashSet};

use super::{
    cooperative::{Cooperative, Edge, PLACES},
    failure::Failure,
    format::Held,
    memory::scoped,
    shaders::{self, Lanes, Shader},
};
use crate::{KernelError, Precision};

/// A kernel: a shader with its constants. A faster variant for an adapter's features is another entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Matmul(Variant),
    GatedGelu(Variant),
    /// The same where gate is held otherwise than up: the products with it are there, and the variant is up's.
    GatedGeluOfGate(Variant),
    ExpertDown(Variant),
    MatmulCooperative(CooperativeVariant),
    GatedGeluCooperative(CooperativeVariant),
    /// As [`Kernel::GatedGeluOfGate`].
    GatedGeluCooperativeOfGate(CooperativeVariant),
    ExpertDownCooperative(CooperativeVariant),
    LargestWeight(Held),
    ExpertCombine,
    MoeRouter,
    ExpertTiles {
        tile_rows: usize,
    },
    Quantise,
    QuantiseHalves,
    RmsNorm(Lanes),
    RmsNormAdd(Lanes),
    Rope,
    MarkSlots,
    Attention(Lanes),
    AttentionCombine,
    Gather,
    SubgroupProbe,
    ReadWords,
}

/// The kernels that have no variants.
const ALWAYS: [Kernel; 8] = [
    Kernel::ExpertCombine,
    Kernel::MoeRouter,
    Kernel::ExpertTiles { tile_rows: TILE_ROWS },
    Kernel::Quantise,
    Kernel::Rope,
    Kernel::MarkSlots,
    Kernel::AttentionCombine,
    Kernel::Gather,
];

/// The kernels in which threads reduce their numbers.
fn reductions(lanes: Lanes) -> [Kernel; 3] {
    [Kernel::RmsNorm(lanes), Kernel::RmsNormAdd(lanes), Kernel::Attention(lanes)]
}

/// A variant of a kernel that multiplies by weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub(super) held: Held,
    pub(super) precision: Precision,
    /// Whether groups of inputs are whole chunks.
    pub(super) whole: bool,
    pub(super) sharing: Sharing,
    /// Whether several threads share a sum; not with [`Sharing::Wide`].
    pub(super) sliced: bool,
    /// Whether the driver may repeat loops' bodies.
    pub(super) unrolled: bool,
}

/// The kernels of prefill `fast` that have no variants.
pub(super) const OF_PREFILL_FAST: [Kernel; 2] = [Kernel::ExpertTiles { tile_rows: PLACES }, Kernel::QuantiseHalves];

/// A variant of a kernel that multiplies by weights with cooperative matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct CooperativeVariant {
    pub(super) held: Held,
    /// Whether groups of inputs are whole chunks.
    pub(super) whole: bool,
    pub(super) cooperative: Cooperative,
}

impl CooperativeVariant {
    /// All kernels that prefill `fast` has for a matrix that is held so.
    pub(super) fn kernels(self) -> [Kernel; 5] {
        [
            Kernel::MatmulCooperative(self),
            Kernel::GatedGeluCooperative(self),
            Kernel::GatedGeluCooperativeOfGate(self),
            Kernel::ExpertDownCooperative(self),
            Kernel::LargestWeight(self.held),
        ]
    }

    fn shader(self, eight: &'static Shader, sixteen: &'static Shader) -> (&'static Shader, Constants) {
        let mut constants = self.held.constants();
        constants.push(("WHOLE", f64::from(u8::from(self.whole))));
        constants.push(("WORKGROUP", f64::from(self.cooperative.threads)));
        match self.cooperative.edge {
            Edge::Eight => (eight, constants),
            Edge::Sixteen => (sixteen, constants),
        }
    }
}

/// Rows, or pairs, of a tile of the tiled matrix kernels.
pub(super) const TILE_ROWS: usize = 4;
/// Tiles in a workgroup of these: with 16 threads a tile, they fill the widest subgroups.
pub(super) const TILES_PER_WORKGROUP: usize = 4;

/// How a matrix kernel shares its work among threads. The bits of a result do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sharing {
    /// One row and one column a thread: the most threads, for GPUs in decode.
    One,
    /// One row, four columns: the fewest reads for one row, for software adapters, where each read of a loop costs as much as
    /// many products.
    Wide,
    /// Four rows, four columns: for several rows.
    Tiled,
}

/// Values of a shader's `override` constants.
type Constants = Vec<(&'static str, f64)>;

impl Variant {
    fn of(self, exact: &'static Shader, fast: &'static Shader) -> &'static Shader {
        match self.precision {
            Precision::Exact => exact,
            Precision::Fast => fast,
        }
    }

    fn constants(self) -> Constants {
        let mut constants = self.held.constants();
        constants.push(("WHOLE", f64::from(u8::from(self.whole))));
        constants.push(("UNROLLED", f64::from(u8::from(self.unrolled))));
        if self.sharing != Sharing::One {
            constants.extend([("COLUMNS_PER_THREAD", 4.0), ("COLUMN_THREADS", 16.0)]);
        }
        if self.sharing == Sharing::Tiled {
            constants.extend([("ROWS_PER_THREAD", TILE_ROWS as f64), ("TILES", TILES_PER_WORKGROUP as f64)]);
        }
        // Both fill a workgroup of 256. A subgroup of 32 threads still reads 512 bytes side by side.
        match (self.sharing, self.sliced) {
            (Sharing::One, true) => constants.extend([("COLUMN_THREADS", 32.0), ("SLICE_THREADS", 8.0)]),
            (Sharing::Tiled, true) => constants.push(("SLICE_THREADS", 4.0)),
            _ => {}
        }
        constants
    }

    /// Workgroups that a block's columns take.
    pub(super) fn workgroups_a_block(self) -> u32 {
        if self.sharing == Sharing::One && self.sliced { 2 } else { 1 }
    }
}

impl Lanes {
    fn of(self, memory: &'static Shader, subgroups: &'static Shader) -> &'static Shader {
        match self {
            Self::Memory => memory,
            Self::Subgroups => subgroups,
        }
    }
}

impl Kernel {
    fn shader(self) -> (&'static Shader, Constants) {
        match self {
            Self::Matmul(variant) => (variant.of(&shaders::MATMUL, &shaders::MATMUL_FAST), variant.constants()),
            Self::GatedGelu(variant) => {
                (variant.of(&shaders::GATED_GELU, &shaders::GATED_GELU_FAST), variant.constants())
            }
            Self::GatedGeluOfGate(variant) => {
                let mut constants = variant.constants();
                constants.push(("GATE_IS_THERE", 1.0));
                (variant.of(&shaders::GATED_GELU, &shaders::GATED_GELU_FAST), constants)
            }
            Self::ExpertDown(variant) => {
                (variant.of(&shaders::EXPERT_DOWN, &shaders::EXPERT_DOWN_FAST), variant.constants())
            }
            Self::MatmulCooperative(variant) => {
                variant.shader(&shaders::MATMUL_COOPERATIVE_8, &shaders::MATMUL_COOPERATIVE_16)
            }
            Self::GatedGeluCooperative(variant) => {
                variant.shader(&shaders::GATED_GELU_COOPERATIVE_8, &shaders::GATED_GELU_COOPERATIVE_16)
            }
            Self::GatedGeluCooperativeOfGate(variant) => {
                let (shader, mut constants) =
                    variant.shader(&shaders::GATED_GELU_COOPERATIVE_8, &shaders::GATED_GELU_COOPERATIVE_16);
                constants.push(("GATE_IS_THERE", 1.0));
                (shader, constants)
            }
            Self::ExpertDownCooperative(variant) => {
                variant.shader(&shaders::EXPERT_DOWN_COOPERATIVE_8, &shaders::EXPERT_DOWN_COOPERATIVE_16)
            }
            Self::LargestWeight(held) => (&shaders::LARGEST_WEIGHT, held.constants()),
            Self::ExpertCombine => (&shaders::EXPERT_COMBINE, Vec::new()),
            Self::MoeRouter => (&shaders::MOE_ROUTER, Vec::new()),
            Self::ExpertTiles { tile_rows } => (&shaders::EXPERT_TILES, vec![("TILE_ROWS", tile_rows as f64)]),
            Self::Quantise => (&shaders::QUANTISE, Vec::new()),
            Self::QuantiseHalves => (&shaders::QUANTISE_HALVES, Vec::new()),
            Self::RmsNorm(lanes) => (lanes.of(&shaders::RMS_NORM, &shaders::RMS_NORM_SUBGROUP), Vec::new()),
            Self::RmsNormAdd(lanes) => (lanes.of(&shaders::RMS_NORM, &shaders::RMS_NORM_SUBGROUP), vec![("ADD", 1.0)]),
            Self::Rope => (&shaders::ROPE, Vec::new()),
            Self::MarkSlots => (&shaders::MARK_SLOTS, Vec::new()),
            Self::Attention(lanes) => (lanes.of(&shaders::ATTENTION, &shaders::ATTENTION_SUBGROUP), Vec::new()),
            Self::AttentionCombine => (&shaders::ATTENTION_COMBINE, Vec::new()),
            Self::Gather => (&shaders::GATHER, Vec::new()),
            Self::SubgroupProbe => (&shaders::SUBGROUP_PROBE, Vec::new()),
            Self::ReadWords => (&shaders::READ_WORDS, Vec::new()),
        }
    }
}

/// Every kernel that any device may be given, for tools and tests.
pub fn gpu_kernels() -> Vec<(&'static Shader, Vec<(&'static str, f64)>)> {
    let mut kernels = [ALWAYS.as_slice(), OF_PREFILL_FAST.as_slice()].concat();
    kernels.extend([Lanes::Memory, Lanes::Subgroups].into_iter().flat_map(reductions));
    kernels.extend([Kernel::SubgroupProbe, Kernel::ReadWords]);
    let sliced = [Sharing::One, Sharing::Tiled].map(|sharing| (sharing, true, true));
    let small = [Sharing::One, Sharing::Tiled].map(|sharing| (sharing, false, true));
    let software = [Sharing::Wide, Sharing::Tiled].map(|sharing| (sharing, false, false));
    // As a software adapter runs them that is told to share sums.
    let both = sliced.map(|(sharing, sliced, _)| (sharing, sliced, false));
    for held in Held::all() {
        for (precision, whole) in [(Precision::Exact, true), (Precision::Exact, false), (Precision::Fast, true)] {
            if precision == Precision::Fast && !held.has_fast() {
                continue;
            }
            for (sharing, sliced, unrolled) in sliced.into_iter().chain(small).chain(software).chain(both) {
                let variant = Variant { held, precision, whole, sharing, sliced, unrolled };
                kernels.extend([Kernel::Matmul(variant), Kernel::ExpertDown(variant)]);
                kernels.extend([Kernel::GatedGelu(variant), Kernel::GatedGeluOfGate(variant)]);
            }
        }
    }
    // With subgroups of 8 and of 32 threads.
    let cooperative = [Edge::Eight, Edge::Sixteen].map(|edge| Cooperative { edge, threads: 128 });
    for (held, cooperative) in
        Held::all().into_iter().flat_map(|held| cooperative.map(|cooperative| (held, cooperative)))
    {
        let variants = [true, false].map(|whole| CooperativeVariant { held, whole, cooperative });
        kernels.extend(variants.into_iter().flat_map(CooperativeVariant::kernels));
    }
    // Some serve several variants.
    let mut listed = HashSet::new();
    kernels.retain(|kernel| listed.insert(*kernel));
    kernels.into_iter().map(Kernel::shader).collect()
}

/// A compiled kernel.
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) params_bytes: u64,
    /// Whether each binding from 1 on is written.
    pub(super) written: &'static [bool],
}

/// The compiled kernels of a device.
#[derive(Default)]
pub(super) struct Pipelines {
    made: HashMap<Kernel, Pipeline>,
    /// What tests have compiled in a kernel's place.
    #[cfg(test)]
    replaced: HashMap<Kernel, Shader>,
}

impl Pipelines {
    /// Compiles the kernels that every model needs.
    ///
    /// # Errors
    /// As [`Pipelines::compile`].
    pub(super) fn compile_always(
        &mut self,
        device: &wgpu::Device,
        failure: &Failure,
        lanes: Lanes,
    ) -> Result<(), KernelError> {
        ALWAYS.into_iter().chain(reductions(lanes)).try_for_each(|kernel| self.compile(device, failure, kernel))
    }

    /// Compiles a kernel, unless it is there.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`] naming the kernel that the driver refused, and why.
    pub(super) fn compile(
        &mut self,
        device: &wgpu::Device,
        failure: &Failure,
        kernel: Kernel,
    ) -> Result<(), KernelError> {
        if let Some(error) = self.refusal(device, failure, kernel)? {
            failure.set(format!("kernel {kernel:?} was refused: {error}"));
        }
        failure.check()
    }

    /// Compiles a kernel, unless it is there. Why the driver refused it, if it did: no failure for one that can be done without.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`].
    pub(super) fn refusal(
        &mut self,
        device: &wgpu::Device,
        failure: &Failure,
        kernel: Kernel,
    ) -> Result<Option<String>, KernelError> {
        if self.made.contains_key(&kernel) {
            return Ok(None);
        }
        let (shader, constants) = kernel.shader();
        #[cfg(test)]
        let shader = self.replaced.get(&kernel).unwrap_or(shader);
        match failure.guard(|| scoped(device, || pipeline(device, shader, &constants)))? {
            Ok(pipeline) => drop(self.made.insert(kernel, pipeline)),
            Err(error) => return Ok(Some(error.to_string())),
        }
        failure.check().map(|()| None)
    }

    /// Puts a shader in a kernel's place.
    #[cfg(test)]
    pub(super) fn replace(&mut self, kernel: Kernel, shader: Shader) {
        self.made.remove(&kernel);
        self.replaced.insert(kernel, shader);
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.made.len()
    }

    /// `None` when it was not compiled.
    pub(super) fn get(&self, kernel: Kernel) -> Option<&Pipeline> {
        self.made.get(&kernel)
    }
}

fn pipeline(device: &wgpu::Device, shader: &Shader, constants: &[(&str, f64)]) -> Pipeline {
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some(shader.name),
        source: wgpu::ShaderSource::Wgsl(shader.source().into()),
    });
    let entry = |binding: usize, ty, has_dynamic_offset| wgpu::BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true)];
    for (index, written) in shader.written.iter().enumerate() {
        entries.push(entry(index + 1, wgpu::BufferBindingType::Storage { read_only: !written }, false));
    }
    let layout = device
        .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(shader.name), entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(shader.name),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(shader.name),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some(shader.name),
        compilation_options: wgpu::PipelineCompilationOptions {
            constants,
            // Every kernel writes its workgroup's memory before it reads it.
            zero_initialize_workgroup_memory: false,
        },
        cache: None,
    });
    Pipeline { pipeline, layout, params_bytes: shader.params_bytes as u64, written: shader.written }
}

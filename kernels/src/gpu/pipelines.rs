//! The kernels: shaders with their constants, and the pipelines that a device has made of them.
//!
//! Kernels that multiply by weights come in one variant for each way in which weights are held; a device compiles those that its
//! matrices need when these are loaded, and all others when it is opened. So a driver that cannot compile one says so before the
//! first step.

use std::collections::HashMap;

use super::{
    failure::Failure,
    format::Held,
    memory::scoped,
    shaders::{self, Shader},
};
use crate::{KernelError, Precision};

/// A kernel: a shader with its constants. A faster variant for an adapter's features is another entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Matmul(Variant),
    GatedGelu(Variant),
    ExpertDown(Variant),
    ExpertCombine,
    MoeRouter,
    ExpertTiles,
    Quantise,
    RmsNorm,
    RmsNormAdd,
    Rope,
    MarkSlots,
    Attention,
    AttentionCombine,
    Gather,
}

/// The kernels that have no variants.
const ALWAYS: [Kernel; 11] = [
    Kernel::ExpertCombine,
    Kernel::MoeRouter,
    Kernel::ExpertTiles,
    Kernel::Quantise,
    Kernel::RmsNorm,
    Kernel::RmsNormAdd,
    Kernel::Rope,
    Kernel::MarkSlots,
    Kernel::Attention,
    Kernel::AttentionCombine,
    Kernel::Gather,
];

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

impl Kernel {
    fn shader(self) -> (&'static Shader, Constants) {
        match self {
            Self::Matmul(variant) => (variant.of(&shaders::MATMUL, &shaders::MATMUL_FAST), variant.constants()),
            Self::GatedGelu(variant) => {
                (variant.of(&shaders::GATED_GELU, &shaders::GATED_GELU_FAST), variant.constants())
            }
            Self::ExpertDown(variant) => {
                (variant.of(&shaders::EXPERT_DOWN, &shaders::EXPERT_DOWN_FAST), variant.constants())
            }
            Self::ExpertCombine => (&shaders::EXPERT_COMBINE, Vec::new()),
            Self::MoeRouter => (&shaders::MOE_ROUTER, Vec::new()),
            Self::ExpertTiles => (&shaders::EXPERT_TILES, Vec::new()),
            Self::Quantise => (&shaders::QUANTISE, Vec::new()),
            Self::RmsNorm => (&shaders::RMS_NORM, Vec::new()),
            Self::RmsNormAdd => (&shaders::RMS_NORM, vec![("ADD", 1.0)]),
            Self::Rope => (&shaders::ROPE, Vec::new()),
            Self::MarkSlots => (&shaders::MARK_SLOTS, Vec::new()),
            Self::Attention => (&shaders::ATTENTION, Vec::new()),
            Self::AttentionCombine => (&shaders::ATTENTION_COMBINE, Vec::new()),
            Self::Gather => (&shaders::GATHER, Vec::new()),
        }
    }
}

/// Every kernel that any device may be given, for tools and tests.
pub fn gpu_kernels() -> Vec<(&'static Shader, Vec<(&'static str, f64)>)> {
    let mut kernels = ALWAYS.to_vec();
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
                kernels.extend([Kernel::Matmul(variant), Kernel::GatedGelu(variant), Kernel::ExpertDown(variant)]);
            }
        }
    }
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
pub(super) struct Pipelines(HashMap<Kernel, Pipeline>);

impl Pipelines {
    /// Compiles the kernels that have no variants.
    ///
    /// # Errors
    /// As [`Pipelines::compile`].
    pub(super) fn new(device: &wgpu::Device, failure: &Failure) -> Result<Self, KernelError> {
        let mut made = Self(HashMap::new());
        for kernel in ALWAYS {
            made.compile(device, failure, kernel)?;
        }
        Ok(made)
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
        if self.0.contains_key(&kernel) {
            return Ok(());
        }
        let (shader, constants) = kernel.shader();
        match failure.guard(|| scoped(device, || pipeline(device, shader, &constants)))? {
            Ok(pipeline) => drop(self.0.insert(kernel, pipeline)),
            Err(error) => failure.set(format!("kernel {kernel:?} was refused: {error}")),
        }
        failure.check()
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// `None` when it was not compiled.
    pub(super) fn get(&self, kernel: Kernel) -> Option<&Pipeline> {
        self.0.get(&kernel)
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

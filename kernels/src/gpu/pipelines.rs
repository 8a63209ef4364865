//! The compiled kernels. All are made when the device is opened, so that a driver that cannot compile one says so at once.

use super::{
    failure::Failure,
    memory::scoped,
    shaders::{self, Shader},
};
use crate::KernelError;

/// A kernel: a shader with its constants. A faster variant for an adapter's features is another entry of [`KERNELS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub(super) enum Kernel {
    /// Matrix kernels: one row (or pair) and one column a thread.
    MatmulInt8,
    MatmulF32,
    GatedGeluInt8,
    GatedGeluF32,
    ExpertDownInt8,
    ExpertDownF32,
    /// One row, four columns.
    MatmulInt8Wide,
    MatmulF32Wide,
    GatedGeluInt8Wide,
    GatedGeluF32Wide,
    ExpertDownInt8Wide,
    ExpertDownF32Wide,
    /// Four rows, four columns, four such tiles a workgroup.
    MatmulInt8Tiled,
    MatmulF32Tiled,
    GatedGeluInt8Tiled,
    GatedGeluF32Tiled,
    ExpertDownInt8Tiled,
    ExpertDownF32Tiled,
    ExpertCombine,
    MoeRouter,
    ExpertTiles,
    RmsNorm,
    RmsNormAdd,
    Rope,
    MarkSlots,
    Attention,
    AttentionCombine,
    Gather,
}

type Constants = &'static [(&'static str, f64)];

const F32: (&str, f64) = ("FLOAT_WEIGHTS", 1.0);
const COLUMNS: (&str, f64) = ("COLUMNS_PER_THREAD", 4.0);
const THREADS: (&str, f64) = ("COLUMN_THREADS", 16.0);
const ROWS: (&str, f64) = ("ROWS_PER_THREAD", 4.0);
const PAIRS: (&str, f64) = ("PAIRS_PER_THREAD", 4.0);
const ROW_TILES: (&str, f64) = ("ROW_TILES", TILES_PER_WORKGROUP as f64);
const PAIR_TILES: (&str, f64) = ("TILES", TILES_PER_WORKGROUP as f64);
const ONE: Constants = &[];
const F32_ONE: Constants = &[F32];
const WIDE: Constants = &[COLUMNS, THREADS];
const F32_WIDE: Constants = &[F32, COLUMNS, THREADS];
const TILED_ROWS: Constants = &[COLUMNS, THREADS, ROWS, ROW_TILES];
const F32_TILED_ROWS: Constants = &[F32, COLUMNS, THREADS, ROWS, ROW_TILES];
const TILED_PAIRS: Constants = &[COLUMNS, THREADS, PAIRS, PAIR_TILES];
const F32_TILED_PAIRS: Constants = &[F32, COLUMNS, THREADS, PAIRS, PAIR_TILES];

/// Rows, or pairs, of a tile of the tiled matrix kernels.
pub(super) const TILE_ROWS: usize = 4;
/// Tiles in a workgroup of these: with 16 threads a tile, a workgroup fills the widest subgroups.
pub(super) const TILES_PER_WORKGROUP: usize = 4;

/// How a matrix kernel shares its work among threads. The bits of a result do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// One row and one column a thread: the most threads, for GPUs in decode.
    One,
    /// One row, four columns: the fewest reads for one row, for software adapters, where each read of a loop costs as much as
    /// many products.
    Wide,
    /// Four rows, four columns: for several rows.
    Tiled,
}

/// The kernel of a matrix operation: its variants stand in groups of six, as in [`Kernel`].
pub(super) fn matrix_kernel(op: Kernel, is_float: bool, sharing: Sharing) -> Kernel {
    KERNELS[op as usize + usize::from(is_float) + 6 * sharing as usize].0
}

/// One entry for each [`Kernel`], in its order.
const KERNELS: &[(Kernel, Shader, Constants)] = &[
    (Kernel::MatmulInt8, shaders::MATMUL, ONE),
    (Kernel::MatmulF32, shaders::MATMUL, F32_ONE),
    (Kernel::GatedGeluInt8, shaders::GATED_GELU, ONE),
    (Kernel::GatedGeluF32, shaders::GATED_GELU, F32_ONE),
    (Kernel::ExpertDownInt8, shaders::EXPERT_DOWN, ONE),
    (Kernel::ExpertDownF32, shaders::EXPERT_DOWN, F32_ONE),
    (Kernel::MatmulInt8Wide, shaders::MATMUL, WIDE),
    (Kernel::MatmulF32Wide, shaders::MATMUL, F32_WIDE),
    (Kernel::GatedGeluInt8Wide, shaders::GATED_GELU, WIDE),
    (Kernel::GatedGeluF32Wide, shaders::GATED_GELU, F32_WIDE),
    (Kernel::ExpertDownInt8Wide, shaders::EXPERT_DOWN, WIDE),
    (Kernel::ExpertDownF32Wide, shaders::EXPERT_DOWN, F32_WIDE),
    (Kernel::MatmulInt8Tiled, shaders::MATMUL, TILED_ROWS),
    (Kernel::MatmulF32Tiled, shaders::MATMUL, F32_TILED_ROWS),
    (Kernel::GatedGeluInt8Tiled, shaders::GATED_GELU, TILED_PAIRS),
    (Kernel::GatedGeluF32Tiled, shaders::GATED_GELU, F32_TILED_PAIRS),
    (Kernel::ExpertDownInt8Tiled, shaders::EXPERT_DOWN, TILED_PAIRS),
    (Kernel::ExpertDownF32Tiled, shaders::EXPERT_DOWN, F32_TILED_PAIRS),
    (Kernel::ExpertCombine, shaders::EXPERT_COMBINE, &[]),
    (Kernel::MoeRouter, shaders::MOE_ROUTER, &[]),
    (Kernel::ExpertTiles, shaders::EXPERT_TILES, &[]),
    (Kernel::RmsNorm, shaders::RMS_NORM, &[]),
    (Kernel::RmsNormAdd, shaders::RMS_NORM, &[("ADD", 1.0)]),
    (Kernel::Rope, shaders::ROPE, &[]),
    (Kernel::MarkSlots, shaders::MARK_SLOTS, &[]),
    (Kernel::Attention, shaders::ATTENTION, &[]),
    (Kernel::AttentionCombine, shaders::ATTENTION_COMBINE, &[]),
    (Kernel::Gather, shaders::GATHER, &[]),
];

/// A compiled kernel.
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) params_bytes: u64,
}

/// All kernels of a device.
pub(super) struct Pipelines(Vec<Pipeline>);

impl Pipelines {
    /// Compiles every kernel.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`] naming the kernel that the driver refused, and why.
    pub(super) fn new(device: &wgpu::Device, failure: &Failure) -> Result<Self, KernelError> {
        let mut made = Vec::with_capacity(KERNELS.len());
        for (index, (kernel, shader, constants)) in KERNELS.iter().enumerate() {
            assert_eq!(index, *kernel as usize, "kernels stand in the order of their enum");
            match failure.guard(|| scoped(device, || pipeline(device, shader, constants)))? {
                Ok(pipeline) => made.push(pipeline),
                Err(error) => failure.set(format!("kernel {kernel:?} was refused: {error}")),
            }
            failure.check()?;
        }
        Ok(Self(made))
    }

    pub(super) fn get(&self, kernel: Kernel) -> &Pipeline {
        &self.0[kernel as usize]
    }
}

fn pipeline(device: &wgpu::Device, shader: &Shader, constants: Constants) -> Pipeline {
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some(shader.name),
        source: wgpu::ShaderSource::Wgsl(shader.source.into()),
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
    Pipeline { pipeline, layout, params_bytes: shader.params_bytes as u64 }
}

//! How Grok-1 is computed: quantised weights, the operations, and two devices that run them.

mod backend;
mod batch;
mod bench;
mod check;
mod cpu;
mod device;
mod error;
mod forward;
mod gpu;
mod host;
mod measure;
mod open;
mod ops;
mod settled;
mod stage;
mod synthetic;

pub use backend::{AttentionParams, Backend};
pub use batch::{Batch, KV_BLOCK_TOKENS, Row};
pub use bench::{ProductShape, ProductTime};
pub use check::{BatchInvariance, check_batch_invariance};
pub use cpu::{CpuActivations, CpuBackend, CpuKvPool, CpuMatrix, CpuSelection};
pub use device::{DeviceInfo, Precision, Prefill};
pub use error::KernelError;
pub use forward::{MemoryNeed, StageModel, StageOptions, Trace, TracedStage};
pub use gpu::{
    GpuActivations, GpuAdapter, GpuBackend, GpuChoice, GpuKind, GpuKvPool, GpuMatrix, GpuOptions, GpuSelection,
    GpuVector, SHADERS, Shader, gpu_adapters, gpu_kernels,
};
pub use host::{available_memory_bytes, peak_memory_bytes, resident_memory_bytes, total_memory_bytes};
pub use measure::{FormatRate, StepOverhead};
pub use open::{DEVICES, Device, device, gpu_choice, select_device};
pub use settled::settled;
pub use stage::{Stage, StepInput, StepOutput};
pub use synthetic::SyntheticWeights;

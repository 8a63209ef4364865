//! Which adapter is opened, with which limits, and what it says of itself.
//!
//! Decides the order of adapters (discrete, integrated, virtual, others, software last) and the least limits that the kernels
//! need. Knows nothing of models.

use wgpu::{Adapter, AdapterInfo, DeviceType, Limits};

use super::{GpuOptions, cooperative::Cooperative, failure::Failure, probe::SUBGROUP_MIN};
use crate::{DeviceInfo, KernelError, Prefill};

/// Version of the portable kernels' arithmetic in each precision. Raised with every change of a sum's order, so that stages of
/// different versions do not pass for equal.
const KERNEL_SETS: [&str; 2] = ["gpu-exact/4", "gpu-fast/3"];

/// Which adapter is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuChoice {
    /// The best hardware adapter; software ones do not count.
    Hardware,
    /// The best adapter there is; a software one with a warning.
    Best,
    /// The best adapter whose name has this part, upper or lower case.
    Named(String),
}

impl GpuChoice {
    fn accepts(&self, info: &AdapterInfo) -> bool {
        match self {
            Self::Hardware => !is_software(info),
            Self::Best => true,
            Self::Named(part) => describe(info).to_lowercase().contains(&part.to_lowercase()),
        }
    }

    fn wanted(&self) -> String {
        match self {
            Self::Hardware => "hardware GPU".into(),
            Self::Best => "gpu".into(),
            Self::Named(part) => format!("gpu:{part}"),
        }
    }
}

/// An open device with what is needed to describe its failures.
pub(super) struct Opened {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) info: DeviceInfo,
    pub(super) software: bool,
    /// Whether a workgroup may have 256 threads, WebGPU's default.
    pub(super) has_large_workgroups: bool,
    /// Whether it has subgroups of eight threads and more, as far as the adapter says.
    pub(super) has_subgroups: bool,
    /// Where prefill `fast` was asked for and the adapter says that it has what that needs.
    pub(super) cooperative: Option<Cooperative>,
    pub(super) failure: Failure,
}

/// Opens the adapter that `choice` names. Adapters that refuse are passed over and named in the error.
///
/// # Errors
/// [`KernelError::NoDevice`] listing the adapters; [`KernelError::Limit`] when the adapter is too small for any model.
pub(super) fn open(choice: &GpuChoice, options: &GpuOptions) -> Result<Opened, KernelError> {
    let mut adapters = adapters();
    adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
    let mut found = Vec::new();
    for adapter in adapters {
        let info = adapter.get_info();
        if !choice.accepts(&info) {
            found.push(describe(&info));
            continue;
        }
        check_limits(&adapter, &info)?;
        match open_adapter(&adapter, &info, options) {
            Ok(opened) => {
                if opened.software && *choice == GpuChoice::Best {
                    tracing::warn!(device = %opened.info.name, "no hardware GPU was found, a software one is used");
                }
                if options.prefill == Prefill::Fast && opened.cooperative.is_none() {
                    tracing::warn!(
                        device = %opened.info.name,
                        "prefill is not fast: the device has no cooperative matrices of f16 with sums in f32"
                    );
                }
                return Ok(opened);
            }
            Err(reason) => found.push(format!("{} (refused: {reason})", describe(&info))),
        }
    }
    let found = if found.is_empty() { "no adapters".into() } else { found.join(", ") };
    Err(KernelError::NoDevice { wanted: choice.wanted(), found })
}

fn adapters() -> Vec<Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // No validation layers: wgpu checks every call itself.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let backends = descriptor.backends;
    pollster::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends))
}

fn rank(kind: DeviceType) -> u8 {
    match kind {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

fn is_software(info: &AdapterInfo) -> bool {
    info.device_type == DeviceType::Cpu
}

/// `llvmpipe (LLVM 15.0.6, 256 bits) (vulkan, software)`.
fn describe(info: &AdapterInfo) -> String {
    let software = if is_software(info) { ", software" } else { "" };
    format!("{} ({}{software})", info.name, info.backend)
}

/// What the kernels need beyond WebGPU's default limits is nothing; what they need of them is this.
fn check_limits(adapter: &Adapter, info: &AdapterInfo) -> Result<(), KernelError> {
    let limits = adapter.limits();
    let needs = [
        ("max_storage_buffers_per_shader_stage", 8, limits.max_storage_buffers_per_shader_stage),
        ("max_compute_invocations_per_workgroup", 128, limits.max_compute_invocations_per_workgroup),
        ("max_compute_workgroup_size_x", 128, limits.max_compute_workgroup_size_x),
        ("max_compute_workgroup_storage_size", 8192, limits.max_compute_workgroup_storage_size),
        ("max_compute_workgroups_per_dimension", 65_535, limits.max_compute_workgroups_per_dimension),
    ];
    for (limit, needed, offered) in needs {
        if offered < needed {
            return Err(KernelError::Limit {
                what: "the kernels".into(),
                limit,
                needed: needed.into(),
                offered: offered.into(),
                device: describe(info),
            });
        }
    }
    Ok(())
}

fn open_adapter(adapter: &Adapter, info: &AdapterInfo, options: &GpuOptions) -> Result<Opened, String> {
    let offered = adapter.limits();
    // WebGPU's defaults, or less where the adapter has less that the kernels do not need; buffers as large as it can.
    let mut limits = Limits::default().or_worse_values_from(&offered);
    limits.max_buffer_size = offered.max_buffer_size;
    limits.max_storage_buffer_binding_size = offered.max_storage_buffer_binding_size;
    let cooperative = match options.prefill {
        Prefill::Invariant => None,
        Prefill::Fast => Cooperative::of(adapter, info, &limits),
    };
    let (features, experimental_features) = match cooperative {
        None => (wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled()),
        Some(_) => (Cooperative::FEATURES, experimental_features()),
    };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("grokpipe"),
        // The clock is for benchmarks, subgroups are for kernels that others can stand in for; what prefill `fast` needs it asks for itself.
        required_features: adapter.features() & (wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::SUBGROUP) | features,
        experimental_features,
        required_limits: limits,
        memory_hints: wgpu::MemoryHints::Performance,
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).map_err(|error| error.to_string())?;
    let name = describe(info);
    let failure = Failure::watch(&device, &name);
    let kernel_set = KERNEL_SETS[options.precision as usize];
    let fingerprint =
        format!("{kernel_set} f32 {} driver {} {}", name, info.driver, info.driver_info).trim().to_string();
    let memory_bytes = memory_bytes(adapter, info);
    let info_out = DeviceInfo { name, is_gpu: true, fingerprint, memory_bytes, invariant_below: None };
    let has_large_workgroups = device.limits().max_compute_invocations_per_workgroup >= 256;
    let has_subgroups = has_subgroups(device.features(), info.subgroup_min_size);
    let software = is_software(info);
    Ok(Opened { device, queue, info: info_out, software, has_large_workgroups, has_subgroups, cooperative, failure })
}

/// An adapter with subgroups of different sizes takes one for each kernel, so the least must do.
fn has_subgroups(features: wgpu::Features, min_size: u32) -> bool {
    features.contains(wgpu::Features::SUBGROUP) && min_size >= SUBGROUP_MIN
}

#[expect(unsafe_code, reason = "wgpu's cooperative matrices are experimental, and asked for by name")]
fn experimental_features() -> wgpu::ExperimentalFeatures {
    // SAFETY: what could be undefined are cooperative loads and stores outside of their memory, or by a part of a subgroup. Those of
    // prefill `fast` are in the workgroup's own arrays, with places that do not depend on data, in control flow that is uniform.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// Memory of the device: what is free of the host's for a software adapter, the device-local heaps of a Vulkan one, else 0.
fn memory_bytes(adapter: &Adapter, info: &AdapterInfo) -> u64 {
    if is_software(info) { host_memory_available().unwrap_or(0) } else { device_local_bytes(adapter) }
}

fn host_memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(any(target_os = "linux", target_os = "windows", target_os = "android"))]
#[expect(unsafe_code, reason = "wgpu does not say how much memory a device has, the Vulkan instance below it does")]
fn device_local_bytes(adapter: &Adapter) -> u64 {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the handle is only asked for its properties, nothing is destroyed, and `adapter` outlives it.
    let Some(vulkan) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else { return 0 };
    let instance = vulkan.shared_instance().raw_instance();
    // SAFETY: the physical device belongs to this instance, both are alive as long as `vulkan` is.
    let memory = unsafe { instance.get_physical_device_memory_properties(vulkan.raw_physical_device()) };
    memory
        .memory_heaps
        .iter()
        .take(memory.memory_heap_count as usize)
        .filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0)
        .map(|heap| heap.size)
        .sum()
}

#[cfg(not(any(target_os = "linux", target_os = "windows", target_os = "android")))]
fn device_local_bytes(_adapter: &Adapter) -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subgroups_are_taken_where_there_are_any_of_eight() {
        let all = wgpu::Features::SUBGROUP;
        assert!(has_subgroups(all, 8) && has_subgroups(all, 32));
        assert!(!has_subgroups(all, 4) && !has_subgroups(wgpu::Features::empty(), 32));
    }
}

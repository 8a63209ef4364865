//! How an adapter is opened, with which limits, and what it says of itself.
//!
//! Decides the least limits that the kernels need, and which adapter of those that a choice accepts. Knows nothing of models.

use wgpu::{Adapter, AdapterInfo, Limits};

use super::{
    GpuOptions,
    adapters::{self, GpuAdapter, GpuChoice, GpuKind, describe},
    cooperative::Cooperative,
    failure::Failure,
    probe::SUBGROUP_MIN,
};
use crate::{DeviceInfo, KernelError, Prefill};

/// Version of the portable kernels' arithmetic in each precision. Raised with every change of a sum's order, so that stages of
/// different versions do not pass for equal.
const KERNEL_SETS: [&str; 2] = ["gpu-exact/4", "gpu-fast/3"];

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

/// Opens the adapter that `choice` names. Adapters that refuse or are too small are passed over and named in the error.
///
/// # Errors
/// [`KernelError::NoDevice`] listing the adapters; [`KernelError::Limit`] when the only one that was meant is too small for any model.
pub(super) fn open(choice: &GpuChoice, options: &GpuOptions) -> Result<Opened, KernelError> {
    let mut found = Vec::new();
    let mut too_small = Vec::new();
    for (described, adapter) in adapters::found() {
        if !choice.accepts(&described) {
            found.push(described.to_string());
            continue;
        }
        let info = adapter.get_info();
        if let Err(error) = check_limits(&adapter, &info) {
            found.push(format!("{described} (refused: {error})"));
            too_small.push(error);
            continue;
        }
        match open_adapter(&adapter, &info, &described, options) {
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
            Err(reason) => found.push(format!("{described} (refused: {reason})")),
        }
    }
    match too_small.pop() {
        Some(error) if too_small.is_empty() && matches!(choice, GpuChoice::Index(_) | GpuChoice::Pci(_)) => Err(error),
        _ => Err(adapters::none_of(choice, &found)),
    }
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

fn open_adapter(
    adapter: &Adapter,
    info: &AdapterInfo,
    described: &GpuAdapter,
    options: &GpuOptions,
) -> Result<Opened, String> {
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
    let software = described.kind == GpuKind::Software;
    let failure = Failure::watch(&device, &name, software);
    let kernel_set = KERNEL_SETS[options.precision as usize];
    let fingerprint =
        format!("{kernel_set} f32 {} driver {} {}", name, info.driver, info.driver_info).trim().to_string();
    let memory_bytes = described.free_bytes;
    let info_out = DeviceInfo { name, is_gpu: true, fingerprint, memory_bytes, invariant_below: None };
    let has_large_workgroups = device.limits().max_compute_invocations_per_workgroup >= 256;
    let has_subgroups = has_subgroups(device.features(), info.subgroup_min_size);
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

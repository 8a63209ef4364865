//! Memory of an adapter: the heap that weights go to, and what its driver grants of it now.
//!
//! Vulkan drivers say how much of a heap a process may take at the moment (`VK_EXT_memory_budget`): what others use is not in it. A
//! driver that does not say so is taken at the size of its heap. Heaps are not added up: an allocation comes from one of them, and the
//! window through which the host sees a card's memory is a heap as well.

use wgpu::Adapter;

use super::adapters::GpuKind;
use crate::host;

/// Of a budget, what is left to the driver: pipelines, staging buffers, and what its allocator cannot use of its blocks.
const MARGIN_PART: u64 = 20;
const MARGIN_BYTES: u64 = 256 << 20;

/// The heap of a device that weights go to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heap {
    /// Its size; 0 when the device does not say.
    pub(super) bytes: u64,
    /// What the process may take of it now, where the driver says so.
    pub(super) budget: Option<u64>,
    /// Whether it is the machine's own memory, of which the system may have less than the driver thinks.
    pub(super) is_hosts: bool,
}

impl Heap {
    /// The largest of a device's own heaps.
    pub(super) fn of(adapter: &Adapter, kind: GpuKind) -> Self {
        match kind {
            // It has what the host has, and says nothing true about it.
            GpuKind::Software => {
                Self { bytes: host::available_memory_bytes().unwrap_or(0), budget: None, is_hosts: true }
            }
            kind => largest(&device_heaps(adapter), kind == GpuKind::Integrated),
        }
    }

    /// What a worker may fill of it; 0 when the device does not say.
    pub(super) fn offered(self) -> u64 {
        let of_host = if self.is_hosts { host::available_memory_bytes() } else { None };
        self.offered_beside(of_host)
    }

    /// The same, where the host has `of_host` left for it.
    fn offered_beside(self, of_host: Option<u64>) -> u64 {
        let granted = self.budget.unwrap_or(self.bytes).min(self.bytes).min(of_host.unwrap_or(u64::MAX));
        let margin = (granted / MARGIN_PART + MARGIN_BYTES).min(granted / 4);
        granted - margin
    }
}

/// Of heaps and what the driver grants of each, the largest.
fn largest(heaps: &[(u64, Option<u64>)], is_hosts: bool) -> Heap {
    let largest = heaps.iter().max_by_key(|(bytes, _)| *bytes);
    largest.map_or(Heap::default(), |&(bytes, budget)| Heap { bytes, budget, is_hosts })
}

/// The device's own heaps: size, and what the driver grants.
#[cfg(any(target_os = "linux", target_os = "windows", target_os = "android"))]
#[expect(unsafe_code, reason = "wgpu does not say how much memory a device has, the Vulkan instance below it does")]
fn device_heaps(adapter: &Adapter) -> Vec<(u64, Option<u64>)> {
    use ash::vk;

    // SAFETY: the handle is only asked for its properties, nothing is destroyed, and `adapter` outlives it.
    let Some(vulkan) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else { return Vec::new() };
    let (instance, device) = (vulkan.shared_instance().raw_instance(), vulkan.raw_physical_device());
    let capabilities = vulkan.physical_device_capabilities();
    let tells_budget = capabilities.supports_extension(ash::ext::memory_budget::NAME)
        && capabilities.properties().api_version >= vk::API_VERSION_1_1;
    let mut budgets = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let memory = if tells_budget {
        let mut properties = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budgets);
        // SAFETY: the physical device belongs to this instance, and both are alive as long as `vulkan` is. A device of Vulkan 1.1 has
        // this function, and one with the extension fills what is chained to the properties.
        unsafe { instance.get_physical_device_memory_properties2(device, &mut properties) };
        properties.memory_properties
    } else {
        // SAFETY: as above, without the chain.
        unsafe { instance.get_physical_device_memory_properties(device) }
    };
    let heaps = memory.memory_heaps.iter().zip(budgets.heap_budget).take(memory.memory_heap_count as usize);
    let own = heaps.filter(|(heap, _)| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
    own.map(|(heap, budget)| (heap.size, tells_budget.then_some(budget).filter(|&budget| budget > 0))).collect()
}

#[cfg(not(any(target_os = "linux", target_os = "windows", target_os = "android")))]
fn device_heaps(_adapter: &Adapter) -> Vec<(u64, Option<u64>)> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_is_offered_is_what_the_driver_grants_of_one_heap_less_a_margin() {
        for (what, heaps, of_host, expected) in [
            ("a card alone", vec![(24 * GIB, Some(24 * GIB))], None, 24 * GIB - 24 * GIB / 20 - GIB / 4),
            ("a desktop uses some", vec![(24 * GIB, Some(20 * GIB))], None, 19 * GIB - GIB / 4),
            (
                "the window of a card is no second heap",
                vec![(GIB / 4, Some(GIB / 4)), (20 * GIB, None)],
                None,
                19 * GIB - GIB / 4,
            ),
            (
                "split heaps of a processor's GPU",
                vec![(20 * GIB, None), (64 * GIB, Some(20 * GIB))],
                None,
                19 * GIB - GIB / 4,
            ),
            ("a budget above its heap", vec![(20 * GIB, Some(u64::MAX))], None, 19 * GIB - GIB / 4),
            (
                "the host has less than its GPU thinks",
                vec![(64 * GIB, Some(60 * GIB))],
                Some(20 * GIB),
                19 * GIB - GIB / 4,
            ),
            ("little", vec![(GIB, Some(GIB / 2))], None, GIB / 2 - GIB / 8),
            ("no heap is told", vec![], None, 0),
        ] {
            assert_eq!(largest(&heaps, of_host.is_some()).offered_beside(of_host), expected, "{what}");
        }
    }
}

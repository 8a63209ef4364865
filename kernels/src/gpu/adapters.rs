//! Which adapters this machine has, in which order, and how one of them is asked for.
//!
//! Decides the order (discrete, integrated, virtual, others, software last), and with it an adapter's index; two equal cards are told
//! apart by that or by their PCI address. Knows nothing of what is done with an adapter, or of who else uses it.

use std::fmt;

use wgpu::{Adapter, AdapterInfo, DeviceType};

use super::heap::Heap;
use crate::KernelError;

/// Numbers of up to so many digits are an index; longer ones, as 4090, are a part of a name.
const INDEX_DIGITS: usize = 2;

/// Which adapter is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuChoice {
    /// The best hardware adapter; software ones do not count.
    Hardware,
    /// The best adapter there is; a software one with a warning.
    Best,
    /// The adapter of this index.
    Index(usize),
    /// The adapter at this PCI address, as `0000:41:00.0`.
    Pci(String),
    /// The best adapter whose name has this part, upper or lower case.
    Named(String),
}

impl GpuChoice {
    /// What the part of `gpu:WHICH` behind the colon asks for.
    pub fn of(which: &str) -> Self {
        let is_index = (1..=INDEX_DIGITS).contains(&which.len()) && which.bytes().all(|digit| digit.is_ascii_digit());
        match (which.parse(), pci_address(which)) {
            (Ok(index), _) if is_index => Self::Index(index),
            (_, Some(address)) => Self::Pci(address),
            _ => Self::Named(which.to_owned()),
        }
    }

    /// Whether it may be this adapter.
    pub fn accepts(&self, adapter: &GpuAdapter) -> bool {
        match self {
            Self::Hardware => adapter.kind != GpuKind::Software,
            Self::Best => true,
            Self::Index(index) => adapter.index == *index,
            Self::Pci(address) => adapter.pci.as_deref() == Some(address),
            Self::Named(part) => adapter.name.to_lowercase().contains(&part.to_lowercase()),
        }
    }
}

impl fmt::Display for GpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hardware => f.write_str("hardware GPU"),
            Self::Best => f.write_str("gpu"),
            Self::Index(index) => write!(f, "gpu:{index}"),
            Self::Pci(which) | Self::Named(which) => write!(f, "gpu:{which}"),
        }
    }
}

/// `[DOMAIN:]BUS:DEVICE.FUNCTION` in hexadecimal, as `41:00.0`, with its domain and in lower case.
fn pci_address(text: &str) -> Option<String> {
    let hex = |part: &str, digits: usize| {
        (part.len() == digits).then(|| u32::from_str_radix(part, 16).ok()).flatten().filter(|_| !part.starts_with('+'))
    };
    let (place, function) = text.split_once('.')?;
    let mut parts = place.rsplit(':');
    let (device, bus, domain) =
        (hex(parts.next()?, 2)?, hex(parts.next()?, 2)?, hex(parts.next().unwrap_or("0000"), 4)?);
    let function = hex(function, 1)?;
    parts.next().is_none().then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}"))
}

/// What an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuKind {
    /// A card of its own.
    Discrete,
    /// A part of the processor, whose memory it shares.
    Integrated,
    /// A part of a card, given to a virtual machine.
    Virtual,
    /// It does not say.
    Other,
    /// A program that stands in for one.
    Software,
}

impl GpuKind {
    pub(super) fn of(kind: DeviceType) -> Self {
        match kind {
            DeviceType::DiscreteGpu => Self::Discrete,
            DeviceType::IntegratedGpu => Self::Integrated,
            DeviceType::VirtualGpu => Self::Virtual,
            DeviceType::Other => Self::Other,
            DeviceType::Cpu => Self::Software,
        }
    }

    /// All of them.
    const ALL: [Self; 5] = [Self::Discrete, Self::Integrated, Self::Virtual, Self::Other, Self::Software];

    /// The one of this name, else [`GpuKind::Other`].
    pub fn of_name(name: &str) -> Self {
        Self::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or(Self::Other)
    }

    /// One word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Other => "other",
            Self::Software => "software",
        }
    }
}

/// An adapter of this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuAdapter {
    /// Its place in the order.
    pub index: usize,
    /// As `NVIDIA GeForce RTX 4090 (vulkan)`; equal cards have equal names.
    pub name: String,
    /// What it is.
    pub kind: GpuKind,
    /// Where it is plugged in, if its driver says so, as `0000:41:00.0`.
    pub pci: Option<String>,
    /// Its driver's name and version.
    pub driver: String,
    /// Memory that it has; 0 when it does not say.
    pub memory_bytes: u64,
    /// Memory that a worker may fill now; 0 when it does not say.
    pub free_bytes: u64,
    /// Largest buffer that a kernel can be given.
    pub binding_bytes: u64,
    /// Threads that a workgroup may have.
    pub workgroup_threads: u32,
    /// No other adapter of this machine has it, and the same one keeps it as long as no hardware comes or goes.
    pub key: String,
}

impl GpuAdapter {
    /// How it is asked for: by its PCI address, or by its index where that is not its own.
    pub fn device(&self) -> String {
        match &self.pci {
            Some(pci) if *pci == self.key => format!("gpu:{pci}"),
            _ => format!("gpu:{}", self.index),
        }
    }
}

/// As `0: NVIDIA GeForce RTX 4090 (vulkan) at 0000:41:00.0 with 24.0 GiB`.
impl fmt::Display for GpuAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.index, self.name)?;
        if let Some(pci) = &self.pci {
            write!(f, " at {pci}")?;
        }
        if self.memory_bytes > 0 {
            write!(f, " with {}", grokpipe_model::Bytes(self.memory_bytes))?;
        }
        Ok(())
    }
}

/// The adapters of this machine, best first.
pub fn gpu_adapters() -> Vec<GpuAdapter> {
    found().into_iter().map(|(described, _)| described).collect()
}

/// The adapters and what is said of them, best first.
pub(super) fn found() -> Vec<(GpuAdapter, Adapter)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // No validation layers: wgpu checks every call itself.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let backends = descriptor.backends;
    let mut adapters = pollster::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends));
    // The same card by way of another interface is no second one.
    let is_at = |info: &AdapterInfo| (info.vendor, info.device);
    let infos = adapters.iter().map(Adapter::get_info).filter(|info| info.backend == wgpu::Backend::Vulkan);
    let by_vulkan: Vec<(u32, u32)> = infos.map(|info| is_at(&info)).collect();
    adapters.retain(|adapter| {
        let info = adapter.get_info();
        info.backend != wgpu::Backend::Dx12 || !by_vulkan.contains(&is_at(&info))
    });
    adapters.sort_by_key(|adapter| GpuKind::of(adapter.get_info().device_type) as u8);
    let infos: Vec<AdapterInfo> = adapters.iter().map(Adapter::get_info).collect();
    let keys = keys(infos.iter().map(|info| (info.device_pci_bus_id.as_str(), describe(info))));
    let described = adapters.iter().zip(&infos).zip(keys).enumerate().map(|(index, ((adapter, info), key))| {
        let (heap, limits) = (Heap::of(adapter, GpuKind::of(info.device_type)), adapter.limits());
        GpuAdapter {
            index,
            name: describe(info),
            kind: GpuKind::of(info.device_type),
            pci: Some(info.device_pci_bus_id.to_lowercase()).filter(|pci| !pci.is_empty()),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            memory_bytes: heap.bytes,
            free_bytes: heap.offered(),
            binding_bytes: super::memory::binding_bytes(&limits).0,
            workgroup_threads: limits.max_compute_invocations_per_workgroup,
            key,
        }
    });
    let described: Vec<GpuAdapter> = described.collect();
    described.into_iter().zip(adapters).collect()
}

/// A key for each adapter of these PCI addresses and names: its address where no other one says the same, else its name and how many of
/// that name came before.
fn keys<'a>(adapters: impl Iterator<Item = (&'a str, String)> + Clone) -> Vec<String> {
    let all: Vec<(&str, String)> = adapters.collect();
    let key = |(at, (pci, name)): (usize, &(&str, String))| {
        let is_its_own = !pci.is_empty() && all.iter().filter(|(other, _)| other == pci).count() == 1;
        let before = all[..at].iter().filter(|(_, other)| other == name).count();
        if is_its_own { pci.to_lowercase() } else { format!("{name} {before}") }
    };
    all.iter().enumerate().map(key).collect()
}

/// `llvmpipe (LLVM 15.0.6, 256 bits) (vulkan, software)`.
pub(super) fn describe(info: &AdapterInfo) -> String {
    let software = if info.device_type == DeviceType::Cpu { ", software" } else { "" };
    format!("{} ({}{software})", info.name, info.backend)
}

/// The error of a choice that none of these meets.
pub(super) fn none_of(choice: &GpuChoice, found: &[String]) -> KernelError {
    let found = if found.is_empty() { "no adapters".into() } else { found.join(", ") };
    KernelError::NoDevice { wanted: choice.to_string(), found }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(index: usize, name: &str, pci: Option<&str>, key: &str) -> GpuAdapter {
        GpuAdapter {
            index,
            name: name.into(),
            kind: GpuKind::Discrete,
            pci: pci.map(str::to_owned),
            driver: String::new(),
            memory_bytes: 24 << 30,
            free_bytes: 0,
            binding_bytes: 0,
            workgroup_threads: 0,
            key: key.into(),
        }
    }

    #[test]
    fn what_stands_behind_the_colon_is_an_index_an_address_or_a_part_of_a_name() {
        let pci = |address: &str| GpuChoice::Pci(address.into());
        for (which, choice) in [
            ("0", GpuChoice::Index(0)),
            ("12", GpuChoice::Index(12)),
            ("4090", GpuChoice::Named("4090".into())),
            ("+1", GpuChoice::Named("+1".into())),
            ("0000:41:00.0", pci("0000:41:00.0")),
            ("0001:C1:1F.7", pci("0001:c1:1f.7")),
            ("41:00.0", pci("0000:41:00.0")),
            ("41:00", GpuChoice::Named("41:00".into())),
            ("0:0:41:00.0", GpuChoice::Named("0:0:41:00.0".into())),
            ("LLVM 15.0", GpuChoice::Named("LLVM 15.0".into())),
            ("", GpuChoice::Named(String::new())),
        ] {
            assert_eq!(GpuChoice::of(which), choice, "{which}");
        }
    }

    #[test]
    fn equal_cards_are_told_apart_by_index_and_by_address() {
        let name = "NVIDIA GeForce RTX 4090 (vulkan)";
        let pcis = [Some("0000:01:00.0"), Some("0000:41:00.0")];
        let cards = [0, 1].map(|index| adapter(index, name, pcis[index], pcis[index].unwrap_or_default()));
        for (which, accepted) in [
            ("0", [true, false]),
            ("1", [false, true]),
            ("2", [false, false]),
            ("41:00.0", [false, true]),
            ("rtx 4090", [true, true]),
        ] {
            let choice = GpuChoice::of(which);
            assert_eq!([0, 1].map(|index| choice.accepts(&cards[index])), accepted, "{which}");
        }
        assert_eq!(cards[1].device(), "gpu:0000:41:00.0");
        assert_eq!(cards[1].to_string(), "1: NVIDIA GeForce RTX 4090 (vulkan) at 0000:41:00.0 with 24.0 GiB");
    }

    #[test]
    fn no_two_adapters_have_one_key() {
        let found = [
            ("0000:01:00.0", "A (vulkan)"),
            ("0000:41:00.0", "A (vulkan)"),
            // As DX12 tells of equal cards: the address of one of them.
            ("0000:02:00.0", "B (dx12)"),
            ("0000:02:00.0", "B (dx12)"),
            ("", "llvmpipe (vulkan, software)"),
            ("", "llvmpipe (vulkan, software)"),
        ];
        let keys = keys(found.iter().map(|(pci, name)| (*pci, (*name).to_owned())));
        let mut different = keys.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), found.len(), "{keys:?}");
        assert_eq!(keys[1], "0000:41:00.0");
        assert_eq!(adapter(3, "B (dx12)", Some("0000:02:00.0"), &keys[3]).device(), "gpu:3");
    }
}

//! What a device is, and how one is chosen by name.

/// How exactly products are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Inputs in f32: for parity with other implementations.
    #[default]
    Exact,
    /// Inputs of quantised weights in 8 bits, where a device has such kernels.
    Fast,
}

/// A device as people and plans see it.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// For people: `cpu (avx512, 2 threads)`, `llvmpipe (vulkan, software)`.
    pub name: String,
    /// Whether it is a GPU adapter, software or not.
    pub is_gpu: bool,
    /// Equal fingerprints give equal bits: kernel set and version, precision, adapter and driver.
    pub fingerprint: String,
    /// Memory that the device has; 0 when it does not say.
    pub memory_bytes: u64,
}

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

impl Precision {
    /// The word for it in configurations and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// How steps of many rows are computed, as those of a prompt are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prefill {
    /// As every step: a row's bits do not depend on the others.
    #[default]
    Invariant,
    /// On a GPU by cooperative matrices (tensor cores) where it has them: with rows and weights rounded to halves, sums in f32, and bits
    /// that may depend on the step's other rows. Elsewhere as `Invariant`.
    Fast,
}

/// What the first word of a fingerprint, the kernel set, ends with where [`Prefill::Fast`] is in use; a version follows.
pub(crate) const PREFILL_FAST: &str = "+prefill-fast/";

impl Prefill {
    /// The word for it in configurations and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invariant => "invariant",
            Self::Fast => "fast",
        }
    }

    /// What a device of this fingerprint does, whatever it was asked for: few have what `Fast` needs.
    pub fn of_fingerprint(fingerprint: &str) -> Self {
        let kernel_set = fingerprint.split(' ').next().unwrap_or_default();
        if kernel_set.contains(PREFILL_FAST) { Self::Fast } else { Self::Invariant }
    }
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
    /// Steps of fewer rows are batch-invariant; all are where it is `None`.
    pub invariant_below: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_set_alone_says_how_prefill_is_computed() {
        let is_fast = |fingerprint| Prefill::of_fingerprint(fingerprint) == Prefill::Fast;
        assert!(is_fast("gpu-exact/4+prefill-fast/1 f32 GPU (vulkan) driver 1"));
        assert!(!is_fast("gpu-exact/4 f32 GPU +prefill-fast/1 (vulkan) driver 1") && !is_fast(""));
    }
}

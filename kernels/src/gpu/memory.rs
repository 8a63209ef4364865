//! Device memory: buffers that are counted, with typed errors when one does not fit.

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use wgpu::{BufferUsages, ErrorFilter};

use super::failure::Failure;
use crate::KernelError;

/// A storage buffer. Dropping it gives its bytes back to the count.
pub(super) struct GpuBuffer {
    /// Never used twice by a backend, so that bind groups can be kept by it.
    pub(super) id: u64,
    pub(super) buffer: wgpu::Buffer,
    bytes: u64,
    allocated: Arc<AtomicU64>,
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        self.allocated.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl GpuBuffer {
    /// Size, a multiple of 16.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Largest buffer that a kernel can be given under these limits, and the limit that it comes from. Below 4 GiB, although Metal offers
/// more: there a shader is told the size of a buffer in 32 bits, and all that is read behind them is wrong. A multiple of 16 keeps
/// every size whole.
pub(super) fn binding_bytes(limits: &wgpu::Limits) -> (u64, &'static str) {
    let (offered, limit) = if limits.max_buffer_size < limits.max_storage_buffer_binding_size {
        (limits.max_buffer_size, "max_buffer_size")
    } else {
        (limits.max_storage_buffer_binding_size, "max_storage_buffer_binding_size")
    };
    (offered.min(u64::from(u32::MAX)) & !15, limit)
}

/// Makes buffers and knows what is left.
pub(super) struct Memory {
    device: wgpu::Device,
    failure: Failure,
    /// Largest buffer that a kernel can be given.
    binding_bytes: u64,
    /// The limit that it comes from.
    binding_limit: &'static str,
    /// Largest buffer of weights.
    shard_bytes: u64,
    /// Bytes of the device; 0 when it does not say.
    total: u64,
    allocated: Arc<AtomicU64>,
    next_id: u64,
}

impl Memory {
    /// `max_shard_bytes` makes shards smaller than the device would allow, for tests.
    pub(super) fn new(device: &wgpu::Device, failure: &Failure, total: u64, max_shard_bytes: Option<u64>) -> Self {
        let (binding_bytes, binding_limit) = binding_bytes(&device.limits());
        let shard_bytes = binding_bytes.min(max_shard_bytes.unwrap_or(u64::MAX)) & !15;
        Self {
            device: device.clone(),
            failure: failure.clone(),
            binding_bytes,
            binding_limit,
            shard_bytes,
            total,
            allocated: Arc::default(),
            next_id: 0,
        }
    }

    /// Bytes of all buffers, for tests.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Largest buffer that a kernel can be given.
    pub(super) fn binding_bytes(&self) -> u64 {
        self.binding_bytes
    }

    /// Largest buffer of weights, at most [`Memory::binding_bytes`].
    pub(super) fn shard_bytes(&self) -> u64 {
        self.shard_bytes
    }

    /// The error of something that needs a larger binding.
    pub(super) fn too_large(&self, what: &str, needed: u64, offered: u64) -> KernelError {
        KernelError::Limit {
            what: what.to_string(),
            limit: self.binding_limit,
            needed,
            offered,
            device: self.failure.device().to_string(),
        }
    }

    /// A zeroed storage buffer of `bytes`, rounded up to a multiple of 16.
    ///
    /// # Errors
    /// [`KernelError::Limit`] above [`Memory::binding_bytes`], [`KernelError::OutOfMemory`], [`KernelError::DeviceLost`].
    pub(super) fn allocate(&mut self, what: &str, bytes: Option<u64>) -> Result<GpuBuffer, KernelError> {
        let bytes = bytes.and_then(|bytes| bytes.max(16).checked_next_multiple_of(16)).unwrap_or(u64::MAX);
        if bytes > self.binding_bytes {
            return Err(self.too_large(what, bytes, self.binding_bytes));
        }
        let available = self.total.saturating_sub(self.allocated.load(Ordering::Relaxed));
        let out_of_memory = || KernelError::OutOfMemory {
            what: what.to_string(),
            needed_bytes: bytes,
            available_bytes: available,
            device: self.failure.device().to_string(),
        };
        if self.total > 0 && bytes > available {
            return Err(out_of_memory());
        }
        self.failure.check()?;
        let descriptor = wgpu::BufferDescriptor {
            label: Some(what),
            size: bytes,
            usage: BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let made = self.failure.guard(|| scoped(&self.device, || self.device.create_buffer(&descriptor)))?;
        let buffer = match made {
            Ok(buffer) => buffer,
            Err(wgpu::Error::OutOfMemory { .. }) => return Err(out_of_memory()),
            Err(error) => {
                self.failure.set(format!("{what}: {error}"));
                self.failure.check()?;
                return Err(out_of_memory());
            }
        };
        self.allocated.fetch_add(bytes, Ordering::Relaxed);
        self.next_id += 1;
        Ok(GpuBuffer { id: self.next_id, buffer, bytes, allocated: Arc::clone(&self.allocated) })
    }
}

/// Runs `make` and returns the first error it caused.
pub(super) fn scoped<T>(device: &wgpu::Device, make: impl FnOnce() -> T) -> Result<T, wgpu::Error> {
    let validation = device.push_error_scope(ErrorFilter::Validation);
    let internal = device.push_error_scope(ErrorFilter::Internal);
    let out_of_memory = device.push_error_scope(ErrorFilter::OutOfMemory);
    let made = make();
    let errors = [
        pollster::block_on(out_of_memory.pop()),
        pollster::block_on(internal.pop()),
        pollster::block_on(validation.pop()),
    ];
    match errors.into_iter().flatten().next() {
        Some(error) => Err(error),
        None => Ok(made),
    }
}

/// A whole buffer as a binding.
pub(super) fn whole(buffer: &wgpu::Buffer, bytes: u64) -> wgpu::BindingResource<'_> {
    wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset: 0, size: NonZeroU64::new(bytes) })
}

/// The product of sizes, unless it is no number of bytes.
pub(super) fn product(sizes: &[usize]) -> Option<u64> {
    sizes.iter().try_fold(1u64, |bytes, &size| bytes.checked_mul(size as u64))
}

/// Bytes of so many 32-bit words, unless that is no number.
pub(super) fn words(counts: &[usize]) -> Option<u64> {
    product(counts)?.checked_mul(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_binding_has_four_gibibytes_whatever_is_offered() {
        let limits = |buffer, binding| wgpu::Limits {
            max_buffer_size: buffer,
            max_storage_buffer_binding_size: binding,
            ..wgpu::Limits::default()
        };
        for (buffer, binding, bytes, name) in [
            (1 << 37, 1 << 36, 0xffff_fff0, "max_storage_buffer_binding_size"),
            (1 << 30, 1 << 36, 1 << 30, "max_buffer_size"),
            (1 << 37, (1 << 31) - 1, (1 << 31) - 16, "max_storage_buffer_binding_size"),
            (1 << 28, 1 << 27, 1 << 27, "max_storage_buffer_binding_size"),
        ] {
            assert_eq!(binding_bytes(&limits(buffer, binding)), (bytes, name));
        }
    }
}

//! Whether the device still works, and why not.
//!
//! wgpu reports losses and errors through callbacks and panics where none is set. Here they leave a reason behind, and every
//! call that can fail looks for it. The first reason stays: what follows a loss is its consequence.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use crate::KernelError;

/// The reason why a device failed, if it did. Clones share it.
#[derive(Clone)]
pub(super) struct Failure {
    device: String,
    reason: Arc<Mutex<Option<String>>>,
}

impl Failure {
    /// Sets the device's callbacks.
    pub(super) fn watch(device: &wgpu::Device, name: &str) -> Self {
        let failure = Self { device: name.to_string(), reason: Arc::default() };
        let on_error = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| on_error.set(error.to_string())));
        let on_loss = failure.clone();
        device.set_device_lost_callback(move |reason, message| on_loss.set(format!("{reason:?}: {message}")));
        failure
    }

    /// Name of the device.
    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// Notes a reason, unless there is one.
    pub(super) fn set(&self, reason: String) {
        let mut held = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        held.get_or_insert(reason);
    }

    /// An error when the device has failed.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        let held = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        match held.as_ref() {
            None => Ok(()),
            Some(reason) => Err(KernelError::DeviceLost { device: self.device.clone(), reason: reason.clone() }),
        }
    }

    /// Waits for all submitted work. wgpu panics on errors that it cannot report otherwise; that, too, is a lost device.
    pub(super) fn wait(&self, device: &wgpu::Device) -> Result<(), KernelError> {
        self.guard(|| device.poll(wgpu::PollType::wait_indefinitely())).and_then(|polled| {
            if let Err(error) = polled {
                self.set(error.to_string());
            }
            self.check()
        })
    }

    /// Runs calls into wgpu; a panic there becomes the reason of failure.
    pub(super) fn guard<T>(&self, calls: impl FnOnce() -> T) -> Result<T, KernelError> {
        match catch_unwind(AssertUnwindSafe(calls)) {
            Ok(value) => Ok(value),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
                Err(self.error(text.unwrap_or_else(|| "the driver's interface panicked".into())))
            }
        }
    }

    /// What `read` makes of the first `size` bytes of a buffer that can be mapped, once all submitted work is done. `what` they are, for
    /// messages.
    pub(super) fn read<T>(
        &self,
        device: &wgpu::Device,
        buffer: &wgpu::Buffer,
        size: u64,
        what: &'static str,
        read: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, KernelError> {
        let on_mapped = self.clone();
        self.guard(|| {
            buffer.map_async(wgpu::MapMode::Read, 0..size, move |mapped| {
                if let Err(error) = mapped {
                    on_mapped.set(format!("{what} cannot be read: {error}"));
                }
            });
        })?;
        self.wait(device)?;
        let found = self.guard(|| {
            let found = buffer.get_mapped_range(0..size).map(|view| read(&view));
            buffer.unmap();
            found
        })?;
        self.check()?;
        found.map_err(|error| self.error(format!("{what} cannot be read: {error}")))
    }

    /// Notes a reason; the error for the first.
    fn error(&self, reason: String) -> KernelError {
        self.set(reason.clone());
        match self.check() {
            Err(first) => first,
            Ok(()) => KernelError::DeviceLost { device: self.device.clone(), reason },
        }
    }
}

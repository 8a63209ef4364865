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
                self.set(text.unwrap_or_else(|| "the driver's interface panicked".into()));
                self.check()?;
                unreachable!("a reason was set just now")
            }
        }
    }
}

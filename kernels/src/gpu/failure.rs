//! Whether the device still works, and why not.
//!
//! wgpu reports losses and errors through callbacks and panics where none is set. Here they leave a reason behind, and every
//! call that can fail looks for it. The first reason stays: what follows a loss is its consequence.
//!
//! A device may also stop without a word: not every driver resets one that hangs. So each wait for it has an end, and what was waited
//! for is the reason then. What such a device holds is never given back: that would be a wait without an end.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::KernelError;

/// How long a device may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For anything.
    pub(super) least: Duration,
    /// Multiply-adds a second below which no device is taken to work.
    pub(super) rate: u64,
}

impl Patience {
    /// A tenth of the slowest GPU that is of use.
    const HARDWARE: Self = Self { least: Duration::from_secs(30), rate: 10_000_000_000 };
    /// A software adapter compiles kernels when they first run, and shares its cores with everybody.
    const SOFTWARE: Self = Self { least: Duration::from_secs(300), rate: 50_000_000 };

    /// For so many multiply-adds.
    pub(super) fn with(self, work: u64) -> Duration {
        self.least.saturating_add(Duration::from_secs(work / self.rate))
    }
}

/// The reason why a device failed, if it did. Clones share it.
#[derive(Clone)]
pub(super) struct Failure {
    device: String,
    reason: Arc<Mutex<Option<String>>>,
    /// Whether a wait came to its end.
    is_silent: Arc<AtomicBool>,
    pub(super) patience: Patience,
}

impl Failure {
    /// Sets the device's callbacks.
    pub(super) fn watch(device: &wgpu::Device, name: &str, is_software: bool) -> Self {
        let patience = if is_software { Patience::SOFTWARE } else { Patience::HARDWARE };
        let failure = Self { device: name.to_string(), reason: Arc::default(), is_silent: Arc::default(), patience };
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

    /// Waits for a submission, or for the last one, that is `work` multiply-adds. `what` it is, for messages. wgpu panics on errors that
    /// it cannot report otherwise; that, too, is a lost device.
    pub(super) fn wait(
        &self,
        device: &wgpu::Device,
        submission_index: Option<wgpu::SubmissionIndex>,
        work: u64,
        what: &str,
    ) -> Result<(), KernelError> {
        let patience = self.patience.with(work);
        let wait = wgpu::PollType::Wait { submission_index, timeout: Some(patience) };
        self.guard(|| device.poll(wait)).and_then(|polled| {
            match polled {
                Ok(_) => {}
                Err(wgpu::PollError::Timeout) => {
                    self.is_silent.store(true, Ordering::Relaxed);
                    self.set(format!("it did not finish {what} within {} s", patience.as_secs_f64()));
                }
                Err(error) => self.set(error.to_string()),
            }
            self.check()
        })
    }

    /// Whether a wait for the device came to its end, and another one would.
    pub(super) fn is_silent(&self) -> bool {
        self.is_silent.load(Ordering::Relaxed)
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

    /// What `read` makes of the first `size` bytes of a buffer that can be mapped, after `wait` for what is submitted. `what` they are,
    /// for messages.
    pub(super) fn read<T>(
        &self,
        buffer: &wgpu::Buffer,
        size: u64,
        what: &'static str,
        wait: impl FnOnce() -> Result<(), KernelError>,
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
        wait()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_the_work_and_never_ends_in_an_overflow() {
        for patience in [Patience::HARDWARE, Patience::SOFTWARE] {
            assert_eq!(patience.with(0), patience.least);
            assert_eq!(patience.with(2 * patience.rate), patience.least + Duration::from_secs(2));
            assert!(patience.with(u64::MAX) > patience.least);
        }
    }
}

//! What can go wrong on a device.

use grokpipe_model::{Bytes, ModelError};
use thiserror::Error;

/// Why a device refused or failed.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Sizes that do not belong together.
    #[error("expected {expected} in {what}, found {found}")]
    Shape {
        /// Which operand.
        what: String,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// More memory than there is.
    #[error("{what} needs {}, {device} {}", Bytes(*needed_bytes), describe_available(*available_bytes))]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Bytes wanted.
        needed_bytes: u64,
        /// Bytes left; 0 when the device does not say.
        available_bytes: u64,
        /// Which device.
        device: String,
    },
    /// An adapter's limit that the model exceeds.
    #[error("{what} needs {limit} of at least {needed}, {device} offers {offered}")]
    Limit {
        /// What needs it.
        what: String,
        /// The limit's name in WebGPU.
        limit: &'static str,
        /// Value needed.
        needed: u64,
        /// Value offered.
        offered: u64,
        /// Which device.
        device: String,
    },
    /// No device of that name.
    #[error("no device matches {wanted:?}; there are {found}")]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// What there is, separated by commas.
        found: String,
    },
    /// The device failed during a step; everything on it is gone.
    #[error("{device} was lost: {reason}")]
    DeviceLost {
        /// Which device.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// Numbers that are not finite came out of a step.
    #[error("{what} is not finite at row {row}")]
    NotFinite {
        /// Which result.
        what: &'static str,
        /// Row of the batch.
        row: usize,
    },
    /// Reading weights failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// What a device has, where it says so.
fn describe_available(bytes: u64) -> String {
    if bytes == 0 { "does not say how much it has".to_owned() } else { format!("has {}", Bytes(bytes)) }
}

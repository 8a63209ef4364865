//! How fast layers run, alone and in a pipeline; how fast products are; and what speed costs in quality.
//!
//! Measures and counts; whoever calls chooses what is measured, checks it, and shows the reports. [`pipeline`] drives real workers
//! through the coordinator's own port, planner and messages, so that a change of the protocol is made once. Nothing here knows flags,
//! processes or terminals.

mod error;
mod inputs;
pub mod kernels;
pub mod pipeline;
pub mod precision;
mod reads;
mod spread;
pub mod stage;

use std::ops::Range;

pub use error::BenchError;
pub use reads::{COUNTED, Reads};
pub use spread::{Spread, median};

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loading {
    /// Some bytes are on the device.
    Bytes {
        /// How many.
        loaded: u64,
        /// How many there will be.
        total: u64,
    },
    /// Everything is loaded; what follows is timed.
    Done,
}

/// Decode steps before the ones that count: caches, clocks and page tables settle.
pub const WARM_UP_STEPS: u32 = 2;
/// Most rows of a prefill step.
const CHUNK_ROWS: u32 = 512;

/// The positions of a prompt, a step's at a time.
fn chunks(prompt: u32) -> impl Iterator<Item = Range<u32>> {
    (0..prompt).step_by(CHUNK_ROWS as usize).map(move |first| first..prompt.min(first + CHUNK_ROWS))
}

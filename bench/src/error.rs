//! Why a benchmark gave no report.

use std::io;

use grokpipe_coordinator::planner::Refusal;
use grokpipe_kernels::KernelError;
use grokpipe_model::ModelError;

/// What ended a benchmark.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The model's files are wrong.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device cannot do this.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The system gives no port.
    #[error("no port could be opened on 127.0.0.1: {0}")]
    Listen(io::Error),
    /// The planner prices nothing.
    #[error("no prediction can be made: {0}")]
    NoPrediction(Refusal),
    /// A worker's process could not be started.
    #[error("worker {name} cannot be started: {source}")]
    NotStarted {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// A worker's process ended before the benchmark did.
    #[error("worker {name} {how}")]
    Exited {
        /// Its name.
        name: String,
        /// Its exit code, if no signal ended it.
        code: Option<i32>,
        /// For people.
        how: String,
    },
    /// A worker reads no orders.
    #[error("worker {0} takes no orders")]
    NoOrders(String),
    /// The link to a first stage cannot be opened.
    #[error("a worker takes no frames: {0}")]
    NoLink(String),
    /// A stage could not be made ready, or broke.
    #[error("worker {name}: {message}")]
    StageFailed {
        /// The worker's name.
        name: String,
        /// What it said.
        message: String,
        /// Whether the worker reported that memory does not suffice.
        is_out_of_memory: bool,
    },
    /// A worker left, a link broke, or a frame was refused.
    #[error("the workers failed: {0}")]
    Workers(String),
    /// Something took far longer than it may.
    #[error("waited too long for {0}")]
    TimedOut(String),
    /// The last stage's output cannot be decoded.
    #[error("the last stage handed on hidden states that no stage would take: {0}")]
    HiddenStates(String),
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
}

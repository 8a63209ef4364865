//! What a worker needs of its device and its model before it has a stage: facts for the hello, and the loading itself.
//!
//! A trait, so that a simulated cluster can load without files and devices.

use std::{collections::BTreeMap, ops::Range};

use grokpipe_kernels::{FormatRate, KernelError, Stage, StepOverhead};
use grokpipe_model::ModelConfig;
use grokpipe_proto::probe::DescribeMachine;

/// What the device is and can do, measured once at start.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceFacts {
    /// For people.
    pub name: String,
    /// Equal fingerprints give equal bits.
    pub fingerprint: String,
    /// Bytes that weights, KV and scratch may take.
    pub memory_bytes: u64,
    /// Bytes a second, whatever the format.
    pub read_bandwidth: f64,
    /// Multiply-adds times two a second, whatever the format.
    pub flop_rate: f64,
    /// Rates of products by format, of those that the model has; see [`grokpipe_model::Format::name`].
    pub format_rates: BTreeMap<String, FormatRate>,
    /// Fixed costs of a step, without reading and multiplying weights.
    pub overhead: StepOverhead,
    /// Seconds that drawing a token takes.
    pub draw_seconds: f64,
    /// What the checks at join found, for people.
    pub notes: Vec<String>,
}

/// Which layers to load, and how much room beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRequest {
    /// The layers.
    pub layers: Range<u32>,
    /// Blocks of the KV pool.
    pub kv_blocks: u32,
    /// Most tokens in a frame.
    pub max_batch_tokens: usize,
}

/// Loads stages of one model onto one device.
pub trait StageLoader: Send + 'static {
    /// The device.
    fn device(&self) -> &DeviceFacts;

    /// The model's sizes.
    fn config(&self) -> &ModelConfig;

    /// The model's digest, equal on every node that has the same model.
    fn model_digest(&self) -> &str;

    /// Bytes that these layers would take on the device, weights and KV; `None` where that is not known beforehand.
    fn memory_needed(&self, request: &LoadRequest) -> Option<u64> {
        let _ = request;
        None
    }

    /// Opens what a load would read, and reads none of it.
    ///
    /// # Errors
    /// [`KernelError`] naming what cannot be read.
    fn check_readable(&self, request: &LoadRequest) -> Result<(), KernelError> {
        let _ = request;
        Ok(())
    }

    /// How to describe this machine; `None` where there is none to speak of.
    fn describe_machine(&self) -> Option<DescribeMachine> {
        None
    }

    /// Loads layers; `progress` is told the bytes done and the bytes in all.
    ///
    /// # Errors
    /// [`KernelError`] naming the tensor or the memory that is missing.
    fn load(
        &mut self,
        request: &LoadRequest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn Stage>, KernelError>;
}

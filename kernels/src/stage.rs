//! A stage as its worker sees it: some layers on some device, behind one call.

use grokpipe_model::contents::PartSum;

use crate::{Batch, DeviceInfo, KernelError};

/// What enters a step.
#[derive(Clone, Copy, Debug)]
pub enum StepInput<'a> {
    /// Token ids, one a row: the first stage gathers their embedding rows on the host.
    TokenIds(&'a [u32]),
    /// Residual stream after the previous stage, `[rows, hidden_size]`.
    HiddenStates(&'a [f32]),
}

/// What leaves a step.
#[derive(Clone, Debug, PartialEq)]
pub enum StepOutput {
    /// Residual stream after this stage, `[rows, hidden_size]`.
    HiddenStates(Vec<f32>),
    /// Logits of the wanted rows, `[wanted.len(), vocab_size]`; only from a stage that has the head.
    Logits(Vec<f32>),
}

/// Layers on a device, with their KV pool.
pub trait Stage: Send {
    /// Runs the layers over the batch. `wanted` are rows of the batch, ascending; ignored without the head.
    /// The same batch, pool contents and input give the same bits, alone or among other rows and whichever are wanted; in steps of
    /// [`DeviceInfo::invariant_below`] rows and more they may depend on both.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the input does not fit the batch; [`KernelError::DeviceLost`], [`KernelError::NotFinite`].
    fn run(&mut self, batch: &Batch, input: StepInput<'_>, wanted: &[u32]) -> Result<StepOutput, KernelError>;

    /// The device.
    fn device(&self) -> &DeviceInfo;

    /// Bytes of weights on the device.
    fn weights_bytes(&self) -> u64;

    /// Bytes of the KV pool on the device.
    fn kv_bytes(&self) -> u64;

    /// Sums of the numbers that were loaded, a layer each; none of weights that are not stored anywhere.
    fn contents(&self) -> &[PartSum] {
        &[]
    }

    /// See [`Backend::measure_read_bandwidth`](crate::Backend::measure_read_bandwidth).
    ///
    /// # Errors
    /// As there.
    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError>;
}

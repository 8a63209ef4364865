//! Grok-1's forward pass, written once for every device.
//!
//! [`StageModel`] owns a backend, the weights of a range of layers, and a KV pool; [`Stage::run`] is one step. What enters and
//! leaves is checked here (sizes, slots, positions; finite numbers), so that a backend may take them for granted. Which rows make a
//! step is the coordinator's decision.
//!
//! Nothing of a step is kept but keys and values, and these are seen only through block tables: after a new epoch a stage is
//! used on as it is. A position's slot is written, and its mark set, in the step that computes it, before anything reads it.

mod layers;
mod memory;
mod validate;

use std::{ops::Range, sync::Arc};

use grokpipe_model::{ModelConfig, WeightSource, contents::PartSum};

pub(crate) use self::layers::Layers;
pub use self::memory::MemoryNeed;
use crate::{Backend, Batch, DeviceInfo, KernelError, Stage, StepInput, StepOutput};

/// What a stage is to be able to do; decides its memory beside the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOptions {
    /// Blocks of [`crate::KV_BLOCK_TOKENS`] tokens in the KV pool.
    pub kv_blocks: u32,
    /// Most rows in a step.
    pub max_rows: usize,
    /// Whether a range that ends with the last layer also has the head. Without it such a stage gives hidden states.
    pub head: bool,
    /// Rows of logits that are computed at a time. A step may want more; it then takes several passes over the head.
    pub logit_rows: usize,
}

impl Default for StageOptions {
    fn default() -> Self {
        Self { kv_blocks: 512, max_rows: 512, head: true, logit_rows: grokpipe_model::footprint::LOGIT_ROWS }
    }
}

impl StageOptions {
    /// Whether a stage of these layers has the head.
    pub fn has_head(&self, config: &ModelConfig, layers: &Range<u32>) -> bool {
        self.head && layers.end == config.num_hidden_layers
    }
}

/// What happened inside a step, for parity checks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Residual stream after each layer, `[layers, rows, hidden_size]`.
    pub hidden: Vec<f32>,
    /// Chosen experts, best first, `[layers, rows, num_experts_per_tok]`.
    pub expert_ids: Vec<u32>,
    /// Their probabilities, not renormalised, as `expert_ids`.
    pub expert_probabilities: Vec<f32>,
}

/// A stage that can also tell what happened inside a step.
pub trait TracedStage: Stage {
    /// As [`Stage::run`], slower, with what happened inside.
    ///
    /// # Errors
    /// As [`Stage::run`].
    fn run_traced(
        &mut self,
        batch: &Batch,
        input: StepInput<'_>,
        wanted: &[u32],
    ) -> Result<(StepOutput, Trace), KernelError>;
}

/// Some layers on a device.
pub struct StageModel<B: Backend> {
    backend: B,
    layers: Layers<B>,
    weights: Arc<dyn WeightSource>,
    need: MemoryNeed,
}

impl<B: Backend> StageModel<B> {
    /// Loads `layers` of a model, and the head if it belongs to them. `progress` is told the bytes done and the total, as stored.
    /// `weights` is kept by a stage that begins with layer 0: it gathers embedding rows from it.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the range or a tensor does not fit the configuration, [`KernelError::Model`] when reading fails,
    /// [`KernelError::OutOfMemory`] or [`KernelError::Limit`] when it does not fit on the device.
    pub fn load(
        mut backend: B,
        config: &ModelConfig,
        weights: Arc<dyn WeightSource>,
        layers: Range<u32>,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, KernelError> {
        let need = Self::memory_needed(config, weights.as_ref(), layers.clone(), options);
        // Formats that take more than in the file are found out matrix by matrix.
        need.check(&layers, backend.info().memory_bytes, &backend.info().name)?;
        let layers = Layers::load(&mut backend, config, weights.as_ref(), layers, options, progress)?;
        Ok(Self { backend, layers, weights, need })
    }

    /// Memory of a stage's weights and KV on a device, without a device.
    pub fn memory_needed(
        config: &ModelConfig,
        weights: &dyn WeightSource,
        layers: Range<u32>,
        options: StageOptions,
    ) -> MemoryNeed {
        let stored_bytes = weights.stored_bytes(layers.clone(), options.has_head(config, &layers));
        MemoryNeed::new(config, stored_bytes, layers, options)
    }

    fn step(
        &mut self,
        batch: &Batch,
        input: StepInput<'_>,
        wanted: &[u32],
        trace: Option<&mut Trace>,
    ) -> Result<StepOutput, KernelError> {
        self.layers.run(&mut self.backend, self.weights.as_ref(), batch, input, wanted, trace)
    }
}

impl<B: Backend> Stage for StageModel<B> {
    fn run(&mut self, batch: &Batch, input: StepInput<'_>, wanted: &[u32]) -> Result<StepOutput, KernelError> {
        self.step(batch, input, wanted, None)
    }

    fn device(&self) -> &DeviceInfo {
        self.backend.info()
    }

    fn weights_bytes(&self) -> u64 {
        self.need.weights_bytes
    }

    fn kv_bytes(&self) -> u64 {
        self.need.kv_bytes
    }

    fn contents(&self) -> &[PartSum] {
        self.layers.contents()
    }

    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError> {
        self.backend.measure_read_bandwidth(most_bytes)
    }
}

impl<B: Backend> TracedStage for StageModel<B> {
    fn run_traced(
        &mut self,
        batch: &Batch,
        input: StepInput<'_>,
        wanted: &[u32],
    ) -> Result<(StepOutput, Trace), KernelError> {
        let mut trace = Trace::default();
        let output = self.step(batch, input, wanted, Some(&mut trace))?;
        Ok((output, trace))
    }
}

#[cfg(test)]
mod tests;

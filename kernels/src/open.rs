//! Opens a device by name, so that nobody above this crate needs to know which backend it is.
//!
//! `auto`: a hardware GPU if there is one, else the CPU. `gpu`: the best adapter, a software one too. `gpu:WHICH`: an adapter by its
//! index, its PCI address or a part of its name. `cpu`.

use std::{ops::Range, sync::Arc};

use grokpipe_model::{MatrixSpec, ModelConfig, WeightSource};

use crate::{
    Backend, BatchInvariance, CpuBackend, DeviceInfo, FormatRate, GpuBackend, GpuChoice, GpuOptions, KernelError,
    Precision, Prefill, ProductShape, ProductTime, Stage, StageModel, StageOptions, StepOverhead, TracedStage,
    bench::time_products,
    check_batch_invariance,
    measure::{measure_format, measure_overhead},
};

/// A device that was opened and has not loaded anything.
pub trait Device: Send {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// See [`Backend::measure_read_bandwidth`].
    ///
    /// # Errors
    /// As there.
    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError>;

    /// See [`Backend::measure_flop_rate`].
    ///
    /// # Errors
    /// As there.
    fn measure_flop_rate(&mut self) -> Result<f64, KernelError>;

    /// See [`Backend::held_bytes`].
    fn held_bytes(&self, spec: &MatrixSpec) -> u64;

    /// See [`check_batch_invariance`].
    ///
    /// # Errors
    /// As there.
    fn check_batch_invariance(&mut self) -> Result<BatchInvariance, KernelError>;

    /// Times products of so many rows each, `passes` times.
    ///
    /// # Errors
    /// [`KernelError`] when the matrices do not fit or the device fails.
    fn time_products(
        &mut self,
        shape: ProductShape,
        rows: &[usize],
        passes: usize,
    ) -> Result<Vec<ProductTime>, KernelError>;

    /// Measures products with a matrix of this shape, of which the model has `stored_bytes` in all: a fraction of a second.
    ///
    /// # Errors
    /// [`KernelError`] when the matrices do not fit or the device fails.
    fn measure_format(&mut self, shape: ProductShape, stored_bytes: u64) -> Result<FormatRate, KernelError>;

    /// Measures the fixed costs of a step, without reading and multiplying weights.
    ///
    /// # Errors
    /// [`KernelError`] when the device fails.
    fn measure_overhead(&mut self) -> Result<StepOverhead, KernelError>;

    /// Loads layers; the device belongs to the stage from then on. See [`StageModel::load`].
    ///
    /// # Errors
    /// As there.
    fn load(
        self: Box<Self>,
        config: &ModelConfig,
        weights: Arc<dyn WeightSource>,
        layers: Range<u32>,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn Stage>, KernelError>;

    /// As [`Device::load`], for a stage that can tell what happens inside.
    ///
    /// # Errors
    /// As there.
    fn load_traced(
        self: Box<Self>,
        config: &ModelConfig,
        weights: Arc<dyn WeightSource>,
        layers: Range<u32>,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn TracedStage>, KernelError>;
}

/// A backend as a [`Device`].
struct Opened<B>(B);

impl<B: Backend> Device for Opened<B> {
    fn info(&self) -> &DeviceInfo {
        self.0.info()
    }

    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError> {
        self.0.measure_read_bandwidth(most_bytes)
    }

    fn measure_flop_rate(&mut self) -> Result<f64, KernelError> {
        self.0.measure_flop_rate()
    }

    fn held_bytes(&self, spec: &MatrixSpec) -> u64 {
        self.0.held_bytes(spec)
    }

    fn check_batch_invariance(&mut self) -> Result<BatchInvariance, KernelError> {
        check_batch_invariance(&mut self.0)
    }

    fn time_products(
        &mut self,
        shape: ProductShape,
        rows: &[usize],
        passes: usize,
    ) -> Result<Vec<ProductTime>, KernelError> {
        time_products(&mut self.0, shape, rows, passes)
    }

    fn measure_format(&mut self, shape: ProductShape, stored_bytes: u64) -> Result<FormatRate, KernelError> {
        measure_format(&mut self.0, shape, stored_bytes)
    }

    fn measure_overhead(&mut self) -> Result<StepOverhead, KernelError> {
        measure_overhead(&mut self.0)
    }

    fn load(
        self: Box<Self>,
        config: &ModelConfig,
        weights: Arc<dyn WeightSource>,
        layers: Range<u32>,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn Stage>, KernelError> {
        Ok(Box::new(StageModel::load(self.0, config, weights, layers, options, progress)?))
    }

    fn load_traced(
        self: Box<Self>,
        config: &ModelConfig,
        weights: Arc<dyn WeightSource>,
        layers: Range<u32>,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn TracedStage>, KernelError> {
        Ok(Box::new(StageModel::load(self.0, config, weights, layers, options, progress)?))
    }
}

/// A backend as a device, for those who opened one themselves.
pub fn device<B: Backend>(backend: B) -> Box<dyn Device> {
    Box::new(Opened(backend))
}

/// What a device may be, for messages.
pub const DEVICES: &str = "auto, cpu, gpu, gpu:INDEX, gpu:PCI ADDRESS or gpu:PART OF ITS NAME";

/// The adapters that a device's name accepts; `None` where it accepts none at all.
pub fn gpu_choice(spec: &str) -> Option<GpuChoice> {
    match spec {
        "auto" => Some(GpuChoice::Hardware),
        "gpu" => Some(GpuChoice::Best),
        _ => spec.strip_prefix("gpu:").filter(|which| !which.trim().is_empty()).map(GpuChoice::of),
    }
}

/// Opens the device that `spec` names, see [`DEVICES`]. `threads`, at least one, is for the CPU, `prefill` for GPUs.
///
/// # Errors
/// [`KernelError::NoDevice`] when `spec` is none of these, or no adapter matches.
pub fn select_device(
    spec: &str,
    threads: usize,
    precision: Precision,
    prefill: Prefill,
) -> Result<Box<dyn Device>, KernelError> {
    let cpu = || CpuBackend::new(threads, precision).map(device);
    if spec == "cpu" {
        return cpu();
    }
    let Some(choice) = gpu_choice(spec) else {
        return Err(KernelError::NoDevice { wanted: spec.to_owned(), found: DEVICES.to_owned() });
    };
    let options = GpuOptions { precision, prefill, ..GpuOptions::default() };
    match GpuBackend::open_with(&choice, &options) {
        Ok(gpu) => Ok(device(gpu)),
        Err(KernelError::NoDevice { .. }) if choice == GpuChoice::Hardware => cpu(),
        Err(error) if choice == GpuChoice::Hardware => {
            tracing::warn!(%error, "the GPU cannot be used, taking the CPU");
            cpu()
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_opened_by_name() {
        let mut cpu = select_device("cpu", 2, Precision::Exact, Prefill::Fast).unwrap();
        assert!(!cpu.info().is_gpu);
        assert!(cpu.check_batch_invariance().unwrap().holds());
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_there_are() {
        for wanted in ["", "cuda", "gpu:", "CPU"] {
            let error = select_device(wanted, 1, Precision::Exact, Prefill::Invariant).err().unwrap().to_string();
            assert!(error.contains(DEVICES), "{error}");
        }
    }
}

//! What a worker measures of its device before it joins, for the coordinator's plan: products by format, and what a step costs
//! beside them.
//!
//! Only formats that the model has are measured, with matrices no larger than the model's, so that joining takes no longer than
//! it must.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use grokpipe_kernels::{Device, FormatRate, ProductShape, StepOverhead, settled};
use grokpipe_model::{MatrixSpec, TensorName, layer_matrices};
use grokpipe_worker::sampler::{self, Sampling};
use tracing::debug;

use crate::{error::CliError, weights::Weights};

/// Draws of which the median counts.
const DRAWS: usize = 5;

/// What was measured.
pub(crate) struct Rates {
    /// Bytes a second, whatever the format.
    pub(crate) read_bandwidth: f64,
    /// Multiply-adds times two a second, whatever the format.
    pub(crate) flop_rate: f64,
    /// By name of the format.
    pub(crate) formats: BTreeMap<String, FormatRate>,
    /// Of a step and of a layer.
    pub(crate) overhead: StepOverhead,
    /// Seconds that drawing a token takes.
    pub(crate) draw_seconds: f64,
}

impl Rates {
    /// Measures now, with no more than `most_bytes` of memory at a time, or the least that a measurement takes.
    ///
    /// # Errors
    /// What the device reports.
    pub(crate) fn measure(
        device: &mut dyn Device,
        weights: &Weights,
        layers: &[MatrixSpec],
        most_bytes: u64,
    ) -> Result<Self, CliError> {
        let started = Instant::now();
        let rates = settled(device, |device| Self::measure_once(device, weights, layers, most_bytes))?;
        let Self { formats, overhead, draw_seconds, .. } = &rates;
        debug!(
            milliseconds = started.elapsed().as_millis() as u64,
            ?formats,
            ?overhead,
            draw_seconds,
            "device measured"
        );
        Ok(rates)
    }

    fn measure_once(
        device: &mut dyn Device,
        weights: &Weights,
        layers: &[MatrixSpec],
        most_bytes: u64,
    ) -> Result<Self, CliError> {
        let (read_bandwidth, flop_rate) = (device.measure_read_bandwidth(most_bytes)?, device.measure_flop_rate()?);
        let head = weights.source.matrix(&TensorName::Head)?;
        let mut formats = BTreeMap::new();
        for (name, (shape, bytes)) in formats_of(layers.iter().chain([head.spec()])) {
            formats.insert(name, device.measure_format(shape, bytes.min(most_bytes))?);
        }
        let overhead = device.measure_overhead()?;
        let draw_seconds = draw_seconds(weights.config.vocab_size).as_secs_f64();
        Ok(Self { read_bandwidth, flop_rate, formats, overhead, draw_seconds })
    }
}

/// The matrices of all layers.
///
/// # Errors
/// What is wrong with the model.
pub(crate) fn all_matrices(weights: &Weights) -> Result<Vec<MatrixSpec>, CliError> {
    let mut specs = Vec::new();
    for layer in 0..weights.config.num_hidden_layers {
        specs.extend(layer_matrices(weights.source.as_ref(), layer)?);
    }
    Ok(specs)
}

/// Of each format the shape of the matrices that take the most bytes, and the bytes of all.
fn formats_of<'a>(specs: impl Iterator<Item = &'a MatrixSpec>) -> BTreeMap<String, (ProductShape, u64)> {
    let mut shapes: BTreeMap<String, Vec<(ProductShape, u64)>> = BTreeMap::new();
    for spec in specs {
        let shape = ProductShape { format: spec.format, inputs: spec.inputs, outputs: spec.outputs };
        let of_format = shapes.entry(spec.format.name()).or_default();
        match of_format.iter_mut().find(|(known, _)| *known == shape) {
            Some((_, bytes)) => *bytes += spec.stored_bytes(),
            None => of_format.push((shape, spec.stored_bytes())),
        }
    }
    let most = |(name, shapes): (String, Vec<(ProductShape, u64)>)| {
        let bytes = shapes.iter().map(|(_, bytes)| bytes).sum();
        let (shape, _) = shapes.into_iter().max_by_key(|(_, bytes)| *bytes)?;
        Some((name, (shape, bytes)))
    };
    shapes.into_iter().filter_map(most).collect()
}

/// The median of a few draws, each the greedy choice of so many logits with its probability.
fn draw_seconds(vocab_size: usize) -> Duration {
    let logits: Vec<f32> = (0..vocab_size).map(|id| (id * 7919 % 1000) as f32 / 100.0).collect();
    let mut times: Vec<Duration> = (0..DRAWS)
        .map(|position| {
            let started = Instant::now();
            let drawn = sampler::draw(&logits, &Sampling::greedy(), 0, position as u32);
            // Finite logits can always be drawn from.
            std::hint::black_box(drawn.ok());
            started.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[DRAWS / 2]
}

#[cfg(test)]
mod tests {
    use std::{ops::Range, sync::Arc};

    use grokpipe_kernels::{
        BatchInvariance, DeviceInfo, KernelError, Precision, Prefill, ProductTime, Stage, StageOptions, TracedStage,
        select_device,
    };
    use grokpipe_model::{BlockType, ModelConfig, WeightSource};

    use super::*;
    use crate::weights::Shape;

    fn measured(kind: Option<BlockType>) -> Rates {
        let weights = Weights::synthetic(Shape::Tiny, kind, None).unwrap();
        let specs = all_matrices(&weights).unwrap();
        let mut device = select_device("cpu", 1, Precision::Fast, Prefill::Invariant).unwrap();
        Rates::measure(device.as_mut(), &weights, &specs, u64::MAX).unwrap()
    }

    #[test]
    fn the_formats_of_the_model_and_no_others_are_measured() {
        for (kind, expected) in [(None, ["f32", "int8"]), (Some(BlockType::Q4_0), ["f32", "q4_0"])] {
            let rates = measured(kind);
            assert_eq!(rates.formats.keys().collect::<Vec<_>>(), expected);
            assert!(rates.formats.values().all(|rate| rate.decode_bytes_per_second > 0.0));
            assert!(rates.draw_seconds > 0.0 && rates.overhead.layer_seconds >= 0.0);
        }
    }

    /// Does 2 GFLOP/s until a format is measured, and half from then on: with kernels of another name.
    struct Refusing(DeviceInfo);

    impl Refusing {
        fn rate(&self) -> f64 {
            if self.0.fingerprint == "fast" { 2e9 } else { 1e9 }
        }
    }

    impl Device for Refusing {
        fn info(&self) -> &DeviceInfo {
            &self.0
        }
        fn measure_read_bandwidth(&mut self, _: u64) -> Result<f64, KernelError> {
            Ok(1e9)
        }
        fn measure_flop_rate(&mut self) -> Result<f64, KernelError> {
            Ok(self.rate())
        }
        fn measure_format(&mut self, _: ProductShape, _: u64) -> Result<FormatRate, KernelError> {
            let rate = self.rate();
            self.0.fingerprint = "usual".into();
            Ok(FormatRate { decode_bytes_per_second: 1e9, prefill_flops_per_second: rate })
        }
        fn measure_overhead(&mut self) -> Result<StepOverhead, KernelError> {
            Ok(StepOverhead::default())
        }
        fn held_bytes(&self, _: &MatrixSpec) -> u64 {
            unreachable!("nothing is loaded")
        }
        fn check_batch_invariance(&mut self) -> Result<BatchInvariance, KernelError> {
            unreachable!("nothing is checked")
        }
        fn time_products(&mut self, _: ProductShape, _: &[usize], _: usize) -> Result<Vec<ProductTime>, KernelError> {
            unreachable!("no benchmark")
        }
        fn load(
            self: Box<Self>,
            _: &ModelConfig,
            _: Arc<dyn WeightSource>,
            _: Range<u32>,
            _: StageOptions,
            _: &mut dyn FnMut(u64, u64),
        ) -> Result<Box<dyn Stage>, KernelError> {
            unreachable!("nothing is loaded")
        }
        fn load_traced(
            self: Box<Self>,
            _: &ModelConfig,
            _: Arc<dyn WeightSource>,
            _: Range<u32>,
            _: StageOptions,
            _: &mut dyn FnMut(u64, u64),
        ) -> Result<Box<dyn TracedStage>, KernelError> {
            unreachable!("nothing is loaded")
        }
    }

    #[test]
    fn what_was_measured_before_a_driver_refused_a_format_does_not_count() {
        let weights = Weights::synthetic(Shape::Tiny, Some(BlockType::Q4_0), None).unwrap();
        let specs = all_matrices(&weights).unwrap();
        let info = DeviceInfo {
            name: "a GPU".into(),
            is_gpu: true,
            fingerprint: "fast".into(),
            memory_bytes: 0,
            invariant_below: Some(32),
        };
        let rates = Rates::measure(&mut Refusing(info), &weights, &specs, u64::MAX).unwrap();
        assert_eq!(rates.flop_rate, 1e9);
        assert!(rates.formats.values().all(|rate| rate.prefill_flops_per_second == 1e9), "{:?}", rates.formats);
    }

    #[test]
    fn a_format_is_measured_by_its_heaviest_shape() {
        let weights = Weights::synthetic(Shape::Grok1, Some(BlockType::Q4K), None).unwrap();
        let specs = layer_matrices(weights.source.as_ref(), 0).unwrap();
        let formats = formats_of(specs.iter());
        let (shape, bytes) = formats["q4_k"];
        assert_eq!((shape.inputs, shape.outputs), (6144, 32_768), "gate and up together outweigh down");
        let numbers = 8 * 3 * 6144 * 32_768 + 88_080_384_u64;
        assert_eq!(bytes, numbers / 256 * 144);
    }
}

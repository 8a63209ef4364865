//! How fast a device multiplies by a model's matrices, format by format, and the fixed costs of a step: what a plan needs to predict.
//!
//! Measured with the kernels that the steps run, at the device's precision, in a fraction of a second each. Where all of a model's
//! matrices of a format fit into a cache they are measured there, as they will be used; else enough of them that they do not fit.

use std::time::Instant;

use grokpipe_model::ModelConfig;

use crate::{
    Backend, KernelError, ProductShape, StageOptions, StepInput, SyntheticWeights,
    batch::single_tokens,
    bench::{matrix_bytes, median, time_copies},
    forward::Layers,
};

/// Stored bytes that decodes are measured with at most: twice the last-level cache of ordinary machines.
const DECODE_BYTES: u64 = 64 << 20;
/// Numbers of the matrix that prefills are measured with at most: arithmetic counts there, not where they lie.
const PREFILL_NUMBERS: usize = 2 << 20;
/// Rows of a measured prefill.
const PREFILL_ROWS: usize = 64;
/// Outputs that a matrix keeps when it is cut: kernels work on so many at a time.
const OUTPUTS_MIN: usize = 64;
/// Times that a product is measured; the median counts.
const PASSES: usize = 3;
/// Steps of a small stage, of which the median counts.
const STEPS: usize = 21;

/// How fast products with matrices of one format are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FormatRate {
    /// Stored bytes of weights a second when one row is multiplied.
    pub decode_bytes_per_second: f64,
    /// Multiply-adds times two a second when many rows are multiplied.
    pub prefill_flops_per_second: f64,
}

/// Fixed costs of a step of one token, without reading and multiplying weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOverhead {
    /// Seconds a step.
    pub step_seconds: f64,
    /// Seconds a layer.
    pub layer_seconds: f64,
}

/// Measures products with a matrix of this shape, of which the model has `stored_bytes` in all.
///
/// # Errors
/// [`KernelError`] when the matrices do not fit or the device fails.
pub(crate) fn measure_format<B: Backend>(
    backend: &mut B,
    shape: ProductShape,
    stored_bytes: u64,
) -> Result<FormatRate, KernelError> {
    let bytes = stored_bytes.clamp(1, DECODE_BYTES);
    let a_column = (matrix_bytes(shape) / shape.outputs.max(1) as u64).max(1);
    let most = (bytes / a_column).max(OUTPUTS_MIN as u64) as usize;
    let decode = ProductShape { outputs: shape.outputs.min(most), ..shape };
    let most = (PREFILL_NUMBERS / shape.inputs.max(1)).max(OUTPUTS_MIN);
    let prefill = ProductShape { outputs: shape.outputs.min(most), ..shape };
    let seconds = |backend: &mut B, shape, bytes, rows| -> Result<(u64, f64), KernelError> {
        let times = time_copies(backend, shape, bytes, &[rows], PASSES)?;
        // A clock that saw no time pass must not make a rate without end.
        Ok(times.first().map_or((0, 1.0), |time| (time.bytes, time.seconds.max(1e-9))))
    };
    let (read, decode_seconds) = seconds(backend, decode, bytes, 1)?;
    let (_, prefill_seconds) = seconds(backend, prefill, 1, PREFILL_ROWS)?;
    let work = 2.0 * (PREFILL_ROWS * prefill.inputs * prefill.outputs) as f64;
    Ok(FormatRate {
        decode_bytes_per_second: read as f64 / decode_seconds,
        prefill_flops_per_second: work / prefill_seconds,
    })
}

/// Measures steps through layers so small that their numbers cost nothing.
///
/// # Errors
/// [`KernelError`] when the device fails.
pub(crate) fn measure_overhead<B: Backend>(backend: &mut B) -> Result<StepOverhead, KernelError> {
    const LAYERS: u32 = 5;
    let (one, all) = (small_step(backend, 1)?, small_step(backend, LAYERS)?);
    let layer_seconds = ((all - one) / f64::from(LAYERS - 1)).max(0.0);
    Ok(StepOverhead { step_seconds: (one - layer_seconds).max(0.0), layer_seconds })
}

/// Seconds of a step of one token through so many small layers.
fn small_step<B: Backend>(backend: &mut B, layers: u32) -> Result<f64, KernelError> {
    let config = ModelConfig {
        name: "overhead".into(),
        vocab_size: 64,
        hidden_size: 32,
        num_hidden_layers: layers,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 16,
        intermediate_size: 32,
        // Groups of whole blocks, as in Grok-1: what rounds inputs to 8 bits is part of what is measured.
        scale_groups_row_parallel: 1,
        ..ModelConfig::grok_1()
    };
    let weights = SyntheticWeights::new(config.clone(), 1);
    let options = StageOptions { kv_blocks: 1, max_rows: 1, head: false, logit_rows: 1 };
    let mut stage = Layers::load(backend, &config, &weights, 0..layers, options, &mut |_, _| ())?;
    let batch = single_tokens(1);
    let mut seconds = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let started = Instant::now();
        stage.run(backend, &weights, &batch, StepInput::TokenIds(&[1]), &[], None)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(median(seconds))
}

#[cfg(test)]
mod tests {
    use grokpipe_model::{BlockType, Format};

    use super::*;

    #[test]
    fn every_format_has_a_rate_on_the_cpu() {
        let formats = BlockType::all().map(Format::Blocks).chain([Format::F32, Format::Int8 { groups: 1 }]);
        let formats: Vec<Format> = formats.collect();
        for backend in &mut crate::cpu::tests::backends() {
            for &format in &formats {
                let shape = ProductShape { format, inputs: 256, outputs: 64 };
                let FormatRate { decode_bytes_per_second, prefill_flops_per_second } =
                    measure_format(backend, shape, 1 << 16).unwrap();
                for rate in [decode_bytes_per_second, prefill_flops_per_second] {
                    assert!(rate.is_finite() && rate > 0.0, "{format}: {rate}");
                }
            }
            let overhead = measure_overhead(backend).unwrap();
            assert!(overhead.step_seconds >= 0.0 && overhead.layer_seconds >= 0.0, "{overhead:?}");
        }
    }
}

//! Times products alone, format by format: what a device makes of its memory and its arithmetic, without a model around them.
//!
//! Enough copies of a matrix are multiplied in turn that none is still in a cache when its turn comes again. Decides nothing about
//! what the times are compared with.

use std::time::Instant;

use grokpipe_model::{Format, Layout, MatrixSpec};

use crate::{Backend, KV_BLOCK_TOKENS, KernelError, batch::single_tokens, synthetic::SyntheticMatrix};

/// Stored bytes of all copies together, at least: several times the last-level cache of ordinary machines.
const ALL_BYTES: u64 = 384 << 20;
/// Most copies. Of matrices so small that these do not fill the caches, what is timed is their own cost.
const COPIES_MAX: u64 = 4096;

/// A product to be timed: `rows` times one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductShape {
    /// How the matrix is stored.
    pub format: Format,
    /// Length of a row.
    pub inputs: usize,
    /// Outputs.
    pub outputs: usize,
}

/// What one product took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductTime {
    /// Rows that were multiplied.
    pub rows: usize,
    /// Stored bytes of the matrix with its scales.
    pub bytes: u64,
    /// Seconds of one product: the median of several passes over all copies, by the device's own clock where it has one and a pass is
    /// one submission.
    pub seconds: f64,
}

/// Times products of so many rows each, `passes` times.
///
/// # Errors
/// [`KernelError`] when the copies do not fit or the device fails.
pub(crate) fn time_products<B: Backend>(
    backend: &mut B,
    shape: ProductShape,
    rows: &[usize],
    passes: usize,
) -> Result<Vec<ProductTime>, KernelError> {
    time_copies(backend, shape, ALL_BYTES, rows, passes)
}

/// Stored bytes of the matrix with its scales.
pub(crate) fn matrix_bytes(shape: ProductShape) -> u64 {
    spec(shape).stored_bytes()
}

fn spec(ProductShape { format, inputs, outputs }: ProductShape) -> MatrixSpec {
    let layout = if matches!(format, Format::Int8 { .. }) { Layout::InOut } else { Layout::OutIn };
    let name = format!("a matrix of {inputs} by {outputs}");
    MatrixSpec { name, experts: 1, inputs, outputs, format, layout }
}

/// As [`time_products`], with copies that take `all_bytes` together, but at least one.
///
/// # Errors
/// As there.
pub(crate) fn time_copies<B: Backend>(
    backend: &mut B,
    shape: ProductShape,
    all_bytes: u64,
    rows: &[usize],
    passes: usize,
) -> Result<Vec<ProductTime>, KernelError> {
    let (spec, bytes) = (spec(shape), matrix_bytes(shape));
    let ProductShape { inputs, outputs, .. } = shape;
    let copies = all_bytes.div_ceil(bytes.max(1)).clamp(1, COPIES_MAX);
    let matrices = (0..copies)
        .map(|copy| backend.load_matrix(&SyntheticMatrix::new(copy, spec.clone()), &mut |_| ()))
        .collect::<Result<Vec<_>, _>>()?;
    let largest = rows.iter().copied().max().unwrap_or(1);
    let mut kv = backend.kv_pool(1, largest * KV_BLOCK_TOKENS, 16)?;
    let (mut x, mut out) = (backend.activations(largest, inputs)?, backend.activations(largest, outputs)?);
    let values: Vec<f32> = (0..largest * inputs).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
    backend.time_by_device(true);
    let times = rows.iter().map(|&rows| {
        let values = &values[..rows * inputs];
        let seconds = median_pass(backend, &matrices, rows, values, (&mut x, &mut out), &mut kv, passes)?;
        Ok(ProductTime { rows, bytes, seconds: seconds / copies as f64 })
    });
    let times = times.collect();
    backend.time_by_device(false);
    times
}

/// Median seconds of all matrices once, with so many rows.
fn median_pass<B: Backend>(
    backend: &mut B,
    matrices: &[B::Matrix],
    rows: usize,
    values: &[f32],
    (x, out): (&mut B::Activations, &mut B::Activations),
    kv: &mut B::KvPool,
    passes: usize,
) -> Result<f64, KernelError> {
    let batch = single_tokens(rows);
    let mut seconds = Vec::with_capacity(passes);
    // One pass more than is counted: pages and clocks settle.
    for _ in 0..=passes {
        backend.begin(&batch, kv)?;
        backend.write(values, x)?;
        backend.finish(&[])?;
        backend.begin(&batch, kv)?;
        let started = Instant::now();
        for matrix in matrices {
            backend.matmul(x, matrix, 1.0, out);
        }
        backend.finish(&[])?;
        let elapsed = started.elapsed().as_secs_f64();
        seconds.push(backend.device_seconds()?.unwrap_or(elapsed));
    }
    seconds.remove(0);
    Ok(median(seconds))
}

/// Of runs' seconds the one in the middle, the slower one of two there; 0 of none.
pub(crate) fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or_default()
}

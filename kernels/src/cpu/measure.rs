//! How fast this machine reads memory and multiplies, for the planner and for benchmarks. Measured in a fraction of a second.

use std::time::Instant;

use grokpipe_model::{Format, Layout, MatrixSource, MatrixSpec, ModelError};

use super::{
    CpuBackend,
    memory::Arena,
    prefetch::Ask,
    simd::{Dots, Isa, Kernel, LANES, Simd, Word},
    threads::Threads,
};
use crate::{Backend, KernelError, bench::median};

/// Larger than the last-level caches of ordinary machines.
const READ_BYTES: u64 = 256 << 20;
/// Less is not worth measuring.
const READ_BYTES_MIN: u64 = 1 << 20;
/// Runs of which the median counts: what disturbs some of them disturbs as many of a stage's.
const RUNS: usize = 5;
/// Inputs and outputs of the product that is timed.
const SIDE: usize = 1536;
/// Its rows.
const ROWS: usize = 64;

/// Bytes a second of all threads reading memory in order, in no more than `most_bytes`, or the least that is worth it.
pub(super) fn read_bandwidth(isa: Isa, threads: &Threads, device: &str, most_bytes: u64) -> Result<f64, KernelError> {
    let count = read_bytes(most_bytes) as usize / size_of::<Word>();
    let mut words = Arena::default().take::<Word>(count, "the bandwidth measurement", device)?;
    // Memory that was never written has no pages of its own.
    words.fill(Word([1; 64]));
    let part = words.len().div_ceil(threads.count() * 8);
    let seconds = seconds(|| {
        let parts: Vec<&[Word]> = words.chunks(part).collect();
        threads.each(parts, usize::MAX, |words| isa.run(Read(words)));
    });
    Ok(size_of_val(&*words) as f64 / seconds)
}

/// Bytes to read where no more than these may be taken.
fn read_bytes(most_bytes: u64) -> u64 {
    READ_BYTES.min(most_bytes).max(READ_BYTES_MIN)
}

/// Seconds of a run.
fn seconds(mut run: impl FnMut()) -> f64 {
    let seconds = (0..RUNS).map(|_| {
        let started = Instant::now();
        run();
        started.elapsed().as_secs_f64()
    });
    median(seconds.collect())
}

/// Reads words in the manner of the products: asking for them ahead.
struct Read<'a>(&'a [Word]);

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let dots = simd.dots();
        let mut sums = [dots.small(); 4];
        let words = bytemuck::cast_slice::<Word, <S::Dots as Dots>::W>(self.0);
        // Once, also where products ask twice: a loop that does nothing else reads the same.
        let mut ask = Ask::<_, false>::of_own(words, size_of_val(words), std::ptr::null());
        for words in words.as_chunks::<4>().0 {
            for (sum, word) in sums.iter_mut().zip(words) {
                ask.one();
                *sum = dots.add_small(*sum, word, 0x0101_0101);
            }
        }
        for sum in sums {
            let mut out = [0.0; LANES];
            dots.store(dots.to_f32(sum), &mut out[..LANES / S::Dots::PACKING.parts]);
            std::hint::black_box(out);
        }
    }
}

/// Twice the multiply-adds a second of an int8 product of 64 rows.
pub(super) fn flop_rate(backend: &mut CpuBackend) -> Result<f64, KernelError> {
    let matrix = backend.load_matrix(&Pattern::new(), &mut |_| ())?;
    let x: Vec<f32> = (0..ROWS * SIDE).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut out = vec![0.0; ROWS * SIDE];
    let seconds = seconds(|| {
        backend.products(&x, &mut [(&matrix, &mut out)]);
        std::hint::black_box(&out);
    });
    Ok((2 * ROWS * SIDE * SIDE) as f64 / seconds)
}

/// A matrix whose numbers do not matter.
struct Pattern(MatrixSpec);

impl Pattern {
    fn new() -> Self {
        let format = Format::Int8 { groups: 1 };
        let name = "the speed measurement".to_owned();
        Self(MatrixSpec { name, experts: 1, inputs: SIDE, outputs: SIDE, format, layout: Layout::OutIn })
    }
}

impl MatrixSource for Pattern {
    fn spec(&self) -> &MatrixSpec {
        &self.0
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = (offset as usize + i) as u8;
        }
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0 / 127.0; SIDE])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;

    #[test]
    fn no_more_memory_is_read_than_may_be_taken() {
        for (most, read) in [(u64::MAX, 256 << 20), (200 << 20, 200 << 20), (64 << 20, 64 << 20), (0, 1 << 20)] {
            assert_eq!(read_bytes(most), read);
        }
        let mut backend = CpuBackend::new(1, Precision::Exact).unwrap();
        let bandwidth = backend.measure_read_bandwidth(3 << 20).unwrap();
        assert!(bandwidth.is_finite() && bandwidth > 0.0, "{bandwidth}");
    }
}

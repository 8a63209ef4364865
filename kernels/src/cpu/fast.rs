//! Products of packed weights with 8-bit inputs: precision `fast`.
//!
//! A row of inputs is cut into blocks of 32, each with one f32 scale; weights times inputs are summed exactly as integers within a
//! block (or half of one) and scaled in f32, blocks ascending. So a result depends on its row and its output alone, and is the same
//! on every CPU, for any rows beside it and any number of threads.

use std::ops::Range;

use super::{
    packed::{BLOCK, Packed, SUPER, Scaling},
    simd::{Kernel, LANES, Simd, Word},
};

/// Words that are asked for ahead of their use: 4 KiB, since the processor's own prefetching ends with a page.
const AHEAD: usize = 64;

/// Rows of inputs as 8-bit numbers.
#[derive(Default)]
pub(super) struct Quantised {
    values: Vec<[i8; BLOCK]>,
    /// What a number of a block is worth.
    scales: Vec<f32>,
    sums: Vec<Sums>,
}

/// Sums of a block's numbers.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// Of all.
    all: i32,
    /// What weights that are 128 too large add too much, negative: of all, and of each half.
    offset_128: (i32, [i32; 2]),
    /// The same for weights that are 8 too large.
    offset_8: i32,
}

/// One row.
#[derive(Clone, Copy, Default)]
pub(super) struct QuantisedRow<'a> {
    values: &'a [[i8; BLOCK]],
    scales: &'a [f32],
    sums: &'a [Sums],
}

impl Quantised {
    /// Rows of `inputs` numbers, a whole number of blocks.
    pub(super) fn rows(&self, inputs: usize) -> Vec<QuantisedRow<'_>> {
        let blocks = inputs / BLOCK;
        let parts = self.values.chunks(blocks).zip(self.scales.chunks(blocks)).zip(self.sums.chunks(blocks));
        parts.map(|((values, scales), sums)| QuantisedRow { values, scales, sums }).collect()
    }
}

/// Rounds `x`, whole blocks, to 8 bits.
pub(super) struct Quantise<'a> {
    pub(super) x: &'a [f32],
    pub(super) out: &'a mut Quantised,
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { x, out } = self;
        let (blocks, _) = x.as_chunks::<BLOCK>();
        out.values.resize(blocks.len(), [0; BLOCK]);
        out.scales.resize(blocks.len(), 0.0);
        out.sums.resize(blocks.len(), Sums::default());
        let places = out.values.iter_mut().zip(&mut out.scales).zip(&mut out.sums);
        for (block, ((values, scale), sums)) in blocks.iter().zip(places) {
            // Lanes, so that the search for the largest is many at a time; what is no number makes the scale none.
            let mut lanes = [0.0f32; LANES];
            let mut bad = [false; LANES];
            for half in block.as_chunks::<LANES>().0 {
                for ((lane, bad), value) in lanes.iter_mut().zip(&mut bad).zip(half) {
                    let size = value.abs();
                    *bad |= !size.is_finite();
                    *lane = if size > *lane { size } else { *lane };
                }
            }
            let largest = lanes.iter().fold(0.0f32, |largest, &lane| if lane > largest { lane } else { largest });
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            *scale = if bad.contains(&true) { f32::NAN } else { largest / 127.0 };
            for (value, x) in values.iter_mut().zip(block) {
                // At most 127 in magnitude: the largest times its inverse may round up, and 127.0001 is still 127.
                *value = (x * inverse).round_ties_even() as i8;
            }
            let sum = |half: &[i8]| half.iter().map(|&value| i32::from(value)).sum::<i32>();
            let (low, high) = values.split_at(LANES);
            let (low, high) = (sum(low), sum(high));
            let all = low + high;
            *sums = Sums { all, offset_128: (-128 * all, [-128 * low, -128 * high]), offset_8: -8 * all };
        }
    }
}

/// Products of quantised rows with some outputs of one expert.
pub(super) struct FastProduct<'a> {
    pub(super) matrix: &'a Packed,
    pub(super) expert: usize,
    /// Begins with a band.
    pub(super) outputs: Range<usize>,
    pub(super) rows: &'a [QuantisedRow<'a>],
    /// `[outputs.len(), rows.len()]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for FastProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { matrix, expert, outputs, rows, out } = self;
        let stride = rows.len();
        let first_band = expert * matrix.bands + outputs.start / LANES;
        for (index, out) in out.chunks_mut(LANES * stride).enumerate() {
            let band = first_band + index;
            let mut first = 0;
            while stride - first >= 4 {
                store(simd, band_of_rows::<S, 4>(simd, matrix, band, rows, first), first, stride, out);
                first += 4;
            }
            while stride - first >= 2 {
                store(simd, band_of_rows::<S, 2>(simd, matrix, band, rows, first), first, stride, out);
                first += 2;
            }
            if stride > first {
                store(simd, band_of_rows::<S, 1>(simd, matrix, band, rows, first), first, stride, out);
            }
        }
    }
}

#[inline(always)]
fn store<S: Simd, const R: usize>(simd: S, sums: [S::V; R], first: usize, stride: usize, out: &mut [f32]) {
    for (r, sums) in sums.into_iter().enumerate() {
        let lanes = simd.array(sums);
        for (output, lane) in out.chunks_mut(stride).zip(lanes) {
            output[first + r] = lane;
        }
    }
}

/// The sums of one band with rows `first..first + R`.
#[inline(always)]
fn band_of_rows<S: Simd, const R: usize>(
    simd: S,
    matrix: &Packed,
    band: usize,
    rows: &[QuantisedRow<'_>],
    first: usize,
) -> [S::V; R] {
    let mut x = [QuantisedRow::default(); R];
    x.copy_from_slice(&rows[first..first + R]);
    let blocks = matrix.blocks;
    let per_band = blocks * matrix.words_per_block();
    let words = &matrix.words[band * per_band..][..per_band];
    let mut total = [simd.zero(); R];
    match &matrix.scaling {
        Scaling::Groups { scales, blocks: a_group } => {
            let groups = blocks / a_group;
            let words = words.as_chunks::<8>().0;
            for (g, scale) in scales[band * groups..][..groups].iter().enumerate() {
                let mut sum = [simd.zero(); R];
                for (b, words) in words.iter().enumerate().skip(g * a_group).take(*a_group) {
                    let dots = bytes::<S, 8, R>(simd, words, &x, b, 0, |sums| sums.offset_128.0);
                    for r in 0..R {
                        sum[r] = simd.fma(simd.to_f32(dots[r]), simd.splat(x[r].scales[b]), sum[r]);
                    }
                }
                let scale = simd.load(scale);
                for r in 0..R {
                    total[r] = simd.fma(sum[r], scale, total[r]);
                }
            }
        }
        Scaling::Blocks(halves) => {
            let halves = &halves[band * blocks..][..blocks];
            for (b, d) in halves.iter().enumerate() {
                let dots = if matrix.nibbles {
                    nibbles::<S, R>(simd, &words.as_chunks::<4>().0[b], &x, b, |sums| sums.offset_8)
                } else {
                    bytes::<S, 8, R>(simd, &words.as_chunks::<8>().0[b], &x, b, 0, |sums| sums.offset_128.0)
                };
                let d = simd.load_f16(d);
                for r in 0..R {
                    total[r] = simd.fma(simd.to_f32(dots[r]), simd.mul(d, simd.splat(x[r].scales[b])), total[r]);
                }
            }
        }
        Scaling::Minima { halves, bytes: factors } => {
            let supers = blocks / SUPER;
            let factors = &factors[band * blocks..][..blocks];
            for (index, [d, m]) in halves[band * supers..][..supers].iter().enumerate() {
                let (mut sum, mut minimum) = ([simd.zero(); R], [simd.zero(); R]);
                for (b, [factor, min]) in factors.iter().enumerate().skip(index * SUPER).take(SUPER) {
                    let dots = if matrix.nibbles {
                        nibbles::<S, R>(simd, &words.as_chunks::<4>().0[b], &x, b, |_| 0)
                    } else {
                        bytes::<S, 8, R>(simd, &words.as_chunks::<8>().0[b], &x, b, 0, |_| 0)
                    };
                    let (factor, min) = (simd.load_u8(factor), simd.load_u8(min));
                    for r in 0..R {
                        let scale = x[r].scales[b];
                        sum[r] = simd.fma(simd.to_f32(dots[r]), simd.mul(factor, simd.splat(scale)), sum[r]);
                        let inputs = scale * x[r].sums[b].all as f32;
                        minimum[r] = simd.fma(min, simd.splat(-inputs), minimum[r]);
                    }
                }
                let (d, m) = (simd.load_f16(d), simd.load_f16(m));
                for r in 0..R {
                    total[r] = simd.fma(m, minimum[r], simd.fma(d, sum[r], total[r]));
                }
            }
        }
        Scaling::Sixteens { halves, bytes: factors } => {
            let supers = blocks / SUPER;
            let words = words.as_chunks::<8>().0;
            let factors = &factors[band * blocks..][..blocks];
            for (index, d) in halves[band * supers..][..supers].iter().enumerate() {
                let mut sum = [simd.zero(); R];
                for (b, factors) in factors.iter().enumerate().skip(index * SUPER).take(SUPER) {
                    for (half, (words, factor)) in words[b].as_chunks::<4>().0.iter().zip(factors).enumerate() {
                        let dots = bytes::<S, 4, R>(simd, words, &x, b, half, |sums| sums.offset_128.1[half]);
                        let factor = simd.load_i8(factor);
                        for r in 0..R {
                            let factor = simd.mul(factor, simd.splat(x[r].scales[b]));
                            sum[r] = simd.fma(simd.to_f32(dots[r]), factor, sum[r]);
                        }
                    }
                }
                let d = simd.load_f16(d);
                for r in 0..R {
                    total[r] = simd.fma(d, sum[r], total[r]);
                }
            }
        }
    }
    total
}

/// Sums of `4 N` inputs of block `b`, from its `half` on, with weights that are bytes; `start` is what is added to them.
#[inline(always)]
fn bytes<S: Simd, const N: usize, const R: usize>(
    simd: S,
    words: &[Word; N],
    x: &[QuantisedRow<'_>; R],
    b: usize,
    half: usize,
    start: impl Fn(&Sums) -> i32,
) -> [S::I; R] {
    let mut sums = [simd.splat_i32(0); R];
    for r in 0..R {
        sums[r] = simd.splat_i32(start(&x[r].sums[b]));
    }
    for (k, word) in words.iter().enumerate() {
        simd.prefetch(word, AHEAD);
        for r in 0..R {
            sums[r] = simd.dot4(sums[r], word, quad(&x[r].values[b], N * half + k));
        }
    }
    sums
}

/// Sums of block `b` with weights of half a byte; `start` is what is added to them.
#[inline(always)]
fn nibbles<S: Simd, const R: usize>(
    simd: S,
    words: &[Word; 4],
    x: &[QuantisedRow<'_>; R],
    b: usize,
    start: impl Fn(&Sums) -> i32,
) -> [S::I; R] {
    let mut sums = [simd.splat_i32(0); R];
    for r in 0..R {
        sums[r] = simd.splat_i32(start(&x[r].sums[b]));
    }
    for (k, word) in words.iter().enumerate() {
        simd.prefetch(word, AHEAD);
        for r in 0..R {
            let block = &x[r].values[b];
            sums[r] = simd.dot4_nibbles(sums[r], word, quad(block, k), quad(block, 4 + k));
        }
    }
    sums
}

#[inline(always)]
fn quad(block: &[i8; BLOCK], k: usize) -> [i8; 4] {
    block.as_chunks::<4>().0[k]
}

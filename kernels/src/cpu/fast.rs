//! Products of packed weights with 8-bit inputs: precision `fast`.
//!
//! A row of inputs is cut into blocks of 32, each with one f32 scale; weights times inputs are summed exactly as integers within a
//! block (or half of one) and scaled in f32, blocks ascending. So a result depends on its row and its output alone, and is the same
//! on every CPU, for any rows beside it and any number of threads.
#![expect(clippy::needless_range_loop, reason = "tiles of registers are indexed by band, row and lane together")]

use std::ops::Range;

use super::{
    math::ROUND,
    packed::{BLOCK, Numbers, Packed, SUPER, Scaling},
    simd::{Dots, Kernel, LANES, Simd, Word},
};

/// How far ahead of their use weights are asked for: the processor's own prefetching ends with a page of 4 KiB.
pub(super) const AHEAD: usize = 6144;
/// Blocks ahead of which their scales are asked for.
const AHEAD_BLOCKS: usize = 16;
/// Rows of a tile at most.
const MOST_ROWS: usize = 4;

// Kinds of weights, for functions that are compiled once for each.
/// A byte each, 128 too large.
const BYTES: u8 = 0;
/// A byte each, below 128.
const LOW_BYTES: u8 = 1;
/// Half a byte each, 8 too large.
const NIBBLES: u8 = 2;
/// Half a byte each, as they are.
const LOW_NIBBLES: u8 = 3;
/// Half a byte each, which stand for others.
const CODES: u8 = 4;
/// A quarter of a byte each, as they are.
const QUARTERS: u8 = 5;

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
    /// What weights that are 128 too large add too much, negative: of all, and of each half.
    offset_128: (i32, [i32; 2]),
    /// The same for weights that are 8 too large.
    offset_8: i32,
    /// What the numbers stand for, negative: what a minimum takes.
    taken: f32,
}

/// One row.
#[derive(Clone, Copy, Default)]
pub(super) struct QuantisedRow<'a> {
    values: &'a [[i8; BLOCK]],
    scales: &'a [f32],
    sums: &'a [Sums],
}

impl Quantised {
    /// Makes room for `x`, rows of `inputs` numbers; what is to be run to fill it, a row each.
    pub(super) fn parts<'a>(&'a mut self, x: &'a [f32], inputs: usize) -> Vec<Quantise<'a>> {
        let (x, _) = x.as_chunks::<BLOCK>();
        self.values.resize(x.len(), [0; BLOCK]);
        self.scales.resize(x.len(), 0.0);
        self.sums.resize(x.len(), Sums::default());
        let blocks = inputs / BLOCK;
        let places =
            self.values.chunks_mut(blocks).zip(self.scales.chunks_mut(blocks)).zip(self.sums.chunks_mut(blocks));
        let parts = x.chunks(blocks).zip(places);
        parts.map(|(x, ((values, scales), sums))| Quantise { x, values, scales, sums }).collect()
    }

    /// Rows of `inputs` numbers, a whole number of blocks.
    pub(super) fn rows(&self, inputs: usize) -> Vec<QuantisedRow<'_>> {
        let blocks = inputs / BLOCK;
        let parts = self.values.chunks(blocks).zip(self.scales.chunks(blocks)).zip(self.sums.chunks(blocks));
        parts.map(|((values, scales), sums)| QuantisedRow { values, scales, sums }).collect()
    }
}

/// Rounds `x`, whole blocks, to 8 bits.
pub(super) struct Quantise<'a> {
    x: &'a [[f32; BLOCK]],
    values: &'a mut [[i8; BLOCK]],
    scales: &'a mut [f32],
    sums: &'a mut [Sums],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let places = self.values.iter_mut().zip(self.scales).zip(self.sums);
        for (block, ((values, scale), sums)) in self.x.iter().zip(places) {
            // Lanes, so that the search for the largest is many at a time; what is no number makes the scale none,
            // and then it does not matter what the numbers are.
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
            // Integers in the low bits of floats: with no instruction for it, a rounding is many.
            let mut rounded = [0; BLOCK];
            for (rounded, x) in rounded.iter_mut().zip(block) {
                // At most 127 in magnitude: the largest times its inverse may round up, and 127.0001 is still 127.
                *rounded = i32::from((x * inverse + ROUND).to_bits() as i8);
            }
            for (value, rounded) in values.iter_mut().zip(&rounded) {
                *value = *rounded as i8;
            }
            let (low, high) = rounded.split_at(LANES);
            let (low, high) = (low.iter().sum::<i32>(), high.iter().sum::<i32>());
            let all = low + high;
            let offset_128 = (-128 * all, [-128 * low, -128 * high]);
            *sums = Sums { offset_128, offset_8: -8 * all, taken: -(*scale * all as f32) };
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
    /// `[rows.len(), outputs.len()]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for FastProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.columns(simd.dots());
    }
}

impl FastProduct<'_> {
    /// All columns: the outputs of a register each.
    #[inline(always)]
    fn columns<D: Dots>(mut self, dots: D) {
        let columns = self.outputs.len().div_ceil(LANES / D::PACKING.parts);
        let many = self.rows.len() > MOST_ROWS;
        let whole = self.rows.len() / MOST_ROWS * MOST_ROWS;
        let mut column = 0;
        while column < columns {
            // Many rows with two columns: an input is read once for both, and no sum waits for the one before it. Few rows wait for
            // memory, which is fastest as one stream.
            let together = if D::MANY_REGISTERS && many && columns - column >= 2 { 2 } else { 1 };
            for first in (0..whole).step_by(MOST_ROWS) {
                if together == 2 {
                    self.tile::<D, 2, MOST_ROWS>(dots, column, first);
                } else {
                    self.tile::<D, 1, MOST_ROWS>(dots, column, first);
                }
            }
            for column in column..column + together {
                match self.rows.len() - whole {
                    3 => self.tile::<D, 1, 3>(dots, column, whole),
                    2 => self.tile::<D, 1, 2>(dots, column, whole),
                    1 => self.tile::<D, 1, 1>(dots, column, whole),
                    _ => {}
                }
            }
            column += together;
        }
    }

    /// `R` rows from `first` on.
    #[inline(always)]
    fn tile<D: Dots, const G: usize, const R: usize>(&mut self, dots: D, column: usize, first: usize) {
        let matrix = self.matrix;
        let mut x = [QuantisedRow::default(); R];
        for (x, row) in x.iter_mut().zip(&self.rows[first..first + R]) {
            let QuantisedRow { values, scales, sums } = row;
            let blocks = matrix.blocks;
            *x = QuantisedRow { values: &values[..blocks], scales: &scales[..blocks], sums: &sums[..blocks] };
        }
        let whole = self.rows.len() / MOST_ROWS * MOST_ROWS;
        // The last rows, fewer than a full tile, find their weights in the cache and ask for nothing behind them.
        let far =
            (self.rows.len() > MOST_ROWS).then(|| first * matrix.blocks / whole..(first + R) * matrix.blocks / whole);
        let first_band = self.expert * matrix.bands + self.outputs.start / LANES;
        let column_of_all = first_band * D::PACKING.parts + column;
        let tile = Tile::<D, R> { dots, matrix, words: &matrix.words, column: column_of_all, x, far };
        let sums: [[D::F; R]; G] = tile.sums();
        let width = self.outputs.len();
        let a_column = LANES / D::PACKING.parts;
        for (g, sums) in sums.into_iter().enumerate() {
            // The last band may have fewer outputs than lanes, and then whole columns without any.
            let start = ((column + g) * a_column).min(width);
            let used = a_column.min(width - start);
            for (r, sums) in sums.into_iter().enumerate() {
                dots.store(sums, &mut self.out[(first + r) * width + start..][..used]);
            }
        }
    }
}

/// Some rows with some columns from `column` of the matrix on.
///
/// While it computes it asks memory for what comes next: the only tile with its weights for what it will itself read soon; of several,
/// of which only the first reads the weights from memory, each for a share of the columns that follow.
struct Tile<'a, D, const R: usize> {
    dots: D,
    matrix: &'a Packed,
    /// Those of the matrix.
    words: &'a [Word],
    column: usize,
    x: [QuantisedRow<'a>; R],
    /// One of several tiles asks for these blocks of the next columns.
    far: Option<Range<usize>>,
}

impl<D: Dots, const R: usize> Tile<'_, D, R> {
    /// The part of its band that the `g`th column is.
    #[inline(always)]
    fn part(&self, g: usize) -> usize {
        (self.column + g) % D::PACKING.parts
    }

    /// `values` has `count` for each band: those of each column's.
    #[inline(always)]
    fn of_bands<'v, T, const G: usize>(&self, values: &'v [T], count: usize) -> [&'v [T]; G] {
        std::array::from_fn(|g| &values[(self.column + g) / D::PACKING.parts * count..][..count])
    }

    /// The sums, column by column.
    #[inline(always)]
    fn sums<const G: usize>(&self) -> [[D::F; R]; G] {
        let matrix = self.matrix;
        match (&matrix.scaling, matrix.numbers) {
            (Scaling::Groups { scales, blocks }, _) => self.groups(scales, *blocks),
            (Scaling::Blocks { halves, minima: false }, Numbers::Nibbles) => self.blocks::<NIBBLES, 1, G>(halves),
            (Scaling::Blocks { halves, minima: false }, Numbers::Codes) => self.blocks::<CODES, 1, G>(halves),
            (Scaling::Blocks { halves, minima: false }, _) => self.blocks::<BYTES, 1, G>(halves),
            (Scaling::Blocks { halves, minima: true }, Numbers::Nibbles) => self.blocks::<LOW_NIBBLES, 2, G>(halves),
            (Scaling::Blocks { halves, minima: true }, _) => self.blocks::<LOW_BYTES, 2, G>(halves),
            (Scaling::Supers { halves, bytes, minima: false }, Numbers::Nibbles) => {
                self.supers::<NIBBLES, 2, 2, G>(halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: false }, Numbers::Codes) => {
                self.supers::<CODES, 1, 1, G>(halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: false }, _) => self.supers::<BYTES, 2, 2, G>(halves, bytes),
            (Scaling::Supers { halves, bytes, minima: true }, Numbers::Nibbles) => {
                self.supers::<LOW_NIBBLES, 1, 2, G>(halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: true }, Numbers::Quarters) => {
                self.supers::<QUARTERS, 2, 4, G>(halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: true }, _) => self.supers::<LOW_BYTES, 1, 2, G>(halves, bytes),
        }
    }

    #[inline(always)]
    fn groups<const G: usize>(&self, scales: &[[f32; LANES]], a_group: usize) -> [[D::F; R]; G] {
        let dots = self.dots;
        let groups = self.matrix.blocks / a_group;
        let scales: [_; G] = self.of_bands(scales, groups);
        let mut total = [[dots.zero(); R]; G];
        for group in 0..groups {
            let mut sum = [[dots.zero(); R]; G];
            for b in group * a_group..(group + 1) * a_group {
                let products = self.products::<BYTES, 1, G>(b, 0);
                for r in 0..R {
                    let scale = dots.splat(self.x[r].scales[b]);
                    for g in 0..G {
                        sum[g][r] = dots.fma(dots.to_f32(products[g][r]), scale, sum[g][r]);
                    }
                }
            }
            for g in 0..G {
                let scale = dots.load(&scales[g][group], self.part(g));
                for r in 0..R {
                    total[g][r] = dots.fma(sum[g][r], scale, total[g][r]);
                }
            }
        }
        total
    }

    /// Sums with scales of blocks of their own: a half, and with `H` of 2 one of the minimum.
    #[inline(always)]
    fn blocks<const KIND: u8, const H: usize, const G: usize>(&self, halves: &[[u16; LANES]]) -> [[D::F; R]; G] {
        let dots = self.dots;
        let blocks = self.matrix.blocks;
        let halves: [&[[u16; LANES]]; G] = self.of_bands(halves, blocks * H);
        let mut total = [[dots.zero(); R]; G];
        for b in 0..blocks {
            let products = self.products::<KIND, 1, G>(b, 0);
            for g in 0..G {
                let (half, part) = (&halves[g].as_chunks::<H>().0[b], self.part(g));
                self.ask(b, half, AHEAD_BLOCKS * size_of_val(half), G * size_of_val(halves[g]));
                let d = dots.load_f16(&half[0], part);
                for r in 0..R {
                    let scale = dots.mul(d, dots.splat(self.x[r].scales[b]));
                    total[g][r] = dots.fma(dots.to_f32(products[g][r]), scale, total[g][r]);
                }
                if H == 2 {
                    let m = dots.load_f16(&half[H - 1], part);
                    for r in 0..R {
                        total[g][r] = dots.fma(m, dots.splat(self.x[r].sums[b].taken), total[g][r]);
                    }
                }
            }
        }
        total
    }

    /// Sums with scales of super-blocks: `P` parts of a block with a factor each, and with `N` of twice that a minimum each.
    #[inline(always)]
    fn supers<const KIND: u8, const P: usize, const N: usize, const G: usize>(
        &self,
        halves: &[[u16; LANES]],
        bytes: &[[u8; LANES]],
    ) -> [[D::F; R]; G] {
        let dots = self.dots;
        let (blocks, supers, has_minima) = (self.matrix.blocks, self.matrix.blocks / SUPER, N > P);
        let halves: [&[[u16; LANES]]; G] = self.of_bands(halves, supers * (N / P));
        let bytes: [&[[u8; LANES]]; G] = self.of_bands(bytes, blocks * N);
        let mut total = [[dots.zero(); R]; G];
        for index in 0..supers {
            let (mut sum, mut minimum) = ([[dots.zero(); R]; G], [[dots.zero(); R]; G]);
            for b in index * SUPER..(index + 1) * SUPER {
                for p in 0..P {
                    let products = self.products::<KIND, P, G>(b, p);
                    for g in 0..G {
                        let (factors, part) = (&bytes[g].as_chunks::<N>().0[b], self.part(g));
                        if p == 0 {
                            self.ask(b, factors, AHEAD_BLOCKS * size_of_val(factors), G * size_of_val(bytes[g]));
                        }
                        let factor = if has_minima {
                            dots.load_u8(&factors[p], part)
                        } else {
                            dots.load_i8(bytemuck::cast_ref(&factors[p]), part)
                        };
                        for r in 0..R {
                            let factor = dots.mul(factor, dots.splat(self.x[r].scales[b]));
                            sum[g][r] = dots.fma(dots.to_f32(products[g][r]), factor, sum[g][r]);
                        }
                        if has_minima {
                            let min = dots.load_u8(&factors[N - P + p], part);
                            for r in 0..R {
                                let taken = self.taken::<P>(r, b, p);
                                minimum[g][r] = dots.fma(min, dots.splat(taken), minimum[g][r]);
                            }
                        }
                    }
                }
            }
            for g in 0..G {
                let (half, part) = (&halves[g][index * (N / P)..][..N / P], self.part(g));
                let ahead = AHEAD_BLOCKS / SUPER * size_of_val(half);
                self.ask(index * SUPER, &half[0], ahead, G * size_of_val(halves[g]));
                let d = dots.load_f16(&half[0], part);
                for r in 0..R {
                    total[g][r] = dots.fma(d, sum[g][r], total[g][r]);
                }
                if has_minima {
                    let m = dots.load_f16(&half[N / P - 1], part);
                    for r in 0..R {
                        total[g][r] = dots.fma(m, minimum[g][r], total[g][r]);
                    }
                }
            }
        }
        total
    }

    /// What a minimum takes of part `p` of `P` of block `b`.
    #[inline(always)]
    fn taken<const P: usize>(&self, r: usize, b: usize, p: usize) -> f32 {
        let sums = &self.x[r].sums[b];
        if P == 1 { sums.taken } else { self.x[r].scales[b] * (sums.offset_128.1[p] >> 7) as f32 }
    }

    /// Block `b` of each column.
    #[inline(always)]
    fn words<const N: usize, const G: usize>(&self, b: usize) -> [&[D::W; N]; G] {
        let words: &[D::W] = bytemuck::cast_slice(self.words);
        let a_column = self.matrix.blocks * N;
        std::array::from_fn(|g| &words[(self.column + g) * a_column..][..a_column].as_chunks::<N>().0[b])
    }

    /// Sums of part `p` of the `P` of block `b`. No closures do it: they could be compiled without the instructions of this path.
    #[inline(always)]
    fn products<const KIND: u8, const P: usize, const G: usize>(&self, b: usize, p: usize) -> [[D::I; R]; G] {
        match KIND {
            BYTES | LOW_BYTES => self.bytes::<KIND, P, G>(b, p),
            CODES => self.codes(b),
            QUARTERS => self.quarters(b, p),
            _ => self.nibbles::<KIND, P, G>(b, p),
        }
    }

    /// What sums of part `p` of the `P` of block `b` are too large by, negative.
    #[inline(always)]
    fn offset<const KIND: u8, const P: usize>(&self, r: usize, b: usize, p: usize) -> i32 {
        let sums = &self.x[r].sums[b];
        match KIND {
            BYTES | CODES if P == 1 => sums.offset_128.0,
            BYTES | CODES => sums.offset_128.1[p],
            NIBBLES if P == 1 => sums.offset_8,
            NIBBLES => sums.offset_128.1[p] >> 4,
            _ => 0,
        }
    }

    #[inline(always)]
    fn bytes<const KIND: u8, const P: usize, const G: usize>(&self, b: usize, p: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let words: [&[D::W; 8]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        let mut sums = [[dots.small(); R]; G];
        for r in 0..R {
            for g in 0..G {
                sums[g][r] = dots.centred(self.offset::<KIND, P>(r, b, p));
            }
        }
        for k in 8 / P * p..8 / P * (p + 1) {
            // Asked word by word: the branch also keeps the compiler from loading a block's inputs all at once, into memory.
            for g in 0..G {
                self.ask(b, &words[g][k], AHEAD, far);
            }
            for r in 0..R {
                let quad = quad(&self.x[r].values[b], k);
                for g in 0..G {
                    sums[g][r] = if KIND == BYTES {
                        dots.add_centred(sums[g][r], &words[g][k], quad)
                    } else {
                        dots.add_small(sums[g][r], &words[g][k], quad)
                    };
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn codes<const G: usize>(&self, b: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let words: [&[D::W; 4]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        let mut sums = [[dots.small(); R]; G];
        for r in 0..R {
            for g in 0..G {
                sums[g][r] = dots.centred(self.offset::<CODES, 1>(r, b, 0));
            }
        }
        for k in 0..4 {
            for g in 0..G {
                self.ask(b, &words[g][k], AHEAD, far);
            }
            for r in 0..R {
                let block = &self.x[r].values[b];
                let (low, high) = (quad(block, k), quad(block, 4 + k));
                for g in 0..G {
                    sums[g][r] = dots.add_codes::<0>(sums[g][r], &words[g][k], low);
                    sums[g][r] = dots.add_codes::<4>(sums[g][r], &words[g][k], high);
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn nibbles<const KIND: u8, const P: usize, const G: usize>(&self, b: usize, p: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let words: [&[D::W; 4]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        let mut sums = self.begin_bits::<KIND, P, G>(b, p);
        for k in 0..4 {
            // The second part reads the same words.
            for g in 0..if p == 0 { G } else { 0 } {
                self.ask(b, &words[g][k], AHEAD, far);
            }
            for r in 0..R {
                let block = &self.x[r].values[b];
                let (low, high) = (quad(block, k), quad(block, 4 + k));
                for g in 0..G {
                    if P == 1 || p == 0 {
                        sums[g][r] = dots.add_bits::<4, 0>(sums[g][r], &words[g][k], low);
                    }
                    if P == 1 || p == 1 {
                        sums[g][r] = dots.add_bits::<4, 4>(sums[g][r], &words[g][k], high);
                    }
                }
            }
        }
        self.end_bits::<KIND, P, G>(sums, b, p)
    }

    #[inline(always)]
    fn quarters<const G: usize>(&self, b: usize, half: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let words: [&[D::W; 2]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        let mut sums = self.begin_bits::<QUARTERS, 2, G>(b, half);
        for g in 0..G {
            self.ask(b, &words[g][half], AHEAD, far);
        }
        for r in 0..R {
            let block = &self.x[r].values[b];
            for g in 0..G {
                let word = &words[g][half];
                sums[g][r] = dots.add_bits::<2, 0>(sums[g][r], word, quad(block, 4 * half));
                sums[g][r] = dots.add_bits::<2, 2>(sums[g][r], word, quad(block, 4 * half + 1));
                sums[g][r] = dots.add_bits::<2, 4>(sums[g][r], word, quad(block, 4 * half + 2));
                sums[g][r] = dots.add_bits::<2, 6>(sums[g][r], word, quad(block, 4 * half + 3));
            }
        }
        self.end_bits::<QUARTERS, 2, G>(sums, b, half)
    }

    /// What sums of parts of bytes begin with.
    #[inline(always)]
    fn begin_bits<const KIND: u8, const P: usize, const G: usize>(&self, b: usize, p: usize) -> [[D::N; R]; G] {
        let mut sums = [[self.dots.bits(0); R]; G];
        for r in 0..R {
            for g in 0..G {
                sums[g][r] = self.dots.bits(self.offset::<KIND, P>(r, b, p));
            }
        }
        sums
    }

    /// Finished sums of parts of bytes.
    #[inline(always)]
    fn end_bits<const KIND: u8, const P: usize, const G: usize>(
        &self,
        sums: [[D::N; R]; G],
        b: usize,
        p: usize,
    ) -> [[D::I; R]; G] {
        let mut whole = [[self.dots.small(); R]; G];
        for g in 0..G {
            for r in 0..R {
                whole[g][r] = self.dots.sum_bits(sums[g][r], self.offset::<KIND, P>(r, b, p));
            }
        }
        whole
    }

    /// Asks for what lies behind `place`, which belongs to block `b`: `near` bytes, or `far` where the next columns are.
    #[inline(always)]
    fn ask<T>(&self, b: usize, place: &T, near: usize, far: usize) {
        match &self.far {
            None => self.dots.prefetch(place, near),
            Some(blocks) if blocks.contains(&b) => self.dots.prefetch_far(place, far),
            Some(_) => {}
        }
    }
}

#[inline(always)]
fn quad(block: &[i8; BLOCK], k: usize) -> [i8; 4] {
    block.as_chunks::<4>().0[k]
}

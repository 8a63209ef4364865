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
    simd::{Dots, Kernel, LANES, Simd},
};

/// How far ahead of their use weights are asked for: the processor's own prefetching ends with a page of 4 KiB.
pub(super) const AHEAD: usize = 6144;
/// Blocks ahead of which their scales are asked for.
const AHEAD_BLOCKS: usize = 16;
/// Rows of a tile at most.
const MOST_ROWS: usize = 4;

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
        let mut column = 0;
        // Many rows with two columns: an input is read once for both, and no sum waits for the one before it. Few rows wait for
        // memory, which is fastest as one stream.
        let many = self.rows.len() > MOST_ROWS;
        while D::MANY_REGISTERS && many && columns - column >= 2 {
            self.rows_with::<D, 2, true>(dots, column);
            column += 2;
        }
        while column < columns {
            if many {
                self.rows_with::<D, 1, true>(dots, column)
            } else {
                self.rows_with::<D, 1, false>(dots, column)
            }
            column += 1;
        }
    }

    /// All rows with `G` columns from `column` of the outputs on. `FAR`: there are more rows than a tile has.
    #[inline(always)]
    fn rows_with<D: Dots, const G: usize, const FAR: bool>(&mut self, dots: D, column: usize) {
        let mut first = 0;
        while self.rows.len() - first >= MOST_ROWS {
            self.tile::<D, G, MOST_ROWS, FAR>(dots, column, first);
            first += MOST_ROWS;
        }
        while self.rows.len() - first >= 2 {
            self.tile::<D, G, 2, FAR>(dots, column, first);
            first += 2;
        }
        if self.rows.len() > first {
            self.tile::<D, G, 1, FAR>(dots, column, first);
        }
    }

    /// `R` rows from `first` on.
    #[inline(always)]
    fn tile<D: Dots, const G: usize, const R: usize, const FAR: bool>(&mut self, dots: D, column: usize, first: usize) {
        let matrix = self.matrix;
        let mut x = [QuantisedRow::default(); R];
        for (x, row) in x.iter_mut().zip(&self.rows[first..first + R]) {
            let QuantisedRow { values, scales, sums } = row;
            let blocks = matrix.blocks;
            *x = QuantisedRow { values: &values[..blocks], scales: &scales[..blocks], sums: &sums[..blocks] };
        }
        let far = first * matrix.blocks / self.rows.len()..(first + R) * matrix.blocks / self.rows.len();
        let first_band = self.expert * matrix.bands + self.outputs.start / LANES;
        let column_of_all = first_band * D::PACKING.parts + column;
        let tile = Tile::<D, R, FAR> { dots, matrix, column: column_of_all, x, far };
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
/// While it computes it asks memory for what comes next: the only tile with its weights for what it will itself read soon; `FAR`
/// tiles, of which only the first reads the weights from memory, for a share each of the bands that follow.
struct Tile<'a, D, const R: usize, const FAR: bool> {
    dots: D,
    matrix: &'a Packed,
    column: usize,
    x: [QuantisedRow<'a>; R],
    /// Blocks of which a far tile asks for those of the next bands.
    far: Range<usize>,
}

impl<D: Dots, const R: usize, const FAR: bool> Tile<'_, D, R, FAR> {
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
        use Numbers::{Codes, Nibbles, Quarters};
        let matrix = self.matrix;
        match (&matrix.scaling, matrix.numbers) {
            (Scaling::Groups { scales, blocks }, _) => self.groups(scales, *blocks),
            (Scaling::Blocks { halves, minima: false }, Nibbles) => {
                self.blocks::<1, G>(halves, |b| self.nibbles(b, |sums| sums.offset_8))
            }
            (Scaling::Blocks { halves, minima: false }, Codes) => self.blocks::<1, G>(halves, |b| self.codes(b)),
            (Scaling::Blocks { halves, minima: false }, _) => {
                self.blocks::<1, G>(halves, |b| self.centred::<8, G>(b, 0))
            }
            (Scaling::Blocks { halves, minima: true }, Nibbles) => {
                self.blocks::<2, G>(halves, |b| self.nibbles(b, |_| 0))
            }
            (Scaling::Blocks { halves, minima: true }, _) => self.blocks::<2, G>(halves, |b| self.small(b)),
            (Scaling::Supers { halves, bytes, minima: false }, Nibbles) => {
                self.supers::<2, 2, G>(halves, bytes, |b, half| self.half_of_nibbles(b, half))
            }
            (Scaling::Supers { halves, bytes, minima: false }, Codes) => {
                self.supers::<1, 1, G>(halves, bytes, |b, _| self.codes(b))
            }
            (Scaling::Supers { halves, bytes, minima: false }, _) => {
                self.supers::<2, 2, G>(halves, bytes, |b, half| self.centred::<4, G>(b, half))
            }
            (Scaling::Supers { halves, bytes, minima: true }, Nibbles) => {
                self.supers::<1, 2, G>(halves, bytes, |b, _| self.nibbles(b, |_| 0))
            }
            (Scaling::Supers { halves, bytes, minima: true }, Quarters) => {
                self.supers::<2, 4, G>(halves, bytes, |b, half| self.quarters(b, half))
            }
            (Scaling::Supers { halves, bytes, minima: true }, _) => {
                self.supers::<1, 2, G>(halves, bytes, |b, _| self.small(b))
            }
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
                let products = self.centred::<8, G>(b, 0);
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
    fn blocks<const H: usize, const G: usize>(
        &self,
        halves: &[[u16; LANES]],
        products: impl Fn(usize) -> [[D::I; R]; G],
    ) -> [[D::F; R]; G] {
        let dots = self.dots;
        let blocks = self.matrix.blocks;
        let halves: [&[[u16; LANES]]; G] = self.of_bands(halves, blocks * H);
        let mut total = [[dots.zero(); R]; G];
        for b in 0..blocks {
            let products = products(b);
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
    /// `products` are those of a part of a block.
    #[inline(always)]
    fn supers<const P: usize, const N: usize, const G: usize>(
        &self,
        halves: &[[u16; LANES]],
        bytes: &[[u8; LANES]],
        products: impl Fn(usize, usize) -> [[D::I; R]; G],
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
                    let products = products(b, p);
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
        let words: &[D::W] = bytemuck::cast_slice(&self.matrix.words);
        let a_column = self.matrix.blocks * N;
        std::array::from_fn(|g| &words[(self.column + g) * a_column..][..a_column].as_chunks::<N>().0[b])
    }

    /// Sums of `4 N` inputs of block `b`, all or a `half`, with bytes that are 128 too large.
    #[inline(always)]
    fn centred<const N: usize, const G: usize>(&self, b: usize, half: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let mut start = [dots.small(); R];
        for r in 0..R {
            let (all, halves) = self.x[r].sums[b].offset_128;
            start[r] = dots.centred(if N == 8 { all } else { halves[half] });
        }
        self.bytes(b, N * half..N * (half + 1), start, |sums, word, x| dots.add_centred(sums, word, x))
    }

    /// Sums of block `b` with weights below 128.
    #[inline(always)]
    fn small<const G: usize>(&self, b: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        self.bytes(b, 0..8, [dots.small(); R], |sums, word, x| dots.add_small(sums, word, x))
    }

    /// Sums over the words `range` of block `b`, from `start` on.
    #[inline(always)]
    fn bytes<const G: usize>(
        &self,
        b: usize,
        range: Range<usize>,
        start: [D::I; R],
        add: impl Fn(D::I, &D::W, [i8; 4]) -> D::I,
    ) -> [[D::I; R]; G] {
        let words: [&[D::W; 8]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        let mut sums = [start; G];
        for k in range {
            // Asked word by word: the branch also keeps the compiler from loading a block's inputs all at once, into memory.
            for g in 0..G {
                self.ask(b, &words[g][k], AHEAD, far);
            }
            for r in 0..R {
                let quad = quad(&self.x[r].values[b], k);
                for g in 0..G {
                    sums[g][r] = add(sums[g][r], &words[g][k], quad);
                }
            }
        }
        sums
    }

    /// Sums of block `b` with weights of half a byte, by which `offset` is too large.
    #[inline(always)]
    fn nibbles<const G: usize>(&self, b: usize, offset: impl Fn(&Sums) -> i32) -> [[D::I; R]; G] {
        let dots = self.dots;
        self.parts::<4, G>(b, 0..4, offset, |sums, word, block, k| {
            let sums = dots.add_bits::<4, 0>(sums, word, quad(block, k));
            dots.add_bits::<4, 4>(sums, word, quad(block, 4 + k))
        })
    }

    /// Sums of half of block `b` with weights of half a byte, 8 too large.
    #[inline(always)]
    fn half_of_nibbles<const G: usize>(&self, b: usize, half: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let offset = |sums: &Sums| sums.offset_128.1[half] >> 4;
        if half == 0 {
            self.parts::<4, G>(b, 0..4, offset, |sums, w, block, k| dots.add_bits::<4, 0>(sums, w, quad(block, k)))
        } else {
            self.parts::<4, G>(b, 0..4, offset, |sums, w, block, k| dots.add_bits::<4, 4>(sums, w, quad(block, 4 + k)))
        }
    }

    /// Sums of half of block `b` with weights of a quarter of a byte.
    #[inline(always)]
    fn quarters<const G: usize>(&self, b: usize, half: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        self.parts::<2, G>(b, half..half + 1, |_| 0, |sums, word, block, half| {
            let sums = dots.add_bits::<2, 0>(sums, word, quad(block, 4 * half));
            let sums = dots.add_bits::<2, 2>(sums, word, quad(block, 4 * half + 1));
            let sums = dots.add_bits::<2, 4>(sums, word, quad(block, 4 * half + 2));
            dots.add_bits::<2, 6>(sums, word, quad(block, 4 * half + 3))
        })
    }

    /// Sums over the words `range` of block `b`, of `N`, whose bytes are several weights; by which `offset` is too large.
    #[inline(always)]
    fn parts<const N: usize, const G: usize>(
        &self,
        b: usize,
        range: Range<usize>,
        offset: impl Fn(&Sums) -> i32,
        add: impl Fn(D::N, &D::W, &[i8; BLOCK], usize) -> D::N,
    ) -> [[D::I; R]; G] {
        let dots = self.dots;
        let words: [&[D::W; N]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        // Loops and no `map`: its closure would be compiled without the instructions of this path.
        let mut sums = [[dots.bits(0); R]; G];
        for r in 0..R {
            for g in 0..G {
                sums[g][r] = dots.bits(offset(&self.x[r].sums[b]));
            }
        }
        for k in range {
            for g in 0..G {
                self.ask(b, &words[g][k], AHEAD, far);
            }
            for r in 0..R {
                for g in 0..G {
                    sums[g][r] = add(sums[g][r], &words[g][k], &self.x[r].values[b], k);
                }
            }
        }
        let mut whole = [[dots.small(); R]; G];
        for g in 0..G {
            for r in 0..R {
                whole[g][r] = dots.sum_bits(sums[g][r], offset(&self.x[r].sums[b]));
            }
        }
        whole
    }

    /// Sums of block `b` with weights that half bytes stand for.
    #[inline(always)]
    fn codes<const G: usize>(&self, b: usize) -> [[D::I; R]; G] {
        let dots = self.dots;
        let words: [&[D::W; 4]; G] = self.words(b);
        let far = G * self.matrix.blocks * size_of_val(words[0]);
        let mut sums = [[dots.small(); R]; G];
        for r in 0..R {
            for g in 0..G {
                sums[g][r] = dots.centred(self.x[r].sums[b].offset_128.0);
            }
        }
        for k in 0..4 {
            for g in 0..G {
                self.ask(b, &words[g][k], AHEAD, far);
            }
            for r in 0..R {
                let block = &self.x[r].values[b];
                for g in 0..G {
                    sums[g][r] = dots.add_codes::<0>(sums[g][r], &words[g][k], quad(block, k));
                    sums[g][r] = dots.add_codes::<4>(sums[g][r], &words[g][k], quad(block, 4 + k));
                }
            }
        }
        sums
    }

    /// Asks for what lies behind `place`, which belongs to block `b`: `near` bytes, or `far` where the next columns are.
    #[inline(always)]
    fn ask<T>(&self, b: usize, place: &T, near: usize, far: usize) {
        if !FAR {
            self.dots.prefetch(place, near);
        } else if self.far.contains(&b) {
            self.dots.prefetch_far(place, far);
        }
    }
}

#[inline(always)]
fn quad(block: &[i8; BLOCK], k: usize) -> [i8; 4] {
    block.as_chunks::<4>().0[k]
}

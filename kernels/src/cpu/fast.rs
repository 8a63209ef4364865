//! Products of packed weights with 8-bit inputs: precision `fast`.
//!
//! A row of inputs is cut into blocks of 32, each with one f32 scale; weights times inputs are summed exactly as integers within a
//! block (or half of one) and scaled in f32, blocks ascending. So a result depends on its row and its output alone, and is the same
//! on every CPU, for any rows beside it and any number of threads.
#![expect(clippy::needless_range_loop, reason = "tiles of registers are indexed by band, row and lane together")]

use std::ops::Range;

use super::{
    packed::{BLOCK, Packed, SUPER, Scaling},
    simd::{Kernel, LANES, Simd, Word},
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
    /// `[rows.len(), outputs.len()]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for FastProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let first = self.expert * self.matrix.bands + self.outputs.start / LANES;
        let bands = self.outputs.len().div_ceil(LANES);
        let mut band = 0;
        // Many rows with two bands: an input is read once for both, and no sum waits for the one before it. Few rows wait for
        // memory, which is fastest as one stream.
        let many = self.rows.len() > MOST_ROWS;
        while S::MANY_REGISTERS && many && bands - band >= 2 {
            self.bands::<S, 2, true>(simd, first, band);
            band += 2;
        }
        while band < bands {
            if many {
                self.bands::<S, 1, true>(simd, first, band)
            } else {
                self.bands::<S, 1, false>(simd, first, band)
            }
            band += 1;
        }
    }
}

impl FastProduct<'_> {
    /// All rows with `G` bands from `band` of the outputs on; these begin with band `first_band` of the matrix. `FAR`: there are more
    /// rows than a tile has.
    #[inline(always)]
    fn bands<S: Simd, const G: usize, const FAR: bool>(&mut self, simd: S, first_band: usize, band: usize) {
        let mut first = 0;
        while self.rows.len() - first >= MOST_ROWS {
            self.tile::<S, G, MOST_ROWS, FAR>(simd, first_band, band, first);
            first += MOST_ROWS;
        }
        while self.rows.len() - first >= 2 {
            self.tile::<S, G, 2, FAR>(simd, first_band, band, first);
            first += 2;
        }
        if self.rows.len() > first {
            self.tile::<S, G, 1, FAR>(simd, first_band, band, first);
        }
    }

    /// `R` rows from `first` on.
    #[inline(always)]
    fn tile<S: Simd, const G: usize, const R: usize, const FAR: bool>(
        &mut self,
        simd: S,
        first_band: usize,
        band: usize,
        first: usize,
    ) {
        let matrix = self.matrix;
        let mut x = [QuantisedRow::default(); R];
        for (x, row) in x.iter_mut().zip(&self.rows[first..first + R]) {
            let QuantisedRow { values, scales, sums } = row;
            let blocks = matrix.blocks;
            *x = QuantisedRow { values: &values[..blocks], scales: &scales[..blocks], sums: &sums[..blocks] };
        }
        let far = first * matrix.blocks / self.rows.len()..(first + R) * matrix.blocks / self.rows.len();
        let tile = Tile::<R, FAR> { matrix, band: first_band + band, x, far };
        let sums: [[S::V; R]; G] = tile.sums(simd);
        let width = self.outputs.len();
        for (g, sums) in sums.into_iter().enumerate() {
            let start = (band + g) * LANES;
            let used = LANES.min(width - start);
            for (r, sums) in sums.into_iter().enumerate() {
                self.out[(first + r) * width + start..][..used].copy_from_slice(&simd.array(sums)[..used]);
            }
        }
    }
}

/// Some rows with some bands from `band` on.
///
/// While it computes it asks memory for what comes next: the only tile with its weights for what it will itself read soon; `FAR`
/// tiles, of which only the first reads the weights from memory, for a share each of the bands that follow.
struct Tile<'a, const R: usize, const FAR: bool> {
    matrix: &'a Packed,
    band: usize,
    x: [QuantisedRow<'a>; R],
    /// Blocks of which a far tile asks for those of the next bands.
    far: Range<usize>,
}

impl<const R: usize, const FAR: bool> Tile<'_, R, FAR> {
    /// The sums, band by band.
    #[inline(always)]
    fn sums<S: Simd, const G: usize>(&self, simd: S) -> [[S::V; R]; G] {
        let matrix = self.matrix;
        match &matrix.scaling {
            Scaling::Groups { scales, blocks } => self.groups(simd, scales, *blocks),
            Scaling::Blocks(halves) if matrix.nibbles => {
                self.blocks(simd, halves, |b, dots| self.nibbles(simd, b, |sums| sums.offset_8, dots))
            }
            Scaling::Blocks(halves) => {
                self.blocks(simd, halves, |b, dots| self.bytes::<S, 8, G>(simd, b, 0, |sums| sums.offset_128.0, dots))
            }
            Scaling::Minima { halves, bytes } if matrix.nibbles => {
                self.minima(simd, halves, bytes, |b, dots| self.nibbles(simd, b, |_| 0, dots))
            }
            Scaling::Minima { halves, bytes } => {
                self.minima(simd, halves, bytes, |b, dots| self.bytes::<S, 8, G>(simd, b, 0, |_| 0, dots))
            }
            Scaling::Sixteens { halves, bytes } => self.sixteens(simd, halves, bytes),
        }
    }

    #[inline(always)]
    fn groups<S: Simd, const G: usize>(&self, simd: S, scales: &[[f32; LANES]], a_group: usize) -> [[S::V; R]; G] {
        let groups = self.matrix.blocks / a_group;
        let scales: [_; G] = std::array::from_fn(|g| &scales[(self.band + g) * groups..][..groups]);
        let mut total = [[simd.zero(); R]; G];
        for group in 0..groups {
            let mut sum = [[simd.zero(); R]; G];
            for b in group * a_group..(group + 1) * a_group {
                let mut dots = [[simd.splat_i32(0); R]; G];
                self.bytes::<S, 8, G>(simd, b, 0, |sums| sums.offset_128.0, &mut dots);
                for g in 0..G {
                    for r in 0..R {
                        sum[g][r] = simd.fma(simd.to_f32(dots[g][r]), simd.splat(self.x[r].scales[b]), sum[g][r]);
                    }
                }
            }
            for g in 0..G {
                let scale = simd.load(&scales[g][group]);
                for r in 0..R {
                    total[g][r] = simd.fma(sum[g][r], scale, total[g][r]);
                }
            }
        }
        total
    }

    #[inline(always)]
    fn blocks<S: Simd, const G: usize>(
        &self,
        simd: S,
        halves: &[[u16; LANES]],
        dot: impl Fn(usize, &mut [[S::I; R]; G]),
    ) -> [[S::V; R]; G] {
        let blocks = self.matrix.blocks;
        let halves: [_; G] = std::array::from_fn(|g| &halves[(self.band + g) * blocks..][..blocks]);
        let mut total = [[simd.zero(); R]; G];
        for b in 0..blocks {
            let mut dots = [[simd.splat_i32(0); R]; G];
            dot(b, &mut dots);
            for g in 0..G {
                let half = &halves[g][b];
                self.ask(simd, b, half, AHEAD_BLOCKS * size_of_val(half), G * size_of_val(halves[g]));
                let d = simd.load_f16(half);
                for r in 0..R {
                    let scale = simd.mul(d, simd.splat(self.x[r].scales[b]));
                    total[g][r] = simd.fma(simd.to_f32(dots[g][r]), scale, total[g][r]);
                }
            }
        }
        total
    }

    #[inline(always)]
    fn minima<S: Simd, const G: usize>(
        &self,
        simd: S,
        halves: &[[[u16; LANES]; 2]],
        bytes: &[[[u8; LANES]; 2]],
        dot: impl Fn(usize, &mut [[S::I; R]; G]),
    ) -> [[S::V; R]; G] {
        let (blocks, supers) = (self.matrix.blocks, self.matrix.blocks / SUPER);
        let halves: [_; G] = std::array::from_fn(|g| &halves[(self.band + g) * supers..][..supers]);
        let bytes: [_; G] = std::array::from_fn(|g| &bytes[(self.band + g) * blocks..][..blocks]);
        let mut total = [[simd.zero(); R]; G];
        for index in 0..supers {
            let (mut sum, mut minimum) = ([[simd.zero(); R]; G], [[simd.zero(); R]; G]);
            for b in index * SUPER..(index + 1) * SUPER {
                let mut dots = [[simd.splat_i32(0); R]; G];
                dot(b, &mut dots);
                for g in 0..G {
                    let factors = &bytes[g][b];
                    self.ask(simd, b, factors, AHEAD_BLOCKS * size_of_val(factors), G * size_of_val(bytes[g]));
                    let (factor, min) = (simd.load_u8(&factors[0]), simd.load_u8(&factors[1]));
                    for r in 0..R {
                        let scale = self.x[r].scales[b];
                        let factor = simd.mul(factor, simd.splat(scale));
                        sum[g][r] = simd.fma(simd.to_f32(dots[g][r]), factor, sum[g][r]);
                        let inputs = scale * self.x[r].sums[b].all as f32;
                        minimum[g][r] = simd.fma(min, simd.splat(-inputs), minimum[g][r]);
                    }
                }
            }
            for g in 0..G {
                let half = &halves[g][index];
                self.ask(
                    simd,
                    index * SUPER,
                    half,
                    AHEAD_BLOCKS / SUPER * size_of_val(half),
                    G * size_of_val(halves[g]),
                );
                let (d, m) = (simd.load_f16(&half[0]), simd.load_f16(&half[1]));
                for r in 0..R {
                    total[g][r] = simd.fma(m, minimum[g][r], simd.fma(d, sum[g][r], total[g][r]));
                }
            }
        }
        total
    }

    #[inline(always)]
    fn sixteens<S: Simd, const G: usize>(
        &self,
        simd: S,
        halves: &[[u16; LANES]],
        bytes: &[[[i8; LANES]; 2]],
    ) -> [[S::V; R]; G] {
        let (blocks, supers) = (self.matrix.blocks, self.matrix.blocks / SUPER);
        let halves: [_; G] = std::array::from_fn(|g| &halves[(self.band + g) * supers..][..supers]);
        let bytes: [_; G] = std::array::from_fn(|g| &bytes[(self.band + g) * blocks..][..blocks]);
        let mut total = [[simd.zero(); R]; G];
        for index in 0..supers {
            let mut sum = [[simd.zero(); R]; G];
            for b in index * SUPER..(index + 1) * SUPER {
                for half in 0..2 {
                    let mut dots = [[simd.splat_i32(0); R]; G];
                    self.bytes::<S, 4, G>(simd, b, half, |sums| sums.offset_128.1[half], &mut dots);
                    for g in 0..G {
                        let factors = &bytes[g][b];
                        self.ask(simd, b, factors, AHEAD_BLOCKS * size_of_val(factors), G * size_of_val(bytes[g]));
                        let factor = simd.load_i8(&factors[half]);
                        for r in 0..R {
                            let factor = simd.mul(factor, simd.splat(self.x[r].scales[b]));
                            sum[g][r] = simd.fma(simd.to_f32(dots[g][r]), factor, sum[g][r]);
                        }
                    }
                }
            }
            for g in 0..G {
                let half = &halves[g][index];
                self.ask(
                    simd,
                    index * SUPER,
                    half,
                    AHEAD_BLOCKS / SUPER * size_of_val(half),
                    G * size_of_val(halves[g]),
                );
                let d = simd.load_f16(half);
                for r in 0..R {
                    total[g][r] = simd.fma(d, sum[g][r], total[g][r]);
                }
            }
        }
        total
    }

    /// Block `b` of each band.
    #[inline(always)]
    fn words<const N: usize, const G: usize>(&self, b: usize) -> [&[Word; N]; G] {
        let per_band = self.matrix.blocks * N;
        std::array::from_fn(|g| &self.matrix.words[(self.band + g) * per_band..][..per_band].as_chunks::<N>().0[b])
    }

    /// Sums of `4 N` inputs of block `b`, from its `half` on, with weights that are bytes; `start` is what is added to them.
    #[inline(always)]
    fn bytes<S: Simd, const N: usize, const G: usize>(
        &self,
        simd: S,
        b: usize,
        half: usize,
        start: impl Fn(&Sums) -> i32,
        sums: &mut [[S::I; R]; G],
    ) {
        self.start(simd, b, start, sums);
        let words: [&[Word; 8]; G] = self.words(b);
        let a_band = self.matrix.blocks * size_of_val(words[0]);
        for k in N * half..N * (half + 1) {
            for g in 0..G {
                self.ask(simd, b, &words[g][k], AHEAD, G * a_band);
            }
            for r in 0..R {
                let quad = quad(&self.x[r].values[b], k);
                for g in 0..G {
                    sums[g][r] = simd.dot4(sums[g][r], &words[g][k], quad);
                }
            }
        }
    }

    /// Sums of block `b` with weights of half a byte; `start` is what is added to them.
    #[inline(always)]
    fn nibbles<S: Simd, const G: usize>(
        &self,
        simd: S,
        b: usize,
        start: impl Fn(&Sums) -> i32,
        sums: &mut [[S::I; R]; G],
    ) {
        self.start(simd, b, start, sums);
        let words: [&[Word; 4]; G] = self.words(b);
        let a_band = self.matrix.blocks * size_of_val(words[0]);
        for k in 0..4 {
            for g in 0..G {
                self.ask(simd, b, &words[g][k], AHEAD, G * a_band);
            }
            for r in 0..R {
                let block = &self.x[r].values[b];
                let (low, high) = (quad(block, k), quad(block, 4 + k));
                for g in 0..G {
                    sums[g][r] = simd.dot4_nibbles(sums[g][r], &words[g][k], low, high);
                }
            }
        }
    }

    #[inline(always)]
    fn start<S: Simd, const G: usize>(
        &self,
        simd: S,
        b: usize,
        start: impl Fn(&Sums) -> i32,
        sums: &mut [[S::I; R]; G],
    ) {
        for r in 0..R {
            let start = simd.splat_i32(start(&self.x[r].sums[b]));
            for sums in sums.iter_mut() {
                sums[r] = start;
            }
        }
    }

    /// Asks for what lies behind `place`, which belongs to block `b`: `near` bytes, or `far` where the next bands are.
    #[inline(always)]
    fn ask<S: Simd, T>(&self, simd: S, b: usize, place: &T, near: usize, far: usize) {
        if !FAR {
            simd.prefetch(place, near);
        } else if self.far.contains(&b) {
            simd.prefetch_far(place, far);
        }
    }
}

#[inline(always)]
fn quad(block: &[i8; BLOCK], k: usize) -> [i8; 4] {
    block.as_chunks::<4>().0[k]
}

//! Products of packed weights with 8-bit inputs: precision `fast`.
//!
//! Weights times inputs are summed exactly as integers within a block of 32 inputs (or half of one) and scaled in f32, blocks
//! ascending. So a result depends on its row and its output alone, and is the same on every CPU, for any rows beside it and any number
//! of threads.
//!
//! A tile is a column of outputs with a strip of rows, all of whose sums are in registers. Two things decide its speed, and the
//! shape of its loops is for them alone. No branch comes between a block's first load and its last use, or the compiler loads all of the
//! inputs before it, into memory. And memory is asked for weights long before they are needed, evenly, word by word: a processor has few
//! places for what it waits for, and what comes from memory holds one so long that words from the second-level cache find none.
#![expect(clippy::needless_range_loop, reason = "tiles of registers are indexed by row and lane together")]

use std::ops::Range;

use super::{
    packed::{Numbers, Packed, SUPER, Scaling},
    simd::{Dots, Kernel, LANES, Simd},
    strips::{FIELDS, StripBlock, height},
};

/// How far ahead of their use weights are asked for: the processor's own prefetching ends with a page of 4 KiB.
pub(super) const AHEAD: usize = 6144;
/// Blocks ahead of which their scales are asked for.
const AHEAD_BLOCKS: usize = 16;
/// Bytes of inputs that many rows are to keep in the second-level cache while columns pass.
const STRETCH_BYTES: usize = 256 << 10;
/// Blocks of a stretch at least: columns are read from memory by it.
const LEAST_STRETCH: usize = 32;

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

/// Products of an expert's rows with some of its outputs.
pub(super) struct FastProduct<'a> {
    pub(super) matrix: &'a Packed,
    pub(super) expert: usize,
    /// Begins with a band.
    pub(super) outputs: Range<usize>,
    /// The rows, strip after strip.
    pub(super) strips: &'a [i32],
    /// `[rows, outputs.len()]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for FastProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.all(simd.dots());
    }
}

impl FastProduct<'_> {
    fn rows(&self) -> usize {
        self.strips.len() / (self.matrix.blocks * FIELDS)
    }

    /// Blocks of inputs that all columns pass before the next: all of them for one strip, else as many as stay in the cache.
    /// Between stretches the sums are in `out`.
    fn stretch(&self, strips: usize) -> usize {
        if strips < 2 {
            return self.matrix.blocks;
        }
        // What is summed apart from the rest is not cut.
        let unit = match self.matrix.scaling {
            Scaling::Groups { blocks, .. } => blocks,
            Scaling::Blocks { .. } => 1,
            Scaling::Supers { .. } => SUPER,
        };
        let fits = (STRETCH_BYTES / (self.rows() * FIELDS * size_of::<i32>())).max(LEAST_STRETCH);
        // Stretches of about one size.
        let count = self.matrix.blocks.div_ceil(fits);
        self.matrix.blocks.div_ceil(count).div_ceil(unit) * unit
    }

    /// All columns: the outputs of a register each.
    #[inline(always)]
    fn all<D: Dots>(mut self, dots: D) {
        let (rows, most) = (self.rows(), D::PACKING.strip);
        let columns = self.outputs.len().div_ceil(LANES / D::PACKING.parts);
        let (mut strips, mut first) = (0, 0);
        while first < rows {
            (strips, first) = (strips + 1, first + height(rows - first, most));
        }
        debug_assert_eq!(self.out.len(), rows * self.outputs.len());
        let blocks = self.matrix.blocks;
        let a_stretch = self.stretch(strips);
        for start in (0..blocks).step_by(a_stretch) {
            let stretch = start..(start + a_stretch).min(blocks);
            for column in 0..columns {
                let mut first = 0;
                for strip in 0..strips {
                    let place = Place { stretch: stretch.clone(), column, first, strip, strips };
                    let rows = height(rows - first, most);
                    match rows {
                        // Without registers for it there is no such strip, and this is not compiled.
                        8 if D::PACKING.strip == 8 => self.tile::<D, 8>(dots, place),
                        4 => self.tile::<D, 4>(dots, place),
                        3 => self.tile::<D, 3>(dots, place),
                        2 => self.tile::<D, 2>(dots, place),
                        _ => self.tile::<D, 1>(dots, place),
                    }
                    first += rows;
                }
            }
        }
    }

    /// Adds a stretch of a column to the sums of the strip's `R` rows.
    #[inline(always)]
    fn tile<D: Dots, const R: usize>(&mut self, dots: D, place: Place) {
        let Place { stretch, column, first, strip, strips } = place;
        let matrix = self.matrix;
        let a_row = matrix.blocks * FIELDS;
        let first_band = self.expert * matrix.bands + self.outputs.start / LANES;
        let width = self.outputs.len();
        let a_column = LANES / D::PACKING.parts;
        let start = column * a_column;
        // The last column may have fewer outputs than lanes.
        let used = a_column.min(width - start);
        let mut sums = [dots.zero(); R];
        if stretch.start > 0 {
            for r in 0..R {
                let mut lanes = [0.0; LANES];
                lanes[..used].copy_from_slice(&self.out[(first + r) * width + start..][..used]);
                sums[r] = dots.load(&lanes, 0);
            }
        }
        let column = first_band * D::PACKING.parts + column;
        let a_stream = matrix.blocks * matrix.numbers.words();
        let tile = Tile::<D, R> {
            dots,
            matrix,
            words: &bytemuck::cast_slice(&matrix.words)[column * a_stream..][..a_stream],
            band: column / D::PACKING.parts,
            part: column % D::PACKING.parts,
            x: StripBlock::all(&self.strips[first * a_row..][..R * a_row]),
            stretch,
            share: (strips > 1).then_some((strip, strips)),
        };
        let sums = tile.add_to(sums);
        for r in 0..R {
            dots.store(sums[r], &mut self.out[(first + r) * width + start..][..used]);
        }
    }
}

/// Where a tile is.
struct Place {
    stretch: Range<usize>,
    column: usize,
    /// First row.
    first: usize,
    strip: usize,
    strips: usize,
}

/// A strip of rows with a stretch of a column.
struct Tile<'a, D: Dots, const R: usize> {
    dots: D,
    matrix: &'a Packed,
    /// The column's.
    words: &'a [D::W],
    band: usize,
    /// The part of its band that the column is.
    part: usize,
    x: &'a [[[i32; R]; FIELDS]],
    stretch: Range<usize>,
    /// One of several tiles that read these weights, of which only the first finds them in memory: which, of how many.
    share: Option<(usize, usize)>,
}

/// Asks memory for what comes next of one of the streams that a tile reads: the only tile with its weights for what it will itself
/// read soon; of several, each for a share of the next column.
struct Ask<'a, T> {
    /// Where the stretch begins in the stream.
    begin: &'a T,
    /// Distance from there.
    next: usize,
    /// Bytes on for each `T` that the tile reads.
    step: usize,
}

impl<T> Ask<'_, T> {
    /// One `T` is about to be read.
    #[inline(always)]
    fn one<D: Dots>(&mut self, dots: D) {
        dots.prefetch(self.begin, self.next);
        self.next += self.step;
    }
}

impl<D: Dots, const R: usize> Tile<'_, D, R> {
    /// Asks for a stream, all of the column's, of which `ahead` are read before what is asked for.
    #[inline(always)]
    fn ask<'s, T>(&self, stream: &'s [T], ahead: usize) -> Ask<'s, T> {
        let (blocks, size) = (self.matrix.blocks, size_of::<T>());
        let begin = &stream[self.stretch.start * stream.len() / blocks];
        let Some((strip, strips)) = self.share else {
            return Ask { begin, next: ahead * size, step: size };
        };
        let of_stretch = self.stretch.len() * size_of_val(stream) / blocks;
        Ask { begin, next: size_of_val(stream) + strip * of_stretch / strips, step: size.div_ceil(strips) }
    }

    /// The band's of `values`, which has `count` for each band.
    #[inline(always)]
    fn of_band<'v, T>(&self, values: &'v [T], count: usize) -> &'v [T] {
        &values[self.band * count..][..count]
    }

    /// Adds to the sums.
    #[inline(always)]
    fn add_to(self, sums: [D::F; R]) -> [D::F; R] {
        let matrix = self.matrix;
        match (&matrix.scaling, matrix.numbers) {
            (Scaling::Groups { scales, blocks }, _) => self.groups(sums, scales, *blocks),
            (Scaling::Blocks { halves, minima: false }, Numbers::Nibbles) => self.blocks::<NIBBLES, 4, 1>(sums, halves),
            (Scaling::Blocks { halves, minima: false }, Numbers::Codes) => self.blocks::<CODES, 4, 1>(sums, halves),
            (Scaling::Blocks { halves, minima: false }, _) => self.blocks::<BYTES, 8, 1>(sums, halves),
            (Scaling::Blocks { halves, minima: true }, Numbers::Nibbles) => {
                self.blocks::<LOW_NIBBLES, 4, 2>(sums, halves)
            }
            (Scaling::Blocks { halves, minima: true }, _) => self.blocks::<LOW_BYTES, 8, 2>(sums, halves),
            (Scaling::Supers { halves, bytes, minima: false }, Numbers::Nibbles) => {
                self.supers::<NIBBLES, 4, 2, 2>(sums, halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: false }, Numbers::Codes) => {
                self.supers::<CODES, 4, 1, 1>(sums, halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: false }, _) => self.supers::<BYTES, 8, 2, 2>(sums, halves, bytes),
            (Scaling::Supers { halves, bytes, minima: true }, Numbers::Nibbles) => {
                self.supers::<LOW_NIBBLES, 4, 1, 2>(sums, halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: true }, Numbers::Quarters) => {
                self.supers::<QUARTERS, 2, 2, 4>(sums, halves, bytes)
            }
            (Scaling::Supers { halves, bytes, minima: true }, _) => {
                self.supers::<LOW_BYTES, 8, 1, 2>(sums, halves, bytes)
            }
        }
    }

    #[inline(always)]
    fn groups(&self, mut total: [D::F; R], scales: &[[f32; LANES]], a_group: usize) -> [D::F; R] {
        let dots = self.dots;
        let scales = self.of_band(scales, self.matrix.blocks / a_group);
        let words = self.words.as_chunks::<8>().0;
        let mut ask = self.ask(self.words, AHEAD / size_of::<D::W>());
        for group in self.stretch.start / a_group..self.stretch.end / a_group {
            let mut sum = [dots.zero(); R];
            for b in group * a_group..(group + 1) * a_group {
                let x = StripBlock::new(&self.x[b]);
                let products = self.products::<BYTES, 8, 1>(&words[b], x, 0, &mut ask);
                for r in 0..R {
                    sum[r] = dots.fma(dots.to_f32(products[r]), dots.splat(x.scale(r)), sum[r]);
                }
            }
            let scale = dots.load(&scales[group], self.part);
            for r in 0..R {
                total[r] = dots.fma(sum[r], scale, total[r]);
            }
        }
        total
    }

    /// Sums with scales of blocks of their own: a half, and with `H` of 2 one of the minimum.
    #[inline(always)]
    fn blocks<const KIND: u8, const N: usize, const H: usize>(
        &self,
        mut total: [D::F; R],
        halves: &[[u16; LANES]],
    ) -> [D::F; R] {
        let (dots, words) = (self.dots, self.words.as_chunks::<N>().0);
        let halves = self.of_band(halves, self.matrix.blocks * H).as_chunks::<H>().0;
        let mut ask = self.ask(self.words, AHEAD / size_of::<D::W>());
        let mut ask_halves = self.ask(halves, AHEAD_BLOCKS);
        for b in self.stretch.clone() {
            let (half, x) = (&halves[b], StripBlock::new(&self.x[b]));
            ask_halves.one(dots);
            let products = self.products::<KIND, N, 1>(&words[b], x, 0, &mut ask);
            let d = dots.load_f16(&half[0], self.part);
            for r in 0..R {
                total[r] = dots.fma(dots.to_f32(products[r]), dots.mul(d, dots.splat(x.scale(r))), total[r]);
            }
            if H == 2 {
                let m = dots.load_f16(&half[H - 1], self.part);
                for r in 0..R {
                    total[r] = dots.fma(m, dots.splat(x.taken::<1>(0, r)), total[r]);
                }
            }
        }
        total
    }

    /// Sums with scales of super-blocks: `P` parts of a block with a factor each, and with `F` of twice that a minimum each.
    #[inline(always)]
    fn supers<const KIND: u8, const N: usize, const P: usize, const F: usize>(
        &self,
        mut total: [D::F; R],
        halves: &[[u16; LANES]],
        bytes: &[[u8; LANES]],
    ) -> [D::F; R] {
        let (dots, words) = (self.dots, self.words.as_chunks::<N>().0);
        let (has_minima, a_super) = (F > P, F / P);
        let halves = self.of_band(halves, self.matrix.blocks / SUPER * a_super);
        let bytes = self.of_band(bytes, self.matrix.blocks * F).as_chunks::<F>().0;
        let mut ask = self.ask(self.words, AHEAD / size_of::<D::W>());
        let mut ask_bytes = self.ask(bytes, AHEAD_BLOCKS);
        let mut ask_halves = self.ask(halves, AHEAD_BLOCKS / SUPER * a_super);
        for index in self.stretch.start / SUPER..self.stretch.end / SUPER {
            let blocks = index * SUPER..(index + 1) * SUPER;
            for _ in 0..a_super {
                ask_halves.one(dots);
            }
            let mut sum = [dots.zero(); R];
            for b in blocks.clone() {
                let (words, factors, x) = (&words[b], &bytes[b], StripBlock::new(&self.x[b]));
                ask_bytes.one(dots);
                for p in 0..P {
                    let products = self.products::<KIND, N, P>(words, x, p, &mut ask);
                    let factor = if has_minima {
                        dots.load_u8(&factors[p], self.part)
                    } else {
                        dots.load_i8(bytemuck::cast_ref(&factors[p]), self.part)
                    };
                    for r in 0..R {
                        let factor = dots.mul(factor, dots.splat(x.scale(r)));
                        sum[r] = dots.fma(dots.to_f32(products[r]), factor, sum[r]);
                    }
                }
            }
            let half = &halves[index * a_super..][..a_super];
            let d = dots.load_f16(&half[0], self.part);
            for r in 0..R {
                total[r] = dots.fma(d, sum[r], total[r]);
            }
            if has_minima {
                // By themselves, since there are no registers for them beside the other sums.
                let mut minimum = [dots.zero(); R];
                for b in blocks {
                    let (factors, x) = (&bytes[b], StripBlock::new(&self.x[b]));
                    for p in 0..P {
                        let min = dots.load_u8(&factors[F - P + p], self.part);
                        for r in 0..R {
                            minimum[r] = dots.fma(min, dots.splat(x.taken::<P>(p, r)), minimum[r]);
                        }
                    }
                }
                let m = dots.load_f16(&half[a_super - 1], self.part);
                for r in 0..R {
                    total[r] = dots.fma(m, minimum[r], total[r]);
                }
            }
        }
        total
    }

    /// Sums of part `p` of the `P` of a block. No closures do it: they could be compiled without the instructions of this path.
    #[inline(always)]
    fn products<const KIND: u8, const N: usize, const P: usize>(
        &self,
        words: &[D::W; N],
        x: StripBlock<'_, R>,
        p: usize,
        ask: &mut Ask<'_, D::W>,
    ) -> [D::I; R] {
        match KIND {
            BYTES | LOW_BYTES => self.bytes::<KIND, N, P>(words, x, p, ask),
            CODES => self.codes(words, x, ask),
            QUARTERS => self.quarters(&words[p], x, p, ask),
            _ => self.nibbles::<KIND, N, P>(words, x, p, ask),
        }
    }

    #[inline(always)]
    fn bytes<const KIND: u8, const N: usize, const P: usize>(
        &self,
        words: &[D::W; N],
        x: StripBlock<'_, R>,
        p: usize,
        ask: &mut Ask<'_, D::W>,
    ) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin::<KIND, P>(x, p);
        for k in N / P * p..N / P * (p + 1) {
            ask.one(dots);
            for r in 0..R {
                let quad = x.quad(k, r);
                sums[r] = if KIND == BYTES {
                    dots.add_centred(sums[r], &words[k], quad)
                } else {
                    dots.add_small(sums[r], &words[k], quad)
                };
            }
        }
        sums
    }

    #[inline(always)]
    fn codes<const N: usize>(&self, words: &[D::W; N], x: StripBlock<'_, R>, ask: &mut Ask<'_, D::W>) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin::<CODES, 1>(x, 0);
        for k in 0..N {
            ask.one(dots);
            for r in 0..R {
                sums[r] = dots.add_codes::<0>(sums[r], &words[k], x.quad(k, r));
            }
            for r in 0..R {
                sums[r] = dots.add_codes::<4>(sums[r], &words[k], x.quad(N + k, r));
            }
        }
        sums
    }

    #[inline(always)]
    fn nibbles<const KIND: u8, const N: usize, const P: usize>(
        &self,
        words: &[D::W; N],
        x: StripBlock<'_, R>,
        p: usize,
        ask: &mut Ask<'_, D::W>,
    ) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin_bits::<KIND, P>(x, p);
        for k in 0..N {
            if P == 1 || p == 0 {
                // A second part reads the same words.
                ask.one(dots);
                for r in 0..R {
                    sums[r] = dots.add_bits::<4, 0>(sums[r], &words[k], x.quad(k, r));
                }
            }
            if P == 1 || p == 1 {
                for r in 0..R {
                    sums[r] = dots.add_bits::<4, 4>(sums[r], &words[k], x.quad(N + k, r));
                }
            }
        }
        self.end_bits::<KIND, P>(sums, x, p)
    }

    #[inline(always)]
    fn quarters(&self, word: &D::W, x: StripBlock<'_, R>, half: usize, ask: &mut Ask<'_, D::W>) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin_bits::<QUARTERS, 2>(x, half);
        ask.one(dots);
        for r in 0..R {
            sums[r] = dots.add_bits::<2, 0>(sums[r], word, x.quad(4 * half, r));
            sums[r] = dots.add_bits::<2, 2>(sums[r], word, x.quad(4 * half + 1, r));
            sums[r] = dots.add_bits::<2, 4>(sums[r], word, x.quad(4 * half + 2, r));
            sums[r] = dots.add_bits::<2, 6>(sums[r], word, x.quad(4 * half + 3, r));
        }
        self.end_bits::<QUARTERS, 2>(sums, x, half)
    }

    /// What sums of bytes begin with.
    #[inline(always)]
    fn begin<const KIND: u8, const P: usize>(&self, x: StripBlock<'_, R>, p: usize) -> [D::I; R] {
        let mut sums = [self.dots.small(); R];
        for r in 0..R {
            sums[r] = self.dots.centred(offset::<KIND, P, R>(x, p, r));
        }
        sums
    }

    /// What sums of parts of bytes begin with.
    #[inline(always)]
    fn begin_bits<const KIND: u8, const P: usize>(&self, x: StripBlock<'_, R>, p: usize) -> [D::N; R] {
        let mut sums = [self.dots.bits(0); R];
        for r in 0..R {
            sums[r] = self.dots.bits(offset::<KIND, P, R>(x, p, r));
        }
        sums
    }

    /// Finished sums of parts of bytes.
    #[inline(always)]
    fn end_bits<const KIND: u8, const P: usize>(&self, sums: [D::N; R], x: StripBlock<'_, R>, p: usize) -> [D::I; R] {
        let mut whole = [self.dots.small(); R];
        for r in 0..R {
            whole[r] = self.dots.sum_bits(sums[r], offset::<KIND, P, R>(x, p, r));
        }
        whole
    }
}

/// What a row's sum of part `p` of the `P` of a block is too large by, negative.
#[inline(always)]
fn offset<const KIND: u8, const P: usize, const R: usize>(x: StripBlock<'_, R>, p: usize, r: usize) -> i32 {
    match KIND {
        BYTES | CODES => x.offset::<P>(p, r),
        NIBBLES => x.offset::<P>(p, r) >> 4,
        _ => 0,
    }
}

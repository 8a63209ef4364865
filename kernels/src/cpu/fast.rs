//! Products of packed weights with 8-bit inputs: precision `fast`.
//!
//! Weights times inputs are summed exactly as integers within a block of 32 inputs (or half of one) and scaled in f32, blocks
//! ascending. So a result depends on its row and its output alone, and is the same on every CPU, for any rows beside it and any number
//! of threads.
//!
//! A tile is a column of outputs with a strip of rows, all of whose sums are in registers. Two things decide its speed, and the
//! shape of its loops is for them alone. No branch comes between a block's first load and its last use, or the compiler loads all of the
//! inputs before it, into memory. And memory is asked for weights long before they are needed, evenly, word by word: a processor has few
//! places for what it waits for, and what comes from memory holds one so long that words from the second-level cache find none
//! (`prefetch.rs`).
#![expect(clippy::needless_range_loop, reason = "tiles of registers are indexed by row and lane together")]

use std::ops::Range;

use bytemuck::Pod;

use super::{
    packed::{Numbers, Packed, SIXES, SUPER, Scaling},
    prefetch::Ask,
    simd::{Dots, Isa, Kernel, LANES, Simd},
    strips::{FIELDS, StripBlock, height},
    threads::Stretch,
};

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
pub(super) struct FastProduct<'a, 'o> {
    pub(super) matrix: &'a Packed,
    pub(super) expert: usize,
    /// Begins with a band.
    pub(super) outputs: Range<usize>,
    /// The rows, strip after strip.
    pub(super) strips: &'a [i32],
    /// `outputs.len()` numbers for each row.
    pub(super) out: &'a mut [&'o mut [f32]],
    /// What is read next.
    pub(super) then: Stretch,
}

impl FastProduct<'_, '_> {
    /// Computes `out`. One strip reads each weight once, and asks for it twice if `isa` does so; of several, all but the first find the
    /// weights in the cache.
    pub(super) fn run_on(self, isa: Isa) {
        // Two functions: with both sets of tiles in one, compiling takes minutes more.
        if isa.asks_twice() && self.rows() <= isa.packing().strip {
            isa.run(Columns::<true>(self));
        } else {
            isa.run(Columns::<false>(self));
        }
    }

    fn rows(&self) -> usize {
        self.strips.len() / (self.matrix.blocks * FIELDS)
    }

    /// Blocks of inputs that all columns pass before the next: all of them for one strip, else as many as stay in the cache.
    fn stretch(&self, strips: usize) -> usize {
        if strips < 2 {
            return self.matrix.blocks;
        }
        let fits = (STRETCH_BYTES / (self.rows() * FIELDS * size_of::<i32>())).max(LEAST_STRETCH);
        // Stretches of about one size, of whole chunks.
        let (count, unit) = (self.matrix.blocks.div_ceil(fits), self.matrix.chunk.blocks);
        self.matrix.blocks.div_ceil(count).div_ceil(unit) * unit
    }

    /// All columns: the outputs of a register each.
    #[inline(always)]
    fn all<D: Dots, const TWICE: bool>(mut self, dots: D) {
        let (rows, most) = (self.rows(), D::PACKING.strip);
        let columns = self.outputs.len().div_ceil(LANES / D::PACKING.parts);
        let (mut strips, mut first) = (0, 0);
        while first < rows {
            (strips, first) = (strips + 1, first + height(rows - first, most));
        }
        debug_assert_eq!(self.out.len(), rows);
        let blocks = self.matrix.blocks;
        let a_stretch = self.stretch(strips);
        // Sums between stretches, as tiles come. In `out` they would lie a row apart, which often is a power of two: one set of a cache.
        let mut between = vec![[0.0; LANES]; if a_stretch < blocks { columns * rows } else { 0 }];
        for start in (0..blocks).step_by(a_stretch) {
            let stretch = start..(start + a_stretch).min(blocks);
            for column in 0..columns {
                let mut first = 0;
                for strip in 0..strips {
                    let place = Place { stretch: stretch.clone(), column, first, strip, strips };
                    let height = height(rows - first, most);
                    let between = between.get_mut(column * rows + first..).unwrap_or_default();
                    match height {
                        // Without registers for them there are no such strips, and these are not compiled.
                        8 if D::PACKING.strip == 8 => self.tile::<D, 8, TWICE>(dots, place, between),
                        7 if D::PACKING.strip == 8 => self.tile::<D, 7, TWICE>(dots, place, between),
                        6 if D::PACKING.strip == 8 => self.tile::<D, 6, TWICE>(dots, place, between),
                        5 if D::PACKING.strip == 8 => self.tile::<D, 5, TWICE>(dots, place, between),
                        4 => self.tile::<D, 4, TWICE>(dots, place, between),
                        3 => self.tile::<D, 3, TWICE>(dots, place, between),
                        2 => self.tile::<D, 2, TWICE>(dots, place, between),
                        1 => self.tile::<D, 1, TWICE>(dots, place, between),
                        _ => unreachable!("there is a tile for every height of a strip"),
                    }
                    first += height;
                }
            }
        }
    }

    /// Adds a stretch of a column to the sums of the strip's `R` rows. `between` holds them, a row's after the other, until the last
    /// stretch writes them to `out`.
    #[inline(always)]
    fn tile<D: Dots, const R: usize, const TWICE: bool>(
        &mut self,
        dots: D,
        place: Place,
        between: &mut [[f32; LANES]],
    ) {
        let Place { stretch, column, first, strip, strips } = place;
        let matrix = self.matrix;
        let a_row = matrix.blocks * FIELDS;
        let first_band = self.expert * matrix.bands + self.outputs.start / LANES;
        let a_column = LANES / D::PACKING.parts;
        let start = column * a_column;
        let mut sums = [dots.zero(); R];
        if stretch.start > 0 {
            for r in 0..R {
                sums[r] = dots.load(&between[r]);
            }
        }
        let is_last = stretch.end == matrix.blocks;
        let a_stream = matrix.stream();
        let tile = Tile::<D, R, TWICE> {
            dots,
            matrix,
            stream: &bytemuck::cast_slice(&matrix.words)[(first_band * D::PACKING.parts + column) * a_stream..]
                [..a_stream],
            x: StripBlock::all(&self.strips[first * a_row..][..R * a_row]),
            stretch,
            share: (strips > 1).then_some((strip, strips)),
            left: (self.outputs.len().div_ceil(a_column) - column) * a_stream * size_of::<D::W>(),
            then: self.then.begin().cast(),
        };
        let sums = tile.add_to(sums);
        if is_last {
            // The last column may have fewer outputs than lanes.
            let used = a_column.min(self.outputs.len() - start);
            for r in 0..R {
                dots.store(sums[r], &mut self.out[first + r][start..][..used]);
            }
        } else {
            for r in 0..R {
                dots.store(sums[r], &mut between[r]);
            }
        }
    }
}

/// The product, its weights asked for once or `TWICE`.
struct Columns<'a, 'o, const TWICE: bool>(FastProduct<'a, 'o>);

impl<const TWICE: bool> Kernel for Columns<'_, '_, TWICE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.0.all::<S::Dots, TWICE>(simd.dots());
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
struct Tile<'a, D: Dots, const R: usize, const TWICE: bool> {
    dots: D,
    matrix: &'a Packed,
    /// The column's.
    stream: &'a [D::W],
    x: &'a [[[i32; R]; FIELDS]],
    stretch: Range<usize>,
    /// One of several tiles that read these weights, of which only the first finds them in memory: which, of how many.
    share: Option<(usize, usize)>,
    /// Bytes from the column's first on that the product reads.
    left: usize,
    /// What is read after those.
    then: *const D::W,
}

impl<'a, D: Dots, const R: usize, const TWICE: bool> Tile<'a, D, R, TWICE> {
    /// The stretch's part of the stream, and what asks for it.
    #[inline(always)]
    fn words(&self) -> (&'a [D::W], Ask<D::W, TWICE>) {
        let (chunk, size) = (self.matrix.chunk, size_of::<D::W>());
        let place = |block: usize| block.div_ceil(chunk.blocks) * chunk.words;
        let words = &self.stream[place(self.stretch.start)..place(self.stretch.end)];
        let ask = match self.share {
            // `TWICE` there is one strip: said here, so that the step is a constant there.
            Some((strip, strips)) if !TWICE => {
                let from = size_of_val(self.stream) + strip * size_of_val(words) / strips;
                Ask::behind(words.as_ptr(), from, size.div_ceil(strips))
            }
            _ => Ask::of_own(words, self.left, self.then),
        };
        (words, ask)
    }

    /// Adds to the sums.
    #[inline(always)]
    fn add_to(self, sums: [D::F; R]) -> [D::F; R] {
        match (self.matrix.scaling, self.matrix.numbers) {
            (Scaling::Groups(blocks), _) => self.groups(sums, blocks),
            (Scaling::Blocks { minima: false }, Numbers::Nibbles) => self.blocks::<NIBBLES, 4, 1>(sums),
            (Scaling::Blocks { minima: false }, Numbers::Codes) => self.blocks::<CODES, 4, 1>(sums),
            (Scaling::Blocks { minima: false }, _) => self.blocks::<BYTES, 8, 1>(sums),
            (Scaling::Blocks { minima: true }, Numbers::Nibbles) => self.blocks::<LOW_NIBBLES, 4, 2>(sums),
            (Scaling::Blocks { minima: true }, _) => self.blocks::<LOW_BYTES, 8, 2>(sums),
            (Scaling::Supers { minima: false, .. }, Numbers::Nibbles) => self.supers::<NIBBLES, 4, 2, 2, 2>(sums),
            (Scaling::Supers { minima: false, .. }, Numbers::Codes) => self.supers::<CODES, 4, 1, 1, 4>(sums),
            (Scaling::Supers { minima: false, .. }, _) => self.supers::<BYTES, 8, 2, 2, 2>(sums),
            (Scaling::Supers { minima: true, .. }, Numbers::Nibbles) => self.sixes::<LOW_NIBBLES, 4>(sums),
            (Scaling::Supers { minima: true, .. }, Numbers::Quarters) => self.supers::<QUARTERS, 2, 2, 4, 1>(sums),
            (Scaling::Supers { minima: true, .. }, _) => self.sixes::<LOW_BYTES, 8>(sums),
        }
    }

    #[inline(always)]
    fn groups(&self, mut total: [D::F; R], a_group: usize) -> [D::F; R] {
        let dots = self.dots;
        let (words, mut ask) = self.words();
        let xs = self.x[self.stretch.clone()].chunks_exact(a_group);
        for (chunk, xs) in words.chunks_exact(8 * a_group + 1).zip(xs) {
            let (words, scale) = chunk.as_chunks::<8>();
            let mut sum = [dots.zero(); R];
            for (words, x) in words.iter().zip(xs) {
                let x = StripBlock::new(x);
                let products = self.products::<BYTES, 8, 1>(words, x, 0, &mut ask);
                for r in 0..R {
                    sum[r] = dots.fma(dots.to_f32(products[r]), dots.splat(x.scale(r)), sum[r]);
                }
            }
            ask.one();
            let scale = dots.floats(&scale[0]);
            for r in 0..R {
                total[r] = dots.fma(sum[r], scale, total[r]);
            }
        }
        total
    }

    /// Sums with scales of blocks of their own: a half, and with `H` of 2 one of the minimum.
    #[inline(always)]
    fn blocks<const KIND: u8, const N: usize, const H: usize>(&self, mut total: [D::F; R]) -> [D::F; R] {
        let (dots, a_unit) = (self.dots, 2 / H);
        let (words, mut ask) = self.words();
        let xs = self.x[self.stretch.clone()].chunks(a_unit);
        for (unit, xs) in words.chunks_exact(1 + a_unit * N).zip(xs) {
            let (scales, words) = (&unit[0], unit[1..].as_chunks::<N>().0);
            ask.one();
            for (index, (words, x)) in words.iter().zip(xs).enumerate() {
                let x = StripBlock::new(x);
                let products = self.products::<KIND, N, 1>(words, x, 0, &mut ask);
                let d = dots.halves(scales, index);
                for r in 0..R {
                    total[r] = dots.fma(dots.to_f32(products[r]), dots.mul(d, dots.splat(x.scale(r))), total[r]);
                }
                if H == 2 {
                    let m = dots.halves(scales, 1);
                    for r in 0..R {
                        total[r] = dots.fma(m, dots.splat(x.taken::<1>(0, r)), total[r]);
                    }
                }
            }
        }
        total
    }

    /// Sums with scales of super-blocks: `P` parts of a block with a factor each, and with `F` of twice that a minimum each; those of
    /// `U` blocks are a word.
    #[inline(always)]
    fn supers<const KIND: u8, const N: usize, const P: usize, const F: usize, const U: usize>(
        &self,
        mut total: [D::F; R],
    ) -> [D::F; R] {
        let (dots, has_minima, a_unit) = (self.dots, F > P, 1 + U * N);
        let (words, mut ask) = self.words();
        let xs = self.x[self.stretch.clone()].as_chunks::<SUPER>().0;
        for (chunk, xs) in words.chunks_exact(SUPER / U * a_unit + 1).zip(xs) {
            let xs = xs.as_chunks::<U>().0;
            let mut sum = [dots.zero(); R];
            for (unit, xs) in chunk.chunks_exact(a_unit).zip(xs) {
                let (factors, words) = (&unit[0], unit[1..].as_chunks::<N>().0);
                ask.one();
                for (b, (words, x)) in words.iter().zip(xs).enumerate() {
                    let x = StripBlock::new(x);
                    for p in 0..P {
                        let products = self.products::<KIND, N, P>(words, x, p, &mut ask);
                        let row = F * b + p;
                        let factor =
                            if has_minima { dots.bytes(factors, row) } else { dots.signed_bytes(factors, row) };
                        for r in 0..R {
                            let factor = dots.mul(factor, dots.splat(x.scale(r)));
                            sum[r] = dots.fma(dots.to_f32(products[r]), factor, sum[r]);
                        }
                    }
                }
            }
            ask.one();
            let halves = &chunk[SUPER / U * a_unit];
            let d = dots.halves(halves, 0);
            for r in 0..R {
                total[r] = dots.fma(d, sum[r], total[r]);
            }
            if has_minima {
                // By themselves, since there are no registers for them beside the other sums.
                let mut minimum = [dots.zero(); R];
                for (unit, xs) in chunk.chunks_exact(a_unit).zip(xs) {
                    for (b, x) in xs.iter().enumerate() {
                        let x = StripBlock::new(x);
                        for p in 0..P {
                            let min = dots.bytes(&unit[0], F * b + F - P + p);
                            for r in 0..R {
                                minimum[r] = dots.fma(min, dots.splat(x.taken::<P>(p, r)), minimum[r]);
                            }
                        }
                    }
                }
                let m = dots.halves(halves, 1);
                for r in 0..R {
                    total[r] = dots.fma(m, minimum[r], total[r]);
                }
            }
        }
        total
    }

    /// Sums with scales and minima of super-blocks in six bits, which lie before their blocks. Not a case of [`Self::supers`]: a choice of
    /// where scales come from made its loops slow.
    #[inline(always)]
    fn sixes<const KIND: u8, const N: usize>(&self, mut total: [D::F; R]) -> [D::F; R] {
        let dots = self.dots;
        let (words, mut ask) = self.words();
        let xs = self.x[self.stretch.clone()].as_chunks::<SUPER>().0;
        for (chunk, xs) in words.chunks_exact(SIXES + SUPER * N + 1).zip(xs) {
            let (factors, chunk) = chunk.split_at(SIXES);
            for _ in 0..SIXES {
                ask.one();
            }
            let factors = unpacked(factors);
            let (words, halves) = chunk.as_chunks::<N>();
            let (words, xs) = (words.as_chunks::<2>().0, xs.as_chunks::<2>().0);
            let mut sum = [dots.zero(); R];
            for ((words, xs), factors) in words.iter().zip(xs).zip(&factors) {
                for (b, (words, x)) in words.iter().zip(xs).enumerate() {
                    let x = StripBlock::new(x);
                    let products = self.products::<KIND, N, 1>(words, x, 0, &mut ask);
                    let factor = dots.bytes(factors, 2 * b);
                    for r in 0..R {
                        let factor = dots.mul(factor, dots.splat(x.scale(r)));
                        sum[r] = dots.fma(dots.to_f32(products[r]), factor, sum[r]);
                    }
                }
            }
            ask.one();
            let d = dots.halves(&halves[0], 0);
            for r in 0..R {
                total[r] = dots.fma(d, sum[r], total[r]);
            }
            // By themselves, since there are no registers for them beside the other sums.
            let mut minimum = [dots.zero(); R];
            for (xs, factors) in xs.iter().zip(&factors) {
                for (b, x) in xs.iter().enumerate() {
                    let x = StripBlock::new(x);
                    let min = dots.bytes(factors, 2 * b + 1);
                    for r in 0..R {
                        minimum[r] = dots.fma(min, dots.splat(x.taken::<1>(0, r)), minimum[r]);
                    }
                }
            }
            let m = dots.halves(&halves[0], 1);
            for r in 0..R {
                total[r] = dots.fma(m, minimum[r], total[r]);
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
        ask: &mut Ask<D::W, TWICE>,
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
        ask: &mut Ask<D::W, TWICE>,
    ) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin::<KIND, P>(x, p);
        for k in N / P * p..N / P * (p + 1) {
            ask.one();
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
    fn codes<const N: usize>(&self, words: &[D::W; N], x: StripBlock<'_, R>, ask: &mut Ask<D::W, TWICE>) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin::<CODES, 1>(x, 0);
        for k in 0..N {
            ask.one();
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
        ask: &mut Ask<D::W, TWICE>,
    ) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin_bits::<KIND, P>(x, p);
        for k in 0..N {
            if P == 1 || p == 0 {
                // A second part reads the same words.
                ask.one();
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
    fn quarters(&self, word: &D::W, x: StripBlock<'_, R>, half: usize, ask: &mut Ask<D::W, TWICE>) -> [D::I; R] {
        let dots = self.dots;
        let mut sums = self.begin_bits::<QUARTERS, 2>(x, half);
        ask.one();
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

/// The four words that [`SIXES`] stand for.
#[inline(always)]
fn unpacked<W: Pod>(packed: &[W]) -> [W; SIXES + 1] {
    const SIX: u64 = 0x3f3f_3f3f_3f3f_3f3f;
    const TWO: u64 = 0x0303_0303_0303_0303;
    let mut words = [W::zeroed(); SIXES + 1];
    let [first, second, third, fourth] = &mut words;
    let packed = [0, 1, 2].map(|word| bytemuck::bytes_of(&packed[word]).as_chunks().0);
    let out = [first, second, third, fourth].map(|word| bytemuck::bytes_of_mut(word).as_chunks_mut().0);
    for i in 0..size_of::<W>() / 8 {
        let packed = packed.map(|words| u64::from_le_bytes(words[i]));
        for word in 0..SIXES {
            out[word][i] = (packed[word] & SIX).to_le_bytes();
        }
        let [first, second, third] = packed.map(|word| word >> 6 & TWO);
        out[SIXES][i] = (first | second << 2 | third << 4).to_le_bytes();
    }
    words
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

//! Matrix products: rows times one expert's matrix.
//!
//! One (row, output) pair is one sum, always in the same order: in each scale group 16 lanes, inputs ascending; the lanes times
//! the group's scale added to the total; at last the fixed tree of [`reduce`]. Blocks of outputs and rows only decide which
//! sums are computed side by side, so that a weight is read and converted once for several rows and a row's inputs are read once for
//! several outputs.
#![expect(clippy::needless_range_loop, reason = "tiles of registers are indexed by band, row and lane together")]

use std::ops::Range;

use half::{bf16, f16};

use super::{
    fast::FastProduct,
    matrix::{CpuMatrix, Values},
    prefetch::{ROWS_AHEAD, prefetch},
    simd::{Isa, Kernel, LANES, Simd, reduce},
    threads::Stretch,
};

/// A weight as stored.
trait Weight: Copy {
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::V;
}

impl Weight for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::V {
        simd.load(values)
    }
}

impl Weight for i8 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::V {
        simd.load_i8(values)
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::V {
        simd.load_f16(values)
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::V {
        simd.load_bf16(values)
    }
}

/// Products of padded rows with some outputs of one expert.
pub(super) struct Product<'a, 'o> {
    pub(super) matrix: &'a CpuMatrix,
    pub(super) expert: usize,
    pub(super) outputs: Range<usize>,
    pub(super) rows: SomeRows<'a>,
    /// `outputs.len()` numbers for each row.
    pub(super) out: &'a mut [&'o mut [f32]],
    /// What the same thread reads next, to be asked for when these weights come to an end. A hint.
    pub(super) then: Stretch,
}

/// Rows of inputs as a matrix wants them, those of each of its experts together.
pub(super) enum Rows<'a> {
    /// Of `padded_inputs`.
    Floats(Vec<&'a [f32]>),
    /// For packed weights: the strips of each expert's rows, with so many words a row.
    Strips(&'a [i32], usize),
}

/// The rows of one expert.
#[derive(Clone, Copy)]
pub(super) enum SomeRows<'a> {
    Floats(&'a [&'a [f32]]),
    Strips(&'a [i32]),
}

impl Rows<'_> {
    /// Those of one expert.
    pub(super) fn of(&self, range: Range<usize>) -> SomeRows<'_> {
        match self {
            Self::Floats(rows) => SomeRows::Floats(&rows[range]),
            Self::Strips(words, a_row) => SomeRows::Strips(&words[range.start * a_row..range.end * a_row]),
        }
    }
}

impl Product<'_, '_> {
    /// Computes `out`.
    pub(super) fn run_on(self, isa: Isa) {
        match (&self.matrix.values, self.rows) {
            (Values::Packed(matrix), SomeRows::Strips(strips)) => {
                let Self { expert, outputs, out, then, .. } = self;
                FastProduct { matrix, expert, outputs, strips, out, then }.run_on(isa);
            }
            (_, SomeRows::Floats(rows)) => {
                debug_assert_eq!(self.out.len(), rows.len());
                let Self { matrix, expert, outputs, out, .. } = self;
                isa.run(ExactProduct { matrix, expert, outputs, rows, out });
            }
            (_, SomeRows::Strips(_)) => unreachable!("rows are made for their matrix"),
        }
    }
}

/// Products in f32.
struct ExactProduct<'a, 'o> {
    matrix: &'a CpuMatrix,
    expert: usize,
    outputs: Range<usize>,
    rows: &'a [&'a [f32]],
    out: &'a mut [&'o mut [f32]],
}

impl Kernel for ExactProduct<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let padded = self.matrix.padded_inputs();
        let first = self.expert * self.matrix.outputs + self.outputs.start;
        let count = self.outputs.len();
        let scales = match self.matrix.scales.as_slice() {
            [one] => Scales { values: std::slice::from_ref(one), groups: 0 },
            all => {
                let groups = self.matrix.groups;
                Scales { values: &all[first * groups..][..count * groups], groups }
            }
        };
        let shape = Shape { padded, groups: self.matrix.groups, group: self.matrix.padded_group };
        let mut out = Out { rows: self.out, first: 0 };
        match &self.matrix.values {
            Values::F32(w) => shape.all(simd, &w[first * padded..][..count * padded], scales, self.rows, &mut out),
            Values::F16(w) => shape.all(simd, &w[first * padded..][..count * padded], scales, self.rows, &mut out),
            Values::Bf16(w) => shape.all(simd, &w[first * padded..][..count * padded], scales, self.rows, &mut out),
            Values::I8(w) => shape.all(simd, &w[first * padded..][..count * padded], scales, self.rows, &mut out),
            Values::Blocks(kind, bytes) => {
                let inputs = self.matrix.inputs;
                let row_bytes = inputs / kind.weights() * kind.bytes();
                let rows = &bytes[first * row_bytes..][..count * row_bytes];
                // A few outputs at a time become numbers, which stay in the second-level cache until every row has passed.
                let mut numbers = vec![0.0; BLOCK_OUTPUTS.min(count) * padded];
                for blocks in rows.chunks(BLOCK_OUTPUTS * row_bytes) {
                    for (blocks, numbers) in blocks.chunks(row_bytes).zip(numbers.chunks_mut(padded)) {
                        kind.dequantize(blocks, &mut numbers[..inputs]);
                    }
                    let used = blocks.len() / row_bytes * padded;
                    shape.all(simd, &numbers[..used], scales, self.rows, &mut out);
                    out.first += BLOCK_OUTPUTS;
                }
            }
            Values::Packed(_) => unreachable!("packed weights have products of their own"),
        }
    }
}

/// Outputs of a matrix of blocks that are numbers at a time.
const BLOCK_OUTPUTS: usize = 4;

/// Scales of the outputs; `groups` 0 when one number serves all.
#[derive(Clone, Copy)]
struct Scales<'a> {
    values: &'a [f32],
    groups: usize,
}

impl Scales<'_> {
    #[inline(always)]
    fn at(&self, output: usize, group: usize) -> f32 {
        self.values[if self.groups == 0 { 0 } else { output * self.groups + group }]
    }
}

/// Where results go: outputs from `first` on of rows.
struct Out<'a, 'o> {
    rows: &'a mut [&'o mut [f32]],
    first: usize,
}

impl Out<'_, '_> {
    #[inline(always)]
    fn row(&mut self, index: usize) -> &mut [f32] {
        &mut self.rows[index][self.first..]
    }
}

#[derive(Clone, Copy)]
struct Shape {
    padded: usize,
    groups: usize,
    group: usize,
}

impl Shape {
    /// All rows and outputs, rows outermost: a block's inputs stay in the second-level cache while the outputs pass.
    #[inline(always)]
    fn all<S: Simd, W: Weight>(self, simd: S, w: &[W], scales: Scales<'_>, rows: &[&[f32]], out: &mut Out<'_, '_>) {
        let mut first = 0;
        if S::MANY_REGISTERS {
            while rows.len() - first >= 4 {
                self.outputs::<S, W, 4, 4>(simd, w, scales, rows, first, out);
                first += 4;
            }
        } else {
            while rows.len() - first >= 3 {
                self.outputs::<S, W, 2, 3>(simd, w, scales, rows, first, out);
                first += 3;
            }
        }
        while rows.len() - first >= 2 {
            self.outputs::<S, W, 2, 2>(simd, w, scales, rows, first, out);
            first += 2;
        }
        if rows.len() > first {
            self.outputs::<S, W, 4, 1>(simd, w, scales, rows, first, out);
        }
    }

    /// Rows `first..first + R` with all outputs.
    #[inline(always)]
    fn outputs<S: Simd, W: Weight, const O: usize, const R: usize>(
        self,
        simd: S,
        w: &[W],
        scales: Scales<'_>,
        rows: &[&[f32]],
        first: usize,
        out: &mut Out<'_, '_>,
    ) {
        let mut x: [&[f32]; R] = [&[]; R];
        x.copy_from_slice(&rows[first..first + R]);
        let count = w.len() / self.padded;
        let mut n = 0;
        while count - n >= O {
            let sums = self.tile::<S, W, O, R>(simd, w, n, scales, &x);
            for r in 0..R {
                let out = &mut out.row(first + r)[n..n + O];
                for (out, sums) in out.iter_mut().zip(&sums) {
                    *out = sums[r];
                }
            }
            n += O;
        }
        while n < count {
            let sums = self.tile::<S, W, 1, R>(simd, w, n, scales, &x);
            for r in 0..R {
                out.row(first + r)[n] = sums[0][r];
            }
            n += 1;
        }
    }

    /// The sums of `O` outputs from `n` on with `R` rows.
    #[inline(always)]
    fn tile<S: Simd, W: Weight, const O: usize, const R: usize>(
        self,
        simd: S,
        w: &[W],
        n: usize,
        scales: Scales<'_>,
        x: &[&[f32]; R],
    ) -> [[f32; R]; O] {
        let mut total = [[simd.zero(); R]; O];
        let pieces = self.group / LANES;
        for g in 0..self.groups {
            let mut w_pieces: [&[[W; LANES]]; O] = [&[]; O];
            for (o, w_piece) in w_pieces.iter_mut().enumerate() {
                *w_piece = &w[(n + o) * self.padded + g * self.group..][..self.group].as_chunks().0[..pieces];
            }
            let mut x_pieces: [&[[f32; LANES]]; R] = [&[]; R];
            for (r, x_piece) in x_pieces.iter_mut().enumerate() {
                *x_piece = &x[r][g * self.group..][..self.group].as_chunks().0[..pieces];
            }
            let mut sum = [[simd.zero(); R]; O];
            for c in 0..pieces {
                let mut inputs = [simd.zero(); R];
                for r in 0..R {
                    inputs[r] = simd.load(&x_pieces[r][c]);
                }
                for o in 0..O {
                    if R == 1 {
                        prefetch::<1, _>(w_pieces[o].as_ptr().wrapping_add(c).wrapping_byte_add(ROWS_AHEAD));
                    }
                    let weight = W::load(simd, &w_pieces[o][c]);
                    for r in 0..R {
                        sum[o][r] = simd.fma(inputs[r], weight, sum[o][r]);
                    }
                }
            }
            for o in 0..O {
                let scale = simd.splat(scales.at(n + o, g));
                for r in 0..R {
                    total[o][r] = simd.fma(sum[o][r], scale, total[o][r]);
                }
            }
        }
        let mut out = [[0.0; R]; O];
        for o in 0..O {
            for r in 0..R {
                out[o][r] = reduce(simd.array(total[o][r]));
            }
        }
        out
    }
}

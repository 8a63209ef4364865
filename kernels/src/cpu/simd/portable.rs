//! Plain Rust. Slow where the target has no multiply-add by default, and right everywhere.

use half::f16;

use super::{super::math::ROUND, Dots, LANES, Packing, Simd, Word, dots::CODES};

/// Sixteen floats, with products by `D`.
#[derive(Clone, Copy)]
pub(super) struct Portable<D = Plain>(pub(super) D);

/// Products in plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl<D: Dots> Simd for Portable<D> {
    type V = [f32; LANES];
    /// Even where there are 32, as on 64-bit ARM: sixteen lanes are four of them, so that 4 by 4 sums would be 64.
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::V {
        [0.0; LANES]
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::V {
        *values
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Self::V {
        values.map(f32::from)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; LANES] {
        v
    }

    /// In the low bits of floats: with no instruction for it, a rounding is many.
    #[inline(always)]
    fn round(self, v: Self::V) -> [i8; LANES] {
        v.map(|value| (value + ROUND).to_bits() as i8)
    }

    type Dots = D;

    #[inline(always)]
    fn dots(self) -> D {
        self.0
    }
}

impl Dots for Plain {
    const PACKING: Packing = Packing { parts: 1, flip: 0, strip: 4 };
    type W = Word;
    type F = [f32; LANES];
    type I = [i32; LANES];
    type N = [i32; LANES];

    #[inline(always)]
    fn zero(self) -> Self::F {
        [0.0; LANES]
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F {
        *values
    }

    #[inline(always)]
    fn floats(self, word: &Word) -> Self::F {
        std::array::from_fn(|i| f32::from_le_bytes(word.0.as_chunks().0[i]))
    }

    #[inline(always)]
    fn halves(self, word: &Word, row: usize) -> Self::F {
        let row = &word.0.as_chunks::<{ 2 * LANES }>().0[row % 2];
        std::array::from_fn(|i| f16::from_le_bytes(row.as_chunks().0[i]).to_f32())
    }

    #[inline(always)]
    fn signed_bytes(self, word: &Word, row: usize) -> Self::F {
        word.0.as_chunks::<LANES>().0[row % 4].map(|byte| f32::from(byte as i8))
    }

    #[inline(always)]
    fn bytes(self, word: &Word, row: usize) -> Self::F {
        word.0.as_chunks::<LANES>().0[row % 4].map(f32::from)
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::I) -> Self::F {
        sums.map(|value| value as f32)
    }

    #[inline(always)]
    fn store(self, sums: Self::F, out: &mut [f32]) {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
    }

    #[inline(always)]
    fn centred(self, offset: i32) -> Self::I {
        [offset; LANES]
    }

    #[inline(always)]
    fn add_centred(self, sums: Self::I, w: &Word, x: i32) -> Self::I {
        self.add_small(sums, w, x)
    }

    #[inline(always)]
    fn small(self) -> Self::I {
        [0; LANES]
    }

    #[inline(always)]
    fn add_small(self, mut sums: Self::I, w: &Word, x: i32) -> Self::I {
        let x = x.to_ne_bytes();
        for (sum, w) in sums.iter_mut().zip(w.0.as_chunks::<4>().0) {
            for j in 0..4 {
                *sum += i32::from(w[j]) * i32::from(x[j] as i8);
            }
        }
        sums
    }

    #[inline(always)]
    fn add_codes<const SHIFT: i32>(self, sums: Self::I, w: &Word, x: i32) -> Self::I {
        self.add_small(sums, &Word(w.0.map(|byte| CODES[usize::from(byte >> SHIFT & 15)])), x)
    }

    #[inline(always)]
    fn bits(self, offset: i32) -> Self::N {
        [offset; LANES]
    }

    #[inline(always)]
    fn add_bits<const BITS: i32, const SHIFT: i32>(self, sums: Self::N, w: &Word, x: i32) -> Self::N {
        self.add_small(sums, &Word(w.0.map(|byte| byte >> SHIFT & ((1 << BITS) - 1))), x)
    }

    #[inline(always)]
    fn sum_bits(self, sums: Self::N, _offset: i32) -> Self::I {
        sums
    }
}

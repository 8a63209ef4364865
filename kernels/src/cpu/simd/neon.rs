//! NEON with the byte products of 64-bit ARM (FEAT_DotProd: Neoverse N1, Apple M1, Cortex-A76 and later). Floats are plain Rust, which has
//! NEON everywhere; with 8-bit inputs a band is twice two registers of four outputs, so that sums of four rows stay in the 32 registers.

#![expect(
    unsafe_code,
    reason = "intrinsics and target features need it; the type here is the proof that they are there"
)]

use std::{
    arch::{aarch64::*, asm, is_aarch64_feature_detected},
    mem::transmute,
};

use super::{Dots, Kernel, LANES, Packing, dots::CODES, portable::Portable};

/// Outputs of a pair of registers.
const PART: usize = LANES / 2;
/// Outputs of a register.
const QUAD: usize = PART / 2;

/// Proof of the byte products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Neon(());

impl Neon {
    /// The proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        // Words are taken as they lie.
        (cfg!(target_endian = "little") && is_aarch64_feature_detected!("dotprod")).then_some(Self(()))
    }

    /// Runs a kernel, compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        fn inner<K: Kernel>(simd: Portable<Neon>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only after `detect` found the byte products; every such CPU has NEON.
        unsafe { inner(Portable(self), kernel) }
    }

    /// Adds products of four neighbours each.
    #[inline(always)]
    fn add_quads(self, [low, high]: [int32x4_t; 2], w: [int8x16_t; 2], x: i32) -> [int32x4_t; 2] {
        // SAFETY: `self` proves the byte products, and with them NEON.
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
            [dot(low, w[0], x), dot(high, w[1], x)]
        }
    }

    /// The weights as registers.
    #[inline(always)]
    fn weights(self, w: &[u8; 4 * PART]) -> [int8x16_t; 2] {
        // SAFETY: 32 bytes have the size of two registers, and any bits are bytes.
        unsafe { transmute::<[u8; 4 * PART], [int8x16_t; 2]>(*w) }
    }

    /// `BITS` bits of each byte, those `SHIFT` bits up.
    #[inline(always)]
    fn part<const BITS: i32, const SHIFT: i32>(self, w: &[u8; 4 * PART]) -> [uint8x16_t; 2] {
        // SAFETY: every CPU of this architecture has NEON; else as in `weights`.
        unsafe {
            let [low, high] = transmute::<[u8; 4 * PART], [uint8x16_t; 2]>(*w);
            // To the left by less than nothing, since the shift to the right takes no constant of 0.
            let (shift, mask) = (vdupq_n_s8(-SHIFT as i8), vdupq_n_u8((1 << BITS) - 1));
            [vandq_u8(vshlq_u8(low, shift), mask), vandq_u8(vshlq_u8(high, shift), mask)]
        }
    }

    /// `value`, once an output.
    #[inline(always)]
    fn integers(self, value: i32) -> [int32x4_t; 2] {
        // SAFETY: every CPU of this architecture has NEON.
        unsafe { [vdupq_n_s32(value); 2] }
    }
}

/// Adds to each of four sums the products of four signed bytes with four others.
///
/// The compiler's own function for it is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: it changes one register and nothing else, and this function is called where the instruction is.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Four halves as floats, exactly.
#[inline(always)]
fn from_halves(halves: [u8; 2 * QUAD]) -> float32x4_t {
    // SAFETY: every CPU of this architecture has NEON.
    unsafe { vcvt_f32_f16(vcreate_f16(u64::from_le_bytes(halves))) }
}

impl Dots for Neon {
    const PACKING: Packing = Packing { parts: LANES / PART, flip: 0x80, strip: 4 };
    type W = [u8; 4 * PART];
    type F = [float32x4_t; 2];
    type I = [int32x4_t; 2];
    type N = [int32x4_t; 2];

    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: every CPU of this architecture has NEON.
        unsafe { [vdupq_n_f32(value); 2] }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: every CPU of this architecture has NEON.
        unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: every CPU of this architecture has NEON.
        unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])] }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F {
        // SAFETY: 8 floats have the size of two registers, and any bits are a float.
        unsafe { transmute::<[f32; PART], [float32x4_t; 2]>(values.as_chunks().0[0]) }
    }

    #[inline(always)]
    fn floats(self, word: &Self::W) -> Self::F {
        // SAFETY: a word has the size of two registers, and any bits are floats.
        unsafe { transmute::<Self::W, [float32x4_t; 2]>(*word) }
    }

    #[inline(always)]
    fn halves(self, word: &Self::W, row: usize) -> Self::F {
        let halves = word.as_chunks::<{ 2 * QUAD }>().0;
        [from_halves(halves[row % 2 * 2]), from_halves(halves[row % 2 * 2 + 1])]
    }

    #[inline(always)]
    fn signed_bytes(self, word: &Self::W, row: usize) -> Self::F {
        let row = u64::from_le_bytes(word.as_chunks::<PART>().0[row % 4]);
        // SAFETY: every CPU of this architecture has NEON.
        unsafe {
            let row = vmovl_s8(vcreate_s8(row));
            self.to_f32([vmovl_s16(vget_low_s16(row)), vmovl_s16(vget_high_s16(row))])
        }
    }

    #[inline(always)]
    fn bytes(self, word: &Self::W, row: usize) -> Self::F {
        let row = u64::from_le_bytes(word.as_chunks::<PART>().0[row % 4]);
        // SAFETY: every CPU of this architecture has NEON.
        unsafe {
            let row = vmovl_u8(vcreate_u8(row));
            [vcvtq_f32_u32(vmovl_u16(vget_low_u16(row))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(row)))]
        }
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::I) -> Self::F {
        // SAFETY: every CPU of this architecture has NEON.
        unsafe { [vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1])] }
    }

    #[inline(always)]
    fn store(self, sums: Self::F, out: &mut [f32]) {
        // SAFETY: as in `load`.
        let sums = unsafe { transmute::<[float32x4_t; 2], [f32; PART]>(sums) };
        if let Some(out) = out.first_chunk_mut() {
            *out = sums;
        } else {
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    #[inline(always)]
    fn centred(self, _offset: i32) -> Self::I {
        self.integers(0)
    }

    #[inline(always)]
    fn add_centred(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I {
        self.add_quads(sums, self.weights(w), x)
    }

    #[inline(always)]
    fn small(self) -> Self::I {
        self.integers(0)
    }

    #[inline(always)]
    fn add_small(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I {
        self.add_quads(sums, self.weights(w), x)
    }

    #[inline(always)]
    fn add_codes<const SHIFT: i32>(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I {
        let codes = self.part::<4, SHIFT>(w);
        // SAFETY: every CPU of this architecture has NEON; sixteen bytes have the size of a register, and any bits are bytes.
        let w = unsafe {
            let table = veorq_u8(transmute::<[u8; LANES], uint8x16_t>(CODES), vdupq_n_u8(Self::PACKING.flip));
            let table = vreinterpretq_s8_u8(table);
            [vqtbl1q_s8(table, codes[0]), vqtbl1q_s8(table, codes[1])]
        };
        self.add_quads(sums, w, x)
    }

    #[inline(always)]
    fn bits(self, offset: i32) -> Self::N {
        self.integers(offset)
    }

    #[inline(always)]
    fn add_bits<const BITS: i32, const SHIFT: i32>(self, sums: Self::N, w: &Self::W, x: i32) -> Self::N {
        let w = self.part::<BITS, SHIFT>(w);
        // SAFETY: every CPU of this architecture has NEON.
        let w = unsafe { [vreinterpretq_s8_u8(w[0]), vreinterpretq_s8_u8(w[1])] };
        self.add_quads(sums, w, x)
    }

    #[inline(always)]
    fn sum_bits(self, sums: Self::N, _offset: i32) -> Self::I {
        sums
    }
}

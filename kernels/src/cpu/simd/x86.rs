//! AVX2 and AVX-512.
//!
//! The only place where the CPU backend needs `unsafe`: intrinsics and functions compiled for instructions that not every CPU
//! has. A value of [`Avx2`] or [`Avx512`] exists only where detection found the instructions. Arrays become registers by value and not
//! through pointers: builds with assertions check every pointer, in the innermost loop.

#![expect(
    unsafe_code,
    reason = "intrinsics and target features need it; the types here are the proof that they are there"
)]

use std::{arch::x86_64::*, mem::transmute};

use super::{Kernel, LANES, Simd};

/// AVX2 with fused multiply-add; 16 lanes are two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// AVX-512 F; 16 lanes are one register.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx2 {
    /// Proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    /// Runs a kernel, compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma")]
        fn inner<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only after `detect` found AVX2 and FMA.
        unsafe { inner(self, kernel) }
    }
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        // SAFETY: `self` proves AVX2.
        let v = unsafe { _mm256_set1_ps(value) };
        [v, v]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::V {
        // SAFETY: two registers of 8 floats have the size of 16 floats, and any bits are a float.
        unsafe { transmute::<[f32; LANES], [__m256; 2]>(*values) }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Self::V {
        // SAFETY: `self` proves AVX2; two words of 8 bytes have the size of 16 bytes, and any bits are a word.
        unsafe {
            let [low, high] = transmute::<[i8; LANES], [i64; 2]>(*values).map(|word| _mm_cvtsi64_si128(word));
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        }
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; LANES] {
        // SAFETY: as in `load`.
        unsafe { transmute::<[__m256; 2], [f32; LANES]>(v) }
    }
}

impl Avx512 {
    /// Proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f") && Avx2::detect().is_some()).then_some(Self(()))
    }

    /// Runs a kernel, compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx2,fma")]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only after `detect` found AVX-512 F, AVX2 and FMA.
        unsafe { inner(self, kernel) }
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::V {
        // SAFETY: a register of 16 floats has the size of 16 floats, and any bits are a float.
        unsafe { transmute::<[f32; LANES], __m512>(*values) }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Self::V {
        // SAFETY: `self` proves AVX-512 F; a register of 16 bytes has the size of 16 bytes, and any bits are a byte.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(transmute::<[i8; LANES], __m128i>(*values))) }
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; LANES] {
        // SAFETY: as in `load`.
        unsafe { transmute::<__m512, [f32; LANES]>(v) }
    }
}

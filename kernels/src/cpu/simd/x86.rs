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

use super::{Kernel, LANES, Simd, Word};

/// AVX2 with fused multiply-add and halves; 16 lanes are two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// AVX-512 F, BW and VNNI; 16 lanes are one register. CPUs with AVX-512 but without VNNI take the AVX2 path.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx2 {
    /// Proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"))
            .then_some(Self(()))
    }

    /// Runs a kernel, compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only after `detect` found AVX2, FMA and F16C.
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
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::V {
        // SAFETY: as in `load_i8`.
        unsafe {
            let [low, high] = transmute::<[u8; LANES], [i64; 2]>(*values).map(|word| _mm_cvtsi64_si128(word));
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))]
        }
    }

    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> Self::V {
        // SAFETY: `self` proves F16C; two registers of 8 halves have the size of 16, and any bits are a half.
        unsafe { transmute::<[u16; LANES], [__m128i; 2]>(*values).map(|half| _mm256_cvtph_ps(half)) }
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; LANES] {
        // SAFETY: as in `load`.
        unsafe { transmute::<[__m256; 2], [f32; LANES]>(v) }
    }

    type I = [__m256i; 2];

    #[inline(always)]
    fn prefetch<T>(self, place: &T, ahead: usize) {
        // SAFETY: a prefetch reads nothing: an address without memory behind it is passed over.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast::<i8>().wrapping_add(ahead)) }
    }

    #[inline(always)]
    fn prefetch_far<T>(self, place: &T, ahead: usize) {
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast::<i8>().wrapping_add(ahead)) }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I {
        // SAFETY: `self` proves AVX2.
        let v = unsafe { _mm256_set1_epi32(value) };
        [v, v]
    }

    /// The multiply-add of bytes saturates, so that weights become signed and their signs go to the inputs: no pair then exceeds
    /// 2 * 128 * 127. What the sign change took away is added again.
    #[inline(always)]
    fn dot4(self, sum: Self::I, w: &Word, x: [i8; 4]) -> Self::I {
        let taken = 128 * x.iter().map(|&x| i32::from(x)).sum::<i32>();
        // SAFETY: `self` proves AVX2; two registers have the size of a word, and any bits are bytes.
        unsafe {
            let inputs = _mm256_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8)));
            let halves = transmute::<Word, [__m256i; 2]>(*w);
            let one = |sum: __m256i, w: __m256i| {
                let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(inputs, w));
                let dot = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                _mm256_add_epi32(_mm256_add_epi32(sum, dot), _mm256_set1_epi32(taken))
            };
            [one(sum[0], halves[0]), one(sum[1], halves[1])]
        }
    }

    #[inline(always)]
    fn dot4_nibbles(self, sum: Self::I, w: &Word, low: [i8; 4], high: [i8; 4]) -> Self::I {
        // SAFETY: as in `dot4`; nibbles are far from saturating.
        unsafe {
            let word = |x: [i8; 4]| _mm256_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8)));
            let halves = transmute::<Word, [__m256i; 2]>(*w);
            let one = |sum: __m256i, w: __m256i| {
                let mask = _mm256_set1_epi8(15);
                let high_half = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
                let pairs = _mm256_add_epi16(
                    _mm256_maddubs_epi16(_mm256_and_si256(w, mask), word(low)),
                    _mm256_maddubs_epi16(high_half, word(high)),
                );
                _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            };
            [one(sum[0], halves[0]), one(sum[1], halves[1])]
        }
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe { v.map(|v| _mm256_cvtepi32_ps(v)) }
    }
}

impl Avx512 {
    /// Proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        let has_bytes = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni");
        (is_x86_feature_detected!("avx512f") && has_bytes && Avx2::detect().is_some()).then_some(Self(()))
    }

    /// Runs a kernel, compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only after `detect` found AVX-512 F, BW and VNNI, AVX2, FMA and F16C.
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
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::V {
        // SAFETY: as in `load_i8`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(transmute::<[u8; LANES], __m128i>(*values))) }
    }

    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> Self::V {
        // SAFETY: `self` proves AVX-512 F; a register of 16 halves has the size of 16 halves, and any bits are a half.
        unsafe { _mm512_cvtph_ps(transmute::<[u16; LANES], __m256i>(*values)) }
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; LANES] {
        // SAFETY: as in `load`.
        unsafe { transmute::<__m512, [f32; LANES]>(v) }
    }

    type I = __m512i;

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn prefetch<T>(self, place: &T, ahead: usize) {
        // SAFETY: a prefetch reads nothing: an address without memory behind it is passed over.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast::<i8>().wrapping_add(ahead)) }
    }

    #[inline(always)]
    fn prefetch_far<T>(self, place: &T, ahead: usize) {
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast::<i8>().wrapping_add(ahead)) }
    }

    #[inline(always)]
    fn dot4(self, sum: Self::I, w: &Word, x: [i8; 4]) -> Self::I {
        // SAFETY: `self` proves AVX-512 VNNI; a register has the size of a word, and any bits are bytes.
        unsafe {
            let inputs = _mm512_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8)));
            _mm512_dpbusd_epi32(sum, transmute::<Word, __m512i>(*w), inputs)
        }
    }

    #[inline(always)]
    fn dot4_nibbles(self, sum: Self::I, w: &Word, low: [i8; 4], high: [i8; 4]) -> Self::I {
        // SAFETY: as in `dot4`; `self` also proves AVX-512 BW.
        unsafe {
            let word = |x: [i8; 4]| _mm512_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8)));
            let (w, mask) = (transmute::<Word, __m512i>(*w), _mm512_set1_epi8(15));
            let sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(w, mask), word(low));
            _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(w, 4), mask), word(high))
        }
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::V {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_cvtepi32_ps(v) }
    }
}

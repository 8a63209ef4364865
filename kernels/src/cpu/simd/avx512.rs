//! AVX-512 with VNNI: sixteen lanes are one register.

#![expect(
    unsafe_code,
    reason = "intrinsics and target features need it; the type here is the proof that they are there"
)]

use std::{arch::x86_64::*, mem::transmute};

use half::f16;

use super::{Avx2, Dots, Kernel, LANES, Packing, Simd, Word, dots::CODES};

/// Proof of AVX-512 F, BW and VNNI, and of what [`Avx2`] proves. CPUs with AVX-512 but without its VNNI take an AVX2 path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx512(());

impl Avx512 {
    /// The proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        let has_bytes = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni");
        (is_x86_feature_detected!("avx512f") && has_bytes && Avx2::<false>::detect().is_some()).then_some(Self(()))
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

    /// Four inputs, once an output.
    #[inline(always)]
    fn inputs(self, x: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(x) }
    }

    /// `BITS` bits of each byte, those `SHIFT` bits up.
    #[inline(always)]
    fn part<const BITS: i32, const SHIFT: i32>(self, w: &Word) -> __m512i {
        // SAFETY: `self` proves AVX-512 F and BW; a register has the size of a word, and any bits are bytes.
        unsafe {
            let shifted = _mm512_srl_epi16(transmute::<Word, __m512i>(*w), _mm_cvtsi32_si128(SHIFT));
            _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1))
        }
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn zero(self) -> Self::V {
        Simd::splat(self, 0.0)
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
    fn load_f16(self, values: &[f16; LANES]) -> Self::V {
        // SAFETY: `self` proves AVX-512 F; a register of 32 bytes has the size of sixteen halves, and any bits are a half.
        unsafe { _mm512_cvtph_ps(transmute::<[f16; LANES], __m256i>(*values)) }
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

    #[inline(always)]
    fn round(self, v: Self::V) -> [i8; LANES] {
        // SAFETY: `self` proves AVX-512 F; a register of 16 bytes has the size of 16 bytes.
        unsafe { transmute::<__m128i, [i8; LANES]>(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }

    type Dots = Self;

    #[inline(always)]
    fn dots(self) -> Self {
        self
    }
}

impl Dots for Avx512 {
    const PACKING: Packing = Packing { parts: 1, flip: 0, strip: 8 };
    type W = Word;
    type F = __m512;
    type I = __m512i;
    type N = __m512i;

    #[inline(always)]
    fn zero(self) -> Self::F {
        Simd::zero(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        Simd::splat(self, value)
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Simd::fma(self, a, b, c)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F {
        Simd::load(self, values)
    }

    #[inline(always)]
    fn floats(self, word: &Word) -> Self::F {
        // SAFETY: a word has the size of a register, and any bits are floats.
        unsafe { transmute::<Word, __m512>(*word) }
    }

    #[inline(always)]
    fn halves(self, word: &Word, row: usize) -> Self::F {
        let row = word.0.as_chunks::<{ 2 * LANES }>().0[row % 2];
        // SAFETY: `self` proves AVX-512 F; a register of 16 halves has the size of 16 halves, and any bits are a half.
        unsafe { _mm512_cvtph_ps(transmute::<[u8; 2 * LANES], __m256i>(row)) }
    }

    #[inline(always)]
    fn signed_bytes(self, word: &Word, row: usize) -> Self::F {
        let row = word.0.as_chunks::<LANES>().0[row % 4];
        // SAFETY: `self` proves AVX-512 F; 16 bytes have the size of their register, and any bits are bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(transmute::<[u8; LANES], __m128i>(row))) }
    }

    #[inline(always)]
    fn bytes(self, word: &Word, row: usize) -> Self::F {
        let row = word.0.as_chunks::<LANES>().0[row % 4];
        // SAFETY: as in `signed_bytes`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(transmute::<[u8; LANES], __m128i>(row))) }
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::I) -> Self::F {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    fn store(self, sums: Self::F, out: &mut [f32]) {
        let sums = self.array(sums);
        if let Some(out) = out.first_chunk_mut() {
            *out = sums;
        } else {
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    #[inline(always)]
    fn centred(self, offset: i32) -> Self::I {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(offset) }
    }

    #[inline(always)]
    fn add_centred(self, sums: Self::I, w: &Word, x: i32) -> Self::I {
        self.add_small(sums, w, x)
    }

    #[inline(always)]
    fn small(self) -> Self::I {
        self.centred(0)
    }

    #[inline(always)]
    fn add_small(self, sums: Self::I, w: &Word, x: i32) -> Self::I {
        // SAFETY: `self` proves AVX-512 VNNI; a register has the size of a word, and any bits are bytes.
        unsafe { _mm512_dpbusd_epi32(sums, transmute::<Word, __m512i>(*w), self.inputs(x)) }
    }

    #[inline(always)]
    fn add_codes<const SHIFT: i32>(self, sums: Self::I, w: &Word, x: i32) -> Self::I {
        // SAFETY: `self` proves AVX-512 BW and VNNI; sixteen bytes have the size of their register, and any bits are bytes.
        unsafe {
            let codes = _mm512_broadcast_i32x4(transmute::<[u8; LANES], __m128i>(CODES));
            _mm512_dpbusd_epi32(sums, _mm512_shuffle_epi8(codes, self.part::<4, SHIFT>(w)), self.inputs(x))
        }
    }

    #[inline(always)]
    fn bits(self, offset: i32) -> Self::N {
        self.centred(offset)
    }

    #[inline(always)]
    fn add_bits<const BITS: i32, const SHIFT: i32>(self, sums: Self::N, w: &Word, x: i32) -> Self::N {
        // SAFETY: `self` proves AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, self.part::<BITS, SHIFT>(w), self.inputs(x)) }
    }

    #[inline(always)]
    fn sum_bits(self, sums: Self::N, _offset: i32) -> Self::I {
        sums
    }
}

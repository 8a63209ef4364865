//! AVX2 with fused multiply-add and halves, with or without the byte products of AVX-VNNI. Sixteen lanes are two registers; with
//! 8-bit inputs a register holds eight outputs, so that sums of several rows stay in the sixteen registers there are.

#![expect(
    unsafe_code,
    reason = "intrinsics and target features need it; the type here is the proof that they are there"
)]

use std::{arch::x86_64::*, mem::transmute};

use super::{Dots, Kernel, LANES, Packing, Simd, dots::CODES};

/// Outputs of a register.
const PART: usize = LANES / 2;

/// Proof of AVX2, FMA and F16C, with `VNNI` also of AVX-VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    /// The proof that this CPU has the instructions, if it has.
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        let has_floats = is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let has_bytes = !VNNI || is_x86_feature_detected!("avxvnni");
        (is_x86_feature_detected!("avx2") && has_floats && has_bytes).then_some(Self(()))
    }

    /// Runs a kernel, compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn plain<const VNNI: bool, K: Kernel>(simd: Avx2<VNNI>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn vnni<const VNNI: bool, K: Kernel>(simd: Avx2<VNNI>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        if VNNI {
            // SAFETY: `self` exists only after `detect` found AVX2, FMA, F16C and AVX-VNNI.
            unsafe { vnni(self, kernel) }
        } else {
            // SAFETY: `self` exists only after `detect` found AVX2, FMA and F16C.
            unsafe { plain(self, kernel) }
        }
    }

    /// Adds products of four neighbours each, unsigned weights times inputs. Only with `VNNI`.
    #[inline(always)]
    fn add_quads(self, sums: __m256i, w: __m256i, x: i32) -> __m256i {
        // SAFETY: it is called with `VNNI` alone, when `self` proves AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sums, w, self.inputs(x)) }
    }

    /// Signed bytes as floats.
    #[inline(always)]
    fn signed(self, bytes: [u8; PART]) -> __m256 {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(bytes)))) }
    }

    /// `value`, once an output.
    #[inline(always)]
    fn integers(self, value: i32) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_set1_epi32(value) }
    }

    /// The weights as a register.
    #[inline(always)]
    fn weights(self, w: &[u8; 4 * PART]) -> __m256i {
        // SAFETY: 32 bytes have the size of a register, and any bits are bytes.
        unsafe { transmute::<[u8; 4 * PART], __m256i>(*w) }
    }

    /// Four inputs, once an output.
    #[inline(always)]
    fn inputs(self, x: i32) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_set1_epi32(x) }
    }

    /// Sums of two neighbours each.
    #[inline(always)]
    fn add_pairs(self, pairs: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)) }
    }

    /// `BITS` bits of each byte, those `SHIFT` bits up.
    #[inline(always)]
    fn part<const BITS: i32, const SHIFT: i32>(self, w: &[u8; 4 * PART]) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let shifted = _mm256_srl_epi16(self.weights(w), _mm_cvtsi32_si128(SHIFT));
            _mm256_and_si256(shifted, _mm256_set1_epi8((1 << BITS) - 1))
        }
    }

    /// Adds products of `x` with signed weights. The multiply-add of bytes saturates, so that the weights' signs go to the inputs: no
    /// pair then exceeds 2 * 128 * 127.
    #[inline(always)]
    fn add_signed(self, sums: __m256i, w: __m256i, x: i32) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(self.inputs(x), w));
            _mm256_add_epi32(sums, self.add_pairs(pairs))
        }
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type V = [__m256; 2];
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::V {
        Simd::splat(self, 0.0)
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
        let halves = bytemuck::cast_ref::<_, [u8; LANES]>(values).as_chunks().0;
        [self.signed(halves[0]), self.signed(halves[1])]
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

    #[inline(always)]
    fn round(self, v: Self::V) -> [i8; LANES] {
        // SAFETY: `self` proves AVX2; a register of 16 bytes has the size of 16 bytes. Packing works on halves of registers, whose order
        // is put right between.
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            transmute::<__m128i, [i8; LANES]>(bytes)
        }
    }

    type Dots = Self;

    #[inline(always)]
    fn dots(self) -> Self {
        self
    }
}

impl<const VNNI: bool> Dots for Avx2<VNNI> {
    /// Signed where a weight's sign is given to its input.
    const PACKING: Packing = Packing { parts: LANES / PART, flip: if VNNI { 0 } else { 0x80 }, strip: 4 };
    type W = [u8; 4 * PART];
    type F = __m256;
    type I = __m256i;
    /// Without VNNI two sums of 16 bits an output, of at most 16 products each: 16 * 15 * 127 is less than 2^15.
    type N = __m256i;

    #[inline(always)]
    fn zero(self) -> Self::F {
        Dots::splat(self, 0.0)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: `self` proves FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F {
        // SAFETY: 8 floats have the size of a register, and any bits are a float.
        unsafe { transmute::<[f32; PART], __m256>(values.as_chunks().0[0]) }
    }

    #[inline(always)]
    fn floats(self, word: &Self::W) -> Self::F {
        // SAFETY: a word has the size of a register, and any bits are floats.
        unsafe { transmute::<Self::W, __m256>(*word) }
    }

    #[inline(always)]
    fn halves(self, word: &Self::W, row: usize) -> Self::F {
        let row = word.as_chunks::<{ 2 * PART }>().0[row % 2];
        // SAFETY: `self` proves F16C; 8 halves have the size of half a register, and any bits are a half.
        unsafe { _mm256_cvtph_ps(transmute::<[u8; 2 * PART], __m128i>(row)) }
    }

    #[inline(always)]
    fn signed_bytes(self, word: &Self::W, row: usize) -> Self::F {
        self.signed(word.as_chunks::<PART>().0[row % 4])
    }

    #[inline(always)]
    fn bytes(self, word: &Self::W, row: usize) -> Self::F {
        let row = i64::from_le_bytes(word.as_chunks::<PART>().0[row % 4]);
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(row))) }
    }

    #[inline(always)]
    fn to_f32(self, sums: Self::I) -> Self::F {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    fn store(self, sums: Self::F, out: &mut [f32]) {
        // SAFETY: as in `load`.
        let sums = unsafe { transmute::<__m256, [f32; PART]>(sums) };
        if let Some(out) = out.first_chunk_mut() {
            *out = sums;
        } else {
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    #[inline(always)]
    fn centred(self, offset: i32) -> Self::I {
        self.integers(if VNNI { offset } else { 0 })
    }

    #[inline(always)]
    fn add_centred(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I {
        if VNNI { self.add_quads(sums, self.weights(w), x) } else { self.add_signed(sums, self.weights(w), x) }
    }

    #[inline(always)]
    fn small(self) -> Self::I {
        self.integers(0)
    }

    #[inline(always)]
    fn add_small(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I {
        let w = self.weights(w);
        if VNNI {
            return self.add_quads(sums, w, x);
        }
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi32(sums, self.add_pairs(_mm256_maddubs_epi16(w, self.inputs(x)))) }
    }

    #[inline(always)]
    fn add_codes<const SHIFT: i32>(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I {
        // SAFETY: `self` proves AVX2; sixteen bytes have the size of their register, and any bits are bytes.
        let w = unsafe {
            let flip = _mm_set1_epi8(Self::PACKING.flip as i8);
            let codes = _mm_xor_si128(transmute::<[u8; LANES], __m128i>(CODES), flip);
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), self.part::<4, SHIFT>(w))
        };
        if VNNI { self.add_quads(sums, w, x) } else { self.add_signed(sums, w, x) }
    }

    #[inline(always)]
    fn bits(self, offset: i32) -> Self::N {
        self.centred(offset)
    }

    #[inline(always)]
    fn add_bits<const BITS: i32, const SHIFT: i32>(self, sums: Self::N, w: &Self::W, x: i32) -> Self::N {
        let w = self.part::<BITS, SHIFT>(w);
        if VNNI {
            return self.add_quads(sums, w, x);
        }
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, self.inputs(x))) }
    }

    #[inline(always)]
    fn sum_bits(self, sums: Self::N, offset: i32) -> Self::I {
        if VNNI {
            return sums;
        }
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi32(self.add_pairs(sums), self.integers(offset)) }
    }
}

//! AVX2 with fused multiply-add and halves. Sixteen lanes are two registers; with 8-bit inputs a register holds eight outputs, so
//! that sums of several rows stay in the sixteen registers there are.

#![expect(
    unsafe_code,
    reason = "intrinsics and target features need it; the type here is the proof that they are there"
)]

use std::{arch::x86_64::*, mem::transmute};

use super::{Dots, Kernel, LANES, Packing, Simd};

/// Outputs of a register.
const PART: usize = LANES / 2;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// The proof that this CPU has the instructions, if it has.
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

    /// The weights as a register.
    #[inline(always)]
    fn weights(self, w: &[u8; 4 * PART]) -> __m256i {
        // SAFETY: 32 bytes have the size of a register, and any bits are bytes.
        unsafe { transmute::<[u8; 4 * PART], __m256i>(*w) }
    }

    /// Four inputs, once an output.
    #[inline(always)]
    fn inputs(self, x: [i8; 4]) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8))) }
    }

    /// Sums of two neighbours each.
    #[inline(always)]
    fn add_pairs(self, pairs: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)) }
    }
}

impl Simd for Avx2 {
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
        [0, 1].map(|part| Dots::load_i8(self, values, part))
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

    type Dots = Self;

    #[inline(always)]
    fn dots(self) -> Self {
        self
    }
}

impl Dots for Avx2 {
    /// Signed, since a weight's sign is given to its input.
    const PACKING: Packing = Packing { parts: LANES / PART, flip: 0x80 };
    const MANY_REGISTERS: bool = false;
    type W = [u8; 4 * PART];
    type F = __m256;
    type I = __m256i;
    /// Two sums of 16 bits an output, of at most 16 products each: 16 * 15 * 127 is less than 2^15.
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
    fn load(self, values: &[f32; LANES], part: usize) -> Self::F {
        // SAFETY: 8 floats have the size of a register, and any bits are a float.
        unsafe { transmute::<[f32; PART], __m256>(values.as_chunks().0[part % 2]) }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES], part: usize) -> Self::F {
        let bytes: [i8; PART] = values.as_chunks().0[part % 2];
        // SAFETY: `self` proves AVX2; 8 bytes have the size of a word, and any bits are a word.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(transmute::<[i8; PART], i64>(bytes)))) }
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES], part: usize) -> Self::F {
        let bytes: [u8; PART] = values.as_chunks().0[part % 2];
        // SAFETY: as in `load_i8`.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_ne_bytes(bytes)))) }
    }

    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES], part: usize) -> Self::F {
        // SAFETY: `self` proves F16C; 8 halves have the size of half a register, and any bits are a half.
        unsafe { _mm256_cvtph_ps(transmute::<[u16; PART], __m128i>(values.as_chunks().0[part % 2])) }
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
    fn centred(self, _offset: i32) -> Self::I {
        self.small()
    }

    /// The multiply-add of bytes saturates, so that the weights' signs go to the inputs: no pair then exceeds 2 * 128 * 127.
    #[inline(always)]
    fn add_centred(self, sums: Self::I, w: &Self::W, x: [i8; 4]) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let w = self.weights(w);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(self.inputs(x), w));
            _mm256_add_epi32(sums, self.add_pairs(pairs))
        }
    }

    #[inline(always)]
    fn small(self) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn add_small(self, sums: Self::I, w: &Self::W, x: [i8; 4]) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let pairs = _mm256_maddubs_epi16(self.weights(w), self.inputs(x));
            _mm256_add_epi32(sums, self.add_pairs(pairs))
        }
    }

    #[inline(always)]
    fn nibbles(self, _offset: i32) -> Self::N {
        self.small()
    }

    #[inline(always)]
    fn add_nibbles(self, sums: Self::N, w: &Self::W, low: [i8; 4], high: [i8; 4]) -> Self::N {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (w, mask) = (self.weights(w), _mm256_set1_epi8(15));
            let high_halves = _mm256_and_si256(_mm256_srli_epi16::<4>(w), mask);
            let sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_and_si256(w, mask), self.inputs(low)));
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(high_halves, self.inputs(high)))
        }
    }

    #[inline(always)]
    fn sum_nibbles(self, sums: Self::N, offset: i32) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi32(self.add_pairs(sums), _mm256_set1_epi32(offset)) }
    }

    #[inline(always)]
    fn prefetch<T>(self, place: &T, ahead: usize) {
        prefetch::<_MM_HINT_T0, T>(place, ahead);
    }

    #[inline(always)]
    fn prefetch_far<T>(self, place: &T, ahead: usize) {
        prefetch::<_MM_HINT_T1, T>(place, ahead);
    }
}

/// Asks for the line `ahead` bytes behind `place`, into the cache that `HINT` means.
#[inline(always)]
pub(super) fn prefetch<const HINT: i32, T>(place: &T, ahead: usize) {
    // SAFETY: a prefetch reads nothing: an address without memory behind it is passed over.
    unsafe { _mm_prefetch::<HINT>(std::ptr::from_ref(place).cast::<i8>().wrapping_add(ahead)) }
}

//! Sixteen f32 lanes on every CPU: one code, several instruction sets, the same bits.
//!
//! A [`Kernel`] is written once over [`Simd`] and run by [`Isa::run`] in a function that the compiler may vectorise with the
//! instructions that were found at start. Every operation here is one that IEEE 754 defines exactly (multiply-add with one
//! rounding, conversion of small integers), so that the choice of instructions cannot show in a result. That is also why there is
//! no reciprocal and no horizontal addition: [`reduce`] is a fixed tree over plain additions.

#[cfg(target_arch = "x86_64")]
mod x86;

use half::f16;

/// Lanes of every sum.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes and what can be done with them. The value itself is the proof that the CPU has the instructions.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Whether there are registers for 4 by 4 accumulators; otherwise 2 by 3 are used.
    const MANY_REGISTERS: bool;

    /// All lanes 0.
    fn zero(self) -> Self::V;
    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::V;
    /// Lanes from memory.
    fn load(self, values: &[f32; LANES]) -> Self::V;
    /// Lanes from signed bytes, exactly.
    fn load_i8(self, values: &[i8; LANES]) -> Self::V;
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// Lanes from unsigned bytes, exactly.
    fn load_u8(self, values: &[u8; LANES]) -> Self::V;
    /// Lanes from IEEE halves, exactly.
    fn load_f16(self, values: &[u16; LANES]) -> Self::V;
    /// The lanes.
    fn array(self, v: Self::V) -> [f32; LANES];

    /// Sixteen i32.
    type I: Copy;
    /// All lanes `value`.
    fn splat_i32(self, value: i32) -> Self::I;
    /// `sum[l] + w[4 l] * x[0] + … + w[4 l + 3] * x[3]`, unsigned weights by signed inputs, exactly. No input is
    /// -128.
    fn dot4(self, sum: Self::I, w: &Word, x: [i8; 4]) -> Self::I;
    /// As `dot4`, of the low halves of the bytes with `low`, and of the high halves with `high`.
    fn dot4_nibbles(self, sum: Self::I, w: &Word, low: [i8; 4], high: [i8; 4]) -> Self::I;
    /// As floats; exact below 2^24.
    fn to_f32(self, v: Self::I) -> Self::V;

    /// Asks for what will be read soon, `ahead` bytes behind `place`; it need not be there. Changes nothing.
    fn prefetch<T>(self, _place: &T, _ahead: usize) {}
    /// As [`Simd::prefetch`], into the second-level cache.
    fn prefetch_far<T>(self, _place: &T, _ahead: usize) {}
}

/// Four weights of each of sixteen outputs, as one aligned register.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Word(pub(crate) [u8; 4 * LANES]);

impl Default for Word {
    fn default() -> Self {
        Self([0; 4 * LANES])
    }
}

/// Work to be compiled for every instruction set. `run` must be `#[inline(always)]`, and so must what it calls.
pub(crate) trait Kernel {
    /// What it gives.
    type Output;
    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Path);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The paths that this CPU can take, slowest first.
    pub(crate) fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "only x86 has more than one path"))]
        let mut found = vec![Self(Path::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if x86::Avx2::detect().is_some() {
                found.push(Self(Path::Avx2));
            }
            if x86::Avx512::detect().is_some() {
                found.push(Self(Path::Avx512));
            }
        }
        found
    }

    /// The fastest path that this CPU can take.
    pub(crate) fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Path::Portable))
    }

    /// For people. On 64-bit ARM every CPU has NEON with fused multiply-add, and the portable path compiles to it.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Path::Portable if cfg!(target_arch = "aarch64") => "neon",
            Path::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => "avx512",
        }
    }

    /// Runs a kernel with these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Path::Portable => kernel.run(Portable),
            // A `Path` for x86 is only made after detection; asking again costs a load and keeps this safe without trust.
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => match x86::Avx2::detect() {
                Some(simd) => simd.run(kernel),
                None => kernel.run(Portable),
            },
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => match x86::Avx512::detect() {
                Some(simd) => simd.run(kernel),
                None => kernel.run(Portable),
            },
        }
    }
}

/// Plain Rust. Slow where the target has no multiply-add by default, and right everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; LANES];
    const MANY_REGISTERS: bool = cfg!(target_arch = "aarch64");

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
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::from(values[i]);
        }
        out
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::V {
        values.map(f32::from)
    }

    #[inline(always)]
    fn load_f16(self, values: &[u16; LANES]) -> Self::V {
        values.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; LANES] {
        v
    }

    type I = [i32; LANES];

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I {
        [value; LANES]
    }

    #[inline(always)]
    fn dot4(self, mut sum: Self::I, w: &Word, x: [i8; 4]) -> Self::I {
        for (sum, w) in sum.iter_mut().zip(w.0.as_chunks::<4>().0) {
            for j in 0..4 {
                *sum += i32::from(w[j]) * i32::from(x[j]);
            }
        }
        sum
    }

    #[inline(always)]
    fn dot4_nibbles(self, sum: Self::I, w: &Word, low: [i8; 4], high: [i8; 4]) -> Self::I {
        let sum = self.dot4(sum, &Word(w.0.map(|byte| byte & 15)), low);
        self.dot4(sum, &Word(w.0.map(|byte| byte >> 4)), high)
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::V {
        v.map(|value| value as f32)
    }
}

/// Sum of the lanes: halves are added until one is left.
#[inline(always)]
pub(crate) fn reduce(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `sum_i a[i] * b[i]` of two slices of one length: element `i` goes to lane `i % 16`, ascending; a short last piece is filled with 0.
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    let mut sum = simd.zero();
    for (x, y) in a_whole.iter().zip(b_whole) {
        sum = simd.fma(simd.load(x), simd.load(y), sum);
    }
    if !a_rest.is_empty() {
        let (mut x, mut y) = ([0.0; LANES], [0.0; LANES]);
        x[..a_rest.len()].copy_from_slice(a_rest);
        y[..b_rest.len()].copy_from_slice(b_rest);
        sum = simd.fma(simd.load(&x), simd.load(&y), sum);
    }
    reduce(simd.array(sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Random, seed};

    struct Everything<'a>(&'a [f32; LANES], &'a [i8; LANES], &'a [f32; LANES], &'a Word);

    impl Kernel for Everything<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let sum = s.fma(s.load(self.0), s.load_i8(self.1), s.load(self.2));
            let bytes = self.1.map(|byte| byte as u8);
            // Halves of any exponent but the largest, which stands for what is no number.
            let halves = std::array::from_fn(|i| u16::from_le_bytes([bytes[i], self.3.0[i]]) & 0xbbff);
            let x = |i: usize| std::array::from_fn(|j| self.1[i + j]);
            let dot = s.dot4(s.splat_i32(-7), self.3, x(0));
            let dot = s.dot4_nibbles(dot, self.3, x(4), x(8));
            let sum = s.fma(s.mul(s.load_u8(&bytes), s.load_f16(&halves)), s.to_f32(dot), sum);
            s.array(s.fma(sum, s.splat(0.1), s.zero()))
        }
    }

    #[test]
    fn every_path_gives_the_same_bits() {
        let seed = seed(1);
        let mut random = Random::new(seed);
        for _ in 0..1000 {
            let a = std::array::from_fn(|_| random.unit() * 1e3);
            let q = std::array::from_fn(|_| (random.bits() as i8).max(-127));
            let c = std::array::from_fn(|_| random.unit());
            let w = Word(std::array::from_fn(|_| random.bits() as u8));
            let want = Isa::available()[0].run(Everything(&a, &q, &c, &w)).map(f32::to_bits);
            for isa in Isa::available() {
                assert_eq!(isa.run(Everything(&a, &q, &c, &w)).map(f32::to_bits), want, "{isa:?}, seed {seed}");
            }
        }
        // The largest sums that there are.
        let (w, x) = (Word([255; 64]), [-127; LANES]);
        for isa in Isa::available() {
            let got = isa.run(Everything(&[1.0; LANES], &x, &[0.0; LANES], &w)).map(f32::to_bits);
            let want = Isa::available()[0].run(Everything(&[1.0; LANES], &x, &[0.0; LANES], &w)).map(f32::to_bits);
            assert_eq!(got, want, "{isa:?}");
        }
    }

    #[test]
    fn all_lanes_are_summed() {
        assert_eq!(reduce(std::array::from_fn(|i| (1 << i) as f32)), 65535.0);
    }
}

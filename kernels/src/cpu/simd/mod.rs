//! Sixteen f32 lanes on every CPU: one code, several instruction sets, the same bits.
//!
//! A [`Kernel`] is written once over [`Simd`] and run by [`Isa::run`] in a function that the compiler may vectorise with the
//! instructions that were found at start. Every operation here is one that IEEE 754 defines exactly (multiply-add with one
//! rounding, conversion of small integers), so that the choice of instructions cannot show in a result. That is also why there is
//! no reciprocal and no horizontal addition: [`reduce`] is a fixed tree over plain additions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dots;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use half::{bf16, f16};

pub(crate) use self::dots::{Dots, Packing, Word};
#[cfg(target_arch = "aarch64")]
use self::neon::Neon;
use self::portable::{Plain, Portable};
#[cfg(target_arch = "x86_64")]
use self::{avx2::Avx2, avx512::Avx512};
#[cfg(target_arch = "x86_64")]
use super::prefetch::twice_pays;

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
    /// Lanes from halves, exactly, those that are no numbers aside.
    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> Self::V {
        let mut wide = [0.0; LANES];
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = widen(value.to_bits());
        }
        self.load(&wide)
    }
    /// Lanes from the upper halves of f32.
    #[inline(always)]
    fn load_bf16(self, values: &[bf16; LANES]) -> Self::V {
        let mut wide = [0.0; LANES];
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
        self.load(&wide)
    }
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The lanes.
    fn array(self, v: Self::V) -> [f32; LANES];
    /// The nearest whole numbers, even ones on a tie, of lanes of at most 127 in magnitude; of others any numbers.
    fn round(self, v: Self::V) -> [i8; LANES];

    /// Products with 8-bit inputs by the same instructions.
    type Dots: Dots;
    /// What computes them.
    fn dots(self) -> Self::Dots;
}

/// A half as f32, without branches, so that sixteen are widened at once on any CPU: the multiplication moves the exponent's bias, and is
/// exact for subnormal halves too.
#[inline(always)]
fn widen(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff) << 13;
    // 2^(127 - 15).
    let moved = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let magnitude = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { moved };
    f32::from_bits(u32::from(half & 0x8000) << 16 | magnitude)
}

/// Work to be compiled for every instruction set. `run` must be `#[inline(always)]`, and so must what it calls.
pub(crate) trait Kernel {
    /// What it gives.
    type Output;
    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this CPU has, and how memory is asked with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Path);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Portable,
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512 {
        simd: Avx512,
        asks_twice: bool,
    },
}

impl Isa {
    /// The paths that this CPU can take, slowest first.
    pub(crate) fn available() -> Vec<Self> {
        #[cfg_attr(
            not(any(target_arch = "x86_64", target_arch = "aarch64")),
            expect(unused_mut, reason = "only these have more than one path")
        )]
        let mut found = vec![Self(Path::Portable)];
        #[cfg(target_arch = "aarch64")]
        found.extend(Neon::detect().map(|simd| Self(Path::Neon(simd))));
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx2::detect().map(|simd| Self(Path::Avx2(simd))));
            found.extend(Avx2::detect().map(|simd| Self(Path::AvxVnni(simd))));
            if let Some(simd) = Avx512::detect() {
                // All CPUs can do both, so that both are tested everywhere.
                let twice = twice_pays();
                found.extend([!twice, twice].map(|asks_twice| Self(Path::Avx512 { simd, asks_twice })));
            }
        }
        found
    }

    /// The fastest path that this CPU can take.
    pub(crate) fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Path::Portable))
    }

    /// How weights and inputs lie for products with 8-bit inputs.
    pub(crate) fn packing(self) -> Packing {
        match self.0 {
            Path::Portable => <Plain as Dots>::PACKING,
            #[cfg(target_arch = "aarch64")]
            Path::Neon(_) => <Neon as Dots>::PACKING,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(_) => <Avx2<false> as Dots>::PACKING,
            #[cfg(target_arch = "x86_64")]
            Path::AvxVnni(_) => <Avx2<true> as Dots>::PACKING,
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 { .. } => <Avx512 as Dots>::PACKING,
        }
    }

    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Path::Portable => "portable",
            #[cfg(target_arch = "aarch64")]
            Path::Neon(_) => "neon",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Path::AvxVnni(_) => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 { .. } => "avx512",
        }
    }

    /// Whether a stream that is read once is asked for twice.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn asks_twice(self) -> bool {
        matches!(self.0, Path::Avx512 { asks_twice: true, .. })
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn asks_twice(self) -> bool {
        false
    }

    /// Runs a kernel with these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Path::Portable => kernel.run(Portable(Plain)),
            #[cfg(target_arch = "aarch64")]
            Path::Neon(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Path::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Path::AvxVnni(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 { simd, .. } => simd.run(kernel),
        }
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

    struct Everything<'a>(&'a [f32; LANES], &'a [i8; LANES], &'a [f32; LANES]);

    impl Kernel for Everything<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            s.array(s.fma(s.load(self.0), s.load_i8(self.1), s.load(self.2)))
        }
    }

    /// A word with row `row` of scales, an output each, as columns of so many parts have them.
    fn scales<const N: usize>(parts: usize, row: usize, values: [[u8; N]; LANES]) -> Word {
        let (mut word, lanes) = (Word([0; 64]), LANES / parts);
        for (lane, value) in values.iter().enumerate() {
            let place = lane / lanes * (64 / parts) + (row * lanes + lane % lanes) * N;
            word.0[place..][..N].copy_from_slice(value);
        }
        word
    }

    /// All that a part's sums go through, part after part.
    struct Products<'a>(&'a [f32; LANES], &'a [i8; LANES], &'a Word);

    impl Kernel for Products<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let (d, Self(floats, bytes, w)) = (s.dots(), self);
            let unsigned = bytes.map(|byte| byte as u8);
            let Packing { parts, flip, .. } = S::Dots::PACKING;
            // Halves of any exponent but the largest, which stands for what is no number.
            let halves = scales(parts, 1, std::array::from_fn(|i| [unsigned[i], w.0[i] & 0xbb]));
            let floats = scales(parts, 0, floats.map(f32::to_le_bytes));
            let (signed, unsigneds) =
                (scales(parts, 2, unsigned.map(|byte| [byte])), scales(parts, 3, unsigned.map(|byte| [byte])));
            let flipped = Word(w.0.map(|byte| byte ^ flip));
            let small = Word(w.0.map(|byte| byte & 127));
            fn of<D: Dots>(word: &Word) -> &[D::W] {
                bytemuck::cast_slice(&word.0)
            }
            let (flipped, small, w) = (of::<S::Dots>(&flipped), of::<S::Dots>(&small), of::<S::Dots>(w));
            let (floats, halves) = (of::<S::Dots>(&floats), of::<S::Dots>(&halves));
            let (signed, unsigned) = (of::<S::Dots>(&signed), of::<S::Dots>(&unsigneds));
            let x = |i: usize| i32::from_ne_bytes(std::array::from_fn(|j| bytes[i + j] as u8));
            let offset = -128 * (0..8).map(|i| i32::from(bytes[i])).sum::<i32>();
            let mut out = [0.0; LANES];
            for (part, out) in out.chunks_mut(LANES / parts).enumerate() {
                let (flipped, small, w) = (&flipped[part], &small[part], &w[part]);
                let centred = d.add_centred(d.add_centred(d.centred(offset), flipped, x(0)), flipped, x(4));
                let small = d.add_small(d.add_small(d.small(), small, x(8)), small, x(3));
                let codes = d.add_codes::<4>(d.add_codes::<0>(d.centred(offset), w, x(0)), w, x(4));
                let nibbles =
                    (0..4).fold(d.bits(-77), |n, i| d.add_bits::<4, 4>(d.add_bits::<4, 0>(n, w, x(i)), w, x(11 - i)));
                let nibbles = d.sum_bits(nibbles, -77);
                let quarters = d.add_bits::<2, 2>(d.add_bits::<2, 0>(d.bits(5), w, x(7)), w, x(9));
                let quarters = d.add_bits::<2, 6>(d.add_bits::<2, 4>(quarters, w, x(2)), w, x(5));
                let quarters = d.sum_bits(quarters, 5);
                let sum = d.fma(d.to_f32(centred), d.floats(&floats[part]), d.signed_bytes(&signed[part], 2));
                let sum = d.fma(d.to_f32(small), d.bytes(&unsigned[part], 3), sum);
                let sum = d.fma(d.mul(d.to_f32(nibbles), d.splat(0.1)), d.halves(&halves[part], 1), sum);
                let sum = d.fma(d.to_f32(quarters), d.splat(0.3), d.fma(d.to_f32(codes), d.splat(0.7), sum));
                d.store(sum, out);
            }
            out
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
            let bits = |values: [f32; LANES]| values.map(f32::to_bits);
            let plain = Isa::available()[0];
            let want = (bits(plain.run(Everything(&a, &q, &c))), bits(plain.run(Products(&a, &q, &w))));
            for isa in Isa::available() {
                let got = (bits(isa.run(Everything(&a, &q, &c))), bits(isa.run(Products(&a, &q, &w))));
                assert_eq!(got, want, "{isa:?}, seed {seed}");
            }
        }
        // The largest sums that there are.
        for (byte, x) in [(255, -127), (0, -127), (255, 127), (0, 127)] {
            let (w, x) = (Word([byte; 64]), [x; LANES]);
            for isa in Isa::available() {
                let got = isa.run(Products(&[1.0; LANES], &x, &w)).map(f32::to_bits);
                let want = Isa::available()[0].run(Products(&[1.0; LANES], &x, &w)).map(f32::to_bits);
                assert_eq!(got, want, "{isa:?}");
            }
        }
    }

    #[test]
    fn the_best_path_is_the_one_that_was_asked_for_by_cpu_path() {
        let paths: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
        println!("paths of this CPU: {}", paths.join(", "));
        if let Ok(expected) = std::env::var("CPU_PATH") {
            assert_eq!(Isa::best().name(), expected, "of {paths:?}");
        }
    }

    struct Halves<'a>(&'a [u16; LANES]);

    impl Kernel for Halves<'_> {
        type Output = [[f32; LANES]; 2];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            [s.load_f16(&self.0.map(f16::from_bits)), s.load_bf16(&self.0.map(bf16::from_bits))].map(|v| s.array(v))
        }
    }

    #[test]
    fn every_path_widens_all_halves_exactly() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        for isa in Isa::available() {
            for halves in all.as_chunks::<LANES>().0 {
                let [f16s, bf16s] = isa.run(Halves(halves));
                for (lane, &half) in halves.iter().enumerate() {
                    let same = |got: f32, want: f32| got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same(f16s[lane], f16::from_bits(half).to_f32()), "{isa:?}: f16 {half:#x}, {}", f16s[lane]);
                    assert!(
                        same(bf16s[lane], bf16::from_bits(half).to_f32()),
                        "{isa:?}: bf16 {half:#x}, {}",
                        bf16s[lane]
                    );
                }
            }
        }
    }

    struct Round<'a>(&'a [f32; LANES]);

    impl Kernel for Round<'_> {
        type Output = [i8; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            s.round(s.load(self.0))
        }
    }

    #[test]
    fn every_path_rounds_to_the_nearest_and_to_even_numbers_on_a_tie() {
        let halves = (-254..=254).map(|twice| twice as f32 / 2.0);
        let beside = (-126..=126).flat_map(|n| [n as f32 + 0.49999, n as f32 + 0.50001]);
        let mut values: Vec<f32> = halves.chain(beside).chain([127.00001, -127.00001, -0.0]).collect();
        values.resize(values.len().next_multiple_of(LANES), 0.0);
        for isa in Isa::available() {
            for values in values.as_chunks::<LANES>().0 {
                let want = values.map(|value| value.round_ties_even() as i8);
                assert_eq!(isa.run(Round(values)), want, "{isa:?}: {values:?}");
            }
        }
    }

    #[test]
    fn all_lanes_are_summed() {
        assert_eq!(reduce(std::array::from_fn(|i| (1 << i) as f32)), 65535.0);
    }
}

//! Sums of packed weights times 8-bit inputs, in whatever steps an instruction set is best at. The sums are exact integers, so that
//! these steps cannot show in a result.

use grokpipe_model::IQ4_VALUES;

use super::LANES;

/// Four weights of each of sixteen outputs, or rows of their scales, in whatever order, aligned as the widest register.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Word(pub(crate) [u8; 4 * LANES]);

/// The weights of codes of half a byte, 128 too large.
pub(super) const CODES: [u8; LANES] = {
    let (mut codes, mut i) = ([0; LANES], 0);
    while i < LANES {
        codes[i] = IQ4_VALUES[i] as u8 ^ 0x80;
        i += 1;
    }
    codes
};

/// How packed weights and the inputs beside them lie for an instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Parts that sixteen outputs come in, 1 or 2: each has a stretch of memory of its own.
    pub(crate) parts: usize,
    /// What weights that are 128 too large are combined with by exclusive or: 0, or 128 where they are to be signed bytes.
    pub(crate) flip: u8,
    /// Rows of inputs that lie side by side at most, 4 or 8: three sums of each fit the registers.
    pub(crate) strip: usize,
}

/// Registers of outputs, and what can be done with them. As with [`super::Simd`], the value is the proof that the CPU has the
/// instructions. Inputs are signed bytes, four a word; none is -128,
/// but in a block whose scale is no number, where sums do not matter.
///
/// A register (or a pair of narrow ones, as on ARM) holds all sixteen outputs of a band or a part of them, one of [`Dots::PACKING`]'s
/// number. A word has four bytes for each of these: of weights, or of scales, of which it holds one row of floats, two of halves or four
/// of bytes.
pub(crate) trait Dots: Copy {
    /// How weights and inputs must lie.
    const PACKING: Packing;
    /// Four bytes for each output of a register.
    type W: bytemuck::Pod;
    /// An f32 an output.
    type F: Copy;
    /// An i32 an output.
    type I: Copy;
    /// Unfinished sums of at most 32 products with parts of bytes.
    type N: Copy;

    /// All 0.
    fn zero(self) -> Self::F;
    /// All `value`.
    fn splat(self, value: f32) -> Self::F;
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// As many floats as a register holds, the first of these.
    fn load(self, values: &[f32; LANES]) -> Self::F;
    /// A word's row of floats.
    fn floats(self, word: &Self::W) -> Self::F;
    /// Row `row`, below 2, of IEEE halves, exactly.
    fn halves(self, word: &Self::W, row: usize) -> Self::F;
    /// Row `row`, below 4, of signed bytes, exactly.
    fn signed_bytes(self, word: &Self::W, row: usize) -> Self::F;
    /// Row `row`, below 4, of unsigned bytes, exactly.
    fn bytes(self, word: &Self::W, row: usize) -> Self::F;
    /// Sums as floats; exact below 2^24.
    fn to_f32(self, sums: Self::I) -> Self::F;
    /// Writes the first `out.len()` outputs of the register, or all.
    fn store(self, sums: Self::F, out: &mut [f32]);

    /// What [`Dots::add_centred`] adds to. `offset` is -128 times the sum of all the inputs that it will be given: what weights that
    /// are 128 too large add too much. A path that makes the weights smaller instead passes it over.
    fn centred(self, offset: i32) -> Self::I;
    /// Adds products of `x` with weights that are stored 128 too large: once all are added, those of the true weights.
    fn add_centred(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I;
    /// What [`Dots::add_small`] adds to.
    fn small(self) -> Self::I;
    /// Adds products of `x` with weights of 0 to 127.
    fn add_small(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I;
    /// Adds products of `x` with the weights that half bytes stand for by [`grokpipe_model::IQ4_VALUES`]: those `SHIFT` bits up, 0 or 4.
    /// Adds to what [`Dots::centred`] gives, of an `offset` of 128 as there.
    fn add_codes<const SHIFT: i32>(self, sums: Self::I, w: &Self::W, x: i32) -> Self::I;
    /// What [`Dots::add_bits`] adds to. Whatever path it is, the `offset` given here and to [`Dots::sum_bits`] is added once.
    fn bits(self, offset: i32) -> Self::N;
    /// Adds products of `x` with `BITS` bits of each byte, those `SHIFT` bits up: 2 or 4, at most eight times.
    fn add_bits<const BITS: i32, const SHIFT: i32>(self, sums: Self::N, w: &Self::W, x: i32) -> Self::N;
    /// The sums with `offset`.
    fn sum_bits(self, sums: Self::N, offset: i32) -> Self::I;
}

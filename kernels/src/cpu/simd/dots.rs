//! Sums of packed weights times 8-bit inputs: a word of weights is four inputs of each of sixteen outputs, and every instruction set
//! adds it up in whatever steps it is best at. The sums are exact integers, so that these steps cannot show in a result.

use super::LANES;

/// Four weights of each of sixteen outputs, aligned as the widest register.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Word(pub(crate) [u8; 4 * LANES]);

impl Default for Word {
    fn default() -> Self {
        Self([0; 4 * LANES])
    }
}

/// Registers of outputs, and what can be done with them. As with [`super::Simd`], the value is the proof that the CPU has the
/// instructions. No input is -128.
///
/// A register holds the outputs of a whole word or of one `part` of it: all methods that read weights or scales take the part, below
/// [`Dots::PARTS`], and look at its outputs alone.
pub(crate) trait Dots: Copy {
    /// Registers that the outputs of a word fill: 1, 2 or 4.
    const PARTS: usize;
    /// Whether there are registers for two parts by four rows of sums; otherwise one part at a time is summed.
    const MANY_REGISTERS: bool;
    /// An f32 an output.
    type F: Copy;
    /// An i32 an output.
    type I: Copy;
    /// Unfinished sums of at most 32 products with halves of bytes.
    type N: Copy;

    /// All 0.
    fn zero(self) -> Self::F;
    /// All `value`.
    fn splat(self, value: f32) -> Self::F;
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Floats from memory.
    fn load(self, values: &[f32; LANES], part: usize) -> Self::F;
    /// Signed bytes, exactly.
    fn load_i8(self, values: &[i8; LANES], part: usize) -> Self::F;
    /// Unsigned bytes, exactly.
    fn load_u8(self, values: &[u8; LANES], part: usize) -> Self::F;
    /// IEEE halves, exactly.
    fn load_f16(self, values: &[u16; LANES], part: usize) -> Self::F;
    /// Sums as floats; exact below 2^24.
    fn to_f32(self, sums: Self::I) -> Self::F;
    /// Writes the first `out.len()` outputs of the register, or all.
    fn store(self, sums: Self::F, out: &mut [f32]);

    /// What [`Dots::add_centred`] adds to. `offset` is -128 times the sum of all the inputs that it will be given: what weights that
    /// are 128 too large add too much. A path that makes the weights smaller instead passes it over.
    fn centred(self, offset: i32) -> Self::I;
    /// Adds products of `x` with weights that are stored 128 too large: once all are added, those of the true weights.
    fn add_centred(self, sums: Self::I, w: &Word, part: usize, x: [i8; 4]) -> Self::I;
    /// What [`Dots::add_small`] adds to.
    fn small(self) -> Self::I;
    /// Adds products of `x` with weights of 0 to 127.
    fn add_small(self, sums: Self::I, w: &Word, part: usize, x: [i8; 4]) -> Self::I;
    /// What [`Dots::add_nibbles`] adds to. Whatever path it is, the `offset` given here and to [`Dots::sum_nibbles`] is added once.
    fn nibbles(self, offset: i32) -> Self::N;
    /// Adds products of `low` with the low halves of the bytes and of `high` with the high halves, each 0 to 15; at most four times.
    fn add_nibbles(self, sums: Self::N, w: &Word, part: usize, low: [i8; 4], high: [i8; 4]) -> Self::N;
    /// The sums with `offset`.
    fn sum_nibbles(self, sums: Self::N, offset: i32) -> Self::I;

    /// Asks for what will be read soon, `ahead` bytes behind `place`; it need not be there. Changes nothing.
    fn prefetch<T>(self, _place: &T, _ahead: usize) {}
    /// As [`Dots::prefetch`], into the second-level cache.
    fn prefetch_far<T>(self, _place: &T, _ahead: usize) {}
}

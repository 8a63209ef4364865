//! Rows of inputs as 8-bit numbers, laid out in strips: as many rows side by side as a tile of products takes.
//!
//! Decides the rounding: a row is cut into blocks of 32, each with one f32 scale, by which its largest number becomes 127. A strip is
//! one stream, block after block, with what is known of a block for all of its rows side by side: a tile reads forward, whatever the
//! number of rows. Of weights it knows what may be added to them (128, or a minimum), since that is added to sums of inputs.

use super::{
    packed::BLOCK,
    simd::{Kernel, LANES, Simd},
};

/// Words that a row has of a block.
pub(super) const FIELDS: usize = 12;

// Which they are: at first the numbers, four a word.
const QUADS: usize = BLOCK / 4;
/// What one is worth, as f32.
const SCALE: usize = QUADS;
/// -128 times the sum of all numbers: what weights that are 128 too large add too much.
const OFFSET: usize = QUADS + 1;
/// The same of the first half.
const LOW_OFFSET: usize = QUADS + 2;
/// The sum of what the numbers stand for, negative, as f32: what a minimum takes.
const TAKEN: usize = QUADS + 3;

/// Rows of the next strip, when so many rows are left and one takes `most`: as few strips as can be, of about one height. One row by
/// itself waits as long for the weights as four do.
#[inline(always)]
pub(super) fn height(left: usize, most: usize) -> usize {
    left.div_ceil(left.div_ceil(most).max(1))
}

/// A block of a strip of `R` rows.
#[derive(Clone, Copy)]
pub(super) struct StripBlock<'a, const R: usize>(&'a [[i32; R]; FIELDS]);

impl<'a, const R: usize> StripBlock<'a, R> {
    /// The blocks of a strip.
    #[inline(always)]
    pub(super) fn all(strip: &'a [i32]) -> &'a [[[i32; R]; FIELDS]] {
        strip.as_chunks::<R>().0.as_chunks::<FIELDS>().0
    }

    #[inline(always)]
    pub(super) fn new(block: &'a [[i32; R]; FIELDS]) -> Self {
        Self(block)
    }

    /// Numbers `4 k..4 k + 4` of row `r`.
    #[inline(always)]
    pub(super) fn quad(self, k: usize, r: usize) -> i32 {
        self.0[k][r]
    }

    #[inline(always)]
    pub(super) fn scale(self, r: usize) -> f32 {
        f32::from_bits(self.0[SCALE][r] as u32)
    }

    /// -128 times the sum of the numbers of part `p` of the `P`, 1 or 2.
    #[inline(always)]
    pub(super) fn offset<const P: usize>(self, p: usize, r: usize) -> i32 {
        let (all, low) = (self.0[OFFSET][r], self.0[LOW_OFFSET][r]);
        match (P, p) {
            (1, _) => all,
            (_, 0) => low,
            _ => all - low,
        }
    }

    /// What a minimum takes of part `p` of the `P`.
    #[inline(always)]
    pub(super) fn taken<const P: usize>(self, p: usize, r: usize) -> f32 {
        if P == 1 {
            f32::from_bits(self.0[TAKEN][r] as u32)
        } else {
            self.scale(r) * (self.offset::<P>(p, r) >> 7) as f32
        }
    }
}

/// Rounds rows of whole blocks to 8 bits.
pub(super) struct Quantise<'a> {
    pub(super) rows: Vec<&'a [f32]>,
    /// [`FIELDS`] words for each block of each row.
    pub(super) strip: &'a mut [i32],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let height = self.rows.len();
        for (r, row) in self.rows.into_iter().enumerate() {
            let places = self.strip.chunks_exact_mut(FIELDS * height);
            for (block, place) in row.as_chunks::<BLOCK>().0.iter().zip(places) {
                let fields = quantised(simd, block);
                for (field, place) in fields.iter().zip(place.chunks_exact_mut(height)) {
                    place[r] = *field;
                }
            }
        }
    }
}

/// Bits of a float but its sign. As integers they are in the order of the magnitudes, with infinities and what is no number above.
const MAGNITUDE: u32 = 0x7fff_ffff;
/// Infinity's.
const INFINITE: u32 = 0x7f80_0000;

#[inline(always)]
fn quantised<S: Simd>(simd: S, block: &[f32; BLOCK]) -> [i32; FIELDS] {
    let mut magnitudes = [0; LANES];
    for half in block.as_chunks::<LANES>().0 {
        for (magnitude, x) in magnitudes.iter_mut().zip(half) {
            *magnitude = (*magnitude).max(x.to_bits() & MAGNITUDE);
        }
    }
    let mut most = 0;
    for magnitude in magnitudes {
        most = most.max(magnitude);
    }
    let largest = f32::from_bits(most);
    let inverse = 127.0 / largest;
    // Of a block of zeros, or of numbers so small that they would be infinite, nothing is left.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    // NaN or infinity makes the scale NaN; the quantised values are then irrelevant.
    let scale = if most < INFINITE { largest / 127.0 } else { f32::NAN };
    // At most 127 in magnitude: the largest times its inverse may round up, and 127.0001 is still 127.
    let (mut bytes, mut sums) = ([[0; LANES]; 2], [0; 2]);
    for ((bytes, sum), half) in bytes.iter_mut().zip(&mut sums).zip(block.as_chunks().0) {
        *bytes = simd.round(simd.fma(simd.load(half), simd.splat(inverse), simd.zero()));
        *sum = sum_of(*bytes);
    }
    let all = sums[0] + sums[1];
    let mut fields = [0; FIELDS];
    fields[..QUADS].copy_from_slice(&bytemuck::cast::<[[i8; LANES]; 2], [i32; QUADS]>(bytes));
    fields[SCALE] = scale.to_bits() as i32;
    fields[OFFSET] = -128 * all;
    fields[LOW_OFFSET] = -128 * sums[0];
    fields[TAKEN] = (-(scale * all as f32)).to_bits() as i32;
    fields
}

/// In two words of bytes: a loop over them becomes one extraction a byte.
#[inline(always)]
fn sum_of(bytes: [i8; LANES]) -> i32 {
    const OF_TWO: u64 = 0x00ff_00ff_00ff_00ff;
    let mut sum = 0;
    for word in bytemuck::cast::<[i8; LANES], [u64; 2]>(bytes) {
        // Without signs: 128 larger each, of which there are eight.
        let word = word ^ 0x8080_8080_8080_8080;
        let pairs = (word & OF_TWO) + (word >> 8 & OF_TWO);
        sum += (pairs.wrapping_mul(0x0001_0001_0001_0001) >> 48) as i32 - 8 * 128;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cpu::simd::Isa,
        ops::testing::{Random, seed},
    };

    #[test]
    fn rows_are_cut_into_as_few_strips_as_can_be_of_about_one_height() {
        for most in [4, 8] {
            for rows in 0..100 {
                let (mut left, mut heights) = (rows, Vec::new());
                while left > 0 {
                    heights.push(height(left, most));
                    left -= heights[heights.len() - 1];
                }
                assert_eq!(heights.len(), rows.div_ceil(most), "{rows} rows: {heights:?}");
                let evenly = |height: &usize| (1..=most).contains(height) && height.abs_diff(heights[0]) <= 1;
                assert!(heights.iter().all(evenly), "{rows} rows: {heights:?}");
            }
        }
    }

    #[test]
    fn a_strip_has_what_each_of_its_rows_has_alone() {
        let seed = seed(31);
        let mut random = Random::new(seed);
        let x = random.floats(3 * 64, 2.0);
        let rows: Vec<&[f32]> = x.chunks(64).collect();
        for isa in Isa::available() {
            let mut strip = vec![0; 3 * 2 * FIELDS];
            isa.run(Quantise { rows: rows.clone(), strip: &mut strip });
            for (r, row) in rows.iter().enumerate() {
                let mut alone = vec![0; 2 * FIELDS];
                isa.run(Quantise { rows: vec![row], strip: &mut alone });
                for (b, (together, alone)) in
                    StripBlock::<3>::all(&strip).iter().zip(StripBlock::<1>::all(&alone)).enumerate()
                {
                    assert_eq!(together.map(|field| field[r]), alone.map(|[field]| field), "seed {seed}, {isa:?}");
                    let numbers: Vec<i32> = alone[..QUADS]
                        .iter()
                        .flat_map(|[quad]| quad.to_ne_bytes().map(|b| i32::from(b as i8)))
                        .collect();
                    let alone = StripBlock::new(alone);
                    let largest = row[b * BLOCK..][..BLOCK].iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                    assert_eq!(alone.scale(0), largest / 127.0);
                    assert_eq!(alone.offset::<2>(0, 0), -128 * numbers[..16].iter().sum::<i32>());
                    assert_eq!(alone.offset::<2>(1, 0), -128 * numbers[16..].iter().sum::<i32>());
                    assert_eq!(alone.offset::<1>(0, 0), -128 * numbers.iter().sum::<i32>());
                    assert_eq!(alone.taken::<1>(0, 0), -(alone.scale(0) * numbers.iter().sum::<i32>() as f32));
                    for (number, x) in numbers.iter().zip(&row[b * BLOCK..]) {
                        assert!((*number as f32 * alone.scale(0) - x).abs() <= alone.scale(0) * 0.5001, "{number} {x}");
                    }
                }
            }
        }
    }
}

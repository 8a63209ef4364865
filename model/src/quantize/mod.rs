//! Numbers into ggml's blocks: the other direction of `blocks.rs`, for the formats that a conversion writes.
//!
//! Deterministic: the same numbers give the same bytes on every machine, since all sums have a fixed order and nothing is fused.
//! Q8_0 and Q4_0 are ggml's definition; the K formats define only what a block means, and each file here says how it looks for the
//! block that errs least. Knows nothing of files and matrices.

mod affine;
mod q4_0;
mod q6_k;
mod q8_0;

use std::ops::Range;

use half::{bf16, f16};
use thiserror::Error;

use crate::BlockType;

/// Why numbers could not be written in a format.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum QuantizeError {
    /// An infinity, or no number at all.
    #[error("expected finite numbers, found {value} at {index}")]
    NotFinite {
        /// Which number.
        index: usize,
        /// What it was.
        value: f32,
    },
    /// A number so large that the format has no scale for it.
    #[error("expected numbers in the range of {format}, found {value} at {index}", format = .kind.name())]
    TooLarge {
        /// The format.
        kind: BlockType,
        /// Which number.
        index: usize,
        /// What it was.
        value: f32,
    },
    /// A format that is only read.
    #[error("expected a format that is written, found {}", .0.name())]
    OnlyRead(BlockType),
}

/// A block that the format has no scale for.
pub(crate) struct OutOfRange;

impl BlockType {
    /// Writes numbers as whole blocks; how many became zero because a half is zero that they would need, not because they are.
    ///
    /// # Errors
    /// [`QuantizeError`] when a number is not finite or too large, and for formats that are only read; `out` is then undefined.
    ///
    /// # Panics
    /// When `numbers` or `out` are not the same number of whole blocks.
    pub fn quantize(self, numbers: &[f32], out: &mut [u8]) -> Result<usize, QuantizeError> {
        let (weights, bytes) = (self.weights(), self.bytes());
        assert!(
            numbers.len().is_multiple_of(weights) && numbers.len() / weights * bytes == out.len(),
            "expected {} bytes for {} numbers in {}, found {}",
            numbers.len() / weights * bytes,
            numbers.len(),
            self.name(),
            out.len()
        );
        if let Some(index) = numbers.iter().position(|number| !number.is_finite()) {
            return Err(QuantizeError::NotFinite { index, value: numbers[index] });
        }
        let written = match self {
            Self::F16 => each(numbers, out, 0..2, f16_bytes),
            Self::Bf16 => each(numbers, out, 0..2, bf16_bytes),
            Self::Q8_0 => each(numbers, out, 0..2, q8_0::block),
            Self::Q4_0 => each(numbers, out, 0..2, q4_0::block),
            Self::Q4K => each(numbers, out, 0..4, affine::q4_k),
            Self::Q5K => each(numbers, out, 0..4, affine::q5_k),
            Self::Q6K => each(numbers, out, 208..210, q6_k::block),
            other => return Err(QuantizeError::OnlyRead(other)),
        };
        written.map_err(|block| {
            let begin = block * weights;
            let index = (begin..begin + weights).reduce(|a, b| if numbers[b].abs() > numbers[a].abs() { b } else { a });
            let index = index.unwrap_or(begin);
            QuantizeError::TooLarge { kind: self, index, value: numbers[index] }
        })
    }
}

/// Writes block by block. How many numbers became zero with the halves of their block, which lie at `halves`; or the number of the
/// first block that is out of range.
fn each<const W: usize, const B: usize>(
    numbers: &[f32],
    out: &mut [u8],
    halves: Range<usize>,
    one: impl Fn(&[f32; W], &mut [u8; B]) -> Result<(), OutOfRange>,
) -> Result<usize, usize> {
    let (numbers, blocks) = (numbers.as_chunks::<W>().0, out.as_chunks_mut::<B>().0);
    let mut lost = 0;
    for (index, (numbers, block)) in numbers.iter().zip(blocks).enumerate() {
        one(numbers, block).map_err(|OutOfRange| index)?;
        // Zero has a sign.
        let are_zero = block[halves.clone()].as_chunks().0.iter().all(|half| u16::from_le_bytes(*half) & 0x7fff == 0);
        if are_zero {
            lost += numbers.iter().filter(|number| **number != 0.0).count();
        }
    }
    Ok(lost)
}

/// The nearest half, unless that is infinite.
fn half_of(number: f32) -> Result<f16, OutOfRange> {
    let half = f16::from_f32(number);
    if half.is_finite() { Ok(half) } else { Err(OutOfRange) }
}

fn f16_bytes(number: &[f32; 1], out: &mut [u8; 2]) -> Result<(), OutOfRange> {
    *out = half_of(number[0])?.to_le_bytes();
    Ok(())
}

fn bf16_bytes(number: &[f32; 1], out: &mut [u8; 2]) -> Result<(), OutOfRange> {
    let short = bf16::from_f32(number[0]);
    *out = short.to_le_bytes();
    if short.is_finite() { Ok(()) } else { Err(OutOfRange) }
}

/// The nearest whole number, ties to even, of a number below 2^22: adding 1.5 * 2^23 pushes the fraction out of the f32.
/// A call of `round` for each weight would be most of the search's time on processors that lack the instruction.
#[inline(always)]
fn rounded(number: f32) -> f32 {
    const PUSH: f32 = 12_582_912.0;
    (number + PUSH) - PUSH
}

/// A block brought to magnitudes from 1 to 2 by a power of two, which changes no digit, so that no square over- or underflows.
struct Normal {
    /// What the block was multiplied by.
    factor: f32,
}

impl Normal {
    /// Of a block; `None` where every half is zero for numbers so small.
    fn of(numbers: &[f32]) -> Result<Option<Self>, OutOfRange> {
        let largest = numbers.iter().fold(0.0_f32, |largest, number| largest.max(number.abs()));
        let exponent = largest.to_bits() >> 23;
        match exponent {
            // 2^-60 and 2^60, far beyond what any scale can be.
            0..67 => Ok(None),
            67..187 => Ok(Some(Self { factor: f32::from_bits((254 - exponent) << 23) })),
            _ => Err(OutOfRange),
        }
    }

    fn apply<const N: usize>(&self, numbers: &[f32; N]) -> [f32; N] {
        numbers.map(|number| number * self.factor)
    }

    /// The half nearest to a scale of the normal block.
    fn nearest(&self, scale: f32) -> Result<f16, OutOfRange> {
        half_of(scale / self.factor)
    }

    /// The half next to it that is no smaller. Small halves are far apart, and with one too small the largest multiple of it falls
    /// short of what it was to be.
    fn not_below(&self, scale: f32) -> Result<f16, OutOfRange> {
        let half = self.nearest(scale)?;
        let is_below = self.worth(half).abs() < scale.abs();
        let half = if is_below { f16::from_bits(half.to_bits() + 1) } else { half };
        if half.is_finite() { Ok(half) } else { Err(OutOfRange) }
    }

    /// What a half is worth in the normal block.
    fn worth(&self, half: f16) -> f32 {
        half.to_f32() * self.factor
    }
}

#[cfg(test)]
mod tests;

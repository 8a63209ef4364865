//! ggml's number formats: blocks of weights that share scales, as GGUF files store them.
//!
//! Says what each block means, number for number; knows nothing of files, matrices or speed. The meaning is that of gguf-py, bit
//! for bit: every product below is exact in f32, so that only the last addition rounds.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// A number format of GGUF whose numbers come in blocks. F16 and BF16 count as blocks of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are the formats' own names")]
pub enum BlockType {
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
}

/// Name, number in GGUF files, weights a block, bytes a block.
const TABLE: [(BlockType, &str, u32, usize, usize); 14] = [
    (BlockType::F16, "F16", 1, 1, 2),
    (BlockType::Bf16, "BF16", 30, 1, 2),
    (BlockType::Q8_0, "Q8_0", 8, 32, 34),
    (BlockType::Q4_0, "Q4_0", 2, 32, 18),
    (BlockType::Q4_1, "Q4_1", 3, 32, 20),
    (BlockType::Q5_0, "Q5_0", 6, 32, 22),
    (BlockType::Q5_1, "Q5_1", 7, 32, 24),
    (BlockType::Q2K, "Q2_K", 10, 256, 84),
    (BlockType::Q3K, "Q3_K", 11, 256, 110),
    (BlockType::Q4K, "Q4_K", 12, 256, 144),
    (BlockType::Q5K, "Q5_K", 13, 256, 176),
    (BlockType::Q6K, "Q6_K", 14, 256, 210),
    (BlockType::Iq4Nl, "IQ4_NL", 20, 32, 18),
    (BlockType::Iq4Xs, "IQ4_XS", 23, 256, 136),
];

/// What the sixteen codes of the IQ4 formats stand for.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl BlockType {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.into_iter().map(|row| row.0)
    }

    fn row(self) -> (Self, &'static str, u32, usize, usize) {
        TABLE[self as usize]
    }

    /// The name that llama.cpp gives it.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The format with this number in GGUF files.
    pub fn from_number(number: u32) -> Option<Self> {
        TABLE.into_iter().find(|row| row.2 == number).map(|row| row.0)
    }

    /// Its number in GGUF files.
    pub(crate) fn number(self) -> u32 {
        self.row().2
    }

    /// Weights in a block.
    pub fn weights(self) -> usize {
        self.row().3
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        self.row().4
    }

    /// The numbers of whole blocks.
    ///
    /// # Panics
    /// When `blocks` or `out` are not the same number of whole blocks.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let (weights, bytes) = (self.weights(), self.bytes());
        assert!(
            blocks.len().is_multiple_of(bytes) && blocks.len() / bytes * weights == out.len(),
            "expected {} bytes of {} for {} numbers, found {}",
            out.len() / weights * bytes,
            self.name(),
            out.len(),
            blocks.len()
        );
        match self {
            Self::F16 => halves(blocks, out),
            Self::Bf16 => {
                each(blocks, out, |block: &[u8; 2], y: &mut [f32; 1]| y[0] = bf16::from_le_bytes(*block).to_f32());
            }
            Self::Q8_0 => each(blocks, out, q8_0),
            Self::Q4_0 => each(blocks, out, q4_0),
            Self::Q4_1 => each(blocks, out, q4_1),
            Self::Q5_0 => each(blocks, out, q5_0),
            Self::Q5_1 => each(blocks, out, q5_1),
            Self::Q2K => each(blocks, out, q2_k),
            Self::Q3K => each(blocks, out, q3_k),
            Self::Q4K => each(blocks, out, q4_k),
            Self::Q5K => each(blocks, out, q5_k),
            Self::Q6K => each(blocks, out, q6_k),
            Self::Iq4Nl => each(blocks, out, iq4_nl),
            Self::Iq4Xs => each(blocks, out, iq4_xs),
        }
    }
}

/// Halves as numbers, many at a time: where the CPU has an instruction for that, a slice takes it, and a single half does not.
fn halves(blocks: &[u8], out: &mut [f32]) {
    const AT_ONCE: usize = 64;
    let mut halves = [f16::ZERO; AT_ONCE];
    for (blocks, out) in blocks.chunks(2 * AT_ONCE).zip(out.chunks_mut(AT_ONCE)) {
        let halves = &mut halves[..out.len()];
        for (half, bytes) in halves.iter_mut().zip(blocks.as_chunks().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        halves.convert_to_f32_slice(out);
    }
}

/// What the numbers stand for that [`BlockType::unpack`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// `q` less this.
    Offset(u8),
    /// The place of a weight in [`IQ4_VALUES`].
    Iq4,
}

/// The scales of a block as they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnpackedScales {
    /// Half that all weights are multiplied by.
    pub d: u16,
    /// Half that all minima are multiplied by; 0 where there are none.
    pub m: u16,
    /// Factor of each sixteen weights; 1 in blocks of 32.
    pub scales: [i8; 16],
    /// What each sixteen weights are lessened by, in units of `m`; 1 in blocks of 32 that have a minimum.
    pub minima: [u8; 16],
}

/// This format has no whole-number weights of the kind that [`BlockType::unpack`] gives: F16 and BF16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotUnpacked;

impl BlockType {
    /// What the numbers stand for that [`Self::unpack`] writes; `None` where there are none.
    pub fn codes(self) -> Option<Codes> {
        Some(match self {
            Self::F16 | Self::Bf16 => return None,
            Self::Iq4Nl | Self::Iq4Xs => Codes::Iq4,
            Self::Q8_0 => Codes::Offset(128),
            Self::Q6K => Codes::Offset(32),
            Self::Q5_0 => Codes::Offset(16),
            Self::Q4_0 => Codes::Offset(8),
            Self::Q3K => Codes::Offset(4),
            Self::Q4_1 | Self::Q5_1 | Self::Q2K | Self::Q4K | Self::Q5K => Codes::Offset(0),
        })
    }

    /// Whole-number weights of one block, and its scales. A weight is `d * scales * value - m * minima`, where `value` is what
    /// [`Self::codes`] makes of the number `q` that this writes.
    ///
    /// # Errors
    /// [`NotUnpacked`] for the formats without such a form.
    ///
    /// # Panics
    /// When `block` or `q` is not one block.
    pub fn unpack(self, block: &[u8], q: &mut [u8]) -> Result<UnpackedScales, NotUnpacked> {
        assert!(block.len() == self.bytes() && q.len() == self.weights(), "one block of {}", self.name());
        let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let mut scales = UnpackedScales { d: half(0), m: 0, scales: [1; 16], minima: [0; 16] };
        let with_fifth_bits = |q: &mut [u8], high: &[u8]| {
            let high = fifth_bits(high);
            q.iter_mut().enumerate().for_each(|(i, q)| *q |= high(i));
        };
        match self {
            Self::Q8_0 => q.iter_mut().zip(&block[2..]).for_each(|(q, byte)| *q = byte ^ 0x80),
            Self::Q4_0 | Self::Iq4Nl => split(&block[2..], q),
            Self::Q5_0 => {
                split(&block[6..], q);
                with_fifth_bits(q, &block[2..6]);
            }
            Self::Q4_1 | Self::Q5_1 => {
                // The minimum of these is added, not taken.
                (scales.m, scales.minima) = (half(2) ^ 0x8000, [1; 16]);
                if self == Self::Q5_1 {
                    split(&block[8..], q);
                    with_fifth_bits(q, &block[4..8]);
                } else {
                    split(&block[4..], q);
                }
            }
            Self::Q2K => {
                (scales.d, scales.m) = (half(80), half(82));
                for (i, q) in q.chunks_mut(16).enumerate() {
                    let (half, j, g) = (i / 8, i / 2 % 4, i % 2);
                    (scales.scales[i], scales.minima[i]) = ((block[i] & 15) as i8, block[i] >> 4);
                    for (q, byte) in q.iter_mut().zip(&block[16 + 32 * half + 16 * g..]) {
                        *q = byte >> (2 * j) & 3;
                    }
                }
            }
            Self::Q4K | Self::Q5K => {
                scales.m = half(2);
                for i in 0..16 {
                    let (scale, min) = scale_and_min(&block[4..16], i / 2);
                    (scales.scales[i], scales.minima[i]) = (scale as i8, min);
                }
                let (high, low) =
                    if self == Self::Q5K { (&block[16..48], &block[48..]) } else { (&[][..], &block[16..]) };
                for (j, q) in q.chunks_mut(32).enumerate() {
                    for (l, q) in q.iter_mut().enumerate() {
                        let fifth = high.get(l).map_or(0, |high| (high >> j & 1) << 4);
                        *q = low[32 * (j / 2) + l] >> (4 * (j % 2)) & 15 | fifth;
                    }
                }
            }
            Self::Q6K => {
                scales.d = half(208);
                for (i, q) in q.chunks_mut(16).enumerate() {
                    let (half, k, g) = (i / 8, i / 2 % 4, i % 2);
                    scales.scales[i] = block[192 + i] as i8;
                    for (l, q) in q.iter_mut().enumerate() {
                        let low = block[64 * half + 32 * (k % 2) + 16 * g + l] >> (4 * (k / 2)) & 15;
                        let high = block[128 + 32 * half + 16 * g + l] >> (2 * k) & 3;
                        *q = low | high << 4;
                    }
                }
            }
            Self::Q3K => {
                scales.d = half(108);
                let (mask, low) = (&block[..32], &block[32..96]);
                for (i, q) in q.chunks_mut(16).enumerate() {
                    let (half, j, g) = (i / 8, i / 2 % 4, i % 2);
                    scales.scales[i] = q3_scale(&block[96..108], i);
                    for (l, q) in q.iter_mut().enumerate() {
                        let low = low[32 * half + 16 * g + l] >> (2 * j) & 3;
                        let high = mask[16 * g + l] >> (4 * half + j) & 1;
                        *q = low | high << 2;
                    }
                }
            }
            Self::Iq4Xs => {
                let high = half(2);
                for (i, q) in q.chunks_mut(32).enumerate() {
                    let scale = iq4_scale(block[4 + i / 2], high, i);
                    (scales.scales[2 * i], scales.scales[2 * i + 1]) = (scale, scale);
                    split(&block[8 + 16 * i..8 + 16 * (i + 1)], q);
                }
            }
            Self::F16 | Self::Bf16 => return Err(NotUnpacked),
        }
        Ok(scales)
    }
}

/// Half bytes: the low ones are the first half of `q`, the high ones the second.
fn split(bytes: &[u8], q: &mut [u8]) {
    let (low, high) = q.split_at_mut(bytes.len());
    for (byte, (low, high)) in bytes.iter().zip(low.iter_mut().zip(high)) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

#[inline(always)]
fn each<const B: usize, const W: usize>(blocks: &[u8], out: &mut [f32], one: impl Fn(&[u8; B], &mut [f32; W])) {
    for (block, y) in blocks.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<W>().0) {
        one(block, y);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (y, q) in y.iter_mut().zip(&block[2..]) {
        *y = d * f32::from(*q as i8);
    }
}

/// Low nibbles are the first half of a block, high nibbles the second.
fn nibbles(q: &[u8], y: &mut [f32], number: impl Fn(usize, u8) -> f32) {
    let half = q.len();
    for (j, q) in q.iter().enumerate() {
        y[j] = number(j, q & 15);
        y[j + half] = number(j + half, q >> 4);
    }
}

fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], y, |_, q| d * (f32::from(q) - 8.0));
}

fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], y, |_, q| d * f32::from(q) + m);
}

/// Bit `i` of four bytes, as bit 4 of weight `i`.
fn fifth_bits(bytes: &[u8]) -> impl Fn(usize) -> u8 + '_ {
    |i| (bytes[i / 8] >> (i % 8) & 1) << 4
}

fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half_at(block, 0), fifth_bits(&block[2..6]));
    nibbles(&block[6..], y, |i, q| d * (f32::from(q | high(i)) - 16.0));
}

fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half_at(block, 0), half_at(block, 2), fifth_bits(&block[4..8]));
    nibbles(&block[8..], y, |i, q| d * f32::from(q | high(i)) + m);
}

fn q2_k(block: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, q) = (&block[..16], &block[16..80]);
    let (d, m) = (half_at(block, 80), half_at(block, 82));
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, j, g) = (i / 8, i / 2 % 4, i % 2);
        let (scale, min) = (d * f32::from(scales[i] & 15), m * f32::from(scales[i] >> 4));
        for (y, q) in y.iter_mut().zip(&q[32 * half + 16 * g..]) {
            *y = scale * f32::from(q >> (2 * j) & 3) - min;
        }
    }
}

/// Scale of sixteen weights of Q3_K, six bits less 32.
fn q3_scale(packed: &[u8], i: usize) -> i8 {
    let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
    let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
    (low | high << 4) as i8 - 32
}

fn q3_k(block: &[u8; 110], y: &mut [f32; 256]) {
    let (mask, q, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, j, g) = (i / 8, i / 2 % 4, i % 2);
        let scale = d * f32::from(q3_scale(scales, i));
        for (l, y) in y.iter_mut().enumerate() {
            let low = q[32 * half + 16 * g + l] >> (2 * j) & 3;
            let high = mask[16 * g + l] >> (4 * half + j) & 1;
            *y = scale * (f32::from(low | high << 2) - 4.0);
        }
    }
}

/// Scale and minimum of sub-block `j` of Q4_K and Q5_K, six bits each.
fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, m, packed, q) = (half_at(block, 0), half_at(block, 2), &block[4..16], &block[16..]);
    for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(packed, j);
        let (scale, min) = (d * f32::from(scale), m * f32::from(min));
        for (y, q) in y.iter_mut().zip(&q[32 * (j / 2)..]) {
            *y = scale * f32::from(q >> (4 * (j % 2)) & 15) - min;
        }
    }
}

fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, m, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    let (high, q) = (&block[16..48], &block[48..]);
    for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(packed, j);
        let (scale, min) = (d * f32::from(scale), m * f32::from(min));
        for ((y, q), high) in y.iter_mut().zip(&q[32 * (j / 2)..]).zip(high) {
            *y = scale * f32::from(q >> (4 * (j % 2)) & 15 | (high >> j & 1) << 4) - min;
        }
    }
}

fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, k, g) = (i / 8, i / 2 % 4, i % 2);
        let scale = d * f32::from(scales[i] as i8);
        for (l, y) in y.iter_mut().enumerate() {
            let low = low[64 * half + 32 * (k % 2) + 16 * g + l] >> (4 * (k / 2)) & 15;
            let high = high[32 * half + 16 * g + l] >> (2 * k) & 3;
            *y = scale * (f32::from(low | high << 4) - 32.0);
        }
    }
}

fn iq4_nl(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], y, |_, q| d * f32::from(IQ4_VALUES[usize::from(q)]));
}

/// Scale of sub-block `i` of IQ4_XS, six bits less 32.
fn iq4_scale(low: u8, high: u16, i: usize) -> i8 {
    let low = low >> (4 * (i % 2)) & 15;
    (low | ((high >> (2 * i) & 3) as u8) << 4) as i8 - 32
}

fn iq4_xs(block: &[u8; 136], y: &mut [f32; 256]) {
    let (d, high) = (half_at(block, 0), u16::from_le_bytes([block[2], block[3]]));
    let (low, q) = (&block[4..8], &block[8..]);
    for (i, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = d * f32::from(iq4_scale(low[i / 2], high, i));
        nibbles(&q[16 * i..16 * (i + 1)], y, |_, q| scale * f32::from(IQ4_VALUES[usize::from(q)]));
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn the_table_stands_in_the_order_of_the_variants() {
        for (index, kind) in BlockType::all().enumerate() {
            assert_eq!(kind as usize, index);
            assert_eq!(BlockType::from_number(kind.row().2), Some(kind));
        }
    }

    #[test]
    fn unpacked_weights_and_scales_are_the_numbers() {
        let mut state = 7_u32;
        for kind in BlockType::all() {
            let mut block: Vec<u8> = vec![0; kind.bytes()];
            for byte in &mut block {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            let mut q = vec![0; kind.weights()];
            let Ok(scales) = kind.unpack(&block, &mut q) else {
                assert_eq!(kind.codes(), None);
                continue;
            };
            let mut expected = vec![0.0; kind.weights()];
            kind.dequantize(&block, &mut expected);
            let (d, m) = (f16::from_bits(scales.d).to_f32(), f16::from_bits(scales.m).to_f32());
            for (i, (q, expected)) in q.iter().zip(&expected).enumerate() {
                let value = match kind.codes() {
                    Some(Codes::Iq4) => f32::from(IQ4_VALUES[usize::from(*q)]),
                    Some(Codes::Offset(offset)) => f32::from(*q) - f32::from(offset),
                    None => unreachable!("what was unpacked has codes"),
                };
                let (scale, min) = (f32::from(scales.scales[i / 16]), f32::from(scales.minima[i / 16]));
                let found = d * scale * value - m * min;
                assert!(
                    found == *expected || (found.is_nan() && expected.is_nan()),
                    "{} at {i}: {found} {expected}",
                    kind.name()
                );
            }
        }
    }

    #[test]
    fn every_half_is_the_number_that_it_is_alone() {
        let blocks: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        // The last ones are fewer than are taken at once.
        for bytes in [blocks.as_slice(), &blocks[2..150]] {
            let mut found = vec![0.0; bytes.len() / 2];
            BlockType::F16.dequantize(bytes, &mut found);
            for (found, half) in found.iter().zip(bytes.as_chunks().0) {
                let expected = f16::from_le_bytes(*half).to_f32();
                assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{half:?}");
            }
        }
    }

    #[test]
    fn every_number_of_every_format_is_gguf_pys() {
        let folder = std::env::var_os("GROKPIPE_SHARED")
            .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared").into(), std::path::PathBuf::from);
        let Ok(file) = std::fs::read(folder.join("golden/gguf/block_dequant.safetensors")) else {
            println!("skipped: no golden/gguf in the shared goldens (GROKPIPE_SHARED)");
            return;
        };
        let golden = SafeTensors::deserialize(&file).unwrap();
        for kind in BlockType::all() {
            let blocks = golden.tensor(&format!("{}.bytes", kind.name())).unwrap();
            let expected = golden.tensor(&format!("{}.f32", kind.name())).unwrap();
            let expected: Vec<f32> =
                expected.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            let mut found = vec![0.0; expected.len()];
            kind.dequantize(blocks.data(), &mut found);
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            let wrong = found.iter().zip(&expected).position(|pair| !same(pair));
            assert_eq!(wrong, None, "{}: found {found:?}, expected {expected:?}", kind.name());
        }
    }
}

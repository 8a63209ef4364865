//! Quantised weights laid out for products with 8-bit inputs: sixteen outputs side by side, four inputs a register.
//!
//! A band is sixteen outputs of one expert, and a column the part of them that fills a register ([`Packing`]). A column lies as one
//! stream, block of 32 inputs after block, so that a product reads memory forward and nothing twice. The numbers are those of the
//! file, rearranged; [`Numbers`] and [`Scaling`] say what they mean. F16 and BF16 stay as stored and are multiplied exactly.

use grokpipe_model::{BlockType, Codes, MatrixSource, MatrixSpec};

use super::{
    memory::{LargeWords, product, zeroed},
    simd::{LANES, Packing, Word},
    threads::Threads,
};
use crate::KernelError;

/// Inputs of a block.
pub(crate) const BLOCK: usize = 32;
/// Blocks that share the scales of a K format.
pub(super) const SUPER: usize = 8;
/// Stored bytes read at a time, at least a band.
const PIECE_BYTES: usize = 4 << 20;

/// Sixteen halves, one an output.
type Halves = [u16; LANES];

/// What stored weights are. Where there is no minimum, bytes are too large by 128 and half bytes by 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// A byte each.
    Bytes,
    /// Two a byte: the low halves are inputs 0 to 15 of a block.
    Nibbles,
    /// Two a byte as nibbles are, each a place in [`grokpipe_model::IQ4_VALUES`].
    Codes,
    /// Four a byte: word `h` has inputs `16 h..16 h + 16` of a block, four in each two bits.
    Quarters,
}

impl Numbers {
    /// Words of a block of sixteen outputs: the bits of a number.
    pub(super) fn words(self) -> usize {
        match self {
            Self::Bytes => 8,
            Self::Nibbles | Self::Codes => 4,
            Self::Quarters => 2,
        }
    }
}

/// What a weight is worth. A minimum's half stands behind the scale's, and its bytes behind those of the scale.
pub(super) enum Scaling {
    /// `q * scale`: an f32 for all blocks of a group, `[bands, groups]`.
    Groups { scales: Vec<[f32; LANES]>, blocks: usize },
    /// `q * d - m`: halves `d` and, with `minima`, `m` for each block, `[bands, blocks, 1 or 2]`.
    Blocks { halves: Vec<Halves>, minima: bool },
    /// `q * d * s - m * t`: halves `d` and, with `minima`, `m` for eight blocks, `[bands, blocks / 8, 1 or 2]`, and bytes `s` and `t`,
    /// signed where there are no minima, for each of the 1 or 2 parts of a block, `[bands, blocks, parts or twice that]`.
    Supers { halves: Vec<Halves>, bytes: Vec<[u8; LANES]>, minima: bool },
}

/// A packed matrix, or one an expert.
pub(crate) struct Packed {
    /// Blocks of a row of inputs.
    pub(super) blocks: usize,
    /// Bands of an expert.
    pub(super) bands: usize,
    /// `[experts, bands, parts, blocks, words of a block]`, each the same inputs of every output of a part.
    pub(super) words: LargeWords,
    pub(super) numbers: Numbers,
    pub(super) scaling: Scaling,
}

/// How a format is laid out, beside where its weights lie.
#[derive(Clone, Copy)]
struct Plan {
    numbers: Numbers,
    minima: bool,
    /// Parts of a block with a scale of their own in a super-block; 0 without super-blocks.
    parts: usize,
}

impl Plan {
    /// The one plan of each format; `None` when it is not packed.
    fn of(kind: BlockType) -> Option<Self> {
        let (numbers, minima, parts) = match kind {
            BlockType::F16 | BlockType::Bf16 => return None,
            BlockType::Q8_0 | BlockType::Q5_0 => (Numbers::Bytes, false, 0),
            BlockType::Q5_1 => (Numbers::Bytes, true, 0),
            BlockType::Q4_0 => (Numbers::Nibbles, false, 0),
            BlockType::Q4_1 => (Numbers::Nibbles, true, 0),
            BlockType::Iq4Nl => (Numbers::Codes, false, 0),
            BlockType::Q2K => (Numbers::Quarters, true, 2),
            BlockType::Q3K => (Numbers::Nibbles, false, 2),
            BlockType::Q4K => (Numbers::Nibbles, true, 1),
            BlockType::Q5K => (Numbers::Bytes, true, 1),
            BlockType::Q6K => (Numbers::Bytes, false, 2),
            BlockType::Iq4Xs => (Numbers::Codes, false, 1),
        };
        Some(Self { numbers, minima, parts })
    }

    /// One, or two where minima stand behind scales.
    fn kinds(self) -> usize {
        if self.minima { 2 } else { 1 }
    }

    /// Halves and bytes of the scales of so many blocks of a band.
    fn scales(self, blocks: usize) -> (usize, usize) {
        match self.parts {
            0 => (blocks * self.kinds(), 0),
            parts => (blocks / SUPER * self.kinds(), blocks * parts * self.kinds()),
        }
    }

    /// What is added to the file's numbers, so that they are too large by what products expect.
    fn moved(self, kind: BlockType) -> u8 {
        let wanted = match self.numbers {
            Numbers::Bytes if !self.minima => 128,
            Numbers::Nibbles if !self.minima => 8,
            _ => 0,
        };
        match kind.codes() {
            Some(Codes::Offset(offset)) => wanted - offset,
            _ => 0,
        }
    }
}

/// Bytes that a matrix of such blocks takes in memory, packed if it can be.
pub(super) fn held_bytes(spec: &MatrixSpec, kind: BlockType) -> u64 {
    let Some(plan) = Plan::of(kind) else { return spec.weight_bytes() };
    let blocks = spec.inputs / BLOCK;
    let (halves, bytes) = plan.scales(blocks);
    let a_band = blocks * plan.numbers.words() * size_of::<Word>() + (2 * halves + bytes) * LANES;
    spec.experts as u64 * spec.outputs.div_ceil(LANES) as u64 * a_band as u64
}

impl Packed {
    /// Packs int8 rows that lie output by output, each expert filled up to whole bands, with scales `[experts, outputs, groups]`.
    /// The words are rearranged in place.
    pub(super) fn of_int8(
        spec: &MatrixSpec,
        mut words: LargeWords,
        scales: &[f32],
        groups: usize,
        packing: Packing,
        threads: &Threads,
    ) -> Self {
        let (blocks, bands) = (spec.inputs / BLOCK, spec.outputs.div_ceil(LANES));
        let work = words.len() * 64;
        threads.each(words.chunks_mut(blocks * 8).collect(), work, |band| {
            let flip = 0x80 ^ packing.flip;
            let rows: Vec<u8> = bytemuck::cast_slice::<Word, u8>(band).iter().map(|byte| byte ^ flip).collect();
            interleave(&rows, packing.parts, band);
        });
        let mut by_band = vec![[0.0; LANES]; spec.experts * bands * groups];
        for (index, scales) in scales.chunks(groups).enumerate() {
            let (expert, output) = (index / spec.outputs, index % spec.outputs);
            let band = expert * bands + output / LANES;
            for (group, scale) in scales.iter().enumerate() {
                by_band[band * groups + group][output % LANES] = *scale;
            }
        }
        let scaling = Scaling::Groups { scales: by_band, blocks: blocks / groups };
        Self { blocks, bands, words, numbers: Numbers::Bytes, scaling }
    }

    /// Reads and packs blocks; `None` when this format or shape is not packed.
    pub(super) fn load(
        source: &dyn MatrixSource,
        kind: BlockType,
        packing: Packing,
        threads: &Threads,
        device: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Self>, KernelError> {
        let MatrixSpec { inputs, outputs, experts, ref name, format, .. } = *source.spec();
        let (Some(plan), Some(row_bytes)) = (Plan::of(kind), format.row_bytes(inputs)) else {
            return Ok(None);
        };
        let (blocks, bands) = (inputs / BLOCK, outputs.div_ceil(LANES));
        let per_block = plan.numbers.words();
        let count = product(&[experts, bands, blocks, per_block], name, device)?;
        let mut words = LargeWords::zeroed(count, name, device)?;
        let (a_band_halves, a_band_bytes) = plan.scales(blocks);
        let mut halves: Vec<Halves> = zeroed(product(&[experts, bands, a_band_halves], name, device)?, name, device)?;
        let mut bytes: Vec<[u8; LANES]> =
            zeroed(product(&[experts, bands, a_band_bytes], name, device)?, name, device)?;
        let at_once = (PIECE_BYTES / (LANES * row_bytes)).max(1);
        let mut stored = Vec::new();
        for expert in 0..experts {
            for first in (0..bands).step_by(at_once) {
                let count = at_once.min(bands - first);
                let rows = first * LANES..((first + count) * LANES).min(outputs);
                stored.resize(rows.len() * row_bytes, 0);
                source.read(((expert * outputs + rows.start) * row_bytes) as u64, &mut stored)?;
                let band = expert * bands + first;
                let words = &mut words[band * blocks * per_block..][..count * blocks * per_block];
                // A format without bytes has empty ones.
                let mut bytes = bytes[band * a_band_bytes..].chunks_mut(a_band_bytes.max(1));
                let parts: Vec<_> = stored
                    .chunks(LANES * row_bytes)
                    .zip(words.chunks_mut(blocks * per_block))
                    .zip(halves[band * a_band_halves..].chunks_mut(a_band_halves))
                    .map(|((stored, words), halves)| Band {
                        stored,
                        words,
                        halves,
                        bytes: bytes.next().unwrap_or_default(),
                    })
                    .collect();
                threads.each(parts, stored.len(), |band| band.pack(kind, plan, packing, row_bytes));
                progress(stored.len() as u64);
            }
        }
        let Plan { numbers, minima, parts } = plan;
        let scaling = match parts {
            0 => Scaling::Blocks { halves, minima },
            _ => Scaling::Supers { halves, bytes, minima },
        };
        Ok(Some(Self { blocks, bands, words, numbers, scaling }))
    }
}

/// A band to be packed.
struct Band<'a> {
    /// Up to sixteen rows.
    stored: &'a [u8],
    words: &'a mut [Word],
    halves: &'a mut [Halves],
    bytes: &'a mut [[u8; LANES]],
}

impl Band<'_> {
    fn pack(self, kind: BlockType, plan: Plan, packing: Packing, row_bytes: usize) {
        let Plan { numbers, minima, parts } = plan;
        let count = row_bytes / kind.bytes();
        // Weights of the band, row after row.
        let mut rows = vec![0; LANES * count * kind.weights()];
        let stored = self.stored.chunks(row_bytes).zip(rows.chunks_mut(count * kind.weights()));
        for (lane, (stored, row)) in stored.enumerate() {
            for (index, (block, weights)) in stored.chunks(kind.bytes()).zip(row.chunks_mut(kind.weights())).enumerate()
            {
                // A format with a plan can be unpacked.
                let Ok(unpacked) = kind.unpack(block, weights) else { continue };
                self.halves[index * plan.kinds()][lane] = unpacked.d;
                if minima {
                    self.halves[2 * index + 1][lane] = unpacked.m;
                }
                let places = self.bytes.chunks_mut((parts * plan.kinds()).max(1)).skip(index * SUPER);
                for (block, places) in places.take(SUPER).enumerate() {
                    for part in 0..parts {
                        places[part][lane] = unpacked.scales[2 * block + part] as u8;
                        if minima {
                            places[parts + part][lane] = unpacked.minima[2 * block + part];
                        }
                    }
                }
            }
        }
        let moved = plan.moved(kind);
        rows.iter_mut().for_each(|weight| *weight = weight.wrapping_add(moved));
        match numbers {
            Numbers::Bytes => {
                // Weights beside a minimum are not too large.
                if !minima {
                    rows.iter_mut().for_each(|weight| *weight ^= packing.flip);
                }
                interleave(&rows, packing.parts, self.words);
            }
            Numbers::Nibbles | Numbers::Codes => {
                interleave_parts(&rows, packing.parts, self.words, |block, k, j| {
                    block[4 * k + j] | block[BLOCK / 2 + 4 * k + j] << 4
                });
            }
            Numbers::Quarters => {
                interleave_parts(&rows, packing.parts, self.words, |block, half, j| {
                    (0..4).fold(0, |byte, quad| byte | block[BLOCK / 2 * half + 4 * quad + j] << (2 * quad))
                });
            }
        }
    }
}

/// Sixteen rows of bytes to words: word `k` of a part has inputs `4 k..4 k + 4` of each of its rows.
fn interleave(rows: &[u8], parts: usize, words: &mut [Word]) {
    let (inputs, lanes) = (rows.len() / LANES, LANES / parts);
    let words: &mut [u8] = bytemuck::cast_slice_mut(words);
    for (rows, words) in rows.chunks(lanes * inputs).zip(words.chunks_mut(lanes * inputs)) {
        for (lane, row) in rows.chunks(inputs).enumerate() {
            for (word, quad) in words.chunks_mut(4 * lanes).zip(row.as_chunks::<4>().0) {
                word[4 * lane..4 * lane + 4].copy_from_slice(quad);
            }
        }
    }
}

/// Sixteen rows of parts of bytes to words, of which `byte` makes the `j`th of an output in word `k` of a block.
fn interleave_parts(rows: &[u8], parts: usize, words: &mut [Word], byte: impl Fn(&[u8; BLOCK], usize, usize) -> u8) {
    let (inputs, lanes) = (rows.len() / LANES, LANES / parts);
    let words: &mut [u8] = bytemuck::cast_slice_mut(words);
    let a_part = words.len() / parts;
    let a_block = a_part / (inputs / BLOCK);
    for (rows, words) in rows.chunks(lanes * inputs).zip(words.chunks_mut(a_part)) {
        for (lane, row) in rows.chunks(inputs).enumerate() {
            for (words, block) in words.chunks_mut(a_block).zip(row.as_chunks::<BLOCK>().0) {
                for (k, word) in words.chunks_mut(4 * lanes).enumerate() {
                    for j in 0..4 {
                        word[4 * lane + j] = byte(block, k, j);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_model::{Format, Layout};

    use super::*;
    use crate::{
        cpu::simd::Isa,
        ops::testing::{Random, TestMatrix},
    };

    #[test]
    fn what_a_matrix_takes_is_known_before_it_is_packed() {
        let threads = Threads::new(1).unwrap();
        for kind in BlockType::all() {
            let matrix = TestMatrix::random(&mut Random::new(3), (2, 512, 70), Format::Blocks(kind), Layout::OutIn);
            let Some(packed) =
                Packed::load(&matrix, kind, Isa::best().packing(), &threads, "cpu", &mut |_| ()).unwrap()
            else {
                assert_eq!(held_bytes(&matrix.spec, kind), matrix.spec.weight_bytes());
                continue;
            };
            let scales = match &packed.scaling {
                Scaling::Groups { scales, .. } => size_of_val(scales.as_slice()),
                Scaling::Blocks { halves, .. } => size_of_val(halves.as_slice()),
                Scaling::Supers { halves, bytes, .. } => size_of_val(halves.as_slice()) + size_of_val(bytes.as_slice()),
            };
            let taken = size_of_val(&*packed.words) + scales;
            assert_eq!(held_bytes(&matrix.spec, kind), taken as u64, "{kind:?}");
        }
    }
}

//! Quantised weights laid out for products with 8-bit inputs: sixteen outputs side by side, four inputs a register.
//!
//! A band is sixteen outputs of one expert; a column is the part of a band that fills a register ([`Packing`]). A column is one stream of
//! chunks ([`Chunk`]), each in the order in which a product needs its parts:
//!
//! ```text
//! chunk: unit | unit | … | scales of the whole chunk, if it has any
//! unit:  scales of the unit, if it has any | blocks of 32 inputs
//! ```
//!
//! So a product reads memory forward, in one place at a time, and nothing twice, which hardware prefetchers recognise. The numbers are
//! those of the file, rearranged; [`Numbers`] and [`Scaling`] say what they mean. F16 and BF16 stay as stored and are multiplied exactly.

use grokpipe_model::{BlockType, Codes, MatrixSource, MatrixSpec};

use super::{
    memory::{Arena, ArenaPart, product},
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

/// What a weight is worth. Scales are rows of a number for each output of a column: one row of floats fills a word, two of halves or four
/// of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scaling {
    /// `q * scale`: a float for all of a group's blocks, of which there are so many.
    Groups(usize),
    /// `q * d - m`: halves `d` and, with `minima`, `m` for each block.
    Blocks { minima: bool },
    /// `q * d * s - m * t`: halves `d` and, with `minima`, `m` for eight blocks, and for each of these the bytes `s`, signed where there
    /// are no minima, and `t` of its 1 or 2 parts. With minima and one part they have six bits ([`SIXES`]).
    Supers { parts: usize, minima: bool },
}

/// Words that hold the scales and minima of eight blocks in six bits each, in the place of four words of bytes: the first three words in
/// the low bits, and two bits of the fourth in the high bits of each.
pub(super) const SIXES: usize = 3;

/// Blocks of a stream that share a scale or lie together for other reasons: units, then a word of the scales of all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) blocks: usize,
    /// Blocks of a unit, whose numbers follow its scales.
    unit: usize,
    /// Words of a unit's scales.
    scales: usize,
    /// Words of a block's numbers.
    numbers: usize,
    /// Words of the chunk, with the scales of all of it.
    pub(super) words: usize,
}

impl Chunk {
    fn of(numbers: Numbers, scaling: Scaling) -> Self {
        let numbers = numbers.words();
        let (blocks, unit, scales, has_end) = match scaling {
            Scaling::Groups(blocks) => (blocks, blocks, 0, true),
            Scaling::Blocks { minima: false } => (2, 2, 1, false),
            Scaling::Blocks { minima: true } => (1, 1, 1, false),
            Scaling::Supers { parts: 1, minima: true } => (SUPER, SUPER, SIXES, true),
            Scaling::Supers { parts, minima } => (SUPER, 4 / parts / if minima { 2 } else { 1 }, 1, true),
        };
        let mut chunk = Self { blocks, unit, scales, numbers, words: 0 };
        chunk.words = blocks / unit * chunk.a_unit() + usize::from(has_end);
        chunk
    }

    fn a_unit(self) -> usize {
        self.scales + self.unit * self.numbers
    }

    /// Words of a column of so many blocks; the last chunk is filled up with zeros.
    fn stream(self, blocks: usize) -> usize {
        blocks.div_ceil(self.blocks) * self.words
    }

    /// Where the unit of a block begins in the stream, with its scales if it has them.
    fn unit_of(self, block: usize) -> usize {
        block / self.blocks * self.words + block % self.blocks / self.unit * self.a_unit()
    }

    /// Where the numbers of a block begin.
    fn numbers_of(self, block: usize) -> usize {
        self.unit_of(block) + self.scales + block % self.unit * self.numbers
    }

    /// The word that scales all of a block's chunk.
    fn end_of(self, block: usize) -> usize {
        (block / self.blocks + 1) * self.words - 1
    }
}

/// A packed matrix, or one an expert.
pub(crate) struct Packed {
    /// Blocks of a row of inputs.
    pub(super) blocks: usize,
    /// Bands of an expert.
    pub(super) bands: usize,
    /// `[experts, bands, parts]` streams.
    pub(super) words: ArenaPart<Word>,
    pub(super) numbers: Numbers,
    pub(super) scaling: Scaling,
    /// How its streams are cut.
    pub(super) chunk: Chunk,
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

    fn scaling(self) -> Scaling {
        match self.parts {
            0 => Scaling::Blocks { minima: self.minima },
            parts => Scaling::Supers { parts, minima: self.minima },
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
    let stream = Chunk::of(plan.numbers, plan.scaling()).stream(spec.inputs / BLOCK);
    spec.experts as u64 * spec.outputs.div_ceil(LANES) as u64 * (stream * size_of::<Word>()) as u64
}

impl Packed {
    /// Room for a matrix.
    fn zeroed(
        spec: &MatrixSpec,
        numbers: Numbers,
        scaling: Scaling,
        arena: &mut Arena,
        device: &str,
    ) -> Result<Self, KernelError> {
        let (blocks, bands) = (spec.inputs / BLOCK, spec.outputs.div_ceil(LANES));
        let chunk = Chunk::of(numbers, scaling);
        let count = product(&[spec.experts, bands, chunk.stream(blocks)], &spec.name, device)?;
        Ok(Self { blocks, bands, words: arena.take(count, &spec.name, device)?, numbers, scaling, chunk })
    }

    /// Room for int8.
    pub(super) fn of_int8(
        spec: &MatrixSpec,
        groups: usize,
        arena: &mut Arena,
        device: &str,
    ) -> Result<Self, KernelError> {
        Self::zeroed(spec, Numbers::Bytes, Scaling::Groups(spec.inputs / BLOCK / groups), arena, device)
    }

    /// Packs an expert's rows of int8, filled up to whole bands, with scales `[outputs, groups]`.
    pub(super) fn pack_int8(
        &mut self,
        expert: usize,
        rows: &[i8],
        scales: &[f32],
        groups: usize,
        packing: Packing,
        threads: &Threads,
    ) {
        let (chunk, stream, bands) = (self.chunk, self.stream(), self.bands);
        let words = &mut self.words[expert * bands * stream..][..bands * stream];
        let bands = rows.chunks(rows.len() / bands).zip(scales.chunks(LANES * groups)).zip(words.chunks_mut(stream));
        threads.each(bands.collect(), rows.len(), |((rows, scales), words)| {
            let flip = 0x80 ^ packing.flip;
            let rows: Vec<u8> = bytemuck::cast_slice::<i8, u8>(rows).iter().map(|byte| byte ^ flip).collect();
            let mut band = Band { chunk, parts: packing.parts, words };
            band.interleave(&rows);
            for (lane, scales) in scales.chunks(groups).enumerate() {
                for (group, scale) in scales.iter().enumerate() {
                    band.set(chunk.end_of(group * chunk.blocks), 0, lane, scale.to_le_bytes());
                }
            }
        });
    }

    /// Reads and packs blocks; `None` when this format or shape is not packed.
    pub(super) fn load(
        source: &dyn MatrixSource,
        kind: BlockType,
        packing: Packing,
        threads: &Threads,
        arena: &mut Arena,
        device: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Self>, KernelError> {
        let spec @ &MatrixSpec { inputs, outputs, experts, format, .. } = source.spec();
        let (Some(plan), Some(row_bytes)) = (Plan::of(kind), format.row_bytes(inputs)) else {
            return Ok(None);
        };
        let mut packed = Self::zeroed(spec, plan.numbers, plan.scaling(), arena, device)?;
        let (chunk, stream, bands) = (packed.chunk, packed.stream(), packed.bands);
        let at_once = (PIECE_BYTES / (LANES * row_bytes)).max(1);
        let mut stored = Vec::new();
        for expert in 0..experts {
            for first in (0..bands).step_by(at_once) {
                let count = at_once.min(bands - first);
                let rows = first * LANES..((first + count) * LANES).min(outputs);
                stored.resize(rows.len() * row_bytes, 0);
                source.read(((expert * outputs + rows.start) * row_bytes) as u64, &mut stored)?;
                let words = &mut packed.words[(expert * bands + first) * stream..][..count * stream];
                let bands = stored.chunks(LANES * row_bytes).zip(words.chunks_mut(stream)).collect();
                threads.each(bands, stored.len(), |(stored, words)| {
                    let mut band = Band { chunk, parts: packing.parts, words };
                    band.pack(stored, kind, plan, packing, row_bytes);
                });
                progress(stored.len() as u64);
            }
        }
        Ok(Some(packed))
    }

    /// Words of a column.
    pub(super) fn stream(&self) -> usize {
        self.chunk.stream(self.blocks)
    }
}

/// A band that is being written: its columns, one after the other.
struct Band<'a> {
    chunk: Chunk,
    parts: usize,
    words: &'a mut [Word],
}

impl Band<'_> {
    /// Words `first..first + count` of a column's stream.
    fn part_of(&mut self, part: usize, first: usize, count: usize) -> &mut [u8] {
        let (stream, a_word) = (self.words.len(), size_of::<Word>() / self.parts);
        &mut bytemuck::cast_slice_mut(self.words)[(part * stream + first) * a_word..][..count * a_word]
    }

    /// Writes a scale of output `lane` to row `row` of a word.
    fn set<const N: usize>(&mut self, word: usize, row: usize, lane: usize, value: [u8; N]) {
        let lanes = LANES / self.parts;
        self.part_of(lane / lanes, word, 1)[(row * lanes + lane % lanes) * N..][..N].copy_from_slice(&value);
    }

    /// Writes a scale of six bits of output `lane` as row `row` of the four words that [`SIXES`] words from `word` on stand for.
    fn set_six(&mut self, word: usize, row: usize, lane: usize, value: u8) {
        debug_assert!(value < 64, "{value} has more than six bits");
        let lanes = LANES / self.parts;
        let place = row % 4 * lanes + lane % lanes;
        for (index, word) in self.part_of(lane / lanes, word, SIXES).chunks_mut(4 * lanes).enumerate() {
            if row / 4 == SIXES {
                word[place] = word[place] & 0x3f | value >> (2 * index) << 6;
            } else if row / 4 == index {
                word[place] = word[place] & 0xc0 | value;
            }
        }
    }

    /// Packs up to sixteen stored rows.
    fn pack(&mut self, stored: &[u8], kind: BlockType, plan: Plan, packing: Packing, row_bytes: usize) {
        let (Plan { numbers, minima, parts }, chunk) = (plan, self.chunk);
        let count = row_bytes / kind.bytes();
        let a_block = kind.weights() / BLOCK;
        // Weights of the band, row after row.
        let mut rows = vec![0; LANES * count * kind.weights()];
        let stored = stored.chunks(row_bytes).zip(rows.chunks_mut(count * kind.weights()));
        for (lane, (stored, row)) in stored.enumerate() {
            for (index, (block, weights)) in stored.chunks(kind.bytes()).zip(row.chunks_mut(kind.weights())).enumerate()
            {
                // A format with a plan can be unpacked.
                let Ok(unpacked) = kind.unpack(block, weights) else { continue };
                let (first, kinds) = (index * a_block, if minima { 2 } else { 1 });
                let (word, row) = match parts {
                    0 => (chunk.unit_of(first), first % chunk.unit * kinds),
                    _ => (chunk.end_of(first), 0),
                };
                self.set(word, row, lane, unpacked.d.to_le_bytes());
                if minima {
                    self.set(word, row + 1, lane, unpacked.m.to_le_bytes());
                }
                for block in 0..if parts == 0 { 0 } else { SUPER } {
                    let (word, row) = (chunk.unit_of(first + block), block % chunk.unit * parts * kinds);
                    if minima && parts == 1 {
                        self.set_six(word, row, lane, unpacked.scales[2 * block] as u8);
                        self.set_six(word, row + 1, lane, unpacked.minima[2 * block]);
                        continue;
                    }
                    for part in 0..parts {
                        self.set(word, row + part, lane, [unpacked.scales[2 * block + part] as u8]);
                        if minima {
                            self.set(word, row + parts + part, lane, [unpacked.minima[2 * block + part]]);
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
                self.interleave(&rows);
            }
            Numbers::Nibbles | Numbers::Codes => {
                self.interleave_parts(&rows, |block, k| {
                    [0, 1, 2, 3].map(|j| block[4 * k + j] | block[BLOCK / 2 + 4 * k + j] << 4)
                });
            }
            Numbers::Quarters => {
                self.interleave_parts(&rows, |block, half| {
                    let quads = &block[BLOCK / 2 * half..][..BLOCK / 2];
                    [0, 1, 2, 3].map(|j| (0..4).fold(0, |byte, k| byte | quads[4 * k + j] << (2 * k)))
                });
            }
        }
    }

    /// Writes sixteen rows of bytes: word `k` of a block has inputs `4 k..4 k + 4` of each of a column's rows.
    fn interleave(&mut self, rows: &[u8]) {
        self.interleave_parts(rows, |block, k| block.as_chunks::<4>().0[k]);
    }

    /// Writes sixteen rows of parts of bytes, of which `quad` makes those of a block for an output in word `k`.
    fn interleave_parts(&mut self, rows: &[u8], quad: impl Fn(&[u8; BLOCK], usize) -> [u8; 4]) {
        let (inputs, lanes, chunk) = (rows.len() / LANES, LANES / self.parts, self.chunk);
        for (part, rows) in rows.chunks(lanes * inputs).enumerate() {
            for block in 0..inputs / BLOCK {
                let words = self.part_of(part, chunk.numbers_of(block), chunk.numbers);
                for (lane, row) in rows.chunks(inputs).enumerate() {
                    let numbers = &row.as_chunks::<BLOCK>().0[block];
                    for (k, word) in words.chunks_mut(4 * lanes).enumerate() {
                        word[4 * lane..4 * lane + 4].copy_from_slice(&quad(numbers, k));
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
                Packed::load(&matrix, kind, Isa::best().packing(), &threads, &mut Arena::default(), "cpu", &mut |_| ())
                    .unwrap()
            else {
                assert_eq!(held_bytes(&matrix.spec, kind), matrix.spec.weight_bytes());
                continue;
            };
            let taken = size_of_val(&*packed.words);
            assert_eq!(held_bytes(&matrix.spec, kind), taken as u64, "{kind:?}");
        }
    }
}

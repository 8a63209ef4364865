//! Quantised weights laid out for products with 8-bit inputs: sixteen outputs side by side, four inputs a register.
//!
//! A band is sixteen outputs of one expert, and a column the part of them that fills a register ([`Packing`]). A column lies as one
//! stream, block of 32 inputs after block, so that a product reads memory forward and nothing twice. The numbers are those of the file, rearranged; what the scales of a format mean is in [`Scaling`].
//! Formats that are not laid out here (F16, BF16, Q4_1, Q5_1, Q2_K) stay as stored and are multiplied exactly.

use grokpipe_model::{BlockType, MatrixSource, MatrixSpec};

use super::{
    memory::{product, zeroed},
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

/// What a weight is worth. Stored weights `q` are unsigned: too large by 128, with nibbles by 8, with minima by nothing.
pub(super) enum Scaling {
    /// `q * scale`: an f32 for all blocks of a group, `[bands, groups]`.
    Groups { scales: Vec<[f32; LANES]>, blocks: usize },
    /// `q * d`: a half a block, `[bands, blocks]`.
    Blocks(Vec<Halves>),
    /// `q * d * s - m * t`: halves `d` and `m` for eight blocks, bytes `s` and `t` a block.
    Minima { halves: Vec<[Halves; 2]>, bytes: Vec<[[u8; LANES]; 2]> },
    /// `q * d * s`: a half `d` for eight blocks, signed bytes `s` for each half of a block.
    Sixteens { halves: Vec<Halves>, bytes: Vec<[[i8; LANES]; 2]> },
}

/// A packed matrix, or one an expert.
pub(crate) struct Packed {
    /// Blocks of a row of inputs.
    pub(super) blocks: usize,
    /// Bands of an expert.
    pub(super) bands: usize,
    /// `[experts, bands, parts, blocks, 8]`, or 4 where a byte holds two weights, each four weights of every output of a part.
    pub(super) words: Vec<Word>,
    /// Two weights a byte: the low halves are inputs 0 to 15 of a block.
    pub(super) nibbles: bool,
    pub(super) scaling: Scaling,
}

/// Whether a format that can be packed has two weights a byte.
fn has_nibbles(kind: BlockType) -> Option<bool> {
    match kind {
        BlockType::Q4_0 | BlockType::Q4K => Some(true),
        BlockType::Q8_0 | BlockType::Q5_0 | BlockType::Iq4Nl => Some(false),
        BlockType::Q5K | BlockType::Q6K | BlockType::Q3K | BlockType::Iq4Xs => Some(false),
        BlockType::F16 | BlockType::Bf16 | BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q2K => None,
    }
}

/// Bytes that a matrix of such blocks takes in memory, packed if it can be.
pub(super) fn held_bytes(spec: &MatrixSpec, kind: BlockType) -> u64 {
    let Some(nibbles) = has_nibbles(kind) else { return spec.weight_bytes() };
    let weights = if nibbles { BLOCK / 2 } else { BLOCK };
    // Of eight blocks: a half each; or one or two for all of them, and two bytes each.
    let scales = match kind {
        BlockType::Q4K | BlockType::Q5K => 4 + 2 * SUPER,
        _ if kind.weights() == BLOCK => 2 * SUPER,
        _ => 2 + 2 * SUPER,
    };
    let rows = (spec.experts * spec.outputs.next_multiple_of(LANES)) as u64;
    rows * (spec.inputs as u64 / BLOCK as u64) * (SUPER * weights + scales) as u64 / SUPER as u64
}

impl Packed {
    /// Packs int8 rows that lie output by output, each expert filled up to whole bands, with scales `[experts, outputs, groups]`.
    /// The words are rearranged in place.
    pub(super) fn of_int8(
        spec: &MatrixSpec,
        mut words: Vec<Word>,
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
        Self { blocks, bands, words, nibbles: false, scaling }
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
        let (Some(nibbles), Some(row_bytes)) = (has_nibbles(kind), format.row_bytes(inputs)) else {
            return Ok(None);
        };
        let (blocks, bands) = (inputs / BLOCK, outputs.div_ceil(LANES));
        let per_block = if nibbles { 4 } else { 8 };
        let count = product(&[experts, bands, blocks, per_block], name, device)?;
        let mut words: Vec<Word> = zeroed(count, name, device)?;
        let scale_blocks = experts * bands * blocks;
        let mut scaling = match kind.weights() {
            BLOCK => Scaling::Blocks(zeroed(scale_blocks, name, device)?),
            _ if matches!(kind, BlockType::Q4K | BlockType::Q5K) => Scaling::Minima {
                halves: zeroed(scale_blocks / SUPER, name, device)?,
                bytes: zeroed(scale_blocks, name, device)?,
            },
            _ => Scaling::Sixteens {
                halves: zeroed(scale_blocks / SUPER, name, device)?,
                bytes: zeroed(scale_blocks, name, device)?,
            },
        };
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
                let parts: Vec<_> = stored
                    .chunks(LANES * row_bytes)
                    .zip(words.chunks_mut(blocks * per_block))
                    .zip(scaling.bands_mut(band..band + count, blocks))
                    .collect();
                threads.each(parts, stored.len(), |((stored, words), mut scales)| {
                    pack_band(kind, packing, stored, row_bytes, words, &mut scales);
                });
                progress(stored.len() as u64);
            }
        }
        Ok(Some(Self { blocks, bands, words, nibbles, scaling }))
    }
}

/// The scales of one band.
enum BandScales<'a> {
    Blocks(&'a mut [Halves]),
    Minima(&'a mut [[Halves; 2]], &'a mut [[[u8; LANES]; 2]]),
    Sixteens(&'a mut [Halves], &'a mut [[[i8; LANES]; 2]]),
}

impl Scaling {
    /// The scales of each of these bands.
    fn bands_mut(&mut self, bands: std::ops::Range<usize>, blocks: usize) -> Vec<BandScales<'_>> {
        let all = bands.start * blocks..bands.end * blocks;
        let supers = bands.start * (blocks / SUPER)..bands.end * (blocks / SUPER);
        let a_band = (blocks / SUPER).max(1);
        match self {
            Self::Groups { .. } => Vec::new(),
            Self::Blocks(halves) => halves[all].chunks_mut(blocks).map(BandScales::Blocks).collect(),
            Self::Minima { halves, bytes } => {
                let halves = halves[supers].chunks_mut(a_band);
                halves.zip(bytes[all].chunks_mut(blocks)).map(|(h, b)| BandScales::Minima(h, b)).collect()
            }
            Self::Sixteens { halves, bytes } => {
                let halves = halves[supers].chunks_mut(a_band);
                halves.zip(bytes[all].chunks_mut(blocks)).map(|(h, b)| BandScales::Sixteens(h, b)).collect()
            }
        }
    }
}

/// Packs up to sixteen stored rows.
fn pack_band(
    kind: BlockType,
    packing: Packing,
    stored: &[u8],
    row_bytes: usize,
    words: &mut [Word],
    scales: &mut BandScales<'_>,
) {
    let count = row_bytes / kind.bytes();
    // Weights of the band, row after row.
    let mut rows = vec![0; LANES * count * kind.weights()];
    for (lane, (stored, row)) in stored.chunks(row_bytes).zip(rows.chunks_mut(count * kind.weights())).enumerate() {
        for (index, (block, weights)) in stored.chunks(kind.bytes()).zip(row.chunks_mut(kind.weights())).enumerate() {
            let Ok(unpacked) = kind.unpack(block, weights) else { continue };
            match scales {
                BandScales::Blocks(halves) => halves[index][lane] = unpacked.d,
                BandScales::Minima(halves, bytes) => {
                    (halves[index][0][lane], halves[index][1][lane]) = (unpacked.d, unpacked.m);
                    for (block, bytes) in bytes[index * SUPER..][..SUPER].iter_mut().enumerate() {
                        (bytes[0][lane], bytes[1][lane]) = (unpacked.scales[2 * block] as u8, unpacked.minima[block]);
                    }
                }
                BandScales::Sixteens(halves, bytes) => {
                    halves[index][lane] = unpacked.d;
                    for (block, bytes) in bytes[index * SUPER..][..SUPER].iter_mut().enumerate() {
                        (bytes[0][lane], bytes[1][lane]) = (unpacked.scales[2 * block], unpacked.scales[2 * block + 1]);
                    }
                }
            }
        }
    }
    if size_of_val(words) != rows.len() {
        return interleave_nibbles(&rows, packing.parts, words);
    }
    // Weights beside a minimum are not too large.
    if !matches!(scales, BandScales::Minima(..)) {
        rows.iter_mut().for_each(|weight| *weight ^= packing.flip);
    }
    interleave(&rows, packing.parts, words);
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

/// Sixteen rows of bytes below 16 to words of two weights a byte.
fn interleave_nibbles(rows: &[u8], parts: usize, words: &mut [Word]) {
    let (inputs, lanes) = (rows.len() / LANES, LANES / parts);
    let words: &mut [u8] = bytemuck::cast_slice_mut(words);
    for (rows, words) in rows.chunks(lanes * inputs).zip(words.chunks_mut(lanes * inputs / 2)) {
        for (lane, row) in rows.chunks(inputs).enumerate() {
            for (words, block) in words.chunks_mut(4 * 4 * lanes).zip(row.as_chunks::<BLOCK>().0) {
                for (k, word) in words.chunks_mut(4 * lanes).enumerate() {
                    for j in 0..4 {
                        word[4 * lane + j] = block[4 * k + j] | block[BLOCK / 2 + 4 * k + j] << 4;
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
                Scaling::Blocks(halves) => size_of_val(halves.as_slice()),
                Scaling::Minima { halves, bytes } => size_of_val(halves.as_slice()) + size_of_val(bytes.as_slice()),
                Scaling::Sixteens { halves, bytes } => size_of_val(halves.as_slice()) + size_of_val(bytes.as_slice()),
            };
            let taken = size_of_val(packed.words.as_slice()) + scales;
            assert_eq!(held_bytes(&matrix.spec, kind), taken as u64, "{kind:?}");
        }
    }
}

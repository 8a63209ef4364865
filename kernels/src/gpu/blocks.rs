//! Columns of a matrix as the device holds them: chunks of numbers, and words of scales.
//!
//! Numbers of a group begin with a chunk; the last one is filled with zeros. What the bits of a file's block mean says `blocks.rs`
//! of the model; here they are only put into other places, and no number is rounded.

use grokpipe_model::{BlockType, Format};

use super::format::{CHUNK_BYTES, Held, Numbers, Scales, words_of_super};

/// A block of a file, taken apart: `d * scales * (q - offset) - m * minima`, as [`BlockType::unpack`] has it.
struct Parts {
    /// Halves.
    d: u16,
    m: u16,
    /// Of each part of a super-block.
    scales: [i8; 16],
    minima: [i8; 16],
}

/// Chunks and words of scales of one stored column; both begin as zeros. Scales of int8 lie elsewhere and are not written.
pub(super) fn pack_column(
    format: Format,
    held: Held,
    stored: &[u8],
    groups: usize,
    chunks: &mut [u8],
    words: &mut [u32],
) {
    match (format, held.scales) {
        (Format::Blocks(kind), Scales::Halves { .. } | Scales::Supers { .. }) => {
            pack_blocks(kind, held, stored, chunks, words);
        }
        // Floats and int8 are held as they are stored.
        _ => {
            let group = stored.len() / groups;
            for (stored, chunks) in stored.chunks(group).zip(chunks.chunks_mut(group.next_multiple_of(CHUNK_BYTES))) {
                chunks[..group].copy_from_slice(stored);
            }
        }
    }
}

fn pack_blocks(kind: BlockType, held: Held, stored: &[u8], chunks: &mut [u8], words: &mut [u32]) {
    let is_nibbles = held.numbers.in_a_chunk() == 32;
    let mut numbers = vec![0; kind.weights()];
    let chunk_bytes = kind.weights() / if is_nibbles { 2 } else { 1 };
    for (index, (block, chunks)) in stored.chunks(kind.bytes()).zip(chunks.chunks_mut(chunk_bytes)).enumerate() {
        let parts = take_apart(kind, held, block, &mut numbers);
        if is_nibbles {
            pack_nibbles(&numbers, chunks)
        } else {
            chunks.copy_from_slice(&numbers)
        }
        match held.scales {
            Scales::None | Scales::Groups => {}
            Scales::Halves { minima: false } => words[index / 2] |= u32::from(parts.d) << (16 * (index % 2)),
            Scales::Halves { minima: true } => words[index] = u32::from(parts.d) | u32::from(parts.m) << 16,
            Scales::Supers { groups, minima } => {
                let size = words_of_super(groups, minima);
                let words = &mut words[index * size..][..size];
                words[0] = u32::from(parts.d) | u32::from(parts.m) << 16;
                let bytes = parts.scales[..groups].iter().chain(&parts.minima[..groups]);
                for (place, byte) in bytes.take(4 * (size - 1)).enumerate() {
                    words[1 + place / 4] |= u32::from(*byte as u8) << (8 * (place % 4));
                }
            }
        }
    }
}

/// Word `j` of a chunk has inputs `8 j..8 j + 4` in the low halves of its bytes, and the next four in the high ones.
fn pack_nibbles(numbers: &[u8], chunks: &mut [u8]) {
    for (eight, word) in numbers.as_chunks::<8>().0.iter().zip(chunks.as_chunks_mut::<4>().0) {
        for (i, byte) in word.iter_mut().enumerate() {
            *byte = eight[i] | eight[i + 4] << 4;
        }
    }
}

/// Numbers of a block as `held` says, a byte each, and its scales.
fn take_apart(kind: BlockType, held: Held, block: &[u8], numbers: &mut [u8]) -> Parts {
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let mut parts = Parts { d: half(0), m: 0, scales: [0; 16], minima: [0; 16] };
    match kind {
        BlockType::Q4_1 | BlockType::Q5_1 => {
            // The minimum of these is added, not taken.
            parts.m = half(2) ^ 0x8000;
            let (high, low) =
                if kind == BlockType::Q5_1 { (&block[4..8], &block[8..]) } else { (&[][..], &block[4..]) };
            split_nibbles(low, numbers);
            for (i, number) in numbers.iter_mut().enumerate() {
                *number |= high.get(i / 8).map_or(0, |byte| (byte >> (i % 8) & 1) << 4);
            }
        }
        BlockType::Q2K => {
            (parts.d, parts.m) = (half(80), half(82));
            for (i, numbers) in numbers.chunks_mut(16).enumerate() {
                let (half, j, g) = (i / 8, i / 2 % 4, i % 2);
                (parts.scales[i], parts.minima[i]) = ((block[i] & 15) as i8, (block[i] >> 4) as i8);
                for (number, byte) in numbers.iter_mut().zip(&block[16 + 32 * half + 16 * g..]) {
                    *number = byte >> (2 * j) & 3;
                }
            }
        }
        _ => {
            // The formats that are left have such a form, F16 and BF16 are no blocks: this cannot fail.
            let Ok(unpacked) = kind.unpack(block, numbers) else { return parts };
            (parts.d, parts.m, parts.scales) = (unpacked.d, unpacked.m, unpacked.scales);
            if matches!(held.scales, Scales::Supers { groups: 8, .. }) {
                // Both halves of such a part have the same scale.
                parts.scales = std::array::from_fn(|i| if i < 8 { unpacked.scales[2 * i] } else { 0 });
            }
            for (minimum, stored) in parts.minima.iter_mut().zip(unpacked.minima) {
                *minimum = stored as i8;
            }
            let offset = match kind {
                BlockType::Q4_0 => 8,
                BlockType::Q4K | BlockType::Q5K => 0,
                _ => 128,
            };
            match held.numbers {
                Numbers::Codes => match kind {
                    BlockType::Iq4Nl => split_nibbles(&block[2..], numbers),
                    _ => block[8..].chunks(16).zip(numbers.chunks_mut(32)).for_each(|(b, n)| split_nibbles(b, n)),
                },
                Numbers::Nibbles { offset: wanted } => {
                    numbers.iter_mut().for_each(|number| *number = number.wrapping_sub(offset).wrapping_add(wanted));
                }
                _ => numbers.iter_mut().for_each(|number| *number = number.wrapping_sub(offset)),
            }
        }
    }
    parts
}

/// Low halves of bytes are the first half of the numbers, high ones the second.
fn split_nibbles(bytes: &[u8], numbers: &mut [u8]) {
    for (j, byte) in bytes.iter().enumerate() {
        (numbers[j], numbers[j + bytes.len()]) = (byte & 15, byte >> 4);
    }
}

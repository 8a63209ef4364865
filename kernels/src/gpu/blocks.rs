//! Columns of a matrix as the device holds them: chunks of numbers, and words of scales.
//!
//! Numbers of a group begin with a chunk; the last one is filled with zeros. What the bits of a file's block mean says `blocks.rs`
//! of the model; here they are only put into other places, and no number is rounded.

use grokpipe_model::{BlockType, Codes, Format};

use super::format::{CHUNK_BYTES, Held, Numbers, Scales, words_of_super};

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
    // Held codes are those of the file; other numbers are put where the device's offset wants them.
    let moved = match (kind.codes(), held.numbers) {
        (Some(Codes::Offset(offset)), Numbers::Nibbles { offset: wanted }) => wanted.wrapping_sub(offset),
        (Some(Codes::Offset(offset)), _) => 0u8.wrapping_sub(offset),
        _ => 0,
    };
    let chunk_bytes = kind.weights() / if is_nibbles { 2 } else { 1 };
    for (index, (block, chunks)) in stored.chunks(kind.bytes()).zip(chunks.chunks_mut(chunk_bytes)).enumerate() {
        // F16 and BF16 are held as they are stored: what comes here can be unpacked.
        let Ok(unpacked) = kind.unpack(block, &mut numbers) else { return };
        numbers.iter_mut().for_each(|number| *number = number.wrapping_add(moved));
        if is_nibbles {
            pack_nibbles(&numbers, chunks)
        } else {
            chunks.copy_from_slice(&numbers)
        }
        let (d, m) = (u32::from(unpacked.d), u32::from(unpacked.m));
        match held.scales {
            Scales::None | Scales::Groups => {}
            Scales::Halves { minima: false } => words[index / 2] |= d << (16 * (index % 2)),
            Scales::Halves { minima: true } => words[index] = d | m << 16,
            Scales::Supers { groups, minima } => {
                let size = words_of_super(groups, minima);
                let words = &mut words[index * size..][..size];
                words[0] = d | m << 16;
                // Of each sixteen weights, or of each thirty-two: then neighbours are alike.
                let step = unpacked.scales.len() / groups;
                let scales = unpacked.scales.iter().step_by(step).map(|&scale| scale as u8);
                let bytes = scales.chain(unpacked.minima.iter().step_by(step).copied());
                for (place, byte) in bytes.take(4 * (size - 1)).enumerate() {
                    words[1 + place / 4] |= u32::from(byte) << (8 * (place % 4));
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

//! Rows in small pieces: the same bytes, and never more of the source at once than a piece.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::MatrixSpec;

/// A matrix in memory that remembers the longest piece that was read.
struct Memory {
    spec: MatrixSpec,
    bytes: Vec<u8>,
    longest: AtomicUsize,
}

impl Memory {
    fn new(format: Format, layout: Layout) -> Self {
        let spec = MatrixSpec { name: "m".into(), experts: 3, inputs: 96, outputs: 150, format, layout };
        let count = 3 * 96 * 150;
        let words = (0..count).map(|i| ((i * 37 % 1009) as f32 / 500.0 - 1.0).to_le_bytes());
        let bytes = match format {
            Format::F32 => words.flatten().collect(),
            // BF16 is the upper half.
            Format::Blocks(_) => words.flat_map(|word| [word[2], word[3]]).collect(),
            Format::Int8 { .. } => (0..count).map(|i| (i * 37 % 251) as u8).collect(),
        };
        Self { spec, bytes, longest: AtomicUsize::new(0) }
    }
}

impl MatrixSource for Memory {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        self.longest.fetch_max(out.len(), Ordering::Relaxed);
        out.copy_from_slice(&self.bytes[offset as usize..][..out.len()]);
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok((0..self.spec.scale_count()).map(|i| (1 + i % 7) as f32 / 1024.0).collect())
    }
}

#[test]
fn the_size_of_the_pieces_bounds_memory_and_does_not_show_in_the_bytes() {
    let sources = [
        (Format::F32, Layout::InOut),
        (Format::F32, Layout::OutIn),
        (Format::Int8 { groups: 3 }, Layout::InOut),
        (Format::Int8 { groups: 2 }, Layout::InOut),
        (Format::Blocks(BlockType::Bf16), Layout::OutIn),
    ];
    for (format, layout) in sources {
        for target in [Format::Blocks(BlockType::Q8_0), Format::Blocks(BlockType::Bf16), Format::F32] {
            let matrix = Memory::new(format, layout);
            let run = |piece: usize, threads: usize| {
                let (mut bytes, mut longest) = (Vec::new(), 0);
                matrix.longest.store(0, Ordering::Relaxed);
                write_matrix(&matrix, target, threads, piece, &mut |out| {
                    longest = longest.max(out.len());
                    bytes.extend_from_slice(out);
                    Ok(())
                })
                .unwrap();
                (bytes, longest.max(matrix.longest.load(Ordering::Relaxed)))
            };
            let (expected, _) = run(1 << 30, 1);
            assert_eq!(expected.len() as u64, 3 * 150 * target.row_bytes_u64(96).unwrap());
            for piece in [1 << 30, 1 << 16, 10_000, 1000] {
                let (found, longest) = run(piece, 3);
                assert!(found == expected, "{format} to {target} by {piece}");
                assert!(longest <= piece, "{format} to {target}: {longest} at once, not {piece}");
            }
            // Less than a row is never read at once, and less than one is never written.
            assert!(run(1, 1).0 == expected, "{format} to {target}");
        }
    }
}

#[test]
fn a_failing_sink_ends_it() {
    let matrix = Memory::new(Format::F32, Layout::InOut);
    let full = || ModelError::invalid("disk", "room", "none");
    let mut calls = 0;
    let ended = write_matrix(&matrix, Format::F32, 2, 1000, &mut |_| {
        calls += 1;
        Err(full())
    });
    assert!(ended.is_err() && calls == 1);
}

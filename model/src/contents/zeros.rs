//! Zeros where numbers should be. What counts as a hole, the page above says.

use crate::{Layout, MatrixSpec};

/// Zeros from a byte on, so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) length: u64,
}

/// Fewest zeros in a row that count: a page.
const PAGE: usize = 4096;
/// Zeros at either end of a row that may be there by chance.
const CHANCE: u64 = 16;
/// Shortest row that tells whether zeros are whole rows.
const SHORTEST_ROW: u64 = 16 * CHANCE;
/// Most runs that are remembered.
const MOST_RUNS: usize = 4096;

/// Finds runs of zeros in a stream of bytes, of which it looks at one in a page where there are none.
#[derive(Default)]
pub(super) struct Zeros {
    at: u64,
    /// Zeros right before `at`.
    run: u64,
    runs: Vec<Run>,
}

impl Zeros {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let mut i = 0;
        while i < bytes.len() {
            if self.run > 0 {
                let zeros = bytes[i..].iter().position(|byte| *byte != 0).unwrap_or(bytes.len() - i);
                self.run += zeros as u64;
                i += zeros;
                if i < bytes.len() {
                    self.end(self.at + i as u64);
                }
                continue;
            }
            // Every page of zeros that begins from here on covers the last byte of this window, or begins behind it.
            let window = PAGE.min(bytes.len() - i);
            let zeros = bytes[i..i + window].iter().rev().position(|byte| *byte != 0).unwrap_or(window);
            self.run = zeros as u64;
            i += window;
        }
        self.at += bytes.len() as u64;
    }

    /// A run has ended before this byte.
    fn end(&mut self, end: u64) {
        if self.run >= PAGE as u64 && self.runs.len() < MOST_RUNS {
            self.runs.push(Run { start: end - self.run, length: self.run });
        }
        self.run = 0;
    }

    /// Runs that are not whole rows of this matrix, which was added to its end.
    pub(super) fn holes(&self, spec: &MatrixSpec) -> impl Iterator<Item = Run> {
        let total = spec.weight_bytes();
        let rows = match spec.layout {
            Layout::InOut => spec.experts * spec.inputs,
            Layout::OutIn => spec.experts * spec.outputs,
        };
        let row = total / (rows as u64).max(1);
        let last = Some(Run { start: self.at - self.run, length: self.run }).filter(|run| run.length >= PAGE as u64);
        self.runs.iter().copied().chain(last).filter(move |run| !is_whole_rows(*run, row, total))
    }
}

fn is_whole_rows(Run { start, length }: Run, row: u64, total: u64) -> bool {
    if length == total {
        return true;
    }
    if row < SHORTEST_ROW {
        return false;
    }
    let (first, last) = (start.next_multiple_of(row), (start + length) / row * row);
    first < last && first - start <= CHANCE && start + length - last <= CHANCE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockType, Format};

    fn spec(inputs: usize, outputs: usize, format: Format, layout: Layout) -> MatrixSpec {
        MatrixSpec { name: "m".into(), experts: 2, inputs, outputs, format, layout }
    }

    fn holes(bytes: &[u8], spec: &MatrixSpec, piece: usize) -> Vec<Run> {
        let mut zeros = Zeros::default();
        bytes.chunks(piece).for_each(|bytes| zeros.add(bytes));
        zeros.holes(spec).collect()
    }

    /// Two experts of 40 inputs and 6000 outputs, one byte each: rows of 6000.
    const ROW: usize = 6000;

    #[test]
    fn a_page_of_zeros_that_is_no_whole_row_is_a_hole_wherever_it_lies_and_however_it_is_read() {
        let int8 = spec(40, ROW, Format::Int8 { groups: 1 }, Layout::InOut);
        let total = 80 * ROW;
        // Where, how many, and whether it is a hole.
        let cases = [
            (0, 4095, false),
            (0, 4096, true),
            (1, 4096, true),
            (8192, 32768, true),
            (8191, 4097, true),
            (total - 4096, 4096, true),
            (total - 4095, 4095, false),
            (ROW, ROW, false),
            (0, ROW, false),
            (3 * ROW, 9 * ROW, false),
            (3 * ROW, 9 * ROW + 17, true),
            (3 * ROW - 17, 9 * ROW, true),
            // What is zero by chance beside a row that is.
            (3 * ROW - 16, ROW + 32, false),
            (40 * ROW, 40 * ROW, false),
            (0, total, false),
        ];
        for (start, length, is_hole) in cases {
            let mut bytes = vec![7_u8; total];
            bytes[start..start + length].fill(0);
            let expected: Vec<Run> =
                is_hole.then_some(Run { start: start as u64, length: length as u64 }).into_iter().collect();
            for piece in [1, 100, 4095, 4096, 4097, 65_536, total] {
                assert_eq!(holes(&bytes, &int8, piece), expected, "{length} from {start}, {piece} bytes at a time");
            }
        }
    }

    #[test]
    fn short_rows_explain_nothing_unless_all_is_zero() {
        let router = spec(8192, 8, Format::F32, Layout::InOut);
        let mut bytes = vec![1_u8; router.weight_bytes() as usize];
        bytes[320..320 + 8000].fill(0);
        assert_eq!(holes(&bytes, &router, 9999), [Run { start: 320, length: 8000 }]);
        bytes.fill(0);
        assert_eq!(holes(&bytes, &router, 9999), []);
    }

    #[test]
    fn rows_of_blocks_are_rows() {
        // 544 bytes a row.
        let blocks = spec(512, 100, Format::Blocks(BlockType::Q8_0), Layout::OutIn);
        let mut bytes = vec![1_u8; blocks.weight_bytes() as usize];
        bytes[544 * 3..544 * 13].fill(0);
        assert_eq!(holes(&bytes, &blocks, 1 << 20), []);
        bytes[544 * 13..544 * 13 + 200].fill(0);
        assert_eq!(holes(&bytes, &blocks, 1 << 20).len(), 1);
    }
}

//! Rows grouped by the experts they chose, so that a chosen expert's weights are read once a step, whatever the rows.

use std::ops::Range;

use super::{
    matrix::CpuMatrix,
    simd::{Isa, Kernel, Simd},
    threads::{Stretch, Threads},
};

/// The pairs (row, choice) of each expert that anybody chose, experts ascending, pairs ascending. A matrix without experts is one that
/// every row chose.
pub(super) struct Groups {
    /// Expert and its place in `pairs`.
    pub(super) experts: Vec<(usize, Range<usize>)>,
    /// `row * chosen + j`, expert by expert.
    pub(super) pairs: Vec<usize>,
}

impl Groups {
    /// So many rows and no choice.
    pub(super) fn all(rows: usize) -> Self {
        Self { experts: vec![(0, 0..rows)], pairs: (0..rows).collect() }
    }

    /// Groups `ids`, `[rows, chosen]`.
    pub(super) fn new(ids: &[u32], num_experts: usize) -> Self {
        let mut pairs: Vec<usize> = (0..ids.len()).collect();
        pairs.sort_by_key(|&pair| ids[pair]);
        let mut experts = Vec::new();
        let mut start = 0;
        for chunk in pairs.chunk_by(|&a, &b| ids[a] == ids[b]) {
            let expert = ids[chunk[0]] as usize;
            assert!(expert < num_experts, "expert {expert} was chosen of {num_experts}");
            experts.push((expert, start..start + chunk.len()));
            start += chunk.len();
        }
        Self { experts, pairs }
    }

    /// The experts' products with a matrix each, in order.
    pub(super) fn products<'a>(&self, matrix: &'a CpuMatrix) -> Vec<(&'a CpuMatrix, usize)> {
        self.experts.iter().map(|(expert, _)| (matrix, *expert)).collect()
    }

    /// Cuts results, `[pairs, outputs]`, into pieces of `step` outputs of all pairs of an expert: the slices of the first piece, a pair
    /// each, then those of the next, experts ascending.
    pub(super) fn cut<'a>(&self, outputs: usize, step: usize, results: &'a mut [f32]) -> Vec<&'a mut [f32]> {
        let mut rows: Vec<_> = results.chunks_mut(outputs).map(|row| row.chunks_mut(step)).collect();
        let mut slices = Vec::with_capacity(rows.len() * outputs.div_ceil(step));
        for (_, range) in &self.experts {
            for _ in 0..outputs.div_ceil(step) {
                slices.extend(self.pairs[range.clone()].iter().filter_map(|&pair| rows[pair].next()));
            }
        }
        slices
    }

    /// The pieces of results that were cut.
    pub(super) fn pieces<'s, 'a>(
        &self,
        outputs: usize,
        step: usize,
        mut slices: &'s mut [&'a mut [f32]],
    ) -> Vec<Piece<'s, 'a>> {
        let mut pieces = Vec::with_capacity(self.experts.len() * outputs.div_ceil(step));
        for (expert, pairs) in &self.experts {
            for start in (0..outputs).step_by(step) {
                let (out, rest) = slices.split_at_mut(pairs.len());
                slices = rest;
                let outputs = start..(start + step).min(outputs);
                pieces.push(Piece { expert: *expert, pairs: pairs.clone(), outputs, out });
            }
        }
        pieces
    }
}

/// A part of an expert's product: some outputs of all its pairs.
pub(super) struct Piece<'s, 'a> {
    pub(super) expert: usize,
    /// Place of the expert's pairs in [`Groups::pairs`].
    pub(super) pairs: Range<usize>,
    pub(super) outputs: Range<usize>,
    /// A slice for each pair, an output each.
    pub(super) out: &'s mut [&'a mut [f32]],
}

impl Piece<'_, '_> {
    /// Its part of its expert's matrix.
    pub(super) fn weights(&self, matrix: &CpuMatrix) -> Stretch {
        matrix.bytes_from(self.expert, self.outputs.start).into()
    }
}

/// The weights that each thread begins with in products of these experts' matrices, one after the other in pieces of
/// `step` outputs.
pub(super) fn first_weights(products: &[(&CpuMatrix, usize)], step: usize, threads: &Threads) -> Vec<Stretch> {
    let pieces = |matrix: &CpuMatrix| matrix.outputs.div_ceil(step);
    let all = products.iter().map(|(matrix, _)| pieces(matrix)).sum();
    let first = |thread| {
        let mut index = threads.first_piece(thread, all);
        for (matrix, expert) in products {
            if index < pieces(matrix) {
                return matrix.bytes_from(*expert, index * step).into();
            }
            index -= pieces(matrix);
        }
        Stretch::default()
    };
    (0..threads.count()).map(first).collect()
}

/// `gate[i] = gelu(gate[i]) * up[i]`, slice by slice.
pub(super) struct Gelu<'s, 'a> {
    pub(super) gate: &'s mut [&'a mut [f32]],
    pub(super) up: &'s [&'a mut [f32]],
}

impl Kernel for Gelu<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            for (gate, up) in gate.iter_mut().zip(up.iter()) {
                *gate = super::math::gelu(*gate) * up;
            }
        }
    }
}

/// The sum of a row's experts' results, each times its probability, best expert first.
pub(super) struct Combine<'a> {
    /// `[chosen, outputs]`.
    pub(super) results: &'a [f32],
    pub(super) probabilities: &'a [f32],
    /// `[outputs]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        self.out.fill(0.0);
        for (results, p) in self.results.chunks_exact(self.out.len()).zip(self.probabilities) {
            for (sum, value) in self.out.iter_mut().zip(results) {
                *sum += p * value;
            }
        }
    }
}

/// Softmax of one row's router logits in place, and its largest entries: first the largest, on a tie the lower index.
pub(super) struct Choose<'a> {
    pub(super) logits: &'a mut [f32],
    pub(super) ids: &'a mut [u32],
    pub(super) probabilities: &'a mut [f32],
}

impl Choose<'_> {
    /// Chooses `ids.len()` experts.
    pub(super) fn run_on(self, isa: Isa) {
        isa.run(self);
    }
}

impl Kernel for Choose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let largest = self.logits.iter().copied().fold(f32::NEG_INFINITY, |m, a| if a > m { a } else { m });
        let mut total = 0.0;
        for a in self.logits.iter_mut() {
            *a = super::math::exp(*a - largest);
            total += *a;
        }
        self.logits.iter_mut().for_each(|p| *p /= total);
        for j in 0..self.ids.len() {
            let mut best: Option<usize> = None;
            for e in 0..self.logits.len() {
                let taken = self.ids[..j].contains(&(e as u32));
                if !taken && best.is_none_or(|b| self.logits[e] > self.logits[b]) {
                    best = Some(e);
                }
            }
            let best = best.unwrap_or(0);
            self.ids[j] = best as u32;
            self.probabilities[j] = self.logits[best];
        }
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_model::{Format, Layout};

    use super::{super::memory::Arena, *};
    use crate::ops::testing::{Random, TestMatrix};

    #[test]
    fn every_result_is_in_one_piece() {
        // Six rows' two experts each of five; the third has none.
        let ids = [4, 0, 1, 4, 3, 0, 0, 1, 4, 3, 1, 0];
        let groups = Groups::new(&ids, 5);
        for (outputs, step) in [(5, 2), (6, 3), (4, 7), (1, 1)] {
            let mut results = vec![0.0; ids.len() * outputs];
            let mut slices = groups.cut(outputs, step, &mut results);
            for piece in groups.pieces(outputs, step, &mut slices) {
                let pairs = &groups.pairs[piece.pairs];
                assert_eq!(piece.out.len(), pairs.len());
                for (out, &pair) in piece.out.iter_mut().zip(pairs) {
                    assert_eq!((out.len(), ids[pair] as usize), (piece.outputs.len(), piece.expert));
                    out.iter_mut()
                        .zip(piece.outputs.clone())
                        .for_each(|(out, n)| *out += (1 + pair * outputs + n) as f32);
                }
            }
            let want: Vec<f32> = (1..=results.len()).map(|index| index as f32).collect();
            assert_eq!(results, want, "{outputs} outputs, {step} a piece");
        }
    }

    #[test]
    fn a_thread_is_told_the_weights_that_it_begins_with() {
        let matrix = TestMatrix::random(&mut Random::new(5), (3, 32, 64), Format::F32, Layout::OutIn);
        let threads = Threads::new(4).unwrap();
        let matrix = CpuMatrix::load(&matrix, None, &threads, &mut Arena::default(), "cpu", &mut |_| ()).unwrap();
        // Two experts of four pieces each are eight pieces, two a thread.
        let told = first_weights(&[(&matrix, 0), (&matrix, 2)], 16, &threads);
        let want = [(0, 0), (0, 32), (2, 0), (2, 32)].map(|(expert, output)| matrix.bytes_from(expert, output));
        assert_eq!(told, want.map(Stretch::from));
        assert_eq!(want[1].as_ptr().addr() + want[1].len(), matrix.bytes_from(1, 0).as_ptr().addr());
    }
}

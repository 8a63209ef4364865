//! Rows grouped by the experts they chose, so that a chosen expert's weights are read once a step, whatever the rows.

use std::ops::Range;

use super::{
    matrix::CpuMatrix,
    panels::PanelRow,
    simd::{Isa, Kernel, Simd},
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

    /// Where each pair's results lie in panels with `outputs` of every pair, expert by expert.
    pub(super) fn places(&self, outputs: usize) -> Vec<PanelRow> {
        let mut places = vec![PanelRow::default(); self.pairs.len()];
        for (_, range) in &self.experts {
            for (index, &pair) in self.pairs[range.clone()].iter().enumerate() {
                places[pair] = PanelRow { start: range.start * outputs, rows: range.len(), index };
            }
        }
        places
    }
}

/// A part of an expert's product: some outputs of all its pairs.
pub(super) struct Piece<'a> {
    pub(super) expert: usize,
    /// Place of the expert's pairs in [`Groups::pairs`].
    pub(super) pairs: Range<usize>,
    pub(super) outputs: Range<usize>,
    /// `[pairs, outputs]`.
    pub(super) out: &'a mut [f32],
}

/// Cuts `out`, which holds panels of `step` outputs expert by expert, into pieces for the threads.
pub(super) fn pieces<'a>(groups: &Groups, matrix: &CpuMatrix, step: usize, mut out: &'a mut [f32]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    for (expert, pairs) in &groups.experts {
        for start in (0..matrix.outputs).step_by(step) {
            let outputs = start..(start + step).min(matrix.outputs);
            let (part, rest) = out.split_at_mut(outputs.len() * pairs.len());
            out = rest;
            pieces.push(Piece { expert: *expert, pairs: pairs.clone(), outputs, out: part });
        }
    }
    pieces
}

/// `gate[i] = gelu(gate[i]) * up[i]`.
pub(super) struct Gelu<'a> {
    pub(super) gate: &'a mut [f32],
    pub(super) up: &'a [f32],
}

impl Kernel for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            *gate = super::math::gelu(*gate) * up;
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

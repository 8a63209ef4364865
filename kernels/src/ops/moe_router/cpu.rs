//! References of the choice of experts, and of its grouping by expert.

use super::Params;
use crate::ops::{matmul::cpu::dot, testing::TestMatrix};

/// Ids and probabilities of the chosen experts.
pub(crate) fn route(params: Params, x: &[f32], router: &TestMatrix) -> (Vec<u32>, Vec<f32>) {
    let (mut ids, mut probabilities) = (Vec::new(), Vec::new());
    for row in x.chunks(params.hidden_size as usize) {
        let logits: Vec<f64> = (0..params.num_experts as usize).map(|e| dot(row, router, 0, e)).collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|a| (a - largest).exp()).sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // A stable sort keeps the lower index first on a tie.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        for &expert in &order[..params.num_experts_per_tok as usize] {
            ids.push(expert as u32);
            probabilities.push(((logits[expert] - largest).exp() / total) as f32);
        }
    }
    (ids, probabilities)
}

/// Tiles of an expert and `tile_rows` of its pairs, by ascending experts and pairs; `None` where there is nothing.
pub(crate) fn tiles(ids: &[u32], num_experts: usize, tile_rows: usize) -> Vec<Option<u32>> {
    let mut tiles = Vec::new();
    for expert in 0..num_experts as u32 {
        let pairs: Vec<_> = (0..).zip(ids).filter(|&(_, &id)| id == expert).map(|(pair, _)| Some(pair)).collect();
        for pairs in pairs.chunks(tile_rows) {
            let end = tiles.len() + 1 + tile_rows;
            tiles.push(Some(expert));
            tiles.extend(pairs);
            tiles.resize(end, None);
        }
    }
    tiles.resize((ids.len() / tile_rows + num_experts) * (1 + tile_rows), None);
    tiles
}

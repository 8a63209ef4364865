//! Reference of the matrix product.

use super::Params;
use crate::ops::testing::TestMatrix;

/// `out` of the module's equation, with matrix `expert` of the stack `w`.
pub(crate) fn matmul(params: Params, w: &TestMatrix, expert: usize, x: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for row in x.chunks(params.inputs as usize) {
        for n in 0..params.outputs as usize {
            out.push((f64::from(params.factor) * dot(row, w, expert, n)) as f32);
        }
    }
    out
}

/// `sum_k row[k] * w[expert][k, n]`.
pub(crate) fn dot(row: &[f32], w: &TestMatrix, expert: usize, n: usize) -> f64 {
    let mut sum = 0.0;
    for (k, &v) in row.iter().enumerate() {
        sum += f64::from(v) * w.at(expert, k, n);
    }
    sum
}

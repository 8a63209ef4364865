//! Reference of the second half of an expert.

use super::Params;
use crate::ops::{matmul::cpu::dot, testing::TestMatrix};

/// `out` of the module's equation.
pub(crate) fn expert_down(
    params: Params,
    hidden: &[f32],
    ids: &[u32],
    probabilities: &[f32],
    down: &TestMatrix,
) -> Vec<f32> {
    let (inputs, chosen) = (params.inputs as usize, params.chosen as usize);
    let mut out = Vec::new();
    for t in 0..ids.len() / chosen {
        for n in 0..params.outputs as usize {
            let mut sum = 0.0;
            for j in t * chosen..(t + 1) * chosen {
                let row = &hidden[j * inputs..(j + 1) * inputs];
                sum += f64::from(probabilities[j]) * dot(row, down, ids[j] as usize, n);
            }
            out.push(sum as f32);
        }
    }
    out
}

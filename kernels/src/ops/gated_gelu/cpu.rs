//! Reference of the first half of an expert.

use super::Params;
use crate::ops::{matmul::cpu::dot, testing::TestMatrix};

/// The tanh form of GELU.
pub(crate) fn gelu(g: f64) -> f64 {
    0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g)).tanh())
}

/// `hidden` of the module's equation; `ids` are `[tokens, chosen]`.
pub(crate) fn expert_gate_up(params: Params, x: &[f32], ids: &[u32], gate: &TestMatrix, up: &TestMatrix) -> Vec<f32> {
    let chosen = params.chosen as usize;
    let mut hidden = Vec::new();
    for (t, row) in x.chunks(params.inputs as usize).enumerate() {
        for &expert in &ids[t * chosen..(t + 1) * chosen] {
            for n in 0..params.outputs as usize {
                let g = dot(row, gate, expert as usize, n);
                let u = dot(row, up, expert as usize, n);
                hidden.push((gelu(g) * u) as f32);
            }
        }
    }
    hidden
}

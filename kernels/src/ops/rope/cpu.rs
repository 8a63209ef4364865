//! Reference of the rotary embedding.

use super::{Params, frequencies};

/// Rotates every head of every row at the row's position.
pub(crate) fn rope(params: Params, theta: f32, positions: &[u32], x: &[f32]) -> Vec<f32> {
    let (heads, dim) = (params.heads as usize, params.head_dim as usize);
    let half = dim / 2;
    let frequencies = frequencies(theta, dim);
    let mut out = x.to_vec();
    for (t, &position) in positions.iter().enumerate() {
        for head in 0..heads {
            let start = (t * heads + head) * dim;
            for j in 0..half {
                let angle = f64::from(position as f32 * frequencies[j]);
                let (a, b) = (f64::from(x[start + j]), f64::from(x[start + j + half]));
                out[start + j] = (a * angle.cos() - b * angle.sin()) as f32;
                out[start + j + half] = (b * angle.cos() + a * angle.sin()) as f32;
            }
        }
    }
    out
}

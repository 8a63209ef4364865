//! Reference of the norm.

use super::Params;

/// `y` of the module's equation.
pub(crate) fn rms_norm(params: Params, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let n = params.hidden_size as usize;
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(n) {
        let mut squares = 0.0f64;
        for &v in row {
            squares += f64::from(v) * f64::from(v);
        }
        let factor = 1.0 / (squares / n as f64 + f64::from(params.epsilon)).sqrt();
        for i in 0..n {
            y.push((f64::from(row[i]) * factor * f64::from(weight[i])) as f32);
        }
    }
    y
}

/// `residual + rms_norm(y)`.
pub(crate) fn rms_norm_add(params: Params, y: &[f32], weight: &[f32], residual: &[f32]) -> Vec<f32> {
    rms_norm(params, y, weight).iter().zip(residual).map(|(n, r)| n + r).collect()
}

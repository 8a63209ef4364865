//! Rotary position embedding, half-rotation layout: with `phi = position * f_j`,
//! `out[j] = x[j] * cos(phi) - x[j + h] * sin(phi)`, `out[j + h] = x[j + h] * cos(phi) + x[j] * sin(phi)`, `h = head_dim / 2`.
//!
//! `x`, `out` are `[tokens, heads * head_dim]`. `f_j = 1 / theta^(2j / head_dim)` and `phi` are f32, as in xAI's code. The sine
//! and cosine are taken on the host: on some GPUs they are imprecise for arguments as large as 8191.
//! Source: Su et al. 2021, <https://arxiv.org/abs/2104.09864>, in GPT-NeoX' layout.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Heads of a row.
    pub(crate) heads: u32,
    /// Components of a head; even.
    pub(crate) head_dim: u32,
}

/// The angles' factors `f_j`, `[head_dim / 2]`. The power is taken in f64 and then rounded. It does not come from the system's library, nor do
/// sines and cosines: nodes of several systems are to have the same bits. (Those of glibc are the same; a test holds the numbers.)
pub(crate) fn frequencies(theta: f32, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|j| {
            let exponent = (2 * j) as f32 / head_dim as f32;
            1.0 / (libm::pow(f64::from(theta), f64::from(exponent)) as f32)
        })
        .collect()
}

/// Cosines and sines, each `[positions, head_dim / 2]`: the angle is rounded to f32, its cosine and sine are taken in f64.
pub(crate) fn tables(frequencies: &[f32], positions: impl Iterator<Item = u32>) -> (Vec<f32>, Vec<f32>) {
    positions
        .flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)))
        .map(|angle| (libm::cos(angle) as f32, libm::sin(angle) as f32))
        .unzip()
}

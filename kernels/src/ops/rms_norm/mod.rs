//! Root-mean-square norm: `y[t, i] = x[t, i] * weight[i] / sqrt(mean_i(x[t, i]^2) + epsilon)`.
//!
//! Row-major shapes: `x`, `y` `[tokens, hidden_size]`, `weight` `[hidden_size]`. The variant with addition computes
//! `residual += y`. Source: Zhang & Sennrich 2019, eq. 4.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Components of a row.
    pub(crate) hidden_size: u32,
    /// Added to the mean square, before the root.
    pub(crate) epsilon: f32,
}

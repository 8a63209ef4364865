//! First half of an expert: `hidden[t * chosen + j] = gelu(x[t] @ gate[e]) * (x[t] @ up[e])` with `e` the `j`-th expert of row `t`.
//!
//! `gelu(g) = 0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3)))`. `x` `[tokens, inputs]`, `gate` and `up`
//! `[experts, inputs, outputs]`, `hidden` `[tokens * chosen, outputs]`. `moe/linear` is the gate, `moe/linear_v` is up.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// `sqrt(2 / pi)`.
pub(crate) const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// Factor of the cube.
pub(crate) const CUBE_FACTOR: f32 = 0.044_715;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Length of a row of `x`.
    pub(crate) inputs: u32,
    /// Width of an expert.
    pub(crate) outputs: u32,
    /// Scale groups of both matrices.
    pub(crate) groups: u32,
    /// Experts of a token.
    pub(crate) chosen: u32,
}

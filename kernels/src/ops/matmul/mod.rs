//! Matrix product: `out[t, n] = factor * sum_k x[t, k] * w[k, n]`.
//!
//! Row-major shapes: `x` `[tokens, inputs]`, `out` `[tokens, outputs]`. `w` is f32, or int8 with `groups` scales along the
//! inputs: `w[k, n] = q[k, n] * scale[k / (inputs / groups), n]`. The numbers stay int8 in memory and are turned into floats
//! (exactly) inside the product; a group's scale multiplies the group's sum.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Length of a row of `x`.
    pub(crate) inputs: u32,
    /// Length of a row of `out`.
    pub(crate) outputs: u32,
    /// Scale groups along the inputs; 1 for floats.
    pub(crate) groups: u32,
    /// Factor on every result.
    pub(crate) factor: f32,
}

//! Second half of an expert: `out[t] = sum_j p[t, j] * (hidden[t * chosen + j] @ down[e])`, best expert first.
//!
//! `hidden` `[tokens * chosen, inputs]`, `down` `[experts, inputs, outputs]`, ids and `p` `[tokens, chosen]`, `out`
//! `[tokens, outputs]`. The probabilities are the router's, not renormalised.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Width of an expert.
    pub(crate) inputs: u32,
    /// Length of a row of `out`.
    pub(crate) outputs: u32,
    /// Scale groups of the matrix.
    pub(crate) groups: u32,
    /// Experts of a token.
    pub(crate) chosen: u32,
}

//! Choice of experts: `p = softmax(x @ router)` over all experts; the largest `num_experts_per_tok` are chosen, best first, on a
//! tie the lower index first. Their probabilities are passed on as they are, not renormalised.
//!
//! `x` `[tokens, hidden_size]`, `router` f32 `[hidden_size, num_experts]`, ids and probabilities `[tokens, num_experts_per_tok]`.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Length of a row of `x`.
    pub(crate) hidden_size: u32,
    /// Experts there are.
    pub(crate) num_experts: u32,
    /// Experts chosen for a token.
    pub(crate) num_experts_per_tok: u32,
}

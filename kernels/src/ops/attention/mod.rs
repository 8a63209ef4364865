//! Causal attention with grouped heads, a soft cap and a mask, over a paged pool of keys and values.
//!
//! For the row at position `p` of its sequence and query head `i`, which uses key head `i / (heads / kv_heads)`:
//! `a[s] = cap * tanh(multiplier * (q . k[s]) / cap)` for `s` in `0..=p`, then `a[s] = -1e30` where the key may not be attended
//! to, `w = softmax(a)`, `out = sum_s w[s] * v[s]`. A row whose keys are all masked thus averages its keys.
//!
//! `q`, `out` `[tokens, heads * head_dim]`; `k`, `v` `[slots, kv_heads * head_dim]`, found by the batch's block tables. Sums over
//! keys go by ascending absolute position, whatever the slots and the other rows are.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Logit of a key that may not be attended to. Finite, so that a row without any visible key has a finite result.
pub(crate) const MASKED_LOGIT: f32 = -1e30;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Query heads.
    pub(crate) heads: u32,
    /// Key and value heads; `heads` is a multiple of it.
    pub(crate) kv_heads: u32,
    /// Components of a head.
    pub(crate) head_dim: u32,
    /// Factor on `q . k`.
    pub(crate) multiplier: f32,
    /// The soft cap.
    pub(crate) logit_cap: f32,
}

impl From<&crate::AttentionParams> for Params {
    fn from(params: &crate::AttentionParams) -> Self {
        Self {
            heads: params.heads as u32,
            kv_heads: params.kv_heads as u32,
            head_dim: params.head_dim as u32,
            multiplier: params.multiplier,
            logit_cap: params.logit_cap,
        }
    }
}

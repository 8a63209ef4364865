//! Reference of attention.

use super::{MASKED_LOGIT, Params};
use crate::Batch;

/// Keys, values and marks of one layer's pool: `[slots, kv_heads * head_dim]` twice, `[slots]`.
pub(crate) struct Pool<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) attended: &'a [bool],
}

/// `out` of the module's equation for all rows of the batch.
pub(crate) fn attention(params: Params, batch: &Batch, q: &[f32], pool: &Pool<'_>) -> Vec<f32> {
    let (heads, kv_heads, dim) = (params.heads as usize, params.kv_heads as usize, params.head_dim as usize);
    let mut out = Vec::with_capacity(q.len());
    for (t, row) in batch.rows.iter().enumerate() {
        let slots: Vec<usize> = (0..=row.position)
            .map(|position| batch.slot(row.table_offset, position).expect("the table covers the row") as usize)
            .collect();
        for head in 0..heads {
            let kv_start = head / (heads / kv_heads) * dim;
            let query = &q[(t * heads + head) * dim..][..dim];
            let mut logits = Vec::new();
            for &slot in &slots {
                let key = &pool.k[slot * kv_heads * dim + kv_start..][..dim];
                let dot: f64 = query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let cap = f64::from(params.logit_cap);
                let capped = cap * (f64::from(params.multiplier) * dot / cap).tanh();
                logits.push(if pool.attended[slot] { capped } else { f64::from(MASKED_LOGIT) });
            }
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|a| (a - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for j in 0..dim {
                let mut sum = 0.0;
                for (&slot, weight) in slots.iter().zip(&weights) {
                    sum += weight / total * f64::from(pool.v[slot * kv_heads * dim + kv_start + j]);
                }
                out.push(sum as f32);
            }
        }
    }
    out
}

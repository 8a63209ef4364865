//! Fast attention of one row with the query heads that share a key head: each key and value is read once for all of them.
//!
//! Key position `s` always goes to lane `s % 16` of the softmax's total, and values are added by ascending position, so neither the
//! slots nor the rows that are computed beside this one matter.

use super::{
    math::{exp, tanh},
    simd::{Kernel, LANES, Simd, dot, reduce},
};
use crate::{
    KV_BLOCK_TOKENS,
    ops::attention::{MASKED_LOGIT, Params},
};

/// Keys and values that a row sees.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    /// `[slots, kv_heads * head_dim]`.
    pub(super) k: &'a [f32],
    /// `[slots, kv_heads * head_dim]`.
    pub(super) v: &'a [f32],
    /// `[slots]`.
    pub(super) attended: &'a [bool],
    /// The sequence's blocks.
    pub(super) table: &'a [u32],
    /// Keys `0..count` are seen.
    pub(super) count: usize,
}

/// One row, one key head.
pub(super) struct Attention<'a> {
    pub(super) params: Params,
    pub(super) kv_head: usize,
    pub(super) keys: Keys<'a>,
    /// `[heads / kv_heads, head_dim]`.
    pub(super) q: &'a [f32],
    /// As `q`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Params { head_dim, kv_heads, .. } = self.params;
        let (dim, width) = (head_dim as usize, (head_dim * kv_heads) as usize);
        let heads = self.q.len() / dim;
        let Keys { k, v, attended, table, count } = self.keys;
        let start = self.kv_head * dim;
        // Room for whole pieces of 16 keys; what lies behind the last key stays a weight of 0.
        let stride = count.next_multiple_of(LANES);
        let mut weights = vec![0.0f32; heads * stride];

        for (block, positions) in Blocks::new(table, count) {
            for (offset, position) in positions.enumerate() {
                let slot = block * KV_BLOCK_TOKENS + offset;
                let key = &k[slot * width + start..][..dim];
                for (head, query) in self.q.chunks_exact(dim).enumerate() {
                    weights[head * stride + position] =
                        if attended[slot] { dot(simd, query, key) } else { f32::NEG_INFINITY };
                }
            }
        }
        let mut totals = vec![0.0f32; heads];
        for (row, total) in weights.chunks_exact_mut(stride).zip(&mut totals) {
            *total = softmax(self.params, &mut row[..stride], count);
        }
        self.out.fill(0.0);
        for (block, positions) in Blocks::new(table, count) {
            for (offset, position) in positions.enumerate() {
                let value = &v[(block * KV_BLOCK_TOKENS + offset) * width + start..][..dim];
                for (head, sum) in self.out.chunks_exact_mut(dim).enumerate() {
                    let weight = weights[head * stride + position];
                    for (sum, value) in sum.iter_mut().zip(value) {
                        *sum = value.mul_add(weight, *sum);
                    }
                }
            }
        }
        for (sum, total) in self.out.chunks_exact_mut(dim).zip(&totals) {
            sum.iter_mut().for_each(|sum| *sum /= total);
        }
    }
}

/// Turns dot products (negative infinity: masked) into weights that are not yet divided by their total, which is returned.
#[inline(always)]
fn softmax(params: Params, row: &mut [f32], count: usize) -> f32 {
    let Params { multiplier, logit_cap, .. } = params;
    // Loops of one kind of work each: the search for the largest would keep the first from being vectorised.
    for a in &mut row[..count] {
        let capped = logit_cap * tanh(*a * multiplier / logit_cap);
        *a = if *a == f32::NEG_INFINITY { MASKED_LOGIT } else { capped };
    }
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (pieces, rest) = row[..count].as_chunks::<LANES>();
    for piece in pieces {
        for (lane, &a) in lanes.iter_mut().zip(piece) {
            *lane = larger(*lane, a);
        }
    }
    let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |largest, &a| larger(largest, a));
    for a in &mut row[..count] {
        *a = exp(*a - largest);
    }
    let mut lanes = [0.0; LANES];
    for piece in row.as_chunks::<LANES>().0 {
        for (lane, weight) in lanes.iter_mut().zip(piece) {
            *lane += weight;
        }
    }
    reduce(lanes)
}

/// Blocks of a sequence with the positions in them, ascending.
struct Blocks<'a> {
    table: std::slice::Iter<'a, u32>,
    next: usize,
    count: usize,
}

impl<'a> Blocks<'a> {
    #[inline(always)]
    fn new(table: &'a [u32], count: usize) -> Self {
        Self { table: table.iter(), next: 0, count }
    }
}

impl Iterator for Blocks<'_> {
    type Item = (usize, std::ops::Range<usize>);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.count {
            return None;
        }
        let block = *self.table.next()? as usize;
        let positions = self.next..(self.next + KV_BLOCK_TOKENS).min(self.count);
        self.next = positions.end;
        Some((block, positions))
    }
}

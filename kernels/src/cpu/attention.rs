//! Fast attention of some rows of one sequence with the query heads that share a key head: each key and value is brought near once
//! for all of them.
//!
//! Keys lie in blocks of sixteen, component by component, so that a block's sixteen logits are sixteen lanes: each is one sum over
//! ascending components. Key position `s` always goes to lane `s % 16` of the softmax's total, and values are added by ascending
//! position. So neither the slots nor the rows that are computed beside a row matter.
#![expect(clippy::needless_range_loop, reason = "tiles of registers are indexed by band, row and lane together")]

use super::{
    math::{exp, tanh},
    simd::{Kernel, LANES, Simd, reduce},
};
use crate::{
    KV_BLOCK_TOKENS, Row,
    ops::attention::{MASKED_LOGIT, Params},
};

const _: () = assert!(KV_BLOCK_TOKENS == LANES, "a block's keys are the lanes of a register");

/// Pieces of a value that are summed at a time, where there are registers for that.
const PIECES: usize = 8;
/// The same where there are few.
const FEW_PIECES: usize = 2;

/// Keys and values of a sequence.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    /// `[blocks, kv_heads, head_dim, 16]`.
    pub(super) k: &'a [f32],
    /// `[slots, kv_heads * head_dim]`.
    pub(super) v: &'a [f32],
    /// `[slots]`.
    pub(super) attended: &'a [bool],
    /// The sequence's blocks.
    pub(super) table: &'a [u32],
}

/// One row: some heads of it.
pub(super) struct AttentionRow<'a> {
    /// Keys `0..count` are seen; at least one.
    pub(super) count: usize,
    /// `[heads, head_dim]`.
    pub(super) q: &'a [f32],
    /// As `q`.
    pub(super) out: &'a mut [f32],
}

/// Rows of one sequence, one key head.
pub(super) struct Attention<'a> {
    pub(super) params: Params,
    pub(super) kv_head: usize,
    pub(super) keys: Keys<'a>,
    pub(super) rows: Vec<AttentionRow<'a>>,
}

/// Weights of a tile at most, unless it is a single row: they are to stay in the second-level cache.
const TILE_WEIGHTS: usize = 128 << 10;
/// Rows of a tile at most.
const TILE_ROWS: usize = 16;

/// Cuts rows into tiles of neighbours in one sequence; how many rows each has. `heads` share a key head.
pub(super) fn tiles(rows: &[Row], heads: usize) -> Vec<usize> {
    let mut tiles = Vec::new();
    for sequence in rows.chunk_by(|a, b| a.table_offset == b.table_offset) {
        let most = sequence.iter().map(|row| row.position as usize + 1).max().unwrap_or(1);
        let rows = (TILE_WEIGHTS / (heads * most)).clamp(1, TILE_ROWS);
        tiles.extend(sequence.chunks(rows).map(<[Row]>::len));
    }
    tiles
}

impl Kernel for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let Params { head_dim, kv_heads, .. } = self.params;
        let (dim, kv_heads) = (head_dim as usize, kv_heads as usize);
        let Keys { k, v, attended, table } = self.keys;
        let most = self.rows.iter().map(|row| row.count).max().unwrap_or(0);
        let table = &table[..most.div_ceil(LANES)];
        // Room for whole blocks of keys; what lies behind a row's last key becomes a weight of 0.
        let stride = table.len() * LANES;
        let queries: Vec<&[f32]> = self.rows.iter().flat_map(|row| row.q.chunks_exact(dim)).collect();
        let mut weights = vec![0.0f32; queries.len() * stride];

        for (index, &block) in table.iter().enumerate() {
            let block = block as usize;
            let keys = k[(block * kv_heads + self.kv_head) * dim * LANES..][..dim * LANES].as_chunks::<LANES>().0;
            let marks = &attended[block * LANES..][..LANES];
            let mut logits = Logits { keys, stride, start: index * LANES, out: &mut weights };
            let mut first = 0;
            while S::MANY_REGISTERS && queries.len() - first >= 8 {
                logits.of::<S, 8>(simd, &queries, first);
                first += 8;
            }
            while queries.len() - first >= 6 {
                logits.of::<S, 6>(simd, &queries, first);
                first += 6;
            }
            if queries.len() - first >= 4 {
                logits.of::<S, 4>(simd, &queries, first);
                first += 4;
            }
            while queries.len() > first {
                logits.of::<S, 1>(simd, &queries, first);
                first += 1;
            }
            if marks.contains(&false) {
                for row in weights.chunks_exact_mut(stride) {
                    for (weight, mark) in row[index * LANES..][..LANES].iter_mut().zip(marks) {
                        *weight = if *mark { *weight } else { f32::NEG_INFINITY };
                    }
                }
            }
        }

        let heads = queries.len() / self.rows.len().max(1);
        // A loop and no closure: that would be compiled without the instructions of this path.
        let mut totals = vec![0.0f32; queries.len()];
        for (index, (row, total)) in weights.chunks_exact_mut(stride).zip(&mut totals).enumerate() {
            let count = self.rows[index / heads].count;
            row[count..].fill(0.0);
            *total = softmax(self.params, row, count);
        }

        self.rows.iter_mut().for_each(|row| row.out.fill(0.0));
        let width = kv_heads * dim;
        for (index, &block) in table.iter().enumerate() {
            let values = &v[block as usize * LANES * width..][..LANES * width];
            for (row, weights) in self.rows.iter_mut().zip(weights.chunks_exact(heads * stride)) {
                // A weight of 0 would add nothing but could turn a sum of -0 to 0.
                let tokens = row.count.saturating_sub(index * LANES).min(LANES);
                let values = Values { values, width, start: self.kv_head * dim, dim, tokens };
                let mut pairs = row.out.chunks_exact_mut(2 * dim);
                let mut weights = weights.chunks_exact(stride).map(|weights| &weights[index * LANES..][..LANES]);
                for out in &mut pairs {
                    let (Some(a), Some(b)) = (weights.next(), weights.next()) else { break };
                    values.add_to::<S, 2>(simd, [a, b], out);
                }
                let last = pairs.into_remainder();
                if let Some(weights) = weights.next() {
                    values.add_to::<S, 1>(simd, [weights], last);
                }
            }
        }
        let outs = self.rows.iter_mut().flat_map(|row| row.out.chunks_exact_mut(dim));
        for (sum, total) in outs.zip(&totals) {
            sum.iter_mut().for_each(|sum| *sum /= total);
        }
    }
}

/// Dot products of queries with a block of keys.
struct Logits<'a> {
    /// `[head_dim, 16]`.
    keys: &'a [[f32; LANES]],
    stride: usize,
    /// Position of the block's first key.
    start: usize,
    /// `[queries, stride]`.
    out: &'a mut [f32],
}

impl Logits<'_> {
    /// Of the queries `first..first + Q`.
    #[inline(always)]
    fn of<S: Simd, const Q: usize>(&mut self, simd: S, queries: &[&[f32]], first: usize) {
        let queries: [&[f32]; Q] = std::array::from_fn(|i| &queries[first + i][..self.keys.len()]);
        let mut sums = [simd.zero(); Q];
        for (d, keys) in self.keys.iter().enumerate() {
            let keys = simd.load(keys);
            for i in 0..Q {
                sums[i] = simd.fma(keys, simd.splat(queries[i][d]), sums[i]);
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            self.out[(first + i) * self.stride + self.start..][..LANES].copy_from_slice(&simd.array(sums));
        }
    }
}

/// The values of a block, of one key head.
#[derive(Clone, Copy)]
struct Values<'a> {
    /// `[16, width]`.
    values: &'a [f32],
    width: usize,
    /// Where the head begins in a row.
    start: usize,
    dim: usize,
    /// Tokens that are seen.
    tokens: usize,
}

impl Values<'_> {
    /// Adds each token's value, times the head's weight of it, to each of `H` heads in `out`.
    #[inline(always)]
    fn add_to<S: Simd, const H: usize>(self, simd: S, weights: [&[f32]; H], out: &mut [f32]) {
        let mut first = 0;
        while S::MANY_REGISTERS && self.dim - first >= PIECES * LANES {
            self.add_pieces::<S, H, PIECES>(simd, weights, out, first);
            first += PIECES * LANES;
        }
        while self.dim - first >= FEW_PIECES * LANES {
            self.add_pieces::<S, H, FEW_PIECES>(simd, weights, out, first);
            first += FEW_PIECES * LANES;
        }
        while self.dim - first >= LANES {
            self.add_pieces::<S, H, 1>(simd, weights, out, first);
            first += LANES;
        }
        for (weights, out) in weights.into_iter().zip(out.chunks_exact_mut(self.dim)) {
            for (values, weight) in self.values.chunks_exact(self.width).zip(weights).take(self.tokens) {
                for (sum, value) in out[first..].iter_mut().zip(&values[self.start + first..]) {
                    *sum = value.mul_add(*weight, *sum);
                }
            }
        }
    }

    /// The components from `first` on, `P` times sixteen of them.
    #[inline(always)]
    fn add_pieces<S: Simd, const H: usize, const P: usize>(
        self,
        simd: S,
        weights: [&[f32]; H],
        out: &mut [f32],
        first: usize,
    ) {
        let mut sums = [[simd.zero(); P]; H];
        for h in 0..H {
            let pieces = out[h * self.dim + first..][..P * LANES].as_chunks::<LANES>().0;
            for p in 0..P {
                sums[h][p] = simd.load(&pieces[p]);
            }
        }
        for token in 0..self.tokens {
            let values = self.values[token * self.width + self.start + first..][..P * LANES].as_chunks::<LANES>().0;
            let mut weight = [simd.zero(); H];
            for h in 0..H {
                weight[h] = simd.splat(weights[h][token]);
            }
            for p in 0..P {
                let value = simd.load(&values[p]);
                for h in 0..H {
                    sums[h][p] = simd.fma(value, weight[h], sums[h][p]);
                }
            }
        }
        for h in 0..H {
            for p in 0..P {
                let place = h * self.dim + first + p * LANES;
                out[place..place + LANES].copy_from_slice(&simd.array(sums[h][p]));
            }
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

//! Attention and what precedes it, as dispatches: rotation and storing, blocks of keys, their combination.

use super::{
    GpuActivations, GpuBackend, GpuKvPool,
    batch::grow,
    memory::words,
    pipelines::Kernel,
    recorder::WORK_MAX,
    shaders::{AttentionCombineParams, AttentionUniform, RopeParams},
    shape, workgroups,
};
use crate::{
    AttentionParams,
    ops::{attention, rope},
};

/// Keys of a block; `BLOCK` in `attention.wgsl`.
const BLOCK: usize = 128;
/// Bytes of partial results at a time. Steps whose rows need more go through in several dispatches.
const PARTIALS_BYTES_MAX: u64 = 64 << 20;

impl GpuBackend {
    pub(super) fn rope_store_impl(
        &mut self,
        params: &AttentionParams,
        [q, k, v]: [&GpuActivations; 3],
        kv: &GpuKvPool,
        layer: usize,
    ) {
        let rows = self.rows;
        let kv_width = params.kv_heads * params.head_dim;
        let fits = self.expect_attention(params, kv, layer)
            && self.expect_rows("queries", rows, params.heads * params.head_dim, q)
            && self.expect_rows("keys", rows, kv_width, k)
            && self.expect_rows("values", rows, kv_width, v);
        if !fits {
            return;
        }
        let uploaded =
            self.batch.upload_angles(&mut self.memory, &mut self.recorder, params.rope_theta, params.head_dim);
        if let Err(error) = uploaded {
            return self.recorder.refuse(error);
        }
        let (Some((places, _)), Some(angles)) = (self.batch.places_and_tables(), self.batch.angles()) else { return };
        let op = rope::Params { heads: params.heads as u32, head_dim: params.head_dim as u32 };
        let uniform = RopeParams { op, kv_heads: params.kv_heads as u32 };
        let pool = &kv.layers[layer];
        let buffers = [&q.buffer, &k.buffer, &v.buffer, angles, places, &pool.keys, &pool.values];
        let pairs = (params.heads + params.kv_heads) * params.head_dim / 2;
        self.recorder.dispatch(Kernel::Rope, &uniform, &buffers, [workgroups(pairs), rows as u32, 1], 0);
    }

    pub(super) fn attention_impl(
        &mut self,
        params: &AttentionParams,
        q: &GpuActivations,
        kv: &GpuKvPool,
        layer: usize,
        out: &GpuActivations,
    ) {
        let (rows, width) = (self.rows, params.heads * params.head_dim);
        let fits = self.expect_attention(params, kv, layer)
            && self.expect_rows("queries", rows, width, q)
            && self.expect_rows("output of attention", rows, width, out);
        if !fits || rows == 0 {
            return;
        }
        let longest = self.batch.positions.iter().max().map_or(0, |&position| position as usize);
        let blocks = longest / BLOCK + 1;
        // Rows within the first block write their result themselves.
        let partial_words = if blocks > 1 { params.heads * blocks * (2 + params.head_dim) } else { 0 };
        let row_bytes = words(&[partial_words]).unwrap_or(u64::MAX);
        let limit = PARTIALS_BYTES_MAX.min(self.memory.binding_bytes()).max(row_bytes);
        let at_once = if partial_words == 0 { rows } else { rows.min((limit / row_bytes) as usize) };
        let row_work = (blocks * BLOCK) as u64 * 2 * width as u64;
        let at_once = at_once.min((WORK_MAX / row_work) as usize).max(1);
        let grown =
            grow(&mut self.partials, &mut self.memory, &mut self.recorder, "attention", at_once * partial_words);
        let partials = match grown {
            Ok(partials) => partials,
            Err(error) => return self.recorder.refuse(error),
        };
        let Some((places, tables)) = self.batch.places_and_tables() else { return };
        let pool = &kv.layers[layer];
        let op = attention::Params::from(params);
        for first in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - first);
            let uniform = AttentionUniform { op, row_begin: first as u32, blocks: blocks as u32 };
            let buffers = [&q.buffer, &pool.keys, &pool.values, &kv.attended, places, tables, &out.buffer, partials];
            let work = count as u64 * row_work;
            let groups = [op.heads, blocks as u32, count as u32];
            self.recorder.dispatch(Kernel::Attention(self.lanes), &uniform, &buffers, groups, work);
            if blocks > 1 {
                let uniform = AttentionCombineParams {
                    heads: op.heads,
                    head_dim: op.head_dim,
                    row_begin: first as u32,
                    blocks: blocks as u32,
                };
                let buffers = [places, partials, &out.buffer];
                let groups = [workgroups(width), count as u32, 1];
                self.recorder.dispatch(Kernel::AttentionCombine, &uniform, &buffers, groups, 0);
            }
        }
    }

    fn expect_attention(&mut self, params: &AttentionParams, kv: &GpuKvPool, layer: usize) -> bool {
        if layer >= kv.layers.len() {
            self.recorder.refuse(shape("layer of the pool", &format!("less than {}", kv.layers.len()), layer));
            return false;
        }
        let whole =
            params.kv_heads > 0 && params.heads.is_multiple_of(params.kv_heads) && params.head_dim.is_multiple_of(2);
        if !whole || params.head_dim == 0 || params.heads == 0 {
            let expected = "whole query heads a key head, and an even head width above 0";
            self.recorder.refuse(shape(&format!("{params:?}"), expected, params.head_dim));
            return false;
        }
        if self.batch.positions.len() != self.rows {
            self.recorder.refuse(shape("rows of attention", "those of the batch", self.rows));
            return false;
        }
        self.expect("width of the pool", params.kv_heads * params.head_dim, kv.width)
    }
}

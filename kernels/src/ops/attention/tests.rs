//! Bound 2e-5 of the largest result: logits of size up to 30 with a relative error of 1e-6 pass through `exp`.
//!
//! Queries and keys are rotated on the way in, so these tests hold `rope_store` too, up to position 8191. They write keys in chunks, as a
//! prefill does, and compare the last chunk's rows.

use super::{
    Params,
    cpu::{Pool, attention},
};
use crate::{
    AttentionParams, Backend, KV_BLOCK_TOKENS,
    ops::{
        rope,
        testing::{Bound, Random, compare, compare_bits, download, one_sequence, seed},
    },
};

const BOUND: Bound = Bound { absolute: 1e-6, relative: 2e-5 };

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Tokens before the last chunk, and in it.
    before: usize,
    last: usize,
    /// Whether a position may be attended to.
    attended: fn(usize) -> bool,
}

const CASES: [Case; 8] = [
    Case { heads: 1, kv_heads: 1, head_dim: 2, before: 0, last: 1, attended: |_| true },
    Case { heads: 4, kv_heads: 2, head_dim: 16, before: 0, last: 13, attended: |_| true },
    Case { heads: 16, kv_heads: 8, head_dim: 8, before: 20, last: 5, attended: |_| true },
    Case { heads: 6, kv_heads: 1, head_dim: 12, before: 31, last: 1, attended: |p| p % 3 != 1 },
    Case { heads: 4, kv_heads: 2, head_dim: 16, before: 16, last: 17, attended: |p| p != 20 },
    // No key is visible to any row: each averages its keys.
    Case { heads: 4, kv_heads: 2, head_dim: 16, before: 3, last: 15, attended: |_| false },
    Case { heads: 6, kv_heads: 1, head_dim: 128, before: 200, last: 3, attended: |p| p > 100 },
    Case { heads: 2, kv_heads: 1, head_dim: 16, before: 8190, last: 2, attended: |p| p % 5 != 0 },
];

/// Holds a device to the reference.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let seed = seed(18);
    let mut random = Random::new(seed);
    for case in &CASES {
        check_one(backend, &mut random, seed, case);
    }
}

fn check_one<B: Backend>(backend: &mut B, random: &mut Random, seed: u64, case: &Case) {
    let device = backend.info().name.clone();
    let params = AttentionParams {
        heads: case.heads,
        kv_heads: case.kv_heads,
        head_dim: case.head_dim,
        multiplier: 1.0 / (case.head_dim as f32).sqrt(),
        logit_cap: 30.0,
        rope_theta: 10_000.0,
    };
    let total = case.before + case.last;
    let (q_width, kv_width) = (case.heads * case.head_dim, case.kv_heads * case.head_dim);
    let q = random.floats(total * q_width, 6.0);
    let k = random.floats(total * kv_width, 6.0);
    let v = random.floats(total * kv_width, 2.0);

    let blocks = total.div_ceil(KV_BLOCK_TOKENS) as u32 + 2;
    let slots = blocks as usize * KV_BLOCK_TOKENS;
    // Two layers, of which the second is used: a device that mixes them up is wrong.
    let mut kv = backend.kv_pool(2, slots, kv_width).unwrap();
    let mut got = Vec::new();
    for (first, count) in [(0, case.before), (case.before, case.last)].into_iter().filter(|part| part.1 > 0) {
        let batch = one_sequence(first, count, blocks, case.attended);
        let load = |backend: &mut B, width: usize| backend.activations(count, width).unwrap();
        let (mut dq, mut dk, mut dv) = (load(backend, q_width), load(backend, kv_width), load(backend, kv_width));
        let mut out = load(backend, q_width);
        backend.begin(&batch, &mut kv).unwrap();
        backend.write(&q[first * q_width..][..count * q_width], &mut dq).unwrap();
        backend.write(&k[first * kv_width..][..count * kv_width], &mut dk).unwrap();
        backend.write(&v[first * kv_width..][..count * kv_width], &mut dv).unwrap();
        backend.rope_store(&params, &mut dq, &dk, &dv, &mut kv, 1);
        if first == case.before {
            backend.attention(&params, &dq, &kv, 1, &mut out);
            got = download(backend, &out, count);
        } else {
            backend.finish(&[]).unwrap();
        }
    }

    let positions: Vec<u32> = (0..total as u32).collect();
    let rotate = |heads: usize, x: &[f32], positions: &[u32]| {
        let params = rope::Params { heads: heads as u32, head_dim: case.head_dim as u32 };
        rope::cpu::rope(params, 10_000.0, positions, x)
    };
    let rotated_k = rotate(case.kv_heads, &k, &positions);
    let batch = one_sequence(case.before, case.last, blocks, case.attended);
    let mut pool = (vec![0.0; slots * kv_width], vec![0.0; slots * kv_width], vec![false; slots]);
    for position in 0..total {
        let slot = batch.slot(0, position as u32).unwrap() as usize;
        pool.0[slot * kv_width..][..kv_width].copy_from_slice(&rotated_k[position * kv_width..][..kv_width]);
        pool.1[slot * kv_width..][..kv_width].copy_from_slice(&v[position * kv_width..][..kv_width]);
        pool.2[slot] = (case.attended)(position);
    }
    let q = rotate(case.heads, &q[case.before * q_width..], &positions[case.before..]);
    let want = attention(Params::from(&params), &batch, &q, &Pool { k: &pool.0, v: &pool.1, attended: &pool.2 });
    let shape = (case.heads, case.kv_heads, case.head_dim, case.before, case.last);
    compare("attention", &shape, &device, seed, &got, &want, BOUND);
}

/// The last row of a sequence has the same bits whether its keys came in one chunk or one by one, and wherever its blocks lie.
pub(crate) fn check_chunks<B: Backend>(backend: &mut B) {
    let seed = seed(19);
    let mut random = Random::new(seed);
    let params =
        AttentionParams { heads: 4, kv_heads: 2, head_dim: 16, multiplier: 0.25, logit_cap: 30.0, rope_theta: 1e4 };
    let total = 37;
    let (q, k, v) = (random.floats(total * 64, 4.0), random.floats(total * 32, 4.0), random.floats(total * 32, 1.0));
    let mut run = |size: usize, blocks: u32| {
        let mut kv = backend.kv_pool(1, blocks as usize * KV_BLOCK_TOKENS, 32).unwrap();
        let mut all = Vec::new();
        for first in (0..total).step_by(size) {
            let count = size.min(total - first);
            let mut room = [64, 32, 32, 64].map(|width| backend.activations(count, width).unwrap());
            let [dq, dk, dv, out] = &mut room;
            backend.begin(&one_sequence(first, count, blocks, |_| true), &mut kv).unwrap();
            backend.write(&q[first * 64..][..count * 64], dq).unwrap();
            backend.write(&k[first * 32..][..count * 32], dk).unwrap();
            backend.write(&v[first * 32..][..count * 32], dv).unwrap();
            backend.rope_store(&params, dq, dk, dv, &mut kv, 0);
            backend.attention(&params, dq, &kv, 0, out);
            all.extend(download(backend, out, count));
        }
        all
    };
    let whole = run(total, 3);
    for (size, blocks) in [(1, 3), (7, 9), (16, 4)] {
        let got = run(size, blocks);
        compare_bits("attention", &(size, blocks), "in chunks", seed, &got, &whole);
    }
}

#[test]
fn cpu_paths_keep_to_the_reference() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

#[test]
fn chunks_and_places_of_keys_do_not_show_on_the_cpu() {
    crate::cpu::tests::backends().iter_mut().for_each(check_chunks);
}

//! Ids are equal, ties included. Bound 4e-6 on probabilities: f32 logits of unit size, one `exp`, one division.

use grokpipe_model::{Format, Layout};

use super::{Params, cpu::route};
use crate::{
    Backend,
    ops::testing::{Bound, Random, TestMatrix, compare, compare_bits, seed, single_tokens, upload},
};

const BOUND: Bound = Bound { absolute: 1e-7, relative: 4e-6 };

/// Holds a device to the reference.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let seed = seed(13);
    let mut random = Random::new(seed);
    let few = [(1, 16, 8, 2), (5, 64, 8, 2), (33, 96, 8, 2), (3, 17, 5, 3), (1, 6144, 8, 2)];
    for (rows, hidden, experts, chosen) in few.into_iter().chain([(2, 1, 1, 1), (3, 7, 64, 6), (1, 130, 64, 64)]) {
        let router = TestMatrix::random(&mut random, (1, hidden, experts), Format::F32, Layout::InOut);
        check_one(backend, seed, &router, &random.floats(rows * hidden, 3.0), chosen);
    }
    // Experts 1, 3 and 6 have the same weights: where they win, the lower two are chosen.
    let mut router = TestMatrix::random(&mut random, (1, 32, 8), Format::F32, Layout::InOut);
    for row in router.bytes.chunks_mut(8 * 4) {
        let one: [u8; 4] = row[4..8].try_into().unwrap();
        row[12..16].copy_from_slice(&one);
        row[24..28].copy_from_slice(&one);
    }
    check_one(backend, seed, &router, &random.floats(20 * 32, 3.0), 2);
    // All equal.
    check_one(backend, seed, &router, &[0.0; 32], 2);
    check_neighbour(backend, seed, &mut random);
}

/// A row whose neighbour is infinite is routed as if it were alone: six components are no whole quads.
fn check_neighbour<B: Backend>(backend: &mut B, seed: u64, random: &mut Random) {
    let router = TestMatrix::random(random, (1, 6, 8), Format::F32, Layout::InOut);
    let w = backend.load_matrix(&router, &mut |_| ()).unwrap();
    let mut x = random.floats(6, 3.0);
    x.extend([f32::INFINITY; 6]);
    let mut route = |rows: usize| {
        let input = upload(backend, &single_tokens(rows), 6, &x[..rows * 6]);
        let mut selection = backend.selection(rows, 2).unwrap();
        backend.route(&input, &w, &mut selection);
        backend.finish(&[]).unwrap();
        backend.read_selection(&selection, 1).unwrap()
    };
    let (alone, beside) = (route(1), route(2));
    assert_eq!(alone.0, beside.0, "seed {seed}");
    compare_bits("route", &(), "beside an infinite row", seed, &beside.1, &alone.1);
}

fn check_one<B: Backend>(backend: &mut B, seed: u64, router: &TestMatrix, x: &[f32], chosen: usize) {
    let device = backend.info().name.clone();
    let (hidden, experts) = (router.spec.inputs, router.spec.outputs);
    let rows = x.len() / hidden;
    let params = Params { hidden_size: hidden as u32, num_experts: experts as u32, num_experts_per_tok: chosen as u32 };
    let w = backend.load_matrix(router, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(rows), hidden, x);
    let mut selection = backend.selection(rows, chosen).unwrap();
    backend.route(&input, &w, &mut selection);
    backend.finish(&[]).unwrap();
    let (ids, probabilities) = backend.read_selection(&selection, rows).unwrap();
    let (want_ids, want) = route(params, x, router);
    assert_eq!(ids, want_ids, "route {params:?} on {device}, seed {seed}");
    compare("route", &params, &device, seed, &probabilities, &want, BOUND);
}

#[test]
fn cpu_paths_keep_to_the_reference() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

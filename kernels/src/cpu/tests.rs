//! The backend's own promises: the same bits on every path and for any number of threads.

use grokpipe_model::{Format, Layout};
use proptest::prelude::*;

use super::{CpuBackend, simd::Isa};
use crate::{
    Backend, KernelError,
    ops::testing::{Random, TestMatrix, compare_bits, download, single_tokens, upload},
};

/// A backend for every path of this CPU, and with more threads for the fastest.
pub(crate) fn backends() -> Vec<CpuBackend> {
    let paths = Isa::available().into_iter().map(|isa| (1, isa));
    paths.chain([(2, Isa::best()), (3, Isa::best())]).map(|(n, isa)| CpuBackend::with_isa(n, isa).unwrap()).collect()
}

/// All that an expert layer computes from `x`, with every operation that has sums.
fn expert_layer(
    backend: &mut CpuBackend,
    seed: u64,
    (rows, hidden, ffn, groups): (usize, usize, usize, usize),
) -> Vec<f32> {
    let mut random = Random::new(seed);
    let random = &mut random;
    let x = random.floats(rows * hidden, 2.0);
    let router = TestMatrix::random(random, (1, hidden, 8), Format::F32, Layout::InOut);
    let [gate, up] =
        [(); 2].map(|()| TestMatrix::random(random, (8, hidden, ffn), Format::Int8 { groups: 1 }, Layout::InOut));
    let down = TestMatrix::random(random, (8, ffn, hidden), Format::Int8 { groups }, Layout::InOut);
    let norm = backend.load_vector(&random.floats(hidden, 1.0)).unwrap();
    let mut load = |matrix: &TestMatrix| backend.load_matrix(matrix, &mut |_| ()).unwrap();
    let (router, gate, up, down) = (load(&router), load(&gate), load(&up), load(&down));
    let input = upload(backend, &single_tokens(rows), hidden, &x);
    let mut selection = backend.selection(rows, 2).unwrap();
    let mut normed = backend.activations(rows, hidden).unwrap();
    let mut inner = backend.activations(rows * 2, ffn).unwrap();
    let mut out = backend.activations(rows, hidden).unwrap();
    backend.rms_norm(1e-5, &input, &norm, &mut normed);
    backend.route(&normed, &router, &mut selection);
    backend.expert_gate_up(&normed, &selection, &gate, &up, &mut inner);
    backend.expert_down(&inner, &selection, &down, &mut out);
    backend.rms_norm_add(1e-5, &out, &norm, &mut normed);
    download(backend, &normed, rows)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn paths_and_threads_do_not_show(
        seed in any::<u64>(), rows in 1usize..20, hidden in 1usize..140, inner in 1usize..40, groups in 1usize..9,
    ) {
        let shape = (rows, hidden, inner * groups, groups);
        let mut backends = backends();
        let want = expert_layer(&mut backends[0], seed, shape);
        for backend in &mut backends[1..] {
            let got = expert_layer(backend, seed, shape);
            compare_bits("expert layer", &shape, &backend.info().name.clone(), seed, &got, &want);
        }
    }
}

#[test]
fn threads_do_not_show_where_work_is_shared() {
    // Large enough that the pool is used.
    let shape = (5, 512, 1024, 8);
    let mut backends = backends();
    let want = expert_layer(&mut backends[0], 1, shape);
    for backend in &mut backends[1..] {
        let got = expert_layer(backend, 1, shape);
        compare_bits("expert layer", &shape, &backend.info().name.clone(), 1, &got, &want);
    }
}

#[test]
fn a_kv_pool_that_cannot_fit_is_refused() {
    let mut backend = CpuBackend::new(1).unwrap();
    for (layers, slots, width) in [(64, 1 << 40, 1024), (64, usize::MAX, 1024)] {
        let refused = backend.kv_pool(layers, slots, width);
        assert!(matches!(refused, Err(KernelError::OutOfMemory { .. })));
    }
    assert!(matches!(backend.activations(usize::MAX, 2), Err(KernelError::OutOfMemory { .. })));
}

#[test]
fn the_device_says_what_it_is() {
    let two = CpuBackend::new(2).unwrap();
    assert!(two.info().name.starts_with("cpu (") && two.info().name.ends_with(", 2 threads)"), "{}", two.info().name);
    assert_eq!(two.info().fingerprint, CpuBackend::new(1).unwrap().info().fingerprint);
    assert!(!two.info().is_gpu);
}

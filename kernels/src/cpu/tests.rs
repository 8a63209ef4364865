//! The backend's own promises: the same bits on every path and for any number of threads.

use grokpipe_model::{BlockType, Format, Layout};
use proptest::prelude::*;

use super::{CpuBackend, simd::Isa};
use crate::{
    Backend, KernelError, Precision,
    ops::{
        matmul,
        testing::{
            Bound, Random, TestMatrix, check_rows_in_chunks, compare, compare_bits, download, seed, single_tokens,
            upload,
        },
    },
};

/// A backend for every path of this CPU, and with more threads for the fastest.
pub(crate) fn backends() -> Vec<CpuBackend> {
    backends_of(Precision::Exact)
}

fn backends_of(precision: Precision) -> Vec<CpuBackend> {
    let paths = Isa::available().into_iter().map(|isa| (1, isa));
    let all = paths.chain([(2, Isa::best()), (3, Isa::best())]);
    all.map(|(n, isa)| CpuBackend::with_isa(n, precision, isa).unwrap()).collect()
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
    let mut backend = CpuBackend::new(1, Precision::Exact).unwrap();
    for (layers, slots, width) in [(64, 1 << 40, 1024), (64, usize::MAX, 1024)] {
        let refused = backend.kv_pool(layers, slots, width);
        assert!(matches!(refused, Err(KernelError::OutOfMemory { .. })));
    }
    assert!(matches!(backend.activations(usize::MAX, 2), Err(KernelError::OutOfMemory { .. })));
}

#[test]
fn the_device_says_what_it_is() {
    let two = CpuBackend::new(2, Precision::Exact).unwrap();
    assert!(two.info().name.starts_with("cpu (") && two.info().name.ends_with(", 2 threads)"), "{}", two.info().name);
    assert_eq!(two.info().fingerprint, CpuBackend::new(1, Precision::Exact).unwrap().info().fingerprint);
    assert!(!two.info().is_gpu);
}

/// Formats that `fast` packs, with the number of inputs that their blocks divide.
fn packed_formats() -> Vec<(Format, Layout)> {
    let blocks = BlockType::all().map(|kind| (Format::Blocks(kind), Layout::OutIn));
    let int8 = [1, 8].map(|groups| (Format::Int8 { groups }, Layout::InOut));
    blocks.chain(int8).collect()
}

/// Whether rows of so many inputs are whole blocks and groups that are whole blocks of 32.
fn divides(format: Format, inputs: usize) -> bool {
    match format {
        Format::Blocks(kind) => inputs.is_multiple_of(kind.weights()),
        Format::Int8 { groups } => inputs.is_multiple_of(32 * groups),
        Format::F32 => true,
    }
}

fn product(backend: &mut CpuBackend, matrix: &TestMatrix, rows: usize, x: &[f32]) -> Vec<f32> {
    let w = backend.load_matrix(matrix, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(rows), matrix.spec.inputs, x);
    let mut out = backend.activations(rows, matrix.spec.outputs).unwrap();
    backend.matmul(&input, &w, 1.0, &mut out);
    download(backend, &out, rows)
}

/// Inputs that are whole numbers, the largest of each block 127, lose nothing in 8 bits.
#[test]
fn fast_products_of_whole_numbers_are_the_references() {
    let seed = seed(21);
    let mut random = Random::new(seed);
    for (format, layout) in packed_formats() {
        for (rows, inputs, outputs) in [(1, 512, 16), (7, 512, 5), (3, 512, 70), (2, 96, 33)] {
            if !divides(format, inputs) {
                continue;
            }
            let matrix = TestMatrix::random(&mut random, (1, inputs, outputs), format, layout);
            let whole = |i: usize, random: &mut Random| {
                if i.is_multiple_of(32) { 127.0 } else { random.below(255) as f32 - 127.0 }
            };
            let x: Vec<f32> = (0..rows * inputs).map(|i| whole(i, &mut random)).collect();
            let groups = if let Format::Int8 { groups } = format { groups as u32 } else { 1 };
            let params = matmul::Params { inputs: inputs as u32, outputs: outputs as u32, groups, factor: 1.0 };
            let want = matmul::cpu::matmul(params, &matrix, 0, &x);
            for backend in &mut backends_of(Precision::Fast) {
                let got = product(backend, &matrix, rows, &x);
                let bound = Bound { absolute: 1e-6, relative: 4e-6 };
                compare(
                    "fast matmul",
                    &(rows, outputs, format),
                    &backend.info().name.clone(),
                    seed,
                    &got,
                    &want,
                    bound,
                );
            }
        }
    }
}

#[test]
fn fast_products_have_the_same_bits_on_every_path_and_among_any_rows() {
    let seed = seed(22);
    let mut random = Random::new(seed);
    // Of the second, 65 rows are too large for the cache: they pass in stretches of inputs. The third has an odd number of blocks.
    let shapes = [(512, 300), (3840, 40), (96, 20)];
    let cases = packed_formats().into_iter().flat_map(|format| shapes.map(|shape| (format, shape)));
    for ((format, layout), (inputs, outputs)) in cases {
        if !divides(format, inputs) {
            continue;
        }
        let matrix = TestMatrix::random(&mut random, (1, inputs, outputs), format, layout);
        let x = random.floats(65 * inputs, 3.0);
        let mut backends = backends_of(Precision::Fast);
        let want = product(&mut backends[0], &matrix, 65, &x);
        for backend in &mut backends {
            let name = backend.info().name.clone();
            // Strips of every height: 9 are 5 and 4.
            for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 25, 65] {
                let got = product(backend, &matrix, rows, &x[..rows * inputs]);
                compare_bits("fast matmul", &(rows, inputs, format), &name, seed, &got, &want[..rows * outputs]);
            }
        }
    }
}

#[test]
fn numbers_too_small_to_be_scaled_have_the_same_bits_on_every_path() {
    let seed = seed(23);
    let mut random = Random::new(seed);
    for (format, layout) in packed_formats() {
        let matrix = TestMatrix::random(&mut random, (1, 256, 20), format, layout);
        for size in [1e-36, 3e-37, 1e-38, 1e-41, 1e-45] {
            let mut x: Vec<f32> = random.floats(256, size);
            x.iter_mut().step_by(32).for_each(|value| *value = 0.0);
            let mut backends = backends_of(Precision::Fast);
            let want = product(&mut backends[0], &matrix, 1, &x);
            for backend in &mut backends {
                let got = product(backend, &matrix, 1, &x);
                compare_bits("fast matmul", &(size, format), &backend.info().name.clone(), seed, &got, &want);
            }
        }
    }
}

/// A file may have the two matrices that meet the same rows in different formats, which want them otherwise.
#[test]
fn gate_and_up_may_have_different_formats() {
    let seed = seed(24);
    let mut random = Random::new(seed);
    let (rows, hidden, ffn) = (5, 256, 40);
    let formats = [
        (Format::Blocks(BlockType::F16), Layout::OutIn),
        (Format::Blocks(BlockType::Q8_0), Layout::OutIn),
        (Format::Blocks(BlockType::Q4K), Layout::OutIn),
        (Format::F32, Layout::InOut),
        // Groups of 32 inputs, and of 8, which are filled up.
        (Format::Int8 { groups: 8 }, Layout::InOut),
        (Format::Int8 { groups: 32 }, Layout::InOut),
    ];
    let matrices = formats.map(|(format, layout)| TestMatrix::random(&mut random, (1, hidden, ffn), format, layout));
    let router = TestMatrix::random(&mut random, (1, hidden, 1), Format::F32, Layout::InOut);
    let x = random.floats(rows * hidden, 1.0);
    for precision in [Precision::Exact, Precision::Fast] {
        for backend in &mut backends_of(precision) {
            for (gate, up) in matrices.iter().flat_map(|gate| matrices.iter().map(move |up| (gate, up))) {
                let (gates, ups) = (product(backend, gate, rows, &x), product(backend, up, rows, &x));
                let want: Vec<f32> = gates.iter().zip(&ups).map(|(gate, up)| super::math::gelu(*gate) * up).collect();
                let mut load = |matrix: &TestMatrix| backend.load_matrix(matrix, &mut |_| ()).unwrap();
                let (router, gate_matrix, up_matrix) = (load(&router), load(gate), load(up));
                let input = upload(backend, &single_tokens(rows), hidden, &x);
                let mut selection = backend.selection(rows, 1).unwrap();
                let mut inner = backend.activations(rows, ffn).unwrap();
                backend.route(&input, &router, &mut selection);
                backend.expert_gate_up(&input, &selection, &gate_matrix, &up_matrix, &mut inner);
                let got = download(backend, &inner, rows);
                let shape = (precision, gate.spec.format, up.spec.format);
                compare_bits("gate and up", &shape, &backend.info().name.clone(), seed, &got, &want);
            }
        }
    }
}

#[test]
fn rows_of_every_format_and_precision_alone_and_in_chunks_have_the_same_bits() {
    for precision in [Precision::Exact, Precision::Fast] {
        for backend in &mut backends_of(precision) {
            check_rows_in_chunks(backend);
        }
    }
}

#[test]
fn an_input_that_is_no_number_is_not_hidden_by_rounding() {
    let mut random = Random::new(5);
    let matrix = TestMatrix::random(&mut random, (1, 64, 16), Format::Int8 { groups: 1 }, Layout::InOut);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![0.5; 64];
        x[40] = bad;
        for backend in &mut backends_of(Precision::Fast) {
            assert!(product(backend, &matrix, 1, &x).iter().all(|value| value.is_nan()), "{bad}");
        }
    }
}

#[test]
fn precisions_have_fingerprints_of_their_own() {
    let of = |precision| CpuBackend::new(1, precision).unwrap().info().fingerprint.clone();
    assert_ne!(of(Precision::Exact), of(Precision::Fast));
}

//! Prefill `fast` held to the references, on adapters that have cooperative matrices; on others tests say that they are skipped,
//! or fail with COOPERATIVE_REQUIRED set.
//!
//! Bound of a result, 1.25 * 2^-10 of the sum of its products' magnitudes: rows and weights are rounded to halves, 2^-11 of each number
//! at most, and a quarter more is for sums in f32, whose order and rounding are the device's (2^-13 or less for some thousand inputs).
//! Of both numbers what is far below the largest of its row or matrix, by 2^-29, may be lost as a subnormal half.

use grokpipe_model::{BlockType, Format, Layout, MatrixSpec};

use super::{
    GpuBackend, GpuOptions,
    cooperative::{Cooperative, Edge, ROWS_MIN},
    format::Held,
    pipelines::CooperativeVariant,
    rounded::Rounding,
    shaders,
    tests::{open, open_with},
    trial::WholeNumbers,
};
use crate::{
    Backend, DeviceInfo, Precision, Prefill, check_batch_invariance,
    ops::{
        gated_gelu::cpu::gelu,
        quantise,
        testing::{Random, TestMatrix, compare_bits, download, seed, single_tokens, upload},
    },
};

/// Error of a result for each 1 of its products' magnitudes.
const BOUND: f64 = 1.25 / 1024.0;

fn options() -> GpuOptions {
    GpuOptions { prefill: Prefill::Fast, ..GpuOptions::default() }
}

fn open_fast(options: &GpuOptions) -> Option<GpuBackend> {
    let backend = open_with(options)?;
    if backend.cooperative.is_none() {
        assert!(std::env::var_os("COOPERATIVE_REQUIRED").is_none(), "cooperative matrices are not used");
        println!("skipped: {} has no cooperative matrices", backend.info().name);
        return None;
    }
    Some(backend)
}

/// A backend for each way in which the kernels can share their work, the device's own first.
fn ways() -> Vec<GpuBackend> {
    let Some(own) = open_fast(&options()) else { return Vec::new() };
    let Some(cooperative) = own.cooperative else { return Vec::new() };
    // Half of the subgroups, each with two units one after the other.
    let mut others = vec![Cooperative { threads: cooperative.threads / 2, ..cooperative }];
    // The matrices that hardware has. Mesa's software adapter, whose subgroups have 8 threads, multiplies them too, although it does
    // not list them.
    if own.software && own.info().name.contains("llvmpipe") {
        others.extend([32, 16].map(|threads| Cooperative { edge: Edge::Sixteen, threads }));
    }
    let other = |way| open_fast(&options()).map(|backend| GpuBackend { cooperative: Some(way), ..backend });
    std::iter::once(own).chain(others.into_iter().filter_map(other)).collect()
}

/// Every format with inputs and groups that suit it or cut the kernels' steps.
fn formats() -> impl Iterator<Item = (Format, Layout, usize)> {
    let int8 = [(1, 64), (1, 17), (1, 2048), (8, 96), (3, 51), (4, 100), (8, 1024)];
    let int8 = int8.map(|(groups, inputs)| (Format::Int8 { groups }, Layout::InOut, inputs));
    let floats = [1, 7, 33, 64, 514].map(|inputs| (Format::F32, Layout::OutIn, inputs));
    let blocks = BlockType::all().map(|kind| {
        let inputs = if kind.weights() == 1 { 39 } else { 3 * kind.weights() };
        (Format::Blocks(kind), Layout::OutIn, inputs)
    });
    int8.into_iter().chain(floats).chain(blocks)
}

/// Weights as numbers, for references of many rows.
struct Dense {
    spec: MatrixSpec,
    weights: Vec<f64>,
}

impl Dense {
    fn new(matrix: &TestMatrix) -> Self {
        let MatrixSpec { experts, inputs, outputs, .. } = matrix.spec;
        let places = (0..experts).flat_map(|e| (0..outputs).flat_map(move |n| (0..inputs).map(move |k| (e, k, n))));
        Self { spec: matrix.spec.clone(), weights: places.map(|(e, k, n)| matrix.at(e, k, n)).collect() }
    }

    /// The product of a row with a column, and the sum of its terms' magnitudes.
    fn product(&self, row: &[f32], expert: usize, n: usize) -> [f64; 2] {
        let column = &self.weights[(expert * self.spec.outputs + n) * self.spec.inputs..][..self.spec.inputs];
        let terms = || row.iter().zip(column).map(|(&x, w)| f64::from(x) * w);
        [terms().sum(), terms().map(f64::abs).sum()]
    }
}

/// Panics where a result is further from its reference than is allowed there; `want` has both.
fn compare(op: &str, shape: &dyn std::fmt::Debug, device: &str, seed: u64, got: &[f32], want: &[[f64; 2]]) {
    assert_eq!(got.len(), want.len(), "{op} {shape:?} on {device}, seed {seed}: length");
    for (index, (&got, &[want, allowed])) in got.iter().zip(want).enumerate() {
        let difference = (f64::from(got) - want).abs();
        assert!(
            difference <= allowed,
            "{op} {shape:?} on {device}, seed {seed}: at {index} got {got}, want {want}, {difference} > {allowed}"
        );
    }
}

fn product(backend: &mut GpuBackend, matrix: &TestMatrix, rows: usize, x: &[f32], factor: f32) -> Vec<f32> {
    let w = backend.load_matrix(matrix, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(rows), matrix.spec.inputs, x);
    let mut out = backend.activations(rows, matrix.spec.outputs).unwrap();
    backend.matmul(&input, &w, factor, &mut out);
    download(backend, &out, rows)
}

fn check_matmul(backend: &mut GpuBackend, seed: u64, matrix: &TestMatrix, x: &[f32], rows: usize) {
    let (dense, factor) = (Dense::new(matrix), 0.577_350_26);
    let outputs = matrix.spec.outputs;
    let want: Vec<_> = x
        .chunks(matrix.spec.inputs)
        .flat_map(|row| (0..outputs).map(|n| dense.product(row, 0, n)).collect::<Vec<_>>())
        .map(|[sum, magnitude]| [f64::from(factor) * sum, f64::from(factor) * BOUND * magnitude])
        .collect();
    let got = product(backend, matrix, rows, x, factor);
    let shape = (rows, matrix.spec.inputs, outputs, matrix.spec.format);
    compare("matmul", &shape, &backend.info().name.clone(), seed, &got, &want);
}

#[test]
fn cooperative_products_keep_to_the_reference() {
    let seed = seed(41);
    for (way, mut backend) in ways().into_iter().enumerate() {
        let mut random = Random::new(seed);
        for (format, layout, inputs) in formats() {
            // Ways differ by how rows and columns are shared out, which the first shape has all of.
            for (rows, outputs) in [(65, 130), (33, 1), (ROWS_MIN, 64)].into_iter().take(if way == 0 { 3 } else { 1 }) {
                let matrix = TestMatrix::random(&mut random, (1, inputs, outputs), format, layout);
                let x = random.floats(rows * inputs, 1.7);
                check_matmul(&mut backend, seed, &matrix, &x, rows);
            }
        }
    }
}

/// Steps of few rows round inputs to 8 bits, those of many do not.
#[test]
fn cooperative_products_are_the_same_in_both_precisions() {
    let fast = GpuOptions { precision: Precision::Fast, ..options() };
    let (Some(mut exact), Some(mut fast)) = (open_fast(&options()), open_fast(&fast)) else { return };
    let format = Format::Blocks(BlockType::Q4_0);
    let [(few, few_fast), (many, many_fast)] =
        [1, 40].map(|rows| (layer(&mut exact, format, rows), layer(&mut fast, format, rows)));
    compare_bits("layer", &format, "both precisions", 5, &many_fast, &many);
    assert_ne!(few, few_fast);
}

/// Rows of every size beside each other: beyond halves, tiny, and zeros.
#[test]
fn large_and_small_rows_are_neither_infinite_nor_lost() {
    let Some(mut backend) = open_fast(&options()) else { return };
    let seed = seed(42);
    let mut random = Random::new(seed);
    for format in [Format::F32, Format::Int8 { groups: 1 }, Format::Int8 { groups: 5 }] {
        let matrix = TestMatrix::random(&mut random, (1, 95, 70), format, Layout::InOut);
        let sizes = [1.0e6, 1.0e30, 1.0, 1.0e-6, 1.0e-30, 0.0];
        let x: Vec<f32> = (0..36).flat_map(|row| random.floats(95, sizes[row % 6])).collect();
        check_matmul(&mut backend, seed, &matrix, &x, 36);
    }
}

/// Weights that halves cannot hold are multiplied by a power of two.
#[test]
fn large_and_small_weights_are_neither_infinite_nor_lost() {
    let Some(mut backend) = open_fast(&options()) else { return };
    let seed = seed(43);
    let mut random = Random::new(seed);
    for size in [1.0e7f32, 1.0e-7] {
        let mut floats = TestMatrix::random(&mut random, (1, 64, 70), Format::F32, Layout::OutIn);
        for number in floats.bytes.as_chunks_mut::<4>().0 {
            *number = (f32::from_le_bytes(*number) * size).to_le_bytes();
        }
        let mut bytes = TestMatrix::random(&mut random, (1, 64, 70), Format::Int8 { groups: 4 }, Layout::InOut);
        bytes.scales.iter_mut().for_each(|scale| *scale *= size);
        for matrix in [floats, bytes] {
            let x = random.floats(40 * 64, 1.7);
            check_matmul(&mut backend, seed, &matrix, &x, 40);
        }
    }
}

#[test]
fn a_row_that_is_no_number_stays_so_and_does_not_touch_others() {
    let Some(mut backend) = open_fast(&options()) else { return };
    let matrix = TestMatrix::random(&mut Random::new(5), (1, 64, 70), Format::Int8 { groups: 1 }, Layout::InOut);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![0.5; 40 * 64];
        x[20 * 64 + 40] = bad;
        let got = product(&mut backend, &matrix, 40, &x, 1.0);
        for (index, value) in got.iter().enumerate() {
            assert_eq!(value.is_nan(), index / 70 == 20, "{bad}: {value} at {index}");
        }
    }
}

#[test]
fn rows_as_halves_are_the_references() {
    let Some(mut backend) = open(None) else { return };
    let seed = seed(44);
    let mut random = Random::new(seed);
    for width in [1, 67, 130] {
        let mut x: Vec<f32> = (0..40).flat_map(|row| random.floats(width, 10f32.powi(row - 20))).collect();
        x[..width].fill(0.0);
        let input = upload(&mut backend, &single_tokens(40), width, &x);
        backend.rounded.make(&mut backend.memory, &mut backend.recorder, Rounding::Halves, &input, 40);
        let [halves, factors] = backend.rounded.bindings(Rounding::Halves, &input);
        let words = width.div_ceil(4) * 2;
        let read = backend.recorder.read_back::<u32>(&[(halves, 40 * words), (factors, 40)]).unwrap();
        let found: &[u16] = bytemuck::cast_slice(&read[0]);
        for (index, row) in x.chunks(width).enumerate() {
            let (numbers, factor) = quantise::cpu::halves(row);
            let mut want: Vec<u16> = numbers.into_iter().map(half::f16::to_bits).collect();
            want.resize(2 * words, 0);
            assert_eq!(found[index * 2 * words..][..2 * words], want, "row {index} of {width}, seed {seed}");
            assert_eq!(f32::from_bits(read[1][index]), factor, "row {index} of {width}, seed {seed}");
        }
    }
}

/// An adapter may list what its driver refuses or does otherwise; then the portable kernels are used, and nothing fails.
#[test]
fn cooperative_matrices_that_do_not_work_are_not_used() {
    let Some(mut backend) = open_fast(&options()) else { return };
    let Some(cooperative) = backend.cooperative else { return };
    let matrix = WholeNumbers::new([1, 100, 70], 1, 1.0);
    let matrix = backend.load_matrix(&matrix, &mut |_| ()).unwrap();
    let variant = GpuBackend::cooperative_variant(&matrix, cooperative);
    let [matmul, gated_gelu, expert_down] = match cooperative.edge {
        Edge::Eight => {
            [shaders::MATMUL_COOPERATIVE_8, shaders::GATED_GELU_COOPERATIVE_8, shaders::EXPERT_DOWN_COOPERATIVE_8]
        }
        Edge::Sixteen => {
            [shaders::MATMUL_COOPERATIVE_16, shaders::GATED_GELU_COOPERATIVE_16, shaders::EXPERT_DOWN_COOPERATIVE_16]
        }
    };
    let [of_matmul, of_gated_gelu, with_gate_there, of_expert_down, _] = variant.kernels();
    let breaks = [
        // Rows and columns of the weights changed for each other, rows that are not those, products that are left out.
        (of_matmul, matmul, "let left = coopLoad<WeightTile>", "let left = coopLoadT<WeightTile>"),
        (
            of_matmul,
            matmul,
            "let lower = coopLoadT<RowTile>(&staged_x[corner.x + EDGE * STRIDE + quad], STRIDE)",
            "let lower = upper",
        ),
        (of_matmul, matmul, "d = coopMultiplyAdd(lower, right, d);", ""),
        // Gates that are not there, ups in their place, gelus that are left out, gates that were there, another expert's weights.
        (of_gated_gelu, gated_gelu, "hidden[at] = sum;", ""),
        (of_gated_gelu, gated_gelu, "gelu(hidden[at]) * sum", "gelu(sum) * sum"),
        (with_gate_there, gated_gelu, "gelu(hidden[at]) * sum", "hidden[at] * sum"),
        (with_gate_there, gated_gelu, "if !GATE_IS_THERE", "if true"),
        (of_expert_down, expert_down, "expert * params.blocks", "params.blocks"),
        (of_expert_down, expert_down, "c = coopMultiplyAdd(lower, left, c);", ""),
    ];
    // The driver refuses it.
    let each = [
        (of_matmul, matmul),
        (of_gated_gelu, gated_gelu),
        (with_gate_there, gated_gelu),
        (of_expert_down, expert_down),
    ];
    let refused = each.map(|(kernel, shader)| {
        (kernel, shader, "let corner = corner_of(first + member.subgroup) * STRIDE;", "let corner = none;")
    });
    for (kernel, whole, right, wrong) in breaks.into_iter().chain(refused) {
        let source = whole.source();
        assert!(source.contains(right), "{right}");
        backend.recorder.replace(kernel, whole.with_text(source.replace(right, wrong)));
        backend.try_cooperative(cooperative).unwrap();
        assert_eq!(backend.cooperative, None, "{kernel:?}: {wrong}");
        backend.recorder.replace(kernel, whole);
    }
    for mut backend in ways() {
        let cooperative = backend.cooperative;
        cooperative.map(|cooperative| backend.try_cooperative(cooperative)).transpose().unwrap();
        assert_eq!(backend.cooperative, cooperative);
    }
}

/// The trial has one format; the driver may refuse a kernel of another when that is loaded, with matrices of others there already.
#[test]
fn a_format_whose_kernels_are_refused_leaves_the_usual_ones() {
    let Some(mut usual) = open(None) else { return };
    let format = Format::Blocks(BlockType::Q6K);
    let want = layer(&mut usual, format, 40);
    // Experts are loaded first, then the head.
    let (experts, head) = (Held::of(format), Held::of(Format::F32));
    for (held, index) in (0..5).map(|index| (experts, index)).chain([(head, 0)]) {
        let Some(mut backend) = open_fast(&options()) else { return };
        let Some(cooperative) = backend.cooperative else { return };
        let kernel = CooperativeVariant { held, whole: true, cooperative }.kernels()[index];
        backend.recorder.replace(kernel, shaders::GATHER.with_text("refused".to_owned()));
        let got = layer(&mut backend, format, 40);
        compare_bits("layer", &kernel, "usual kernels", 5, &got, &want);
        assert_eq!(backend.info(), &DeviceInfo { memory_bytes: backend.info().memory_bytes, ..usual.info().clone() });
    }
}

/// Rows of `width` whose first numbers have a router of ones choose expert `of(row, 0)`, then `of(row, 1)`.
fn choosing(
    random: &mut Random,
    [rows, width, experts]: [usize; 3],
    chosen: usize,
    of: fn(usize, usize) -> usize,
) -> Vec<f32> {
    let mut x = random.floats(rows * width, 1.7);
    for (row, x) in x.chunks_mut(width).enumerate() {
        x[..experts].fill(0.0);
        (0..chosen).for_each(|j| x[of(row, j)] = 9.0 - j as f32);
    }
    x
}

/// A router that chooses by the first inputs.
fn router(inputs: usize, experts: usize) -> TestMatrix {
    let mut router = TestMatrix::random(&mut Random::new(1), (1, inputs, experts), Format::F32, Layout::InOut);
    let ones = (0..inputs).flat_map(|k| (0..experts).map(move |n| if k == n { 1.0f32 } else { 0.0 }));
    router.bytes = ones.flat_map(f32::to_le_bytes).collect();
    router
}

/// Pairs by expert: one, one, many, many, and none of the others.
fn uneven(row: usize, j: usize) -> usize {
    j + if row == 5 { 0 } else { 2 }
}

/// All experts in turn.
fn even(row: usize, j: usize) -> usize {
    (row + 3 * j) % 8
}

/// Each row has the one expert.
fn only(_: usize, _: usize) -> usize {
    0
}

fn check_experts(
    backend: &mut GpuBackend,
    seed: u64,
    (format, layout, inputs): (Format, Layout, usize),
    shape: [usize; 4],
    of: fn(usize, usize) -> usize,
) {
    check_formats(backend, seed, ([(format, layout); 3], inputs), shape, of);
}

/// Experts whose gate, up and down have these formats.
fn check_formats(
    backend: &mut GpuBackend,
    seed: u64,
    (formats, inputs): ([(Format, Layout); 3], usize),
    [rows, outputs, experts, chosen]: [usize; 4],
    of: fn(usize, usize) -> usize,
) {
    let mut random = Random::new(seed);
    let device = backend.info().name.clone();
    let shape = (experts, inputs, outputs);
    let matrices = formats.map(|(format, layout)| TestMatrix::random(&mut random, shape, format, layout));
    let [gate, up, down] = matrices.each_ref().map(|matrix| backend.load_matrix(matrix, &mut |_| ()).unwrap());
    backend.pair_experts(&gate, &up).unwrap();
    let dense = matrices.each_ref().map(Dense::new);
    let chooser = backend.load_router(&router(16, experts), &mut |_| ()).unwrap();
    let choices = choosing(&mut random, [rows, 16, experts], chosen, of);
    let (x, hidden) = (random.floats(rows * inputs, 1.7), random.floats(rows * chosen * inputs, 1.7));
    let batch = single_tokens(rows);
    let [choices, hiddens, input] =
        [(&choices, 16), (&hidden, inputs), (&x, inputs)].map(|(x, width)| upload(backend, &batch, width, x));
    let mut selection = backend.selection(rows, chosen).unwrap();
    let mut products = backend.activations(rows * chosen, outputs).unwrap();
    let mut sums = backend.activations(rows, outputs).unwrap();
    backend.route(&choices, &chooser, &mut selection);
    backend.expert_gate_up(&input, &selection, &gate, &up, &mut products);
    backend.expert_down(&hiddens, &selection, &down, &mut sums);
    let got = backend.finish(&[(&products, rows * chosen), (&sums, rows)]).unwrap();
    let (ids, probabilities) = backend.read_selection(&selection, rows).unwrap();
    let ids_wanted: Vec<_> = (0..rows * chosen).map(|pair| of(pair / chosen, pair % chosen) as u32).collect();
    assert_eq!(ids, ids_wanted);
    let [gate, up, down] = dense;
    let (mut of_products, mut of_sums) = (Vec::new(), vec![[0.0; 2]; rows * outputs]);
    for (pair, &expert) in ids.iter().enumerate() {
        let (row, expert) = (pair / chosen, expert as usize);
        for n in 0..outputs {
            let [g, u] = [&gate, &up].map(|matrix| matrix.product(&x[row * inputs..][..inputs], expert, n));
            // A gelu is no steeper than 1.13.
            let (error_of_gate, error_of_up) = (1.13 * BOUND * g[1], BOUND * u[1]);
            let allowed = error_of_gate * (u[0].abs() + error_of_up) + gelu(g[0]).abs() * error_of_up;
            of_products.push([gelu(g[0]) * u[0], allowed + 1e-6]);
            let [sum, magnitude] = down.product(&hidden[pair * inputs..][..inputs], expert, n);
            let probability = f64::from(probabilities[pair]);
            let total = &mut of_sums[row * outputs + n];
            *total = [total[0] + probability * sum, total[1] + probability * BOUND * magnitude];
        }
    }
    let shape = (rows, inputs, outputs, experts, formats);
    compare("gated_gelu", &shape, &device, seed, &got[0], &of_products);
    compare("expert_down", &shape, &device, seed, &got[1], &of_sums);
}

#[test]
fn cooperative_experts_keep_to_the_reference() {
    let seed = seed(45);
    let int8 = (Format::Int8 { groups: 1 }, Layout::InOut, 96);
    let blocks = (Format::Blocks(BlockType::Q4K), Layout::OutIn, 256);
    for (way, mut backend) in ways().into_iter().enumerate() {
        for shape in formats().filter(|(_, _, inputs)| way == 0 && *inputs < 1024) {
            check_experts(&mut backend, seed, shape, [33, 70, 8, 2], uneven);
        }
        for shape in [int8, blocks] {
            for (rows, of) in [(ROWS_MIN, even as fn(_, _) -> _), (65, even), (131, uneven)] {
                check_experts(&mut backend, seed, shape, [rows, 66, 8, 2], of);
            }
            check_experts(&mut backend, seed, shape, [65, 66, 1, 1], only);
        }
    }
}

#[test]
fn cooperative_experts_whose_gate_and_up_are_held_differently_keep_to_the_reference() {
    let seed = seed(46);
    let blocks = |kind| (Format::Blocks(kind), Layout::OutIn);
    let int8 = |groups| (Format::Int8 { groups }, Layout::InOut);
    let mixed = [
        [blocks(BlockType::Q4K), blocks(BlockType::Q6K), blocks(BlockType::Q4K)],
        [int8(8), blocks(BlockType::Q8_0), int8(1)],
        [(Format::F32, Layout::OutIn), int8(3), int8(8)],
    ];
    let cut = GpuOptions { max_shard_bytes: Some(70_000), ..options() };
    for mut backend in [options(), cut].iter().filter_map(open_fast) {
        for formats in mixed {
            let inputs = if formats.contains(&int8(3)) { 96 } else { 256 };
            check_formats(&mut backend, seed, (formats, inputs), [65, 70, 8, 2], uneven);
        }
    }
}

/// All that steps of many rows compute of weights: experts, their sum, and a product.
fn layer(backend: &mut GpuBackend, format: Format, rows: usize) -> Vec<f32> {
    let layout = if matches!(format, Format::Blocks(_)) { Layout::OutIn } else { Layout::InOut };
    let mut random = Random::new(5);
    let shapes = [(8, 256, 264), (8, 256, 264), (8, 256, 264), (1, 264, 301)];
    let formats = [format, format, format, Format::F32];
    let [gate, up, down, head] = std::array::from_fn(|i| {
        let matrix = TestMatrix::random(&mut random, shapes[i], formats[i], layout);
        backend.load_matrix(&matrix, &mut |_| ()).unwrap()
    });
    let chooser = backend.load_router(&router(256, 8), &mut |_| ()).unwrap();
    let x = choosing(&mut random, [rows, 256, 8], 2, even);
    let hidden = random.floats(rows * 2 * 256, 1.0);
    let hidden = upload(backend, &single_tokens(rows), 256, &hidden);
    let input = upload(backend, &single_tokens(rows), 256, &x);
    let mut selection = backend.selection(rows, 2).unwrap();
    let mut inner = backend.activations(rows * 2, 264).unwrap();
    let mut out = backend.activations(rows, 264).unwrap();
    let mut logits = backend.activations(rows, 301).unwrap();
    backend.route(&input, &chooser, &mut selection);
    backend.expert_gate_up(&input, &selection, &gate, &up, &mut inner);
    backend.expert_down(&hidden, &selection, &down, &mut out);
    backend.matmul(&out, &head, 0.5, &mut logits);
    backend.finish(&[(&inner, rows * 2), (&logits, rows)]).unwrap().concat()
}

#[test]
fn shards_do_not_show_in_prefill_fast() {
    let Some(mut whole) = open_fast(&options()) else { return };
    // One block of columns a shard, one expert in parts, some experts a shard.
    let cut = [70_000, 150_000, 400_000].map(|bytes| GpuOptions { max_shard_bytes: Some(bytes), ..options() });
    for format in [Format::F32, Format::Int8 { groups: 8 }, Format::Blocks(BlockType::Q4K)] {
        let want = layer(&mut whole, format, 40);
        for (index, options) in cut.iter().enumerate() {
            let Some(mut backend) = open_fast(options) else { return };
            let got = layer(&mut backend, format, 40);
            compare_bits("layer", &(format, index), "shards", 5, &got, &want);
        }
    }
}

#[test]
fn steps_of_few_rows_have_the_bits_that_they_have_without_it() {
    let (Some(mut invariant), Some(mut fast)) = (open(None), open_fast(&options())) else { return };
    for rows in [1, 9, ROWS_MIN - 1] {
        let format = Format::Blocks(BlockType::Q6K);
        let (want, got) = (layer(&mut invariant, format, rows), layer(&mut fast, format, rows));
        compare_bits("layer", &(format, rows), "few rows", 5, &got, &want);
    }
    let (want, got) = (layer(&mut invariant, Format::F32, ROWS_MIN), layer(&mut fast, Format::F32, ROWS_MIN));
    assert_ne!(want, got, "steps of many rows are made otherwise");
}

#[test]
fn prefill_fast_is_batch_invariant_below_its_rows_and_says_so() {
    let Some(mut backend) = open_fast(&options()) else { return };
    assert_eq!(backend.info().invariant_below, Some(ROWS_MIN));
    assert_eq!(check_batch_invariance(&mut backend).unwrap().difference, None);
    let invariant = open(None).unwrap();
    let said = [&backend, &invariant].map(|backend| Prefill::of_fingerprint(&backend.info().fingerprint));
    assert_eq!(said, [Prefill::Fast, Prefill::Invariant]);
}

#[test]
fn without_cooperative_matrices_prefill_fast_is_the_usual_one() {
    let (Some(mut usual), Some(mut asked)) = (open(None), open_with(&options())) else { return };
    if asked.cooperative.is_some() {
        return println!("skipped: {} has cooperative matrices", asked.info().name);
    }
    let kind = |backend: &GpuBackend| (backend.info().fingerprint.clone(), backend.info().invariant_below);
    assert_eq!(kind(&asked), kind(&usual));
    let format = Format::Int8 { groups: 8 };
    let (want, got) = (layer(&mut usual, format, 40), layer(&mut asked, format, 40));
    compare_bits("layer", &format, "no cooperative matrices", 5, &got, &want);
}

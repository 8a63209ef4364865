//! Bound 1e-5 of the largest result: two products as in `matmul`, multiplied, and a `tanh` near 0 whose argument has their error.

use grokpipe_model::{BlockType, Format, Layout};

use super::{Params, cpu::expert_gate_up};
use crate::{
    Backend,
    ops::testing::{Bound, Random, TestMatrix, compare, download, seed, single_tokens, upload},
};

const BOUND: Bound = Bound { absolute: 1e-6, relative: 1e-5 };

/// Holds a device to the reference. `size` makes the gates' values: up to 50 and more in the last case.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let seed = seed(14);
    let mut random = Random::new(seed);
    for (rows, inputs, outputs, size) in
        [(1, 16, 16, 1.0), (1, 17, 5, 1.0), (5, 64, 88, 1.7), (33, 96, 24, 1.7), (2, 64, 130, 60.0), (9, 31, 33, 100.0)]
    {
        let int8 = (Format::Int8 { groups: 1 }, Layout::InOut);
        check_one(backend, &mut random, seed, (rows, inputs, outputs), size, int8);
    }
    for (rows, inputs, outputs) in [(1, 7, 5), (9, 66, 70)] {
        check_one(backend, &mut random, seed, (rows, inputs, outputs), 1.7, (Format::F32, Layout::OutIn));
    }
    for kind in BlockType::all() {
        for (rows, blocks, outputs) in [(1, 2, 5), (9, 1, 70)] {
            let shape = (rows, blocks * kind.weights(), outputs);
            check_one(backend, &mut random, seed, shape, 1.7, (Format::Blocks(kind), Layout::OutIn));
        }
    }
    let blocks = |kind| (Format::Blocks(kind), Layout::OutIn);
    let int8 = (Format::Int8 { groups: 8 }, Layout::InOut);
    let mixed = [
        [blocks(BlockType::Q4K), blocks(BlockType::Q6K)],
        [blocks(BlockType::Q8_0), (Format::F32, Layout::OutIn)],
        [(Format::F32, Layout::InOut), int8],
        [int8, (Format::Int8 { groups: 1 }, Layout::InOut)],
    ];
    for formats in mixed {
        for (rows, outputs) in [(1, 5), (9, 70)] {
            check_formats(backend, &mut random, seed, (rows, 256, outputs), 1.7, formats);
        }
    }
}

fn check_one<B: Backend>(
    backend: &mut B,
    random: &mut Random,
    seed: u64,
    shape: (usize, usize, usize),
    size: f32,
    format: (Format, Layout),
) {
    check_formats(backend, random, seed, shape, size, [format; 2]);
}

/// The same with formats for gate and up.
fn check_formats<B: Backend>(
    backend: &mut B,
    random: &mut Random,
    seed: u64,
    (rows, inputs, outputs): (usize, usize, usize),
    size: f32,
    formats: [(Format, Layout); 2],
) {
    let device = backend.info().name.clone();
    let shape = (8, inputs, outputs);
    let [gate, up] = formats.map(|(format, layout)| TestMatrix::random(random, shape, format, layout));
    let router = TestMatrix::random(random, (1, inputs, 8), Format::F32, Layout::InOut);
    let x = random.floats(rows * inputs, size);
    let (gates, ups) =
        (backend.load_matrix(&gate, &mut |_| ()).unwrap(), backend.load_matrix(&up, &mut |_| ()).unwrap());
    let w = backend.load_matrix(&router, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(rows), inputs, &x);
    let mut selection = backend.selection(rows, 2).unwrap();
    let mut out = backend.activations(rows * 2, outputs).unwrap();
    backend.route(&input, &w, &mut selection);
    backend.expert_gate_up(&input, &selection, &gates, &ups, &mut out);
    let got = download(backend, &out, rows * 2);
    let (ids, _) = backend.read_selection(&selection, rows).unwrap();
    let params = Params { inputs: inputs as u32, outputs: outputs as u32, groups: 1, chosen: 2 };
    let want = expert_gate_up(params, &x, &ids, &gate, &up);
    compare("expert_gate_up", &(rows, params, size, formats), &device, seed, &got, &want, BOUND);
}

/// Gate values of exactly plus and minus 50, and 0, with `up` 1: 50, 0 and 0, all finite.
pub(crate) fn check_extremes<B: Backend>(backend: &mut B) {
    let spec = |outputs| TestMatrix {
        spec: grokpipe_model::MatrixSpec {
            name: "test".into(),
            experts: 1,
            inputs: 1,
            outputs,
            format: Format::Int8 { groups: 1 },
            layout: Layout::InOut,
        },
        bytes: vec![1; outputs],
        scales: vec![1.0; outputs],
    };
    let mut gate = spec(3);
    gate.bytes = vec![50, -50i8 as u8, 0];
    let mut router = spec(1);
    router.spec.format = Format::F32;
    router.bytes = 0f32.to_le_bytes().to_vec();
    router.scales.clear();
    let gates = backend.load_matrix(&gate, &mut |_| ()).unwrap();
    let ups = backend.load_matrix(&spec(3), &mut |_| ()).unwrap();
    let w = backend.load_matrix(&router, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(1), 1, &[1.0]);
    let mut selection = backend.selection(1, 1).unwrap();
    let mut out = backend.activations(1, 3).unwrap();
    backend.route(&input, &w, &mut selection);
    backend.expert_gate_up(&input, &selection, &gates, &ups, &mut out);
    let got = download(backend, &out, 1);
    let device = backend.info().name.clone();
    compare("expert_gate_up", &"gates of 50, -50 and 0", &device, 0, &got, &[50.0, 0.0, 0.0], BOUND);
}

#[test]
fn cpu_paths_keep_to_the_reference() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

#[test]
fn gates_of_fifty_are_finite() {
    crate::cpu::tests::backends().iter_mut().for_each(check_extremes);
}

//! Bound 4e-6 of the largest result: products of unit variance summed in 16 lanes of f32; the error of a sum of `n` terms in
//! lanes is below `n / 16` roundings of its largest part, in the mean the root of that.

use grokpipe_model::{BlockType, Format, Layout};

use super::{Params, cpu::matmul};
use crate::{
    Backend,
    ops::testing::{Bound, Random, TestMatrix, compare, download, seed, single_tokens, upload},
};

const BOUND: Bound = Bound { absolute: 1e-6, relative: 4e-6 };

/// Rows, inputs, outputs, groups.
const INT8: [(usize, usize, usize, usize); 10] = [
    (1, 1, 1, 1),
    (1, 88, 64, 8),
    (2, 96, 64, 8),
    (3, 64, 64, 8),
    (5, 17, 13, 1),
    (7, 255, 129, 1),
    (33, 64, 88, 1),
    (1, 2048, 96, 8),
    (64, 100, 50, 4),
    (1, 6144, 70, 1),
];
const F32: [(usize, usize, usize); 6] = [(1, 1, 1), (2, 7, 5), (3, 64, 8), (5, 96, 129), (33, 65, 33), (1, 6144, 8)];

/// Rows, blocks a row, outputs.
const BLOCKS: [(usize, usize, usize); 4] = [(1, 1, 1), (2, 3, 5), (7, 2, 67), (33, 4, 130)];

/// Holds a device to the reference.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let seed = seed(12);
    let mut random = Random::new(seed);
    for layout in [Layout::InOut, Layout::OutIn] {
        for (rows, inputs, outputs, groups) in INT8 {
            check_one(backend, &mut random, seed, (rows, inputs, outputs), Format::Int8 { groups }, layout);
        }
        for shape in F32 {
            check_one(backend, &mut random, seed, shape, Format::F32, layout);
        }
    }
    for kind in BlockType::all() {
        for (rows, blocks, outputs) in BLOCKS {
            let shape = (rows, blocks * kind.weights(), outputs);
            check_one(backend, &mut random, seed, shape, Format::Blocks(kind), Layout::OutIn);
        }
    }
}

fn check_one<B: Backend>(
    backend: &mut B,
    random: &mut Random,
    seed: u64,
    (rows, inputs, outputs): (usize, usize, usize),
    format: Format,
    layout: Layout,
) {
    let device = backend.info().name.clone();
    let matrix = TestMatrix::random(random, (1, inputs, outputs), format, layout);
    let x = random.floats(rows * inputs, 1.7);
    let groups = if let Format::Int8 { groups } = format { groups } else { 1 };
    let factor = 0.577_350_26;
    let params = Params { inputs: inputs as u32, outputs: outputs as u32, groups: groups as u32, factor };
    let w = backend.load_matrix(&matrix, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(rows), inputs, &x);
    let mut out = backend.activations(rows, outputs).unwrap();
    backend.matmul(&input, &w, factor, &mut out);
    let got = download(backend, &out, rows);
    let shape = (rows, inputs, outputs, format, layout);
    compare("matmul", &shape, &device, seed, &got, &matmul(params, &matrix, 0, &x), BOUND);
}

#[test]
fn cpu_paths_keep_to_the_reference() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

//! Bound 5e-6 of the largest result: products as in `matmul`, two of them added with weights below 1.

use grokpipe_model::{BlockType, Format, Layout};

use super::{Params, cpu::expert_down};
use crate::{
    Backend,
    ops::testing::{Bound, Random, TestMatrix, compare, download, seed, single_tokens, upload},
};

const BOUND: Bound = Bound { absolute: 1e-6, relative: 5e-6 };

/// Holds a device to the reference.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let seed = seed(15);
    let mut random = Random::new(seed);
    for (rows, inputs, outputs, groups) in
        [(1, 16, 16, 1), (1, 88, 64, 8), (5, 96, 64, 8), (33, 24, 96, 1), (3, 17, 5, 1), (7, 129, 33, 3)]
    {
        let int8 = (Format::Int8 { groups }, Layout::InOut);
        check_one(backend, &mut random, seed, (rows, inputs, outputs, groups), int8);
    }
    for (rows, inputs, outputs) in [(1, 7, 5), (9, 66, 70)] {
        check_one(backend, &mut random, seed, (rows, inputs, outputs, 1), (Format::F32, Layout::OutIn));
    }
    for kind in BlockType::all() {
        for (rows, blocks, outputs) in [(1, 2, 5), (9, 1, 70)] {
            let shape = (rows, blocks * kind.weights(), outputs, 1);
            check_one(backend, &mut random, seed, shape, (Format::Blocks(kind), Layout::OutIn));
        }
    }
}

fn check_one<B: Backend>(
    backend: &mut B,
    random: &mut Random,
    seed: u64,
    (rows, inputs, outputs, groups): (usize, usize, usize, usize),
    (format, layout): (Format, Layout),
) {
    let device = backend.info().name.clone();
    let down = TestMatrix::random(random, (8, inputs, outputs), format, layout);
    let router = TestMatrix::random(random, (1, 16, 8), Format::F32, Layout::InOut);
    let hidden = random.floats(rows * 2 * inputs, 1.7);
    let x = random.floats(rows * 16, 3.0);
    let matrix = backend.load_matrix(&down, &mut |_| ()).unwrap();
    let w = backend.load_matrix(&router, &mut |_| ()).unwrap();
    let batch = single_tokens(rows);
    let hiddens = upload(backend, &batch, inputs, &hidden);
    let input = upload(backend, &batch, 16, &x);
    let mut selection = backend.selection(rows, 2).unwrap();
    let mut out = backend.activations(rows, outputs).unwrap();
    backend.route(&input, &w, &mut selection);
    backend.expert_down(&hiddens, &selection, &matrix, &mut out);
    let got = download(backend, &out, rows);
    let (ids, probabilities) = backend.read_selection(&selection, rows).unwrap();
    let params = Params { inputs: inputs as u32, outputs: outputs as u32, groups: groups as u32, chosen: 2 };
    let want = expert_down(params, &hidden, &ids, &probabilities, &down);
    compare("expert_down", &(rows, params, format), &device, seed, &got, &want, BOUND);
}

#[test]
fn cpu_paths_keep_to_the_reference() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

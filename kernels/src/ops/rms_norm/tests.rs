//! Bound 2e-6 of the largest result: one f32 sum of squares in lanes, a root, and two products. A row of large numbers stands
//! beside one of small ones, so an absolute bound would hide the latter; they are compared row by row.

use super::{
    Params,
    cpu::{rms_norm, rms_norm_add},
};
use crate::{
    Backend,
    ops::testing::{Bound, Random, compare, download, seed, single_tokens, upload},
};

const BOUND: Bound = Bound { absolute: 0.0, relative: 2e-6 };
const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 15), (3, 16), (2, 17), (5, 64), (1, 127), (33, 129), (2, 6144)];

/// Holds a device to the reference.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let device = backend.info().name.clone();
    let seed = seed(11);
    let mut random = Random::new(seed);
    for (rows, width) in SHAPES {
        let mut x = random.floats(rows * width, 3.0);
        // The second row is tiny, the third large, the fourth zero.
        for (row, factor) in x.chunks_mut(width).skip(1).zip([1e-4, 1e6, 0.0]) {
            row.iter_mut().for_each(|v| *v *= factor);
        }
        let weight = random.floats(width, 2.0);
        let residual = random.floats(rows * width, 1.0);
        let params = Params { hidden_size: width as u32, epsilon: 1e-5 };
        let batch = single_tokens(rows);
        let scale = backend.load_vector(&weight).unwrap();
        let input = upload(backend, &batch, width, &x);
        let mut out = backend.activations(rows, width).unwrap();
        backend.rms_norm(params.epsilon, &input, &scale, &mut out);
        let got = download(backend, &out, rows);
        let want = rms_norm(params, &x, &weight);
        for (got, want) in got.chunks(width).zip(want.chunks(width)) {
            compare("rms_norm", &(rows, width), &device, seed, got, want, BOUND);
        }

        let mut sum = upload(backend, &batch, width, &residual);
        let input = upload(backend, &batch, width, &x);
        backend.rms_norm_add(params.epsilon, &input, &scale, &mut sum);
        let got = download(backend, &sum, rows);
        let want = rms_norm_add(params, &x, &weight, &residual);
        compare("rms_norm_add", &(rows, width), &device, seed, &got, &want, BOUND);
    }
}

#[test]
fn cpu_paths_keep_to_the_reference() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

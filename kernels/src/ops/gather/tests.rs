//! Bits are copied: no difference is allowed. Row counts follow the rows picked.

use super::{Params, cpu::gather};
use crate::{
    Backend,
    ops::testing::{Random, compare_bits, download, seed, single_tokens, upload},
};

/// Holds a device to the reference.
pub(crate) fn check<B: Backend>(backend: &mut B) {
    let seed = seed(16);
    let mut random = Random::new(seed);
    let device = backend.info().name.clone();
    for (rows, width, picked) in
        [(1, 1, vec![0]), (5, 7, vec![4]), (9, 64, vec![0, 3, 8]), (33, 129, (0..33).collect())]
    {
        let x = random.floats(rows * width, 1.0);
        let input = upload(backend, &single_tokens(rows), width, &x);
        let mut out = backend.activations(picked.len(), width).unwrap();
        backend.gather(&input, &picked, &mut out);
        let got = download(backend, &out, picked.len());
        let want = gather(Params { width: width as u32 }, &x, &picked);
        compare_bits("gather", &(rows, width, picked), &device, seed, &got, &want);
    }
}

#[test]
fn cpu_copies_rows() {
    crate::cpu::tests::backends().iter_mut().for_each(check);
}

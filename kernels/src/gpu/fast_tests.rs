//! Precision `fast` on a GPU, held to the reference of rounding, to the f64 reference, and to the CPU's results.

use grokpipe_model::{BlockType, Format, Layout};

use super::{
    GpuBackend, GpuOptions,
    rounded::Rounding,
    tests::{open, open_with},
};
use crate::{
    Backend, CpuBackend, Precision, check_batch_invariance,
    ops::{
        self,
        testing::{
            Bound, Random, TestMatrix, check_rows_in_chunks, compare, compare_bits, download, seed, single_tokens,
            upload,
        },
    },
};

fn open_fast() -> Option<GpuBackend> {
    open_with(&GpuOptions { precision: Precision::Fast, ..GpuOptions::default() })
}

#[test]
fn in_fast_one_row_alone_and_among_thirty_three_has_the_same_bits() {
    if let Some(mut backend) = open_fast() {
        assert_eq!(check_batch_invariance(&mut backend).unwrap().difference, None);
    }
}

#[test]
fn in_fast_rows_of_every_format_alone_and_in_chunks_have_the_same_bits() {
    if let Some(mut backend) = open_fast() {
        check_rows_in_chunks(&mut backend);
    }
}

fn product(backend: &mut impl Backend, matrix: &TestMatrix, rows: usize, x: &[f32]) -> Vec<f32> {
    let w = backend.load_matrix(matrix, &mut |_| ()).unwrap();
    let input = upload(backend, &single_tokens(rows), matrix.spec.inputs, x);
    let mut out = backend.activations(rows, matrix.spec.outputs).unwrap();
    backend.matmul(&input, &w, 1.0, &mut out);
    download(backend, &out, rows)
}

/// Formats whose numbers are whole, with a layout.
fn whole_numbers() -> impl Iterator<Item = (Format, Layout)> {
    let int8 = [1, 8].map(|groups| (Format::Int8 { groups }, Layout::InOut));
    let blocks = BlockType::all().filter(|kind| kind.weights() > 1);
    int8.into_iter().chain(blocks.map(|kind| (Format::Blocks(kind), Layout::OutIn)))
}

/// Inputs that are whole numbers, the largest of each block 127, lose nothing in 8 bits.
#[test]
fn fast_products_of_whole_numbers_are_the_references() {
    let Some(mut backend) = open_fast() else { return };
    let seed = seed(32);
    let mut random = Random::new(seed);
    for (format, layout) in whole_numbers() {
        for (rows, outputs) in [(1, 16), (7, 70)] {
            let matrix = TestMatrix::random(&mut random, (1, 512, outputs), format, layout);
            let whole = |i: usize, random: &mut Random| {
                if i.is_multiple_of(32) { 127.0 } else { random.below(255) as f32 - 127.0 }
            };
            let x: Vec<f32> = (0..rows * 512).map(|i| whole(i, &mut random)).collect();
            let params = ops::matmul::Params { inputs: 512, outputs: outputs as u32, groups: 1, factor: 1.0 };
            let want = ops::matmul::cpu::matmul(params, &matrix, 0, &x);
            let got = product(&mut backend, &matrix, rows, &x);
            let bound = Bound { absolute: 1e-6, relative: 4e-6 };
            compare("fast matmul", &(rows, outputs, format), &backend.info().name.clone(), seed, &got, &want, bound);
        }
    }
}

/// The inputs are rounded alike and sums of blocks are exact on both; the GPU adds these up in slices, and a device's `fma` may round
/// twice, as that of Mesa's software one.
#[test]
fn fast_products_are_those_of_the_cpu() {
    let Some(mut backend) = open_fast() else { return };
    let mut cpu = CpuBackend::new(1, Precision::Fast).unwrap();
    let seed = seed(33);
    let mut random = Random::new(seed);
    for (format, layout) in whole_numbers() {
        for rows in [1, 6] {
            let matrix = TestMatrix::random(&mut random, (1, 512, 70), format, layout);
            let x = random.floats(rows * 512, 3.0);
            let want = product(&mut cpu, &matrix, rows, &x);
            let got = product(&mut backend, &matrix, rows, &x);
            let bound = Bound { absolute: 1e-6, relative: 1e-6 };
            compare("fast matmul", &(rows, format), "GPU and CPU", seed, &got, &want, bound);
        }
    }
}

#[test]
fn rounded_inputs_are_the_references() {
    let Some(mut backend) = open_fast() else { return };
    let seed = seed(34);
    let mut random = Random::new(seed);
    let mut x = random.floats(3 * 64, 2.0);
    x[..32].fill(0.0);
    (x[40], x[41]) = (2.5, -2.5);
    (x[70], x[100]) = (f32::NAN, f32::INFINITY);
    let matrix = TestMatrix::random(&mut random, (1, 64, 4), Format::Int8 { groups: 1 }, Layout::InOut);
    let w = backend.load_matrix(&matrix, &mut |_| ()).unwrap();
    let input = upload(&mut backend, &single_tokens(3), 64, &x);
    let mut out = backend.activations(3, 4).unwrap();
    backend.matmul(&input, &w, 1.0, &mut out);
    let [numbers, factors] = backend.rounded.bindings(Rounding::Bytes, &input);
    let read = backend.recorder.read_back::<u32>(&[(numbers, 6 * 8), (factors, 6 * 2)]).unwrap();
    let numbers: &[[i8; 32]] = bytemuck::cast_slice(&read[0]);
    for (index, block) in x.as_chunks::<32>().0.iter().enumerate() {
        let (want, factor, sums) = ops::quantise::cpu::quantise(block);
        let (found, words) = (f32::from_bits(read[1][2 * index]), read[1][2 * index + 1]);
        assert!(found == factor || (found.is_nan() && factor.is_nan()), "{index}, seed {seed}: {found} {factor}");
        if factor.is_finite() {
            assert_eq!(numbers[index], want, "{index}, seed {seed}");
            assert_eq!([words as i16, (words >> 16) as i16].map(i32::from), sums, "{index}, seed {seed}");
        }
    }
}

#[test]
fn an_input_that_is_no_number_is_not_hidden_by_rounding() {
    let Some(mut backend) = open_fast() else { return };
    let matrix = TestMatrix::random(&mut Random::new(5), (1, 64, 16), Format::Int8 { groups: 1 }, Layout::InOut);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![0.5; 64];
        x[40] = bad;
        assert!(product(&mut backend, &matrix, 1, &x).iter().all(|value| value.is_nan()), "{bad}");
    }
}

#[test]
fn rows_that_were_written_again_are_rounded_again() {
    let Some(mut backend) = open_fast() else { return };
    let random = &mut Random::new(9);
    let format = Format::Blocks(BlockType::Q4_0);
    let w = TestMatrix::random(random, (1, 64, 64), format, Layout::OutIn);
    let w = backend.load_matrix(&w, &mut |_| ()).unwrap();
    let x = random.floats(128, 1.0);
    // By a product, within a step.
    let mut first = upload(&mut backend, &single_tokens(2), 64, &x);
    let [mut second, mut third] = [(); 2].map(|()| backend.activations(2, 64).unwrap());
    backend.matmul(&first, &w, 1.0, &mut second);
    backend.matmul(&second, &w, 1.0, &mut first);
    backend.matmul(&first, &w, 1.0, &mut third);
    let once = backend.finish(&[(&first, 2), (&third, 2)]).unwrap();
    let first = upload(&mut backend, &single_tokens(2), 64, &once[0]);
    backend.matmul(&first, &w, 1.0, &mut third);
    compare_bits("fast matmul", &"three times", "GPU", 9, &once[1], &download(&mut backend, &third, 2));
    // By the host.
    backend.write(&x, &mut second).unwrap();
    backend.matmul(&second, &w, 1.0, &mut third);
    let of_x = download(&mut backend, &third, 2);
    backend.write(&once[0], &mut second).unwrap();
    backend.matmul(&second, &w, 1.0, &mut third);
    compare_bits("fast matmul", &"of the host", "GPU", 9, &once[1], &download(&mut backend, &third, 2));
    assert_ne!(of_x, once[1]);
}

#[test]
fn precisions_have_fingerprints_of_their_own() {
    let (Some(exact), Some(fast)) = (open(None), open_fast()) else { return };
    assert_ne!(exact.info().fingerprint, fast.info().fingerprint);
}

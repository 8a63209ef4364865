//! The writers of blocks against the readers, against gguf-py's bytes, and against what a range of numbers allows.

use super::*;
use crate::Model;

const WRITTEN: [BlockType; 7] =
    [BlockType::F16, BlockType::Bf16, BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4K, BlockType::Q5K, BlockType::Q6K];

/// Numbers from -1 to 1, near a bell curve, the same each time.
fn noise(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| (next() + next() + next() + next()) / 2.0 - 1.0).collect()
}

fn round_trip(kind: BlockType, numbers: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0xaa; numbers.len() / kind.weights() * kind.bytes()];
    kind.quantize(numbers, &mut bytes).unwrap();
    let mut back = vec![0.0; numbers.len()];
    kind.dequantize(&bytes, &mut back);
    (bytes, back)
}

fn rms(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

#[test]
fn no_number_is_further_off_than_the_blocks_range_allows() {
    // Of the largest magnitude: half a step, or a whole one where the last code lies on one side only, and what rounded scales and
    // numbers left out add.
    let bounds = [
        (BlockType::F16, 5e-4),
        (BlockType::Bf16, 4e-3),
        (BlockType::Q8_0, 0.5 / 127.0 + 0.5 / 1024.0),
        (BlockType::Q4_0, 1.01 / 8.0),
        (BlockType::Q4K, 0.1),
        (BlockType::Q5K, 0.05),
        (BlockType::Q6K, 0.022),
    ];
    for (kind, bound) in bounds {
        for (seed, scale) in [(1, 1.0), (2, 1e-3), (3, 700.0)] {
            let numbers: Vec<f32> = noise(seed, 16 * 256).iter().map(|x| x * scale).collect();
            let (_, back) = round_trip(kind, &numbers);
            let mut most = 0.0_f32;
            for (block, back) in numbers.chunks(kind.weights()).zip(back.chunks(kind.weights())) {
                let largest = block.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                let worst = block.iter().zip(back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // A half is off by 2^-25 at least, and a scale by that for each step of its code.
                assert!(worst <= bound * largest + 127.0 * 3e-8, "{}: {worst} of {largest}", kind.name());
                most = most.max(worst / largest);
            }
            println!("{}: {most}", kind.name());
        }
    }
}

/// Relative rms errors on a bell curve, a little above what was measured: a search that gets worse is noticed.
#[test]
fn errors_on_a_bell_curve_are_as_small_as_they_were() {
    let numbers = noise(5, 64 * 256);
    let size = rms(&numbers, &vec![0.0; numbers.len()]);
    for (kind, most) in [
        (BlockType::Q8_0, 0.0053),
        (BlockType::Q4_0, 0.083),
        (BlockType::Q4K, 0.0695),
        (BlockType::Q5K, 0.0343),
        (BlockType::Q6K, 0.0166),
    ] {
        let found = rms(&numbers, &round_trip(kind, &numbers).1) / size;
        println!("{}: {found:.4}", kind.name());
        assert!(found <= most, "{}: {found}", kind.name());
    }
}

#[test]
fn numbers_that_a_block_can_hold_come_back_as_they_were() {
    let mut blocks: Vec<(BlockType, Vec<u8>)> = Vec::new();
    for seed in 0..20_u8 {
        let q = |i: usize| (i as u8).wrapping_mul(37).wrapping_add(seed);
        // Each group uses both ends of its codes, and some group the largest scale: then nothing is left to choose.
        let mut k = vec![0; 144];
        k[..4].copy_from_slice(&[0x34, 0x12, 0x67, 0x10]);
        (0..4).for_each(|j| k[4 + j] = 40 + seed + j as u8);
        (0..4).for_each(|j| k[8 + j] = 30 + seed + j as u8);
        (k[4], k[8]) = (63, 63);
        (0..4).for_each(|j| k[12 + j] = q(j));
        (0..4).for_each(|j| (k[4 + j], k[8 + j]) = (k[4 + j] & 63 | 0x80, k[8 + j] & 63 | 0x40));
        (16..144).for_each(|i| k[i] = q(i));
        (0..4).for_each(|j| (k[16 + 32 * j], k[17 + 32 * j]) = (0x0f, 0xf0));
        let high = (0..32).map(|l| [0x55, 0xaa].get(l).copied().unwrap_or(q(l)));
        blocks.push((BlockType::Q5K, k[..16].iter().copied().chain(high).chain(k[16..].iter().copied()).collect()));
        blocks.push((BlockType::Q4K, k));
        let mut q6 = vec![0; 210];
        (0..192).for_each(|i| q6[i] = q(i));
        (192..208).for_each(|i| q6[i] = (q(i) | 1) ^ 0x40);
        (q6[192], q6[208], q6[209]) = (0x80, 0x34, 0x12);
        // The code -32 in every group.
        for i in 0..16 {
            let (half, k, g) = (i / 8, i / 2 % 4, i % 2);
            q6[64 * half + 32 * (k % 2) + 16 * g] &= if k < 2 { 0xf0 } else { 0x0f };
            q6[128 + 32 * half + 16 * g] &= !(3 << (2 * k));
        }
        blocks.push((BlockType::Q6K, q6));
        let mut q8: Vec<u8> = [0x34, 0x12].into_iter().chain((2..34).map(q)).collect();
        q8.iter_mut().skip(2).filter(|q| **q == 0x80).for_each(|q| *q = 0);
        q8[5] = 127;
        blocks.push((BlockType::Q8_0, q8));
        let mut q4: Vec<u8> = [0x34, 0x12].into_iter().chain((2..18).map(q)).collect();
        q4[5] &= 0xf0;
        blocks.push((BlockType::Q4_0, q4));
    }
    for (kind, block) in blocks {
        let mut numbers = vec![0.0; kind.weights()];
        kind.dequantize(&block, &mut numbers);
        let (_, back) = round_trip(kind, &numbers);
        assert_eq!(back, numbers, "{}", kind.name());
    }
}

#[test]
fn constant_zero_tiny_and_one_sided_blocks_are_written() {
    let ramp = |begin: f32| (0..256).map(|i| begin + i as f32 / 256.0).collect::<Vec<_>>();
    let cases: [(&str, Vec<f32>, f32); 7] = [
        ("zeros", vec![0.0; 256], 0.0),
        ("negative zeros", vec![-0.0; 256], 0.0),
        ("all one", vec![1.0; 256], 0.02),
        ("all minus one", vec![-1.0; 256], 0.02),
        ("too small for any half", vec![1e-30; 256], 1e-29),
        ("subnormal", vec![1e-40; 256], 1e-39),
        ("all positive", ramp(1.0), 0.12),
    ];
    for kind in WRITTEN {
        for (name, numbers, bound) in &cases {
            let (_, back) = round_trip(kind, numbers);
            let worst = numbers.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let bound = if kind == BlockType::Q4_0 { 2.0 * bound } else { *bound };
            assert!(worst <= bound, "{} in {}: {worst}", name, kind.name());
        }
    }
}

#[test]
fn what_is_no_finite_number_is_refused_by_its_place() {
    for kind in WRITTEN {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut numbers = noise(1, 512);
            numbers[300] = bad;
            let mut out = vec![0; 512 / kind.weights() * kind.bytes()];
            let error = kind.quantize(&numbers, &mut out).unwrap_err();
            assert!(matches!(error, QuantizeError::NotFinite { index: 300, .. }), "{}: {error}", kind.name());
        }
    }
}

#[test]
fn numbers_beyond_a_formats_scales_are_refused_and_not_made_infinite() {
    for kind in WRITTEN {
        for huge in [f32::MAX, -f32::MAX] {
            let mut numbers = noise(1, 512);
            numbers[300] = huge;
            let mut out = vec![0; 512 / kind.weights() * kind.bytes()];
            let error = kind.quantize(&numbers, &mut out).unwrap_err();
            assert!(matches!(error, QuantizeError::TooLarge { index: 300, .. }), "{}: {error}", kind.name());
        }
    }
    // Just within the largest half.
    for (kind, most) in [(BlockType::Q4K, 6e7), (BlockType::Q6K, 2e8), (BlockType::Q8_0, 8e6)] {
        let (_, back) = round_trip(kind, &vec![most; 256]);
        assert!(back.iter().all(|x| (x / most - 1.0).abs() < 0.05), "{}: {}", kind.name(), back[0]);
    }
}

#[test]
fn numbers_that_become_zero_for_want_of_a_small_half_are_counted() {
    for kind in WRITTEN {
        for (number, lost) in [(0.0, 0), (-0.0, 0), (0.5, 0), (-0.5, 0), (1e-30, 512), (-1e-30, 512)] {
            let mut out = vec![0; 512 / kind.weights() * kind.bytes()];
            // BF16 has the exponents of f32.
            let lost = if kind == BlockType::Bf16 { 0 } else { lost };
            assert_eq!(kind.quantize(&[number; 512], &mut out), Ok(lost), "{} {number}", kind.name());
        }
    }
}

#[test]
fn formats_that_are_only_read_are_refused() {
    for kind in BlockType::all().filter(|kind| !WRITTEN.contains(kind)) {
        let mut out = vec![0; 256 / kind.weights() * kind.bytes()];
        assert_eq!(kind.quantize(&[0.0; 256], &mut out), Err(QuantizeError::OnlyRead(kind)));
    }
}

/// Raw bytes of the matrices of a golden GGUF file.
fn golden(file: &str) -> Option<Vec<(crate::TensorName, BlockType, Vec<u8>)>> {
    use crate::{Format, TensorName, WeightSource};
    let shared = std::env::var_os("GROKPIPE_SHARED")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared").into(), std::path::PathBuf::from);
    let folder = shared.join("golden/llamacpp");
    if !folder.join(file).is_file() {
        println!("skipped: no golden/llamacpp/{file} in the shared goldens (GROKPIPE_SHARED)");
        return None;
    }
    let model = Model::open(&folder.join(file)).unwrap();
    let matrices = TensorName::in_file_order(model.config().num_hidden_layers).into_iter().filter_map(|name| {
        let matrix = model.matrix(&name).ok()?;
        let Format::Blocks(kind) = matrix.spec().format else { return None };
        let mut bytes = vec![0; matrix.spec().weight_bytes() as usize];
        matrix.read(0, &mut bytes).unwrap();
        Some((name, kind, bytes))
    });
    Some(matrices.collect())
}

/// The goldens of one seed are roundings of the same numbers, which the F16 file holds as they are.
#[test]
fn q8_0_and_q4_0_are_gguf_pys_byte_for_byte() {
    let Some(exact) = golden("tiny4-F16.gguf") else { return };
    for file in ["tiny4-Q8_0.gguf", "tiny4-Q4_0.gguf"] {
        let expected = golden(file).unwrap();
        assert!(expected.len() > 20 && expected.len() == exact.len());
        for ((name, kind, expected), (_, _, exact)) in expected.iter().zip(&exact) {
            let mut numbers = vec![0.0; exact.len() / 2];
            BlockType::F16.dequantize(exact, &mut numbers);
            let mut found = vec![0; expected.len()];
            kind.quantize(&numbers, &mut found).unwrap();
            let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
            // gguf-py computes Q4_0's codes in f64, which decides ties between two codes otherwise.
            let most = if *kind == BlockType::Q4_0 { found.len() / 10_000 } else { 0 };
            assert!(wrong <= most, "{name} in {}: {wrong} of {} bytes", kind.name(), found.len());
        }
    }
}

/// What llama.cpp wrote as K blocks is read, and written again: our search must find blocks nearly as near as theirs, which
/// hold these very numbers.
#[test]
fn blocks_of_llama_cpp_are_found_again_nearly_exactly() {
    for (file, most) in [("tinyk-Q4_K.gguf", 0.024), ("tinyk-Q6_K.gguf", 0.0006)] {
        let Some(matrices) = golden(file) else { return };
        for (name, kind, bytes) in matrices {
            let mut numbers = vec![0.0; bytes.len() / kind.bytes() * kind.weights()];
            kind.dequantize(&bytes, &mut numbers);
            let (_, back) = round_trip(kind, &numbers);
            let off = rms(&numbers, &back) / rms(&numbers, &vec![0.0; numbers.len()]);
            println!("{name} in {}: {off:.5}", kind.name());
            assert!(off <= most, "{name} in {}: {off}", kind.name());
        }
    }
}

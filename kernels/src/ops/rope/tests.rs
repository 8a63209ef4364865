//! Bound 1e-6 of the largest result: the angle is the same f32 in both, its cosine and sine are rounded once. Positions go up to 8191.
//!
//! A device shows rotated keys only through attention, so the rotation is tested by it: with values that are unit vectors and a
//! query, what comes out are softmax weights. See `attention/tests.rs`; here are the tables, which all devices share.

use super::{Params, cpu::rope, frequencies, tables};
use crate::ops::testing::{Bound, Random, compare, seed};

#[test]
fn tables_rotate_as_the_reference_does_up_to_the_last_position() {
    let seed = seed(17);
    let mut random = Random::new(seed);
    for (heads, dim) in [(1, 2), (2, 8), (6, 16), (3, 128)] {
        let positions = [0, 1, 15, 16, 4095, 8191];
        let x = random.floats(positions.len() * heads * dim, 2.0);
        let (cos, sin) = tables(&frequencies(10_000.0, dim), positions.iter().copied());
        let half = dim / 2;
        let mut got = x.clone();
        for (index, head) in got.chunks_mut(dim).enumerate() {
            let angle = index / heads * half;
            for j in 0..half {
                let (a, b, c, s) = (head[j], head[j + half], cos[angle + j], sin[angle + j]);
                (head[j], head[j + half]) = (a * c - b * s, b * c + a * s);
            }
        }
        let params = Params { heads: heads as u32, head_dim: dim as u32 };
        let want = rope(params, 10_000.0, &positions, &x);
        compare("rope", &params, "tables", seed, &got, &want, Bound { absolute: 0.0, relative: 1e-6 });
    }
}

#[test]
fn first_frequency_is_one_and_the_last_is_near_one_by_theta() {
    let f = frequencies(10_000.0, 128);
    assert_eq!((f.len(), f[0]), (64, 1.0));
    assert!((f64::from(f[63]) - 10_000f64.powf(-126.0 / 128.0)).abs() < 1e-11);
}

/// All of Grok-1's. A library that rounds one of them otherwise makes other kernels of all, with other fingerprints.
#[test]
fn tables_of_grok_1_have_the_same_bits_on_every_system() {
    let (cos, sin) = tables(&frequencies(10_000.0, 128), 0..8192);
    let bytes = cos.into_iter().chain(sin).flat_map(f32::to_le_bytes);
    // FNV-1a; glibc's cosines and sines give the same.
    let found =
        bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    assert_eq!(found, 0x44d3_d137_ec56_c32e, "{found:#018x}");
}

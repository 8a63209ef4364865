//! Random numbers without state: Philox4x32-10, a block cipher of ten rounds over a counter.
//!
//! A number depends on what it is for and on nothing that happened before, so a replay, another worker or another order of the
//! requests draws the same token.
//!
//! Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", <https://doi.org/10.1145/2063384.2063405>.

/// Multipliers of a round.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];

/// What the key grows by in each round: golden ratio and square root of 3, less one.
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words for this counter under this key.
pub(super) fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut words = counter;
    let mut key = key;
    for _ in 0..10 {
        let [high0, low0] = wide_product(MULTIPLIERS[0], words[0]);
        let [high1, low1] = wide_product(MULTIPLIERS[1], words[2]);
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    words
}

/// High and low word of a product.
fn wide_product(a: u32, b: u32) -> [u32; 2] {
    let product = u64::from(a) * u64::from(b);
    [(product >> 32) as u32, product as u32]
}

/// What a random number is for: numbers for different purposes have nothing to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Drawing a token from the distribution.
    Draw = 0,
}

/// A number in `[0, 1)` with 53 random bits.
pub(super) fn uniform(seed: u64, choice_index: u32, position: u32, purpose: Purpose) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let words = philox4x32([position, choice_index, purpose as u32, 0], key);
    let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of the authors' Random123 library, lines `philox4x32 10`: counter, key, result.
    #[test]
    fn published_known_answers() {
        let vectors = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in vectors {
            assert_eq!(philox4x32(counter, key), expected, "counter {counter:08x?} key {key:08x?}");
        }
    }

    #[test]
    fn every_part_of_the_key_changes_the_number() {
        let base = uniform(7, 1, 2, Purpose::Draw);
        for other in [
            uniform(8, 1, 2, Purpose::Draw),
            uniform(7 | 1 << 40, 1, 2, Purpose::Draw),
            uniform(7, 0, 2, Purpose::Draw),
            uniform(7, 1, 3, Purpose::Draw),
            uniform(7, 2, 1, Purpose::Draw),
        ] {
            assert_ne!(base.to_bits(), other.to_bits());
        }
    }

    #[test]
    fn numbers_lie_in_the_unit_interval_and_are_spread() {
        let mut buckets = [0_u32; 16];
        for position in 0..16_000 {
            let number = uniform(3, 0, position, Purpose::Draw);
            assert!((0.0..1.0).contains(&number));
            buckets[(number * 16.0) as usize] += 1;
        }
        // 15 degrees of freedom: 37.7 is exceeded once in a thousand seeds, and this seed is fixed.
        let chi_square: f64 = buckets.iter().map(|&found| (f64::from(found) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi_square < 37.7, "{chi_square}");
    }
}

//! `exp` and `ln` in f64 from additions and multiplications only, so that every machine gets the same bits: those of the system's
//! mathematical library differ in the last place from one to the next.

/// ln 2 in two parts; the first has zeros at the end, so that its product with a small integer is exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// Added and taken away again, it leaves the nearest integer: numbers of this size have no places behind the point.
const ROUNDER: f64 = 1.5 * (1_u64 << 52) as f64;

/// `1 / n!`, of which the Taylor series of `exp` is made: for `|r| <= ln 2 / 2` the next term is below 1e-17.
const INVERSE_FACTORIALS: [f64; 14] = {
    let mut table = [1.0; 14];
    let mut n = 1;
    while n < table.len() {
        table[n] = table[n - 1] / n as f64;
        n += 1;
    }
    table
};

/// `e^x` for `x <= 0`; relative error below 1e-15. Zero for anything below -745, for minus infinity and for NaN.
pub(super) fn exp_of_negative(x: f64) -> f64 {
    if x.is_nan() || x <= -745.0 {
        return 0.0;
    }
    // x = k ln 2 + r with |r| <= ln 2 / 2.
    let k = (x * std::f64::consts::LOG2_E + ROUNDER) - ROUNDER;
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    let series = INVERSE_FACTORIALS.iter().rev().fold(0.0, |series, inverse| series * r + inverse);
    let k = k as i32;
    // In two steps, because 2^k itself may be below the smallest normal number.
    series * power_of_two(k / 2) * power_of_two(k - k / 2)
}

/// `2^k` for `-1022 <= k <= 1023`.
fn power_of_two(k: i32) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

/// `ln x` for a finite `x >= 1`; absolute error below 1e-15 times the result's size plus one.
pub(super) fn ln(x: f64) -> f64 {
    debug_assert!(x >= 1.0 && x.is_finite());
    // x = m 2^k with m in [1, 2), then ln m = 2 artanh((m - 1) / (m + 1)), halved once more by m in [1/sqrt 2, sqrt 2).
    let bits = x.to_bits();
    let mut k = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        k += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    // |s| <= 0.1716: s^24 is below 1e-18.
    let mut series = 0.0;
    for n in (0..12).rev() {
        series = series * square + 1.0 / f64::from(2 * n + 1);
    }
    let k = f64::from(k);
    k * LN_2_HIGH + (2.0 * s * series + k * LN_2_LOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_systems() {
        for step in 0..200_000 {
            let x = -f64::from(step) * 0.0035;
            let (found, expected) = (exp_of_negative(x), x.exp());
            assert!((found - expected).abs() <= 2e-15 * expected, "x {x} found {found} expected {expected}");
        }
    }

    #[test]
    fn exp_of_extremes() {
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-0.0), 1.0);
        assert_eq!(exp_of_negative(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp_of_negative(-1e300), 0.0);
        assert_eq!(exp_of_negative(f64::NAN), 0.0);
        // Subnormal results lose places, not their size.
        assert!((exp_of_negative(-744.0) / (-744.0_f64).exp() - 1.0).abs() < 0.5);
    }

    #[test]
    fn ln_is_close_to_the_systems() {
        let mut x = 1.0_f64;
        while x < 1e12 {
            let (found, expected) = (ln(x), x.ln());
            assert!((found - expected).abs() <= 1e-15 * (1.0 + expected), "x {x} found {found} expected {expected}");
            x *= 1.000_37;
        }
    }
}

//! `exp` and `tanh` of our own, so that bits do not depend on a system's library.
//!
//! Branch-free, so that a loop over them vectorises. NaN stays NaN. Polynomials: Cephes (S. Moshier), `expf` and `tanhf`.
#![expect(clippy::excessive_precision, reason = "the constants are kept as published")]

use crate::ops::gated_gelu::{CUBE_FACTOR, SQRT_2_OVER_PI};

/// Added to a number below 2^22 this rounds it to an integer, to even, and leaves the integer in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;

/// `e^x`, within 2 units in the last place; 0 below -87.3, where the result would not be a normal number; capped at `x = 88`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let capped = if x > 88.0 { 88.0 } else { x };
    let clamped = if capped < -87.3 { -87.3 } else { capped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_375, clamped));
    let mut p = 1.987_569_15e-4f32;
    p = p.mul_add(r, 1.398_199_950_7e-3);
    p = p.mul_add(r, 8.333_451_907_3e-3);
    p = p.mul_add(r, 4.166_579_589_4e-2);
    p = p.mul_add(r, 1.666_666_545_9e-1);
    p = p.mul_add(r, 5.000_000_120_1e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^n: n is in -126..=127, so the exponent field is in 1..=254.
    let scale = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let result = y * scale;
    let result = if x < -87.3 { 0.0 } else { result };
    if x.is_nan() { x } else { result }
}

/// Hyperbolic tangent, within 3 units in the last place; the argument is clamped to +-15, where it is +-1.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let clamped = if magnitude > 15.0 { 15.0 } else { magnitude };
    let large = 1.0 - 2.0 / (exp(2.0 * clamped) + 1.0);
    let z = x * x;
    let mut p = -5.704_988_727_45e-3f32;
    p = p.mul_add(z, 2.063_908_879_54e-2);
    p = p.mul_add(z, -5.373_971_555_31e-2);
    p = p.mul_add(z, 1.333_144_220_36e-1);
    p = p.mul_add(z, -3.333_328_194_22e-1);
    let small = (p * z).mul_add(x, x);
    if magnitude < 0.625 { small } else { large.copysign(x) }
}

/// The tanh form of GELU.
#[inline(always)]
pub(crate) fn gelu(g: f32) -> f32 {
    let inner = SQRT_2_OVER_PI * (CUBE_FACTOR * g * g).mul_add(g, g);
    0.5 * g * (1.0 + tanh(inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error in units in the last place of the true result, over `from..to` in `steps`.
    fn worst(from: f32, to: f32, steps: u32, f: fn(f32) -> f32, truth: fn(f64) -> f64) -> f64 {
        (0..=steps)
            .map(|i| {
                let x = from + (to - from) * (i as f32 / steps as f32);
                let want = truth(f64::from(x));
                let unit = f64::from(f32::EPSILON) * f64::from(2f32.powi((want.abs() as f32).log2().floor() as i32));
                (f64::from(f(x)) - want).abs() / unit.max(f64::from(f32::MIN_POSITIVE) * f64::from(f32::EPSILON))
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_two_units() {
        assert!(worst(-87.0, 87.9, 1_000_000, exp, f64::exp) <= 2.0);
        assert!(worst(-1.0, 0.0, 1_000_000, exp, f64::exp) <= 2.0);
    }

    #[test]
    fn tanh_is_within_three_units() {
        assert!(worst(-12.0, 12.0, 1_000_003, tanh, f64::tanh) <= 3.0);
        assert!(worst(-1.0, 1.0, 1_000_003, tanh, f64::tanh) <= 3.0);
    }

    #[test]
    fn extremes_are_exact_and_finite() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(1e30).is_finite());
        assert_eq!((tanh(50.0), tanh(-1e30), tanh(f32::INFINITY)), (1.0, -1.0, 1.0));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan() && gelu(f32::NAN).is_nan());
    }

    #[test]
    fn gelu_of_large_arguments_is_linear_or_zero() {
        assert_eq!((gelu(50.0), gelu(0.0)), (50.0, 0.0));
        assert_eq!(gelu(-50.0).abs(), 0.0);
    }
}

//! Reference of rounding to 8 bits, and to halves.

use half::f16;

use super::BLOCK;

/// Numbers of a block, what they are worth, and the sums of its halves.
pub(crate) fn quantise(x: &[f32; BLOCK]) -> ([i8; BLOCK], f32, [i32; 2]) {
    if x.iter().any(|x| !x.is_finite()) {
        return ([0; BLOCK], f32::NAN, [0; 2]);
    }
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let numbers = x.map(|x| (x * inverse).round_ties_even() as i8);
    let sum = |half: &[i8]| half.iter().map(|&number| i32::from(number)).sum();
    (numbers, largest / 127.0, [sum(&numbers[..BLOCK / 2]), sum(&numbers[BLOCK / 2..])])
}

/// A row's numbers as halves, and what 1 among them is worth.
pub(crate) fn halves(row: &[f32]) -> (Vec<f16>, f32) {
    if row.iter().any(|x| !x.is_finite()) {
        return (vec![f16::ZERO; row.len()], f32::NAN);
    }
    let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let exponent = if largest.is_normal() { largest.log2().floor() as i32 } else { -127 };
    let power = 2f32.powi((14 - exponent).min(126));
    (row.iter().map(|x| f16::from_f32(x * power)).collect(), power.recip())
}

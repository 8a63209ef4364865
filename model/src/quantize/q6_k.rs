//! Q6_K: sixteen scales of eight bits under one half, and codes from -32 to 31.
//!
//! First each sixteen numbers get the scale that suits them best, out of a few that put their largest magnitude near the ends of
//! the codes, each improved by least squares. Then the scales are written as multiples of the half that fits the largest of them,
//! each tried with its neighbours, and last the half itself is fitted to the codes. A step is kept only if the error sinks.

use half::f16;

use super::{Normal, OutOfRange, rounded};

/// Which code the largest magnitude becomes, in the first attempt.
const ENDS: [f32; 6] = [-32.0, -31.0, -30.0, -33.0, 31.0, 32.0];
/// Times that the half is fitted anew.
const ROUNDS: usize = 2;

struct Block {
    d: f16,
    /// What `d` is worth in the normal block.
    unit: f32,
    scales: [i8; 16],
    error: f32,
}

pub(super) fn block(x: &[f32; 256], out: &mut [u8; 210]) -> Result<(), OutOfRange> {
    out.fill(0);
    let Some(normal) = Normal::of(x)? else { return Ok(()) };
    let x = normal.apply(x);
    let groups = x.as_chunks::<16>().0;
    let mut wanted = [0.0; 16];
    wanted.iter_mut().zip(groups).for_each(|(scale, x)| *scale = best_scale(x));
    let largest =
        wanted.iter().fold(0.0_f32, |largest, scale| if scale.abs() > largest.abs() { *scale } else { largest });
    let d = largest / -128.0;
    let mut best = with_half(&normal, groups, &wanted, normal.nearest(d)?);
    if let Ok(d) = normal.not_below(d) {
        best = with_half(&normal, groups, &wanted, d).better_of(best);
    }
    for _ in 0..ROUNDS {
        let Some(next) = refitted(&normal, groups, &wanted, &best) else { break };
        best = next;
    }
    write(&best, groups, out);
    Ok(())
}

#[inline(always)]
fn code(x: f32, inverse: f32) -> f32 {
    rounded((x * inverse).clamp(-32.0, 31.0))
}

/// Codes of all for this scale, and the sum of the squared errors.
fn codes(x: &[f32; 16], scale: f32) -> ([f32; 16], f32) {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let q = x.map(|x| code(x, inverse));
    let error = x.iter().zip(&q).map(|(x, q)| (x - scale * q) * (x - scale * q)).sum();
    (q, error)
}

/// The scale that suits sixteen numbers best.
fn best_scale(x: &[f32; 16]) -> f32 {
    let extreme = x.iter().fold(0.0_f32, |extreme, x| if x.abs() > extreme.abs() { *x } else { extreme });
    let mut best = (0.0, f32::INFINITY);
    for end in ENDS {
        let first = extreme / end;
        let (q, error) = codes(x, first);
        let squares: f32 = q.iter().map(|q| q * q).sum();
        let fitted = x.iter().zip(&q).map(|(x, q)| x * q).sum::<f32>() / squares.max(1.0);
        for (scale, error) in [(first, error), (fitted, codes(x, fitted).1)] {
            if error < best.1 {
                best = (scale, error);
            }
        }
    }
    best.0
}

impl Block {
    /// The one that errs less; on a tie the other.
    fn better_of(self, other: Self) -> Self {
        if self.error < other.error { self } else { other }
    }
}

/// The block with this half, its scales chosen among the neighbours of the wanted ones.
fn with_half(normal: &Normal, groups: &[[f32; 16]], wanted: &[f32; 16], d: f16) -> Block {
    let unit = normal.worth(d);
    let inverse = if unit == 0.0 { 0.0 } else { 1.0 / unit };
    let mut block = Block { d, unit, scales: [0; 16], error: 0.0 };
    for ((x, wanted), scale) in groups.iter().zip(wanted).zip(&mut block.scales) {
        let nearest = rounded((wanted * inverse).clamp(-128.0, 127.0));
        let mut least = f32::INFINITY;
        for near in [nearest, nearest - 1.0, nearest + 1.0] {
            let near = near.clamp(-128.0, 127.0);
            let error = codes(x, near * unit).1;
            if error < least {
                (least, *scale) = (error, near as i8);
            }
        }
        block.error += least;
    }
    block
}

/// The block with the half that suits these codes and scales best, unless it errs no less.
fn refitted(normal: &Normal, groups: &[[f32; 16]], wanted: &[f32; 16], block: &Block) -> Option<Block> {
    let (mut products, mut squares) = (0.0_f64, 0.0_f64);
    for (x, scale) in groups.iter().zip(block.scales) {
        let scale = f32::from(scale);
        let (q, _) = codes(x, scale * block.unit);
        for (x, q) in x.iter().zip(q) {
            let u = f64::from(scale * q);
            products += f64::from(*x) * u;
            squares += u * u;
        }
    }
    let d = if squares > 0.0 { products / squares } else { return None };
    let next = with_half(normal, groups, wanted, normal.nearest(d as f32).ok()?);
    (next.error < block.error).then_some(next)
}

fn write(block: &Block, groups: &[[f32; 16]], out: &mut [u8; 210]) {
    for (i, (x, scale)) in groups.iter().zip(block.scales).enumerate() {
        let (half, k, g) = (i / 8, i / 2 % 4, i % 2);
        let (q, _) = codes(x, f32::from(scale) * block.unit);
        for (l, q) in q.iter().enumerate() {
            let q = (q + 32.0) as u8;
            out[64 * half + 32 * (k % 2) + 16 * g + l] |= (q & 15) << (4 * (k / 2));
            out[128 + 32 * half + 16 * g + l] |= (q >> 4) << (2 * k);
        }
        out[192 + i] = scale as u8;
    }
    out[208..].copy_from_slice(&block.d.to_le_bytes());
}

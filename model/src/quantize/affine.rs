//! Q4_K and Q5_K: eight scales and eight minima of six bits under two halves, and codes from 0 to 15 or 31.
//!
//! A number is `scale * code - minimum`, the minimum never negative. First each thirty-two numbers get the scale and the minimum
//! that suit them best: the codes' range is laid over theirs, whole or a little shrunk, and improved by least squares. Then both are
//! written as multiples of the two halves, each tried with its neighbours, and last the halves themselves are fitted to the codes.
//! A step is kept only if the error sinks.

use half::f16;

use super::{Normal, OutOfRange, rounded};

/// Shares of the numbers' range that the codes are laid over: leaving out the outermost can make all others finer.
const SHARES: [f32; 5] = [1.0, 0.96, 0.92, 0.88, 0.83];
/// Times that the fit of thirty-two numbers is improved.
const STEPS: usize = 2;
/// Times that the halves are fitted anew.
const ROUNDS: usize = 2;
/// Largest scale and minimum: six bits.
const MOST: f32 = 63.0;

type Group = [f32; 32];

/// Scale and minimum of a group.
#[derive(Clone, Copy, Default)]
struct Line {
    scale: f32,
    minimum: f32,
}

struct Block {
    /// The halves, and what they are worth in the normal block.
    halves: [f16; 2],
    units: Line,
    /// In multiples of the halves.
    lines: [Line; 8],
    error: f32,
}

pub(super) fn q4_k(x: &[f32; 256], out: &mut [u8; 144]) -> Result<(), OutOfRange> {
    out.fill(0);
    let (head, q) = out.split_at_mut(16);
    write(x, 15.0, head, |j, l, code| q[32 * (j / 2) + l] |= code << (4 * (j % 2)))
}

pub(super) fn q5_k(x: &[f32; 256], out: &mut [u8; 176]) -> Result<(), OutOfRange> {
    out.fill(0);
    let (head, rest) = out.split_at_mut(16);
    let (high, low) = rest.split_at_mut(32);
    write(x, 31.0, head, |j, l, code| {
        low[32 * (j / 2) + l] |= (code & 15) << (4 * (j % 2));
        high[l] |= (code >> 4) << j;
    })
}

/// Writes halves, scales and minima into `head`, and hands over each code by group and place.
fn write(
    x: &[f32; 256],
    top: f32,
    head: &mut [u8],
    mut hand_over: impl FnMut(usize, usize, u8),
) -> Result<(), OutOfRange> {
    let Some(normal) = Normal::of(x)? else { return Ok(()) };
    let x = normal.apply(x);
    let groups = x.as_chunks::<32>().0;
    let block = search(&normal, groups, top)?;
    head[..2].copy_from_slice(&block.halves[0].to_le_bytes());
    head[2..4].copy_from_slice(&block.halves[1].to_le_bytes());
    for (j, (x, multiple)) in groups.iter().zip(block.lines).enumerate() {
        let (scale, minimum) = (multiple.scale as u8, multiple.minimum as u8);
        if j < 4 {
            head[4 + j] |= scale;
            head[8 + j] |= minimum;
        } else {
            head[8 + j] = (scale & 15) | (minimum & 15) << 4;
            head[j] |= (scale >> 4) << 6;
            head[4 + j] |= (minimum >> 4) << 6;
        }
        let (q, _) = codes(x, multiple.times(block.units), top);
        q.iter().enumerate().for_each(|(l, q)| hand_over(j, l, *q as u8));
    }
    Ok(())
}

impl Line {
    fn times(self, units: Self) -> Self {
        Self { scale: self.scale * units.scale, minimum: self.minimum * units.minimum }
    }
}

fn search(normal: &Normal, groups: &[Group], top: f32) -> Result<Block, OutOfRange> {
    let mut wanted = [Line::default(); 8];
    wanted.iter_mut().zip(groups).for_each(|(line, x)| *line = best_line(x, top));
    let largest = |part: fn(&Line) -> f32| wanted.iter().map(part).fold(0.0, f32::max) / MOST;
    let units = [largest(|line| line.scale), largest(|line| line.minimum)];
    let with = |halves: [f16; 2]| with_halves(normal, groups, &wanted, halves, top);
    let nearest = |units: [f32; 2]| -> Result<[f16; 2], OutOfRange> {
        Ok([normal.nearest(units[0])?, normal.nearest(units[1])?])
    };
    let mut best = with(nearest(units)?);
    if let (Ok(d), Ok(m)) = (normal.not_below(units[0]), normal.not_below(units[1])) {
        best = with([d, m]).better_of(best);
    }
    for _ in 0..ROUNDS {
        let Some(Ok(halves)) = refitted(groups, &best, top).map(nearest) else { break };
        let next = with(halves);
        if next.error >= best.error {
            break;
        }
        best = next;
    }
    Ok(best)
}

/// Codes of all on this line, and the sum of the squared errors.
#[inline(always)]
fn codes(x: &Group, line: Line, top: f32) -> (Group, f32) {
    let inverse = if line.scale > 0.0 { 1.0 / line.scale } else { 0.0 };
    let q = x.map(|x| rounded(((x + line.minimum) * inverse).clamp(0.0, top)));
    let mut errors = [0.0; 32];
    for ((error, x), q) in errors.iter_mut().zip(x).zip(&q) {
        let off = x - (line.scale * q - line.minimum);
        *error = off * off;
    }
    (q, sum(&errors))
}

/// A sum in eight lanes, so that a processor can add eight at a time; the order is the same on each.
#[inline(always)]
fn sum(values: &Group) -> f32 {
    let mut lanes = [0.0_f32; 8];
    for chunk in values.as_chunks::<8>().0 {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += value);
    }
    lanes.iter().sum()
}

/// The line that suits thirty-two numbers best.
fn best_line(x: &Group, top: f32) -> Line {
    let low = x.iter().fold(0.0_f32, |low, x| low.min(*x));
    let high = x.iter().fold(f32::NEG_INFINITY, |high, x| high.max(*x));
    let mut best = (Line { scale: 0.0, minimum: -low }, f32::INFINITY);
    for share in SHARES {
        let cut = (high - low) * (1.0 - share) / 2.0;
        let mut line = Line { scale: (high - low) * share / top, minimum: (-low - cut).max(0.0) };
        for step in 0..=STEPS {
            let (q, error) = codes(x, line, top);
            if error < best.1 {
                best = (line, error);
            }
            match least_squares(x, &q) {
                Some(next) if step < STEPS => line = next,
                _ => break,
            }
        }
    }
    best.0
}

/// The line that is nearest to these numbers with these codes; `None` where they do not say, or it would descend.
fn least_squares(x: &Group, q: &Group) -> Option<Line> {
    let (sum_q, sum_x) = (sum(q), sum(x));
    let (mut squares, mut products) = (*q, *x);
    squares.iter_mut().for_each(|q| *q *= *q);
    products.iter_mut().zip(q).for_each(|(x, q)| *x *= q);
    let (squares, products) = (sum(&squares), sum(&products));
    let spread = 32.0 * squares - sum_q * sum_q;
    if spread <= 0.0 {
        return None;
    }
    let scale = (32.0 * products - sum_q * sum_x) / spread;
    let minimum = (sum_q * scale - sum_x) / 32.0;
    // A minimum is never negative; then the best line goes through zero.
    let line = if minimum >= 0.0 { Line { scale, minimum } } else { Line { scale: products / squares, minimum: 0.0 } };
    (line.scale > 0.0).then_some(line)
}

impl Block {
    /// The one that errs less; on a tie the other.
    fn better_of(self, other: Self) -> Self {
        if self.error < other.error { self } else { other }
    }
}

/// The block with these halves, its multiples chosen among the neighbours of the wanted ones.
fn with_halves(normal: &Normal, groups: &[Group], wanted: &[Line; 8], halves: [f16; 2], top: f32) -> Block {
    let [scale, minimum] = halves.map(|half| normal.worth(half));
    let units = Line { scale, minimum };
    let mut block = Block { halves, units, lines: [Line::default(); 8], error: 0.0 };
    let multiple = |part: f32, unit: f32| if unit > 0.0 { rounded((part / unit).min(MOST)) } else { 0.0 };
    for ((x, wanted), line) in groups.iter().zip(wanted).zip(&mut block.lines) {
        let nearest = (multiple(wanted.scale, scale), multiple(wanted.minimum, minimum));
        let mut least = f32::INFINITY;
        for by in [0.0, -1.0, 1.0] {
            for lower in [0.0, -1.0, 1.0] {
                let near =
                    Line { scale: (nearest.0 + by).clamp(0.0, MOST), minimum: (nearest.1 + lower).clamp(0.0, MOST) };
                let (_, error) = codes(x, near.times(units), top);
                if error < least {
                    (least, *line) = (error, near);
                }
            }
        }
        block.error += least;
    }
    block
}

/// What the halves had best be worth, with these codes and multiples; `None` where they do not say.
fn refitted(groups: &[Group], block: &Block, top: f32) -> Option<[f32; 2]> {
    let (mut uu, mut uv, mut vv, mut ux, mut vx) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
    for (x, line) in groups.iter().zip(block.lines) {
        let (q, _) = codes(x, line.times(block.units), top);
        let v = f64::from(line.minimum);
        for (x, q) in x.iter().zip(q) {
            let (x, u) = (f64::from(*x), f64::from(line.scale * q));
            (uu, uv, vv, ux, vx) = (uu + u * u, uv + u * v, vv + v * v, ux + u * x, vx + v * x);
        }
    }
    // The least of the sum of (x - scale * u + minimum * v)^2.
    let spread = uu * vv - uv * uv;
    let (scale, minimum) = if spread > 0.0 {
        ((ux * vv - vx * uv) / spread, (ux * uv - vx * uu) / spread)
    } else if uu > 0.0 {
        (ux / uu, 0.0)
    } else {
        return None;
    };
    (scale > 0.0 && minimum >= 0.0).then_some([scale as f32, minimum as f32])
}

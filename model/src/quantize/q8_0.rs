//! Q8_0 as ggml defines it: the largest magnitude becomes 127, all else is rounded half away from zero.

use super::{OutOfRange, half_of};

pub(super) fn block(x: &[f32; 32], out: &mut [u8; 34]) -> Result<(), OutOfRange> {
    let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let d = largest / 127.0;
    // Where the inverse overflows, the half is zero long since.
    let inverse = if d > 0.0 { (1.0 / d).min(f32::MAX) } else { 0.0 };
    out[..2].copy_from_slice(&half_of(d)?.to_le_bytes());
    for (q, x) in out[2..].iter_mut().zip(x) {
        *q = (x * inverse).round() as i8 as u8;
    }
    Ok(())
}

//! Q4_0 as ggml defines it: the number of the largest magnitude becomes -8, so that the scale has the other sign.

use super::{OutOfRange, half_of};

pub(super) fn block(x: &[f32; 32], out: &mut [u8; 18]) -> Result<(), OutOfRange> {
    // The first of several with the same magnitude.
    let extreme = x.iter().fold(0.0_f32, |extreme, x| if x.abs() > extreme.abs() { *x } else { extreme });
    let d = extreme / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { (1.0 / d).clamp(f32::MIN, f32::MAX) };
    out[..2].copy_from_slice(&half_of(d)?.to_le_bytes());
    let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    for (j, byte) in out[2..].iter_mut().enumerate() {
        *byte = code(x[j]) | code(x[j + 16]) << 4;
    }
    Ok(())
}

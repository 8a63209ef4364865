//! Reference of picking rows.

use super::Params;

/// The rows of `x` that `rows` names, in its order.
pub(crate) fn gather(params: Params, x: &[f32], rows: &[u32]) -> Vec<f32> {
    let width = params.width as usize;
    rows.iter().flat_map(|&row| &x[row as usize * width..(row as usize + 1) * width]).copied().collect()
}

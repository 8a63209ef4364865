//! Fast rotation of queries and keys at their rows' positions, and where keys and values are stored: keys in blocks of sixteen,
//! component by component, as [`super::attention`] reads them.

use super::simd::{Kernel, LANES, Simd};

/// One row.
pub(super) struct RopeStore<'a> {
    /// Cosines and sines of the row's position, half a head of each.
    pub(super) angles: (&'a [f32], &'a [f32]),
    /// `[heads, head_dim]`.
    pub(super) q: &'a mut [f32],
    /// `[kv_heads, head_dim]`; rotated in place.
    pub(super) key: &'a mut [f32],
    pub(super) value: &'a [f32],
    /// The keys of the row's block, `[kv_heads, head_dim, 16]`.
    pub(super) keys: &'a mut [f32],
    /// The row's place in its block.
    pub(super) lane: usize,
    /// Where the value goes.
    pub(super) values: &'a mut [f32],
}

impl Kernel for RopeStore<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let dim = 2 * self.angles.0.len();
        for head in self.q.chunks_exact_mut(dim) {
            rotate(head, self.angles);
        }
        for head in self.key.chunks_exact_mut(dim) {
            rotate(head, self.angles);
        }
        for (lanes, component) in self.keys.as_chunks_mut::<LANES>().0.iter_mut().zip(&*self.key) {
            lanes[self.lane] = *component;
        }
        self.values.copy_from_slice(self.value);
    }
}

/// Rotates one head; `angles` are cosines and sines.
#[inline(always)]
fn rotate(head: &mut [f32], (cos, sin): (&[f32], &[f32])) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

//! Fast norm: the sum of squares in 16 lanes and the fixed tree, all else element by element.

use super::simd::{Kernel, Simd, dot};
use crate::ops::rms_norm::Params;

/// The norm of one row, written to `out`, or added to it.
pub(super) struct Norm<'a> {
    pub(super) params: Params,
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) add: bool,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mean = dot(simd, self.x, self.x) / self.params.hidden_size as f32;
        let factor = 1.0 / (mean + self.params.epsilon).sqrt();
        let inputs = self.x.iter().zip(self.weight);
        if self.add {
            self.out.iter_mut().zip(inputs).for_each(|(y, (x, w))| *y += x * factor * w);
        } else {
            self.out.iter_mut().zip(inputs).for_each(|(y, (x, w))| *y = x * factor * w);
        }
    }
}

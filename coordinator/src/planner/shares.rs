//! Layers cut evenly, where somebody asks for that instead of the best plan.

use std::ops::Range;

/// The layers cut into `count` runs, or into single layers where there are fewer, as even as can be.
pub fn even_shares(layers: Range<u32>, count: u32) -> Vec<Range<u32>> {
    let length = u64::from(layers.end.saturating_sub(layers.start));
    let count = u64::from(count).min(length).max(1);
    let bound = |i: u64| layers.start + (length * i / count) as u32;
    (0..count).map(|i| bound(i)..bound(i + 1)).collect()
}

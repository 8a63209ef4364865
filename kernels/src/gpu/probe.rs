//! Whether subgroups do what `lanes_subgroup.wgsl` needs of them, tried on the device when it is opened.
//!
//! An adapter says whether it has subgroups and of how many threads, but not whether all are full, and a wrong sum would show nowhere.
//! So known numbers are added up, and a device that gives anything else keeps to the portable kernels.

use super::{
    memory::{Memory, words},
    pipelines::Kernel,
    recorder::Recorder,
    shaders::ProbeParams,
};
use crate::KernelError;

/// Threads of a workgroup; `WORKGROUP` in `lanes.wgsl`.
const LANES: u32 = 128;
/// Workgroups that are tried.
const WORKGROUPS: u32 = 4;
/// Threads that a subgroup must have: sums of eight neighbours are what shuffles make.
pub(super) const SUBGROUP_MIN: u32 = 8;

/// Runs `subgroup_probe.wgsl`. False, too, when the driver refuses it.
///
/// # Errors
/// [`KernelError::DeviceLost`], and those of an allocation.
pub(super) fn subgroups_work(recorder: &mut Recorder, memory: &mut Memory) -> Result<bool, KernelError> {
    if let Some(reason) = recorder.refusal(Kernel::SubgroupProbe)? {
        tracing::warn!(reason, "subgroups are not used: the driver refuses their kernel");
        return Ok(false);
    }
    let threads = (WORKGROUPS * LANES) as usize;
    let found = memory.allocate("a probe of subgroups", words(&[threads, 4]))?;
    for factor in [1, 59] {
        recorder.begin(false);
        recorder.dispatch(Kernel::SubgroupProbe, &ProbeParams { factor }, &[&found], [WORKGROUPS, 1, 1], 0);
        let read = recorder.read_back::<u32>(&[(&found, 4 * threads)])?;
        recorder.forget_bind_groups();
        if !is_right(read[0].as_chunks().0) {
            tracing::warn!("subgroups are not used: they do not reduce as they should");
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether each workgroup's threads are all lanes, in subgroups of a size that will do, and each found the sum and the largest of the
/// numbers `root * root + 1` for all `root` below [`LANES`].
fn is_right(found: &[[u32; 4]]) -> bool {
    let sum = (0..LANES).map(|root| root * root + 1).sum::<u32>();
    let maximum = (LANES - 1).pow(2) + 1;
    found.chunks(LANES as usize).all(|workgroup| {
        let mut lanes: Vec<u32> = workgroup.iter().map(|[lane, ..]| *lane).collect();
        lanes.sort_unstable();
        let right = |&[_, a, b, size]: &[u32; 4]| {
            (a, b) == (sum, maximum) && size >= SUBGROUP_MIN && size.is_power_of_two() && LANES.is_multiple_of(size)
        };
        lanes.into_iter().eq(0..LANES) && workgroup.iter().all(right)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device gives whose subgroups have `size` threads.
    fn found(size: u32) -> Vec<[u32; 4]> {
        (0..LANES).map(|lane| [lane, 127 * 128 * 255 / 6 + 128, 127 * 127 + 1, size]).collect()
    }

    #[test]
    fn full_subgroups_of_eight_and_more_are_right() {
        for size in [8, 16, 32, 64, 128] {
            assert!(is_right(&found(size)), "{size}");
        }
    }

    #[test]
    fn threads_may_be_dealt_out_in_any_order() {
        let mut found = found(32);
        found.swap(3, 100);
        assert!(is_right(&found));
    }

    #[test]
    fn small_odd_or_half_empty_subgroups_and_wrong_sums_are_found_out() {
        for size in [1, 4, 24, 256] {
            assert!(!is_right(&found(size)), "{size}");
        }
        for (place, value) in [(0, 1), (0, 128), (1, 7), (2, 7)] {
            let mut found = found(32);
            found[77][place] = value;
            assert!(!is_right(&found), "{place} {value}");
        }
    }
}

//! Memory of the host: how much there is, and allocation that fails with an error instead of ending the process.

use crate::KernelError;

/// Below this, an allocation is not compared with what the system says is available: asking takes longer.
const CHECKED_FROM_BYTES: u64 = 16 << 20;

/// `MemAvailable`; 0 where the system does not say.
pub(crate) fn available_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return 0 };
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// From this size on memory is asked for in large pages. Reading it needs fewer walks through page tables: one thread reads 20 in
/// place of 18 GB/s where the system grants them, which Linux does by default to those who ask.
const LARGE_PAGES_FROM_BYTES: u64 = 4 << 20;

/// Asks for large pages in the room that a vector has got and not touched. Where there are none, nothing changes.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the standard library cannot give the system advice about memory")]
fn ask_for_large_pages<T>(room: &mut [std::mem::MaybeUninit<T>]) {
    /// A multiple of every size of a small page.
    const ALIGNED: usize = 64 << 10;
    let places = room.as_mut_ptr_range();
    let skipped = places.start.addr().next_multiple_of(ALIGNED) - places.start.addr();
    let bytes = size_of_val(room).saturating_sub(skipped) / ALIGNED * ALIGNED;
    if bytes == 0 {
        return;
    }
    // SAFETY: the range lies in memory that the vector owns, and this advice never changes what memory holds.
    unsafe { libc::madvise(places.start.byte_add(skipped).cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<T>(_room: &mut [std::mem::MaybeUninit<T>]) {}

/// `count` elements of zero, for `what` on `device`.
///
/// Systems promise more memory than there is and end a process that takes them at their word. So large wishes are compared with
/// what is available first.
pub(crate) fn zeroed<T: Copy + Default>(count: usize, what: &str, device: &str) -> Result<Vec<T>, KernelError> {
    let needed_bytes = (count as u64).saturating_mul(size_of::<T>() as u64);
    let refuse = |available_bytes| KernelError::OutOfMemory {
        what: what.to_owned(),
        needed_bytes,
        available_bytes,
        device: device.to_owned(),
    };
    if needed_bytes >= CHECKED_FROM_BYTES {
        let available = available_bytes();
        if available != 0 && needed_bytes > available {
            return Err(refuse(available));
        }
    }
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_source| refuse(available_bytes()))?;
    if needed_bytes >= LARGE_PAGES_FROM_BYTES {
        ask_for_large_pages(values.spare_capacity_mut());
    }
    values.resize(count, T::default());
    Ok(values)
}

/// The product of sizes that come from a configuration, or an error that names `what`.
pub(crate) fn product(sizes: &[usize], what: &str, device: &str) -> Result<usize, KernelError> {
    sizes.iter().try_fold(1usize, |total, &size| total.checked_mul(size)).ok_or_else(|| KernelError::OutOfMemory {
        what: what.to_owned(),
        needed_bytes: u64::MAX,
        available_bytes: available_bytes(),
        device: device.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_refused_with_its_size() {
        let error = zeroed::<f32>(usize::MAX / 8, "the KV pool", "cpu").unwrap_err();
        assert!(matches!(&error, KernelError::OutOfMemory { what, .. } if what == "the KV pool"), "{error}");
        assert!(product(&[usize::MAX, 2], "x", "cpu").is_err());
    }

    #[test]
    fn memory_in_large_pages_is_zero_and_can_be_written() {
        let mut values = zeroed::<u64>((9 << 20) / 8 + 5, "numbers", "cpu").unwrap();
        assert!(values.iter().all(|&value| value == 0));
        values.iter_mut().zip(0..).for_each(|(value, i)| *value = i);
        assert!(values.iter().zip(0..).all(|(&value, i)| value == i));
        ask_for_large_pages::<u8>(&mut []);
    }
}

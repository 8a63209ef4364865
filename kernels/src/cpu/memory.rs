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
}

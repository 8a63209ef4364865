//! Memory of the host: how much there is, and allocation that fails with an error instead of ending the process.

use std::ops::{Deref, DerefMut};

use super::simd::Word;
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

/// Bytes of a large page of most systems. Reading memory in such pages needs fewer walks through page tables: one thread reads 20 in
/// place of 15 GB/s where the system grants them, which Linux does by default to those who ask.
const LARGE_PAGE: usize = 2 << 20;

/// Words in large pages, if they are many.
pub(crate) struct LargeWords {
    /// Begins with what lies before the first large page, which is not written: of memory fresh from the system it takes none.
    bytes: Vec<u8>,
    start: usize,
}

impl LargeWords {
    /// `count` words of zero, for `what` on `device`.
    pub(crate) fn zeroed(count: usize, what: &str, device: &str) -> Result<Self, KernelError> {
        let bytes = product(&[count, size_of::<Word>()], what, device)?;
        check_room(bytes as u64, what, device)?;
        let page = if bytes < LARGE_PAGE { align_of::<Word>() } else { LARGE_PAGE };
        // Bytes, because memory for what is aligned would be written with zeros here, and small pages be made of it.
        let room = bytes.checked_add(page).and_then(|room| bytemuck::allocation::try_zeroed_vec(room).ok());
        let mut room: Vec<u8> = room.ok_or_else(|| out_of_memory(bytes as u64, available_bytes(), what, device))?;
        let start = room.as_ptr().align_offset(page);
        room.truncate(start + bytes);
        if page == LARGE_PAGE {
            ask_for_large_pages(&mut room[start..]);
        }
        Ok(Self { bytes: room, start })
    }
}

impl Deref for LargeWords {
    type Target = [Word];

    fn deref(&self) -> &[Word] {
        bytemuck::cast_slice(&self.bytes[self.start..])
    }
}

impl DerefMut for LargeWords {
    fn deref_mut(&mut self) -> &mut [Word] {
        bytemuck::cast_slice_mut(&mut self.bytes[self.start..])
    }
}

/// Asks for large pages in memory that begins with one. Where there are none, nothing changes.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the standard library cannot give the system advice about memory")]
fn ask_for_large_pages(memory: &mut [u8]) {
    let whole = memory.len() / LARGE_PAGE * LARGE_PAGE;
    // SAFETY: the range lies in memory that the slice has to itself, and this advice never changes what memory holds.
    unsafe { libc::madvise(memory.as_mut_ptr().cast(), whole, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages(_memory: &mut [u8]) {}

fn out_of_memory(needed_bytes: u64, available_bytes: u64, what: &str, device: &str) -> KernelError {
    KernelError::OutOfMemory { what: what.to_owned(), needed_bytes, available_bytes, device: device.to_owned() }
}

/// Systems promise more memory than there is and end a process that takes them at their word. So large wishes are compared with what
/// is available first.
fn check_room(needed_bytes: u64, what: &str, device: &str) -> Result<(), KernelError> {
    if needed_bytes < CHECKED_FROM_BYTES {
        return Ok(());
    }
    match available_bytes() {
        available if available != 0 && needed_bytes > available => {
            Err(out_of_memory(needed_bytes, available, what, device))
        }
        _ => Ok(()),
    }
}

/// `count` elements of zero, for `what` on `device`.
pub(crate) fn zeroed<T: Copy + Default>(count: usize, what: &str, device: &str) -> Result<Vec<T>, KernelError> {
    let needed_bytes = (count as u64).saturating_mul(size_of::<T>() as u64);
    check_room(needed_bytes, what, device)?;
    let mut values = Vec::new();
    let reserved = values.try_reserve_exact(count);
    reserved.map_err(|_source| out_of_memory(needed_bytes, available_bytes(), what, device))?;
    values.resize(count, T::default());
    Ok(values)
}

/// The product of sizes that come from a configuration, or an error that names `what`.
pub(crate) fn product(sizes: &[usize], what: &str, device: &str) -> Result<usize, KernelError> {
    let total = sizes.iter().try_fold(1usize, |total, &size| total.checked_mul(size));
    total.ok_or_else(|| out_of_memory(u64::MAX, available_bytes(), what, device))
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
    fn words_in_large_pages_are_zero_and_can_be_written() {
        for count in [0, 1, 32_767, 32_768, 100_003] {
            let mut words = LargeWords::zeroed(count, "numbers", "cpu").unwrap();
            assert_eq!(words.len(), count);
            assert!(words.iter().all(|word| word.0 == [0; 64]));
            words.iter_mut().zip(0..).for_each(|(word, i)| word.0[63] = i as u8);
            assert!(words.iter().zip(0..).all(|(word, i)| word.0[63] == i as u8));
        }
        let error = LargeWords::zeroed(usize::MAX / 128, "weights", "cpu").err();
        assert!(matches!(&error, Some(KernelError::OutOfMemory { what, .. }) if what == "weights"), "{error:?}");
    }
}

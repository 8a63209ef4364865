//! Memory of the host: allocation that fails with an error instead of ending the process.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

use bytemuck::Pod;
use bytes::{Bytes, BytesMut};

use super::simd::Word;
use crate::{KernelError, host};

/// Below this, an allocation is not compared with what the system says is available: asking takes longer.
const CHECKED_FROM_BYTES: u64 = 16 << 20;

/// What is free; 0 where the system does not say.
pub(crate) fn available_bytes() -> u64 {
    host::available_memory_bytes().unwrap_or(0)
}

/// Bytes of a large page of most systems. Reading memory in such pages needs fewer walks through page tables: one thread reads 20 in
/// place of 15 GB/s where the system grants them, which Linux does by default to those who ask.
const LARGE_PAGE: usize = 2 << 20;

/// What is taken from the system for matrices that are smaller.
const REGION: usize = 4 * LARGE_PAGE;

/// Memory for weights, all of it in large pages: small matrices share them.
#[derive(Default)]
pub(crate) struct Arena {
    /// What is left of a region, zeros.
    rest: BytesMut,
}

impl Arena {
    /// `count` numbers of zero, for `what` on `device`, from where a [`Word`] may begin. A region is given back with the last of its parts
    /// and when nothing is left of it here: what is left keeps it.
    pub(crate) fn take<T: Pod>(&mut self, count: usize, what: &str, device: &str) -> Result<ArenaPart<T>, KernelError> {
        let used = product(&[count, size_of::<T>()], what, device)?;
        let bytes = product(&[used.div_ceil(size_of::<Word>()), size_of::<Word>()], what, device)?;
        check_room(bytes as u64, what, device)?;
        let part = |mut memory: BytesMut| {
            memory.truncate(used);
            ArenaPart { memory, numbers: PhantomData }
        };
        // No words of no region would not even be where words may be.
        if !self.rest.is_empty() && bytes <= self.rest.len() {
            return Ok(part(self.rest.split_to(bytes)));
        }
        let whole = bytes.max(REGION).checked_next_multiple_of(LARGE_PAGE);
        // Bytes, because memory for what is aligned would be written with zeros here, and small pages be made of it. What lies before the
        // first large page is not written either, and so takes no memory.
        let taken = whole.and_then(|whole| whole.checked_add(LARGE_PAGE));
        let taken: Option<Vec<u8>> = taken.and_then(|taken| bytemuck::allocation::try_zeroed_vec(taken).ok());
        let taken = taken.ok_or_else(|| out_of_memory(bytes as u64, available_bytes(), what, device))?;
        let mut region = BytesMut::from(Bytes::from(taken));
        let _before = region.split_to(region.as_ptr().align_offset(LARGE_PAGE));
        region.truncate(region.len() / LARGE_PAGE * LARGE_PAGE);
        ask_for_large_pages(&mut region);
        let taken = part(region.split_to(bytes));
        if region.len() > self.rest.len() {
            self.rest = region;
        }
        Ok(taken)
    }
}

/// A matrix's part of an [`Arena`]; the memory lives as long as the last part.
pub(crate) struct ArenaPart<T> {
    memory: BytesMut,
    numbers: PhantomData<T>,
}

impl<T: Pod> Deref for ArenaPart<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.memory)
    }
}

impl<T: Pod> DerefMut for ArenaPart<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.memory)
    }
}

/// Asks for large pages in memory that is made of them. Where there are none, nothing changes.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the standard library cannot give the system advice about memory")]
fn ask_for_large_pages(memory: &mut [u8]) {
    // SAFETY: the range lies in memory that the slice has to itself, and this advice never changes what memory holds.
    unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
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
    fn parts_of_an_arena_are_zero_and_nobody_elses() {
        let mut arena = Arena::default();
        // Several in a region, one larger than a region, and small ones in what that leaves.
        let counts = [0, 1, 100, 32_767, 32_768, 100_003, 500_000, 77, 60_000, 5];
        let mut parts: Vec<_> = counts.map(|count| arena.take::<Word>(count, "numbers", "cpu").unwrap()).into();
        for (part, count) in parts.iter_mut().zip(counts) {
            assert_eq!(part.len(), count);
            assert!(part.iter().all(|word| word.0 == [0; 64]));
            part.fill(Word([count as u8 | 1; 64]));
        }
        drop(arena);
        drop(parts.remove(1));
        for (part, count) in parts.iter().zip(counts.into_iter().filter(|&count| count != 1)) {
            assert!(part.iter().all(|word| word.0 == [count as u8 | 1; 64]));
        }
    }

    #[test]
    fn small_matrices_share_large_pages() {
        let mut arena = Arena::default();
        let first = arena.take::<Word>(10, "numbers", "cpu").unwrap();
        let second = arena.take::<u8>(65, "numbers", "cpu").unwrap();
        let third = arena.take::<f32>(1, "numbers", "cpu").unwrap();
        assert!(first.as_ptr().cast::<u8>().addr().is_multiple_of(LARGE_PAGE));
        assert_eq!(first.as_ptr_range().end.cast::<u8>(), second.as_ptr());
        assert_eq!((second.len(), third.len()), (65, 1));
        assert_eq!(third.as_ptr().addr() - second.as_ptr().addr(), 2 * size_of::<Word>());
    }

    #[test]
    fn an_arena_that_cannot_grow_says_for_what() {
        for count in [usize::MAX / 128, usize::MAX / 64] {
            let error = Arena::default().take::<Word>(count, "weights", "cpu").err();
            assert!(matches!(&error, Some(KernelError::OutOfMemory { what, .. }) if what == "weights"), "{error:?}");
        }
    }
}

//! Asking memory for weights before they are needed: how long before, and into which cache. What they mean is not known here, and a
//! result never depends on it.
//!
//! A core has few places for what it waits for. Words that come from memory hold one so long that a second asking, once they are near,
//! has products find them in the first-level cache and hold none.

use std::sync::LazyLock;

/// How many bytes before their use a stream's lines should be asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    /// Into the second-level cache, which has room for more misses at a time than the first.
    pub(super) second_level: usize,
    /// From there into the first, if that pays.
    pub(super) first_level: Option<usize>,
}

impl Ahead {
    /// What suits this CPU. Zen (Zen 4 was measured) sees a stream coming by itself but where a page of 4 KiB begins, and what is asked for
    /// earlier only takes room from that: 512 bytes gave 31 GB/s where 6144 gave 23. The Xeon that was measured wants to be told early,
    /// and twice: a loop by itself that multiplies by Q4_K read 90 % of what can be read, and with the second asking all of it.
    pub(super) fn of_this_cpu() -> Self {
        static AHEAD: LazyLock<Ahead> = LazyLock::new(|| match is_amd() {
            true => Ahead { second_level: 512, first_level: None },
            false => Ahead { second_level: 12 << 10, first_level: Some(6 << 10) },
        });
        *AHEAD
    }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx] == [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes)
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
}

/// Asks memory for what comes next while words are read one after the other: once each, or `TWICE`, for the first-level cache too.
pub(super) struct Ask<const TWICE: bool> {
    second_level: *const u8,
    first_level: *const u8,
    /// Distance from there.
    next: usize,
    /// Bytes on for each word that is read: its own size if `TWICE`.
    step: usize,
}

impl<const TWICE: bool> Ask<TWICE> {
    /// Asks for what the reader will itself read soon, as suits this CPU.
    #[inline(always)]
    pub(super) fn of_own<W>(words: *const W) -> Self {
        let Ahead { second_level, first_level } = Ahead::of_this_cpu();
        let place = |ahead| words.cast::<u8>().wrapping_add(ahead);
        let first_level = place(first_level.unwrap_or(second_level));
        Self { second_level: place(second_level), first_level, next: 0, step: size_of::<W>() }
    }

    /// Asks for what lies `from` bytes behind the first of the words, `step` bytes a word; once.
    #[inline(always)]
    pub(super) fn of_next<W>(words: *const W, from: usize, step: usize) -> Self {
        debug_assert!(!TWICE, "what others will read is theirs to ask for into the first level");
        let second_level = words.cast::<u8>().wrapping_add(from);
        Self { second_level, first_level: second_level, next: 0, step }
    }

    /// A word is about to be read.
    #[inline(always)]
    pub(super) fn one<W>(&mut self) {
        prefetch::<2>(self.second_level.wrapping_add(self.next));
        if TWICE {
            prefetch::<1>(self.first_level.wrapping_add(self.next));
        }
        self.next += if TWICE { size_of::<W>() } else { self.step };
    }
}

/// Asks for a line of memory into the cache of this level, 1 or 2. Changes nothing, and an address without memory behind it is passed
/// over.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "an instruction takes a pointer that nobody follows"))]
pub(super) fn prefetch<const LEVEL: u8>(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: these instructions read nothing and never fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        match LEVEL {
            1 => _mm_prefetch::<_MM_HINT_T0>(line.cast()),
            _ => _mm_prefetch::<_MM_HINT_T1>(line.cast()),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

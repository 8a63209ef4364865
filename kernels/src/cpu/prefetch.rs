//! Prefetching what will be read soon: how far ahead, and into which cache. This file knows nothing of what is read, and no result depends
//! on it.
//!
//! A core can wait for few cache lines at a time. A line from memory occupies its slot for long, a line from the second-level cache only
//! for some cycles. So a core that reads a stream once prefetches it early into the second level and, where that pays, from there into the
//! first.

use std::sync::LazyLock;

/// Bytes ahead to prefetch into the second level, where the first level is used too; up to four times as much makes no difference.
const SECOND_LEVEL: usize = 12 << 10;
/// Bytes ahead to prefetch into the first level in that case.
const FIRST_LEVEL: usize = 6 << 10;

/// Bytes ahead that a row of weights is asked for into the first level, where products in f32 read several rows side by side, once each: BF16
/// by one row of inputs went from 67 to 75 % of what can be read, on the Xeon that was measured, F16 from 72 to 83 %.
pub(super) const ROWS_AHEAD: usize = 1 << 10;

/// Bytes ahead that are asked for, into the second level, where that is all. Zen (Zen 4 was measured) sees a stream coming by itself but
/// where a page of 4 KiB begins, and what is asked for earlier only takes room from that: 512 bytes gave 31 GB/s where 6144 gave 23. The
/// Xeons that were measured want to be told early.
pub(super) fn distance() -> usize {
    static DISTANCE: LazyLock<usize> = LazyLock::new(|| if is_amd() { 512 } else { 6 << 10 });
    *DISTANCE
}

/// Whether asking twice pays on this CPU: with AVX-512 it does on the Xeon that was measured, where a loop by itself that multiplies by Q4_K
/// read 90 % of what can be read with one asking, and all of it with two.
#[cfg(target_arch = "x86_64")]
pub(super) fn twice_pays() -> bool {
    !is_amd()
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

/// Asks for what comes next while words are read one after the other: once, or `TWICE`.
pub(super) struct Ask<W, const TWICE: bool> {
    second_level: *const W,
    /// Used if `TWICE`.
    first_level: *const W,
    /// Bytes that both have moved on.
    moved: usize,
    /// Bytes that they move on for each word that is read: its size if `TWICE`.
    step: usize,
}

impl<W, const TWICE: bool> Ask<W, TWICE> {
    /// Prefetches what the reader of these words reads next: the rest of the `left` bytes that begin with them, or what begins at `then`.
    /// One call picks one of the two: the one in which most of the distance ahead lies. If `then` is null, it is what follows in memory.
    #[inline(always)]
    pub(super) fn of_own(words: &[W], left: usize, then: *const W) -> Self {
        let (second_level, first_level) = if TWICE { (SECOND_LEVEL, FIRST_LEVEL) } else { (distance(), 0) };
        let [second_level, first_level] = [second_level, first_level].map(|ahead| {
            let begins = words.as_ptr().wrapping_byte_add(ahead);
            if then.is_null() || ahead + size_of_val(words) / 2 <= left {
                begins
            } else {
                then.wrapping_byte_add(ahead).wrapping_byte_sub(left)
            }
        });
        Self { second_level, first_level, moved: 0, step: size_of::<W>() }
    }

    /// Asks for what lies `from` bytes behind the first of the words that are read, `step` bytes for each of them.
    #[inline(always)]
    pub(super) fn behind(words: *const W, from: usize, step: usize) -> Self {
        let begin = words.wrapping_byte_add(from);
        Self { second_level: begin, first_level: begin, moved: 0, step }
    }

    /// A word is about to be read.
    #[inline(always)]
    pub(super) fn one(&mut self) {
        prefetch::<2, W>(self.second_level.wrapping_byte_add(self.moved));
        if TWICE {
            prefetch::<1, W>(self.first_level.wrapping_byte_add(self.moved));
        }
        self.moved = if TWICE { self.moved + size_of::<W>() } else { plus(self.moved, self.step) };
    }
}

/// `a + b`, of which the compiler learns nothing. Where it can see a step, it keeps an address in memory for each word of a block and asks
/// for all of them at once, behind the block's products: prefill of 512 tokens went from 158 to 98 tokens/s.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "nothing else hides a number in a register"))]
fn plus(a: usize, b: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let mut sum = a;
        // SAFETY: one addition of registers.
        unsafe { std::arch::asm!("add {}, {}", inout(reg) sum, in(reg) b, options(pure, nomem, nostack)) };
        sum
    }
    #[cfg(not(target_arch = "x86_64"))]
    a.wrapping_add(b)
}

/// Asks for a line of memory into the cache of this level, 1 or 2. Changes nothing, and an address without memory behind it is passed
/// over.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "an instruction takes a pointer that nobody follows"))]
pub(super) fn prefetch<const LEVEL: u8, T>(line: *const T) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_is_asked_for_when_the_readers_own_weights_come_to_an_end() {
        let (memory, then) = (vec![[0_u8; 64]; 1024], vec![[0_u8; 64]; 1024]);
        let words = &memory[..16];
        let own = |ahead: usize| words.as_ptr().wrapping_byte_add(ahead);
        let half = size_of_val(words) / 2;
        // In the middle of a product, and where nobody knows what follows, the reader's own.
        for (left, then) in [(SECOND_LEVEL + half, then.as_ptr()), (half, std::ptr::null())] {
            let ask = Ask::<_, true>::of_own(words, left, then);
            assert_eq!((ask.second_level, ask.first_level), (own(SECOND_LEVEL), own(FIRST_LEVEL)), "{left} bytes left");
        }
        // So that the first line that follows is asked for when so many bytes are left as are asked for ahead.
        let left = FIRST_LEVEL + half;
        let ask = Ask::<_, true>::of_own(words, left, then.as_ptr());
        assert_eq!(ask.second_level, then.as_ptr().wrapping_byte_add(SECOND_LEVEL).wrapping_byte_sub(left));
        assert_eq!(ask.first_level, own(FIRST_LEVEL));
        let ask = Ask::<_, false>::of_own(words, half, then.as_ptr());
        assert_eq!(ask.second_level, then.as_ptr().wrapping_byte_add(distance()).wrapping_byte_sub(half));
    }
}

//! The pool of KV block numbers: who owns which is decided here, for all stages alike.
//!
//! Two counts are kept apart. A *reservation* is a promise made at admission, for the longest that a sequence may become. *Owned*
//! blocks are numbers handed out as positions are written. More may be promised than there is; `safety` decides when a promise may
//! be made and when a block may be handed out, so that each promise is kept in the end.
//!
//! Blocks of an ended sequence are free once every stage knows that it has ended. The micro-batch that tells them so may use them
//! itself; from every other one they are *withheld* until it is back.

use std::collections::BTreeSet;

/// Free numbers and promises.
#[derive(Debug)]
pub(super) struct BlockPool {
    total: u32,
    reserved: u64,
    /// Numbers from here on were never used: a pool of any size costs nothing until it is.
    unused_from: u32,
    /// Numbers below `unused_from` that came back.
    returned: BTreeSet<u32>,
}

impl BlockPool {
    pub(super) fn new(total: u32) -> Self {
        Self { total, reserved: 0, unused_from: 0, returned: BTreeSet::new() }
    }

    pub(super) fn total(&self) -> u32 {
        self.total
    }

    pub(super) fn reserved(&self) -> u64 {
        self.reserved
    }

    pub(super) fn free(&self) -> u32 {
        self.total - self.unused_from + self.returned.len() as u32
    }

    /// Promises `count` blocks.
    pub(super) fn reserve(&mut self, count: u32) {
        self.reserved += u64::from(count);
    }

    /// Hands out `count` promised blocks, lowest numbers first: the same history gives the same numbers.
    pub(super) fn take(&mut self, count: u32) -> Vec<u32> {
        assert!(count <= self.free(), "a sequence takes no more blocks than are free");
        let next = |_| {
            self.returned.pop_first().unwrap_or_else(|| {
                self.unused_from += 1;
                self.unused_from - 1
            })
        };
        (0..count).map(next).collect()
    }

    /// Takes a sequence's blocks and its promise back.
    pub(super) fn give_back(&mut self, blocks: &[u32], reserved: u32) {
        self.reserved -= u64::from(reserved);
        for &block in blocks {
            let was_out = block < self.unused_from && self.returned.insert(block);
            assert!(was_out, "block {block} came back twice");
        }
    }

    /// Takes those of these blocks that are free out of circulation, and says which they are.
    pub(super) fn withhold(&mut self, blocks: impl Iterator<Item = u32>) -> Vec<u32> {
        blocks.filter(|block| self.returned.remove(block)).collect()
    }

    /// Puts withheld blocks back.
    pub(super) fn restore(&mut self, withheld: &[u32]) {
        self.returned.extend(withheld);
    }

    /// Whether this number is free.
    pub(super) fn is_free(&self, block: u32) -> bool {
        block >= self.unused_from || self.returned.contains(&block)
    }
}

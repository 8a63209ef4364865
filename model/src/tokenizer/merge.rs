//! Byte-pair encoding of a stretch of text: neighbours that make a piece together are joined, the best pair first, the leftmost of
//! equals, until no pair is a piece.
//!
//! Symbols are not kept as objects: each byte of the stretch has two lengths, of the symbol that begins there and of the one that ends
//! there, so that both neighbours of a symbol are found by adding and subtracting. With the queue of pairs that is some thirty
//! bytes for each byte of text, whatever the text.

use std::{cmp::Ordering, collections::BinaryHeap};

use super::Tokenizer;

/// Longest stretch that is joined as one, in bytes: its places fit 32 bits.
pub(super) const LONGEST_STRETCH: usize = 1 << 31;

/// Memory that one stretch after the other uses.
#[derive(Default)]
pub(super) struct Merger {
    /// Length of the symbol that begins at a byte; 0 where none does.
    begins: Vec<u16>,
    /// Length of the symbol that ends before the byte after this one.
    ends: Vec<u16>,
    pairs: BinaryHeap<Pair>,
}

impl Merger {
    /// Adds the ids of a stretch of at most [`LONGEST_STRETCH`] bytes.
    pub(super) fn encode(&mut self, tokenizer: &Tokenizer, text: &str, ids: &mut Vec<u32>) {
        self.begin(text);
        let mut pairs = std::mem::take(&mut self.pairs).into_vec();
        let mut left = 0;
        while left < text.len() {
            pairs.extend(self.pair(tokenizer, text, left));
            left += usize::from(self.begins[left]);
        }
        // Faster than one after the other, and no larger than needed.
        self.pairs = pairs.into();
        while let Some(pair) = self.pairs.pop() {
            self.join(tokenizer, text, pair);
        }
        let mut at = 0;
        while at < text.len() {
            let end = at + usize::from(self.begins[at]);
            tokenizer.push_ids(&text[at..end], ids);
            at = end;
        }
    }

    /// Every character is a symbol.
    fn begin(&mut self, text: &str) {
        for lengths in [&mut self.begins, &mut self.ends] {
            lengths.clear();
            lengths.resize(text.len(), 0);
        }
        for (at, char) in text.char_indices() {
            let length = char.len_utf8();
            self.begins[at] = length as u16;
            self.ends[at + length - 1] = length as u16;
        }
    }

    /// The symbol at `left` and the next one, if there is one and they make a piece.
    fn pair(&self, tokenizer: &Tokenizer, text: &str, left: usize) -> Option<Pair> {
        let middle = left + usize::from(self.begins[left]);
        let length = middle - left + usize::from(*self.begins.get(middle)?);
        if length > tokenizer.longest_learned {
            return None;
        }
        let id = tokenizer.learned.get(&text[left..left + length])?;
        Some(Pair { score: tokenizer.pieces[*id as usize].score, left: left as u32, length: length as u16 })
    }

    fn join(&mut self, tokenizer: &Tokenizer, text: &str, pair: Pair) {
        let (left, length) = (pair.left as usize, usize::from(pair.length));
        let first = usize::from(self.begins[left]);
        let (middle, end) = (left + first, left + length);
        // Outdated: one of the two has been joined with another since.
        if first == 0 || middle >= end || middle + usize::from(self.begins[middle]) != end {
            return;
        }
        self.begins[left] = pair.length;
        self.begins[middle] = 0;
        self.ends[end - 1] = pair.length;
        self.pairs.extend(self.pair(tokenizer, text, left));
        if let Some(last) = left.checked_sub(1) {
            let before = left - usize::from(self.ends[last]);
            self.pairs.extend(self.pair(tokenizer, text, before));
        }
    }
}

/// Two neighbours that make a piece together: where, and how long it is.
struct Pair {
    score: f32,
    left: u32,
    length: u16,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        // Highest score first, then leftmost.
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

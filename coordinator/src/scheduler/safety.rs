//! Who may take blocks now: Dijkstra's banker.
//!
//! A sequence says at admission how many blocks it may come to own, and takes them as its positions are written. Together the
//! sequences may have been promised more than there is, as long as the state is *safe*: there is an order in which each can take
//! all it was promised and end, with what is free and what those before it give back. A sequence whose next blocks would make the
//! state unsafe waits until another one ends. One sequence can always continue, so none waits for ever; and a long reservation
//! that is hardly used yet keeps no other out.

use std::collections::BTreeMap;

use grokpipe_proto::ids::SequenceId;

use super::Scheduler;

/// Blocks that are about to be taken, by sequence.
pub(super) type Grants = BTreeMap<SequenceId, u32>;

fn granted(grants: &Grants) -> u64 {
    grants.values().map(|count| u64::from(*count)).sum()
}

impl Scheduler {
    /// Whether the state stays safe with these grants and with one more sequence, of which `newcomer` says how many blocks it takes
    /// at once and how many it may come to own.
    pub(super) fn is_safe(&self, grants: &Grants, newcomer: Option<(u32, u32)>) -> bool {
        let promised = self.pool.reserved() + newcomer.map_or(0, |(_, most)| u64::from(most));
        if promised <= u64::from(self.pool.total()) {
            return true;
        }
        let owned: u64 = self.sequences.values().map(|sequence| sequence.blocks.len() as u64).sum();
        let taken = granted(grants) + newcomer.map_or(0, |(first, _)| u64::from(first));
        // Withheld blocks count as free: they come back with the micro-batch that they wait for.
        let Some(mut free) = u64::from(self.pool.total()).checked_sub(owned + taken) else { return false };
        // What each still lacks, and what it gives back: those that lack least end first.
        let mut holders: Vec<(u32, u32)> = self
            .sequences
            .iter()
            .map(|(id, sequence)| {
                let owned = sequence.blocks.len() as u32 + grants.get(id).copied().unwrap_or(0);
                (if sequence.released { 0 } else { sequence.reserved_blocks.saturating_sub(owned) }, owned)
            })
            .chain(newcomer.map(|(first, most)| (most - first, first)))
            .collect();
        holders.sort_unstable();
        holders.into_iter().all(|(lacking, owned)| {
            let can_end = u64::from(lacking) <= free;
            free += u64::from(owned);
            can_end
        })
    }

    /// Adds what this sequence needs for its next slice to the grants, and returns whether that is possible. If not, it is short of
    /// blocks, and no sequence is admitted until it has them: newcomers would take them.
    pub(super) fn grant(&mut self, id: SequenceId, grants: &mut Grants) -> bool {
        let count = self.sequences.get(&id).map_or(0, |sequence| sequence.next_blocks(&self.config));
        if count == 0 {
            return true;
        }
        grants.insert(id, count);
        let safe = self.is_safe(grants, None);
        if !safe {
            self.short_of_blocks.insert(id);
        }
        let may_take = safe && granted(grants) <= u64::from(self.pool.free());
        if !may_take {
            grants.remove(&id);
        }
        may_take
    }
}

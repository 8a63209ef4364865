//! What is always true of a scheduler, whatever happened to it. Tests check it after every event.

use std::collections::BTreeSet;

use super::Scheduler;
use super::safety::Grants;
use super::sequence::Phase;

impl Scheduler {
    /// Checks everything that must hold between two calls.
    ///
    /// # Panics
    /// When something does not hold: the scheduler has a bug.
    pub fn check_invariants(&self) {
        self.check_blocks();
        self.check_micro_batches();
        self.check_queues();
    }

    /// Every block is free or has one owner; no sequence owns more than was promised, and all can still get what they were promised.
    fn check_blocks(&self) {
        let mut owned = BTreeSet::new();
        let mut reserved = 0;
        for (id, sequence) in &self.sequences {
            for &block in &sequence.blocks {
                assert!(block < self.pool.total(), "sequence {id} owns block {block}, which does not exist");
                assert!(!self.pool.is_free(block), "block {block} of sequence {id} is free as well");
                assert!(owned.insert(block), "block {block} of sequence {id} has two owners");
            }
            let owns = sequence.blocks.len() as u32;
            assert!(owns <= sequence.reserved_blocks, "sequence {id} owns more blocks than it reserved");
            reserved += u64::from(sequence.reserved_blocks);
        }
        let mut withheld = 0;
        for block in self.in_flight.values().flat_map(|batch| &batch.withheld) {
            assert!(!self.pool.is_free(*block) && !owned.contains(block), "withheld block {block} is in use");
            withheld += 1;
        }
        assert_eq!(owned.len() as u32 + self.pool.free() + withheld, self.pool.total(), "a block is lost");
        assert_eq!(reserved, self.pool.reserved(), "reservations do not add up");
        assert!(
            self.is_safe(&Grants::new(), None),
            "some sequences can no longer get the blocks that they were promised"
        );
    }

    /// No more than allowed are under way, no more of them run than may, and no sequence is in two of them.
    fn check_micro_batches(&self) {
        assert!(self.in_flight.len() <= self.in_flight_ceiling, "too many micro-batches are under way");
        let mut members = BTreeSet::new();
        for (id, batch) in &self.in_flight {
            assert!(!batch.members.is_empty(), "micro-batch {id} is empty");
            for member in &batch.members {
                assert!(members.insert(*member), "sequence {member} is in two micro-batches");
                let state = self.sequences.get(member);
                assert!(state.is_some_and(|state| state.in_flight == Some(*id)), "sequence {member} forgot batch {id}");
            }
        }
        let under_way = self.sequences.values().filter(|sequence| sequence.in_flight.is_some()).count();
        assert_eq!(under_way, members.len(), "a sequence waits for a micro-batch that is not under way");
    }

    /// Every sequence that can run is in one queue, and every one that waits for admission has a reason to.
    fn check_queues(&self) {
        assert!(self.waiting.len() <= self.config.max_waiting, "too many sequences wait");
        assert!(self.sequences.len() <= self.config.max_running, "too many sequences run");
        for (id, sequence) in &self.sequences {
            let idle = sequence.in_flight.is_none();
            let decodes = idle && sequence.is_decoding();
            let prefills = idle && sequence.phase == Phase::Prefill;
            assert!(!(idle && sequence.released), "released sequence {id} was not forgotten");
            assert_eq!(
                self.prefill_ready.contains(&(sequence.admitted, *id)),
                prefills,
                "prefill queue, sequence {id}"
            );
            let times = self.decode_ready.iter().filter(|ready| *ready == id).count();
            assert_eq!(times, usize::from(decodes), "decode queue, sequence {id}");
        }
        for id in &self.short_of_blocks {
            assert!(self.sequences.contains_key(id), "sequence {id} is short of blocks, and gone");
        }
        let ready = self.prefill_ready.len() + self.decode_ready.len();
        let idle = |phase: Phase| phase != Phase::Done;
        let expected = self.sequences.values().filter(|state| state.in_flight.is_none() && idle(state.phase)).count();
        assert_eq!(ready, expected, "a queue holds a sequence that is gone");
    }
}

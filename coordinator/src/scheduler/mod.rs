//! The scheduler decides which sequences are in the next micro-batch and which KV blocks they own. Pure: events in, micro-batches
//! out; no clocks, no sockets, no randomness. The same events give the same micro-batches.
//!
//! The one idea: a pipeline of S stages is full when S micro-batches are under way, and since a token must come back before the
//! next can be fed, no sequence is in two of them. So the sequences are dealt out over S groups (`batch`), and an admitted sequence
//! (`admission`) gets all the memory (`blocks`) that it was promised (`safety`). `invariants` says what is always true.
//!
//! It knows ids, positions, tokens and blocks. It does not know when a sequence should end (the session does, and calls
//! [`Scheduler::release`]), who waits for it, what a token means, or which worker is which.

mod admission;
mod batch;
mod blocks;
mod invariants;
mod safety;
mod sequence;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use grokpipe_proto::ids::{MicroBatchId, SequenceId};

use admission::Waiting;
use batch::{Closed, InFlight, Kind};
use blocks::BlockPool;
use sequence::Sequence;
pub use types::{ClientId, CompleteError, Completion, MicroBatch, Rejected, SchedulerConfig, Slice};

/// Sequences, blocks and micro-batches under way.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    /// Not yet admitted, in order of arrival.
    waiting: VecDeque<Waiting>,
    /// How many sequences were admitted ahead of the one that has waited longest.
    passes: usize,
    /// Admitted.
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Admitted sequences whose next chunk may run, by order of admission: the oldest prompt is finished first.
    prefill_ready: BTreeSet<(u64, SequenceId)>,
    /// Sequences whose next token may run, longest ready first.
    decode_ready: VecDeque<SequenceId>,
    /// Sequences whose next slice has to wait for blocks.
    short_of_blocks: BTreeSet<SequenceId>,
    in_flight: BTreeMap<MicroBatchId, InFlight>,
    /// Ended sequences that no micro-batch has announced to the stages yet.
    closed: Vec<Closed>,
    next_micro_batch: MicroBatchId,
    next_admitted: u64,
    /// Kind of the last micro-batch.
    last_kind: Kind,
    /// What `in_flight` may hold: the limit, or what was under way when the limit fell.
    in_flight_ceiling: usize,
}

impl Scheduler {
    /// An empty scheduler.
    ///
    /// # Panics
    /// When a size that must not be zero is (`block_tokens`, `prefill_chunk_tokens`, `max_batch_sequences`), or when a chunk of
    /// prefill is longer than a micro-batch.
    pub fn new(config: SchedulerConfig) -> Self {
        assert!(config.block_tokens > 0, "a block holds at least one token");
        assert!(config.prefill_chunk_tokens > 0, "a chunk of prefill has at least one token");
        assert!(config.max_batch_sequences > 0, "a micro-batch has at least one sequence");
        assert!(
            config.prefill_chunk_tokens as usize <= config.max_batch_tokens,
            "a chunk of prefill fits into a micro-batch"
        );
        let mut scheduler = Self {
            config,
            pool: BlockPool::new(config.kv_blocks),
            waiting: VecDeque::new(),
            passes: 0,
            sequences: BTreeMap::new(),
            prefill_ready: BTreeSet::new(),
            decode_ready: VecDeque::new(),
            short_of_blocks: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            closed: Vec::new(),
            next_micro_batch: MicroBatchId(1),
            next_admitted: 0,
            last_kind: Kind::Decode,
            in_flight_ceiling: 0,
        };
        scheduler.reconfigure(config.stages);
        scheduler
    }

    /// A plan with this many stages is in force (none counts as one). Micro-batches that are still under way stay so.
    pub fn reconfigure(&mut self, stages: usize) {
        self.config.stages = stages.max(1);
        self.in_flight_ceiling = self.in_flight_limit().max(self.in_flight.len());
    }

    /// Forgets every sequence, waiting or running, and everything under way, because a stage was lost. Returns these
    /// sequences, by number, without those that had been released. Stages forget with the next plan epoch, so nothing is left to close.
    pub fn abort_all(&mut self) -> Vec<SequenceId> {
        let mut gone: BTreeSet<SequenceId> = self.waiting.drain(..).map(|waiting| waiting.id).collect();
        self.passes = 0;
        for (id, sequence) in std::mem::take(&mut self.sequences) {
            self.pool.give_back(&sequence.blocks, sequence.reserved_blocks);
            if !sequence.released {
                gone.insert(id);
            }
        }
        self.prefill_ready.clear();
        self.decode_ready.clear();
        self.short_of_blocks.clear();
        for batch in std::mem::take(&mut self.in_flight).into_values() {
            self.pool.restore(&batch.withheld);
        }
        self.closed.clear();
        self.in_flight_ceiling = self.in_flight_limit();
        gone.into_iter().collect()
    }

    /// Most micro-batches under way: one for each stage, and one more that hides the way from the last stage back to the first.
    pub fn in_flight_limit(&self) -> usize {
        self.config.stages + 1
    }

    /// Admitted sequences.
    pub fn running(&self) -> usize {
        self.sequences.len()
    }

    /// Sequences that wait for admission.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

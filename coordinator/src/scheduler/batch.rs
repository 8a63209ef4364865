//! Which micro-batch runs next, and what its result means.
//!
//! Decoding sequences are dealt out over as many groups as there are stages, so that each stage has one to work on while the
//! others are elsewhere; fuller groups would leave stages idle, more and smaller ones would read the weights more often. Chunks of
//! prefill go one sequence a micro-batch and may use one place more, so that a full pipeline of decoding never shuts them out.
//! When both could run they take turns. No micro-batch has more tokens than a stage takes: a token for each sequence that decodes,
//! or one chunk.
//!
//! A micro-batch also tells the stages which sequences have ended. One that fails may not have reached them all, so the next
//! one repeats the list.

use std::collections::BTreeMap;

use grokpipe_proto::ids::{MicroBatchId, SequenceId};

use super::Scheduler;
use super::safety::Grants;
use super::types::{CompleteError, Completion, MicroBatch};

/// What a micro-batch carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Prefill,
    Decode,
}

/// A micro-batch under way.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) kind: Kind,
    pub(super) members: Vec<SequenceId>,
    /// Ended sequences that it announces to the stages.
    pub(super) closed: Vec<Closed>,
    /// Their blocks that it does not use itself. No other micro-batch may use them until it is back.
    pub(super) withheld: Vec<u32>,
}

/// An ended sequence that stages still know, and the blocks that it owned.
#[derive(Debug)]
pub(super) struct Closed {
    pub(super) sequence: SequenceId,
    pub(super) blocks: Vec<u32>,
}

impl Scheduler {
    /// The next micro-batch for the pipeline; `None` while there is nothing to do or enough is under way. Call it after
    /// every change until it returns `None`.
    pub fn next_micro_batch(&mut self) -> Option<MicroBatch> {
        if self.in_flight.len() >= self.in_flight_limit() {
            return None;
        }
        let (decode, prefill) = (self.next_group(), self.next_prefill());
        let (kind, members) = match (decode.is_empty(), prefill) {
            (true, None) => return None,
            (false, Some(id)) if self.last_kind == Kind::Decode => (Kind::Prefill, vec![id]),
            (true, Some(id)) => (Kind::Prefill, vec![id]),
            (false, _) => (Kind::Decode, decode),
        };
        match kind {
            Kind::Decode => self.decode_ready.retain(|id| !members.contains(id)),
            Kind::Prefill => self.prefill_ready.retain(|(_, id)| !members.contains(id)),
        }
        self.last_kind = kind;
        Some(self.issue(kind, members))
    }

    /// The sequences of the next group, longest ready first, without those that are short of blocks.
    pub(super) fn next_group(&mut self) -> Vec<SequenceId> {
        let (size, mut grants) = (self.decode_group_size(), Grants::new());
        let mut group = Vec::with_capacity(size);
        for index in 0..self.decode_ready.len() {
            if group.len() == size {
                break;
            }
            let id = self.decode_ready[index];
            if self.grant(id, &mut grants) {
                group.push(id);
            }
        }
        group
    }

    /// The sequence whose chunk is next: the first admitted that is not short of blocks.
    pub(super) fn next_prefill(&mut self) -> Option<SequenceId> {
        let ready: Vec<SequenceId> = self.prefill_ready.iter().map(|(_, id)| *id).collect();
        ready.into_iter().find(|id| self.grant(*id, &mut Grants::new()))
    }

    /// How many sequences the next group takes; 0 when there is none or every stage has its group.
    fn decode_group_size(&self) -> usize {
        let stages = self.config.stages;
        let groups = self.in_flight.values().filter(|batch| batch.kind == Kind::Decode).count();
        if self.decode_ready.is_empty() || groups >= stages {
            return 0;
        }
        let decoding = self.sequences.values().filter(|sequence| sequence.is_decoding()).count();
        // Never more than a fair share, or groups that grew uneven while sequences came and went would stay so.
        let fair = decoding.div_ceil(stages);
        let spread = self.decode_ready.len().div_ceil(stages - groups);
        fair.min(spread).min(self.config.max_batch_sequences).min(self.config.max_batch_tokens).max(1)
    }

    pub(super) fn issue(&mut self, kind: Kind, members: Vec<SequenceId>) -> MicroBatch {
        let id = self.next_micro_batch;
        self.next_micro_batch = self.next_micro_batch.next();
        let mut slices = Vec::with_capacity(members.len());
        for member in &members {
            if let Some(sequence) = self.sequences.get_mut(member) {
                slices.push(sequence.next_slice(*member, &self.config, &mut self.pool));
                sequence.in_flight = Some(id);
                self.short_of_blocks.remove(member);
            }
        }
        let closed = std::mem::take(&mut self.closed);
        let withheld = self.pool.withhold(closed.iter().flat_map(|closed| closed.blocks.iter().copied()));
        let told = closed.iter().map(|closed| closed.sequence).collect();
        self.in_flight.insert(id, InFlight { kind, members, closed, withheld });
        MicroBatch { id, slices, closed: told }
    }

    /// A micro-batch failed on its way: its sequences end, and the next micro-batch repeats what it announced. Returns the sequences
    /// that ended, without those that had been released.
    pub fn fail(&mut self, micro_batch: MicroBatchId) -> Vec<SequenceId> {
        let Some(batch) = self.in_flight.remove(&micro_batch) else { return Vec::new() };
        self.in_flight_ceiling = self.in_flight_limit().max(self.in_flight.len());
        self.pool.restore(&batch.withheld);
        self.closed.extend(batch.closed);
        let mut ended = Vec::new();
        for id in batch.members {
            if self.sequences.get(&id).is_some_and(|sequence| !sequence.released) {
                ended.push(id);
            }
            self.forget(id);
        }
        self.admit();
        ended
    }

    /// Takes the result of a micro-batch: the tokens drawn, by sequence. Returns its sequences in row order, without those that were
    /// released in the meantime. A micro-batch that is not under way any more (it came back twice, or belongs to a
    /// plan that was given up) changes nothing.
    ///
    /// # Errors
    /// [`CompleteError`] when the tokens do not fit the micro-batch. It then stays under way.
    pub fn complete(
        &mut self,
        micro_batch: MicroBatchId,
        drawn: &[(SequenceId, u32)],
    ) -> Result<Vec<Completion>, CompleteError> {
        if micro_batch >= self.next_micro_batch {
            return Err(CompleteError::NeverIssued { micro_batch, next: self.next_micro_batch });
        }
        if !self.in_flight.contains_key(&micro_batch) {
            return Ok(Vec::new());
        }
        let tokens = self.tokens_by_sequence(micro_batch, drawn)?;
        let Some(InFlight { members, withheld, .. }) = self.in_flight.remove(&micro_batch) else {
            return Ok(Vec::new());
        };
        self.pool.restore(&withheld);
        self.in_flight_ceiling = self.in_flight_limit().max(self.in_flight.len());
        let mut completions = Vec::new();
        for id in members {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            if sequence.released {
                self.forget(id);
                continue;
            }
            let token = tokens.get(&id).copied();
            sequence.advance(token);
            if sequence.is_decoding() {
                self.decode_ready.push_back(id);
            } else if !sequence.at_limit() {
                self.prefill_ready.insert((sequence.admitted, id));
            }
            completions.push(Completion { sequence: id, token });
        }
        self.admit();
        Ok(completions)
    }

    /// Checks that each sequence that wanted a token has one, and no other has. Released ones may be without.
    fn tokens_by_sequence(
        &self,
        micro_batch: MicroBatchId,
        drawn: &[(SequenceId, u32)],
    ) -> Result<BTreeMap<SequenceId, u32>, CompleteError> {
        let mut tokens = BTreeMap::new();
        for &(sequence, token) in drawn {
            let wanted = self
                .sequences
                .get(&sequence)
                .is_some_and(|state| state.in_flight == Some(micro_batch) && state.awaits_token());
            if !wanted || tokens.insert(sequence, token).is_some() {
                return Err(CompleteError::UnexpectedToken { micro_batch, sequence });
            }
        }
        let members = self.in_flight.get(&micro_batch).into_iter().flat_map(|batch| &batch.members);
        for &sequence in members {
            let wants = self.sequences.get(&sequence).is_some_and(|state| state.awaits_token() && !state.released);
            if wants && !tokens.contains_key(&sequence) {
                return Err(CompleteError::MissingToken { micro_batch, sequence });
            }
        }
        Ok(tokens)
    }
}

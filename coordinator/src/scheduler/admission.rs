//! Who gets in, and who may wait.
//!
//! Clients share: of those that wait, the one whose client has the fewest sequences running or ahead of it is first; among equals,
//! whoever came first. One that finds no room yet (a long one, mostly) is passed by those that do, but the first that waits by no
//! more than [`PASSES_MAX`]: then nobody else is let in until it is, so nobody starves. Whoever is in gets its blocks in the end
//! (`safety`).
//!
//! A client may wait at three times as many places as are free. So a place is left for a newcomer, however many others want all.

use std::collections::HashMap;

use grokpipe_proto::ids::SequenceId;

use super::Scheduler;
use super::batch::Closed;
use super::safety::Grants;
use super::sequence::Sequence;
use super::types::{ClientId, Rejected};

/// Most sequences that may pass the one that has waited longest.
const PASSES_MAX: usize = 16;
/// Waiting places a client may hold for each free one.
const WAITING_PER_FREE: usize = 3;
/// One in this many running places is kept for clients that have nothing running.
const KEPT_FOR_OTHERS: usize = 8;

/// A sequence that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) id: SequenceId,
    pub(super) client: ClientId,
    prompt: Vec<u32>,
    max_new_tokens: u32,
    reserved_blocks: u32,
}

impl Scheduler {
    /// Takes a sequence of `client` in, or lets it wait. It may draw at most `max_new_tokens`.
    ///
    /// # Errors
    /// [`Rejected`]; the scheduler is then as before.
    pub fn submit(
        &mut self,
        id: SequenceId,
        client: ClientId,
        prompt: Vec<u32>,
        max_new_tokens: u32,
    ) -> Result<(), Rejected> {
        let reserved_blocks = self.blocks_needed(prompt.len(), max_new_tokens)?;
        if self.sequences.contains_key(&id) || self.waiting.iter().any(|waiting| waiting.id == id) {
            return Err(Rejected::DuplicateSequence { sequence: id });
        }
        self.admit();
        let place = self.place_to_wait(client);
        self.waiting.push_back(Waiting { id, client, prompt, max_new_tokens, reserved_blocks });
        // All others have just found no room: only the new one may get in.
        self.admit();
        if !self.sequences.contains_key(&id) {
            place.inspect_err(|_rejected| drop(self.waiting.pop_back()))?;
        }
        Ok(())
    }

    /// Whether there is a place to wait for one more of this client.
    fn place_to_wait(&self, client: ClientId) -> Result<(), Rejected> {
        let (limit, all) = (self.config.max_waiting, self.waiting.len());
        if all >= limit {
            return Err(Rejected::QueueFull { limit, waiting: all });
        }
        let (free, waiting) = (limit - all, self.waiting.iter().filter(|waiting| waiting.client == client).count());
        let limit = free.saturating_mul(WAITING_PER_FREE);
        if waiting >= limit { Err(Rejected::ShareTaken { limit, waiting, free }) } else { Ok(()) }
    }

    /// Blocks for the longest that such a sequence may become.
    fn blocks_needed(&self, prompt_tokens: usize, max_new_tokens: u32) -> Result<u32, Rejected> {
        if prompt_tokens == 0 {
            return Err(Rejected::EmptyPrompt);
        }
        if max_new_tokens == 0 {
            return Err(Rejected::NothingToDraw);
        }
        let found = prompt_tokens.saturating_add(max_new_tokens as usize);
        let pool_tokens = (self.pool.total() as usize).saturating_mul(self.config.block_tokens as usize);
        for (limit, what) in
            [(self.config.max_context as usize, "the model's context"), (pool_tokens, "the KV pool, all of it")]
        {
            if found > limit {
                return Err(Rejected::TooLong { limit, found, what });
            }
        }
        // Not over max_context, which is a u32.
        Ok((found as u32).div_ceil(self.config.block_tokens))
    }

    /// Lets in whoever is next, as long as somebody may be.
    pub(super) fn admit(&mut self) {
        while let Some(index) = self.next_to_admit() {
            self.passes = if index == 0 { 0 } else { self.passes + 1 };
            let Some(waiting) = self.waiting.remove(index) else { break };
            let Waiting { id, client, prompt, max_new_tokens, reserved_blocks } = waiting;
            self.pool.reserve(reserved_blocks);
            let sequence = Sequence::new(self.next_admitted, client, prompt, max_new_tokens, reserved_blocks);
            self.prefill_ready.insert((self.next_admitted, id));
            self.next_admitted += 1;
            self.sequences.insert(id, sequence);
        }
    }

    /// The place in the queue of the one that is let in next; `None` while nobody is.
    fn next_to_admit(&self) -> Option<usize> {
        let places = self.config.max_running.saturating_sub(self.sequences.len());
        if self.waiting.is_empty() || places == 0 || !self.short_of_blocks.is_empty() {
            return None;
        }
        let mut running: HashMap<ClientId, usize> = HashMap::new();
        for sequence in self.sequences.values() {
            *running.entry(sequence.client).or_default() += 1;
        }
        let others_only = places <= self.config.max_running / KEPT_FOR_OTHERS;
        let barred = |waiting: &Waiting| others_only && running.contains_key(&waiting.client);
        if self.passes >= PASSES_MAX && !barred(&self.waiting[0]) {
            return self.has_blocks_for(&self.waiting[0]).then_some(0);
        }
        let mut ahead = running.clone();
        let mut order: Vec<(usize, usize)> = Vec::with_capacity(self.waiting.len());
        for (index, waiting) in self.waiting.iter().enumerate() {
            let served = ahead.entry(waiting.client).or_default();
            order.push((*served, index));
            *served += 1;
        }
        order.sort_unstable();
        let may_enter = |waiting: &Waiting| !barred(waiting) && self.has_blocks_for(waiting);
        order.into_iter().map(|(_, index)| index).find(|index| may_enter(&self.waiting[*index]))
    }

    /// Whether the blocks of its prompt are free now, after those that unfinished prompts still need, and all its blocks in the end.
    fn has_blocks_for(&self, waiting: &Waiting) -> bool {
        let blocks = |prompt: &[u32]| (prompt.len() as u32).div_ceil(self.config.block_tokens);
        let unread = |(id, sequence): (&SequenceId, &Sequence)| {
            let owned = sequence.blocks.len() as u32;
            Some((*id, blocks(sequence.prompt()).checked_sub(owned)?))
        };
        let grants: Grants = self.sequences.iter().filter_map(unread).collect();
        self.is_safe(&grants, Some((blocks(&waiting.prompt), waiting.reserved_blocks)))
    }

    /// Ends a sequence, for whatever reason. Its blocks are free at once, or when its micro-batch comes back; a token drawn for
    /// it until then is dropped. Whether the sequence was there.
    pub fn release(&mut self, id: SequenceId) -> bool {
        if let Some(index) = self.waiting.iter().position(|waiting| waiting.id == id) {
            self.waiting.remove(index);
            if index == 0 {
                self.passes = 0;
            }
            self.admit();
            return true;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        if sequence.released {
            return false;
        }
        sequence.released = true;
        if sequence.in_flight.is_none() {
            self.prefill_ready.remove(&(sequence.admitted, id));
            self.decode_ready.retain(|ready| *ready != id);
            self.forget(id);
            self.admit();
        }
        true
    }

    /// Frees everything that a sequence had.
    pub(super) fn forget(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        self.short_of_blocks.remove(&id);
        self.pool.give_back(&sequence.blocks, sequence.reserved_blocks);
        if sequence.opened {
            self.closed.push(Closed { sequence: id, blocks: sequence.blocks });
        }
    }
}

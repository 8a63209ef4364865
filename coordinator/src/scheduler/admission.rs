//! Who gets in: first come, first served, and only when the blocks for the longest that a sequence may become are free. An
//! admitted sequence therefore never fails for want of memory.

use super::Scheduler;
use super::batch::Closed;
use super::sequence::Sequence;
use super::types::Rejected;

/// A sequence that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) id: u64,
    prompt: Vec<u32>,
    max_new_tokens: u32,
    reserved_blocks: u32,
}

impl Scheduler {
    /// Takes a sequence in, or lets it wait. It may draw at most `max_new_tokens`.
    ///
    /// # Errors
    /// [`Rejected`]; the scheduler is then as before.
    pub fn submit(&mut self, id: u64, prompt: Vec<u32>, max_new_tokens: u32) -> Result<(), Rejected> {
        let reserved_blocks = self.blocks_needed(prompt.len(), max_new_tokens)?;
        if self.sequences.contains_key(&id) || self.waiting.iter().any(|waiting| waiting.id == id) {
            return Err(Rejected::DuplicateSequence { sequence: id });
        }
        let may_enter = self.waiting.is_empty() && self.has_room(reserved_blocks);
        if !may_enter && self.waiting.len() >= self.config.max_waiting {
            return Err(Rejected::QueueFull { limit: self.config.max_waiting, waiting: self.waiting.len() });
        }
        self.waiting.push_back(Waiting { id, prompt, max_new_tokens, reserved_blocks });
        self.admit();
        Ok(())
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

    /// Whether one more sequence with this many blocks may run.
    fn has_room(&self, reserved_blocks: u32) -> bool {
        self.sequences.len() < self.config.max_running && reserved_blocks <= self.pool.total() - self.pool.reserved()
    }

    /// Lets in whoever is first, as long as there is room. Nobody overtakes: a large sequence would else wait for ever.
    pub(super) fn admit(&mut self) {
        while let Some(first) = self.waiting.front() {
            if !self.has_room(first.reserved_blocks) || !self.pool.reserve(first.reserved_blocks) {
                break;
            }
            let Some(Waiting { id, prompt, max_new_tokens, reserved_blocks }) = self.waiting.pop_front() else { break };
            let sequence = Sequence::new(self.next_admitted, prompt, max_new_tokens, reserved_blocks);
            self.prefill_ready.insert((self.next_admitted, id));
            self.next_admitted += 1;
            self.sequences.insert(id, sequence);
        }
    }

    /// Ends a sequence, for whatever reason. Its blocks are free at once, or when its micro-batch comes back; a token drawn for
    /// it until then is dropped. Whether the sequence was there.
    pub fn release(&mut self, id: u64) -> bool {
        if let Some(index) = self.waiting.iter().position(|waiting| waiting.id == id) {
            self.waiting.remove(index);
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
    pub(super) fn forget(&mut self, id: u64) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        self.pool.give_back(&sequence.blocks, sequence.reserved_blocks);
        if sequence.opened {
            self.closed.push(Closed { sequence: id, blocks: sequence.blocks });
        }
    }
}

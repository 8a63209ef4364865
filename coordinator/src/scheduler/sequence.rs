//! One admitted sequence: how far it is, and what it needs next.

use grokpipe_proto::ids::{MicroBatchId, SequenceId};

use super::blocks::BlockPool;
use super::types::{ClientId, SchedulerConfig, Slice};

/// What a sequence waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Positions of the prompt are still to be fed.
    Prefill,
    /// This token was drawn and must be fed.
    Decode {
        /// The token.
        input: u32,
    },
    /// It has drawn all that it may.
    Done,
}

#[derive(Debug)]
pub(super) struct Sequence {
    /// Place in the order of admission.
    pub(super) admitted: u64,
    pub(super) client: ClientId,
    pub(super) phase: Phase,
    /// The micro-batch that it is in.
    pub(super) in_flight: Option<MicroBatchId>,
    /// Its client is done with it; it goes when its micro-batch comes back.
    pub(super) released: bool,
    /// Stages know of it.
    pub(super) opened: bool,
    pub(super) blocks: Vec<u32>,
    pub(super) reserved_blocks: u32,
    pub(super) drawn_count: u32,
    prompt: Vec<u32>,
    max_new_tokens: u32,
    /// Positions that were fed, or are on their way.
    fed: u32,
}

impl Sequence {
    pub(super) fn new(
        admitted: u64,
        client: ClientId,
        prompt: Vec<u32>,
        max_new_tokens: u32,
        reserved_blocks: u32,
    ) -> Self {
        Self {
            admitted,
            client,
            phase: Phase::Prefill,
            in_flight: None,
            released: false,
            opened: false,
            blocks: Vec::new(),
            reserved_blocks,
            drawn_count: 0,
            prompt,
            max_new_tokens,
            fed: 0,
        }
    }

    /// The prompt, read or not.
    pub(super) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Whether it belongs to the sequences that decode.
    pub(super) fn is_decoding(&self) -> bool {
        matches!(self.phase, Phase::Decode { .. })
    }

    /// Whether its next chunk, or the one on its way, ends the prompt.
    fn prompt_is_fed(&self) -> bool {
        self.fed as usize == self.prompt.len()
    }

    /// Whether the slice under way comes back with a token.
    pub(super) fn awaits_token(&self) -> bool {
        self.in_flight.is_some() && self.prompt_is_fed_or_decodes()
    }

    fn prompt_is_fed_or_decodes(&self) -> bool {
        self.is_decoding() || self.prompt_is_fed()
    }

    /// Where the next slice ends: one token further when decoding, otherwise at the next chunk boundary of the prompt.
    fn next_end(&self, config: &SchedulerConfig) -> u32 {
        if self.is_decoding() {
            return self.fed + 1;
        }
        let chunk = config.prefill_chunk_tokens;
        let boundary = (u64::from(self.fed / chunk) + 1) * u64::from(chunk);
        u32::try_from(boundary).unwrap_or(u32::MAX).min(self.prompt.len() as u32)
    }

    /// Blocks that the next slice takes.
    pub(super) fn next_blocks(&self, config: &SchedulerConfig) -> u32 {
        self.next_end(config).div_ceil(config.block_tokens) - self.blocks.len() as u32
    }

    /// The next slice, with the blocks that it needs.
    pub(super) fn next_slice(&mut self, id: SequenceId, config: &SchedulerConfig, pool: &mut BlockPool) -> Slice {
        let (first_position, end) = (self.fed, self.next_end(config));
        let new_blocks = pool.take(self.next_blocks(config));
        let token_ids = match self.phase {
            Phase::Decode { input } => vec![input],
            Phase::Prefill | Phase::Done => self.prompt[first_position as usize..end as usize].to_vec(),
        };
        self.fed = end;
        self.blocks.extend(&new_blocks);
        let opens = !std::mem::replace(&mut self.opened, true);
        let wants_token = self.prompt_is_fed_or_decodes();
        Slice { sequence: id, first_position, token_ids, new_blocks, opens, wants_token }
    }

    /// Its micro-batch came back, with this token if one was wanted.
    pub(super) fn advance(&mut self, token: Option<u32>) {
        self.in_flight = None;
        if let Some(input) = token {
            self.drawn_count += 1;
            self.phase = if self.at_limit() { Phase::Done } else { Phase::Decode { input } };
        }
    }

    /// Whether it has drawn all that it may.
    pub(super) fn at_limit(&self) -> bool {
        self.drawn_count >= self.max_new_tokens
    }
}

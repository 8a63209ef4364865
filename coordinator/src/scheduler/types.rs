//! What goes into the scheduler and what comes out of it.

use grokpipe_proto::ids::{MicroBatchId, SequenceId};
use thiserror::Error;

/// The owner of a sequence. The API decides what counts as one client.
pub type ClientId = u64;

/// How much the scheduler may have under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Stages of the plan in force.
    pub stages: usize,
    /// Blocks of the KV pool, equal on every stage.
    pub kv_blocks: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Tokens in a chunk of prefill; chunks begin at its multiples, so a prompt is always cut in the same places.
    pub prefill_chunk_tokens: u32,
    /// Most tokens of a micro-batch, all its sequences together. A chunk of prefill is no longer.
    pub max_batch_tokens: usize,
    /// Most tokens of a sequence, prompt and output together.
    pub max_context: u32,
    /// Most sequences that decode in one micro-batch.
    pub max_batch_sequences: usize,
    /// Most sequences that wait for admission.
    pub max_waiting: usize,
    /// Most sequences that are admitted at a time.
    pub max_running: usize,
}

/// The part of one sequence that a micro-batch carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub sequence: SequenceId,
    /// Absolute position of the first token.
    pub first_position: u32,
    /// Token ids of these positions; never empty.
    pub token_ids: Vec<u32>,
    /// KV blocks that the sequence gains, in order.
    pub new_blocks: Vec<u32>,
    /// Whether this is the sequence's first slice, with which stages learn of it.
    pub opens: bool,
    /// Whether a token is to be drawn after the last position.
    pub wants_token: bool,
}

/// Work that flows through the pipeline as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Unique in the scheduler's life, ascending.
    pub id: MicroBatchId,
    /// The sequences in row order; never empty.
    pub slices: Vec<Slice>,
    /// Sequences that have ended since the last micro-batch: stages forget them before they run this one.
    pub closed: Vec<SequenceId>,
}

/// What a finished micro-batch meant for one sequence that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The sequence.
    pub sequence: SequenceId,
    /// The token drawn for it; `None` after a chunk of prefill that was not the last.
    pub token: Option<u32>,
}

/// Why a sequence was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Rejected {
    /// No place to wait.
    #[error("expected fewer than {limit} waiting sequences, found {waiting}")]
    QueueFull {
        /// Most that may wait.
        limit: usize,
        /// How many wait.
        waiting: usize,
    },
    /// The places that are left are for other clients.
    #[error("expected at most {limit} waiting sequences of one client while {free} places are free, found {waiting}")]
    ShareTaken {
        /// Most of this client that may wait now.
        limit: usize,
        /// How many of this client wait.
        waiting: usize,
        /// Places that nobody has.
        free: usize,
    },
    /// Prompt and output would never fit.
    #[error("expected at most {limit} tokens for prompt and output, found {found}: {what}")]
    TooLong {
        /// Most tokens.
        limit: usize,
        /// Tokens asked for.
        found: usize,
        /// Which limit.
        what: &'static str,
    },
    /// No token to begin with.
    #[error("expected at least 1 token in the prompt, found 0")]
    EmptyPrompt,
    /// Nothing to draw.
    #[error("expected at least 1 token to draw, found 0")]
    NothingToDraw,
    /// The number is in use, perhaps by a sequence that was released but is still in a micro-batch.
    #[error("expected a new sequence number, found {sequence}, which is in use")]
    DuplicateSequence {
        /// The number.
        sequence: SequenceId,
    },
}

/// Why a result does not fit its micro-batch. The scheduler's state is then as before.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompleteError {
    /// A micro-batch that was never made.
    #[error("expected a micro-batch below {next}, found {micro_batch}")]
    NeverIssued {
        /// The number in the result.
        micro_batch: MicroBatchId,
        /// The number that the next micro-batch will get.
        next: MicroBatchId,
    },
    /// A token for a sequence that wanted none.
    #[error("micro-batch {micro_batch} has a token for sequence {sequence}, expected none")]
    UnexpectedToken {
        /// The micro-batch.
        micro_batch: MicroBatchId,
        /// The sequence.
        sequence: SequenceId,
    },
    /// No token for a sequence that wanted one.
    #[error("micro-batch {micro_batch} has no token for sequence {sequence}, expected one")]
    MissingToken {
        /// The micro-batch.
        micro_batch: MicroBatchId,
        /// The sequence.
        sequence: SequenceId,
    },
}

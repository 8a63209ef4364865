//! Why a request was refused or ended early. What each protocol makes of that stands in one table, `api/errors.rs`.
//!
//! Reasons are kept in full, for logs ([`RequestError::in_full`]). What a client must not see is taken out where it is told.

use std::time::Duration;

use grokpipe_proto::ids::LayerRange;

use super::Field;

/// Why a request was refused or ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A value that no server would take.
    #[error("{problem}")]
    Invalid {
        /// Which part of the request; each protocol has its own name for it.
        field: Field,
        /// What was expected and found.
        problem: String,
    },
    /// Prompt and output do not fit the context.
    #[error("expected at most {limit} tokens, found {found}: {what}")]
    TooLong {
        /// Most tokens.
        limit: usize,
        /// Tokens asked for.
        found: usize,
        /// Which limit.
        what: &'static str,
    },
    /// No place in the queue.
    #[error("expected fewer than {limit} waiting requests, found {limit}; try again in a second")]
    QueueFull {
        /// Most waiting requests.
        limit: usize,
    },
    /// The places in the queue that are left are for other clients.
    #[error("expected fewer than {limit} waiting requests of one client now, found {waiting}; try again in a second")]
    ShareTaken {
        /// Most waiting requests of one client at this time.
        limit: usize,
        /// How many this client has.
        waiting: usize,
    },
    /// Too much text is encoded or decoded at a time.
    #[error(
        "expected room for {found} bytes among {limit} of text to be encoded or decoded, found too little; try again in a second"
    )]
    TextQueueFull {
        /// Most bytes.
        limit: usize,
        /// Bytes of this text.
        found: usize,
    },
    /// Too much is being received at a time.
    #[error("expected room for one more request, found too many under way to this server; try again in a second")]
    IntakeFull,
    /// A request did not arrive whole in time.
    #[error("expected the whole request within {} s, found no end by then", limit.as_secs())]
    IntakeLate {
        /// The time it had.
        limit: Duration,
    },
    /// Layers have no live stage.
    #[error("{0}")]
    NotServing(String),
    /// A worker died while the request ran.
    #[error("worker {worker} with {layers} was lost: {reason}")]
    WorkerLost {
        /// Which worker.
        worker: String,
        /// Its layers.
        layers: LayerRange,
        /// How that was noticed.
        reason: String,
    },
    /// A stage could not compute this request, for a reason that is not for clients.
    #[error("worker {worker} could not compute a step of this request; the coordinator's log has the reason")]
    StageFailed {
        /// Which worker.
        worker: String,
        /// What it said.
        reason: String,
    },
    /// The server itself failed, for a reason that is not for clients.
    #[error("the server failed; its log has the reason")]
    Internal(String),
    /// The request's time is up.
    #[error("expected an end within {} ms, found {produced} tokens by then{}", limit.as_millis(), waiting(waited_on.as_deref()))]
    Deadline {
        /// The time it had.
        limit: Duration,
        /// Tokens produced by then.
        produced: u32,
        /// The stage that it waited on, if one was at work.
        waited_on: Option<String>,
    },
    /// The call's time is up before there was an answer.
    #[error("expected an answer within {} ms, found none by then", limit.as_millis())]
    CallDeadline {
        /// The time it had.
        limit: Duration,
    },
    /// The client does not read what it asked for.
    #[error("expected a client that reads its stream, found too much unread for too long")]
    ClientStalled,
    /// Text needs a tokenizer.
    #[error("this cluster has no tokenizer: send token ids, or start it with --tokenizer")]
    NoTokenizer,
    /// Asked for something that comes later.
    #[error("{0} is not built yet")]
    NotBuilt(&'static str),
    /// The coordinator ends.
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

fn waiting(stage: Option<&str>) -> String {
    stage.map_or_else(String::new, |stage| format!("; waiting for {stage}"))
}

impl RequestError {
    /// Shorthand for [`RequestError::Invalid`].
    pub fn invalid(field: Field, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }

    /// All that is known, for logs.
    pub fn in_full(&self) -> String {
        match self {
            Self::Invalid { field, problem } => format!("{field:?}: {problem}"),
            Self::StageFailed { worker, reason } => format!("worker {worker}: {reason}"),
            Self::Internal(reason) => reason.clone(),
            other => other.to_string(),
        }
    }
}

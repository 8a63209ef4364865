//! Which failure gets which gRPC status: one table for all services.
//!
//! Messages carry what was expected, found and where, and never an address of memory, a path or a peer's address: those are for logs
//! ([`RequestError::in_full`]) and for operators.

use std::{collections::HashMap, ops::Range, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::withheld::without_places;

const DOMAIN: &str = "grokpipe";

/// Why a request was refused or ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A value that no server would take.
    #[error("{field}: {problem}")]
    Invalid {
        /// The request's field.
        field: String,
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
    #[error("worker {worker} with layers {}..{} was lost: {reason}", layers.start, layers.end)]
    WorkerLost {
        /// Which worker.
        worker: String,
        /// Its layers.
        layers: Range<u32>,
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
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::TooLong { .. } => Code::OutOfRange,
            Self::QueueFull { .. } | Self::ShareTaken { .. } | Self::TextQueueFull { .. } | Self::IntakeFull => {
                Code::ResourceExhausted
            }
            Self::NotServing(_) | Self::WorkerLost { .. } | Self::ShuttingDown => Code::Unavailable,
            Self::StageFailed { .. } | Self::Internal(_) => Code::Internal,
            Self::Deadline { .. } | Self::CallDeadline { .. } | Self::IntakeLate { .. } => Code::DeadlineExceeded,
            Self::ClientStalled => Code::Aborted,
            Self::NoTokenizer => Code::FailedPrecondition,
            Self::NotBuilt(_) => Code::Unimplemented,
        }
    }

    /// Whether the same request may succeed when sent again, and after how long.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.code() {
            Code::Unavailable | Code::ResourceExhausted => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// A stable word for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "INVALID_REQUEST",
            Self::TooLong { .. } => "CONTEXT_LENGTH_EXCEEDED",
            Self::QueueFull { .. } => "QUEUE_FULL",
            Self::ShareTaken { .. } => "CLIENT_SHARE_TAKEN",
            Self::TextQueueFull { .. } => "TEXT_QUEUE_FULL",
            Self::IntakeFull => "INTAKE_FULL",
            Self::NotServing(_) => "LAYERS_MISSING",
            Self::WorkerLost { .. } => "WORKER_LOST",
            Self::StageFailed { .. } => "STAGE_FAILED",
            Self::Internal(_) => "INTERNAL",
            Self::Deadline { .. } | Self::CallDeadline { .. } | Self::IntakeLate { .. } => "DEADLINE_EXCEEDED",
            Self::ClientStalled => "CLIENT_STALLED",
            Self::NoTokenizer => "NO_TOKENIZER",
            Self::NotBuilt(_) => "NOT_BUILT",
            Self::ShuttingDown => "SHUTTING_DOWN",
        }
    }

    /// All that is known, for logs.
    pub fn in_full(&self) -> String {
        match self {
            Self::StageFailed { worker, reason } => format!("worker {worker}: {reason}"),
            Self::Internal(reason) => reason.clone(),
            other => other.to_string(),
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let mut metadata = HashMap::new();
        if let RequestError::WorkerLost { worker, .. } | RequestError::StageFailed { worker, .. } = &error {
            metadata.insert("worker".to_owned(), without_places(worker));
        }
        if let RequestError::WorkerLost { layers, .. } = &error {
            metadata.insert("layers".to_owned(), format!("{}..{}", layers.start, layers.end));
        }
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason(), DOMAIN, metadata);
        if let RequestError::Invalid { field, problem } = &error {
            details.add_bad_request_violation(field, without_places(problem));
        }
        if let Some(delay) = error.retry_after() {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(error.code(), without_places(&error.to_string()), details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_worker_is_named_for_people_and_for_programs() {
        let status = Status::from(RequestError::WorkerLost {
            worker: "w2".into(),
            layers: 16..32,
            reason: "its connection was reset".into(),
        });
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "worker w2 with layers 16..32 was lost: its connection was reset");
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.metadata["worker"].as_str()), ("WORKER_LOST", "w2"));
        assert_eq!(info.metadata["layers"], "16..32");
        assert!(status.get_details_retry_info().is_some());
    }

    #[test]
    fn no_error_tells_a_client_a_path_an_address_or_a_pointer() {
        let told = "w1 at 10.0.0.2:43197 ([fe80::1%eth0]:7070, node3:7070), pid 4711: /models/grok 1/ckpt-0/tensor00000_000: 0x7ffd12";
        let text = || told.to_owned();
        let errors = [
            RequestError::invalid("prompt", told),
            RequestError::TooLong { limit: 1, found: 2, what: "the context" },
            RequestError::QueueFull { limit: 1 },
            RequestError::ShareTaken { limit: 1, waiting: 1 },
            RequestError::TextQueueFull { limit: 1, found: 1 },
            RequestError::NotServing(text()),
            RequestError::WorkerLost { worker: "w1".into(), layers: 0..1, reason: text() },
            RequestError::StageFailed { worker: text(), reason: text() },
            RequestError::Internal(text()),
            RequestError::Deadline { limit: Duration::from_secs(1), produced: 1, waited_on: Some(text()) },
            RequestError::CallDeadline { limit: Duration::from_secs(1) },
            RequestError::IntakeFull,
            RequestError::IntakeLate { limit: Duration::from_secs(1) },
            RequestError::ClientStalled,
            RequestError::NoTokenizer,
            RequestError::NotBuilt("Drain"),
            RequestError::ShuttingDown,
        ];
        for error in errors {
            let reason = error.reason();
            let status = Status::from(error);
            let details = format!("{:?}", status.get_error_details());
            for told in [status.message(), &details] {
                for private in ["/", "0x", "10.0.0.2", "43197", "fe80", "node3", "4711", "ckpt", "grok 1"] {
                    assert!(!told.contains(private), "{reason} tells {private:?}: {told}");
                }
            }
            assert_eq!(status.get_details_error_info().unwrap().reason, reason);
        }
    }

    #[test]
    fn bad_fields_are_named_and_not_retried() {
        let status = Status::from(RequestError::invalid("sampling.top_p", "expected a number in (0, 1], found NaN"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "sampling.top_p");
        assert!(status.get_details_retry_info().is_none());
    }
}

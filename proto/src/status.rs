//! Which failure gets which gRPC status: one table for all services.
//!
//! Messages carry what was expected, found and where, and never an address of memory, a path or a peer's address.

use std::{collections::HashMap, ops::Range, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

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
    /// A stage could not compute this request.
    #[error("{0}")]
    StageFailed(String),
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
            Self::QueueFull { .. } => Code::ResourceExhausted,
            Self::NotServing(_) | Self::WorkerLost { .. } | Self::ShuttingDown => Code::Unavailable,
            Self::StageFailed(_) => Code::Internal,
            Self::Deadline { .. } => Code::DeadlineExceeded,
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
            Self::NotServing(_) => "LAYERS_MISSING",
            Self::WorkerLost { .. } => "WORKER_LOST",
            Self::StageFailed(_) => "STAGE_FAILED",
            Self::Deadline { .. } => "DEADLINE_EXCEEDED",
            Self::NoTokenizer => "NO_TOKENIZER",
            Self::NotBuilt(_) => "NOT_BUILT",
            Self::ShuttingDown => "SHUTTING_DOWN",
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let mut metadata = HashMap::new();
        if let RequestError::WorkerLost { worker, layers, .. } = &error {
            metadata.insert("worker".to_owned(), worker.clone());
            metadata.insert("layers".to_owned(), format!("{}..{}", layers.start, layers.end));
        }
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason(), DOMAIN, metadata);
        if let RequestError::Invalid { field, problem } = &error {
            details.add_bad_request_violation(field, problem);
        }
        if let Some(delay) = error.retry_after() {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(error.code(), error.to_string(), details)
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
    fn bad_fields_are_named_and_not_retried() {
        let status = Status::from(RequestError::invalid("sampling.top_p", "expected a number in (0, 1], found NaN"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "sampling.top_p");
        assert!(status.get_details_retry_info().is_none());
    }
}

//! Which failure is what in gRPC and in HTTP: one table.
//!
//! Messages carry what was expected, found and where, and never an address of memory, a path or a peer's address: those are for logs
//! and for operators.

use std::{collections::HashMap, time::Duration};

use axum::http::StatusCode;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::withheld::without_places;
use crate::request::{Field, RequestError};

const DOMAIN: &str = "grokpipe";

/// What an error is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// In gRPC.
    pub code: Code,
    /// In HTTP.
    pub status: StatusCode,
    /// A stable word for programs.
    pub reason: &'static str,
}

/// The row of an error.
pub fn row(error: &RequestError) -> Row {
    use RequestError as E;
    let (code, status, reason) = match error {
        E::Invalid { .. } => (Code::InvalidArgument, StatusCode::BAD_REQUEST, "INVALID_REQUEST"),
        E::TooLong { .. } => (Code::OutOfRange, StatusCode::BAD_REQUEST, "CONTEXT_LENGTH_EXCEEDED"),
        E::NoTokenizer => (Code::FailedPrecondition, StatusCode::BAD_REQUEST, "NO_TOKENIZER"),
        E::QueueFull { .. } => (Code::ResourceExhausted, StatusCode::TOO_MANY_REQUESTS, "QUEUE_FULL"),
        E::ShareTaken { .. } => (Code::ResourceExhausted, StatusCode::TOO_MANY_REQUESTS, "CLIENT_SHARE_TAKEN"),
        E::TextQueueFull { .. } => (Code::ResourceExhausted, StatusCode::TOO_MANY_REQUESTS, "TEXT_QUEUE_FULL"),
        E::IntakeFull => (Code::ResourceExhausted, StatusCode::TOO_MANY_REQUESTS, "INTAKE_FULL"),
        E::NotServing(_) => (Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE, "LAYERS_MISSING"),
        E::WorkerLost { .. } => (Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE, "WORKER_LOST"),
        E::ShuttingDown => (Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE, "SHUTTING_DOWN"),
        E::StageFailed { .. } => (Code::Internal, StatusCode::INTERNAL_SERVER_ERROR, "STAGE_FAILED"),
        E::Internal(_) => (Code::Internal, StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL"),
        E::Deadline { .. } | E::CallDeadline { .. } => {
            (Code::DeadlineExceeded, StatusCode::GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED")
        }
        E::IntakeLate { .. } => (Code::DeadlineExceeded, StatusCode::REQUEST_TIMEOUT, "DEADLINE_EXCEEDED"),
        E::ClientStalled => (Code::Aborted, StatusCode::REQUEST_TIMEOUT, "CLIENT_STALLED"),
        E::NotBuilt(_) => (Code::Unimplemented, StatusCode::NOT_IMPLEMENTED, "NOT_BUILT"),
    };
    Row { code, status, reason }
}

/// Whether the same request may succeed when sent again, and after how long.
pub fn retry_after(error: &RequestError) -> Option<Duration> {
    matches!(row(error).code, Code::Unavailable | Code::ResourceExhausted).then_some(Duration::from_secs(1))
}

/// What gRPC calls a part of a request, in `inference.proto`.
pub fn grpc_field(field: Field) -> &'static str {
    match field {
        Field::Prompt => "prompt",
        Field::Text => "text",
        Field::TokenIds => "token_ids",
        Field::Label => "request_id",
        Field::Timeout => "deadline_ms",
        Field::MaxTokens => "max_tokens",
        Field::Stop => "stop",
        Field::Temperature => "sampling.temperature",
        Field::TopP => "sampling.top_p",
        Field::MinP => "sampling.min_p",
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let mut metadata = HashMap::new();
        if let RequestError::WorkerLost { worker, .. } | RequestError::StageFailed { worker, .. } = &error {
            metadata.insert("worker".to_owned(), without_places(worker));
        }
        if let RequestError::WorkerLost { layers, .. } = &error {
            metadata.insert("layers".to_owned(), format!("{}..{}", layers.start(), layers.end()));
        }
        let Row { code, reason, .. } = row(&error);
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, DOMAIN, metadata);
        if let Some(delay) = retry_after(&error) {
            details.set_retry_info(Some(delay));
        }
        let message = without_places(&error.to_string());
        let RequestError::Invalid { field, .. } = error else {
            return Status::with_error_details(code, message, details);
        };
        let field = grpc_field(field);
        details.add_bad_request_violation(field, &message);
        Status::with_error_details(code, format!("{field}: {message}"), details)
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::ids::LayerRange;

    use super::*;

    #[test]
    fn a_lost_worker_is_named_for_people_and_for_programs() {
        let status = Status::from(RequestError::WorkerLost {
            worker: "w2".into(),
            layers: LayerRange::new(16, 32).unwrap(),
            reason: "its connection was reset".into(),
        });
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "worker w2 with layers 16–31 was lost: its connection was reset");
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
            RequestError::invalid(Field::Prompt, told),
            RequestError::TooLong { limit: 1, found: 2, what: "the context" },
            RequestError::QueueFull { limit: 1 },
            RequestError::ShareTaken { limit: 1, waiting: 1 },
            RequestError::TextQueueFull { limit: 1, found: 1 },
            RequestError::NotServing(text()),
            RequestError::WorkerLost { worker: "w1".into(), layers: LayerRange::new(0, 1).unwrap(), reason: text() },
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
            let reason = row(&error).reason;
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
        let status = Status::from(RequestError::invalid(Field::TopP, "expected a number in (0, 1], found NaN"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "sampling.top_p");
        assert!(status.get_details_retry_info().is_none());
    }
}

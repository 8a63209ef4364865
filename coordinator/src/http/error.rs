//! Errors in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`.
//!
//! Those clients try again by themselves on 408, 409, 429 and all of 5xx. So an error that a second try cannot mend says
//! `x-should-retry: false`, and one that time mends says `Retry-After`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use grokpipe_proto::{
    snapshot::{Verdict, VerdictPhase},
    transport::places::NoPlace,
};
use serde_json::{Value, json};

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A refusal.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    message: String,
    /// Seconds after which a second try may succeed; `None` when it cannot.
    retry_after: Option<Duration>,
    /// Members of the answer besides `error`.
    more: Vec<(&'static str, Value)>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code, message: message.into(), retry_after: None, more: Vec::new() }
    }

    fn client(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    pub(super) fn not_found() -> Self {
        Self::client(StatusCode::NOT_FOUND, "not_found", "expected one of the documented paths, found another")
    }

    pub(super) fn method_not_allowed() -> Self {
        let message = "expected a method that this path has (see the Allow header), found another";
        Self::client(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    pub(super) fn body_too_large(limit: usize) -> Self {
        let message = format!("expected a body of at most {limit} bytes, found a larger one");
        Self::client(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    }

    pub(super) fn no_host() -> Self {
        Self::client(StatusCode::BAD_REQUEST, "no_host", "expected one Host header, found none or an unreadable one")
    }

    /// The client meant another server, or a foreign page has pointed its own name at this one (DNS rebinding).
    pub(super) fn foreign_host() -> Self {
        let message = "expected a name of this machine or an address that this server is bound to in the Host header, found another; \
                       add the name to http_names under [coordinator] in the configuration";
        Self::client(StatusCode::MISDIRECTED_REQUEST, "foreign_host", message)
    }

    /// A page of another site asks in the background.
    pub(super) fn foreign_origin() -> Self {
        let message = "expected a request of this server's own page or of a program, found one of another site's page";
        Self::client(StatusCode::FORBIDDEN, "foreign_origin", message)
    }

    pub(super) fn too_many_streams(refusal: NoPlace) -> Self {
        let what = match refusal {
            NoPlace::Total(limit) => format!("expected fewer than {limit} open event streams, found {limit}"),
            NoPlace::Address(limit) => {
                format!("expected fewer than {limit} open event streams from one address, found {limit}")
            }
        };
        Self::busy("too_many_streams", format!("{what}; poll /api/v1/cluster instead"))
    }

    /// Beyond the ordinary places only health is answered.
    pub(super) fn too_many_connections() -> Self {
        Self::busy(
            "too_many_connections",
            "expected fewer connections, found all places taken; only health is answered",
        )
    }

    fn busy(code: &'static str, message: impl Into<String>) -> Self {
        let retry_after = Some(Duration::from_secs(5));
        Self { retry_after, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", code, message) }
    }

    /// The cluster does not serve; `verdict` says which layers are missing.
    pub(super) fn not_serving(verdict: &Verdict) -> Self {
        // A lost worker is restarted within a second or two; reading weights takes longer.
        let (status_word, wait) = match verdict.phase() {
            VerdictPhase::Loading => ("loading", 5),
            VerdictPhase::Waiting => ("waiting", 5),
            VerdictPhase::Down | VerdictPhase::Serving | VerdictPhase::Unspecified => ("down", 2),
        };
        let more = vec![("status", json!(status_word)), ("missing_layers", json!(verdict.missing_layers))];
        let retry_after = Some(Duration::from_secs(wait));
        let base = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "not_serving", &verdict.text);
        Self { retry_after, more, ..base }
    }

    fn unbuilt() -> Self {
        let message = "not built yet: generate over gRPC (grokpipe.v1.InferenceService) or with `grokpipe generate`";
        Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", "not_built_yet", message)
    }
}

/// Stands on the routes that clients of other servers expect and this one does not have yet.
pub(super) async fn not_built() -> ApiError {
    ApiError::unbuilt()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = json!({ "message": self.message, "type": self.kind, "param": null, "code": self.code });
        let mut body = serde_json::Map::from_iter([("error".to_owned(), error)]);
        body.extend(self.more.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let mut response = (self.status, Json(Value::Object(body))).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        match self.retry_after {
            Some(wait) => headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs())),
            None => headers.insert(SHOULD_RETRY, HeaderValue::from_static("false")),
        };
        response
    }
}

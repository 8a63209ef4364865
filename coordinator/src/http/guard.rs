//! What every request passes and every answer carries.
//!
//! In: a known `Host`, no page of another site, and a body that is not too large. Health is answered whoever asks: probes name
//! whatever host they were given, or none. Out: the headers that keep browsers from doing more with the page than it needs, and a
//! request id to look for in the log.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tracing::debug;

use super::{BODY_BYTES_MAX, HttpState, error::ApiError, health, origin, visitor::Visitor};

/// The page loads only its own files and talks only to its own server; no other page may frame it.
pub(super) const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                                                  img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'";

const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY)),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
];

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

pub(super) async fn guard(State(state): State<HttpState>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let refusal = refusal(&state, &request);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = match refusal {
        Some(refusal) => refusal.into_response(),
        None => next.run(request).await,
    };
    debug!(%method, path, status = response.status().as_u16(), request_id = ?id, "http request");
    let headers = response.headers_mut();
    headers.extend(HEADERS);
    if let Some(id) = id {
        headers.insert(REQUEST_ID, id);
    }
    response
}

fn refusal(state: &HttpState, request: &Request) -> Option<ApiError> {
    if !health::is_probe(request.method(), request.uri().path()) {
        if Visitor::of(request).only_health {
            return Some(ApiError::too_many_connections());
        }
        let mut hosts = request.headers().get_all(header::HOST).iter();
        let host = match (hosts.next(), hosts.next()) {
            (Some(host), None) => host.to_str().ok(),
            _ => None,
        };
        let Some((host, allowed)) = host.and_then(|host| Some((host, state.hosts.allows(host)?))) else {
            return Some(ApiError::no_host());
        };
        if !allowed {
            return Some(ApiError::foreign_host());
        }
        if origin::is_foreign(request.headers(), host, &state.hosts) {
            return Some(ApiError::foreign_origin());
        }
    }
    let length = request.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse::<u64>();
    // An unreadable length is the HTTP library's to refuse; one that does not fit u64 is certainly too large.
    let fits = length.is_ok_and(|length| length <= BODY_BYTES_MAX as u64);
    (!fits).then(|| ApiError::body_too_large(BODY_BYTES_MAX))
}

/// The client's id when it is short and printable, otherwise a new one.
fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let fit = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(fit).cloned().or_else(|| {
        let number = getrandom::u64().ok()?;
        HeaderValue::try_from(format!("{number:016x}")).ok()
    })
}

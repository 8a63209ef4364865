//! `/health`, `/readyz`, `/livez`: for load balancers, init systems and people with curl.
//!
//! Also HAProxy's default probe, `OPTIONS / HTTP/1.0` without a host: any status of 2xx and 3xx says that the server runs.

use axum::{
    Json,
    extract::State,
    http::{Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{HttpState, error::ApiError};

/// Whether this asks for health, which is answered for any host and origin.
pub(super) fn is_probe(method: &Method, path: &str) -> bool {
    matches!(path, "/health" | "/readyz" | "/livez") || (method == Method::OPTIONS && path == "/")
}

/// The methods of a resource.
pub(super) async fn options() -> impl IntoResponse {
    (StatusCode::NO_CONTENT, [(header::ALLOW, "GET,HEAD,OPTIONS"), (header::CACHE_CONTROL, "no-store")])
}

/// 200 only while every layer is covered and loaded.
pub(super) async fn ready(State(state): State<HttpState>) -> Result<Response, ApiError> {
    let snapshot = state.view.current();
    let verdict = snapshot.verdict();
    if !verdict.serving {
        return Err(ApiError::not_serving(verdict));
    }
    let body = json!({ "status": "serving", "text": verdict.text, "model": snapshot.model().name });
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

/// Always 200: the process runs.
pub(super) async fn live() -> impl IntoResponse {
    ([(header::CACHE_CONTROL, "no-store")], Json(json!({ "status": "alive" })))
}

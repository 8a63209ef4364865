//! `/health`, `/readyz`, `/livez`: for load balancers, init systems and people with curl.

use axum::{
    Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{HttpState, error::ApiError};

/// 200 only while every layer is covered and loaded.
pub(super) async fn ready(State(state): State<HttpState>) -> Result<Response, ApiError> {
    let snapshot = state.view.current();
    let verdict = &snapshot.verdict;
    if !verdict.serving {
        return Err(ApiError::not_serving(verdict));
    }
    let body = json!({ "status": "serving", "text": verdict.text, "model": snapshot.model.name });
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

/// 200 always: that this runs is the answer.
pub(super) async fn live() -> impl IntoResponse {
    ([(header::CACHE_CONTROL, "no-store")], Json(json!({ "status": "alive" })))
}

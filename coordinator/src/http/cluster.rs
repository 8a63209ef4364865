//! `/api/v1/cluster`, and the tags by which a client asks only for what has changed.

use std::hash::{DefaultHasher, Hasher};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::HttpState;

/// The snapshot, or 304 when the client has it.
pub(super) async fn snapshot(State(state): State<HttpState>, headers: HeaderMap) -> Response {
    match serde_json::to_vec(&*state.view.current()) {
        Ok(body) => tagged(&headers, "application/json", body),
        // Cannot happen: the snapshot holds neither maps with odd keys nor types that fail.
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// `body` with its tag, or 304 without it when the client names the same tag.
pub(super) fn tagged(
    request: &HeaderMap,
    content_type: &'static str,
    body: impl AsRef<[u8]> + IntoResponse,
) -> Response {
    let tag = entity_tag(body.as_ref());
    let known =
        request.get_all(header::IF_NONE_MATCH).iter().any(|tags| tags.to_str().is_ok_and(|tags| names(tags, &tag)));
    let common = [(header::ETAG, tag.as_str()), (header::CACHE_CONTROL, "no-cache")];
    if known {
        (StatusCode::NOT_MODIFIED, common).into_response()
    } else {
        (common, [(header::CONTENT_TYPE, content_type)], body).into_response()
    }
}

/// Equal bytes, equal tag. Not a secret and not for all time: SipHash with the standard library's fixed keys is enough.
fn entity_tag(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(body);
    format!("\"{:016x}\"", hasher.finish())
}

/// Whether an `If-None-Match` value names `tag`. Weak tags compare equal, as RFC 9110 §13.1.2 asks.
fn names(tags: &str, tag: &str) -> bool {
    tags.split(',').map(str::trim).any(|found| found == "*" || found.strip_prefix("W/").unwrap_or(found) == tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_compare_weakly() {
        for (tags, expected) in [
            ("\"a\"", true),
            ("W/\"a\"", true),
            ("\"b\", \"a\"", true),
            ("*", true),
            ("\"b\"", false),
            ("a", false),
            ("", false),
        ] {
            assert_eq!(names(tags, "\"a\""), expected, "{tags}");
        }
    }
}

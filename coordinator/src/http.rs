//! The HTTP port: health for machines, the health page for people. All of it shows one [`ClusterSnapshot`].
//!
//! | route | answer |
//! |---|---|
//! | `GET /health`, `GET /readyz` | 200 while all layers are covered and loaded, else 503 that names the missing layers |
//! | `GET /livez` | 200 as long as the process answers |
//! | `OPTIONS /` | 204: HAProxy's check unless told otherwise |
//! | `GET /api/v1/cluster` | the snapshot; `ETag`, 304 on `If-None-Match` |
//! | `GET /api/v1/events` | the snapshot as server-sent events: now, at each change, and once a second |
//! | `GET /`, `/app.js`, `/view.js`, `/format.js`, `/style.css`, `/favicon.svg` | the health page, see `dashboard/` |
//! | `/v1/*`, `/tokenize`, `/detokenize`, `/metrics` | 501: not built yet |
//!
//! Decided here: what a browser may do with the page (headers in `guard`), whose requests are answered (`hosts`, `origin`), how many
//! streams and connections there may be, and when a slow client is let go (`serve`). Health is answered whoever asks, and when all
//! places are taken. Not known here: how the snapshot is made.
//! Errors have the shape of OpenAI's (`error`). Reading needs no token, hence the loopback rule for the port.

mod assets;
mod cluster;
mod error;
mod events;
mod guard;
mod health;
mod hosts;
mod origin;
mod serve;
mod view;
mod visitor;

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    routing::{get, options, post},
};
use grokpipe_proto::{
    snapshot::ClusterSnapshot,
    transport::{ConnectionLimits, places::Places},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use error::ApiError;
pub use hosts::AllowedHosts;
pub use serve::serve;
use view::SnapshotView;

/// Most event streams at once. A browser tab holds one; 64 tabs at 8 KB/s are half a megabyte a second.
const STREAMS: ConnectionLimits = ConnectionLimits { total: 64, per_address: 16 };

/// Largest request body. A prompt of 8,192 tokens is about 40 KB of text, so 1 MiB leaves room for lists of prompts.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// What the routes share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HttpState {
    view: SnapshotView,
    hosts: Arc<AllowedHosts>,
    streams: Places,
    shutdown: CancellationToken,
}

impl HttpState {
    /// Shows what `snapshots` holds to clients that call the server by one of `hosts`.
    ///
    /// Whoever holds the sending half publishes at least once a second; after five seconds of silence the cluster is reported
    /// as down, because nothing is known of it any more.
    pub fn new(snapshots: watch::Receiver<Arc<ClusterSnapshot>>, hosts: AllowedHosts) -> Self {
        Self {
            view: SnapshotView::new(snapshots),
            hosts: Arc::new(hosts),
            streams: Places::new(STREAMS),
            shutdown: CancellationToken::new(),
        }
    }
}

/// All routes over `state`. [`serve`] does this itself; alone it is for tests and for other servers.
pub fn router(state: HttpState) -> Router {
    let not_built = || post(error::not_built);
    Router::new()
        .route("/health", get(health::ready).options(health::ready))
        .route("/readyz", get(health::ready).options(health::ready))
        .route("/livez", get(health::live).options(health::live))
        .route("/", options(health::options))
        .route("/api/v1/cluster", get(cluster::snapshot))
        .route("/api/v1/events", get(events::stream))
        .route("/v1/completions", not_built())
        .route("/v1/chat/completions", not_built())
        .route("/v1/cancel/{id}", not_built())
        .route("/tokenize", not_built())
        .route("/detokenize", not_built())
        .route("/v1/models", get(error::not_built))
        .route("/v1/models/{id}", get(error::not_built))
        .route("/metrics", get(error::not_built))
        .merge(assets::routes())
        .fallback(|| async { ApiError::not_found() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(state.clone(), guard::guard))
        .with_state(state)
}

#[cfg(test)]
mod tests;

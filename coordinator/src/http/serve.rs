//! The accept loop: how many connections there are and when one is let go.
//!
//! `axum::serve` sets no limit on the time in which a client must send its request's head, so one could hold connections by
//! sending nothing. Here hyper is driven directly: a head within ten seconds, at most 256 connections, each at most an hour
//! old (a browser's event stream dials again by itself), and two seconds to finish once the server stops. HTTP/1.1 only:
//! browsers and OpenAI's clients speak HTTP/2 only over TLS, and telling the two apart would reopen the wait without a limit.

use std::{io, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{HttpState, router};

/// A client that has not sent a request's head by then is not coming.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// Largest head, and most that is read ahead of the handler.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Four times the event streams, the rest for short requests.
const CONNECTIONS_MAX: usize = 256;

/// Age at which a connection is asked to end, so that one whose client no longer reads does not stay for ever.
const AGE_MAX: Duration = Duration::from_secs(3600);

/// What a connection gets to finish its answer.
const FINISH_WITHIN: Duration = Duration::from_secs(2);

/// Serves until `shutdown`, then ends every stream and connection, within about two seconds.
///
/// # Errors
/// When the listener can no longer accept at all. Errors of one connection are logged and concern only it.
pub async fn serve(listener: TcpListener, state: HttpState, shutdown: CancellationToken) -> io::Result<()> {
    listener.local_addr()?;
    let state = HttpState { shutdown: shutdown.clone(), ..state };
    let connections = TaskTracker::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    connections.spawn(shutdown.clone().run_until_cancelled_owned(state.view.clone().follow()));
    let router = router(state);
    while let Some(socket) = shutdown.run_until_cancelled(accept(&listener, &places)).await {
        let (socket, place) = socket;
        let connection = connection(socket, router.clone(), shutdown.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    connections.close();
    connections.wait().await;
    Ok(())
}

/// The next connection and its place. Waits for a place first: further clients queue in the kernel, where it is bounded.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<tokio::sync::OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let place = Arc::clone(places).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((socket, _)) => return (socket, place),
            // The client gave up before it was accepted.
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                // Out of file descriptors, most likely: going on at once would spin.
                warn!(%error, "http connection not accepted");
                time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(socket: TcpStream, router: Router, shutdown: CancellationToken) {
    // Only a hint: answers are written whole either way.
    let _ = socket.set_nodelay(true);
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(BUFFER_BYTES_MAX);
    let connection = builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = shutdown.cancelled() => None,
        () = time::sleep(AGE_MAX) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            time::timeout(FINISH_WITHIN, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%error, "http connection ended early");
    }
}

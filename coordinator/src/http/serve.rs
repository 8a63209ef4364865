//! The accept loop: how many connections there are and when one is let go.
//!
//! `axum::serve` sets no limit on the time in which a client must send its request's head, so one could hold connections by
//! sending nothing. Here hyper is driven directly: a head within five seconds, an answer taken within thirty, each connection at most
//! an hour old (a browser's event stream dials again by itself), and two seconds to finish once the server stops. Where there is no
//! room, the connection that has been idle longest makes it; where all have requests, a few more come in for health alone, so that
//! no crowd keeps a probe out. HTTP/1.1 only: browsers and OpenAI's clients speak HTTP/2 only over TLS, and telling the two apart
//! would reopen the wait without a limit.

use std::{io, net::SocketAddr, time::Duration};

use axum::Router;
use grokpipe_proto::transport::{
    ConnectionLimits, is_of_one_connection,
    places::{Place, Places},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time,
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{
    HttpState, router,
    visitor::{Visited, Visitor},
};

/// A client that has not sent a request's head by then is not coming. Also how long one is kept between two requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that has taken nothing of its answer for this long does not read.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest head, and most that is read ahead of the handler.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Connections for health alone, when all others have been given away.
const FOR_HEALTH: ConnectionLimits = ConnectionLimits { total: 32, per_address: 8 };

/// Idle connections that leave when there are no descriptors for new ones.
const ROOM: usize = 16;

/// Age at which a connection is asked to end, so that one whose client no longer reads does not stay for ever.
const AGE_MAX: Duration = Duration::from_secs(3600);

/// What a connection gets to finish its answer.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves within `limits` until `shutdown`, then ends every stream and connection, within about two seconds.
///
/// # Errors
/// When the listener can no longer accept at all. Errors of one connection are logged and concern only it.
pub async fn serve(
    listener: TcpListener,
    state: HttpState,
    limits: ConnectionLimits,
    shutdown: CancellationToken,
) -> io::Result<()> {
    listener.local_addr()?;
    let state = HttpState { shutdown: shutdown.clone(), ..state };
    let connections = TaskTracker::new();
    let door = Door { places: Places::new(limits), for_health: Places::new(FOR_HEALTH) };
    connections.spawn(shutdown.clone().run_until_cancelled_owned(state.view.clone().follow()));
    let router = router(state);
    while let Some((socket, address)) = shutdown.run_until_cancelled(door.accept(&listener)).await {
        let Some((place, only_health)) = door.enter(address) else { continue };
        connections.spawn(connection(socket, address, place, only_health, router.clone(), shutdown.clone()));
    }
    connections.close();
    connections.wait().await;
    Ok(())
}

/// The places of a port.
struct Door {
    places: Places,
    for_health: Places,
}

impl Door {
    async fn accept(&self, listener: &TcpListener) -> (TcpStream, SocketAddr) {
        loop {
            match listener.accept().await {
                Ok(accepted) => return accepted,
                // The client gave up before it was accepted.
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    // Out of file descriptors, most likely: going on at once would spin.
                    warn!(%error, "http connections are not accepted");
                    self.places.make_room(ROOM);
                    time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// A place, and whether it is for health alone; `None` when the connection is to be closed at once.
    fn enter(&self, address: SocketAddr) -> Option<(Place, bool)> {
        let ordinary = self.places.enter(address.ip()).map(|place| (place, false));
        let entered = ordinary.or_else(|_full| self.for_health.enter(address.ip()).map(|place| (place, true)));
        entered.inspect_err(|refusal| debug!(%address, %refusal, "http connection refused")).ok()
    }
}

async fn connection(
    socket: TcpStream,
    address: SocketAddr,
    place: Place,
    only_health: bool,
    router: Router,
    shutdown: CancellationToken,
) {
    // Only a hint: answers are written whole either way.
    let _ = socket.set_nodelay(true);
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(TAKEN_TIMEOUT));
    let taken = place.taken();
    let visited = Visited { router, visitor: Visitor::new(address, place, only_health) };
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(!only_health)
        .max_buf_size(BUFFER_BYTES_MAX);
    let connection = builder.serve_connection(TokioIo::new(Box::pin(socket)), TowerToHyperService::new(visited));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = taken => return,
        () = shutdown.cancelled() => None,
        () = time::sleep(AGE_MAX) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            time::timeout(FINISH_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%error, "http connection ended early");
    }
}

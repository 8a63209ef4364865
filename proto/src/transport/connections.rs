//! The connections of a gRPC port: who is at the other end, and when one is let go.
//!
//! tonic keeps a connection that sends nothing for ever, so a thousand of them end a server. Here a connection has five seconds to
//! open its first stream, has a place as long as it stands ([`Places`]), and is closed when another one takes it: that may happen
//! while no call runs on it.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::{
    BoxFuture, BoxIo, Listening, is_of_one_connection,
    opening::Opening,
    places::{Call, ConnectionLimits, NoPlace, Place, Places, counted},
};

/// A client that has not opened a stream by then is not coming. Those that connect ahead of their first call dial again by themselves.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle connections that leave when there are no descriptors for new ones.
const ROOM: usize = 16;
/// A flood is worth a line now and then, not a line a connection.
const TELL_EVERY: Duration = Duration::from_secs(30);

/// Who is at the other end of a connection; an extension of every request that came over it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it comes from.
    pub address: SocketAddr,
    place: Arc<Place>,
}

impl Peer {
    /// A number that stands for whoever this is: all connections from one other machine are one client. On this machine, where
    /// everybody has the same address, each connection is one.
    pub fn client(&self) -> u64 {
        let address = counted(self.address.ip());
        let mut hasher = DefaultHasher::new();
        if address.is_loopback() {
            self.place.number().hash(&mut hasher)
        } else {
            address.hash(&mut hasher)
        }
        hasher.finish()
    }

    /// A call begins on this connection.
    pub fn begin(&self) -> Call {
        self.place.begin()
    }
}

/// One accepted connection.
pub struct Connection {
    io: BoxIo,
    peer: Peer,
    /// Until its first stream.
    silent: Option<Silent>,
    taken: BoxFuture<()>,
}

/// What a connection without a stream waits for.
struct Silent {
    opening: Opening,
    overdue: Pin<Box<Sleep>>,
}

impl Listening {
    /// The port's connections within these limits, for a server. Never ends, and never with an error: what goes wrong with one
    /// connection, or for want of descriptors, concerns none of the others.
    pub fn connections(self, limits: ConnectionLimits) -> impl Stream<Item = io::Result<Connection>> + Send {
        let places = Places::new(limits);
        let mut told: Option<Instant> = None;
        self.incoming.filter_map(move |accepted| {
            let admitted = match accepted {
                Ok((io, address)) => Connection::admit(io, address, &places).map_err(|refusal| refusal.to_string()),
                Err(error) => {
                    if !is_of_one_connection(&error) {
                        places.make_room(ROOM);
                    }
                    Err(error.to_string())
                }
            };
            if let Err(reason) = &admitted
                && told.is_none_or(|told| told.elapsed() >= TELL_EVERY)
            {
                warn!(reason, connections = places.len(), "connections are not accepted");
                told = Some(Instant::now());
            }
            std::future::ready(admitted.ok().map(Ok))
        })
    }
}

impl Connection {
    fn admit(io: BoxIo, address: SocketAddr, places: &Places) -> Result<Self, NoPlace> {
        let place = Arc::new(places.enter(address.ip())?);
        let silent = Silent { opening: Opening::new(), overdue: Box::pin(tokio::time::sleep(STREAM_TIMEOUT)) };
        let taken = Box::pin(place.taken());
        Ok(Self { io, peer: Peer { address, place }, silent: Some(silent), taken })
    }

    /// Why the connection is to end, if it is.
    fn poll_let_go(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let reason = if self.silent.as_mut().is_some_and(|silent| silent.overdue.as_mut().poll(cx).is_ready()) {
            "no stream was opened in time"
        } else {
            ready!(self.taken.as_mut().poll(cx));
            "another connection took its place"
        };
        debug!(peer = %self.peer.address, reason, "idle connection closed");
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, reason))
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_let_go(cx) {
            return Poll::Ready(Err(error));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let has_stream = self.silent.as_mut().is_some_and(|silent| silent.opening.has_stream(&buf.filled()[before..]));
        if has_stream {
            self.silent = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    const HEADERS: &[u8] = &[0, 0, 1, 1, 4, 0, 0, 0, 1, 0];

    type Knock = io::Result<(BoxIo, SocketAddr)>;

    /// A port, and how to come to it.
    fn port(
        limits: ConnectionLimits,
    ) -> (tokio::sync::mpsc::Sender<Knock>, impl Stream<Item = io::Result<Connection>>) {
        let (knocks, incoming) = tokio::sync::mpsc::channel(16);
        let address = SocketAddr::from(([127, 0, 0, 1], 7070));
        let listening = Listening { address, incoming: Box::pin(ReceiverStream::new(incoming)) };
        (knocks, listening.connections(limits))
    }

    async fn come(knocks: &tokio::sync::mpsc::Sender<Knock>) -> DuplexStream {
        let (client, server) = duplex(1024);
        let from = SocketAddr::from(([127, 0, 0, 1], 40_000));
        knocks.send(Ok((BoxIo::new(server), from))).await.unwrap();
        client
    }

    /// Reads until the end; whether that came within a minute.
    async fn ends(connection: &mut Connection) -> bool {
        let mut buffer = [0; 64];
        let ended = async { while connection.read(&mut buffer).await.is_ok_and(|count| count > 0) {} };
        tokio::time::timeout(Duration::from_secs(60), ended).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_stream_is_let_go() {
        for (sent, expected) in [
            (vec![], true),
            (vec![&PREFACE[..10]], true),
            (vec![PREFACE], true),
            (vec![PREFACE, SETTINGS], true),
            (vec![PREFACE, SETTINGS, HEADERS], false),
        ] {
            let (knocks, connections) = port(ConnectionLimits::default());
            let mut connections = Box::pin(connections);
            let mut client = come(&knocks).await;
            client.write_all(&sent.concat()).await.unwrap();
            let mut connection = connections.next().await.unwrap().unwrap();
            let began = Instant::now();
            assert_eq!(ends(&mut connection).await, expected, "{sent:?}");
            assert!(!expected || began.elapsed() < Duration::from_secs(6), "{sent:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_takes_the_place_of_an_idle_connection_only() {
        let (knocks, connections) = port(ConnectionLimits { total: 2, per_address: 64 });
        let mut connections = Box::pin(connections);
        let mut speaks = come(&knocks).await;
        speaks.write_all(&[PREFACE, SETTINGS, HEADERS].concat()).await.unwrap();
        let mut first = connections.next().await.unwrap().unwrap();
        assert!(first.read(&mut [0; 64]).await.unwrap() > 0);
        let call = first.connect_info().begin();
        let _silent = come(&knocks).await;
        let mut second = connections.next().await.unwrap().unwrap();
        let mut speaks_too = come(&knocks).await;
        speaks_too.write_all(&[PREFACE, SETTINGS, HEADERS].concat()).await.unwrap();
        let mut third = connections.next().await.unwrap().unwrap();
        let left = second.read(&mut [0; 64]).await.unwrap_err();
        assert!(left.to_string().contains("took its place"), "{left}");
        assert!(third.read(&mut [0; 64]).await.unwrap() > 0);
        let _call = third.connect_info().begin();
        assert!(!ends(&mut first).await);
        // Both have calls: the next one is turned away.
        let mut refused = come(&knocks).await;
        let after = async {
            assert_eq!(refused.read(&mut [0; 8]).await.unwrap(), 0);
            // One that has had calls makes room too, once they are done.
            drop(call);
            let client = come(&knocks).await;
            drop(knocks);
            client
        };
        let (_client, fourth) = tokio::join!(after, connections.next());
        assert!(fourth.unwrap().is_ok());
        let left = first.read(&mut [0; 64]).await.unwrap_err();
        assert!(left.to_string().contains("took its place"), "{left}");
        assert!(!third.connect_info().place.is_taken());
    }

    #[tokio::test(start_paused = true)]
    async fn want_of_descriptors_ends_idle_connections_and_not_the_port() {
        let (knocks, connections) = port(ConnectionLimits::default());
        let mut connections = Box::pin(connections);
        let _silent = come(&knocks).await;
        let mut silent = connections.next().await.unwrap().unwrap();
        // "Too many open files", on Linux and macOS.
        knocks.send(Err(io::Error::from_raw_os_error(24))).await.unwrap();
        let _later = come(&knocks).await;
        assert!(connections.next().await.unwrap().is_ok());
        let left = silent.read(&mut [0; 8]).await.unwrap_err();
        assert!(left.to_string().contains("took its place"), "{left}");
    }
}

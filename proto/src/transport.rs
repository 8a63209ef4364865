//! How connections are made: real sockets in production, simulated ones in tests, and the same HTTP/2 rules on all of them.
//!
//! tonic's defaults are unsafe for a cluster: no keepalive (a healed partition leaves dead channels), no limit on concurrent
//! streams, 4 MiB messages, 64 KiB windows. They are set here, once.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
};
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tower_layer::{Identity, Stack};

mod calls;
mod connections;
mod opening;
pub mod places;

pub use calls::{Answer, CountCalls, Counted};
pub use connections::{Connection, Peer};
pub use places::ConnectionLimits;

use crate::{
    address::{Address, AddressError},
    dial::dial,
};

/// A future that owns what it needs.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Anything that carries bytes both ways.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// The addresses of a connection's two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// This process's.
    pub own: SocketAddr,
    /// The other one's.
    pub peer: SocketAddr,
}

/// One connection, of whatever kind.
pub struct BoxIo {
    io: Box<dyn Io>,
    ends: Option<Ends>,
}

impl BoxIo {
    /// Wraps a connection of which no addresses are known.
    pub fn new(io: impl Io) -> Self {
        Self { io: Box::new(io), ends: None }
    }

    /// Wraps a connection between these addresses.
    pub fn between(ends: Ends, io: impl Io) -> Self {
        Self { io: Box::new(io), ends: Some(ends) }
    }
}

impl AsyncRead for BoxIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for BoxIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Connections as they come in, and from where. An error of one connection does not end the stream.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<(BoxIo, SocketAddr)>> + Send>>;

/// An open port.
pub struct Listening {
    /// Where it is, with the port that the system chose for port 0.
    pub address: SocketAddr,
    /// The connections, without any limit; a server takes [`Listening::connections`].
    pub incoming: Incoming,
}

/// Makes connections and opens ports.
pub trait Net: Send + Sync + 'static {
    /// Connects to `host:port`.
    fn connect(&self, address: String) -> BoxFuture<io::Result<BoxIo>>;
    /// Opens `host:port`; port 0 lets the system choose.
    fn bind(&self, address: String) -> BoxFuture<io::Result<Listening>>;
}

/// Real sockets, without Nagle's delay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Net for Tcp {
    fn connect(&self, address: String) -> BoxFuture<io::Result<BoxIo>> {
        Box::pin(async move {
            let address: Address =
                address.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            let stream = dial(&address).await?;
            stream.set_nodelay(true)?;
            let ends = Ends { own: stream.local_addr()?, peer: stream.peer_addr()? };
            Ok(BoxIo::between(ends, stream))
        })
    }

    fn bind(&self, address: String) -> BoxFuture<io::Result<Listening>> {
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            let incoming = futures_util::stream::unfold(listener, |listener| async move {
                let accepted = match listener.accept().await {
                    Ok((stream, peer)) => stream.set_nodelay(true).map(|()| (BoxIo::new(stream), peer)),
                    Err(error) => {
                        if !is_of_one_connection(&error) {
                            // Out of file descriptors, mostly: wait for some to close instead of spinning.
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                        Err(error)
                    }
                };
                Some((accepted, listener))
            });
            Ok(Listening { address, incoming: Box::pin(incoming) })
        })
    }
}

/// Whether accepting failed for the sake of one connection, which is gone, so that the next one may well be accepted.
pub fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Streams of a connection at once. A client that has had as many reset, by itself or by its errors, only makes work (CVE-2023-44487,
/// CVE-2025-8671), and is let go; tonic alone sets no limit for the latter.
const STREAMS_MAX: u32 = 256;
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How soon a silent peer counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keepalive {
    /// Between the processes of a cluster: ping after 1 s, dead after 3 s of silence.
    Cluster,
    /// Towards clients: ping after 10 s, dead after 15 s of silence.
    Client,
}

impl Keepalive {
    fn interval(self) -> Duration {
        Duration::from_secs(if self == Self::Cluster { 1 } else { 10 })
    }
    fn timeout(self) -> Duration {
        Duration::from_secs(if self == Self::Cluster { 2 } else { 5 })
    }
}

/// Why an address is none.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not `host:port`.
    #[error("{source}, found {found:?}")]
    Address {
        /// The text.
        found: String,
        /// What is wrong with it.
        source: AddressError,
    },
    /// Nobody there, or not in time.
    #[error("{address}: {}", root_cause(source))]
    Unreachable {
        /// Where.
        address: String,
        /// What went wrong.
        source: tonic::transport::Error,
    },
}

/// What the system said: the innermost of the errors that led to this one. The outer ones only say "transport error".
pub(crate) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    match cause.to_string() {
        // How tokio and tonic say that the system said nothing.
        said if said == "deadline has elapsed" => "connection timed out".into(),
        said => said,
    }
}

/// Connects a channel to `host:port`, within two seconds.
///
/// # Errors
/// [`ConnectError`]; trying again may help unless the address makes no sense.
pub async fn connect(net: &Arc<dyn Net>, address: &str, keepalive: Keepalive) -> Result<Channel, ConnectError> {
    connect_between(net, address, keepalive).await.map(|(channel, _ends)| channel)
}

/// As [`connect`], and between which addresses, where the network knows.
///
/// # Errors
/// As [`connect`].
pub async fn connect_between(
    net: &Arc<dyn Net>,
    address: &str,
    keepalive: Keepalive,
) -> Result<(Channel, Option<Ends>), ConnectError> {
    let refuse = |source| ConnectError::Address { found: address.to_owned(), source };
    let authority = address.parse::<Address>().map_err(refuse)?.authority();
    let endpoint = Endpoint::from_shared(format!("http://{authority}"))
        .map_err(|_invalid| refuse(AddressError::Host))?
        .http2_keep_alive_interval(keepalive.interval())
        .keep_alive_timeout(keepalive.timeout())
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let ends: Arc<OnceLock<Ends>> = Arc::default();
    let connector = Connector { net: Arc::clone(net), address: address.to_owned(), ends: Arc::clone(&ends) };
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError::Unreachable { address: address.to_owned(), source })?;
    Ok((channel, ends.get().copied()))
}

/// A server with the limits that every port of a cluster has.
pub fn server(keepalive: Keepalive) -> Server<Stack<CountCalls, Identity>> {
    Server::builder()
        .http2_keepalive_interval(Some(keepalive.interval()))
        .http2_keepalive_timeout(Some(keepalive.timeout()))
        .http2_max_header_list_size(16 << 10)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_pending_accept_reset_streams(Some(STREAMS_MAX as usize))
        .http2_max_local_error_reset_streams(Some(STREAMS_MAX as usize))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .layer(CountCalls)
}

struct Connector {
    net: Arc<dyn Net>,
    address: String,
    /// Those of the first connection.
    ends: Arc<OnceLock<Ends>>,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<BoxIo>;
    type Error = io::Error;
    type Future = BoxFuture<io::Result<TokioIo<BoxIo>>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let connecting = self.net.connect(self.address.clone());
        let ends = Arc::clone(&self.ends);
        Box::pin(async move {
            let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_elapsed| {
                let text = format!("connection timed out after {} s", CONNECT_TIMEOUT.as_secs());
                io::Error::new(io::ErrorKind::TimedOut, text)
            })??;
            if let Some(found) = connection.ends {
                let _ = ends.set(found);
            }
            Ok(TokioIo::new(connection))
        })
    }
}

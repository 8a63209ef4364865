//! How connections are made: real sockets in production, simulated ones in tests, and the same HTTP/2 rules on all of them.
//!
//! tonic's defaults are unsafe for a cluster: no keepalive (a healed partition leaves dead channels), no limit on concurrent
//! streams, 4 MiB messages, 64 KiB windows. They are set here, once.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};
use tonic::transport::{Channel, Endpoint, Server, Uri};

mod connections;
mod opening;
pub mod places;

pub use connections::{Connection, Peer};
pub use places::ConnectionLimits;

/// A future that owns what it needs.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Anything that carries bytes both ways.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// One connection, of whatever kind.
pub struct BoxIo(Box<dyn Io>);

impl BoxIo {
    /// Wraps a connection.
    pub fn new(io: impl Io) -> Self {
        Self(Box::new(io))
    }
}

impl AsyncRead for BoxIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for BoxIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
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
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(BoxIo::new(stream))
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
    #[error("expected an address as host:port, found {0:?}")]
    Address(String),
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
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Connects a channel to `host:port`, within two seconds.
///
/// # Errors
/// [`ConnectError`]; trying again may help unless the address makes no sense.
pub async fn connect(net: &Arc<dyn Net>, address: &str, keepalive: Keepalive) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_invalid| ConnectError::Address(address.to_owned()))?
        .http2_keep_alive_interval(keepalive.interval())
        .keep_alive_timeout(keepalive.timeout())
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let connector = Connector { net: Arc::clone(net), address: address.to_owned() };
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError::Unreachable { address: address.to_owned(), source })
}

/// A server with the limits that every port of a cluster has.
pub fn server(keepalive: Keepalive) -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(keepalive.interval()))
        .http2_keepalive_timeout(Some(keepalive.timeout()))
        .http2_max_header_list_size(16 << 10)
        .max_concurrent_streams(256)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}

struct Connector {
    net: Arc<dyn Net>,
    address: String,
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
        Box::pin(async move {
            let connected = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_late| {
                let text = format!("connection timed out after {} s", CONNECT_TIMEOUT.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            });
            connected.map(TokioIo::new)
        })
    }
}

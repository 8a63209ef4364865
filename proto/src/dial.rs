//! How a host is dialled that has several addresses: each gets its turn shortly after the one before, and the first that answers is
//! taken. So an address family without a way does not use up the time of the other one.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    net::{TcpStream, lookup_host},
    time::sleep,
};

use crate::address::Address;

/// Head start of each address before the next one.
const HEAD_START: Duration = Duration::from_millis(250);

/// Connects to the first address of the host that answers.
///
/// # Errors
/// What the resolver said, or what the system said of the address that was tried last.
pub(crate) async fn dial(address: &Address) -> io::Result<TcpStream> {
    let found: Vec<SocketAddr> = lookup_host((address.host(), address.port())).await?.collect();
    first(found, TcpStream::connect).await
}

/// The first of several tries that succeeds.
async fn first<T, F: Future<Output = io::Result<T>>>(
    addresses: Vec<SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T> {
    let connect = &connect;
    let mut tries: FuturesUnordered<_> = (0_u32..)
        .zip(addresses)
        .map(|(turn, address)| async move {
            sleep(HEAD_START * turn).await;
            connect(address).await
        })
        .collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    while let Some(tried) = tries.next().await {
        match tried {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(count: u16) -> Vec<SocketAddr> {
        (1..=count).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect()
    }

    /// An address whose port is odd never answers, one whose port is even does.
    async fn even_answers(address: SocketAddr) -> io::Result<u16> {
        if address.port() % 2 == 1 {
            std::future::pending::<()>().await;
        }
        Ok(address.port())
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_does_not_hold_up_the_next_one() {
        assert_eq!(first(addresses(2), even_answers).await.unwrap(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_address_that_answers_is_taken() {
        assert_eq!(first(addresses(4).split_off(1), even_answers).await.unwrap(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_answer_the_last_error_is_told() {
        let refuse = |address: SocketAddr| async move { Err::<(), _>(io::Error::other(address.to_string())) };
        assert_eq!(first(addresses(2), refuse).await.unwrap_err().to_string(), "10.0.0.1:2");
        assert_eq!(first(Vec::new(), refuse).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

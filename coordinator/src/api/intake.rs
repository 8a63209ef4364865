//! How long a request may take to arrive, and how much of all requests may be here before they are whole.
//!
//! Whoever opens a call and sends little or nothing holds memory for as long as he likes, and a thousand large requests at once are a
//! gigabyte before anybody has looked at one. So a call has [`WITHIN`] to send its whole request, and all together have [`ROOM`]. A
//! client may hold no more than what is left to the others. Does not know what a request says; a whole one leaves the room.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use grokpipe_proto::transport::Peer;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Sleep;
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

use crate::{request::RequestError, scheduler::ClientId};

/// Time from a request's head to its end: 1 MiB over 300 kbit/s.
pub const WITHIN: Duration = Duration::from_secs(30);
/// Bytes of requests that are not whole yet.
pub const ROOM: usize = 64 << 20;
/// What every call is charged for at once, for its own state and the first bytes of its request.
const CALL_BYTES: usize = 16 << 10;

/// The room of a port. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Intake(Arc<Mutex<Room>>);

#[derive(Debug)]
struct Room {
    free: usize,
    held: HashMap<ClientId, usize>,
}

impl Intake {
    /// A room of this many bytes.
    pub fn new(room: usize) -> Self {
        Self(Arc::new(Mutex::new(Room { free: room, held: HashMap::new() })))
    }

    fn with<T>(&self, change: impl FnOnce(&mut Room) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Room {
    fn take(&mut self, client: ClientId, bytes: usize) -> Result<(), RequestError> {
        let held = self.held.get(&client).copied().unwrap_or(0);
        if held.saturating_add(bytes) > self.free.saturating_sub(bytes) {
            return Err(RequestError::IntakeFull);
        }
        self.free -= bytes;
        self.held.insert(client, held + bytes);
        Ok(())
    }

    fn give_back(&mut self, client: ClientId, bytes: usize) {
        self.free += bytes;
        if let Some(held) = self.held.get_mut(&client) {
            *held -= bytes;
            if *held == 0 {
                self.held.remove(&client);
            }
        }
    }
}

/// What one call has of the room; dropping it gives that back.
#[derive(Debug)]
struct Share {
    intake: Intake,
    client: ClientId,
    bytes: usize,
    arrived: usize,
}

impl Share {
    fn open(intake: &Intake, client: ClientId) -> Result<Self, RequestError> {
        intake.with(|room| room.take(client, CALL_BYTES))?;
        Ok(Self { intake: intake.clone(), client, bytes: CALL_BYTES, arrived: 0 })
    }

    fn arrive(&mut self, bytes: usize) -> Result<(), RequestError> {
        self.arrived = self.arrived.saturating_add(bytes);
        let more = self.arrived.saturating_sub(self.bytes);
        if more > 0 {
            self.intake.with(|room| room.take(self.client, more))?;
            self.bytes += more;
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.intake.with(|room| room.give_back(self.client, self.bytes));
    }
}

/// A service whose requests arrive in time and find room, or are refused.
#[derive(Clone, Debug)]
pub struct Received<S> {
    service: S,
    intake: Intake,
}

impl<S> Received<S> {
    /// `service`, whose requests share the room with those of others.
    pub fn new(service: S, intake: &Intake) -> Self {
        Self { service, intake: intake.clone() }
    }
}

impl<S: NamedService> NamedService for Received<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Received<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let client = request.extensions().get().map_or(0, Peer::client);
        match Share::open(&self.intake, client) {
            Ok(share) => {
                let late = Box::pin(tokio::time::sleep(WITHIN));
                let request = request.map(|body| Body::new(Arriving { body, under_way: Some((share, late)) }));
                Box::pin(self.service.call(request))
            }
            Err(full) => Box::pin(async move { Ok(Status::from(full).into_http()) }),
        }
    }
}

/// The body of a request.
struct Arriving {
    body: Body,
    /// `None` once it is whole.
    under_way: Option<(Share, Pin<Box<Sleep>>)>,
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        let Some((share, late)) = &mut this.under_way else { return polled };
        let refusal = match &polled {
            Poll::Pending if late.as_mut().poll(cx).is_ready() => RequestError::IntakeLate { limit: WITHIN },
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(Ok(frame))) => match frame.data_ref().map_or(Ok(()), |data| share.arrive(data.len())) {
                Ok(()) => {
                    if this.body.is_end_stream() {
                        this.under_way = None;
                    }
                    return polled;
                }
                Err(full) => full,
            },
            Poll::Ready(None | Some(Err(_))) => {
                this.under_way = None;
                return polled;
            }
        };
        this.under_way = None;
        Poll::Ready(Some(Err(refusal.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::poll_fn};

    use tokio::sync::mpsc;
    use tonic::Code;

    use super::*;

    /// Reads a request to its end; its length, or why there was none.
    #[derive(Clone)]
    struct Reads;

    impl Service<http::Request<Body>> for Reads {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let mut body = request.into_body();
            Box::pin(async move {
                let mut bytes = 0;
                loop {
                    match poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                        Some(Ok(frame)) => bytes += frame.data_ref().map_or(0, Bytes::len),
                        Some(Err(status)) => return Ok(status.into_http()),
                        None => break,
                    }
                }
                Ok(http::Response::builder().header("bytes", bytes).body(Body::default()).unwrap())
            })
        }
    }

    /// A request's body, as it is sent.
    struct Sent(mpsc::Receiver<usize>);

    impl HttpBody for Sent {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(vec![0; bytes].into()))))
        }
    }

    type Answer = tokio::task::JoinHandle<Result<usize, Code>>;

    /// A call: what sends its request, and what comes of it.
    fn call(intake: &Intake) -> (mpsc::Sender<usize>, Answer) {
        let (send, sent) = mpsc::channel(16);
        let mut service = Received::new(Reads, intake);
        let answer = service.call(http::Request::new(Body::new(Sent(sent))));
        let answer = tokio::spawn(async move {
            let answer = answer.await.unwrap();
            match Status::from_header_map(answer.headers()) {
                Some(status) => Err(status.code()),
                None => Ok(answer.headers()["bytes"].to_str().unwrap().parse().unwrap()),
            }
        });
        (send, answer)
    }

    fn free(intake: &Intake) -> usize {
        intake.with(|room| room.free)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_end_is_over_in_time_however_it_drips() {
        let intake = Intake::new(ROOM);
        let (_silent, nothing) = call(&intake);
        let (dripping, drips) = call(&intake);
        tokio::spawn(async move {
            while dripping.send(1).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let (whole, good) = call(&intake);
        whole.send(5).await.unwrap();
        drop(whole);
        assert_eq!(good.await.unwrap(), Ok(5));
        for late in [nothing, drips] {
            assert_eq!(late.await.unwrap(), Err(Code::DeadlineExceeded));
        }
        assert_eq!(free(&intake), ROOM);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_whole_has_a_room_and_leaves_it_when_it_is_whole_or_gone() {
        let intake = Intake::new(8 * CALL_BYTES);
        let (large, answer) = call(&intake);
        large.send(3 * CALL_BYTES).await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(free(&intake), 5 * CALL_BYTES);
        let (too_large, refused) = call(&intake);
        too_large.send(2 * CALL_BYTES).await.unwrap();
        assert_eq!(refused.await.unwrap(), Err(Code::ResourceExhausted));
        assert_eq!(free(&intake), 5 * CALL_BYTES);
        drop(large);
        assert_eq!(answer.await.unwrap(), Ok(3 * CALL_BYTES));
        assert_eq!(free(&intake), 8 * CALL_BYTES);
        let (_left, gone) = call(&intake);
        tokio::task::yield_now().await;
        gone.abort();
        assert!(gone.await.is_err());
        assert_eq!(free(&intake), 8 * CALL_BYTES);
    }

    #[test]
    fn one_client_leaves_as_much_as_it_holds() {
        let intake = Intake::new(16 * CALL_BYTES);
        let of = |client| std::iter::from_fn(|| Share::open(&intake, client).ok()).collect::<Vec<_>>();
        let first = of(1);
        let second = of(2);
        assert_eq!((first.len(), second.len()), (8, 4));
        assert!(Share::open(&intake, 3).is_ok());
        drop((first, second));
        assert!(intake.with(|room| room.held.is_empty()));
    }
}

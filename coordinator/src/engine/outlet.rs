//! The way from the engine to one client: what the client has not read yet, bounded in size and in time.
//!
//! The engine never waits for a client. It puts events into a queue; a task passes them on as the client reads. A client that reads
//! nothing for [`STALLED_AFTER`], or leaves more than [`UNREAD_EVENTS`] unread, is given up: its queue is dropped at
//! once, whether or not its connection stays, and its request ends.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::Stream;
use tokio::{sync::mpsc, time::timeout};
use tracing::{Instrument, Span, info};

use crate::request::{RequestError, RequestEvent};

/// How long a client may leave its queue unread.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// Memory of the tokens that a client may leave unread.
const UNREAD_BYTES: usize = 64 << 10;
/// Approximate memory of a token: the event, the request's id, a piece of text.
const TOKEN_BYTES: usize = size_of::<RequestEvent>() + 64;
/// Tokens that a client may leave unread.
const UNREAD_EVENTS: usize = UNREAD_BYTES / TOKEN_BYTES;

/// What a client reads: events, then an error if its request ended with one.
pub struct ClientStream {
    events: mpsc::Receiver<RequestEvent>,
    end: Arc<OnceLock<RequestError>>,
    ended: bool,
}

impl Stream for ClientStream {
    type Item = Result<RequestEvent, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(event) = ready!(self.events.poll_recv(cx)) {
            return Poll::Ready(Some(Ok(event)));
        }
        let told = std::mem::replace(&mut self.ended, true);
        let error = self.end.get().filter(|_| !told).cloned();
        Poll::Ready(error.map(Err))
    }
}

/// The sending end, which the engine holds.
pub(super) struct Outlet {
    queue: mpsc::Sender<RequestEvent>,
    end: Arc<OnceLock<RequestError>>,
}

impl Outlet {
    /// Both ends. What passes the events on ends when the engine's end is dropped and the client has read all, when the client's end
    /// is dropped, or when the client is given up. It logs in `span`.
    pub(super) fn open(span: Span) -> (Self, ClientStream) {
        let (queue, queued) = mpsc::channel(UNREAD_EVENTS);
        // One event is on its way to the client, or waits for it to read.
        let (client, events) = mpsc::channel(1);
        let end = Arc::<OnceLock<RequestError>>::default();
        tokio::spawn(pass_on(queued, client, Arc::clone(&end)).instrument(span));
        (Self { queue, end: Arc::clone(&end) }, ClientStream { events, end, ended: false })
    }

    /// Queues an event. Returns whether the client still reads.
    pub(super) fn send(&self, event: RequestEvent) -> bool {
        let sent = self.queue.try_send(event);
        if let Err(mpsc::error::TrySendError::Full(_)) = sent {
            self.end(RequestError::ClientStalled);
        }
        sent.is_ok()
    }

    /// Whether the client left or was given up.
    pub(super) fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// The request ends with this error, after what is queued.
    pub(super) fn end(&self, error: RequestError) {
        // The first error stays.
        let _ = self.end.set(error);
    }
}

async fn pass_on(
    mut queued: mpsc::Receiver<RequestEvent>,
    client: mpsc::Sender<RequestEvent>,
    end: Arc<OnceLock<RequestError>>,
) {
    loop {
        let event = tokio::select! {
            () = client.closed() => return,
            event = queued.recv() => event,
        };
        let Some(event) = event else { return };
        let stalled = match timeout(STALLED_AFTER, client.send(event)).await {
            Ok(Ok(())) => end.get() == Some(&RequestError::ClientStalled),
            Ok(Err(_gone)) => return,
            Err(_late) => true,
        };
        if stalled {
            let _ = end.set(RequestError::ClientStalled);
            info!(unread = queued.len(), "the client does not read, its stream is given up");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio::time::{advance, sleep};

    use super::*;
    use crate::request::Token;

    fn token(index: u32) -> RequestEvent {
        RequestEvent::Token(Token { index, ..Token::default() })
    }

    /// Lets other tasks run.
    async fn settle() {
        sleep(Duration::from_millis(1)).await;
    }

    /// Reads to the end: how many events there were, and the error.
    async fn read(stream: &mut ClientStream) -> (usize, Option<RequestError>) {
        let mut events = 0;
        while let Some(item) = stream.next().await {
            match item {
                Ok(_event) => events += 1,
                Err(error) => {
                    assert!(stream.next().await.is_none(), "an error is the end");
                    return (events, Some(error));
                }
            }
        }
        (events, None)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_reads_everything_and_then_the_error() {
        for error in [None, Some(RequestError::ShuttingDown)] {
            let (outlet, mut stream) = Outlet::open(Span::none());
            for index in 0..50 {
                assert!(outlet.send(token(index)));
            }
            if let Some(error) = &error {
                outlet.end(error.clone());
            }
            drop(outlet);
            assert_eq!(read(&mut stream).await, (50, error));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_waited_for() {
        let (outlet, mut stream) = Outlet::open(Span::none());
        for index in 0..20 {
            assert!(outlet.send(token(index)));
        }
        for _event in 0..20 {
            sleep(STALLED_AFTER / 2).await;
            assert!(stream.next().await.unwrap().is_ok());
        }
        assert!(!outlet.is_closed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_client_leaves_unread_is_dropped_after_a_while_even_when_its_request_has_ended() {
        for request_goes_on in [true, false] {
            let (outlet, mut stream) = Outlet::open(Span::none());
            for index in 0..50 {
                assert!(outlet.send(token(index)));
            }
            let outlet = request_goes_on.then_some(outlet);
            settle().await;
            advance(STALLED_AFTER).await;
            settle().await;
            assert!(outlet.is_none_or(|outlet| outlet.is_closed()), "the engine sees that nobody reads");
            let left = read(&mut stream).await;
            assert_eq!(left, (1, Some(RequestError::ClientStalled)), "only what was on its way is left");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_client_leaves_unread_is_bounded() {
        let (outlet, mut stream) = Outlet::open(Span::none());
        let mut sent = 0;
        while outlet.send(token(sent)) {
            sent += 1;
            settle().await;
            assert!(sent as usize <= UNREAD_EVENTS + 2, "{sent} events are held");
        }
        drop(outlet);
        let (events, error) = read(&mut stream).await;
        assert!(events <= 2, "{events} events were kept for a client that is given up");
        assert_eq!(error, Some(RequestError::ClientStalled));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_is_seen_while_nothing_is_sent() {
        let (outlet, stream) = Outlet::open(Span::none());
        drop(stream);
        settle().await;
        assert!(outlet.is_closed());
    }
}

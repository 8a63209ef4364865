//! `/api/v1/events`: the snapshot as it changes.
//!
//! One kind of event, `snapshot`, each one whole, so that a client which missed some needs only the next. Ids count up in a
//! stream and go on from `Last-Event-ID`. What a person must see (a node's state, the verdict, the plan, an event) is sent at
//! once; figures that merely tick wait for the next full second. A slow client costs no memory: it skips what it missed.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    http::HeaderName,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::stream;
use grokpipe_proto::{
    snapshot::{ClusterSnapshot, NodeState},
    transport::places::{Call, Place},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{HttpState, error::ApiError, view::SnapshotView, visitor::Visitor};

/// Between snapshots that only tick.
const TICK: Duration = Duration::from_secs(1);

/// Between any two snapshots, so that a worker that flaps does not flood the page.
const GAP_MIN: Duration = Duration::from_millis(100);

/// Of silence; proxies close streams that are silent for about a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Opens a stream, or 503 when there are too many.
pub(super) async fn stream(State(state): State<HttpState>, request: Request) -> Result<Response, ApiError> {
    let place = state.streams.enter(Visitor::of(&request).address()).map_err(ApiError::too_many_streams)?;
    let call = place.begin();
    let last_id = request.headers().get("last-event-id").and_then(|id| id.to_str().ok()).and_then(|id| id.parse().ok());
    let feed = Feed {
        snapshots: state.view.subscribe(),
        view: state.view,
        sent: None,
        last_id: last_id.unwrap_or(0),
        shutdown: state.shutdown.clone(),
        _place: (place, call),
    };
    let events = stream::unfold(feed, async |mut feed| Some((Ok::<_, Infallible>(feed.next().await?), feed)));
    let body = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive"));
    Ok(([(HeaderName::from_static("x-accel-buffering"), "no")], body).into_response())
}

/// One client's stream.
struct Feed {
    view: SnapshotView,
    snapshots: watch::Receiver<Arc<ClusterSnapshot>>,
    sent: Option<(Arc<ClusterSnapshot>, Instant)>,
    last_id: u64,
    shutdown: CancellationToken,
    /// A stream counts as one call, as long as it lives.
    _place: (Place, Call),
}

impl Feed {
    /// The next event; `None` when the server stops or the publisher has ended.
    async fn next(&mut self) -> Option<Event> {
        let shutdown = self.shutdown.clone();
        let snapshot = tokio::select! {
            biased;
            () = shutdown.cancelled() => None,
            snapshot = self.snapshot() => snapshot,
        }?;
        self.last_id = self.last_id.wrapping_add(1);
        let event = Event::default().event("snapshot").id(self.last_id.to_string()).json_data(&*snapshot).ok()?;
        self.sent = Some((snapshot, Instant::now()));
        Some(event)
    }

    async fn snapshot(&mut self) -> Option<Arc<ClusterSnapshot>> {
        let Some((sent, sent_at)) = &self.sent else {
            self.snapshots.mark_unchanged();
            return Some(self.view.current());
        };
        let mut pending: Option<Arc<ClusterSnapshot>> = None;
        let mut silence = tokio::time::interval_at(*sent_at + TICK, TICK);
        loop {
            let wait = if pending.as_ref().is_some_and(|next| news(sent, next)) { GAP_MIN } else { TICK };
            tokio::select! {
                () = tokio::time::sleep_until(*sent_at + wait), if pending.is_some() => return pending,
                // A silent engine is news too.
                _ = silence.tick() => if let doubted @ Some(_) = self.view.doubted() {
                    return doubted;
                },
                changed = self.snapshots.changed() => {
                    changed.ok()?;
                    pending = Some(self.snapshots.borrow_and_update().clone());
                }
            }
        }
    }
}

/// Whether `next` holds more than new figures.
fn news(sent: &ClusterSnapshot, next: &ClusterSnapshot) -> bool {
    fn states(snapshot: &ClusterSnapshot) -> impl Iterator<Item = (&str, NodeState)> {
        snapshot.nodes.iter().map(|node| (node.name.as_str(), node.state()))
    }
    sent.verdict().phase != next.verdict().phase
        || sent.verdict().missing_layers != next.verdict().missing_layers
        || sent.plan.as_ref().map(|plan| plan.epoch) != next.plan.as_ref().map(|plan| plan.epoch)
        || sent.events.last().map(|event| event.id) != next.events.last().map(|event| event.id)
        || !states(sent).eq(states(next))
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::transport::places::Places;

    use super::*;
    use crate::http::{STREAMS, tests::serving};

    /// A stream over `snapshots` that has sent its first event.
    async fn feed(snapshots: watch::Receiver<Arc<ClusterSnapshot>>) -> Feed {
        let place = Places::new(STREAMS).enter([127, 0, 0, 1].into()).expect("free");
        let call = place.begin();
        let view = SnapshotView::new(snapshots.clone());
        tokio::spawn(view.clone().follow());
        let mut feed =
            Feed { view, snapshots, sent: None, last_id: 0, shutdown: CancellationToken::new(), _place: (place, call) };
        assert!(feed.next().await.is_some());
        feed
    }

    #[tokio::test(start_paused = true)]
    async fn figures_wait_for_the_second_and_news_do_not() {
        let (publish, snapshots) = watch::channel(Arc::new(serving()));
        let mut feed = feed(snapshots).await;
        let mut ticked = serving();
        ticked.requests.as_mut().unwrap().running = 5;
        let mut news = ticked.clone();
        news.nodes[1].set_state(NodeState::Down);
        for (next, wait) in [(ticked, TICK), (news, GAP_MIN)] {
            let start = Instant::now();
            publish.send_replace(Arc::new(next.clone()));
            assert!(feed.next().await.is_some());
            assert_eq!(start.elapsed().as_millis(), wait.as_millis());
            assert_eq!(feed.sent.as_ref().map(|(sent, _)| (**sent).clone()), Some(next));
        }
        assert_eq!(feed.last_id, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn news_overtake_waiting_figures() {
        let (publish, snapshots) = watch::channel(Arc::new(serving()));
        let mut feed = feed(snapshots).await;
        let start = Instant::now();
        let publisher = async {
            let mut next = serving();
            next.requests.as_mut().unwrap().running = 5;
            publish.send_replace(Arc::new(next.clone()));
            tokio::time::sleep(Duration::from_millis(300)).await;
            next.verdict.as_mut().unwrap().set_phase(grokpipe_proto::snapshot::VerdictPhase::Down);
            publish.send_replace(Arc::new(next));
        };
        let (event, ()) = tokio::join!(feed.next(), publisher);
        assert!(event.is_some());
        assert_eq!(start.elapsed().as_millis(), 300);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_engine_is_reported() {
        let (_publish, snapshots) = watch::channel(Arc::new(serving()));
        let mut feed = feed(snapshots).await;
        let start = Instant::now();
        assert!(feed.next().await.is_some());
        assert_eq!(start.elapsed().as_secs(), 6, "the first full second after five");
        assert_eq!(feed.sent.as_ref().map(|(sent, _)| sent.verdict().serving), Some(false));
    }

    #[tokio::test]
    async fn stream_ends_with_the_publisher_and_the_server() {
        let (publish, snapshots) = watch::channel(Arc::new(serving()));
        let mut feed = feed(snapshots).await;
        drop(publish);
        assert!(feed.next().await.is_none());

        let (_publish, snapshots) = watch::channel(Arc::new(serving()));
        let mut feed = self::feed(snapshots).await;
        feed.shutdown.cancel();
        assert!(feed.next().await.is_none());
    }
}

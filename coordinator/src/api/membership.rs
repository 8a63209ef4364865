//! MembershipService: a worker's stream, from its hello to its end.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::Stream;
use grokpipe_proto::{
    bounds,
    v1::{
        FrameFailed, Heartbeat, Hello, JoinRequest, JoinResponse, StageBlocked, StageFailed, join_request,
        join_response, membership_service_server::MembershipService,
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    cluster::JoinRefusal,
    diagnosis::{Desk, Member},
    engine::{Event, Handle},
};

const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// Messages that may wait for a worker: a few assignments.
const OUTBOX: usize = 64;

/// Serves workers.
#[derive(Clone)]
pub struct Membership {
    /// The engine.
    pub engine: Handle,
    /// Where reports of probes go.
    pub desk: Desk,
    /// The coordinator ends.
    pub shutdown: CancellationToken,
    /// Counts streams.
    pub connections: Arc<AtomicU64>,
}

#[tonic::async_trait]
impl MembershipService for Membership {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<JoinResponse, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut messages = request.into_inner();
        let hello = hello(&mut messages).await?;
        let (name, generation, member) = (hello.name.clone(), hello.generation, Member::of(&hello));
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let (reply, answer) = oneshot::channel();
        // The welcome must be the first message, so it is queued before the engine can send any other.
        let (gate, gated) = mpsc::channel(OUTBOX);
        self.engine.send(Event::Joined { connection, hello: Box::new(hello), outbox: gate, reply }).await;
        let welcome = answer
            .await
            .map_err(|_gone| Status::unavailable("the coordinator is shutting down"))?
            .map_err(|refusal| refused(&refusal))?;
        let welcome = JoinResponse { message: Some(join_response::Message::Welcome(welcome)) };
        let _ = outbox.try_send(Ok(welcome));
        self.desk.joined(connection, member, outbox.clone());
        let (engine, desk) = (self.engine.clone(), self.desk.clone());
        let worker = Worker { engine, desk, connection, name, generation, outbox, gated };
        // Owned by the connection: ends with the worker's stream, with its outbox, or with the coordinator.
        tokio::spawn(worker.serve(messages, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

async fn hello(messages: &mut Streaming<JoinRequest>) -> Result<Hello, Status> {
    let first = timeout(HELLO_WITHIN, messages.message())
        .await
        .map_err(|_late| Status::deadline_exceeded("expected a hello within 5 s, found nothing"))??;
    match first.and_then(|request| request.message) {
        Some(join_request::Message::Hello(hello)) => Ok(hello),
        _ => Err(Status::invalid_argument("expected a hello as the first message, found another one")),
    }
}

fn refused(refusal: &JoinRefusal) -> Status {
    let said = refusal.to_string();
    match refusal {
        JoinRefusal::Invalid { .. } => Status::invalid_argument(said),
        JoinRefusal::NameTaken(_) => Status::already_exists(said),
        JoinRefusal::Full(_) => Status::resource_exhausted(said),
        JoinRefusal::Version { .. } => Status::failed_precondition(said),
    }
}

struct Worker {
    engine: Handle,
    desk: Desk,
    connection: u64,
    name: String,
    generation: u64,
    outbox: mpsc::Sender<Result<JoinResponse, Status>>,
    gated: mpsc::Receiver<Result<JoinResponse, Status>>,
}

impl Worker {
    async fn serve(mut self, mut messages: Streaming<JoinRequest>, shutdown: CancellationToken) {
        let reason = loop {
            tokio::select! {
                () = shutdown.cancelled() => {
                    let _ = self.outbox.try_send(Err(Status::unavailable("the coordinator is shutting down")));
                    break "the coordinator is shutting down".to_owned();
                }
                () = self.outbox.closed() => break "its connection was closed".to_owned(),
                order = self.gated.recv() => match order {
                    // A worker that reads nothing is told nothing; its heartbeats will stop as well.
                    Some(order) => if self.outbox.try_send(order).is_err() {
                        break "it takes no messages".to_owned();
                    },
                    None => break "it was given up".to_owned(),
                },
                message = messages.message() => match message {
                    Ok(Some(JoinRequest { message: Some(join_request::Message::ProbeReport(report)) })) => {
                        self.desk.reported(&self.name, report);
                    }
                    Ok(Some(JoinRequest { message: Some(message) })) => {
                        let (connection, name, generation) = (self.connection, self.name.clone(), self.generation);
                        let message = Box::new(bounded(message));
                        self.engine.send(Event::FromWorker { connection, name, generation, message }).await;
                    }
                    Ok(Some(JoinRequest { message: None })) => {}
                    Ok(None) => break "it left".to_owned(),
                    Err(status) => break broken(&status),
                },
            }
        };
        let Self { connection, name, generation, .. } = self;
        self.desk.left(connection, &name);
        self.engine.send(Event::Left { connection, name, generation, reason }).await;
    }
}

/// What a worker says, with texts and figures that a snapshot can hold.
fn bounded(message: join_request::Message) -> join_request::Message {
    use join_request::Message;
    let figure = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
    match message {
        Message::Heartbeat(beat) => Message::Heartbeat(Heartbeat {
            step_seconds_p50: figure(beat.step_seconds_p50),
            tokens_per_second: figure(beat.tokens_per_second),
            idle_ratio: figure(beat.idle_ratio).min(1.0),
            step_age_seconds: figure(beat.step_age_seconds),
            ..beat
        }),
        Message::StageFailed(failed) => Message::StageFailed(StageFailed {
            message: bounds::cut(failed.message, bounds::REASON),
            lost_peer: bounds::cut(failed.lost_peer, bounds::NAME),
            ..failed
        }),
        Message::FrameFailed(failed) => Message::FrameFailed(FrameFailed {
            message: bounds::cut(failed.message, bounds::REASON),
            worker: bounds::cut(failed.worker, bounds::NAME),
            ..failed
        }),
        Message::StageBlocked(blocked) => Message::StageBlocked(StageBlocked {
            peer: bounds::cut(blocked.peer, bounds::NAME),
            reason: bounds::cut(blocked.reason, bounds::REASON),
            ..blocked
        }),
        other => other,
    }
}

/// How a stream broke, for people: tonic's words for a dead peer speak of HTTP/2 frames.
fn broken(status: &Status) -> String {
    let said = status.message();
    if said.contains("reset") || said.contains("broken pipe") || said.contains("closed") || said.contains("h2") {
        "its connection was reset".to_owned()
    } else {
        format!("its connection broke: {said}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_says_later_is_bounded_as_its_hello_is() {
        use join_request::Message;
        let long = "é".repeat(3 << 20);
        let failed = StageFailed { message: long.clone(), lost_peer: long.clone(), ..StageFailed::default() };
        let Message::StageFailed(failed) = bounded(Message::StageFailed(failed)) else { panic!("another message") };
        assert!(failed.message.len() <= bounds::REASON && failed.lost_peer.len() <= bounds::NAME);
        let failed = FrameFailed { message: long, ..FrameFailed::default() };
        let Message::FrameFailed(failed) = bounded(Message::FrameFailed(failed)) else { panic!("another message") };
        assert!(failed.message.len() <= bounds::REASON);
        let beat = Heartbeat {
            step_seconds_p50: f64::NAN,
            tokens_per_second: f64::INFINITY,
            idle_ratio: -1.0,
            ..Heartbeat::default()
        };
        assert_eq!(bounded(Message::Heartbeat(beat)), Message::Heartbeat(Heartbeat::default()));
    }
}

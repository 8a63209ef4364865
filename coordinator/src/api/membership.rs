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
    ids::Generation,
    v1::{Hello, JoinRequest, JoinResponse, join_request, membership_service_server::MembershipService},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::wire;
use crate::{
    cluster::{JoinRefusal, messages::Order},
    diagnosis::{Desk, Member},
    engine::Event,
};

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that may wait for a worker: a few assignments.
const OUTBOX: usize = 64;

/// Serves workers.
#[derive(Clone)]
pub struct Membership {
    /// Who decides about workers: the engine, or a benchmark in its place.
    pub events: mpsc::Sender<Event>,
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
        let (name, generation, member) = (hello.name.clone(), hello.generation.into(), Member::of(&hello));
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let (reply, answer) = oneshot::channel();
        // The welcome must be the first message, so it is queued before the engine can send any other.
        let (gate, gated) = mpsc::channel(OUTBOX);
        // Nobody takes events once the coordinator ends; then the answer is missing, too.
        let _ =
            self.events.send(Event::Joined { connection, hello: Box::new(hello.into()), outbox: gate, reply }).await;
        let welcome = answer
            .await
            .map_err(|_gone| Status::unavailable("the coordinator is shutting down"))?
            .map_err(|refusal| refused(&refusal))?;
        let _ = outbox.try_send(Ok(wire::welcome(welcome)));
        self.desk.joined(connection, member, outbox.clone());
        let (events, desk) = (self.events.clone(), self.desk.clone());
        let worker = Worker { events, desk, connection, name, generation, outbox, gated };
        // Owned by the connection: ends with the worker's stream, with its outbox, or with the coordinator.
        tokio::spawn(worker.serve(messages, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

async fn hello(messages: &mut Streaming<JoinRequest>) -> Result<Hello, Status> {
    let first = timeout(HELLO_TIMEOUT, messages.message())
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
    events: mpsc::Sender<Event>,
    desk: Desk,
    connection: u64,
    name: String,
    generation: Generation,
    outbox: mpsc::Sender<Result<JoinResponse, Status>>,
    gated: mpsc::Receiver<Order>,
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
                    // A worker that does not read is given up.
                    Some(order) => if self.outbox.try_send(Ok(wire::order(order))).is_err() {
                        break "it takes no messages".to_owned();
                    },
                    None => break "it was given up".to_owned(),
                },
                message = messages.message() => match message {
                    Ok(Some(JoinRequest { message: Some(join_request::Message::ProbeReport(report)) })) => {
                        self.desk.reported(&self.name, report);
                    }
                    Ok(Some(JoinRequest { message })) => if let Some(report) = message.and_then(wire::report) {
                        let (connection, name, generation) = (self.connection, self.name.clone(), self.generation);
                        let report = Box::new(report);
                        let _ = self.events.send(Event::FromWorker { connection, name, generation, report }).await;
                    },
                    Ok(None) => break "it left".to_owned(),
                    Err(status) => break broken(&status),
                },
            }
        };
        let Self { connection, name, generation, .. } = self;
        self.desk.left(connection, &name);
        let _ = self.events.send(Event::Left { connection, name, generation, reason }).await;
    }
}

/// How a stream broke, for people: tonic describes a dead peer in terms of HTTP/2 frames.
fn broken(status: &Status) -> String {
    let said = status.message();
    if said.contains("reset") || said.contains("broken pipe") || said.contains("closed") || said.contains("h2") {
        "its connection was reset".to_owned()
    } else {
        format!("its connection broke: {said}")
    }
}

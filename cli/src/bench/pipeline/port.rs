//! The port of the benchmark itself: the workers' coordinator, and the stage that follows the last one of each arrangement.
//!
//! A stage that ends before its model does hands hidden states to the next stage. That next stage is this port, so nothing in a
//! worker knows of benchmarks. Decides nothing: what comes in becomes an [`Event`].

use std::{pin::Pin, sync::Arc, time::Duration};

use grokpipe_proto::{
    PROTOCOL_VERSIONS,
    secret::Secret,
    transport::{self, ConnectionLimits, Keepalive, Net},
    v1::{
        Frame, FrameAck, Hello, JoinRequest, JoinResponse, RunRequest, RunResponse, Welcome, join_request,
        join_response,
        membership_service_server::{MembershipService, MembershipServiceServer},
        pipeline_service_server::{PipelineService, PipelineServiceServer},
        run_response::Answer,
    },
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, service::interceptor::InterceptedService};

use crate::error::CliError;

const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// Few, so that they disturb little; a worker that dies is noticed by its stream's end.
const HEARTBEAT_INTERVAL_MS: u32 = 1500;
/// Events that may wait; whoever brings more waits.
const EVENTS: usize = 256;
/// Messages that may wait for a worker; it gets two.
const OUTBOX: usize = 4;

/// Where messages for a worker go.
pub(super) type Outbox = mpsc::Sender<Result<JoinResponse, Status>>;

/// What comes in.
pub(super) enum Event {
    /// A worker said hello and was welcomed.
    Joined {
        /// Its hello.
        hello: Box<Hello>,
        /// Where its orders go.
        outbox: Outbox,
    },
    /// It said something else.
    Said {
        /// Its name.
        worker: String,
        /// What.
        message: Box<join_request::Message>,
    },
    /// Its stream ended.
    Left {
        /// Its name.
        worker: String,
    },
    /// A last stage handed this on.
    Frame(Box<Frame>),
}

/// An open port.
pub(super) struct Port {
    /// Where it is.
    pub(super) address: String,
    /// What comes in.
    pub(super) events: mpsc::Receiver<Event>,
}

impl Port {
    /// Opens it on loopback and serves it until `stop`.
    ///
    /// # Errors
    /// When the system gives no port.
    pub(super) async fn open(
        net: &Arc<dyn Net>,
        secret: &Secret,
        generation: u64,
        max_frame_bytes: usize,
        stop: CancellationToken,
    ) -> Result<Self, CliError> {
        let refuse = |error: std::io::Error| CliError::failed("no port could be opened on 127.0.0.1").because(error);
        let listening = net.bind("127.0.0.1:0".to_owned()).await.map_err(refuse)?;
        let address = listening.address.to_string();
        let (sender, events) = mpsc::channel(EVENTS);
        let service = Service { events: sender, generation };
        let frames = PipelineServiceServer::new(service.clone()).max_decoding_message_size(max_frame_bytes);
        let serving = transport::server(Keepalive::Cluster)
            .add_service(InterceptedService::new(MembershipServiceServer::new(service), secret.require()))
            .add_service(InterceptedService::new(frames, secret.require()))
            .serve_with_incoming_shutdown(listening.connections(ConnectionLimits::default()), stop.cancelled_owned());
        // Ends with `stop`; should it fail before, its workers are lost, which is noticed.
        tokio::spawn(serving);
        Ok(Self { address, events })
    }
}

#[derive(Clone)]
struct Service {
    events: mpsc::Sender<Event>,
    generation: u64,
}

#[tonic::async_trait]
impl MembershipService for Service {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<JoinResponse, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut messages = request.into_inner();
        let first = timeout(HELLO_WITHIN, messages.message())
            .await
            .map_err(|_late| Status::deadline_exceeded("expected a hello within 5 s, found nothing"))??;
        let Some(join_request::Message::Hello(hello)) = first.and_then(|request| request.message) else {
            return Err(Status::invalid_argument("expected a hello as the first message, found another one"));
        };
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let welcome = Welcome {
            version: *PROTOCOL_VERSIONS.end(),
            cluster: "bench".to_owned(),
            coordinator_generation: self.generation,
            heartbeat_interval_ms: HEARTBEAT_INTERVAL_MS,
        };
        let welcome = JoinResponse { message: Some(join_response::Message::Welcome(welcome)) };
        let _ = outbox.try_send(Ok(welcome));
        let (events, worker) = (self.events.clone(), hello.name.clone());
        // Owned by the connection: ends with the worker's stream, or when nobody takes events any more.
        tokio::spawn(async move {
            let mut heard = events.send(Event::Joined { hello: Box::new(hello), outbox }).await.is_ok();
            while heard && let Ok(Some(JoinRequest { message })) = messages.message().await {
                if let Some(message) = message {
                    heard =
                        events.send(Event::Said { worker: worker.clone(), message: Box::new(message) }).await.is_ok();
                }
            }
            let _ = events.send(Event::Left { worker }).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

#[tonic::async_trait]
impl PipelineService for Service {
    type RunStream = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;

    async fn run(&self, request: Request<Streaming<RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let mut frames = request.into_inner();
        let (answers, outgoing) = mpsc::channel(EVENTS);
        let events = self.events.clone();
        // Owned by the connection: ends with the last stage's stream, or when nobody takes events any more.
        tokio::spawn(async move {
            while let Ok(Some(RunRequest { frame: Some(frame) })) = frames.message().await {
                let ack = FrameAck { micro_batch_id: frame.micro_batch_id, queue_us: 0, compute_us: 0 };
                if events.send(Event::Frame(Box::new(frame))).await.is_err() {
                    return;
                }
                // A stage that reads no answers gets no credit and stops by itself.
                let _ = answers.try_send(Ok(RunResponse { answer: Some(Answer::Ack(ack)) }));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

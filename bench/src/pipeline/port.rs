//! The benchmark's port: the coordinator's own membership service, and the stage that follows the last one of each arrangement.
//!
//! A stage that ends before its model does hands hidden states to the next stage. That next stage is this port, so nothing in a
//! worker knows of benchmarks. Decides nothing: what comes in is passed on.

use std::{
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
};

use grokpipe_coordinator::{api::membership::Membership, diagnosis::Desk, engine::Event};
use grokpipe_proto::{
    bounds,
    secret::Secret,
    transport::{self, ConnectionLimits, Keepalive, Net},
    v1::{
        Frame, FrameAck, RunRequest, RunResponse,
        membership_service_server::MembershipServiceServer,
        pipeline_service_server::{PipelineService, PipelineServiceServer},
        run_response::Answer,
    },
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, service::interceptor::InterceptedService};

use crate::BenchError;

/// Events, and frames, that may wait; whoever brings more waits.
const WAITING_MAX: usize = 256;

/// An open port.
pub(super) struct Port {
    /// Where it is.
    pub(super) address: String,
    /// What workers say, as the coordinator's engine would hear it.
    pub(super) events: mpsc::Receiver<Event>,
    /// What last stages hand on.
    pub(super) frames: mpsc::Receiver<Frame>,
}

impl Port {
    /// Opens it on loopback and serves it until `stop`.
    ///
    /// # Errors
    /// When the system gives no port.
    pub(super) async fn open(
        net: &Arc<dyn Net>,
        secret: &Secret,
        max_frame_bytes: usize,
        stop: CancellationToken,
    ) -> Result<Self, BenchError> {
        let listening = net.bind("127.0.0.1:0".to_owned()).await.map_err(BenchError::Listen)?;
        let address = listening.address.to_string();
        let (to_events, events) = mpsc::channel(WAITING_MAX);
        let (to_frames, frames) = mpsc::channel(WAITING_MAX);
        let membership = Membership {
            events: to_events,
            desk: Desk::default(),
            shutdown: stop.clone(),
            connections: Arc::new(AtomicU64::new(0)),
        };
        let membership =
            MembershipServiceServer::new(membership).max_decoding_message_size(bounds::MEMBERSHIP_MESSAGE_BYTES_MAX);
        let next_stage = PipelineServiceServer::new(NextStage(to_frames)).max_decoding_message_size(max_frame_bytes);
        let serving = transport::server(Keepalive::Cluster)
            .add_service(InterceptedService::new(membership, secret.require()))
            .add_service(InterceptedService::new(next_stage, secret.require()))
            .serve_with_incoming_shutdown(listening.connections(ConnectionLimits::default()), stop.cancelled_owned());
        // Ends with `stop`; should it fail before, its workers are lost, which is noticed.
        tokio::spawn(serving);
        Ok(Self { address, events, frames })
    }
}

/// The stage after the last one.
#[derive(Clone)]
struct NextStage(mpsc::Sender<Frame>);

#[tonic::async_trait]
impl PipelineService for NextStage {
    type RunStream = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;

    async fn run(&self, request: Request<Streaming<RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let mut incoming = request.into_inner();
        let (answers, outgoing) = mpsc::channel(WAITING_MAX);
        let frames = self.0.clone();
        // Owned by the connection: ends with the last stage's stream, or when nobody takes frames any more.
        tokio::spawn(async move {
            while let Ok(Some(RunRequest { frame: Some(frame) })) = incoming.message().await {
                let ack = FrameAck { micro_batch_id: frame.micro_batch_id, queue_us: 0, compute_us: 0 };
                if frames.send(frame).await.is_err() {
                    return;
                }
                // A stage that reads no answers gets no credit and stops by itself.
                let _ = answers.try_send(Ok(RunResponse { answer: Some(Answer::Ack(ack)) }));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

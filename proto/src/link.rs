//! One link of the pipeline: frames go to the next stage, acknowledgements and refusals come back.
//!
//! The coordinator's link to the first stage and every stage's link to the next are this same code. A link lives as long as one
//! plan epoch. It keeps each frame until it is answered, so that a frame damaged on the way can be sent again; it does not
//! decide what happens when the link breaks.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, warn};

use crate::{
    LOST_AFTER,
    ids::MicroBatchId,
    link_token::LinkToken,
    secret::Secret,
    transport::{self, ConnectError, Keepalive, Net},
    v1::{
        Frame, FrameAck, FrameRefusal, RefusalReason, RunRequest, RunResponse,
        pipeline_service_client::PipelineServiceClient, run_response::Answer,
    },
};

/// Times that a frame with a bad checksum is sent again: one bit flips now and then, three in a row are a broken link.
const RESENDS_MAX: u32 = 2;

/// Settings of a link.
#[derive(Clone)]
pub struct LinkSettings {
    /// Next stage's data address.
    pub address: String,
    /// Next stage's worker, for messages.
    pub worker: String,
    /// The cluster's secret.
    pub secret: Secret,
    /// What this link presents to the next stage.
    pub token: LinkToken,
    /// Largest frame, see [`crate::max_frame_bytes`].
    pub max_frame_bytes: usize,
    /// Most unanswered frames.
    pub max_in_flight: usize,
}

/// What a link reports to its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The next stage will not compute this frame; the link goes on. A frame of an ended epoch is not among them.
    FrameFailed {
        /// The micro-batch.
        micro_batch_id: MicroBatchId,
        /// The worker that refused.
        worker: String,
        /// Who refused, and why.
        message: String,
    },
    /// The link is gone.
    Lost {
        /// How that was noticed.
        reason: String,
    },
}

/// Why a link could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection.
    #[error("cannot reach {worker} at {source}")]
    Connect {
        /// The worker at the other end.
        worker: String,
        /// What went wrong.
        source: ConnectError,
    },
    /// A connection, but no answer in time.
    #[error("cannot reach {worker} at {address}: it takes connections but gave no answer within {} s", LOST_AFTER.as_secs())]
    Silent {
        /// The worker at the other end.
        worker: String,
        /// Its address.
        address: String,
    },
    /// The next stage refused the link.
    #[error("cannot reach {worker} at {address}: refused with {:?}, {}", status.code(), status.message())]
    Refused {
        /// The worker at the other end.
        worker: String,
        /// Its address.
        address: String,
        /// What it said.
        status: Box<Status>,
    },
}

/// The sending end. Dropping it ends the link.
#[derive(Debug)]
pub struct Link {
    frames: mpsc::Sender<Frame>,
    wire_us: Arc<AtomicU64>,
}

/// The link has ended; its [`LinkEvent::Lost`] says why.
#[derive(Debug, thiserror::Error)]
#[error("the link to the next stage has ended")]
pub struct LinkClosed;

impl Link {
    /// Opens a link and starts the task that serves it until `stop` or until the link breaks.
    ///
    /// # Errors
    /// [`LinkError`]; trying again may help.
    pub async fn open(
        net: &Arc<dyn Net>,
        settings: LinkSettings,
        events: mpsc::Sender<LinkEvent>,
        stop: CancellationToken,
    ) -> Result<Self, LinkError> {
        let (worker, address) = (settings.worker.clone(), settings.address.clone());
        let channel = transport::connect(net, &settings.address, Keepalive::Cluster)
            .await
            .map_err(|source| LinkError::Connect { worker: worker.clone(), source })?;
        let mut client = PipelineServiceClient::with_interceptor(channel, settings.secret.attach())
            .max_encoding_message_size(settings.max_frame_bytes);
        let (wire_tx, wire_rx) = mpsc::channel(settings.max_in_flight);
        let frames = settings.token.present(ReceiverStream::new(wire_rx));
        let answers = match timeout(LOST_AFTER, client.run(frames)).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return Err(LinkError::Refused { worker, address, status: Box::new(status) }),
            Err(_late) => return Err(LinkError::Silent { worker, address }),
        };
        let (frames, frames_rx) = mpsc::channel(settings.max_in_flight);
        let wire_us = Arc::new(AtomicU64::new(0));
        let task = LinkTask {
            worker: settings.worker,
            unanswered: HashMap::new(),
            left: None,
            max_in_flight: settings.max_in_flight,
            wire: wire_tx,
            wire_us: Arc::clone(&wire_us),
            events,
        };
        tokio::spawn(task.serve(frames_rx, answers, stop));
        Ok(Self { frames, wire_us })
    }

    /// Sends a frame; waits while the next stage owes answers to all earlier ones.
    ///
    /// # Errors
    /// [`LinkClosed`].
    pub async fn send(&self, frame: Frame) -> Result<(), LinkClosed> {
        self.frames.send(frame).await.map_err(|_closed| LinkClosed)
    }

    /// Round trip of the last answered frame, less the time that the next stage spent on it, in microseconds; 0 before the first.
    pub fn wire_us(&self) -> u64 {
        self.wire_us.load(Ordering::Relaxed)
    }
}

struct Unanswered {
    frame: Frame,
    sent: Instant,
    resends: u32,
}

struct LinkTask {
    worker: String,
    unanswered: HashMap<MicroBatchId, Unanswered>,
    /// When the next stage first said that it has left this epoch.
    left: Option<Instant>,
    max_in_flight: usize,
    wire: mpsc::Sender<RunRequest>,
    wire_us: Arc<AtomicU64>,
    events: mpsc::Sender<LinkEvent>,
}

impl LinkTask {
    async fn serve(
        mut self,
        mut frames: mpsc::Receiver<Frame>,
        mut answers: Streaming<RunResponse>,
        stop: CancellationToken,
    ) {
        loop {
            let has_credit = self.unanswered.len() < self.max_in_flight;
            let explained_by = self.left.map_or_else(Instant::now, |left| left + LOST_AFTER);
            let lost = tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(explained_by), if self.left.is_some() => {
                    Some("it has left this plan epoch and did not say why".to_owned())
                }
                frame = frames.recv(), if has_credit => match frame {
                    None => return,
                    Some(frame) => self.transmit(frame, 0).await,
                },
                answer = answers.message() => match answer {
                    Ok(Some(RunResponse { answer: Some(answer) })) => self.answered(answer).await,
                    Ok(Some(RunResponse { answer: None })) => Some("an answer without content".to_owned()),
                    Ok(None) => Some("the stream was closed".to_owned()),
                    Err(status) => Some(status.message().to_owned()),
                },
            };
            if let Some(reason) = lost {
                let reason = format!("the link to {} broke: {reason}", self.worker);
                // The owner may have ended already; then the event is of no use.
                let _ = self.events.send(LinkEvent::Lost { reason }).await;
                return;
            }
        }
    }

    /// Sends a frame; `Some` says how the link was lost.
    async fn transmit(&mut self, frame: Frame, resends: u32) -> Option<String> {
        let kept = Unanswered { frame: frame.clone(), sent: Instant::now(), resends };
        self.unanswered.insert(frame.micro_batch_id.into(), kept);
        let sent = self.wire.send(RunRequest { frame: Some(frame) }).await;
        sent.is_err().then(|| "the stream was closed".to_owned())
    }

    async fn answered(&mut self, answer: Answer) -> Option<String> {
        match answer {
            Answer::Ack(ack) => {
                self.acknowledged(ack);
                None
            }
            Answer::Refusal(refusal) => self.refused(refusal).await,
        }
    }

    fn acknowledged(&mut self, ack: FrameAck) {
        let Some(kept) = self.unanswered.remove(&ack.micro_batch_id.into()) else {
            debug!(micro_batch = ack.micro_batch_id, worker = self.worker, "acknowledgement of an unknown frame");
            return;
        };
        let round_trip = kept.sent.elapsed().as_micros() as u64;
        let remote = ack.queue_us.saturating_add(ack.compute_us);
        self.wire_us.store(round_trip.saturating_sub(remote), Ordering::Relaxed);
    }

    async fn refused(&mut self, refusal: FrameRefusal) -> Option<String> {
        let kept = self.unanswered.remove(&refusal.micro_batch_id.into())?;
        let reason = RefusalReason::try_from(refusal.reason).unwrap_or(RefusalReason::Unspecified);
        if reason == RefusalReason::Checksum && kept.resends < RESENDS_MAX {
            warn!(micro_batch = refusal.micro_batch_id, worker = self.worker, "frame damaged on the way, sent again");
            return self.transmit(kept.frame, kept.resends + 1).await;
        }
        if reason == RefusalReason::StaleEpoch {
            // The next stage has left this epoch and reports the reason to the coordinator. That ends the epoch and names the worker at
            // fault, which a failed frame would not. Without such a report, the link itself is at fault.
            warn!(
                micro_batch = refusal.micro_batch_id,
                worker = self.worker,
                refusal.message,
                "frame of an ended epoch"
            );
            self.left.get_or_insert_with(Instant::now);
            return None;
        }
        let message = format!("worker {} refused a frame: {}", self.worker, refusal.message);
        let worker = self.worker.clone();
        let event = LinkEvent::FrameFailed { micro_batch_id: refusal.micro_batch_id.into(), worker, message };
        self.events.send(event).await.is_err().then(|| "nobody listens to this link".to_owned())
    }
}

//! The coordinator's link to the first stage, for one plan epoch: micro-batches go in as frames, what becomes of them comes out.
//!
//! Tasks of an epoch own the link and end with it, so that the engine never waits for a stage. Knows nothing of plans or requests.

use std::sync::Arc;

use grokpipe_proto::{
    ids::{Generation, MicroBatchId, PlanEpoch},
    link::{Link, LinkEvent, LinkSettings},
    link_token::LinkToken,
    secret::Secret,
    transport::Net,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{frames::frame_of, request::Sampling, scheduler::MicroBatch};

/// What every link of a coordinator uses.
#[derive(Clone)]
pub struct PipelineSettings {
    /// The cluster's secret.
    pub secret: Secret,
    /// Largest frame in bytes.
    pub max_frame_bytes: usize,
    /// Most unanswered frames.
    pub max_frames_in_flight: usize,
    /// Generation of the coordinator.
    pub generation: Generation,
}

/// The first stage of an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct FirstStage {
    /// The plan epoch.
    pub epoch: PlanEpoch,
    /// Where it is.
    pub address: String,
    /// Its worker, for messages.
    pub worker: String,
    /// What it knows the link by.
    pub token: LinkToken,
}

/// What a link reports.
#[derive(Debug)]
pub enum PipelineEvent {
    /// It stands, or why it does not.
    Opened(Result<Frames, String>),
    /// A micro-batch was refused for good; the link goes on.
    Refused {
        /// Which one.
        micro_batch_id: MicroBatchId,
        /// Who refused.
        worker: String,
        /// Why.
        message: String,
    },
    /// The link broke.
    Lost {
        /// How.
        reason: String,
    },
}

/// What the link of an epoch reports.
#[derive(Debug)]
pub struct Told {
    /// The plan epoch.
    pub epoch: PlanEpoch,
    /// What.
    pub event: PipelineEvent,
}

/// A micro-batch on its way, and how the sequence of each slice draws its tokens.
pub type Outgoing = (MicroBatch, Vec<Option<Sampling>>);

/// The way into the pipeline.
#[derive(Debug)]
pub struct Frames(mpsc::Sender<Outgoing>);

/// The link takes no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Frames {
    /// A way in with room for `frames` micro-batches, and its other end.
    pub fn with_room(frames: usize) -> (Self, mpsc::Receiver<Outgoing>) {
        let (sender, receiver) = mpsc::channel(frames);
        (Self(sender), receiver)
    }

    /// Sends a micro-batch. `sampling` says how the sequence of each slice draws its tokens; only the slice that opens it needs that.
    ///
    /// # Errors
    /// [`Full`], when the link is gone or the most frames allowed are unanswered.
    pub fn send(&self, batch: MicroBatch, sampling: Vec<Option<Sampling>>) -> Result<(), Full> {
        self.0.try_send((batch, sampling)).map_err(|_full| Full)
    }
}

/// Opens the link and reports to `events` until `stop`.
pub fn open<E: From<Told> + Send + 'static>(
    net: Arc<dyn Net>,
    settings: PipelineSettings,
    stage: FirstStage,
    events: mpsc::Sender<E>,
    stop: CancellationToken,
) {
    tokio::spawn(async move {
        let epoch = stage.epoch;
        let link_settings = LinkSettings {
            address: stage.address,
            worker: stage.worker,
            secret: settings.secret.clone(),
            token: stage.token,
            max_frame_bytes: settings.max_frame_bytes,
            max_in_flight: settings.max_frames_in_flight,
        };
        let (link_events, mut said) = mpsc::channel(64);
        let opened = Link::open(&net, link_settings, link_events, stop.clone()).await;
        let opened = opened.map_err(|error| error.to_string()).map(|link| {
            let (frames, queue) = Frames::with_room(settings.max_frames_in_flight);
            tokio::spawn(pass_on(link, queue, epoch, settings.generation, stop.clone()));
            frames
        });
        let tell = async |event| {
            // A gone engine means that the coordinator ends.
            let _ = events.send(Told { epoch, event }.into()).await;
        };
        tell(PipelineEvent::Opened(opened)).await;
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = said.recv() => event,
            };
            let Some(event) = event else { return };
            let event = match event {
                LinkEvent::FrameFailed { micro_batch_id, worker, message } => {
                    PipelineEvent::Refused { micro_batch_id, worker, message }
                }
                LinkEvent::Lost { reason } => PipelineEvent::Lost { reason },
            };
            tell(event).await;
        }
    });
}

async fn pass_on(
    link: Link,
    mut queue: mpsc::Receiver<Outgoing>,
    epoch: PlanEpoch,
    generation: Generation,
    stop: CancellationToken,
) {
    loop {
        let next = tokio::select! {
            () = stop.cancelled() => return,
            next = queue.recv() => next,
        };
        let Some((batch, sampling)) = next else { return };
        if link.send(frame_of(epoch, generation, &batch, &sampling)).await.is_err() {
            return;
        }
    }
}

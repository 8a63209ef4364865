//! The worker's port: frames come in from the previous stage, answers go back.
//!
//! Only the previous stage may send, by the token that came with the assignment. Knows nothing of epochs beyond that and whether a
//! stage is at work; the runner checks every frame.

use std::{
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::Stream;
use grokpipe_proto::{
    link_token::{self, LinkToken},
    v1::{
        Frame, FrameRefusal, RefusalReason, RunRequest, RunResponse, pipeline_service_server::PipelineService,
        run_response::Answer,
    },
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};
use tracing::debug;

use crate::runner::Job;

/// A link whose token is not known by then is a stranger's.
const ASSIGNED_WITHIN: Duration = Duration::from_secs(1);
/// Pause between two looks at the newest assignment.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// An epoch, and where its frames go.
type EpochQueue = (u64, mpsc::Sender<Job>);

/// The stage at work, if there is one, and who may send it frames.
#[derive(Clone, Debug, Default)]
pub struct ActiveStage(Arc<RwLock<State>>);

#[derive(Debug, Default)]
struct State {
    /// The epoch of the newest assignment, and what its previous stage presents.
    expected: Option<(u64, LinkToken)>,
    queue: Option<EpochQueue>,
}

impl ActiveStage {
    /// Links of `epoch` are those that present this token.
    pub fn expect(&self, epoch: u64, token: LinkToken) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).expected = Some((epoch, token));
    }

    /// Frames of `epoch` go here from now on.
    pub fn set(&self, epoch: u64, queue: mpsc::Sender<Job>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).queue = Some((epoch, queue));
    }

    /// No link and no frame is taken from now on.
    pub fn clear(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = State::default();
    }

    fn queue(&self) -> Option<EpochQueue> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).queue.clone()
    }

    /// As [`ActiveStage::epoch_of`]; the assignment may come a moment after the previous stage's, which dials at once.
    async fn link_epoch(&self, metadata: &MetadataMap) -> Option<u64> {
        for _ in 0..ASSIGNED_WITHIN.as_millis() / LOOK_AGAIN.as_millis() {
            match self.epoch_of(metadata) {
                None => tokio::time::sleep(LOOK_AGAIN).await,
                found => return found,
            }
        }
        self.epoch_of(metadata)
    }

    /// The epoch of a link that presents the right token.
    fn epoch_of(&self, metadata: &MetadataMap) -> Option<u64> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        state.expected.as_ref().filter(|(_, token)| token.is_presented(metadata)).map(|(epoch, _)| *epoch)
    }
}

/// [`PipelineService`] of one worker.
#[derive(Clone)]
pub struct Pipeline {
    /// Name of this worker.
    pub worker: String,
    /// The stage at work.
    pub active: ActiveStage,
    /// Most unanswered frames a connection may have.
    pub max_answers: usize,
    /// The worker ends.
    pub shutdown: CancellationToken,
}

impl Pipeline {
    fn refusal(&self, frame: &Frame, reason: RefusalReason, message: String) -> RunResponse {
        let refusal = FrameRefusal {
            micro_batch_id: frame.micro_batch_id,
            reason: reason as i32,
            message,
            worker: self.worker.clone(),
        };
        RunResponse { answer: Some(Answer::Refusal(refusal)) }
    }

    /// Queues a frame of a link of epoch `link_epoch`, or says why not.
    fn take(
        &self,
        link_epoch: u64,
        frame: Frame,
        answers: &mpsc::Sender<Result<RunResponse, Status>>,
    ) -> Option<RunResponse> {
        if frame.plan_epoch != link_epoch {
            let message = format!("expected a frame of plan epoch {link_epoch}, found {}", frame.plan_epoch);
            return Some(self.refusal(&frame, RefusalReason::StaleEpoch, message));
        }
        let Some((epoch, queue)) = self.active.queue() else {
            let message = format!("expected no frame before a stage is ready, found one of epoch {}", frame.plan_epoch);
            return Some(self.refusal(&frame, RefusalReason::StaleEpoch, message));
        };
        if frame.plan_epoch != epoch {
            let message = format!("expected a frame of plan epoch {epoch}, found {}", frame.plan_epoch);
            return Some(self.refusal(&frame, RefusalReason::StaleEpoch, message));
        }
        match queue.try_send(Job { frame, received: Instant::now(), answers: answers.clone() }) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Full(job)) => {
                let message = format!("expected at most {} waiting frames", queue.max_capacity());
                Some(self.refusal(&job.frame, RefusalReason::Overloaded, message))
            }
            Err(mpsc::error::TrySendError::Closed(job)) => {
                let message = format!("plan epoch {epoch} has ended");
                Some(self.refusal(&job.frame, RefusalReason::StaleEpoch, message))
            }
        }
    }
}

#[tonic::async_trait]
impl PipelineService for Pipeline {
    type RunStream = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;

    async fn run(&self, request: Request<Streaming<RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let link_epoch = self.active.link_epoch(request.metadata()).await.ok_or_else(link_token::refused)?;
        let mut frames = request.into_inner();
        let (answers, outgoing) = mpsc::channel(self.max_answers);
        let pipeline = self.clone();
        // Owned by the connection: ends with its stream, or with the worker.
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    () = pipeline.shutdown.cancelled() => {
                        let _ = answers.try_send(Err(Status::unavailable("the worker is shutting down")));
                        return;
                    }
                    () = answers.closed() => return,
                    message = frames.message() => message,
                };
                let frame = match message {
                    Ok(Some(RunRequest { frame: Some(frame) })) => frame,
                    Ok(Some(RunRequest { frame: None })) => {
                        let _ =
                            answers.try_send(Err(Status::invalid_argument("expected a frame, found an empty request")));
                        return;
                    }
                    Ok(None) => return,
                    Err(status) => {
                        debug!(%status, "the previous stage's stream broke");
                        let _ = answers.try_send(Err(status));
                        return;
                    }
                };
                if let Some(refusal) = pipeline.take(link_epoch, frame, &answers)
                    && answers.send(Ok(refusal)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

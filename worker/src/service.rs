//! The worker's port: frames come in from the previous stage, answers go back.
//!
//! Knows nothing of epochs beyond whether a stage is at work; the runner checks every frame.

use std::{
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
};

use futures_util::Stream;
use grokpipe_proto::v1::{
    Frame, FrameRefusal, RefusalReason, RunRequest, RunResponse, pipeline_service_server::PipelineService,
    run_response::Answer,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use crate::runner::Job;

/// An epoch, and where its frames go.
type EpochQueue = (u64, mpsc::Sender<Job>);

/// The stage at work, if there is one.
#[derive(Clone, Debug, Default)]
pub struct ActiveStage(Arc<RwLock<Option<EpochQueue>>>);

impl ActiveStage {
    /// Frames of `epoch` go here from now on.
    pub fn set(&self, epoch: u64, queue: mpsc::Sender<Job>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some((epoch, queue));
    }

    /// No frame is taken from now on.
    pub fn clear(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn queue(&self) -> Option<EpochQueue> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// Queues a frame, or says why not.
    fn take(&self, frame: Frame, answers: &mpsc::Sender<Result<RunResponse, Status>>) -> Option<RunResponse> {
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
                if let Some(refusal) = pipeline.take(frame, &answers)
                    && answers.send(Ok(refusal)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

//! ClusterService: the snapshot and the plan, for operators.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt, stream};
use grokpipe_proto::{
    snapshot::ClusterSnapshot,
    v1::{
        DiagnoseRequest, DiagnoseResponse, DrainRequest, DrainResponse, GetPlanRequest, GetPlanResponse,
        GetStatusRequest, GetStatusResponse, PlannedStage, ReplanRequest, ReplanResponse, WatchStatusRequest,
        WatchStatusResponse, cluster_service_server::ClusterService,
    },
};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Code, Request, Response, Status};

use crate::{
    deadline::Deadline,
    diagnosis::Diagnosis,
    engine::{Handle, PlanView},
    planner::Refusal,
    request::RequestError,
};

/// Serves operators.
#[derive(Clone)]
pub struct ClusterApi {
    /// The engine.
    pub engine: Handle,
    /// Examines machines and links.
    pub diagnosis: Diagnosis,
}

/// No plan: for lack of memory, or for another reason.
fn refused(refusal: &Refusal) -> Status {
    let code = if refusal.is_out_of_memory() { Code::ResourceExhausted } else { Code::FailedPrecondition };
    Status::new(code, refusal.to_string())
}

impl From<PlanView> for GetPlanResponse {
    fn from(view: PlanView) -> Self {
        let stages = view.plan.stages.iter().zip(view.workers).map(|(stage, (worker, _memory))| PlannedStage {
            worker: worker.to_string(),
            layer_start: stage.layers.start(),
            layer_end: stage.layers.end(),
            weights_bytes: stage.weight_bytes,
            kv_bytes: stage.kv_bytes,
            scratch_bytes: stage.scratch_bytes,
            memory_bytes: stage.memory_bytes,
            step_seconds: stage.step_seconds,
        });
        Self {
            stages: stages.collect(),
            plan_epoch: view.epoch.into(),
            predicted_tokens_per_second: view.plan.predicted_tokens_per_second,
            predicted_stream_tokens_per_second: view.plan.predicted_stream_tokens_per_second,
            standby: view.standby.iter().map(ToString::to_string).collect(),
        }
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    type WatchStatusStream = Pin<Box<dyn Stream<Item = Result<WatchStatusResponse, Status>> + Send>>;

    async fn get_status(&self, _request: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let snapshot = ClusterSnapshot::clone(&self.engine.snapshot().borrow());
        Ok(Response::new(GetStatusResponse { snapshot: Some(snapshot) }))
    }

    async fn watch_status(
        &self,
        request: Request<WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let changes = WatchStream::new(self.engine.snapshot());
        let changes =
            changes.map(|snapshot| Ok(WatchStatusResponse { snapshot: Some(Arc::unwrap_or_clone(snapshot)) }));
        let Some(deadline) = request.extensions().get::<Deadline>().copied() else {
            return Ok(Response::new(Box::pin(changes)));
        };
        let late = stream::once(async move { Err(Status::from(RequestError::CallDeadline { limit: deadline.limit })) });
        let changes = changes.take_until(tokio::time::sleep_until(deadline.until)).chain(late);
        Ok(Response::new(Box::pin(changes)))
    }

    async fn get_plan(&self, _request: Request<GetPlanRequest>) -> Result<Response<GetPlanResponse>, Status> {
        let view = self.engine.plan().await?.map_err(|refusal| refused(&refusal))?;
        Ok(Response::new(view.into()))
    }

    async fn drain(&self, _request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(RequestError::NotBuilt("Drain").into())
    }

    async fn replan(&self, _request: Request<ReplanRequest>) -> Result<Response<ReplanResponse>, Status> {
        Err(RequestError::NotBuilt("Replan").into())
    }

    type DiagnoseStream = Pin<Box<dyn Stream<Item = Result<DiagnoseResponse, Status>> + Send>>;

    async fn diagnose(&self, request: Request<DiagnoseRequest>) -> Result<Response<Self::DiagnoseStream>, Status> {
        let findings = self.diagnosis.start(request.into_inner().gentle)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(findings))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_has_a_status_of_its_own() {
        let missing =
            Refusal::DoesNotFit { missing_bytes: 7, holes: Vec::new(), needed_bytes: 9, memory_bytes: 2, workers: 1 };
        let status = refused(&missing);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("7 B are missing"), "{status}");
        assert_eq!(refused(&Refusal::NoWorkers { layers: 64 }).code(), Code::FailedPrecondition);
    }
}

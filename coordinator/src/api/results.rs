//! ResultService: what the last stage made of the micro-batches.
//!
//! Only the last stage of the plan in force may deliver, by the token that came with its assignment.

use std::pin::Pin;

use futures_util::Stream;
use grokpipe_proto::{
    link_token::{self, LinkKey},
    v1::{DeliverRequest, DeliverResponse, result_service_server::ResultService},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use super::wire;
use crate::engine::{Event, Handle};

/// Takes results.
#[derive(Clone)]
pub struct Results {
    /// The engine.
    pub engine: Handle,
    /// Tells the last stage of an epoch from others.
    pub link_key: LinkKey,
    /// The coordinator ends.
    pub shutdown: CancellationToken,
}

#[tonic::async_trait]
impl ResultService for Results {
    type DeliverStream = Pin<Box<dyn Stream<Item = Result<DeliverResponse, Status>> + Send>>;

    async fn deliver(
        &self,
        request: Request<Streaming<DeliverRequest>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let plan_epoch = self.engine.snapshot().borrow().plan.as_ref().map(|plan| plan.epoch);
        let is_last_stage = |epoch: &u64| self.link_key.results((*epoch).into()).is_presented(request.metadata());
        let Some(plan_epoch) = plan_epoch.filter(is_last_stage) else { return Err(link_token::refused()) };
        let mut results = request.into_inner();
        let (answers, outgoing) = mpsc::channel(1);
        let (engine, shutdown) = (self.engine.clone(), self.shutdown.clone());
        // Owned by the connection: ends with the last stage's stream or with the coordinator.
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = answers.closed() => return,
                    message = results.message() => message,
                };
                let Ok(Some(DeliverRequest { result: Some(result) })) = message else { return };
                if result.plan_epoch != plan_epoch {
                    warn!(plan_epoch, found = result.plan_epoch, "a result of another plan epoch is ignored");
                    continue;
                }
                engine.send(Event::Result(Box::new(wire::result(result)))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

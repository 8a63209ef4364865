//! ResultService: what the last stage made of the micro-batches.

use std::pin::Pin;

use futures_util::Stream;
use grokpipe_proto::v1::{DeliverRequest, DeliverResponse, result_service_server::ResultService};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::engine::{Event, Handle};

/// Takes results.
#[derive(Clone)]
pub struct Results {
    /// The engine.
    pub engine: Handle,
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
                engine.send(Event::Result(Box::new(result))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

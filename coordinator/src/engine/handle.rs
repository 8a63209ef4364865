//! The way into the engine: the events it reacts to, and the handle that sends them.

use std::sync::Arc;

use grokpipe_proto::{
    ids::{Generation, PlanEpoch, WorkerName},
    snapshot::ClusterSnapshot,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::outlet::ClientStream;
use crate::{
    cluster::{
        JoinRefusal,
        messages::{BatchResult, Hello, Order, Report, Welcome},
    },
    pipeline::Told,
    planner::{Plan, Refusal},
    request::{Request, RequestError},
};

/// Something that the engine reacts to.
pub enum Event {
    /// A worker said hello.
    Joined {
        /// Number of its stream: one process may come back on a new stream while the old one is not yet known to be dead.
        connection: u64,
        /// Its hello.
        hello: Box<Hello>,
        /// Where orders for it go.
        outbox: mpsc::Sender<Order>,
        /// Welcome or refusal.
        reply: oneshot::Sender<Result<Welcome, JoinRefusal>>,
    },
    /// A worker's stream was refused before its hello.
    Refused {
        /// Where it came from.
        from: String,
        /// Why it was refused.
        reason: String,
    },
    /// A worker sent a report.
    FromWorker {
        /// Its stream.
        connection: u64,
        /// Its name.
        name: String,
        /// Its generation.
        generation: Generation,
        /// The report.
        report: Box<Report>,
    },
    /// A worker's stream ended.
    Left {
        /// Its stream.
        connection: u64,
        /// Its name.
        name: String,
        /// Its generation.
        generation: Generation,
        /// How it ended.
        reason: String,
    },
    /// The last stage finished a micro-batch.
    Result(Box<BatchResult>),
    /// The link to the first stage reported something.
    Pipeline(Told),
    /// A client's request.
    Submit {
        /// The request.
        request: Box<Request>,
        /// Its stream, or why it was refused.
        reply: oneshot::Sender<Result<ClientStream, RequestError>>,
    },
    /// An operator asks for the plan.
    Plan {
        /// The plan with its workers in order, memory of each, epoch and spare workers, or why there is none.
        reply: oneshot::Sender<Result<PlanView, Refusal>>,
    },
}

impl From<Told> for Event {
    fn from(told: Told) -> Self {
        Self::Pipeline(told)
    }
}

/// A plan with the names of its workers.
#[derive(Clone, Debug)]
pub struct PlanView {
    /// The plan.
    pub plan: Plan,
    /// Workers in stage order, with the memory they offer.
    pub workers: Vec<(WorkerName, u64)>,
    /// Workers without layers.
    pub standby: Vec<WorkerName>,
    /// Epoch in force; 0 when the plan is only proposed.
    pub epoch: PlanEpoch,
}

/// A way to reach the engine. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    pub(super) events: mpsc::Sender<Event>,
    pub(super) snapshot: watch::Receiver<Arc<ClusterSnapshot>>,
}

impl Handle {
    /// Sends an event; waits while the queue is full.
    pub async fn send(&self, event: Event) {
        // Without an engine the coordinator ends; a caller that waits for a reply sees its sender dropped.
        let _ = self.events.send(event).await;
    }

    /// The queue of events, for a part that needs nothing else.
    pub fn events(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    /// Sends an event, unless the queue is full.
    pub fn try_send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Submits a request.
    ///
    /// # Errors
    /// [`RequestError`] when it is refused.
    pub async fn submit(&self, request: Request) -> Result<ClientStream, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Submit { request: Box::new(request), reply }).await;
        answer.await.unwrap_or(Err(RequestError::ShuttingDown))
    }

    /// Asks for the plan.
    ///
    /// # Errors
    /// [`RequestError::ShuttingDown`]; the inner error says why there is no plan.
    pub async fn plan(&self) -> Result<Result<PlanView, Refusal>, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Plan { reply }).await;
        answer.await.map_err(|_gone| RequestError::ShuttingDown)
    }

    /// The cluster as it was at the last change or tick.
    pub fn snapshot(&self) -> watch::Receiver<Arc<ClusterSnapshot>> {
        self.snapshot.clone()
    }
}

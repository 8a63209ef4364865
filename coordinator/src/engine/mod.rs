//! The one task that owns the cluster's state, the scheduler and the requests, and connects them.
//!
//! Events come in through one bounded queue: from workers, from the pipeline, from clients, from the clock. The engine hands each
//! to the pure part that decides, and carries out what that part says. It computes nothing itself and never waits on a peer:
//! whatever may take time is a task that sends an event when it is done.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use grokpipe_model::tokenizer::Tokenizer;
use grokpipe_proto::snapshot::{ClusterSnapshot, SnapshotRequests};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::{
    cluster::{
        Cluster, Command, JoinRefusal,
        messages::{BatchResult, Hello, Order, Report, Welcome},
    },
    engine::outlet::Outlet,
    pipeline::{FirstStage, Frames, PipelineEvent, Told},
    planner::{Plan, Refusal},
    request::{Request, RequestError, StageUse},
    scheduler::{Scheduler, SchedulerConfig},
    session::Session,
};

mod outlet;
mod requests;
#[cfg(test)]
mod tests;

pub use outlet::ClientStream;

/// What happens to the engine.
pub enum Event {
    /// A worker said hello.
    Joined {
        /// Number of its stream: one process may come back on a new stream while the old one is not yet known to be dead.
        connection: u64,
        /// Its hello.
        hello: Box<Hello>,
        /// Where messages for it go.
        outbox: mpsc::Sender<Order>,
        /// Welcome or refusal.
        reply: oneshot::Sender<Result<Welcome, JoinRefusal>>,
    },
    /// A worker's stream was refused before its hello.
    Refused {
        /// Where it came from.
        from: String,
        /// Why.
        reason: String,
    },
    /// A worker said something else.
    FromWorker {
        /// Its stream.
        connection: u64,
        /// Its name.
        name: String,
        /// Its incarnation.
        generation: u64,
        /// What it said.
        report: Box<Report>,
    },
    /// A worker's stream ended.
    Left {
        /// Its stream.
        connection: u64,
        /// Its name.
        name: String,
        /// Its incarnation.
        generation: u64,
        /// How.
        reason: String,
    },
    /// The last stage finished a micro-batch.
    Result(Box<BatchResult>),
    /// The link to the first stage said something.
    Pipeline(Told),
    /// A client's request.
    Submit {
        /// The request.
        request: Box<Request>,
        /// Its stream, or why not.
        reply: oneshot::Sender<Result<ClientStream, RequestError>>,
    },
    /// Somebody asks for the plan.
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
    pub workers: Vec<(String, u64)>,
    /// Workers without layers.
    pub standby: Vec<String>,
    /// Epoch in force; 0 when the plan is only what would be made.
    pub epoch: u64,
}

/// What an engine is started with.
pub struct EngineSettings {
    /// How the scheduler works; `stages` follows the plan.
    pub scheduler: SchedulerConfig,
    /// Name of the model.
    pub model: String,
    /// A token that a plan is proven with: any but the one that is never attended to.
    pub proof_token: u32,
}

/// Opens the link to the first stage of an epoch and tells the engine of it, until the epoch is over.
pub type OpenPipeline = Box<dyn Fn(FirstStage, mpsc::Sender<Event>, CancellationToken) + Send + Sync>;

/// A way to reach the engine. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    events: mpsc::Sender<Event>,
    snapshot: watch::Receiver<Arc<ClusterSnapshot>>,
}

impl Handle {
    /// Tells the engine; waits while its queue is full.
    pub async fn send(&self, event: Event) {
        // A gone engine means that the coordinator ends; whoever waits for a reply sees its sender dropped.
        let _ = self.events.send(event).await;
    }

    /// Where its events go, for a part that needs nothing else.
    pub fn events(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    /// Tells the engine, unless its queue is full.
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
    /// [`RequestError::ShuttingDown`]; within it, why there is none.
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

struct Running {
    request: Request,
    /// Everything that is logged about this request stands in it.
    span: Span,
    session: Session,
    outlet: Outlet,
    accepted_at: Instant,
    first_scheduled: Option<Instant>,
    first_token: Option<Instant>,
    stages: BTreeMap<(u32, u32, String), StageUse>,
}

/// The way to a worker, and the stream that it belongs to.
struct Outbox {
    connection: u64,
    orders: mpsc::Sender<Order>,
}

struct Pipeline {
    epoch: u64,
    frames: Frames,
}

struct InFlight {
    /// Of all sequences together.
    tokens: usize,
    since: Instant,
}

/// The engine's state. [`Engine::run`] is its life.
pub struct Engine {
    settings: EngineSettings,
    open_pipeline: OpenPipeline,
    cluster: Cluster,
    scheduler: Scheduler,
    tokenizer: Option<Arc<Tokenizer>>,
    outboxes: HashMap<String, Outbox>,
    running: HashMap<u64, Running>,
    next_sequence: u64,
    pipeline: Option<Pipeline>,
    in_flight: HashMap<u64, InFlight>,
    /// The sequence that proves the plan in force, while it is under way.
    proof: Option<u64>,
    events: mpsc::Sender<Event>,
    snapshot: watch::Sender<Arc<ClusterSnapshot>>,
    started: Instant,
    /// Ends tasks of the epoch in force.
    epoch_stop: CancellationToken,
}

/// Events that may wait. Workers and clients wait when it is full, the clock does not.
const EVENTS: usize = 1024;
/// How often time is looked at: deadlines and lost heartbeats are this precise.
const TICK: Duration = Duration::from_millis(50);
/// A snapshot is published at least this often.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(500);

impl Engine {
    /// An engine and the handle to it.
    pub fn new(
        settings: EngineSettings,
        open_pipeline: OpenPipeline,
        cluster: Cluster,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> (Self, Handle, mpsc::Receiver<Event>) {
        let (events, inbox) = mpsc::channel(EVENTS);
        let first = cluster.snapshot(Duration::ZERO, SnapshotRequests::default());
        let (snapshot, seen) = watch::channel(Arc::new(first));
        let handle = Handle { events: events.clone(), snapshot: seen };
        let engine = Self {
            scheduler: Scheduler::new(settings.scheduler),
            settings,
            open_pipeline,
            cluster,
            tokenizer,
            outboxes: HashMap::new(),
            running: HashMap::new(),
            next_sequence: 1,
            pipeline: None,
            in_flight: HashMap::new(),
            proof: None,
            events,
            snapshot,
            started: Instant::now(),
            epoch_stop: CancellationToken::new(),
        };
        (engine, handle, inbox)
    }

    /// Runs until `shutdown`; then every running request ends with a typed error.
    pub async fn run(mut self, mut inbox: mpsc::Receiver<Event>, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut published = Instant::now();
        loop {
            tokio::select! {
                // First: a worker that leaves because the coordinator ends is not what its requests should hear of.
                biased;
                () = shutdown.cancelled() => break,
                _now = tick.tick() => {
                    self.cluster.tick(self.now());
                    self.end_overdue();
                }
                event = inbox.recv() => match event {
                    Some(event) => self.handle(event),
                    None => break,
                },
            }
            let changed = self.carry_out();
            self.schedule();
            if changed || published.elapsed() >= SNAPSHOT_EVERY {
                published = Instant::now();
                self.publish();
            }
        }
        self.interrupt(&RequestError::ShuttingDown);
        self.epoch_stop.cancel();
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn handle(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Joined { connection, hello, outbox, reply } => {
                let name = hello.name.clone();
                let answer = self.cluster.join(now, *hello);
                let welcomed = answer.is_ok();
                let taken = reply.send(answer).is_ok();
                if welcomed && taken {
                    self.outboxes.insert(name, Outbox { connection, orders: outbox });
                    self.cluster.joined(now);
                }
            }
            Event::Refused { from, reason } => self.cluster.stranger_refused(now, &from, &reason),
            Event::FromWorker { connection, name, generation, report } => {
                if self.is_current(&name, connection) {
                    self.worker_said(now, &name, generation, *report);
                }
            }
            Event::Left { connection, name, generation, reason } => {
                if self.is_current(&name, connection) {
                    self.cluster.leave(now, &name, generation, &reason);
                }
            }
            Event::Result(result) => self.result(*result),
            Event::Pipeline(Told { epoch, event }) if epoch == self.cluster.epoch() => match event {
                PipelineEvent::Opened(link) => self.pipeline_opened(epoch, link),
                PipelineEvent::Refused { micro_batch_id, worker, message } => {
                    self.frame_failed(micro_batch_id, &worker, &message);
                }
                PipelineEvent::Lost { reason } => self.cluster.pipeline_failed(now, epoch, None, &reason),
            },
            // Of an epoch that has ended.
            Event::Pipeline(_) => {}
            Event::Submit { request, reply } => self.submit(*request, reply),
            Event::Plan { reply } => {
                let view = self.cluster.plan().map(|(plan, names)| PlanView {
                    plan,
                    workers: names.into_iter().map(|name| (name.clone(), self.cluster.memory_bytes(&name))).collect(),
                    standby: self.cluster.standby(),
                    epoch: self.cluster.epoch(),
                });
                let _ = reply.send(view);
            }
        }
    }

    fn is_current(&self, name: &str, connection: u64) -> bool {
        self.outboxes.get(name).is_some_and(|outbox| outbox.connection == connection)
    }

    fn worker_said(&mut self, now: Duration, name: &str, generation: u64, report: Report) {
        match report {
            Report::Heartbeat(heartbeat) => self.cluster.heartbeat(now, name, generation, heartbeat),
            Report::LoadProgress(progress) => self.cluster.load_progress(now, name, generation, &progress),
            Report::StageReady(ready) => {
                if self.cluster.check_contents(now, name, generation, &ready) {
                    self.cluster.stage_ready(now, name, generation, &ready);
                }
            }
            Report::StageFailed(failed) => self.cluster.stage_failed(now, name, generation, &failed),
            Report::StageBlocked(blocked) => self.cluster.stage_blocked(now, name, generation, &blocked),
            Report::FrameFailed(failed) => {
                if self.cluster.may_report(name, &failed) {
                    self.frame_failed(failed.micro_batch_id, &failed.worker, &failed.message);
                }
            }
        }
    }

    /// Carries out what the cluster decided; whether there was anything.
    fn carry_out(&mut self) -> bool {
        // A dropped outbox ends its worker's stream: a worker that was given up must join anew.
        self.outboxes.retain(|name, _| self.cluster.is_present(name));
        let commands = self.cluster.take_commands();
        let changed = !commands.is_empty();
        for command in commands {
            match command {
                Command::Send { node, generation, order } => self.tell(&node, generation, order),
                Command::Interrupt(error) => self.interrupt(&error),
                Command::OpenPipeline(first) => self.open_pipeline(first),
                Command::Prove { epoch } => self.prove(epoch),
            }
        }
        changed
    }

    fn tell(&mut self, node: &str, generation: u64, order: Order) {
        let Some(outbox) = self.outboxes.get(node) else { return };
        if outbox.orders.try_send(order).is_err() {
            let now = self.now();
            self.outboxes.remove(node);
            self.cluster.leave(now, node, generation, "it takes no messages");
        }
    }

    fn open_pipeline(&mut self, first: FirstStage) {
        self.epoch_stop.cancel();
        self.epoch_stop = CancellationToken::new();
        (self.open_pipeline)(first, self.events.clone(), self.epoch_stop.clone());
    }

    fn pipeline_opened(&mut self, epoch: u64, link: Result<Frames, String>) {
        match link {
            Err(reason) => {
                let now = self.now();
                self.cluster.pipeline_failed(now, epoch, None, &format!("the coordinator {reason}"));
            }
            Ok(frames) => {
                self.pipeline = Some(Pipeline { epoch, frames });
                self.scheduler.reconfigure(self.cluster.stages());
                self.cluster.pipeline_open(epoch);
                self.carry_out();
            }
        }
    }

    fn snapshot_now(&self) -> ClusterSnapshot {
        let requests =
            SnapshotRequests { running: self.scheduler.running() as u32, waiting: self.scheduler.waiting() as u32 };
        self.cluster.snapshot(self.now(), requests)
    }

    fn publish(&self) {
        self.snapshot.send_replace(Arc::new(self.snapshot_now()));
    }
}

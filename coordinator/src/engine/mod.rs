//! The one task that owns the cluster's state, the scheduler and the requests, and connects them.
//!
//! Events come in through one bounded queue: from workers, from the pipeline, from clients, from the clock. The engine hands each
//! to the pure part that decides, and carries out what that part says. It computes nothing itself and never waits for a peer:
//! whatever may take time is a task that sends an event when it is done.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use grokpipe_model::tokenizer::Tokenizer;
use grokpipe_proto::{
    ids::{Generation, MicroBatchId, PlanEpoch, SequenceId},
    snapshot::{ClusterSnapshot, SnapshotRequests},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::{
    cluster::{
        Cluster, Command,
        messages::{Order, Report},
    },
    engine::outlet::Outlet,
    pipeline::{FirstStage, Frames, PipelineEvent, Told},
    request::{Request, RequestError, StageUse},
    scheduler::{Scheduler, SchedulerConfig},
    session::Session,
};

mod handle;
mod outlet;
mod requests;
#[cfg(test)]
mod tests;

pub use handle::{Event, Handle, PlanView};
pub use outlet::ClientStream;

/// Settings of an engine.
pub struct EngineSettings {
    /// How the scheduler works; `stages` follows the plan.
    pub scheduler: SchedulerConfig,
    /// Name of the model.
    pub model: String,
    /// The token that proves a plan: any but the padding token, which no position attends to.
    pub proof_token: u32,
}

/// Opens the link to the first stage of an epoch and sends its events to the engine until the epoch ends.
pub type OpenPipeline = Box<dyn Fn(FirstStage, mpsc::Sender<Event>, CancellationToken) + Send + Sync>;

struct Running {
    request: Request,
    /// Log lines about this request carry it.
    span: Span,
    session: Session,
    outlet: Outlet,
    accepted_at: Instant,
    first_scheduled: Option<Instant>,
    first_token: Option<Instant>,
    stages: BTreeMap<(u32, u32, String), StageUse>,
}

/// Where orders for a worker go, and the stream that they go through.
struct Outbox {
    connection: u64,
    orders: mpsc::Sender<Order>,
}

struct Pipeline {
    epoch: PlanEpoch,
    frames: Frames,
}

/// A micro-batch on its way through the stages.
struct SentBatch {
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
    running: HashMap<SequenceId, Running>,
    next_sequence: SequenceId,
    pipeline: Option<Pipeline>,
    in_flight: HashMap<MicroBatchId, SentBatch>,
    /// The sequence that proves the plan in force, while it is under way.
    proof: Option<SequenceId>,
    events: mpsc::Sender<Event>,
    snapshot: watch::Sender<Arc<ClusterSnapshot>>,
    started: Instant,
    /// Ends tasks of the epoch in force.
    epoch_stop: CancellationToken,
}

/// Most events in the queue. When it is full, workers and clients wait; the clock does not.
const QUEUED_EVENTS_MAX: usize = 1024;
/// Time between two checks of deadlines and heartbeats.
const TICK: Duration = Duration::from_millis(50);
/// Longest time between two published snapshots.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(500);

impl Engine {
    /// An engine and the handle to it.
    pub fn new(
        settings: EngineSettings,
        open_pipeline: OpenPipeline,
        cluster: Cluster,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> (Self, Handle, mpsc::Receiver<Event>) {
        let (events, inbox) = mpsc::channel(QUEUED_EVENTS_MAX);
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
            next_sequence: SequenceId(1),
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
                // First, so that requests report the shutdown and not the workers that leave because of it.
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

    fn worker_said(&mut self, now: Duration, name: &str, generation: Generation, report: Report) {
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

    /// Carries out what the cluster decided. Returns whether there was anything to do.
    fn carry_out(&mut self) -> bool {
        // A dropped outbox ends its worker's stream: a worker that was given up must join again.
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

    fn tell(&mut self, node: &str, generation: Generation, order: Order) {
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

    fn pipeline_opened(&mut self, epoch: PlanEpoch, link: Result<Frames, String>) {
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

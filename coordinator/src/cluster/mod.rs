//! Who belongs to the cluster, and which plan is in force. Pure: time is an argument, messages come out as commands.
//!
//! One rule carries the rest: **whatever changes about a stage, a new plan epoch begins.** Every frame names its epoch, so that
//! nothing of the old one can reach the new one. A worker that keeps its layers adopts them without loading. And a plan serves only
//! once a token has gone through all of its stages.
//!
//! This file holds the state; each module below changes it for one reason: workers that come and go (`joining`), reports that
//! bring a plan closer to serving (`progress`), failures (`failures`), the choice of a plan (`planning`). It knows nothing of
//! requests but that they end when the pipeline is interrupted.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::Duration,
};

use grokpipe_proto::{
    LOST_AFTER,
    ids::{Generation, LayerRange, PlanEpoch, WorkerName},
    link_token::LinkKey,
};

use self::{
    contents::Contents,
    log::LogEntry,
    measured::Measured,
    messages::{Heartbeat, Hello, Order},
    steps::StepTimes,
};
use crate::{
    facts::{ModelFacts, PlanRequirements},
    pipeline::FirstStage,
    planner::Plan,
    request::RequestError,
};

mod contents;
mod failures;
mod gone;
mod hello;
mod joining;
mod log;
mod measured;
pub mod messages;
mod planning;
mod progress;
mod steps;
mod view;

#[cfg(test)]
mod tests;

pub use joining::JoinRefusal;

/// A worker that the configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedWorker {
    /// Its name.
    pub name: String,
    /// Layers that it must run, if the configuration says so.
    pub layers: Option<Range<u32>>,
}

/// What a cluster is started with.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// Name, for people.
    pub name: String,
    /// The coordinator's own generation.
    pub generation: Generation,
    /// Workers to wait for before the first plan.
    pub expected: Vec<ExpectedWorker>,
    /// How long a lost or missing worker is waited for before the others are asked to do without it.
    pub replan_after: Duration,
    /// What a plan makes room for.
    pub requirements: PlanRequirements,
    /// KV blocks of the pool.
    pub kv_blocks: u32,
    /// Most unanswered frames on a link.
    pub max_frames_in_flight: u32,
    /// What the tokens of links are derived from.
    pub link_key: LinkKey,
}

/// What the engine must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Send an order to a worker.
    Send {
        /// The worker.
        node: WorkerName,
        /// The generation that the order is for.
        generation: Generation,
        /// The order.
        order: Order,
    },
    /// End the running requests with this, and forget all frames under way.
    Interrupt(RequestError),
    /// All stages are ready: open the link to the first one.
    OpenPipeline(FirstStage),
    /// Send one token through all stages, and call [`Cluster::proven`] when it is back.
    Prove {
        /// The epoch to prove.
        epoch: PlanEpoch,
    },
}

#[derive(Clone, Debug)]
struct Node {
    name: WorkerName,
    hello: Hello,
    /// Whether its stream is open.
    present: bool,
    last_heard: Duration,
    heartbeat: Option<Heartbeat>,
    load: Option<(u64, u64)>,
    last_error: Option<(Duration, String)>,
    joins: u32,
    /// While set, it is left out of plans.
    excluded: Option<Until>,
    /// Failures since the cluster last served with it.
    failures: u32,
    /// Times of its steps with the layers that it has.
    steps: StepTimes,
}

/// What ends an exclusion from plans, besides a new join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// Nothing.
    Rejoin,
    /// Its device has finished the step that it hangs in.
    Idle,
}

#[derive(Clone, Debug)]
struct StageState {
    node: WorkerName,
    layers: LayerRange,
    ready: bool,
    /// When it last loaded a byte.
    progress_at: Duration,
    /// Since when it cannot reach the next stage, and the name of its worker (empty for the coordinator).
    blocked: Option<(Duration, String)>,
}

#[derive(Clone, Debug)]
struct Active {
    plan: Plan,
    stages: Vec<StageState>,
    /// The link to the first stage is open.
    connected: bool,
    /// A token has gone through all stages.
    proven: bool,
    /// A step of a request has gone through all stages.
    used: bool,
    /// Consecutive frames that stages refused.
    refusals: u32,
    /// Since when a stage's worker is gone or has failed.
    broken_since: Option<Duration>,
    /// When a failed stage is tried again.
    retry_at: Option<Duration>,
    /// Times of its steps.
    measured: Measured,
}

/// With no list of workers to wait for, planning waits this long after the latest join, in case more are coming.
const SETTLE: Duration = Duration::from_secs(1);
/// First and longest pause before a failed epoch is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The state of a cluster.
#[derive(Debug)]
pub struct Cluster {
    settings: ClusterSettings,
    facts: ModelFacts,
    nodes: BTreeMap<WorkerName, Node>,
    epoch: PlanEpoch,
    active: Option<Active>,
    refusal: Option<String>,
    /// Why the plan in force does not serve, if something went wrong.
    trouble: Option<String>,
    /// Since when a plan that was made does not serve.
    failing_since: Option<Duration>,
    last_join: Duration,
    retry_pause: Duration,
    events: VecDeque<LogEntry>,
    next_event: u64,
    commands: Vec<Command>,
    planned_for: Option<u64>,
    /// Checksums of the model, from the workers that loaded it.
    contents: Contents,
    /// When a refused caller was last recorded.
    last_stranger: Option<Duration>,
    /// Counts changes that may make a plan possible, so that a refused plan is not tried again without one.
    changes: u64,
}

impl Cluster {
    /// A cluster without workers.
    pub fn new(settings: ClusterSettings, facts: ModelFacts) -> Self {
        let contents = Contents::new(&facts);
        Self {
            settings,
            facts,
            contents,
            last_stranger: None,
            nodes: BTreeMap::new(),
            epoch: PlanEpoch::default(),
            active: None,
            refusal: None,
            trouble: None,
            failing_since: None,
            last_join: Duration::ZERO,
            retry_pause: RETRY.0,
            events: VecDeque::new(),
            next_event: 1,
            commands: Vec::new(),
            planned_for: None,
            changes: 0,
        }
    }

    /// Commands since the last call, in order.
    pub fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// The plan epoch in force; 0 before the first plan.
    pub fn epoch(&self) -> PlanEpoch {
        self.epoch
    }

    /// Generation of the last stage's worker, whose results are taken.
    pub fn last_generation(&self) -> Option<Generation> {
        let last = self.active.as_ref()?.stages.last()?;
        self.nodes.get(&last.node).map(|node| node.hello.generation)
    }

    /// Stages of the plan in force; 0 before the first plan.
    pub fn stages(&self) -> usize {
        self.active.as_ref().map_or(0, |active| active.stages.len())
    }

    /// Whether requests can run: a token has gone through every stage, and nothing broke since.
    pub fn is_serving(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.proven && active.broken_since.is_none())
    }

    /// Whether a report is about the plan in force, and made by this life of the coordinator.
    fn is_current(&self, epoch: PlanEpoch, coordinator_generation: Generation) -> bool {
        epoch == self.epoch && coordinator_generation == self.settings.generation
    }

    fn stage_mut(&mut self, name: &str) -> Option<&mut StageState> {
        self.active.as_mut()?.stages.iter_mut().find(|stage| stage.node == *name)
    }

    /// Whether this worker has a stage of the plan in force.
    pub fn runs_stage(&self, name: &str) -> bool {
        self.active.as_ref().is_some_and(|active| active.stages.iter().any(|stage| stage.node == *name))
    }

    /// Time has passed: silent nodes are lost, plans that are due are made.
    pub fn tick(&mut self, now: Duration) {
        let silent: Vec<_> = self
            .nodes
            .values()
            .filter(|node| node.present && now.saturating_sub(node.last_heard) > LOST_AFTER)
            .map(|node| (node.name.clone(), node.hello.generation))
            .collect();
        for (name, generation) in silent {
            let reason = format!("no heartbeat for {} s", LOST_AFTER.as_secs());
            self.leave(now, name.as_str(), generation, &reason);
        }
        self.watch_stages(now);
        self.forget_gone(now);
        self.advance(now);
    }

    /// Whether a worker's stream is open.
    pub fn is_present(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.present)
    }

    /// Bytes that a worker offered at its last hello.
    pub fn memory_bytes(&self, name: &str) -> u64 {
        self.nodes.get(name).map_or(0, |node| node.hello.memory_bytes)
    }

    fn present(&mut self, name: &str, generation: Generation) -> Option<&mut Node> {
        self.nodes.get_mut(name).filter(|node| node.present && node.hello.generation == generation)
    }
}

//! Who belongs to the cluster, and which plan is in force. Pure: time is an argument, messages come out as commands.
//!
//! One rule carries the rest: **whatever changes about a stage, a new plan epoch begins.** Every frame names its epoch, so that
//! nothing of the old one can reach the new one. A worker that keeps its layers adopts them without loading.
//!
//! Decides when to plan, when a node counts as lost, and what each node is told. Knows nothing of requests but that they end
//! when the pipeline is interrupted.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::Duration,
};

use grokpipe_proto::{
    HEARTBEAT_INTERVAL, LOST_AFTER, PROTOCOL_VERSIONS,
    status::RequestError,
    v1::{Heartbeat, Hello, LoadProgress, StageFailed, StageTiming, Welcome, join_response::Message},
};

use self::{contents::Contents, measured::Measured};
use crate::{
    facts::{ModelFacts, PlanWishes},
    planner::Plan,
};

mod contents;
mod hello;
mod measured;
mod planning;
mod view;

#[cfg(test)]
mod tests;

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
    pub generation: u64,
    /// Workers to wait for before the first plan.
    pub expected: Vec<ExpectedWorker>,
    /// How long a lost or missing worker is waited for before the others are asked to do without it.
    pub replan_after: Duration,
    /// What a plan makes room for.
    pub wishes: PlanWishes,
    /// Tokens in a KV block.
    pub kv_block_tokens: u32,
    /// Most unanswered frames on a link.
    pub max_frames_in_flight: u32,
}

/// What the outside is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Tell a worker.
    Send {
        /// Which one.
        node: String,
        /// Its incarnation.
        generation: u64,
        /// What.
        message: Message,
    },
    /// End the running requests with this, and forget all frames under way.
    Interrupt(RequestError),
    /// All stages are ready: open the link to the first one.
    OpenPipeline {
        /// Epoch that the link is for.
        epoch: u64,
        /// First stage's address.
        address: String,
        /// First stage's worker.
        worker: String,
        /// Number of stages.
        stages: usize,
    },
}

/// Why a hello was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// A hello that makes no sense.
    #[error("{field}: expected {expected}, found {found}")]
    Invalid {
        /// Field of the hello.
        field: &'static str,
        /// What it should have been.
        expected: String,
        /// What it was.
        found: String,
    },
    /// A live worker has the name.
    #[error("expected a free name, found a live worker named {0}")]
    NameTaken(String),
    /// Built too far apart.
    #[error("expected protocol version {ours}, found {theirs_min} to {theirs_max}")]
    Version {
        /// What the coordinator speaks.
        ours: u32,
        /// Lowest that the worker speaks.
        theirs_min: u32,
        /// Highest that the worker speaks.
        theirs_max: u32,
    },
}

#[derive(Clone, Debug)]
struct Node {
    hello: Hello,
    /// Whether its stream stands.
    present: bool,
    last_heard: Duration,
    heartbeat: Option<Heartbeat>,
    load: Option<(u64, u64)>,
    last_error: Option<(Duration, String)>,
    joins: u32,
    /// It failed for good; left out of plans until it joins again.
    unfit: bool,
}

#[derive(Clone, Debug)]
struct StageState {
    node: String,
    layers: Range<u32>,
    ready: bool,
}

#[derive(Clone, Debug)]
struct Active {
    plan: Plan,
    stages: Vec<StageState>,
    /// The link to the first stage stands.
    connected: bool,
    /// When the epoch stopped being whole, if it has: a stage's worker is gone or failed.
    broken_since: Option<Duration>,
    /// A failed stage is tried again at this time.
    retry_at: Option<Duration>,
    /// What its steps took.
    measured: Measured,
}

#[derive(Clone, Debug)]
struct Event {
    id: u64,
    at: Duration,
    code: &'static str,
    node: Option<String>,
    text: String,
}

/// Events that are remembered.
const EVENTS: usize = 32;
/// With no list of workers to wait for, planning waits this long after the latest join, in case more are coming.
const SETTLE: Duration = Duration::from_secs(1);
/// First and longest pause before a failed epoch is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The state of a cluster.
#[derive(Debug)]
pub struct Cluster {
    settings: ClusterSettings,
    facts: ModelFacts,
    nodes: BTreeMap<String, Node>,
    epoch: u64,
    active: Option<Active>,
    refusal: Option<String>,
    last_join: Duration,
    retry_pause: Duration,
    events: VecDeque<Event>,
    next_event: u64,
    commands: Vec<Command>,
    planned_for: Option<u64>,
    /// What the model's numbers are, by those who loaded them.
    contents: Contents,
    /// Counts what may change a plan, so that a refused plan is not tried again for nothing.
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
            nodes: BTreeMap::new(),
            epoch: 0,
            active: None,
            refusal: None,
            last_join: Duration::ZERO,
            retry_pause: RETRY.0,
            events: VecDeque::new(),
            next_event: 1,
            commands: Vec::new(),
            planned_for: None,
            changes: 0,
        }
    }

    /// What is to be done since the last call, in order.
    pub fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// The plan epoch in force; 0 before the first plan.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether frames can run: every stage ready, the link to the first one open.
    pub fn is_serving(&self) -> bool {
        self.active.as_ref().is_some_and(|active| {
            active.connected && active.broken_since.is_none() && active.stages.iter().all(|stage| stage.ready)
        })
    }

    /// A worker asks to join.
    ///
    /// # Errors
    /// [`JoinRefusal`], which the worker is told.
    pub fn join(&mut self, now: Duration, hello: Hello) -> Result<Welcome, JoinRefusal> {
        hello::check_hello(&hello)?;
        let version = *PROTOCOL_VERSIONS.end();
        if !(hello.version_min..=hello.version_max).contains(&version) {
            return Err(JoinRefusal::Version {
                ours: version,
                theirs_min: hello.version_min,
                theirs_max: hello.version_max,
            });
        }
        let known = self.nodes.get(&hello.name);
        if known.is_some_and(|node| node.present) {
            return Err(JoinRefusal::NameTaken(hello.name));
        }
        let node = Node {
            present: true,
            last_heard: now,
            heartbeat: None,
            load: None,
            last_error: known.and_then(|node| node.last_error.clone()),
            joins: known.map_or(0, |node| node.joins) + 1,
            unfit: false,
            hello: hello.clone(),
        };
        let name = hello.name.clone();
        self.record(now, "worker_joined", Some(&name), format!("{name} joined with {}", hello.device));
        if hello.model_digest == self.facts.digest {
            self.nodes.insert(name, node);
        } else {
            let reason = format!(
                "expected model {} with digest {}, found one with digest {}",
                self.facts.config.name, self.facts.digest, hello.model_digest
            );
            self.record(now, "wrong_model", Some(&name), format!("{name} cannot help: {reason}"));
            self.nodes.insert(name, Node { unfit: true, last_error: Some((now, reason)), ..node });
        }
        self.last_join = now;
        self.changes += 1;
        Ok(Welcome {
            version,
            cluster: self.settings.name.clone(),
            coordinator_generation: self.settings.generation,
            heartbeat_interval_ms: HEARTBEAT_INTERVAL.as_millis() as u32,
        })
    }

    /// To be called once a worker has been welcomed and can take messages.
    pub fn joined(&mut self, now: Duration) {
        self.advance(now);
    }

    /// A worker's stream has ended.
    pub fn leave(&mut self, now: Duration, name: &str, generation: u64, reason: &str) {
        let Some(node) = self.nodes.get_mut(name).filter(|node| node.present && node.hello.generation == generation)
        else {
            return;
        };
        node.present = false;
        node.heartbeat = None;
        node.load = None;
        node.last_error = Some((now, reason.to_owned()));
        self.changes += 1;
        self.record(now, "worker_lost", Some(name), format!("{name} lost: {reason}"));
        self.break_stage_of(now, name, reason);
        self.advance(now);
    }

    /// A heartbeat.
    pub fn heartbeat(&mut self, now: Duration, name: &str, generation: u64, heartbeat: Heartbeat) {
        if let Some(node) = self.present(name, generation) {
            node.last_heard = now;
            node.heartbeat = Some(heartbeat);
        }
    }

    /// A load goes on.
    pub fn load_progress(&mut self, now: Duration, name: &str, generation: u64, progress: &LoadProgress) {
        let current = progress.plan_epoch == self.epoch;
        if let Some(node) = self.present(name, generation) {
            node.last_heard = now;
            if current {
                node.load = Some((progress.bytes, progress.bytes_total));
            }
        }
    }

    /// A stage has its layers and its link to the next stage.
    pub fn stage_ready(&mut self, now: Duration, name: &str, generation: u64, epoch: u64) {
        if let Some(node) = self.present(name, generation) {
            node.last_heard = now;
        }
        if epoch != self.epoch || self.present(name, generation).is_none() {
            return;
        }
        let Some(active) = &mut self.active else { return };
        // Said twice, or by a worker without a stage, it must not open the pipeline again: frames under way would be lost.
        let Some(stage) = active.stages.iter_mut().find(|stage| stage.node == name && !stage.ready) else { return };
        stage.ready = true;
        if active.broken_since.is_none() && active.stages.iter().all(|stage| stage.ready) {
            let first = active.stages[0].node.clone();
            let stages = active.stages.len();
            let address = self.nodes.get(&first).map(|node| node.hello.data_address.clone()).unwrap_or_default();
            self.commands.push(Command::OpenPipeline { epoch, address, worker: first, stages });
        }
    }

    /// A stage could not be made ready, or broke.
    pub fn stage_failed(&mut self, now: Duration, name: &str, generation: u64, failed: &StageFailed) {
        let epoch = self.epoch;
        let Some(node) = self.present(name, generation) else { return };
        node.last_heard = now;
        // Only who runs a stage can break the plan.
        if failed.plan_epoch != epoch || !self.runs_stage(name) {
            return;
        }
        let Some(node) = self.present(name, generation) else { return };
        node.last_error = Some((now, failed.message.clone()));
        node.unfit = !failed.retryable;
        self.changes += 1;
        self.record(now, "stage_failed", Some(name), format!("{name}: {}", failed.message));
        // News of a dead worker often comes first from its neighbour; the dead one is to be named, not the neighbour.
        let culprit = if failed.lost_peer.is_empty() { name } else { &failed.lost_peer };
        self.break_stage_of(now, culprit, &failed.message);
        self.advance(now);
    }

    /// Whether this worker has a stage of the plan in force.
    pub fn runs_stage(&self, name: &str) -> bool {
        self.active.as_ref().is_some_and(|active| active.stages.iter().any(|stage| stage.node == name))
    }

    /// The link to the first stage stands.
    pub fn pipeline_open(&mut self, now: Duration, epoch: u64) {
        if epoch != self.epoch {
            return;
        }
        let Some(active) = &mut self.active else { return };
        active.connected = true;
        self.retry_pause = RETRY.0;
        let text = format!("serving {} layers on {} nodes", self.facts.config.num_hidden_layers, active.stages.len());
        self.record(now, "serving", None, text);
    }

    /// The link to the first stage broke, or could not be opened, or the pipeline is stuck.
    pub fn pipeline_failed(&mut self, now: Duration, epoch: u64, reason: &str) {
        if epoch != self.epoch {
            return;
        }
        let Some(first) = self.active.as_ref().map(|active| active.stages[0].node.clone()) else { return };
        self.record(now, "pipeline_failed", None, reason.to_owned());
        self.break_stage_of(now, &first, reason);
        self.advance(now);
    }

    /// A micro-batch of so many tokens came back after so many seconds. Those of the size that the plan is made for tell how good its
    /// prediction is.
    pub fn step_done(&mut self, epoch: u64, tokens: usize, seconds: f64, timings: &[StageTiming]) {
        let is_planned_for = tokens == self.settings.wishes.batch_tokens as usize && epoch == self.epoch;
        if let Some(active) = self.active.as_mut().filter(|_| is_planned_for)
            && active.stages.len() == timings.len()
        {
            active.measured.step(seconds, timings);
        }
    }

    /// Time goes on: silent nodes are lost, waiting plans are made.
    pub fn tick(&mut self, now: Duration) {
        let silent: Vec<_> = self
            .nodes
            .values()
            .filter(|node| node.present && now.saturating_sub(node.last_heard) > LOST_AFTER)
            .map(|node| (node.hello.name.clone(), node.hello.generation))
            .collect();
        for (name, generation) in silent {
            let reason = format!("no heartbeat for {} s", LOST_AFTER.as_secs());
            self.leave(now, &name, generation, &reason);
        }
        self.advance(now);
    }

    /// Whether a worker's stream stands.
    pub fn is_present(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.present)
    }

    /// Bytes that a worker offered at its last hello.
    pub fn memory_bytes(&self, name: &str) -> u64 {
        self.nodes.get(name).map_or(0, |node| node.hello.memory_bytes)
    }

    fn present(&mut self, name: &str, generation: u64) -> Option<&mut Node> {
        self.nodes.get_mut(name).filter(|node| node.present && node.hello.generation == generation)
    }

    fn break_stage_of(&mut self, now: Duration, name: &str, reason: &str) {
        let Some(active) = &mut self.active else { return };
        let Some(stage) = active.stages.iter_mut().find(|stage| stage.node == name) else { return };
        stage.ready = false;
        active.connected = false;
        active.retry_at = Some(now + self.retry_pause);
        if active.broken_since.is_none() {
            active.broken_since = Some(now);
            self.retry_pause = (self.retry_pause * 2).min(RETRY.1);
            self.commands.push(Command::Interrupt(RequestError::WorkerLost {
                worker: name.to_owned(),
                layers: stage.layers.clone(),
                reason: reason.to_owned(),
            }));
        }
    }

    fn record(&mut self, at: Duration, code: &'static str, node: Option<&str>, text: String) {
        tracing::info!(code, node, "{text}");
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { id: self.next_event, at, code, node: node.map(str::to_owned), text });
        self.next_event += 1;
    }
}

//! Who belongs to the cluster, and which plan is in force. Pure: time is an argument, messages come out as commands.
//!
//! One rule carries the rest: **whatever changes about a stage, a new plan epoch begins.** Every frame names its epoch, so that
//! nothing of the old one can reach the new one. A worker that keeps its layers adopts them without loading. And a plan serves only
//! once a token has gone through all of its stages.
//!
//! Decides when to plan (`planning`), when a node counts as lost and what a failure means (`failures`), how long a step may take
//! (`steps`), and what each node is told. Knows nothing of requests but that they end when the pipeline is interrupted.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::Duration,
};

use grokpipe_proto::{
    HEARTBEAT_INTERVAL, LOST_AFTER, PROTOCOL_VERSIONS, bounds,
    ids::{Generation, LayerRange, PlanEpoch},
    link_token::LinkKey,
    snapshot::EVENTS_MAX,
};

use self::{
    contents::Contents,
    measured::Measured,
    messages::{Heartbeat, Hello, LoadProgress, Order, StageReady, StageTiming, Welcome},
    steps::StepTimes,
};
use crate::{
    facts::{ModelFacts, PlanWishes},
    pipeline::FirstStage,
    planner::Plan,
    request::RequestError,
};

mod contents;
mod failures;
mod gone;
mod hello;
mod measured;
pub mod messages;
mod planning;
mod steps;
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
    pub generation: Generation,
    /// Workers to wait for before the first plan.
    pub expected: Vec<ExpectedWorker>,
    /// How long a lost or missing worker is waited for before the others are asked to do without it.
    pub replan_after: Duration,
    /// What a plan makes room for.
    pub wishes: PlanWishes,
    /// KV blocks of the pool.
    pub kv_blocks: u32,
    /// Most unanswered frames on a link.
    pub max_frames_in_flight: u32,
    /// What the tokens of links are derived from.
    pub link_key: LinkKey,
}

/// What the outside is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Tell a worker.
    Send {
        /// Which one.
        node: String,
        /// Its incarnation.
        generation: Generation,
        /// What.
        order: Order,
    },
    /// End the running requests with this, and forget all frames under way.
    Interrupt(RequestError),
    /// All stages are ready: open the link to the first one.
    OpenPipeline(FirstStage),
    /// Send one token through all stages, and say [`Cluster::proven`] when it is back.
    Prove {
        /// The epoch that is to be proven.
        epoch: PlanEpoch,
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
    /// The cluster has as many workers as it takes.
    #[error("expected fewer than {0} workers, found as many")]
    Full(usize),
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
    /// It is left out of plans until this happens.
    excluded: Option<Until>,
    /// Failures since the cluster last served with it.
    failures: u32,
    /// What its steps took, for the layers that it has.
    steps: StepTimes,
}

/// What ends an exclusion from plans, beside the worker's joining anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// Nothing.
    Rejoin,
    /// Its device has finished the step that it hangs in.
    Idle,
}

#[derive(Clone, Debug)]
struct StageState {
    node: String,
    layers: LayerRange,
    ready: bool,
    /// When its load last went on.
    progress_at: Duration,
    /// Since when it cannot reach whom it hands its results to, and the name of that worker (empty for the coordinator).
    blocked: Option<(Duration, String)>,
}

#[derive(Clone, Debug)]
struct Active {
    plan: Plan,
    stages: Vec<StageState>,
    /// The link to the first stage stands.
    connected: bool,
    /// A token has gone through all stages.
    proven: bool,
    /// A step of a request has gone through all stages.
    used: bool,
    /// Frames in a row that stages refused.
    refusals: u32,
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

/// Shortest time between two events about strangers.
const STRANGERS_EVERY: Duration = Duration::from_secs(10);
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
    epoch: PlanEpoch,
    active: Option<Active>,
    refusal: Option<String>,
    /// Why the plan in force does not serve, if something went wrong; since when.
    trouble: Option<String>,
    /// Since when a plan that was made does not serve.
    failing_since: Option<Duration>,
    last_join: Duration,
    retry_pause: Duration,
    events: VecDeque<Event>,
    next_event: u64,
    commands: Vec<Command>,
    planned_for: Option<u64>,
    /// What the model's numbers are, by those who loaded them.
    contents: Contents,
    /// When a stranger was last told of.
    last_stranger: Option<Duration>,
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

    /// What is to be done since the last call, in order.
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

    /// A worker asks to join.
    ///
    /// # Errors
    /// [`JoinRefusal`], which the worker is told.
    pub fn join(&mut self, now: Duration, hello: Hello) -> Result<Welcome, JoinRefusal> {
        let shown: String = hello.name.chars().take(bounds::NAME).collect();
        self.admit(now, hello).inspect_err(|refusal| {
            let code = if matches!(refusal, JoinRefusal::NameTaken(_)) { "name_taken" } else { "worker_refused" };
            self.record_once(now, code, format!("a worker named {shown:?} was refused: {refusal}"));
        })
    }

    /// A stranger's call was refused before it could say who it is. At most one such event in ten seconds, so that no crowd of them
    /// pushes all else out.
    pub fn stranger_refused(&mut self, now: Duration, from: &str, reason: &str) {
        if self.last_stranger.is_none_or(|last| now.saturating_sub(last) >= STRANGERS_EVERY) {
            self.last_stranger = Some(now);
            self.record_once(now, "worker_refused", format!("a worker at {from} was refused: {reason}"));
        }
    }

    fn admit(&mut self, now: Duration, hello: Hello) -> Result<Welcome, JoinRefusal> {
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
        if self.present_count() >= gone::PRESENT_MAX {
            return Err(JoinRefusal::Full(gone::PRESENT_MAX));
        }
        let node = Node {
            present: true,
            last_heard: now,
            heartbeat: None,
            load: None,
            last_error: known.and_then(|node| node.last_error.clone()),
            joins: known.map_or(0, |node| node.joins) + 1,
            excluded: None,
            failures: 0,
            steps: StepTimes::default(),
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
            self.nodes.insert(name, Node { excluded: Some(Until::Rejoin), last_error: Some((now, reason)), ..node });
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
    pub fn leave(&mut self, now: Duration, name: &str, generation: Generation, reason: &str) {
        let Some(node) = self.nodes.get_mut(name).filter(|node| node.present && node.hello.generation == generation)
        else {
            return;
        };
        node.present = false;
        node.heartbeat = None;
        node.load = None;
        node.last_error = Some((now, reason.to_owned()));
        self.changes += 1;
        let text = format!("{name} lost: {reason}");
        self.record(now, "worker_lost", Some(name), text.clone());
        self.break_stage_of(now, name, reason, text);
        self.advance(now);
    }

    /// A heartbeat.
    pub fn heartbeat(&mut self, now: Duration, name: &str, generation: Generation, heartbeat: Heartbeat) {
        let step_age = Duration::try_from_secs_f64(heartbeat.step_age_seconds).unwrap_or_default();
        let step_rows = heartbeat.step_rows;
        if let Some(node) = self.present(name, generation) {
            node.last_heard = now;
            node.heartbeat = Some(heartbeat);
            self.watch_step(now, name, step_rows, step_age);
        }
    }

    /// A load goes on.
    pub fn load_progress(&mut self, now: Duration, name: &str, generation: Generation, progress: &LoadProgress) {
        let current = self.is_current(progress.plan_epoch, progress.coordinator_generation);
        let Some(node) = self.present(name, generation) else { return };
        node.last_heard = now;
        let load = Some((progress.bytes, progress.bytes_total));
        if current && node.load != load {
            node.load = load;
            if let Some(stage) = self.stage_mut(name) {
                stage.progress_at = now;
            }
        }
    }

    /// Whether a report is about the plan in force, and made by this life of the coordinator.
    fn is_current(&self, epoch: PlanEpoch, coordinator_generation: Generation) -> bool {
        epoch == self.epoch && coordinator_generation == self.settings.generation
    }

    fn stage_mut(&mut self, name: &str) -> Option<&mut StageState> {
        self.active.as_mut()?.stages.iter_mut().find(|stage| stage.node == name)
    }

    /// A stage has its layers and its link to the next stage.
    pub fn stage_ready(&mut self, now: Duration, name: &str, generation: Generation, ready: &StageReady) {
        if let Some(node) = self.present(name, generation) {
            node.last_heard = now;
        }
        if !self.is_current(ready.plan_epoch, ready.coordinator_generation) || self.present(name, generation).is_none()
        {
            return;
        }
        let epoch = self.epoch;
        let Some(active) = &mut self.active else { return };
        // Said twice, or by a worker without a stage, it must not open the pipeline again: frames under way would be lost.
        let Some(stage) = active.stages.iter_mut().find(|stage| stage.node == name && !stage.ready) else { return };
        stage.ready = true;
        stage.blocked = None;
        if active.broken_since.is_none() && active.stages.iter().all(|stage| stage.ready) {
            let first = active.stages[0].node.clone();
            let address = self.nodes.get(&first).map(|node| node.hello.data_address.clone()).unwrap_or_default();
            let token = self.settings.link_key.frames(epoch, 0);
            let first = FirstStage { epoch, address, worker: first, token };
            self.commands.push(Command::OpenPipeline(first));
        }
    }

    /// Whether this worker has a stage of the plan in force.
    pub fn runs_stage(&self, name: &str) -> bool {
        self.active.as_ref().is_some_and(|active| active.stages.iter().any(|stage| stage.node == name))
    }

    /// The link to the first stage stands.
    pub fn pipeline_open(&mut self, epoch: PlanEpoch) {
        let is_ready = |active: &&mut Active| epoch == self.epoch && active.stages.iter().all(|stage| stage.ready);
        if let Some(active) = self.active.as_mut().filter(is_ready) {
            active.connected = true;
            self.commands.push(Command::Prove { epoch });
        }
    }

    /// A token has gone through all stages: requests may come.
    pub fn proven(&mut self, now: Duration, epoch: PlanEpoch) {
        let Some(active) = self.active.as_mut().filter(|active| epoch == self.epoch && active.connected) else {
            return;
        };
        active.proven = true;
        (self.trouble, self.failing_since) = (None, None);
        let (layers, nodes) = (self.facts.config.num_hidden_layers, active.stages.len());
        let text = format!("serving {layers} layers on {nodes} node{}", if nodes == 1 { "" } else { "s" });
        self.record(now, "serving", None, text);
    }

    /// A micro-batch of so many tokens came back after so many seconds. All of them tell how long a step may take; those of the size
    /// that the plan is made for tell how good its prediction is.
    pub fn step_done(&mut self, epoch: PlanEpoch, tokens: usize, seconds: f64, timings: &[StageTiming]) {
        let Some(active) = self.active.as_mut().filter(|active| {
            epoch == self.epoch && active.broken_since.is_none() && active.stages.len() == timings.len()
        }) else {
            return;
        };
        active.refusals = 0;
        for (stage, timing) in active.stages.iter().zip(timings) {
            if let Some(node) = self.nodes.get_mut(&stage.node) {
                node.steps.record(tokens as u64, timing.compute_us as f64 / 1e6);
                if active.proven {
                    node.failures = 0;
                }
            }
        }
        if active.proven && !active.used {
            active.used = true;
            self.retry_pause = RETRY.0;
        }
        if tokens == self.settings.wishes.batch_tokens as usize {
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
        self.watch_stages(now);
        self.forget_gone(now);
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

    fn present(&mut self, name: &str, generation: Generation) -> Option<&mut Node> {
        self.nodes.get_mut(name).filter(|node| node.present && node.hello.generation == generation)
    }

    /// As `record`, but for what is remembered already: refused workers ask again and again.
    fn record_once(&mut self, at: Duration, code: &'static str, text: String) {
        if self.events.iter().all(|event| event.text != text) {
            self.record(at, code, None, text);
        }
    }

    fn record(&mut self, at: Duration, code: &'static str, node: Option<&str>, text: String) {
        tracing::info!(code, node, "{text}");
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { id: self.next_event, at, code, node: node.map(str::to_owned), text });
        self.next_event += 1;
    }
}

//! Workers come and go: who may join, and what becomes of the plan when one is lost.
//!
//! What a hello must contain is checked in `hello`; when the others take over is decided in `planning`.

use std::time::Duration;

use grokpipe_proto::{HEARTBEAT_INTERVAL, PROTOCOL_VERSIONS, bounds, ids::Generation};

use super::{
    Cluster, Node, Until, gone, hello,
    messages::{Hello, Welcome},
    steps::StepTimes,
};

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
    /// No common protocol version.
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

/// At most one event in this time concerns callers that were refused before their hello.
const STRANGERS_EVERY: Duration = Duration::from_secs(10);

impl Cluster {
    /// A worker asks to join.
    ///
    /// # Errors
    /// [`JoinRefusal`], which goes to the worker.
    pub fn join(&mut self, now: Duration, hello: Hello) -> Result<Welcome, JoinRefusal> {
        let shown: String = hello.name.chars().take(bounds::NAME_BYTES_MAX).collect();
        self.admit(now, hello).inspect_err(|refusal| {
            let code = if matches!(refusal, JoinRefusal::NameTaken(_)) { "name_taken" } else { "worker_refused" };
            self.record_once(now, code, format!("a worker named {shown:?} was refused: {refusal}"));
        })
    }

    /// A call was refused before it could say who it is. At most one such event in ten seconds, so that they do not push all other
    /// events out.
    pub fn stranger_refused(&mut self, now: Duration, from: &str, reason: &str) {
        if self.last_stranger.is_none_or(|last| now.saturating_sub(last) >= STRANGERS_EVERY) {
            self.last_stranger = Some(now);
            self.record_once(now, "worker_refused", format!("a worker at {from} was refused: {reason}"));
        }
    }

    fn admit(&mut self, now: Duration, hello: Hello) -> Result<Welcome, JoinRefusal> {
        let name = hello::check_hello(&hello)?;
        let version = *PROTOCOL_VERSIONS.end();
        if !(hello.version_min..=hello.version_max).contains(&version) {
            return Err(JoinRefusal::Version {
                ours: version,
                theirs_min: hello.version_min,
                theirs_max: hello.version_max,
            });
        }
        let known = self.nodes.get(&name);
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
            name: name.clone(),
            hello: hello.clone(),
        };
        self.record(now, "worker_joined", Some(name.as_str()), format!("{name} joined with {}", hello.device));
        if hello.model_digest == self.facts.digest {
            self.nodes.insert(name, node);
        } else {
            let reason = format!(
                "expected model {} with digest {}, found one with digest {}",
                self.facts.config.name, self.facts.digest, hello.model_digest
            );
            self.record(now, "wrong_model", Some(name.as_str()), format!("{name} cannot help: {reason}"));
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

    /// Call this once a worker has been welcomed and can receive messages.
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
}

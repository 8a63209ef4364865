//! What failures mean: whose fault they are, and whether the plan in force breaks.
//!
//! A broken plan is tried again after a pause, since most failures pass. A worker that fails several times in a row is a *suspect*:
//! the others take over without it as soon as they may; when they cannot, it is tried again. A worker that cannot help at all is
//! *excluded*: a worker with another model, one that refuses its assignment for good, one whose device hangs.

use std::time::Duration;

use grokpipe_proto::{
    HEARTBEAT_INTERVAL,
    ids::{Generation, PlanEpoch, WorkerName},
};

use super::{
    Cluster, Command, RETRY, Until,
    messages::{FrameFailed, StageBlocked, StageFailed},
};
use crate::request::RequestError;

/// Failures in a row that make a suspect.
const SUSPECT_AFTER: u32 = 3;
/// Frames in a row that may be refused before the plan counts as broken.
const REFUSALS_MAX: u32 = 3;
/// A stage that loads nothing for this long has failed.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// A stage that cannot reach the next one for this long has failed. Until then the next one may be starting.
const BLOCKED_MAX: Duration = Duration::from_secs(10);
/// A frame that is under way for this long is lost, whatever the stages report.
const LOST_FRAME_AFTER: Duration = Duration::from_secs(120);

impl Cluster {
    /// A stage could not be made ready, or broke.
    pub fn stage_failed(&mut self, now: Duration, name: &str, generation: Generation, failed: &StageFailed) {
        let current = self.is_current(failed.plan_epoch, failed.coordinator_generation);
        let Some(node) = self.present(name, generation) else { return };
        node.last_heard = now;
        // Only who runs a stage can break the plan.
        if !current || !self.runs_stage(name) {
            return;
        }
        let text = format!("{name}: {}", failed.message);
        self.record(now, "stage_failed", Some(name), text.clone());
        if let Some(node) = self.nodes.get_mut(name) {
            node.last_error = Some((now, failed.message.clone()));
            if !failed.retryable {
                node.excluded = Some(Until::Rejoin);
                self.changes += 1;
            }
        }
        // The neighbour of a dead worker often reports first. The dead worker must be named, not the neighbour.
        let culprit = if self.runs_stage(&failed.lost_peer) { &failed.lost_peer } else { name };
        self.break_stage_of(now, culprit, &failed.message, text);
        self.advance(now);
    }

    /// A stage has its layers but cannot reach the next one. It keeps trying.
    pub fn stage_blocked(&mut self, now: Duration, name: &str, generation: Generation, blocked: &StageBlocked) {
        let current = self.is_current(blocked.plan_epoch, blocked.coordinator_generation);
        let Some(node) = self.present(name, generation) else { return };
        node.last_heard = now;
        let Some(stage) = self.stage_mut(name).filter(|stage| current && !stage.ready) else { return };
        let since = stage.blocked.as_ref().map_or(now, |(since, _)| *since);
        stage.blocked = Some((since, blocked.peer.clone()));
        let text = format!("{name} {}", blocked.reason);
        if self.trouble.as_ref() != Some(&text) {
            if let Some(node) = self.nodes.get_mut(name) {
                node.last_error = Some((now, blocked.reason.clone()));
            }
            self.record(now, "stage_blocked", Some(name), text.clone());
            self.trouble = Some(text);
        }
    }

    /// The link to the first stage broke or could not be opened, or the pipeline is stuck. Without a `culprit`, the first stage is
    /// blamed.
    pub fn pipeline_failed(&mut self, now: Duration, epoch: PlanEpoch, culprit: Option<&str>, reason: &str) {
        if epoch != self.epoch {
            return;
        }
        let Some(first) = self.active.as_ref().map(|active| active.stages[0].node.clone()) else { return };
        self.record(now, "pipeline_failed", culprit, reason.to_owned());
        let culprit = culprit.filter(|name| self.runs_stage(name)).unwrap_or(&first).to_owned();
        self.break_stage_of(now, &culprit, reason, reason.to_owned());
        self.advance(now);
    }

    /// A stage refused a frame for good. One refusal concerns its requests alone; several in a row concern the plan.
    pub fn frame_failed(&mut self, now: Duration, worker: &str, message: &str) {
        let Some(active) = &mut self.active else { return };
        active.refusals += 1;
        let (refusals, epoch) = (active.refusals, self.epoch);
        if let Some(node) = self.nodes.get_mut(worker) {
            node.last_error = Some((now, message.to_owned()));
        }
        self.record(now, "frame_refused", Some(worker), message.to_owned());
        if refusals >= REFUSALS_MAX {
            self.pipeline_failed(
                now,
                epoch,
                Some(worker),
                &format!("{refusals} frames in a row failed, the last: {message}"),
            );
        }
    }

    /// Whether this worker and generation may speak for the plan in force.
    pub fn may_report(&self, name: &str, failed: &FrameFailed) -> bool {
        self.is_current(failed.plan_epoch, failed.coordinator_generation) && self.runs_stage(name)
    }

    /// The oldest frame under way has `tokens` tokens and was sent `age` ago.
    pub fn watch_frame(&mut self, now: Duration, tokens: usize, age: Duration) {
        let Some(active) = self.active.as_ref().filter(|active| active.broken_since.is_none()) else { return };
        let usual =
            |name: &WorkerName| self.nodes.get(name).and_then(|node| node.steps.usual(tokens as u64)).unwrap_or(0.0);
        let all: f64 = active.stages.iter().map(|stage| usual(&stage.node)).sum();
        let limit = Duration::try_from_secs_f64(10.0 * all).unwrap_or(Duration::MAX).max(LOST_FRAME_AFTER);
        if age <= limit {
            return;
        }
        // The first stage that has done fewer frames than the one before it has not taken the frame, or not finished it.
        let done = |index: usize| {
            let beat = active.stages.get(index).and_then(|stage| self.nodes.get(&stage.node)?.heartbeat.as_ref());
            beat.map_or(0, |beat| beat.frames_total)
        };
        let behind = (1..active.stages.len()).find(|index| done(*index) < done(index - 1)).unwrap_or(0);
        let (name, epoch) = (active.stages[behind].node.clone(), self.epoch);
        let reason = format!("{name} gave no result of a step within {} s", limit.as_secs());
        self.pipeline_failed(now, epoch, Some(&name), &reason);
    }

    /// The stage that has been at one step for longest, in words, for the message of a timeout. A step shorter than the time between
    /// two heartbeats does not count: it has most likely ended since.
    pub fn slowest_step(&self, now: Duration) -> Option<String> {
        let active = self.active.as_ref()?;
        let step = |name: &WorkerName| {
            let node = self.nodes.get(name)?;
            let long = HEARTBEAT_INTERVAL.as_secs_f64();
            let beat = node.heartbeat.as_ref().filter(|beat| beat.step_rows > 0 && beat.step_age_seconds >= long)?;
            Some(beat.step_age_seconds + now.saturating_sub(node.last_heard).as_secs_f64())
        };
        let steps = active.stages.iter().filter_map(|stage| Some((stage, step(&stage.node)?)));
        let (stage, seconds) = steps.max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some(format!("{} with {}, {seconds:.1} s at one step", stage.node, stage.layers))
    }

    /// A worker's device has been at a step of `rows` rows for `age`. With 0 rows, no step is running.
    pub(super) fn watch_step(&mut self, now: Duration, name: &str, rows: u64, age: Duration) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if rows == 0 {
            if node.excluded == Some(Until::Idle) {
                node.excluded = None;
                self.changes += 1;
                self.record(now, "worker_recovered", Some(name), format!("{name}: its device has finished the step"));
                self.advance(now);
            }
            return;
        }
        if node.excluded.is_some() || age <= node.steps.limit(rows) {
            return;
        }
        node.excluded = Some(Until::Idle);
        let tokens = if rows == 1 { "1 token".to_owned() } else { format!("{rows} tokens") };
        let reason = format!("its device hangs in a step of {tokens}");
        node.last_error = Some((now, reason.clone()));
        self.changes += 1;
        let text = format!("{name} is left out: {reason}, so far {:.1} s", age.as_secs_f64());
        self.record(now, "worker_hangs", Some(name), text.clone());
        self.break_stage_of(now, name, &reason, text);
        self.advance(now);
    }

    /// Stages that are not ready and make no progress have failed.
    pub(super) fn watch_stages(&mut self, now: Duration) {
        let Some(active) = self.active.as_ref().filter(|active| active.broken_since.is_none()) else { return };
        let over = |since: Duration, limit: Duration| now.saturating_sub(since) >= limit;
        let failed = active.stages.iter().filter(|stage| !stage.ready).find_map(|stage| match &stage.blocked {
            Some((since, peer)) => over(*since, BLOCKED_MAX).then(|| (stage.node.clone(), Some(peer.clone()))),
            None => over(stage.progress_at, STALLED_AFTER).then(|| (stage.node.clone(), None)),
        });
        match failed {
            None => {}
            Some((name, Some(peer))) => {
                let reason = self.trouble.clone().unwrap_or_else(|| format!("{name} cannot reach {peer}"));
                // The worker that cannot be reached is more likely at fault. One that can reach nobody becomes a suspect, too.
                self.fail_often(&name, 1);
                let culprit = if self.runs_stage(&peer) { peer.as_str() } else { name.as_str() };
                self.give_up_stage(now, culprit, &reason);
            }
            Some((name, None)) => {
                let reason = format!("{name} has loaded nothing for {} s", STALLED_AFTER.as_secs());
                self.give_up_stage(now, &name, &reason);
            }
        }
    }

    /// A stage did not become ready in time: its worker is a suspect at once.
    fn give_up_stage(&mut self, now: Duration, name: &str, reason: &str) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.last_error = Some((now, reason.to_owned()));
        }
        self.fail_often(name, SUSPECT_AFTER);
        self.record(now, "stage_given_up", Some(name), reason.to_owned());
        self.break_stage_of(now, name, reason, reason.to_owned());
    }

    fn fail_often(&mut self, name: &str, times: u32) {
        if let Some(node) = self.nodes.get_mut(name) {
            let before = node.failures;
            node.failures = before.saturating_add(times);
            if before < SUSPECT_AFTER && node.failures >= SUSPECT_AFTER {
                self.changes += 1;
            }
        }
    }

    /// Whether a worker failed so many times in a row that others should take over.
    pub(super) fn is_suspect(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.failures >= SUSPECT_AFTER)
    }

    /// A stage's worker is to blame: the plan in force is broken. `reason` goes to the requests that end, `trouble` into the verdict.
    pub(super) fn break_stage_of(&mut self, now: Duration, name: &str, reason: &str, trouble: String) {
        let Some(active) = &mut self.active else { return };
        let Some(stage) = active.stages.iter_mut().find(|stage| stage.node == *name) else { return };
        stage.ready = false;
        (active.connected, active.proven) = (false, false);
        active.retry_at = Some(now + self.retry_pause);
        if active.broken_since.is_none() {
            active.broken_since = Some(now);
            self.failing_since.get_or_insert(now);
            self.retry_pause = (self.retry_pause * 2).min(RETRY.1);
            self.commands.push(Command::Interrupt(RequestError::WorkerLost {
                worker: name.to_owned(),
                layers: stage.layers,
                reason: reason.to_owned(),
            }));
            self.trouble = Some(trouble);
            self.fail_often(name, 1);
        }
    }
}

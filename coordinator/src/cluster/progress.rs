//! How a plan comes to serve, as the workers report it: loading, ready, connected, proven by a first token, measured by every step.
//!
//! What a failure means is decided in `failures`.

use std::time::Duration;

use grokpipe_proto::ids::{Generation, PlanEpoch};

use super::{
    Active, Cluster, Command, RETRY,
    messages::{Heartbeat, LoadProgress, StageReady, StageTiming},
};
use crate::pipeline::FirstStage;

impl Cluster {
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

    /// A stage has loaded more.
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
        // A second report, or one of a worker without a stage, must not open the pipeline again: frames under way would be lost.
        let Some(stage) = active.stages.iter_mut().find(|stage| stage.node == *name && !stage.ready) else { return };
        stage.ready = true;
        stage.blocked = None;
        if active.broken_since.is_none() && active.stages.iter().all(|stage| stage.ready) {
            let first = active.stages[0].node.clone();
            let address = self.nodes.get(&first).map(|node| node.hello.data_address.clone()).unwrap_or_default();
            let token = self.settings.link_key.frames(epoch, 0);
            let first = FirstStage { epoch, address, worker: first.to_string(), token };
            self.commands.push(Command::OpenPipeline(first));
        }
    }

    /// The link to the first stage is open.
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

    /// A micro-batch of `tokens` tokens came back after `seconds`. Every one shows how long a step may take; those of the size that the
    /// plan was made for also show how good its prediction is.
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
        if tokens == self.settings.requirements.batch_tokens as usize {
            active.measured.step(seconds, timings);
        }
    }
}

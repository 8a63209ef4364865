//! When a plan is made, of which workers, and how it is put in force.

use std::{collections::BTreeMap, time::Duration};

use grokpipe_proto::ids::{Generation, WorkerName};

use super::{
    Active, Cluster, Command, Node, SETTLE, StageState,
    measured::Measured,
    messages::{Assignment, Order},
    steps::StepTimes,
};
use crate::{
    facts,
    planner::{self, Plan, PreviousStage, WorkerResources},
};

impl Cluster {
    /// The plan that is in force, or the one that the workers present would get.
    ///
    /// # Errors
    /// Why there is none.
    pub fn plan(&self) -> Result<(Plan, Vec<WorkerName>), planner::Refusal> {
        if let Some(active) = &self.active {
            return Ok((active.plan.clone(), active.stages.iter().map(|stage| stage.node.clone()).collect()));
        }
        let names = self.candidates();
        let plan = self.solve(&names)?;
        let order = plan.stages.iter().map(|stage| names[stage.worker].clone()).collect();
        Ok((plan, order))
    }

    /// Workers that have no layers under the plan in force.
    pub fn standby(&self) -> Vec<WorkerName> {
        let used = |name: &str| {
            self.active.as_ref().is_some_and(|active| active.stages.iter().any(|stage| stage.node == *name))
        };
        let spare = self.nodes.values().filter(|node| node.present && !used(&node.name));
        spare.map(|node| node.name.clone()).collect()
    }

    pub(super) fn advance(&mut self, now: Duration) {
        let Some(active) = &self.active else { return self.plan_when_due(now) };
        let names: Vec<WorkerName> = active.stages.iter().map(|stage| stage.node.clone()).collect();
        let blameless = !names.iter().any(|name| self.is_suspect(name));
        let waited = self.failing_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        let others_may = waited >= self.settings.replan_after || !self.standby_fit().is_empty();
        if active.broken_since.is_none() {
            // Another try is under way. Who is known to fail is not waited for when there are others.
            if !active.proven && !blameless && others_may && self.blameless_plan().is_some() {
                self.replan(now);
            }
            return;
        }
        let retry_due = active.retry_at.is_none_or(|at| now >= at);
        let whole = names.iter().all(|name| self.is_usable(name));
        if others_may && !(whole && blameless) && self.replan(now) {
            return;
        }
        if let Some(active) = self.active.as_ref().filter(|_| whole && retry_due) {
            let plan = active.plan.clone();
            self.start_epoch(now, plan, &names);
        }
    }

    /// Spare workers that could take over a lost stage at once.
    fn standby_fit(&self) -> Vec<WorkerName> {
        self.standby().into_iter().filter(|name| self.is_usable(name) && !self.is_suspect(name)).collect()
    }

    fn is_usable(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.present && node.excluded.is_none())
    }

    fn plan_when_due(&mut self, now: Duration) {
        let missing = self.settings.expected.iter().any(|worker| {
            // A worker that is there but cannot help is not waited for.
            self.nodes.get(worker.name.as_str()).is_none_or(|node| !node.present)
        });
        let waited = now.saturating_sub(self.last_join);
        let due = if self.settings.expected.is_empty() {
            waited >= SETTLE
        } else {
            !missing || waited >= self.settings.replan_after
        };
        if due && !self.candidates().is_empty() {
            self.replan(now);
        }
    }

    /// Workers that a plan may be made of, without suspects if they can be done without.
    fn candidates(&self) -> Vec<WorkerName> {
        let usable = || self.nodes.keys().filter(|name| self.is_usable(name)).cloned().collect();
        self.blameless_plan().unwrap_or_else(usable)
    }

    /// The usable workers that are no suspects, if a plan can be made of them.
    fn blameless_plan(&self) -> Option<Vec<WorkerName>> {
        let fit = self.nodes.keys().filter(|name| self.is_usable(name) && !self.is_suspect(name));
        let names: Vec<WorkerName> = fit.cloned().collect();
        self.solve(&names).is_ok().then_some(names)
    }

    fn solve(&self, names: &[WorkerName]) -> Result<Plan, planner::Refusal> {
        // Pins describe the whole cluster: without one of the pinned workers they cannot all hold, and serving comes first.
        let mut pinned = self.settings.expected.iter().filter(|worker| worker.layers.is_some());
        let pins_hold = pinned.all(|worker| names.iter().any(|name| *name == *worker.name));
        let workers: Vec<_> =
            names.iter().filter_map(|name| self.nodes.get(name)).map(|node| self.resources(node, pins_hold)).collect();
        let previous = self.active.as_ref().map(|active| {
            let kept = active.stages.iter().filter_map(|stage| {
                let worker = names.iter().position(|name| *name == stage.node)?;
                Some(PreviousStage { worker, layers: stage.layers })
            });
            kept.collect()
        });
        planner::plan(&self.facts.problem(&self.settings.requirements, workers, previous))
    }

    fn resources(&self, node: &Node, pins_hold: bool) -> WorkerResources {
        let hello = &node.hello;
        let expected = self.settings.expected.iter().find(|worker| worker.name == hello.name);
        let held = hello.held_layer_start..hello.held_layer_end;
        let current =
            self.active.as_ref().and_then(|active| active.stages.iter().find(|stage| stage.node == node.name));
        WorkerResources {
            pinned_layers: expected.filter(|_| pins_hold).and_then(|worker| worker.layers.clone()),
            held_layers: current.map(|stage| stage.layers.iter()).or((!held.is_empty()).then_some(held)),
            ..facts::resources(hello)
        }
    }

    /// Makes a new plan, if anything changed since the last try; whether it is in force.
    fn replan(&mut self, now: Duration) -> bool {
        if self.planned_for == Some(self.changes) {
            return false;
        }
        self.planned_for = Some(self.changes);
        let names = self.candidates();
        match self.solve(&names) {
            Ok(plan) => {
                let order: Vec<WorkerName> = plan.stages.iter().map(|stage| names[stage.worker].clone()).collect();
                self.refusal = None;
                self.start_epoch(now, plan, &order);
                true
            }
            Err(refusal) => {
                let text = refusal.to_string();
                self.record(now, "no_plan", None, format!("no plan: {text}"));
                self.refusal = Some(text);
                false
            }
        }
    }

    /// Puts a plan in force: a new epoch, and every node is told its part.
    fn start_epoch(&mut self, now: Duration, plan: Plan, names: &[WorkerName]) {
        self.epoch = self.epoch.next();
        let stages: Vec<StageState> = plan
            .stages
            .iter()
            .zip(names)
            .map(|(stage, name)| StageState {
                node: name.clone(),
                layers: stage.layers,
                ready: false,
                progress_at: now,
                blocked: None,
            })
            .collect();
        let mut previous_generation = self.settings.generation;
        for (index, stage) in stages.iter().enumerate() {
            let next = stages.get(index + 1).and_then(|next| self.nodes.get(&next.node));
            let assignment = self.assignment(index, stage, next, previous_generation);
            let before =
                self.active.as_ref().and_then(|active| active.stages.iter().find(|old| old.node == stage.node));
            let kept = before.is_some_and(|before| before.layers == stage.layers);
            let Some(node) = self.nodes.get_mut(&stage.node) else { continue };
            node.load = None;
            if !kept {
                node.steps = StepTimes::default();
            }
            previous_generation = node.hello.generation;
            self.commands.push(Command::Send {
                node: stage.node.clone(),
                generation: node.hello.generation,
                order: Order::Assign(assignment),
            });
        }
        for node in self.nodes.values().filter(|node| node.present && !names.contains(&node.name)) {
            self.commands.push(Command::Send {
                node: node.name.clone(),
                generation: node.hello.generation,
                order: Order::Release { plan_epoch: self.epoch },
            });
        }
        let text: Vec<String> =
            stages.iter().map(|stage| format!("{} {}", stage.node, stage.layers.numbers())).collect();
        self.record(now, "plan_changed", None, format!("plan epoch {}: {}", self.epoch, text.join(", ")));
        self.tell_mixed_numerics(now, names);
        self.active = Some(Active {
            plan,
            stages,
            connected: false,
            proven: false,
            used: false,
            refusals: 0,
            broken_since: None,
            retry_at: None,
            measured: Measured::default(),
        });
    }

    /// Workers whose fingerprints differ compute other bits, so tokens depend on who runs which layers.
    fn tell_mixed_numerics(&mut self, now: Duration, names: &[WorkerName]) {
        let mut kinds: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for name in names {
            if let Some(node) = self.nodes.get(name) {
                kinds.entry(&node.hello.fingerprint).or_default().push(name);
            }
        }
        if kinds.len() > 1 {
            let kinds: Vec<String> =
                kinds.iter().map(|(kind, workers)| format!("{} as {kind:?}", workers.join(", "))).collect();
            let text = format!(
                "the workers do not compute alike, so tokens depend on who runs which layers: {}",
                kinds.join("; ")
            );
            self.record_once(now, "mixed_numerics", text);
        }
    }

    fn assignment(
        &self,
        index: usize,
        stage: &StageState,
        next: Option<&Node>,
        previous_generation: Generation,
    ) -> Assignment {
        let settings = &self.settings;
        let key = &settings.link_key;
        let next_token = match next {
            Some(_) => key.frames(self.epoch, index + 1),
            None => key.results(self.epoch),
        };
        Assignment {
            plan_epoch: self.epoch,
            layer_start: stage.layers.start(),
            layer_end: stage.layers.end(),
            model_digest: self.facts.digest.clone(),
            model_name: self.facts.config.name.clone(),
            next_address: next.map(|node| node.hello.data_address.clone()).unwrap_or_default(),
            next_worker: next.map(|node| node.name.to_string()).unwrap_or_default(),
            previous_generation,
            kv_blocks: settings.kv_blocks,
            max_batch_tokens: settings.requirements.max_batch_tokens as u32,
            max_frames_in_flight: settings.max_frames_in_flight,
            coordinator_generation: settings.generation,
            link_token: key.frames(self.epoch, index),
            next_token,
        }
    }
}

//! The cluster as others see it: one [`ClusterSnapshot`], from which page, health, status and gRPC are all made.

use std::time::Duration;

use grokpipe_proto::{
    ids::LayerRange,
    snapshot::{
        ClusterSnapshot, NodeState, SnapshotEvent, SnapshotLoad, SnapshotModel, SnapshotNode, SnapshotPlan,
        SnapshotRequests, SnapshotStage, VerdictInput, verdict,
    },
};

use super::{Active, Cluster, Node};

impl Cluster {
    /// Everything there is to see at `now`.
    pub fn snapshot(&self, now: Duration, requests: SnapshotRequests) -> ClusterSnapshot {
        let layers = self.facts.config.num_hidden_layers;
        let plan = self.active.as_ref().map(|active| self.plan_view(active));
        let mut nodes: Vec<SnapshotNode> = self.nodes.values().map(|node| self.node_view(now, node)).collect();
        for worker in &self.settings.expected {
            if !self.nodes.contains_key(worker.name.as_str()) {
                let layers = worker.layers.clone().and_then(|layers| LayerRange::try_from(layers).ok());
                nodes.push(SnapshotNode {
                    layers: layers.map(Into::into),
                    ..SnapshotNode::new(worker.name.clone(), NodeState::Down)
                });
            }
        }
        let order = |name: &str| {
            let planned = plan.as_ref().and_then(|plan| plan.stages.iter().position(|stage| stage.node == name));
            planned.unwrap_or(usize::MAX)
        };
        nodes.sort_by(|a, b| order(&a.name).cmp(&order(&b.name)).then_with(|| a.name.cmp(&b.name)));
        let verdict = verdict(VerdictInput {
            layers,
            plan: plan.as_ref(),
            nodes: &nodes,
            workers_expected: self.settings.expected.len() as u32,
            refusal: self.refusal.as_deref(),
            serving: self.is_serving(),
            trouble: self.trouble.as_deref(),
        });
        let age = |at: Duration| now.saturating_sub(at).as_secs_f64();
        let events = self.events.iter().map(|event| SnapshotEvent {
            id: event.id,
            age_seconds: age(event.at),
            code: event.code.to_owned(),
            node: event.node.clone(),
            text: event.text.clone(),
        });
        ClusterSnapshot {
            cluster: self.settings.name.clone(),
            verdict: Some(verdict),
            model: Some(SnapshotModel { name: self.facts.config.name.clone(), layers }),
            events: events.collect(),
            plan,
            nodes,
            requests: Some(requests),
        }
    }

    fn plan_view(&self, active: &Active) -> SnapshotPlan {
        let stages = active.stages.iter();
        let stages =
            stages.map(|stage| SnapshotStage { node: stage.node.to_string(), layers: Some(stage.layers.into()) });
        let speed = active.measured.speed(self.settings.requirements.batch_tokens);
        SnapshotPlan {
            epoch: self.epoch.into(),
            predicted_tokens_per_second: Some(active.plan.predicted_tokens_per_second),
            measured_tokens_per_second: speed.map(|speed| speed.tokens_per_second),
            predicted_stream_tokens_per_second: Some(active.plan.predicted_stream_tokens_per_second),
            measured_stream_tokens_per_second: speed.map(|speed| speed.stream_tokens_per_second),
            stages: stages.collect(),
        }
    }

    fn node_view(&self, now: Duration, node: &Node) -> SnapshotNode {
        let hello = &node.hello;
        let stage = self
            .active
            .as_ref()
            .and_then(|active| active.stages.iter().find(|stage| stage.node == node.name).map(|stage| (active, stage)));
        let state = match stage {
            _ if !node.present => NodeState::Down,
            _ if node.excluded.is_some() => NodeState::Excluded,
            // Until the coordinator's own link stands, the first stage is not of use yet.
            Some((active, stage))
                if stage.ready && (active.connected || active.broken_since.is_some() || stage.layers.start() > 0) =>
            {
                NodeState::Ready
            }
            Some(_) => NodeState::Loading,
            None if self.active.is_some() => NodeState::Standby,
            None => NodeState::Joining,
        };
        let age = |at: Duration| now.saturating_sub(at).as_secs_f64();
        SnapshotNode {
            layers: stage.map(|(_, stage)| stage.layers.into()),
            address: Some(hello.data_address.clone()),
            device: Some(hello.device.clone()),
            pid: Some(hello.pid),
            load: node.load.map(|(bytes, total)| SnapshotLoad { bytes: Some(bytes), bytes_total: Some(total) }),
            stats: node.heartbeat.as_ref().map(|beat| beat.stats),
            heartbeat_age_seconds: Some(age(node.last_heard)),
            last_error: node.last_error.as_ref().map(|(_, text)| text.clone()),
            last_error_age_seconds: node.last_error.as_ref().map(|(at, _)| age(*at)),
            joins: node.joins,
            ..SnapshotNode::new(hello.name.clone(), state)
        }
    }
}

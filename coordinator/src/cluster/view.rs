//! The cluster as others see it: one [`ClusterSnapshot`], from which page, health, status and gRPC are all made.

use std::time::Duration;

use grokpipe_proto::snapshot::{
    ClusterSnapshot, LayerSpan, NodeState, SnapshotEvent, SnapshotLoad, SnapshotMemory, SnapshotModel, SnapshotNode,
    SnapshotPlan, SnapshotRequests, SnapshotStage, VerdictInput, verdict,
};

use super::{Active, Cluster, Node};

impl Cluster {
    /// Everything there is to see at `now`.
    pub fn snapshot(&self, now: Duration, requests: SnapshotRequests) -> ClusterSnapshot {
        let layers = self.facts.config.num_hidden_layers;
        let plan = self.active.as_ref().map(|active| self.plan_view(active));
        let mut nodes: Vec<SnapshotNode> = self.nodes.values().map(|node| self.node_view(now, node)).collect();
        for worker in &self.settings.expected {
            if !self.nodes.contains_key(&worker.name) {
                let layers = worker.layers.as_ref().and_then(|layers| LayerSpan::new(layers.start, layers.end).ok());
                nodes.push(SnapshotNode { layers, ..SnapshotNode::new(worker.name.clone(), NodeState::Down) });
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
            verdict,
            model: SnapshotModel { name: self.facts.config.name.clone(), layers },
            events: events.collect(),
            plan,
            nodes,
            requests,
        }
    }

    fn plan_view(&self, active: &Active) -> SnapshotPlan {
        let stages = active.stages.iter().filter_map(|stage| {
            let layers = LayerSpan::new(stage.layers.start, stage.layers.end).ok()?;
            Some(SnapshotStage { node: stage.node.clone(), layers })
        });
        let speed = active.measured.speed(self.settings.wishes.batch_tokens);
        SnapshotPlan {
            epoch: self.epoch,
            predicted_tokens_per_second: Some(active.plan.predicted_tokens_per_second),
            measured_tokens_per_second: speed.map(|speed| speed.tokens_per_second),
            predicted_stream_tokens_per_second: Some(active.plan.predicted_stream_tokens_per_second),
            measured_stream_tokens_per_second: speed.map(|speed| speed.stream_tokens_per_second),
            stages: stages.collect(),
        }
    }

    fn node_view(&self, now: Duration, node: &Node) -> SnapshotNode {
        let hello = &node.hello;
        let stage = self.active.as_ref().and_then(|active| {
            active.stages.iter().find(|stage| stage.node == hello.name).map(|stage| (active, stage))
        });
        let state = match stage {
            _ if !node.present => NodeState::Down,
            _ if node.excluded.is_some() => NodeState::Excluded,
            // Until the coordinator's own link stands, the first stage is not of use yet.
            Some((active, stage))
                if stage.ready && (active.connected || active.broken_since.is_some() || stage.layers.start > 0) =>
            {
                NodeState::Ready
            }
            Some(_) => NodeState::Loading,
            None if self.active.is_some() => NodeState::Standby,
            None => NodeState::Joining,
        };
        let age = |at: Duration| now.saturating_sub(at).as_secs_f64();
        let beat = node.heartbeat.as_ref();
        SnapshotNode {
            layers: stage.and_then(|(_, stage)| LayerSpan::new(stage.layers.start, stage.layers.end).ok()),
            address: Some(hello.data_address.clone()),
            device: Some(hello.device.clone()),
            pid: Some(hello.pid),
            memory: SnapshotMemory {
                weights_bytes: beat.map(|beat| beat.weights_bytes),
                kv_bytes: beat.map(|beat| beat.kv_bytes),
                free_bytes: beat.map(|beat| beat.free_bytes),
                rss_bytes: beat.map(|beat| beat.rss_bytes).filter(|bytes| *bytes > 0),
            },
            load: SnapshotLoad {
                bytes: node.load.map(|(bytes, _)| bytes),
                bytes_total: node.load.map(|(_, total)| total),
            },
            tokens_per_second: beat.map(|beat| beat.tokens_per_second),
            step_seconds_p50: beat.map(|beat| beat.step_seconds_p50).filter(|seconds| *seconds > 0.0),
            heartbeat_age_seconds: Some(age(node.last_heard)),
            last_error: node.last_error.as_ref().map(|(_, text)| text.clone()),
            last_error_age_seconds: node.last_error.as_ref().map(|(at, _)| age(*at)),
            queue_depth: beat.map(|beat| beat.queue_depth),
            idle_ratio: beat.map(|beat| beat.idle_ratio),
            joins: node.joins,
            ..SnapshotNode::new(hello.name.clone(), state)
        }
    }
}

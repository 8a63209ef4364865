//! The snapshot to and from its gRPC messages, nothing lost either way.
//!
//! Towards the wire nothing can fail. From the wire every part that the domain type needs is checked, so that a reader of a
//! [`ClusterSnapshot`] never meets a range that ends before it starts or a state that this build does not know.

use super::{
    ClusterSnapshot, LayerSpan, NodeState, SnapshotEvent, SnapshotLoad, SnapshotMemory, SnapshotModel, SnapshotNode,
    SnapshotPlan, SnapshotRequests, SnapshotStage, Verdict, VerdictPhase,
};
use crate::v1;

/// Why a snapshot could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// A part that every snapshot has is absent.
    #[error("expected \"{field}\" in the cluster snapshot, found none")]
    Missing {
        /// The part.
        field: &'static str,
    },
    /// A range that ends before it starts.
    #[error("expected a layer range [start, end) with start <= end, found [{start}, {end})")]
    Span {
        /// Start found.
        start: u32,
        /// End found.
        end: u32,
    },
    /// A value of an enumeration that this build does not know.
    #[error("expected a known \"{field}\", found number {found}")]
    Unknown {
        /// The field.
        field: &'static str,
        /// Number found.
        found: i32,
    },
}

impl From<LayerSpan> for v1::LayerSpan {
    fn from(span: LayerSpan) -> Self {
        Self { start: span.start(), end: span.end() }
    }
}

impl TryFrom<v1::LayerSpan> for LayerSpan {
    type Error = SnapshotError;

    fn try_from(span: v1::LayerSpan) -> Result<Self, SnapshotError> {
        Self::new(span.start, span.end)
    }
}

impl From<NodeState> for v1::NodeState {
    fn from(state: NodeState) -> Self {
        match state {
            NodeState::Joining => Self::Joining,
            NodeState::Loading => Self::Loading,
            NodeState::Ready => Self::Ready,
            NodeState::Standby => Self::Standby,
            NodeState::Draining => Self::Draining,
            NodeState::Down => Self::Down,
            NodeState::Excluded => Self::Excluded,
        }
    }
}

fn node_state(found: i32) -> Result<NodeState, SnapshotError> {
    match v1::NodeState::try_from(found) {
        Ok(v1::NodeState::Joining) => Ok(NodeState::Joining),
        Ok(v1::NodeState::Loading) => Ok(NodeState::Loading),
        Ok(v1::NodeState::Ready) => Ok(NodeState::Ready),
        Ok(v1::NodeState::Standby) => Ok(NodeState::Standby),
        Ok(v1::NodeState::Draining) => Ok(NodeState::Draining),
        Ok(v1::NodeState::Down) => Ok(NodeState::Down),
        Ok(v1::NodeState::Excluded) => Ok(NodeState::Excluded),
        Ok(v1::NodeState::Unspecified) | Err(_) => Err(SnapshotError::Unknown { field: "nodes.state", found }),
    }
}

impl From<VerdictPhase> for v1::VerdictPhase {
    fn from(phase: VerdictPhase) -> Self {
        match phase {
            VerdictPhase::Waiting => Self::Waiting,
            VerdictPhase::Loading => Self::Loading,
            VerdictPhase::Serving => Self::Serving,
            VerdictPhase::Down => Self::Down,
        }
    }
}

fn verdict_phase(found: i32) -> Result<VerdictPhase, SnapshotError> {
    match v1::VerdictPhase::try_from(found) {
        Ok(v1::VerdictPhase::Waiting) => Ok(VerdictPhase::Waiting),
        Ok(v1::VerdictPhase::Loading) => Ok(VerdictPhase::Loading),
        Ok(v1::VerdictPhase::Serving) => Ok(VerdictPhase::Serving),
        Ok(v1::VerdictPhase::Down) => Ok(VerdictPhase::Down),
        Ok(v1::VerdictPhase::Unspecified) | Err(_) => Err(SnapshotError::Unknown { field: "verdict.phase", found }),
    }
}

impl From<Verdict> for v1::Verdict {
    fn from(verdict: Verdict) -> Self {
        Self {
            serving: verdict.serving,
            text: verdict.text,
            missing_layers: verdict.missing_layers.into_iter().map(Into::into).collect(),
            phase: v1::VerdictPhase::from(verdict.phase).into(),
        }
    }
}

impl TryFrom<v1::Verdict> for Verdict {
    type Error = SnapshotError;

    fn try_from(verdict: v1::Verdict) -> Result<Self, SnapshotError> {
        Ok(Self {
            serving: verdict.serving,
            phase: verdict_phase(verdict.phase)?,
            text: verdict.text,
            missing_layers: verdict.missing_layers.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<SnapshotPlan> for v1::SnapshotPlan {
    fn from(plan: SnapshotPlan) -> Self {
        let stage = |stage: SnapshotStage| v1::SnapshotStage { node: stage.node, layers: Some(stage.layers.into()) };
        Self {
            epoch: plan.epoch,
            predicted_tokens_per_second: plan.predicted_tokens_per_second,
            measured_tokens_per_second: plan.measured_tokens_per_second,
            predicted_stream_tokens_per_second: plan.predicted_stream_tokens_per_second,
            measured_stream_tokens_per_second: plan.measured_stream_tokens_per_second,
            stages: plan.stages.into_iter().map(stage).collect(),
        }
    }
}

impl TryFrom<v1::SnapshotPlan> for SnapshotPlan {
    type Error = SnapshotError;

    fn try_from(plan: v1::SnapshotPlan) -> Result<Self, SnapshotError> {
        let stage = |stage: v1::SnapshotStage| {
            let layers = stage.layers.ok_or(SnapshotError::Missing { field: "plan.stages.layers" })?;
            Ok(SnapshotStage { node: stage.node, layers: layers.try_into()? })
        };
        Ok(Self {
            epoch: plan.epoch,
            predicted_tokens_per_second: plan.predicted_tokens_per_second,
            measured_tokens_per_second: plan.measured_tokens_per_second,
            predicted_stream_tokens_per_second: plan.predicted_stream_tokens_per_second,
            measured_stream_tokens_per_second: plan.measured_stream_tokens_per_second,
            stages: plan.stages.into_iter().map(stage).collect::<Result<_, SnapshotError>>()?,
        })
    }
}

impl From<SnapshotNode> for v1::SnapshotNode {
    fn from(node: SnapshotNode) -> Self {
        Self {
            name: node.name,
            state: v1::NodeState::from(node.state).into(),
            layers: node.layers.map(Into::into),
            address: node.address,
            device: node.device,
            pid: node.pid,
            weights_bytes: node.memory.weights_bytes,
            kv_bytes: node.memory.kv_bytes,
            free_bytes: node.memory.free_bytes,
            rss_bytes: node.memory.rss_bytes,
            load_bytes: node.load.bytes,
            load_bytes_total: node.load.bytes_total,
            tokens_per_second: node.tokens_per_second,
            step_seconds_p50: node.step_seconds_p50,
            heartbeat_age_seconds: node.heartbeat_age_seconds,
            last_error: node.last_error,
            last_error_age_seconds: node.last_error_age_seconds,
            queue_depth: node.queue_depth,
            idle_ratio: node.idle_ratio,
            joins: node.joins,
        }
    }
}

impl TryFrom<v1::SnapshotNode> for SnapshotNode {
    type Error = SnapshotError;

    fn try_from(node: v1::SnapshotNode) -> Result<Self, SnapshotError> {
        Ok(Self {
            name: node.name,
            state: node_state(node.state)?,
            layers: node.layers.map(TryInto::try_into).transpose()?,
            address: node.address,
            device: node.device,
            pid: node.pid,
            memory: SnapshotMemory {
                weights_bytes: node.weights_bytes,
                kv_bytes: node.kv_bytes,
                free_bytes: node.free_bytes,
                rss_bytes: node.rss_bytes,
            },
            load: SnapshotLoad { bytes: node.load_bytes, bytes_total: node.load_bytes_total },
            tokens_per_second: node.tokens_per_second,
            step_seconds_p50: node.step_seconds_p50,
            heartbeat_age_seconds: node.heartbeat_age_seconds,
            last_error: node.last_error,
            last_error_age_seconds: node.last_error_age_seconds,
            queue_depth: node.queue_depth,
            idle_ratio: node.idle_ratio,
            joins: node.joins,
        })
    }
}

impl From<ClusterSnapshot> for v1::ClusterSnapshot {
    fn from(snapshot: ClusterSnapshot) -> Self {
        let event = |event: SnapshotEvent| v1::SnapshotEvent {
            id: event.id,
            age_seconds: event.age_seconds,
            code: event.code,
            node: event.node,
            text: event.text,
        };
        let SnapshotRequests { running, waiting } = snapshot.requests;
        Self {
            cluster: snapshot.cluster,
            verdict: Some(snapshot.verdict.into()),
            model: Some(v1::SnapshotModel { name: snapshot.model.name, layers: snapshot.model.layers }),
            plan: snapshot.plan.map(Into::into),
            nodes: snapshot.nodes.into_iter().map(Into::into).collect(),
            requests: Some(v1::SnapshotRequests { running, waiting }),
            events: snapshot.events.into_iter().map(event).collect(),
        }
    }
}

impl TryFrom<v1::ClusterSnapshot> for ClusterSnapshot {
    type Error = SnapshotError;

    fn try_from(snapshot: v1::ClusterSnapshot) -> Result<Self, SnapshotError> {
        let missing = |field| SnapshotError::Missing { field };
        let model = snapshot.model.ok_or(missing("model"))?;
        let requests = snapshot.requests.ok_or(missing("requests"))?;
        let event = |event: v1::SnapshotEvent| SnapshotEvent {
            id: event.id,
            age_seconds: event.age_seconds,
            code: event.code,
            node: event.node,
            text: event.text,
        };
        Ok(Self {
            cluster: snapshot.cluster,
            verdict: snapshot.verdict.ok_or(missing("verdict"))?.try_into()?,
            model: SnapshotModel { name: model.name, layers: model.layers },
            plan: snapshot.plan.map(TryInto::try_into).transpose()?,
            nodes: snapshot.nodes.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            requests: SnapshotRequests { running: requests.running, waiting: requests.waiting },
            events: snapshot.events.into_iter().map(event).collect(),
        })
    }
}

//! The messages of `membership.proto` and `pipeline.proto`, as the cluster knows them, and back.
//!
//! A hello is checked by the cluster, which refuses it with the field's name. Later messages cannot be refused, so their texts are cut
//! and their figures made plausible here.

use grokpipe_model::footprint::KV_BLOCK_TOKENS;
use grokpipe_proto::{bounds, v1};

use crate::cluster::messages::{
    Assignment, BatchResult, ContentSum, DrawnToken, FormatRate, FrameFailed, Heartbeat, Hello, LoadProgress, Order,
    Report, StageBlocked, StageFailed, StageReady, StageTiming, StepOverhead, Welcome,
};

impl From<v1::Hello> for Hello {
    fn from(hello: v1::Hello) -> Self {
        let overhead = hello.step_overhead.unwrap_or_default();
        let rate = |rate: v1::FormatRate| FormatRate {
            format: rate.format,
            decode_bytes_per_second: rate.decode_bytes_per_second,
            prefill_flops_per_second: rate.prefill_flops_per_second,
        };
        Self {
            name: hello.name,
            generation: hello.generation.into(),
            version_min: hello.version_min,
            version_max: hello.version_max,
            device: hello.device,
            fingerprint: hello.fingerprint,
            memory_bytes: hello.memory_bytes,
            read_bandwidth: hello.read_bandwidth,
            flop_rate: hello.flop_rate,
            data_address: hello.data_address,
            pid: hello.pid,
            build: hello.build,
            model_digest: hello.model_digest,
            held_layer_start: hello.held_layer_start,
            held_layer_end: hello.held_layer_end,
            notes: hello.notes,
            format_rates: hello.format_rates.into_iter().map(rate).collect(),
            step_overhead: StepOverhead {
                step_seconds: overhead.step_seconds,
                layer_seconds: overhead.layer_seconds,
                draw_seconds: overhead.draw_seconds,
            },
        }
    }
}

/// What a worker reports; `None` for messages that do not concern the cluster.
pub(super) fn report(message: v1::join_request::Message) -> Option<Report> {
    use v1::join_request::Message;
    Some(match message {
        Message::Heartbeat(beat) => Report::Heartbeat(Heartbeat {
            frames_total: beat.frames_total,
            step_age_seconds: if beat.step_age_seconds.is_finite() { beat.step_age_seconds.max(0.0) } else { 0.0 },
            step_rows: beat.step_rows,
            stats: beat.stats.unwrap_or_default().plausible(),
        }),
        Message::LoadProgress(progress) => Report::LoadProgress(LoadProgress {
            plan_epoch: progress.plan_epoch.into(),
            coordinator_generation: progress.coordinator_generation.into(),
            bytes: progress.bytes,
            bytes_total: progress.bytes_total,
        }),
        Message::StageReady(ready) => Report::StageReady(StageReady {
            plan_epoch: ready.plan_epoch.into(),
            coordinator_generation: ready.coordinator_generation.into(),
            contents: ready
                .contents
                .into_iter()
                .map(|said| ContentSum { part: said.part, sum: said.sum, confirmed: said.confirmed })
                .collect(),
        }),
        Message::StageFailed(failed) => Report::StageFailed(StageFailed {
            plan_epoch: failed.plan_epoch.into(),
            coordinator_generation: failed.coordinator_generation.into(),
            message: bounds::cut(failed.message, bounds::REASON_BYTES_MAX),
            retryable: failed.retryable,
            is_out_of_memory: failed.out_of_memory,
            lost_peer: bounds::cut(failed.lost_peer, bounds::NAME_BYTES_MAX),
        }),
        Message::StageBlocked(blocked) => Report::StageBlocked(StageBlocked {
            plan_epoch: blocked.plan_epoch.into(),
            coordinator_generation: blocked.coordinator_generation.into(),
            peer: bounds::cut(blocked.peer, bounds::NAME_BYTES_MAX),
            reason: bounds::cut(blocked.reason, bounds::REASON_BYTES_MAX),
        }),
        Message::FrameFailed(failed) => Report::FrameFailed(FrameFailed {
            plan_epoch: failed.plan_epoch.into(),
            coordinator_generation: failed.coordinator_generation.into(),
            micro_batch_id: failed.micro_batch_id.into(),
            message: bounds::cut(failed.message, bounds::REASON_BYTES_MAX),
            worker: bounds::cut(failed.worker, bounds::NAME_BYTES_MAX),
        }),
        // A second hello changes nothing; a probe's report goes to the caller of the probe.
        Message::Hello(_) | Message::ProbeReport(_) => return None,
    })
}

/// A welcome, as a message for the worker.
pub(super) fn welcome(welcome: Welcome) -> v1::JoinResponse {
    let Welcome { version, cluster, coordinator_generation, heartbeat_interval_ms } = welcome;
    let welcome =
        v1::Welcome { version, cluster, coordinator_generation: coordinator_generation.into(), heartbeat_interval_ms };
    v1::JoinResponse { message: Some(v1::join_response::Message::Welcome(welcome)) }
}

/// An order, as a message for the worker.
pub(super) fn order(order: Order) -> v1::JoinResponse {
    use v1::join_response::Message;
    let message = match order {
        Order::Assign(assignment) => Message::Assignment(assigned(assignment)),
        Order::Release { plan_epoch } => Message::Release(v1::Release { plan_epoch: plan_epoch.into() }),
    };
    v1::JoinResponse { message: Some(message) }
}

fn assigned(assignment: Assignment) -> v1::Assignment {
    v1::Assignment {
        plan_epoch: assignment.plan_epoch.into(),
        layer_start: assignment.layer_start,
        layer_end: assignment.layer_end,
        model_digest: assignment.model_digest,
        model_name: assignment.model_name,
        next_address: assignment.next_address,
        next_worker: assignment.next_worker,
        previous_generation: assignment.previous_generation.into(),
        kv_blocks: assignment.kv_blocks,
        kv_block_tokens: KV_BLOCK_TOKENS,
        max_batch_tokens: assignment.max_batch_tokens,
        max_frames_in_flight: assignment.max_frames_in_flight,
        activation_dtype: v1::ActivationDtype::F32 as i32,
        link_token: assignment.link_token.to_wire(),
        next_token: assignment.next_token.to_wire(),
        coordinator_generation: assignment.coordinator_generation.into(),
    }
}

/// A result of the last stage.
pub(super) fn result(result: v1::MicroBatchResult) -> BatchResult {
    let token = |token: v1::DrawnToken| DrawnToken {
        sequence: token.sequence_id.into(),
        token_id: token.token_id,
        logprob: token.logprob,
    };
    let timing = |timing: v1::StageTiming| StageTiming {
        worker: timing.worker,
        layer_start: timing.layer_start,
        layer_end: timing.layer_end,
        queue_us: timing.queue_us,
        compute_us: timing.compute_us,
    };
    BatchResult {
        plan_epoch: result.plan_epoch.into(),
        sender_generation: result.sender_generation.into(),
        micro_batch_id: result.micro_batch_id.into(),
        tokens: result.tokens.into_iter().map(token).collect(),
        timings: result.timings.into_iter().map(timing).collect(),
    }
}

#[cfg(test)]
mod tests {
    use v1::join_request::Message;

    use super::*;

    #[test]
    fn what_a_worker_says_later_is_bounded_as_its_hello_is() {
        let long = "é".repeat(3 << 20);
        let failed = v1::StageFailed { message: long.clone(), lost_peer: long.clone(), ..v1::StageFailed::default() };
        let Some(Report::StageFailed(failed)) = report(Message::StageFailed(failed)) else { panic!("another report") };
        assert!(failed.message.len() <= bounds::REASON_BYTES_MAX && failed.lost_peer.len() <= bounds::NAME_BYTES_MAX);
        let failed = v1::FrameFailed { message: long, ..v1::FrameFailed::default() };
        let Some(Report::FrameFailed(failed)) = report(Message::FrameFailed(failed)) else { panic!("another report") };
        assert!(failed.message.len() <= bounds::REASON_BYTES_MAX);
        let stats = Some(v1::NodeStats { idle_ratio: Some(-1.0), ..v1::NodeStats::default() });
        let beat = v1::Heartbeat { step_age_seconds: f64::NAN, stats, ..v1::Heartbeat::default() };
        assert_eq!(report(Message::Heartbeat(beat)), Some(Report::Heartbeat(Heartbeat::default())));
    }
}

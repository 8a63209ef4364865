//! A scheduler's micro-batch as the frame that enters the pipeline. Pure.

use grokpipe_proto::{
    ids::{Generation, PlanEpoch},
    v1::{self, Frame, SequenceOpen, SequenceSlice, WantedLogits},
};

use crate::{request::Sampling, scheduler::MicroBatch};

/// The frame of a micro-batch; `sampling` tells of each slice how its sequence's tokens are drawn, if it opens one.
pub fn frame_of(
    plan_epoch: PlanEpoch,
    sender_generation: Generation,
    batch: &MicroBatch,
    sampling: &[Option<Sampling>],
) -> Frame {
    let sequences = batch.slices.iter().enumerate().map(|(index, slice)| {
        let last = slice.first_position + slice.token_ids.len() as u32 - 1;
        let draw = slice.wants_token.then(|| WantedLogits { position: last, draw: true, target_ids: Vec::new() });
        let open = slice.opens.then(|| SequenceOpen {
            sampling: sampling.get(index).copied().flatten().map(wire_sampling),
            choice_index: 0,
            token_counts: Vec::new(),
        });
        SequenceSlice {
            sequence_id: slice.sequence.into(),
            first_position: slice.first_position,
            token_ids: slice.token_ids.clone(),
            new_blocks: slice.new_blocks.clone(),
            truncate_to: None,
            wanted: draw.into_iter().collect(),
            open,
        }
    });
    Frame {
        plan_epoch: plan_epoch.into(),
        sender_generation: sender_generation.into(),
        micro_batch_id: batch.id.into(),
        sequences: sequences.collect(),
        hidden_states: None,
        timings: Vec::new(),
        closed_sequences: batch.closed.iter().map(|id| id.0).collect(),
    }
}

fn wire_sampling(sampling: Sampling) -> v1::Sampling {
    let Sampling { temperature, top_k, top_p, min_p, seed } = sampling;
    v1::Sampling { temperature, top_k, top_p, min_p, seed }
}

//! Frames of all kinds against the three stages of a small plan.

use grokpipe_proto::v1::{self, HiddenStates, SequenceOpen, WantedLogits};

use super::*;

const EPOCH: u64 = 4;
/// Generation of whoever sends to the first, the middle and the last stage.
const GENERATIONS: [u64; 3] = [1, 11, 12];
const KV_BLOCKS: u32 = 128;
const VOCABULARY: usize = 131_072;
const WIDTH: usize = 32;
const ID: u64 = 1_000;

fn stage(index: usize) -> Sequences {
    Sequences::new(StageLimits {
        plan_epoch: EPOCH,
        previous_generation: GENERATIONS[index],
        kv_blocks: KV_BLOCKS,
        max_batch_tokens: 64,
        max_positions: 256,
        vocab_size: VOCABULARY,
        hidden_size: WIDTH,
        pad_token_id: 0,
        is_first: index == 0,
        is_last: index == 2,
    })
}

/// A new sequence of two tokens in one block.
fn slice(change: impl FnOnce(&mut SequenceSlice)) -> SequenceSlice {
    let sampling = v1::Sampling { top_p: 1.0, seed: 1, ..v1::Sampling::default() };
    let mut slice = SequenceSlice {
        sequence_id: ID,
        token_ids: vec![5, 6],
        new_blocks: vec![KV_BLOCKS - 1],
        open: Some(SequenceOpen { sampling: Some(sampling), ..SequenceOpen::default() }),
        ..SequenceSlice::default()
    };
    change(&mut slice);
    slice
}

fn drawing(change: impl FnOnce(&mut v1::Sampling)) -> SequenceSlice {
    slice(|slice| {
        if let Some(sampling) = slice.open.as_mut().and_then(|open| open.sampling.as_mut()) {
            change(sampling);
        }
    })
}

/// How a known sequence goes on.
fn later(first_position: u32, token_ids: Vec<u32>, new_blocks: Vec<u32>) -> SequenceSlice {
    SequenceSlice { sequence_id: ID, first_position, token_ids, new_blocks, ..SequenceSlice::default() }
}

fn states(rows: usize) -> HiddenStates {
    hidden_states::encode(&vec![0.5; rows * WIDTH], WIDTH)
}

fn frame(stage: usize, sequences: Vec<SequenceSlice>) -> Frame {
    let rows = sequences.iter().map(|slice| slice.token_ids.len()).sum();
    Frame {
        plan_epoch: EPOCH,
        sender_generation: GENERATIONS[stage],
        micro_batch_id: 1,
        hidden_states: (stage > 0).then(|| states(rows)),
        sequences,
        ..Frame::default()
    }
}

fn framed(stage: usize, change: impl FnOnce(&mut Frame)) -> (usize, Frame) {
    let mut frame = frame(stage, vec![slice(|_| ())]);
    change(&mut frame);
    (stage, frame)
}

fn first(slice: SequenceSlice) -> (usize, Frame) {
    (0, frame(0, vec![slice]))
}

fn last(slice: SequenceSlice) -> (usize, Frame) {
    (2, frame(2, vec![slice]))
}

fn hidden(change: impl FnOnce(&mut HiddenStates)) -> (usize, Frame) {
    framed(1, |frame| frame.hidden_states.as_mut().map_or((), change))
}

/// A frame that a fresh stage must refuse, and words that it must say.
type Case = (&'static str, (usize, Frame), RefusalReason, &'static [&'static str]);

fn assert_refused(cases: Vec<Case>) {
    for (name, (index, frame), reason, words) in cases {
        let mut sequences = stage(index);
        let refusal = sequences.accept(&frame).expect_err(name);
        assert_eq!(refusal.reason, reason, "{name}: {refusal:?}");
        for word in words {
            assert!(refusal.message.contains(word), "{name}: expected {word:?} in {:?}", refusal.message);
        }
        assert!(sequences.is_empty() && sequences.owners.is_empty(), "{name} changed something");
    }
}

use RefusalReason::{Checksum, Malformed, StaleEpoch, StaleGeneration};

#[test]
fn frames_of_another_epoch_or_sender_are_refused() {
    assert_refused(vec![
        ("epoch 0", framed(0, |f| f.plan_epoch = 0), StaleEpoch, &["epoch 4", "found 0"]),
        ("the epoch before", framed(1, |f| f.plan_epoch -= 1), StaleEpoch, &["epoch 4", "found 3"]),
        ("an epoch of tomorrow", framed(2, |f| f.plan_epoch = u64::MAX), StaleEpoch, &["epoch"]),
        ("generation 0", framed(0, |f| f.sender_generation = 0), StaleGeneration, &["generation 1", "found 0"]),
        ("generation of another", framed(1, |f| f.sender_generation = 1), StaleGeneration, &["generation 11"]),
        ("one of tomorrow", framed(2, |f| f.sender_generation = u64::MAX), StaleGeneration, &["generation 12"]),
    ]);
}

#[test]
fn frames_of_another_size_than_the_plan_allows_are_refused() {
    assert_refused(vec![
        ("no sequence", framed(0, |f| f.sequences.clear()), Malformed, &["1 to 64", "found 0"]),
        ("one token too many", first(slice(|s| s.token_ids = vec![5; 65])), Malformed, &["1 to 64", "found 65"]),
        ("far too many tokens", first(slice(|s| s.token_ids = vec![5; 5000])), Malformed, &["found 5000"]),
        (
            "a sequence without tokens",
            (0, frame(0, vec![slice(|_| ()), slice(|s| (s.sequence_id, s.token_ids) = (ID + 1, vec![]))])),
            Malformed,
            &["expected tokens"],
        ),
        (
            "a sequence twice",
            (0, frame(0, vec![slice(|_| ()), slice(|_| ())])),
            Malformed,
            &["once in a frame", "1000 twice"],
        ),
    ]);
}

#[test]
fn ids_and_positions_outside_the_model_are_refused() {
    assert_refused(vec![
        ("an id beyond the vocabulary", first(slice(|s| s.token_ids[1] = 131_072)), Malformed, &["131072"]),
        ("the largest id", last(slice(|s| s.token_ids[0] = u32::MAX)), Malformed, &["4294967295"]),
        ("an unknown sequence", first(slice(|s| s.open = None)), Malformed, &["to be open"]),
        (
            "an unknown sequence far on",
            first(slice(|s| (s.open, s.first_position) = (None, u32::MAX))),
            Malformed,
            &["to be open"],
        ),
        ("a new sequence in the middle", first(slice(|s| s.first_position = 5)), Malformed, &["position 0"]),
        ("cut beyond its end", first(slice(|s| s.truncate_to = Some(1))), Malformed, &["cut within"]),
    ]);
    // Five frames of 64 tokens are more than the 256 positions that there are.
    let mut sequences = stage(0);
    for index in 0..5 {
        let (from, blocks) = (64 * index, (4 * index..4 * index + 4).collect());
        let open = (index == 0).then(SequenceOpen::default);
        let next = SequenceSlice { open, ..later(from, vec![5; 64], blocks) };
        let accepted = sequences.accept(&frame(0, vec![next]));
        assert_eq!(accepted.is_ok(), index < 4, "{accepted:?}");
    }
}

#[test]
fn blocks_outside_the_pool_or_of_others_are_refused() {
    let with_block = |id, block| slice(|slice| (slice.sequence_id, slice.new_blocks) = (id, vec![block]));
    assert_refused(vec![
        ("a block beyond the pool", first(slice(|s| s.new_blocks = vec![KV_BLOCKS])), Malformed, &["KV blocks below"]),
        ("the largest block", last(slice(|s| s.new_blocks = vec![u32::MAX])), Malformed, &["KV blocks below"]),
        ("a block twice", first(slice(|s| s.new_blocks = vec![KV_BLOCKS - 1; 2])), Malformed, &["once"]),
        ("no blocks", first(slice(|s| s.new_blocks.clear())), Malformed, &["expected 1 KV blocks"]),
        ("too few blocks", first(slice(|s| s.token_ids = vec![5; 17])), Malformed, &["expected 2 KV blocks"]),
        (
            "two sequences with one block",
            (0, frame(0, vec![with_block(ID, 120), with_block(ID + 1, 120)])),
            Malformed,
            &["free KV block"],
        ),
    ]);
    let mut sequences = stage(0);
    sequences.accept(&frame(0, vec![with_block(ID, 120)])).unwrap();
    let refusal = sequences.accept(&frame(0, vec![with_block(ID + 1, 120)])).unwrap_err();
    assert_eq!(refusal.message, "expected a free KV block, found block 120 of sequence 1000");
}

#[test]
fn ways_to_draw_that_make_no_sense_are_refused() {
    let at = |position, draw, target_ids: Vec<u32>| WantedLogits { position, draw, target_ids };
    let wanting = |wanted: Vec<WantedLogits>| slice(|slice| slice.wanted = wanted);
    assert_refused(vec![
        ("temperature not a number", first(drawing(|s| s.temperature = f32::NAN)), Malformed, &["temperature"]),
        ("negative temperature", last(drawing(|s| s.temperature = -1.0)), Malformed, &["temperature"]),
        ("top_p of 0", last(drawing(|s| s.top_p = 0.0)), Malformed, &["top_p"]),
        ("top_p not a number", last(drawing(|s| s.top_p = f32::NAN)), Malformed, &["top_p"]),
        ("min_p of 2", last(drawing(|s| s.min_p = 2.0)), Malformed, &["min_p"]),
        ("a wanted position beyond", last(wanting(vec![at(2, true, vec![])])), Malformed, &["0..2", "found 2"]),
        (
            "wanted positions backwards",
            last(wanting(vec![at(1, true, vec![]), at(0, true, vec![])])),
            Malformed,
            &["ascending"],
        ),
        ("a wanted id beyond", last(wanting(vec![at(1, false, vec![131_072])])), Malformed, &["131072"]),
        (
            "a draw without sampling",
            last(slice(|s| {
                s.open = Some(SequenceOpen::default());
                s.wanted = vec![at(1, true, vec![])];
            })),
            Malformed,
            &["sampling"],
        ),
    ]);
}

#[test]
fn hidden_states_that_do_not_fit_their_frame_are_refused() {
    assert_refused(vec![
        ("into the first stage", framed(0, |f| f.hidden_states = Some(states(2))), Malformed, &["no hidden states"]),
        ("none into a later one", framed(1, |f| f.hidden_states = None), Malformed, &["found none"]),
        ("too few rows", hidden(|h| h.rows = 1), Malformed, &["rows"]),
        ("very many rows", hidden(|h| h.rows = u32::MAX), Malformed, &["rows"]),
        ("another width", hidden(|h| h.width = 33), Malformed, &["32"]),
        ("no width", hidden(|h| h.width = 0), Malformed, &["32"]),
        ("cut short", hidden(|h| h.data.truncate(100)), Malformed, &["100 bytes"]),
        ("no bytes", hidden(|h| h.data.clear()), Malformed, &["0 bytes"]),
        ("a byte too many", hidden(|h| h.data = [&h.data[..], &[0]].concat().into()), Malformed, &["257 bytes"]),
        ("no dtype", hidden(|h| h.dtype = 0), Malformed, &["dtype"]),
        ("dtype 99", hidden(|h| h.dtype = 99), Malformed, &["99"]),
        ("a wrong checksum", hidden(|h| h.crc32c ^= 1), Checksum, &["CRC32C"]),
        (
            "a flipped bit",
            hidden(|h| {
                let mut data = h.data.to_vec();
                data[17] ^= 4;
                h.data = data.into();
            }),
            Checksum,
            &["CRC32C"],
        ),
        (
            "not a number",
            framed(1, |f| f.hidden_states = Some(hidden_states::encode(&[f32::NAN; 2 * WIDTH], WIDTH))),
            Malformed,
            &["finite"],
        ),
    ]);
}

#[test]
fn a_good_frame_becomes_rows_tables_and_what_is_wanted_of_them() {
    let mut sequences = stage(2);
    let other = slice(|slice| (slice.sequence_id, slice.new_blocks) = (ID + 1, vec![7, 3]));
    let wanted = WantedLogits { position: 1, draw: true, target_ids: vec![9] };
    let asked = slice(|slice| (slice.token_ids, slice.wanted) = (vec![5, 0], vec![wanted]));
    let step = sequences.accept(&frame(2, vec![other, asked])).unwrap();
    let rows: Vec<_> = step.batch.rows.iter().map(|row| (row.position, row.table_offset, row.attended)).collect();
    assert_eq!(rows, [(0, 0, true), (1, 0, true), (0, 2, true), (1, 2, false)], "padding is never attended to");
    assert_eq!((step.batch.block_tables, step.token_ids), (vec![7, 3, KV_BLOCKS - 1], vec![5, 6, 5, 0]));
    assert_eq!((step.hidden.len(), step.wanted_rows), (4 * WIDTH, vec![3]));
    let wanted = &step.wanted[0];
    assert_eq!((wanted.sequence_id, wanted.position, wanted.target_ids.as_slice()), (ID, 1, [9].as_slice()));
    assert!(wanted.draw.is_some() && sequences.len() == 2);
    // Only the last stage looks at what is wanted.
    let wanted = WantedLogits { position: 1, draw: true, target_ids: vec![] };
    let step = stage(1).accept(&frame(1, vec![slice(|slice| slice.wanted = vec![wanted])])).unwrap();
    assert!(step.wanted.is_empty() && step.wanted_rows.is_empty());
}

#[test]
fn a_frame_that_comes_twice_gives_the_same_step_twice() {
    let mut sequences = stage(0);
    let frames = [
        frame(0, vec![slice(|slice| (slice.token_ids, slice.new_blocks) = (vec![5; 16], vec![9]))]),
        frame(0, vec![later(16, vec![6], vec![4])]),
        frame(0, vec![later(17, vec![7], vec![])]),
    ];
    for frame in &frames {
        let steps = [(); 2].map(|()| sequences.accept(frame).unwrap());
        assert_eq!(steps[0].batch, steps[1].batch);
    }
    assert_eq!((sequences.len(), sequences.owners.len()), (1, 2));
}

#[test]
fn a_sequence_that_is_cut_goes_on_from_there_with_its_blocks() {
    let mut sequences = stage(0);
    sequences.accept(&frame(0, vec![slice(|slice| slice.token_ids = vec![5; 10])])).unwrap();
    let gap = sequences.accept(&frame(0, vec![later(11, vec![6], vec![])])).unwrap_err();
    assert!(gap.message.contains("position 10 or before, found 11"), "{gap:?}");
    let cut = SequenceSlice { truncate_to: Some(4), ..later(4, vec![6], vec![]) };
    let step = sequences.accept(&frame(0, vec![cut])).unwrap();
    assert_eq!((step.batch.rows[0].position, step.batch.block_tables), (4, vec![KV_BLOCKS - 1]));
    let gap = sequences.accept(&frame(0, vec![later(6, vec![6], vec![])])).unwrap_err();
    assert!(gap.message.contains("position 5 or before"), "{gap:?}");
}

#[test]
fn a_refused_frame_changes_nothing_but_what_it_closes() {
    let mut sequences = stage(0);
    sequences.accept(&frame(0, vec![slice(|_| ())])).unwrap();
    let next = |block| slice(|slice| (slice.sequence_id, slice.new_blocks) = (ID + 1, vec![block]));
    let bad = Frame { closed_sequences: vec![ID], ..frame(0, vec![next(KV_BLOCKS)]) };
    assert!(sequences.accept(&bad).is_err());
    assert!(sequences.is_empty() && sequences.owners.is_empty());
    // The block is free again, and closing what is closed is no fault: a frame may be sent twice.
    let good = Frame { closed_sequences: vec![ID, 99], ..frame(0, vec![next(KV_BLOCKS - 1)]) };
    assert!(sequences.accept(&good).is_ok());
    // Frames of another plan close nothing.
    let stale = Frame { plan_epoch: EPOCH - 1, closed_sequences: vec![ID + 1], ..frame(0, vec![next(5)]) };
    assert!(sequences.accept(&stale).is_err());
    assert_eq!(sequences.len(), 1);
}

//! The scheduler against a model of a cluster that checks every slice the way a stage would, under random events.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

mod fairness;

/// The client of sequences whose client does not matter.
const ANYBODY: ClientId = 0;

fn config() -> SchedulerConfig {
    SchedulerConfig {
        stages: 2,
        kv_blocks: 64,
        block_tokens: 16,
        prefill_chunk_tokens: 32,
        max_batch_tokens: 512,
        max_context: 512,
        max_batch_sequences: 64,
        max_waiting: 100,
        max_running: 100,
    }
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|position| 100 + position).collect()
}

/// All micro-batches that may start now.
fn issue_all(scheduler: &mut Scheduler) -> Vec<MicroBatch> {
    let batches = std::iter::from_fn(|| scheduler.next_micro_batch()).collect();
    scheduler.check_invariants();
    batches
}

/// Completes a micro-batch with token 7 for everybody who wants one.
fn complete(scheduler: &mut Scheduler, batch: &MicroBatch) -> Vec<Completion> {
    let wanting = batch.slices.iter().filter(|slice| slice.wants_token);
    let drawn: Vec<(SequenceId, u32)> = wanting.map(|slice| (slice.sequence, 7)).collect();
    let completions = scheduler.complete(batch.id, &drawn).unwrap();
    scheduler.check_invariants();
    completions
}

/// Whether a sequence has drawn all its tokens.
fn rests(scheduler: &Scheduler, id: SequenceId) -> bool {
    scheduler.sequences[&id].at_limit()
}

/// Nobody waits or runs, nothing is under way, every block is free.
fn assert_empty(scheduler: &Scheduler) {
    assert_eq!((scheduler.running(), scheduler.waiting(), scheduler.in_flight.len()), (0, 0, 0));
    assert_eq!((scheduler.pool.free(), scheduler.pool.reserved()), (scheduler.pool.total(), 0));
}

/// A scheduler in which `count` sequences have drawn their first token and wait for the next step.
fn decoding(config: SchedulerConfig, count: u64) -> Scheduler {
    let mut scheduler = Scheduler::new(config);
    for id in 0..count {
        scheduler.submit(SequenceId(id), ANYBODY, prompt(3), 20).unwrap();
    }
    while scheduler.sequences.values().any(|sequence| !sequence.is_decoding()) {
        let batch =
            scheduler.prefill_ready.pop_first().map(|(_, id)| scheduler.issue(Kind::Prefill, vec![id])).unwrap();
        complete(&mut scheduler, &batch);
    }
    scheduler
}

#[test]
fn a_sequence_goes_from_its_chunks_to_its_last_token() {
    let mut scheduler = Scheduler::new(config());
    scheduler.submit(SequenceId(5), ANYBODY, prompt(70), 3).unwrap();
    // First position, tokens, blocks gained, opens, wants a token; then what comes back.
    let expected = [
        (0, 32, 2, true, false, None),
        (32, 32, 2, false, false, None),
        (64, 6, 1, false, true, Some((1, false))),
        (70, 1, 0, false, true, Some((2, false))),
        (71, 1, 0, false, true, Some((3, true))),
    ];
    for (first_position, tokens, blocks, opens, wants_token, result) in expected {
        let batches = issue_all(&mut scheduler);
        let [batch] = batches.as_slice() else { panic!("expected one micro-batch, found {batches:?}") };
        let [slice] = batch.slices.as_slice() else { panic!("expected one slice, found {batch:?}") };
        assert_eq!(
            (slice.first_position, slice.token_ids.len(), slice.new_blocks.len()),
            (first_position, tokens, blocks)
        );
        assert_eq!((slice.opens, slice.wants_token), (opens, wants_token));
        let completions = complete(&mut scheduler, batch);
        let token = result.map(|_| 7);
        assert_eq!(completions, [Completion { sequence: SequenceId(5), token }]);
        let sequence = &scheduler.sequences[&SequenceId(5)];
        assert_eq!((sequence.drawn_count, sequence.at_limit()), result.unwrap_or((0, false)));
    }
    assert_eq!(issue_all(&mut scheduler), [], "a sequence at its limit rests");
    assert!(scheduler.release(SequenceId(5)));
    assert_empty(&scheduler);
    scheduler.submit(SequenceId(6), ANYBODY, prompt(1), 1).unwrap();
    let batch = scheduler.next_micro_batch().unwrap();
    assert_eq!((batch.closed, &batch.slices[0].new_blocks), (vec![SequenceId(5)], &vec![0]));
}

#[test]
fn what_can_never_run_is_rejected() {
    let mut scheduler = Scheduler::new(SchedulerConfig { kv_blocks: 8, max_running: 1, max_waiting: 1, ..config() });
    let too_long = |limit, found, what| Rejected::TooLong { limit, found, what };
    assert_eq!(scheduler.submit(SequenceId(1), ANYBODY, vec![], 1), Err(Rejected::EmptyPrompt));
    assert_eq!(scheduler.submit(SequenceId(1), ANYBODY, prompt(1), 0), Err(Rejected::NothingToDraw));
    assert_eq!(
        scheduler.submit(SequenceId(1), ANYBODY, prompt(500), 13),
        Err(too_long(512, 513, "the model's context"))
    );
    assert_eq!(
        scheduler.submit(SequenceId(1), ANYBODY, prompt(1), u32::MAX),
        Err(too_long(512, u32::MAX as usize + 1, "the model's context"))
    );
    assert_eq!(
        scheduler.submit(SequenceId(1), ANYBODY, prompt(100), 29),
        Err(too_long(128, 129, "the KV pool, all of it"))
    );
    scheduler.submit(SequenceId(1), ANYBODY, prompt(100), 28).unwrap();
    assert_eq!(
        scheduler.submit(SequenceId(1), ANYBODY, prompt(1), 1),
        Err(Rejected::DuplicateSequence { sequence: SequenceId(1) })
    );
    scheduler.submit(SequenceId(2), ANYBODY, prompt(1), 1).unwrap();
    assert_eq!(
        scheduler.submit(SequenceId(2), ANYBODY, prompt(1), 1),
        Err(Rejected::DuplicateSequence { sequence: SequenceId(2) })
    );
    assert_eq!(
        scheduler.submit(SequenceId(3), ANYBODY, prompt(1), 1),
        Err(Rejected::QueueFull { limit: 1, waiting: 1 })
    );
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
    scheduler.check_invariants();
}

#[test]
fn decoding_sequences_are_dealt_out_over_the_stages() {
    let cases: [(usize, u64, &[usize]); 7] = [
        (1, 5, &[5]),
        (2, 1, &[1]),
        (2, 5, &[3, 2]),
        (4, 8, &[2, 2, 2, 2]),
        (4, 9, &[3, 2, 2, 2]),
        (4, 3, &[1, 1, 1]),
        (7, 16, &[3, 3, 2, 2, 2, 2, 2]),
    ];
    for (stages, count, expected) in cases {
        let mut scheduler = decoding(SchedulerConfig { stages, ..config() }, count);
        for _round in 0..3 {
            let batches = issue_all(&mut scheduler);
            let sizes: Vec<usize> = batches.iter().map(|batch| batch.slices.len()).collect();
            assert_eq!(sizes, expected, "{stages} stages, {count} sequences");
            for batch in &batches {
                complete(&mut scheduler, batch);
            }
        }
    }
    let mut capped = decoding(SchedulerConfig { stages: 2, max_batch_sequences: 2, ..config() }, 7);
    let sizes: Vec<usize> = issue_all(&mut capped).iter().map(|batch| batch.slices.len()).collect();
    assert_eq!(sizes, [2, 2]);
    let few_tokens = SchedulerConfig { stages: 2, prefill_chunk_tokens: 2, max_batch_tokens: 2, ..config() };
    let sizes: Vec<usize> = issue_all(&mut decoding(few_tokens, 7)).iter().map(|batch| batch.slices.len()).collect();
    assert_eq!(sizes, [2, 2], "a group has no more sequences than a micro-batch has tokens");
}

#[test]
fn uneven_groups_become_even_again() {
    let mut scheduler = decoding(SchedulerConfig { stages: 4, ..config() }, 8);
    // One group of five, three of one.
    let members: Vec<SequenceId> = scheduler.decode_ready.drain(..).collect();
    let mut under_way = vec![scheduler.issue(Kind::Decode, members[..5].to_vec())];
    under_way.extend(members[5..].iter().map(|&id| scheduler.issue(Kind::Decode, vec![id])));
    for _step in 0..12 {
        complete(&mut scheduler, &under_way.remove(0));
        under_way.extend(issue_all(&mut scheduler));
    }
    let sizes: Vec<usize> = under_way.iter().map(|batch| batch.slices.len()).collect();
    assert_eq!(sizes, [2, 2, 2, 2]);
}

#[test]
fn prefill_and_decode_take_turns() {
    let mut scheduler = decoding(SchedulerConfig { stages: 1, kv_blocks: 1000, ..config() }, 4);
    for id in 10..13 {
        scheduler.submit(SequenceId(id), ANYBODY, prompt(200), 5).unwrap();
    }
    let kind = |batch: &MicroBatch| if batch.slices[0].token_ids.len() > 1 { 'p' } else { 'd' };
    let mut under_way = issue_all(&mut scheduler);
    let mut order: String = under_way.iter().map(kind).collect();
    for _step in 0..14 {
        complete(&mut scheduler, &under_way.remove(0));
        let next = issue_all(&mut scheduler);
        order.extend(next.iter().map(kind));
        under_way.extend(next);
    }
    assert_eq!(order, "pdpdpdpdpdpdpdpd");
}

#[test]
fn a_released_sequence_in_flight_keeps_its_blocks_until_its_micro_batch_is_back() {
    let mut scheduler = decoding(SchedulerConfig { stages: 1, ..config() }, 2);
    let batch = scheduler.next_micro_batch().unwrap();
    assert!(scheduler.release(SequenceId(1)));
    assert!(!scheduler.release(SequenceId(1)), "a second release changes nothing");
    assert_eq!(scheduler.pool.free(), 62);
    assert_eq!(
        scheduler.submit(SequenceId(1), ANYBODY, prompt(1), 1),
        Err(Rejected::DuplicateSequence { sequence: SequenceId(1) })
    );
    let completions = complete(&mut scheduler, &batch);
    assert_eq!(completions.iter().map(|completion| completion.sequence).collect::<Vec<_>>(), [SequenceId(0)]);
    assert_eq!(scheduler.pool.free(), 63);
    assert_eq!(scheduler.next_micro_batch().unwrap().closed, [SequenceId(1)]);
    // A stage that failed gives no tokens; released sequences want none.
    let mut failed = decoding(SchedulerConfig { stages: 1, ..config() }, 2);
    let batch = failed.next_micro_batch().unwrap();
    assert!(failed.release(SequenceId(0)) && failed.release(SequenceId(1)));
    assert_eq!(failed.complete(batch.id, &[]), Ok(vec![]));
    assert_eq!((failed.running(), failed.pool.free()), (0, 64));
}

#[test]
fn what_a_failed_micro_batch_was_to_tell_is_told_again_and_its_blocks_wait_for_that() {
    let mut scheduler = decoding(SchedulerConfig { stages: 3, kv_blocks: 5, ..config() }, 2);
    assert!(scheduler.release(SequenceId(0)));
    let first = scheduler.next_micro_batch().unwrap();
    scheduler.submit(SequenceId(10), ANYBODY, prompt(20), 4).unwrap();
    assert_eq!((first.closed.as_slice(), first.slices[0].sequence), ([SequenceId(0)].as_slice(), SequenceId(1)));
    // Block 0 was sequence 0's: stages that have not seen the first micro-batch would refuse it to anybody else.
    let second = scheduler.next_micro_batch().unwrap();
    assert_eq!((second.slices[0].sequence, &second.slices[0].new_blocks), (SequenceId(10), &vec![2, 3]));
    scheduler.check_invariants();
    assert_eq!(scheduler.fail(first.id), [SequenceId(1)]);
    scheduler.check_invariants();
    assert!(scheduler.fail(first.id).is_empty(), "a second time changes nothing");
    scheduler.submit(SequenceId(11), ANYBODY, prompt(20), 4).unwrap();
    let third = scheduler.next_micro_batch().unwrap();
    assert_eq!(
        (third.closed.as_slice(), &third.slices[0].new_blocks),
        ([0, 1].map(SequenceId).as_slice(), &vec![0, 1])
    );
}

#[test]
fn whoever_needs_a_withheld_block_waits_for_it() {
    let mut scheduler = Scheduler::new(SchedulerConfig { stages: 3, kv_blocks: 4, ..config() });
    scheduler.submit(SequenceId(1), ANYBODY, prompt(32), 32).unwrap();
    let only = scheduler.next_micro_batch().unwrap();
    complete(&mut scheduler, &only);
    assert!(scheduler.release(SequenceId(1)));
    scheduler.submit(SequenceId(2), ANYBODY, prompt(1), 1).unwrap();
    scheduler.submit(SequenceId(3), ANYBODY, prompt(32), 16).unwrap();
    let closing = scheduler.next_micro_batch().unwrap();
    assert_eq!((closing.closed.as_slice(), &closing.slices[0].new_blocks), ([SequenceId(1)].as_slice(), &vec![0]));
    let other = scheduler.next_micro_batch().unwrap();
    assert_eq!((other.slices[0].sequence, &other.slices[0].new_blocks), (SequenceId(3), &vec![2, 3]));
    complete(&mut scheduler, &other);
    assert_eq!(scheduler.next_micro_batch(), None, "block 1 is withheld");
    complete(&mut scheduler, &closing);
    let next = scheduler.next_micro_batch().unwrap();
    assert_eq!((next.slices[0].sequence, &next.slices[0].new_blocks), (SequenceId(3), &vec![1]));
}

#[test]
fn results_that_do_not_fit_are_refused_and_change_nothing() {
    let mut scheduler = decoding(SchedulerConfig { stages: 1, ..config() }, 2);
    scheduler.submit(SequenceId(9), ANYBODY, prompt(40), 2).unwrap();
    let chunk = scheduler.next_micro_batch().unwrap();
    let decode = scheduler.next_micro_batch().unwrap();
    assert_eq!((chunk.slices[0].sequence, decode.slices.len()), (SequenceId(9), 2));
    let unexpected = |micro_batch, sequence| Err(CompleteError::UnexpectedToken { micro_batch, sequence });
    let before = format!("{scheduler:?}");
    let cases: [(MicroBatchId, Vec<(u64, u32)>, _); 6] = [
        (
            decode.id.next(),
            vec![],
            Err(CompleteError::NeverIssued { micro_batch: decode.id.next(), next: decode.id.next() }),
        ),
        (decode.id, vec![(0, 7)], Err(CompleteError::MissingToken { micro_batch: decode.id, sequence: SequenceId(1) })),
        (decode.id, vec![(0, 7), (1, 7), (0, 7)], unexpected(decode.id, SequenceId(0))),
        (decode.id, vec![(0, 7), (1, 7), (9, 7)], unexpected(decode.id, SequenceId(9))),
        (decode.id, vec![(77, 7)], unexpected(decode.id, SequenceId(77))),
        (chunk.id, vec![(9, 7)], unexpected(chunk.id, SequenceId(9))),
    ];
    for (micro_batch, drawn, expected) in cases {
        let drawn: Vec<_> = drawn.into_iter().map(|(sequence, token)| (SequenceId(sequence), token)).collect();
        assert_eq!(scheduler.complete(micro_batch, &drawn), expected);
        assert_eq!(format!("{scheduler:?}"), before);
    }
    complete(&mut scheduler, &decode);
    assert_eq!(
        scheduler.complete(decode.id, &[(SequenceId(0), 7), (SequenceId(1), 7)]),
        Ok(vec![]),
        "a second time changes nothing"
    );
}

#[test]
fn after_an_abort_everything_is_free_and_old_results_are_ignored() {
    let mut scheduler = decoding(SchedulerConfig { max_running: 3, ..config() }, 3);
    scheduler.submit(SequenceId(8), ANYBODY, prompt(4), 4).unwrap();
    let batches = issue_all(&mut scheduler);
    scheduler.release(batches[0].slices[0].sequence);
    let gone = scheduler.abort_all();
    assert_eq!(gone, [1, 2, 8].map(SequenceId));
    assert_empty(&scheduler);
    scheduler.reconfigure(5);
    assert_eq!(scheduler.in_flight_limit(), 6);
    scheduler.submit(SequenceId(1), ANYBODY, prompt(4), 4).unwrap();
    for old in &batches {
        assert_eq!(scheduler.complete(old.id, &[(SequenceId(1), 7)]), Ok(vec![]));
    }
    let fresh = scheduler.next_micro_batch().unwrap();
    assert!(fresh.id > batches.iter().map(|batch| batch.id).max().unwrap() && fresh.closed.is_empty());
    assert!(fresh.slices[0].opens);
    scheduler.check_invariants();
}

#[test]
fn fewer_stages_while_batches_are_under_way_are_waited_for() {
    let mut scheduler = decoding(SchedulerConfig { stages: 4, ..config() }, 8);
    let under_way = issue_all(&mut scheduler);
    assert_eq!(under_way.len(), 4);
    scheduler.reconfigure(1);
    scheduler.check_invariants();
    for (index, batch) in under_way.iter().enumerate() {
        assert_eq!(scheduler.next_micro_batch().is_some(), index == 4, "still {} under way", 4 - index);
        complete(&mut scheduler, batch);
    }
    assert_eq!(issue_all(&mut scheduler).iter().map(|batch| batch.slices.len()).collect::<Vec<_>>(), [8]);
}

/// What a stage knows: the blocks of each sequence and what stands in each KV slot.
#[derive(Clone, Default)]
struct Stage {
    tables: BTreeMap<SequenceId, Vec<u32>>,
    slots: BTreeMap<(u32, u32), (SequenceId, u32, u32)>,
    /// Tokens of each sequence by position, as fed.
    fed: BTreeMap<SequenceId, Vec<u32>>,
    /// Sequences of micro-batches that failed before they came here, and those that such a micro-batch closed.
    failed: BTreeSet<SequenceId>,
}

impl Stage {
    /// Writes a micro-batch as a stage would, and checks that every earlier position is still where it was written.
    fn run(&mut self, batch: &MicroBatch, config: &SchedulerConfig) {
        for closed in &batch.closed {
            let known = self.tables.remove(closed).is_some();
            assert!(known || self.failed.contains(closed), "sequence {closed} was closed but never opened");
            self.fed.remove(closed);
        }
        for slice in &batch.slices {
            assert_eq!(slice.opens, !self.tables.contains_key(&slice.sequence), "sequence {}", slice.sequence);
            let table = self.tables.entry(slice.sequence).or_default();
            table.extend(&slice.new_blocks);
            let fed = self.fed.entry(slice.sequence).or_default();
            assert_eq!(slice.first_position as usize, fed.len(), "a position is skipped or repeated");
            fed.extend(&slice.token_ids);
            assert_eq!(table.len(), fed.len().div_ceil(config.block_tokens as usize), "blocks do not fit positions");
            for (position, &token) in fed.iter().enumerate() {
                let (position, block_tokens) = (position as u32, config.block_tokens);
                let slot = (table[(position / block_tokens) as usize], position % block_tokens);
                let value = (slice.sequence, position, token);
                if position >= slice.first_position {
                    self.slots.insert(slot, value);
                }
                assert_eq!(self.slots.get(&slot), Some(&value), "somebody wrote into a block of this sequence");
            }
        }
        let blocks: Vec<u32> = self.tables.values().flatten().copied().collect();
        assert_eq!(blocks.iter().collect::<BTreeSet<_>>().len(), blocks.len(), "a block is in two tables");
    }
}

/// Small random numbers from a seed, so that a failure replays.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// The token that a model would draw.
fn model_token(sequence: SequenceId, position: u32) -> u32 {
    (sequence.0 as u32).wrapping_mul(31).wrapping_add(position.wrapping_mul(17)) % 1000 + 1
}

/// A running simulation.
struct Simulation {
    dice: Dice,
    config: SchedulerConfig,
    scheduler: Scheduler,
    /// The first stage, and the last.
    stages: [Stage; 2],
    /// Micro-batches, and whether each failed between the two.
    under_way: Vec<(MicroBatch, bool)>,
    /// Prompt length, tokens wanted, tokens so far.
    live: BTreeMap<SequenceId, (u32, u32, Vec<u32>)>,
    next_id: u64,
    /// Micro-batches issued since a prefill chunk, and since a group, could have been and was not.
    passed_over: [usize; 2],
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let prefill_chunk_tokens = 1 + dice.below(40) as u32;
        let config = SchedulerConfig {
            stages: 1 + dice.below(5) as usize,
            kv_blocks: 8 + dice.below(40) as u32,
            block_tokens: 4 << dice.below(3),
            prefill_chunk_tokens,
            max_batch_tokens: prefill_chunk_tokens as usize + dice.below(4) as usize,
            max_context: 120,
            max_batch_sequences: 1 + dice.below(8) as usize,
            max_waiting: dice.below(12) as usize,
            max_running: 1 + dice.below(16) as usize,
        };
        Self {
            dice,
            config,
            scheduler: Scheduler::new(config),
            stages: Default::default(),
            under_way: Vec::new(),
            live: BTreeMap::new(),
            next_id: 1,
            passed_over: [0; 2],
        }
    }

    fn submit(&mut self) {
        let (id, length, wanted) = (self.next_id, 1 + self.dice.below(70) as u32, 1 + self.dice.below(25) as u32);
        let client = self.dice.below(3);
        self.next_id += 1;
        let tokens = (0..length).map(|position| model_token(SequenceId(id), position) + 1000).collect();
        match self.scheduler.submit(SequenceId(id), client, tokens, wanted) {
            Ok(()) => drop(self.live.insert(SequenceId(id), (length, wanted, Vec::new()))),
            Err(Rejected::QueueFull { limit, waiting }) => assert_eq!((limit, waiting), (limit, limit)),
            Err(Rejected::ShareTaken { limit, waiting, free }) => {
                assert!(waiting >= limit && limit == 3 * free && free > 0, "{waiting} wait, {free} places are free");
            }
            Err(Rejected::TooLong { limit, found, .. }) => assert!(found > limit),
            Err(other) => panic!("{other}"),
        }
    }

    fn issue(&mut self) {
        loop {
            let could = [self.scheduler.next_prefill().is_some(), !self.scheduler.next_group().is_empty()];
            let Some(batch) = self.scheduler.next_micro_batch() else { break };
            self.scheduler.check_invariants();
            let was_decode = self.scheduler.in_flight[&batch.id].kind == Kind::Decode;
            for (index, could) in could.into_iter().enumerate() {
                let taken = was_decode == (index == 1);
                self.passed_over[index] = if could && !taken { self.passed_over[index] + 1 } else { 0 };
                assert!(self.passed_over[index] <= 1, "somebody is passed over twice");
            }
            let tokens: usize = batch.slices.iter().map(|slice| slice.token_ids.len()).sum();
            assert!((1..=self.config.max_batch_tokens).contains(&tokens), "a micro-batch of {tokens} tokens");
            let fails = self.dice.below(20) == 0;
            self.stages[0].run(&batch, &self.config);
            if fails {
                let told = batch.slices.iter().map(|slice| slice.sequence).chain(batch.closed.iter().copied());
                self.stages.iter_mut().for_each(|stage| stage.failed.extend(told.clone()));
            } else {
                self.stages[1].run(&batch, &self.config);
            }
            self.under_way.push((batch, fails));
        }
    }

    /// Any micro-batch under way comes back.
    fn complete_one(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        let index = self.dice.below(self.under_way.len() as u64) as usize;
        let (batch, failed) = self.under_way.remove(index);
        if failed {
            for id in self.scheduler.fail(batch.id) {
                assert!(self.live.remove(&id).is_some(), "only live ones end");
            }
            return;
        }
        let wanting = batch.slices.iter().filter(|slice| slice.wants_token);
        let last = |slice: &Slice| slice.first_position + slice.token_ids.len() as u32;
        let drawn: Vec<(SequenceId, u32)> =
            wanting.map(|slice| (slice.sequence, model_token(slice.sequence, last(slice)))).collect();
        for completion in self.scheduler.complete(batch.id, &drawn).unwrap() {
            let Some(token) = completion.token else { continue };
            let (_, wanted, tokens) = self.live.get_mut(&completion.sequence).expect("only live ones are reported");
            tokens.push(token);
            let at_limit = rests(&self.scheduler, completion.sequence);
            assert_eq!(at_limit, tokens.len() == *wanted as usize);
            if at_limit {
                self.finish(completion.sequence);
            }
        }
    }

    fn finish(&mut self, id: SequenceId) {
        let (length, wanted, tokens) = self.live.remove(&id).expect("a sequence finishes once");
        let expected: Vec<u32> = (length..length + wanted).map(|position| model_token(id, position)).collect();
        assert_eq!(tokens, expected, "sequence {id}");
        assert!(self.scheduler.release(id));
    }

    fn cancel(&mut self) {
        let Some(&id) = self.live.keys().nth(self.dice.below(self.live.len().max(1) as u64) as usize) else { return };
        self.live.remove(&id);
        assert!(self.scheduler.release(id));
    }

    /// A stage is lost: everything goes, and the next epoch begins with empty stages.
    fn lose_a_stage(&mut self) {
        let gone: BTreeSet<SequenceId> = self.scheduler.abort_all().into_iter().collect();
        assert_eq!(gone, self.live.keys().copied().collect());
        let late = std::mem::take(&mut self.under_way);
        (self.live, self.stages) = (BTreeMap::new(), Default::default());
        self.config.stages = 1 + self.dice.below(5) as usize;
        self.scheduler.reconfigure(self.config.stages);
        for (batch, _) in late {
            assert_eq!(self.scheduler.complete(batch.id, &[]), Ok(vec![]));
            assert!(self.scheduler.fail(batch.id).is_empty());
        }
    }

    fn step(&mut self) {
        match self.dice.below(100) {
            0..25 => self.submit(),
            25..30 => self.cancel(),
            30 => self.lose_a_stage(),
            _ => self.complete_one(),
        }
        self.scheduler.check_invariants();
        self.issue();
    }

    /// No more arrivals: everybody who is left finishes, in a number of steps that the work bounds.
    fn drain(&mut self) {
        let chunks = |length: &u32| u64::from(length.div_ceil(self.config.prefill_chunk_tokens)) + 1;
        let work: u64 = self.live.values().map(|(length, wanted, _)| chunks(length) + u64::from(*wanted)).sum();
        // What was cancelled under way comes back too.
        for _step in 0..=work + self.under_way.len() as u64 {
            self.complete_one();
            self.scheduler.check_invariants();
            self.issue();
        }
        assert!(self.live.is_empty(), "{} sequences starve", self.live.len());
        assert_empty(&self.scheduler);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_gets_exactly_its_tokens_and_nothing_leaks(seed: u64) {
        simulate(seed);
    }
}

fn simulate(seed: u64) {
    let mut simulation = Simulation::new(seed);
    for _step in 0..600 {
        simulation.step();
    }
    simulation.drain();
}

#[test]
fn what_was_cancelled_under_way_comes_back_when_nobody_else_is_left() {
    simulate(11_685_830_754_803_041_441);
}

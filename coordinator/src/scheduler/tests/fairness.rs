//! No client takes everything, a long reservation shuts nobody out, and nobody starves.

use super::*;

/// Runs everything that may run until nothing is under way, a step at a time; `after` is called after each.
fn steps(scheduler: &mut Scheduler, count: usize, mut after: impl FnMut(&mut Scheduler)) {
    let mut under_way = issue_all(scheduler);
    for _step in 0..count {
        if under_way.is_empty() {
            return;
        }
        let batch = under_way.remove(0);
        for completion in complete(scheduler, &batch) {
            if rests(scheduler, completion.sequence) {
                assert!(scheduler.release(completion.sequence));
            }
        }
        after(scheduler);
        under_way.extend(issue_all(scheduler));
    }
}

fn is_in(scheduler: &Scheduler, id: u64) -> bool {
    scheduler.sequences.contains_key(&SequenceId(id))
}

#[test]
fn a_reservation_of_the_whole_pool_does_not_shut_out_a_small_one() {
    let mut scheduler = Scheduler::new(SchedulerConfig { kv_blocks: 16, ..config() });
    scheduler.submit(SequenceId(1), 1, prompt(16), 240).unwrap();
    scheduler.submit(SequenceId(2), 2, prompt(16), 16).unwrap();
    assert!(is_in(&scheduler, 1) && is_in(&scheduler, 2), "{scheduler:?}");
    // Two that need the whole pool exclude each other: neither could end while the other holds a block.
    scheduler.submit(SequenceId(3), 3, prompt(16), 240).unwrap();
    assert!(!is_in(&scheduler, 3));
    steps(&mut scheduler, 2000, |_| ());
    assert_eq!((scheduler.running(), scheduler.waiting()), (0, 0), "all three end");
}

#[test]
fn a_sequence_that_is_short_of_blocks_gets_them_before_anybody_is_let_in() {
    let mut scheduler = Scheduler::new(SchedulerConfig { stages: 1, kv_blocks: 16, max_waiting: 400, ..config() });
    scheduler.submit(SequenceId(1), 1, prompt(16), 240).unwrap();
    for id in 2..200 {
        scheduler.submit(SequenceId(id), id, prompt(16), 30).unwrap();
    }
    let mut let_in_while_short = 0;
    let mut steps_of_the_long_one = 0;
    steps(&mut scheduler, 20_000, |scheduler| {
        steps_of_the_long_one += usize::from(is_in(scheduler, 1));
        if scheduler.short_of_blocks.contains(&SequenceId(1)) {
            let before = scheduler.running();
            scheduler.admit();
            let_in_while_short += scheduler.running() - before;
        }
    });
    assert_eq!(let_in_while_short, 0);
    assert_eq!((scheduler.running(), scheduler.waiting()), (0, 0), "all end");
    // 198 small ones have 30 steps each; the long one has 241 and did not have to wait for the last of them.
    assert!(steps_of_the_long_one < 2000, "the long one was in for {steps_of_the_long_one} steps");
}

#[test]
fn the_client_with_the_fewest_running_is_next() {
    let mut scheduler = Scheduler::new(SchedulerConfig { max_running: 4, kv_blocks: 1000, ..config() });
    for id in 0..20 {
        scheduler.submit(SequenceId(id), 1, prompt(3), 5).unwrap();
    }
    scheduler.submit(SequenceId(100), 2, prompt(3), 5).unwrap();
    scheduler.submit(SequenceId(101), 3, prompt(3), 5).unwrap();
    for id in 0..3 {
        assert!(!is_in(&scheduler, 100 + id) || id > 0);
        assert!(scheduler.release(SequenceId(id)));
    }
    let running: Vec<SequenceId> = scheduler.sequences.keys().copied().collect();
    assert_eq!(running, [3, 4, 100, 101].map(SequenceId));
}

#[test]
fn one_client_cannot_take_all_places_to_wait() {
    let full = SchedulerConfig { max_running: 1, max_waiting: 256, ..config() };
    let mut scheduler = Scheduler::new(full);
    let mut id = 0;
    let mut submit = |scheduler: &mut Scheduler, client: u64| {
        id += 1;
        scheduler.submit(SequenceId(id), client, prompt(3), 5)
    };
    submit(&mut scheduler, 0).unwrap();
    // Each of many takes as much as it can, and the next still finds a place.
    let mut held = Vec::new();
    for client in 1..=20 {
        let mut places = 0;
        while submit(&mut scheduler, client).is_ok() {
            places += 1;
        }
        held.push(places);
    }
    assert_eq!(held[..4], [192, 48, 12, 3], "{held:?}");
    let mut scheduler = Scheduler::new(SchedulerConfig { max_waiting: 4, ..full });
    for _place in 0..4 {
        submit(&mut scheduler, 1).unwrap();
    }
    let refused = submit(&mut scheduler, 1);
    assert_eq!(refused, Err(Rejected::ShareTaken { limit: 3, waiting: 3, free: 1 }));
    submit(&mut scheduler, 2).unwrap();
    assert_eq!(submit(&mut scheduler, 3), Err(Rejected::QueueFull { limit: 4, waiting: 4 }));
}

#[test]
fn some_running_places_are_kept_for_clients_with_nothing_running() {
    let mut scheduler = Scheduler::new(SchedulerConfig { max_running: 16, kv_blocks: 1000, ..config() });
    for id in 0..30 {
        scheduler.submit(SequenceId(id), 1, prompt(3), 5).unwrap();
    }
    assert_eq!(scheduler.running(), 14);
    scheduler.submit(SequenceId(100), 2, prompt(3), 5).unwrap();
    assert!(is_in(&scheduler, 100));
}

#[test]
fn a_large_one_is_passed_by_some_and_then_by_none() {
    let mut scheduler = Scheduler::new(SchedulerConfig { kv_blocks: 16, max_running: 4, max_waiting: 400, ..config() });
    scheduler.submit(SequenceId(0), 0, prompt(200), 40).unwrap();
    // Its prompt alone does not fit beside the other's.
    scheduler.submit(SequenceId(1), 1, prompt(200), 40).unwrap();
    for id in 2..100 {
        scheduler.submit(SequenceId(id), id, prompt(3), 2).unwrap();
    }
    let mut passed = 0;
    // The first one never ends: only small ones come and go.
    for _round in 0..100 {
        let small: Vec<SequenceId> = scheduler.sequences.keys().copied().filter(|id| *id > SequenceId(1)).collect();
        passed += small.len();
        for id in small {
            scheduler.release(id);
        }
    }
    assert_eq!(passed, 16);
    assert!(scheduler.release(SequenceId(0)));
    assert!(is_in(&scheduler, 1), "then it is its turn");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// While others keep coming, whoever waits is let in after a bounded number of others.
    #[test]
    fn nobody_starves_while_others_keep_coming(seed: u64) {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let config = SchedulerConfig {
            stages: 1 + dice.below(3) as usize,
            kv_blocks: 10 + dice.below(30) as u32,
            prefill_chunk_tokens: 32,
            max_context: 160,
            max_waiting: 8,
            max_running: 1 + dice.below(12) as usize,
            ..config()
        };
        let mut scheduler = Scheduler::new(config);
        let mut next_id = 0;
        let mut arrive = |scheduler: &mut Scheduler, dice: &mut Dice| {
            let (length, wanted) = (1 + dice.below(100) as u32, 1 + dice.below(40) as u32);
            let (id, client) = (next_id, dice.below(4));
            if scheduler.submit(SequenceId(id), client, prompt(length), wanted).is_ok() {
                next_id += 1;
            }
        };
        let mut waiting_since: BTreeMap<SequenceId, u64> = BTreeMap::new();
        for _arrival in 0..10 {
            arrive(&mut scheduler, &mut dice);
        }
        steps(&mut scheduler, 3000, |scheduler| {
            arrive(scheduler, &mut dice);
            scheduler.check_invariants();
            let admitted = scheduler.next_admitted;
            waiting_since.retain(|id, _| scheduler.waiting.iter().any(|waiting| waiting.id == *id));
            for waiting in &scheduler.waiting {
                let since = *waiting_since.entry(waiting.id).or_insert(admitted);
                // Each of those before it in the queue may be passed as often, and so may it.
                let most = 9 * 17 + config.max_running as u64;
                assert!(admitted - since <= most, "{} was passed over {} times", waiting.id, admitted - since);
            }
        });
    }
}

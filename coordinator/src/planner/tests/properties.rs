//! What holds for every problem, drawn at random.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::brute_force;
use super::{as_previous, carried_out, worker};
use crate::planner::solve::plan_by_orders;
use crate::planner::*;

/// Rates of reading and of computing.
fn any_rate() -> impl Strategy<Value = Rate> {
    (5_u32..60, 1_u32..40).prop_map(|(bandwidth, rate)| Rate {
        bytes_per_second: f64::from(bandwidth),
        flops_per_second: f64::from(rate),
    })
}

/// A drawn worker: memory, general rates, those of one format if it has measured them, and what a layer takes besides.
fn any_worker(memory: std::ops::Range<u64>) -> impl Strategy<Value = WorkerResources> {
    let rates = (any_rate(), prop::option::weighted(0.5, any_rate()));
    (memory, rates, 0_u32..3).prop_map(|(memory_bytes, (general, measured), overhead)| WorkerResources {
        memory_bytes,
        read_bandwidth: general.bytes_per_second,
        flop_rate: general.flops_per_second,
        rates: measured.map(|rate| ("b".to_owned(), rate)).into_iter().collect(),
        overhead: Overhead {
            step_seconds: f64::from(overhead) / 20.0,
            layer_seconds: f64::from(overhead) / 10.0,
            draw_seconds: f64::from(overhead) / 40.0,
        },
        ..worker("w", 0, 1.0)
    })
}

/// Attention in one format, experts in the same one or in another.
fn any_layer() -> impl Strategy<Value = LayerCost> {
    let format = prop::sample::select(vec!["a", "b"]);
    (1_u64..12, 0_u64..8, 0_u32..6, 0_u32..3, format).prop_map(|(experts, fixed, flops, more, format)| LayerCost {
        weight_bytes: experts + fixed,
        products: vec![
            ProductCost { format: "a".into(), bytes: fixed, of_experts: false, flops_per_token: f64::from(more) },
            ProductCost { format: format.into(), bytes: experts, of_experts: true, flops_per_token: f64::from(flops) },
        ],
    })
}

/// A problem of small whole numbers, so that ties abound. The first worker may be pinned.
fn any_problem(layers: usize, workers: usize, memory: std::ops::Range<u64>) -> impl Strategy<Value = Problem> {
    let layers = prop::collection::vec(any_layer(), 1..=layers);
    let workers = prop::collection::vec(any_worker(memory), 1..=workers);
    let pin = prop::option::weighted(0.3, (0_u32..6, 1_u32..4));
    let rest = (0_u64..10, 0_u64..3, 0_u64..4, 1_u32..6, any::<bool>(), 0_u32..3);
    (layers, workers, pin, rest).prop_map(|(layers, mut workers, pin, rest)| {
        let (head, kv_tokens, scratch, batch_tokens, throughput, hop) = rest;
        let count = layers.len() as u32;
        workers[0].pinned_layers = pin.map(|(start, length)| start.min(count - 1)..(start + length).min(count));
        if workers[0].pinned_layers.as_ref().is_some_and(|layers| layers.is_empty()) {
            workers[0].pinned_layers = None;
        }
        Problem {
            layers,
            num_experts: 8,
            num_experts_per_tok: 2,
            head: HeadCost { weight_bytes: head, format: "b".into(), flops_per_token: head as f64 },
            kv_bytes_per_token_per_layer: 1,
            kv_tokens,
            scratch: ScratchCost { stage_bytes: scratch, head_bytes: scratch / 2 },
            hidden_bytes_per_token: 1,
            workers,
            link: LinkCost { seconds_per_hop: f64::from(hop) / 10.0, bytes_per_second: 50.0 },
            batch_tokens,
            objective: if throughput { Objective::Throughput } else { Objective::Latency },
            previous: None,
        }
    })
}

/// Larger problems, with memory to spare for most.
fn large_problem(workers: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Problem> {
    let workers = prop::collection::vec(any_worker(100..400), workers);
    (any_problem(1, 1, 1..2), prop::collection::vec(any_layer(), 24..40), workers)
        .prop_map(|(problem, layers, workers)| Problem { layers, workers, ..problem })
}

fn value(problem: &Problem, plan: &Plan) -> f64 {
    let times = plan.stages.iter().map(|stage| stage.step_seconds);
    match problem.objective {
        Objective::Throughput => times.fold(0.0, f64::max),
        Objective::Latency => times.sum(),
    }
}

/// Every layer once, in order; every worker once, within its memory and on its pin; the others are standby.
fn check_plan(problem: &Problem, plan: &Plan) {
    let mut reached = 0;
    let mut seen = plan.standby.clone();
    for stage in &plan.stages {
        assert_eq!(stage.layers.start(), reached, "{plan:?}");
        let layers = stage.layers.start() as usize..stage.layers.end() as usize;
        assert!(brute_force::fits(problem, stage.worker, &layers), "{plan:?}");
        assert!(stage.memory_bytes <= problem.workers[stage.worker].memory_bytes, "{plan:?}");
        let pin = &problem.workers[stage.worker].pinned_layers;
        assert!(pin.as_ref().is_none_or(|pin| *pin == stage.layers.iter()), "{plan:?}");
        let expected = brute_force::step_seconds(problem, stage.worker, &layers);
        assert!((stage.step_seconds - expected).abs() <= 1e-9 * expected, "{} {expected}", stage.step_seconds);
        reached = stage.layers.end();
        seen.push(stage.worker);
    }
    assert_eq!(reached as usize, problem.layers.len(), "{plan:?}");
    assert!(plan.standby.iter().all(|&index| problem.workers[index].pinned_layers.is_none()), "{plan:?}");
    seen.sort_unstable();
    assert_eq!(seen, (0..problem.workers.len()).collect::<Vec<_>>(), "{plan:?}");
}

/// Solving the answer again changes nothing, however it is put.
fn check_stable(problem: &Problem, solve: impl Fn(&Problem) -> Result<Plan, Refusal>) {
    let Ok(first) = solve(problem) else { return };
    let held = carried_out(problem, &first);
    let previous = Problem { previous: Some(as_previous(&first)), ..problem.clone() };
    let both = Problem { previous: Some(as_previous(&first)), ..held.clone() };
    for again in [held, previous, both] {
        let second = solve(&again).expect("a problem with an answer has one");
        assert_eq!(as_previous(&first), as_previous(&second));
        assert!(second.stages.iter().all(|stage| stage.layers_to_load == 0));
    }
}

/// By what factor the search over orders misses the best; `None` when neither finds a plan.
fn gap(problem: &Problem) -> Option<f64> {
    match (plan(problem), plan_by_orders(problem)) {
        (Ok(exact), Ok(found)) => {
            check_plan(problem, &found);
            Some(value(problem, &found) / value(problem, &exact))
        }
        (Err(_), Err(_)) => None,
        (exact, found) => panic!("exact {exact:?}, found {found:?}"),
    }
}

fn holding(problem: &Problem, held: &[(u32, u32)]) -> Problem {
    let mut problem = problem.clone();
    for (worker, (start, length)) in problem.workers.iter_mut().zip(held) {
        worker.held_layers = (*length > 0).then_some(*start..start + length);
    }
    problem
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_plan_is_better_and_a_refusal_names_the_least_that_is_missing(problem in any_problem(6, 4, 0..60)) {
        let all = brute_force::placements(&problem);
        let best = all.iter().map(|placement| brute_force::value(&problem, placement)).min_by(f64::total_cmp);
        match (plan(&problem), best) {
            (Ok(plan), Some(best)) => {
                check_plan(&problem, &plan);
                let found = value(&problem, &plan);
                prop_assert!((found - best).abs() <= 1e-9 * best, "found {found}, best {best}");
            }
            (Err(Refusal::DoesNotFit { missing_bytes, holes, .. }), None) => {
                let least = brute_force::least_missing(&problem, 0, 0);
                prop_assert_eq!(missing_bytes, least);
                let bytes: u64 = holes.iter().map(|hole| hole.bytes).sum();
                prop_assert_eq!(missing_bytes, bytes);
                prop_assert!(missing_bytes > 0);
            }
            (Err(Refusal::PinDoesNotFit { .. } | Refusal::PinsLeaveGaps { .. }), None) => {}
            (found, best) => prop_assert!(false, "found {found:?}, best {best:?}"),
        }
    }

    #[test]
    fn no_good_plan_moves_fewer_layers(
        problem in any_problem(6, 4, 20..90),
        held in prop::collection::vec((0_u32..6, 0_u32..4), 4),
    ) {
        let problem = holding(&Problem { objective: Objective::Throughput, ..problem }, &held);
        let Ok(plan) = plan(&problem) else { return Ok(()) };
        check_plan(&problem, &plan);
        let all = brute_force::placements(&problem);
        let best = all.iter().map(|placement| brute_force::value(&problem, placement)).fold(f64::MAX, f64::min);
        let anything_held = problem.workers.iter().any(|worker| worker.held_layers.is_some());
        let slack = if anything_held { 1.05 } else { 1.0 };
        prop_assert!(value(&problem, &plan) <= best * slack * (1.0 + 1e-9));
        let good = all.iter().filter(|placement| brute_force::value(&problem, placement) <= best * slack * (1.0 - 1e-9));
        let fewest = good.map(|placement| brute_force::moved(&problem, placement)).min();
        let moved: u32 = plan.stages.iter().map(|stage| stage.layers_to_load).sum();
        prop_assert!(fewest.is_none_or(|fewest| moved as usize <= fewest), "moved {moved}, fewest {fewest:?}");
    }

    #[test]
    fn latency_is_given_up_for_fewer_moves_only_within_the_tolerance(
        problem in any_problem(6, 4, 20..90),
        held in prop::collection::vec((0_u32..6, 0_u32..4), 4),
    ) {
        let problem = holding(&Problem { objective: Objective::Latency, ..problem }, &held);
        let Ok(plan) = plan(&problem) else { return Ok(()) };
        check_plan(&problem, &plan);
        let all = brute_force::placements(&problem);
        let best = all.iter().map(|placement| brute_force::value(&problem, placement)).fold(f64::MAX, f64::min);
        prop_assert!(value(&problem, &plan) <= best * 1.05 * (1.0 + 1e-9));
    }

    #[test]
    fn solving_the_answer_again_changes_nothing(
        problem in any_problem(8, 5, 10..90),
        held in prop::collection::vec((0_u32..6, 0_u32..4), 5),
    ) {
        check_stable(&problem, plan);
        check_stable(&problem, plan_by_orders);
        // Also when it was not planned from nothing; a worker without a stage keeps what it held.
        let problem = holding(&problem, &held);
        let Ok(first) = plan(&problem) else { return Ok(()) };
        let next = Problem { previous: Some(as_previous(&first)), ..carried_out(&problem, &first) };
        prop_assert_eq!(as_previous(&plan(&next).unwrap()), as_previous(&first));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn many_workers_are_planned_for_and_the_answer_stays(problem in large_problem(13..=20)) {
        if let Ok(found) = plan(&problem) {
            check_plan(&problem, &found);
        }
        check_stable(&problem, plan);
    }
}

// How near a search comes is no promise for every problem, so these problems are always the same.
proptest! {
    #![proptest_config(ProptestConfig {
        cases: 10,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(7),
        ..ProptestConfig::default()
    })]

    /// Layers that differ by a factor of 20, two a worker, are a puzzle that no real model poses; 1.19 was the worst of 100.
    #[test]
    fn searching_over_orders_comes_near_the_best(problem in large_problem(10..=12)) {
        let gap = gap(&problem);
        prop_assert!(gap.is_none_or(|gap| gap <= 1.3), "{gap:?}");
    }

    /// Here 1.0 was the worst of 100.
    #[test]
    fn for_a_model_of_equal_layers_it_comes_very_close(problem in large_problem(10..=12), head in 0_u64..40) {
        let layers = vec![problem.layers[0].clone(); 48];
        let head = HeadCost { weight_bytes: head, format: "a".into(), flops_per_token: 1.0 };
        let gap = gap(&Problem { layers, head, ..problem });
        prop_assert!(gap.is_none_or(|gap| gap <= 1.02), "{gap:?}");
    }
}

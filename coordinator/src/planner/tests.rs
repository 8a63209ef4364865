//! The planner against exhaustive search, and what must be true of every plan.

mod brute_force;
mod properties;

use std::collections::BTreeMap;

use super::*;

/// Weights of one layer of Grok-1 in int8: attention and the rest, and the eight experts.
const ATTENTION_BYTES: u64 = 88_000_000;
const EXPERT_BYTES: u64 = 4_832_000_000;
const GIB: u64 = 1 << 30;
const INT8: &str = "int8";

/// The stages as a later problem's `previous` wants them.
pub(super) fn as_previous(plan: &Plan) -> Vec<PreviousStage> {
    plan.stages.iter().map(|stage| PreviousStage { worker: stage.worker, layers: stage.layers }).collect()
}

/// 64 layers of Grok-1 on these workers, one token a micro-batch, a negligible wire.
pub(super) fn grok(workers: Vec<WorkerResources>) -> Problem {
    let product =
        |bytes, of_experts, flops_per_token| ProductCost { format: INT8.into(), bytes, of_experts, flops_per_token };
    let layer = LayerCost {
        weight_bytes: ATTENTION_BYTES + EXPERT_BYTES,
        products: vec![product(ATTENTION_BYTES, false, 0.18e9), product(EXPERT_BYTES, true, 2.42e9)],
    };
    Problem {
        layers: vec![layer; 64],
        num_experts: 8,
        num_experts_per_tok: 2,
        head: HeadCost { weight_bytes: 3_221_225_472, format: "f32".into(), flops_per_token: 1.6e9 },
        kv_bytes_per_token_per_layer: 8192,
        kv_tokens: 16_384,
        scratch: ScratchCost { stage_bytes: GIB / 4, head_bytes: GIB / 16 },
        hidden_bytes_per_token: 24_576,
        workers,
        link: LinkCost { seconds_per_hop: 1e-4, bytes_per_second: 1e9 },
        batch_tokens: 1,
        objective: Objective::Throughput,
        previous: None,
    }
}

pub(super) fn worker(name: &str, gibibytes: u64, gigabytes_per_second: f64) -> WorkerResources {
    WorkerResources {
        name: name.into(),
        memory_bytes: gibibytes * GIB,
        read_bandwidth: gigabytes_per_second * 1e9,
        flop_rate: 1e12,
        rates: BTreeMap::new(),
        overhead: Overhead::default(),
        pinned_layers: None,
        held_layers: None,
    }
}

fn workers(count: usize, gibibytes: u64, gigabytes_per_second: f64) -> Vec<WorkerResources> {
    (0..count).map(|index| worker(&format!("w{index}"), gibibytes, gigabytes_per_second)).collect()
}

fn pinned(mut worker: WorkerResources, layers: std::ops::Range<u32>) -> WorkerResources {
    worker.pinned_layers = Some(layers);
    worker
}

/// Worker and number of layers of each stage.
fn shape(plan: &Plan) -> Vec<(usize, usize)> {
    plan.stages.iter().map(|stage| (stage.worker, stage.layers.count() as usize)).collect()
}

/// The problem after its answer was carried out.
pub(super) fn carried_out(problem: &Problem, plan: &Plan) -> Problem {
    let mut next = problem.clone();
    for stage in &plan.stages {
        next.workers[stage.worker].held_layers = Some(stage.layers.iter());
    }
    next
}

#[test]
fn equal_workers_get_equal_shares_and_the_last_one_less_for_the_head() {
    // Reading the head takes as long as reading 2.5 layers, so no stage takes longer than 17 layers do.
    assert_eq!(shape(&plan(&grok(workers(4, 128, 100.0))).unwrap()), [(0, 16), (1, 17), (2, 17), (3, 14)]);
    let mut headless = grok(workers(6, 128, 100.0));
    headless.head = HeadCost { weight_bytes: 0, flops_per_token: 0.0, ..headless.head };
    headless.link.bytes_per_second = 1e18;
    let mut sizes: Vec<usize> = shape(&plan(&headless).unwrap()).into_iter().map(|(_, layers)| layers).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [10, 10, 11, 11, 11, 11]);
}

#[test]
fn all_of_nearly_equal_workers_are_used() {
    let speeds = [100.0, 97.5, 102.1, 99.2, 100.4];
    let workers = speeds.iter().enumerate().map(|(index, speed)| worker(&format!("w{index}"), 128, *speed)).collect();
    let plan = plan(&grok(workers)).unwrap();
    assert_eq!((plan.stages.len(), plan.standby.len()), (5, 0));
}

#[test]
fn a_faster_worker_gets_more_layers_and_a_hopeless_one_none() {
    let found = plan(&grok(vec![worker("slow", 400, 50.0), worker("fast", 400, 150.0)])).unwrap();
    let layers_of = |index| found.stages.iter().find(|stage| stage.worker == index).unwrap().layers.count();
    assert!(layers_of(1) > 2 * layers_of(0), "{:?}", shape(&found));
    let with_snail = plan(&grok(vec![worker("snail", 400, 0.5), worker("fast", 400, 150.0)])).unwrap();
    assert_eq!((shape(&with_snail), with_snail.standby), (vec![(1, 64)], vec![0]));
}

#[test]
fn latency_takes_the_fastest_workers_only() {
    let mut problem = grok(vec![worker("slow", 400, 50.0), worker("fast", 200, 150.0), worker("middle", 200, 100.0)]);
    problem.objective = Objective::Latency;
    let found = plan(&problem).unwrap();
    assert_eq!(found.standby, [0]);
    let layers_of = |index| found.stages.iter().find(|stage| stage.worker == index).unwrap().layers.count();
    assert!(layers_of(1) > layers_of(2), "{:?}", shape(&found));
}

#[test]
fn a_plan_accounts_for_every_byte_and_second() {
    let problem = grok(workers(2, 256, 100.0));
    let plan = plan(&problem).unwrap();
    let [first, last] = plan.stages.as_slice() else { panic!("{plan:?}") };
    let layer_bytes = ATTENTION_BYTES + EXPERT_BYTES;
    assert_eq!(first.weight_bytes, layer_bytes * u64::from(first.layers.count()));
    assert_eq!(last.weight_bytes, layer_bytes * u64::from(last.layers.count()) + problem.head.weight_bytes);
    assert_eq!(first.kv_bytes, 8192 * 16_384 * u64::from(first.layers.count()));
    assert_eq!((first.scratch_bytes, last.scratch_bytes), (GIB / 4, GIB / 4 + GIB / 16));
    assert_eq!(first.memory_bytes, first.weight_bytes + first.kv_bytes + first.scratch_bytes);
    assert_eq!((first.layers_to_load, last.layers_to_load), (first.layers.count(), last.layers.count()));
    // One token touches two of eight experts.
    let read_bytes = f64::from(first.layers.count()) * (ATTENTION_BYTES as f64 + EXPERT_BYTES as f64 / 4.0);
    let expected = read_bytes / 100e9 + 1e-4 + 24_576.0 / 1e9;
    assert!((first.step_seconds / expected - 1.0).abs() < 1e-11, "{} {expected}", first.step_seconds);
    let slowest = first.step_seconds.max(last.step_seconds);
    assert!((plan.predicted_tokens_per_second * slowest - 1.0).abs() < 1e-12);
    let all = first.step_seconds + last.step_seconds;
    assert!((plan.predicted_stream_tokens_per_second * all - 1.0).abs() < 1e-12);
}

#[test]
fn a_batch_touches_more_experts_and_at_last_computes_longer_than_it_reads() {
    let step = |batch_tokens, flop_rate| {
        let mut problem = grok(vec![WorkerResources { flop_rate, ..worker("w", 400, 100.0) }]);
        problem.batch_tokens = batch_tokens;
        plan(&problem).unwrap().stages[0].step_seconds - 1e-4
    };
    let head = 3_221_225_472.0;
    for batch_tokens in [1, 2, 8, 64] {
        let touched = 8.0 * (1.0 - 0.75_f64.powi(batch_tokens as i32));
        let bytes = 64.0 * (ATTENTION_BYTES as f64 + EXPERT_BYTES as f64 / 8.0 * touched) + head;
        let found = step(batch_tokens, 1e18);
        assert!((found / (bytes / 100e9) - 1.0).abs() < 1e-9, "batch {batch_tokens}: {found}");
    }
    let flops = (64.0 * 2.6e9 + 1.6e9) * 512.0;
    assert!((step(512, 1e9) / (flops / 1e9) - 1.0).abs() < 1e-9);
}

fn rate(bytes_per_second: f64, flops_per_second: f64) -> Rate {
    Rate { bytes_per_second, flops_per_second }
}

/// What is special, rates by format, overhead, tokens a micro-batch, and the seconds that a step takes.
type RatesCase<'a> = (&'a str, &'a [(&'a str, Rate)], Overhead, u32, f64);

#[test]
fn each_product_goes_at_its_formats_rate_and_what_is_beside_them_is_added() {
    // One layer: 100 bytes of attention as a, 800 of experts as b, of which a token touches a quarter. A head of 50 bytes as c.
    let product = |format: &str, bytes, of_experts, flops_per_token| ProductCost {
        format: format.into(),
        bytes,
        of_experts,
        flops_per_token,
    };
    let step = |rates: &[(&str, Rate)], overhead: Overhead, batch_tokens: u32| {
        let mut problem = grok(vec![worker("w", 400, 1e-9)]);
        problem.workers[0] = WorkerResources {
            read_bandwidth: 10.0,
            flop_rate: 1e9,
            rates: rates.iter().map(|(format, rate)| ((*format).to_owned(), *rate)).collect(),
            overhead,
            ..problem.workers[0].clone()
        };
        let products = vec![product("a", 100, false, 200.0), product("b", 800, true, 400.0)];
        problem.layers = vec![LayerCost { weight_bytes: 900, products }];
        problem.head = HeadCost { weight_bytes: 50, format: "c".into(), flops_per_token: 100.0 };
        problem.link.seconds_per_hop = 0.0;
        problem.batch_tokens = batch_tokens;
        plan(&problem).unwrap().stages[0].step_seconds
    };
    let (none, fast) = (Overhead::default(), 1e12);
    let cases: [RatesCase<'_>; 7] = [
        ("no rates: the general one", &[], none, 1, (100.0 + 200.0 + 50.0) / 10.0),
        ("one format is known", &[("b", rate(20.0, fast))], none, 1, 10.0 + 10.0 + 5.0),
        (
            "all are",
            &[("a", rate(50.0, fast)), ("b", rate(20.0, fast)), ("c", rate(25.0, fast))],
            none,
            1,
            2.0 + 10.0 + 2.0,
        ),
        ("a format that the model lacks", &[("q9", rate(1e-3, 1e-3))], none, 1, 35.0),
        ("a batch touches more experts", &[("b", rate(20.0, fast))], none, 2, 10.0 + 800.0 * 0.4375 / 20.0 + 5.0),
        ("slow arithmetic in one format alone", &[("b", rate(fast, 40.0))], none, 4, 10.0 + 4.0 * 400.0 / 40.0 + 5.0),
        (
            "what is beside products",
            &[],
            Overhead { step_seconds: 1.0, layer_seconds: 2.0, draw_seconds: 4.0 },
            1,
            35.0 + 1.0 + 2.0 + 4.0,
        ),
    ];
    for (what, rates, overhead, batch_tokens, expected) in cases {
        let found = step(rates, overhead, batch_tokens);
        assert!((found / expected - 1.0).abs() < 1e-9, "{what}: expected {expected}, found {found}");
    }
}

#[test]
fn a_worker_that_is_fast_in_the_models_format_gets_more_layers() {
    let mut problem = grok(vec![worker("plain", 400, 100.0), worker("tuned", 400, 100.0)]);
    problem.workers[1].rates.insert(INT8.into(), rate(300e9, 1e12));
    let found = plan(&problem).unwrap();
    let layers_of = |index| found.stages.iter().find(|stage| stage.worker == index).unwrap().layers.count();
    assert!(layers_of(1) > 2 * layers_of(0), "{:?}", shape(&found));
    // The rate of a format that no layer has changes nothing.
    let mut other = grok(vec![worker("plain", 400, 100.0), worker("tuned", 400, 100.0)]);
    let before = plan(&other).unwrap();
    other.workers[1].rates.insert("q4_0".into(), rate(300e9, 1e12));
    assert_eq!(plan(&other).unwrap(), before);
}

#[test]
fn pins_are_kept_and_the_rest_is_planned_around_them() {
    let free = worker("free", 400, 100.0);
    let problem = grok(vec![free.clone(), pinned(worker("p", 100, 10.0), 10..20), worker("other", 400, 100.0)]);
    let found = plan(&problem).unwrap();
    let middle = found.stages.iter().find(|stage| stage.worker == 1).unwrap();
    assert_eq!((middle.layers.iter(), found.stages.len()), (10..20, 3));
    let all_pinned = vec![pinned(free.clone(), 32..64), pinned(free, 0..32)];
    assert_eq!(shape(&plan(&grok(all_pinned)).unwrap()), [(1, 32), (0, 32)]);
}

#[test]
fn bad_problems_are_refused_in_words() {
    let one = || vec![worker("a", 400, 100.0)];
    let with = |change: fn(&mut Problem)| {
        let mut problem = grok(vec![worker("a", 400, 100.0)]);
        change(&mut problem);
        problem
    };
    let cases = [
        (grok(vec![]), "no workers to place 64 layers on"),
        (with(|problem| problem.layers.clear()), "the model has no layers"),
        (grok(workers(WORKERS_MAX + 1, 1, 1.0)), "expected at most 256 workers, found 257"),
        (grok(vec![worker("a", 400, 0.0)]), "expected a positive finite read_bandwidth of worker \"a\", found 0"),
        (grok(vec![worker("a", 400, f64::NAN)]), "read_bandwidth of worker \"a\", found NaN"),
        (grok(vec![worker("a", 400, f64::INFINITY)]), "read_bandwidth of worker \"a\", found inf"),
        (with(|problem| problem.workers[0].flop_rate = -1.0), "flop_rate of worker \"a\", found -1"),
        (
            with(|problem| {
                problem.workers[0].rates.insert("q4_0".into(), rate(0.0, 1.0));
            }),
            "expected a positive finite bytes_per_second in q4_0 of worker \"a\", found 0",
        ),
        (
            with(|problem| {
                problem.workers[0].rates.insert("int8".into(), rate(1.0, f64::NAN));
            }),
            "flops_per_second in int8 of worker \"a\", found NaN",
        ),
        (
            with(|problem| problem.workers[0].overhead.layer_seconds = -1.0),
            "expected a finite, not negative layer_seconds of worker \"a\", found -1",
        ),
        (with(|problem| problem.link.bytes_per_second = 0.0), "link.bytes_per_second, found 0"),
        (with(|problem| problem.link.seconds_per_hop = f64::NAN), "link.seconds_per_hop, found NaN"),
        (with(|problem| problem.layers[3].products[1].flops_per_token = -2.0), "layer.flops_per_token, found -2"),
        (with(|problem| problem.batch_tokens = 0), "expected at least 1 as batch_tokens, found 0"),
        (with(|problem| problem.num_experts_per_tok = 9), "expected 1 to num_experts as num_experts_per_tok, found 9"),
        (with(|problem| problem.num_experts = 0), "as num_experts, found 0"),
        (
            grok(vec![pinned(worker("a", 400, 1.0), 60..65)]),
            "pinned to layers 60–64, expected some of the model's 64 layers",
        ),
        (grok(vec![pinned(worker("a", 400, 1.0), 5..5)]), "pinned to no layers, expected"),
        (
            grok(vec![pinned(worker("a", 400, 1.0), 8..20), pinned(worker("b", 400, 1.0), 0..9)]),
            "workers \"b\" (layers 0–8) and \"a\" (layers 8–19) are pinned to the same layers",
        ),
        (
            grok(vec![pinned(worker("a", 1, 1.0), 0..1)]),
            "\"a\" is to run layer 0, which need 5.0 GiB; it has 1.0 GiB: 4.0 GiB are missing",
        ),
        (
            grok(vec![pinned(one()[0].clone(), 0..63)]),
            "leave out layer 63: expected a worker without a pin for each of these 1 ranges, found 0",
        ),
        (
            grok(vec![pinned(worker("a", 400, 1.0), 8..20), worker("b", 400, 1.0)]),
            "leave out layers 0–7, layers 20–63: expected a worker without a pin for each of these 2 ranges, found 1",
        ),
    ];
    for (problem, expected) in cases {
        let said = plan(&problem).unwrap_err().to_string();
        assert!(said.contains(expected), "expected {expected:?}, found {said:?}");
    }
}

#[test]
fn too_little_memory_says_how_much_is_missing_and_where() {
    // Each has room for 18 layers, so ten are left over; the head as well, because it is smaller than a layer.
    let problem = grok(workers(3, 86, 100.0));
    let refusal = plan(&problem).unwrap_err();
    let layer = ATTENTION_BYTES + EXPERT_BYTES + 8192 * 16_384;
    let Refusal::DoesNotFit { missing_bytes, holes, needed_bytes, memory_bytes, workers } = &refusal else {
        panic!("{refusal:?}")
    };
    let missing = 10 * layer + problem.head.weight_bytes;
    assert_eq!((*missing_bytes, holes), (missing, &vec![Hole { layers: 54..64, bytes: missing }]));
    assert_eq!((*needed_bytes, *memory_bytes), (64 * layer + problem.head.weight_bytes, 3 * 86 * GIB));
    assert_eq!((*workers, holes.len()), (3, 1));
    let text = refusal.to_string();
    assert!(text.contains(" GiB are missing: no worker has room for layers 54–63 ("), "{text}");
    assert!(text.ends_with("3 workers have 258.0 GiB"), "{text}");
}

#[test]
fn sums_beyond_64_bits_are_refused_not_wrapped() {
    let mut problem = grok(workers(2, 400, 100.0));
    problem.layers.iter_mut().for_each(|layer| layer.weight_bytes = u64::MAX / 4);
    problem.workers.iter_mut().for_each(|worker| worker.memory_bytes = u64::MAX - 1);
    assert!(matches!(plan(&problem), Err(Refusal::DoesNotFit { .. })));
    problem.kv_tokens = u64::MAX;
    assert!(matches!(plan(&problem), Err(Refusal::DoesNotFit { .. })));
}

#[test]
fn a_standby_takes_over_the_lost_stage_and_nobody_else_moves() {
    let problem = grok(workers(5, 90, 100.0));
    let mut problem = Problem { workers: problem.workers[..4].to_vec(), ..problem };
    let before = plan(&problem).unwrap();
    problem = carried_out(&problem, &before);
    let lost = before.stages[1].clone();
    problem.workers[lost.worker] = worker("spare", 90, 100.0);
    let after = plan(&problem).unwrap();
    let moved: u32 = after.stages.iter().map(|stage| stage.layers_to_load).sum();
    assert_eq!(moved, lost.layers.count());
    assert_eq!(as_previous(&after), as_previous(&before));
}

#[test]
fn wavering_measurements_move_nothing() {
    let mut problem = grok(workers(4, 128, 100.0));
    let before = plan(&problem).unwrap();
    problem = carried_out(&problem, &before);
    for (worker, factor) in problem.workers.iter_mut().zip([1.02, 0.99, 0.985, 1.01]) {
        worker.read_bandwidth *= factor;
    }
    assert_eq!(as_previous(&plan(&problem).unwrap()), as_previous(&before));
    // A fifth worker is worth the moves.
    problem.workers.push(worker("new", 128, 100.0));
    assert_eq!(plan(&problem).unwrap().stages.len(), 5);
}

#[test]
fn twelve_workers_and_64_layers_are_solved_without_trying_every_plan() {
    // Well under 2 s on an idle machine. No clock is read: 12! orders times the ways to cut 64 layers would not come to their end here.
    for objective in [Objective::Throughput, Objective::Latency] {
        for held in [false, true] {
            let speeds = (0..12).map(|index| 60.0 + 7.0 * f64::from(index));
            let workers = speeds.enumerate().map(|(index, speed)| worker(&format!("w{index}"), 400, speed)).collect();
            let mut problem = Problem { objective, ..grok(workers) };
            if held {
                problem.workers[3].held_layers = Some(0..8);
                problem.workers[7].held_layers = Some(20..30);
            }
            let solved = plan(&problem).unwrap();
            assert_eq!(
                solved.stages.iter().map(|stage| stage.layers.count()).sum::<u32>(),
                64,
                "{objective:?}, held {held}"
            );
        }
    }
}

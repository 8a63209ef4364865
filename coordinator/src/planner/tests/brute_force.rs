//! Every plan there is, for problems small enough, priced by sums written down once more.

use std::ops::Range;

use crate::planner::{Objective, Problem};

/// One way to place all layers: worker and layers of each stage.
pub(super) type Placement = Vec<(usize, Range<usize>)>;

/// Device bytes of a stage beside scratch.
pub(super) fn placed_bytes(problem: &Problem, layers: &Range<usize>) -> u64 {
    let weights: u64 = problem.layers[layers.clone()].iter().map(|layer| layer.weight_bytes).sum();
    let kv = layers.len() as u64 * problem.kv_tokens * problem.kv_bytes_per_token_per_layer;
    let head = if layers.end == problem.layers.len() { problem.head.weight_bytes } else { 0 };
    weights + kv + head
}

pub(super) fn fits(problem: &Problem, worker: usize, layers: &Range<usize>) -> bool {
    let head = if layers.end == problem.layers.len() { problem.scratch.head_bytes } else { 0 };
    placed_bytes(problem, layers) + problem.scratch.stage_bytes + head <= problem.workers[worker].memory_bytes
}

pub(super) fn step_seconds(problem: &Problem, worker: usize, layers: &Range<usize>) -> f64 {
    let batch = f64::from(problem.batch_tokens);
    let untouched = 1.0 - f64::from(problem.num_experts_per_tok) / f64::from(problem.num_experts);
    let touched = 1.0 - untouched.powf(batch);
    let resources = &problem.workers[worker];
    let product = |format: &str, bytes: f64, flops: f64| {
        let (reading, computing) = match resources.rates.get(format) {
            Some(rate) => (rate.bytes_per_second, rate.flops_per_second),
            None => (resources.read_bandwidth, resources.flop_rate),
        };
        (bytes / reading).max(flops * batch / computing)
    };
    let overhead = resources.overhead;
    let mut seconds = overhead.step_seconds + problem.link.seconds_per_hop;
    for layer in &problem.layers[layers.clone()] {
        seconds += overhead.layer_seconds;
        for cost in &layer.products {
            let share = if cost.of_experts { touched } else { 1.0 };
            seconds += product(&cost.format, cost.bytes as f64 * share, cost.flops_per_token);
        }
    }
    if layers.end == problem.layers.len() {
        let head = &problem.head;
        seconds +=
            product(&head.format, head.weight_bytes as f64, head.flops_per_token) + overhead.draw_seconds * batch;
    } else {
        seconds += problem.hidden_bytes_per_token as f64 * batch / problem.link.bytes_per_second;
    }
    seconds
}

/// What the plan makes small.
pub(super) fn value(problem: &Problem, placement: &Placement) -> f64 {
    let times = placement.iter().map(|(worker, layers)| step_seconds(problem, *worker, layers));
    match problem.objective {
        Objective::Throughput => times.fold(0.0, f64::max),
        Objective::Latency => times.sum(),
    }
}

/// Layers that have to be loaded.
pub(super) fn moved(problem: &Problem, placement: &Placement) -> usize {
    let loads = |(worker, layers): &(usize, Range<usize>)| {
        let held = problem.workers[*worker].held_layers.clone().unwrap_or_default();
        layers.clone().filter(|layer| !held.contains(&(*layer as u32))).count()
    };
    placement.iter().map(loads).sum()
}

/// Every allowed placement.
pub(super) fn placements(problem: &Problem) -> Vec<Placement> {
    let mut found = Vec::new();
    extend(problem, &mut Vec::new(), 0, &mut found);
    found
}

fn extend(problem: &Problem, placed: &mut Placement, start: usize, found: &mut Vec<Placement>) {
    if start == problem.layers.len() {
        let used = |index: usize| placed.iter().any(|(worker, _)| *worker == index);
        if (0..problem.workers.len()).all(|index| problem.workers[index].pinned_layers.is_none() || used(index)) {
            found.push(placed.clone());
        }
        return;
    }
    for worker in 0..problem.workers.len() {
        if placed.iter().any(|(taken, _)| *taken == worker) {
            continue;
        }
        for end in start + 1..=problem.layers.len() {
            let pin = &problem.workers[worker].pinned_layers;
            let pin_kept = pin.as_ref().is_none_or(|pin| *pin == (start as u32..end as u32));
            if pin_kept && fits(problem, worker, &(start..end)) {
                placed.push((worker, start..end));
                extend(problem, placed, end, found);
                placed.pop();
            }
        }
    }
}

/// The fewest bytes that must be left over, when pinned layers may not be.
pub(super) fn least_missing(problem: &Problem, used: usize, start: usize) -> u64 {
    if start == problem.layers.len() {
        return 0;
    }
    let pinned_here = |layer: usize| {
        problem
            .workers
            .iter()
            .position(|worker| worker.pinned_layers.clone().is_some_and(|pin| pin.contains(&(layer as u32))))
    };
    if let Some(worker) = pinned_here(start) {
        let pin = problem.workers[worker].pinned_layers.clone().unwrap_or_default();
        return least_missing(problem, used, pin.end as usize);
    }
    let mut least = placed_bytes(problem, &(start..start + 1)) + least_missing(problem, used, start + 1);
    for worker in (0..problem.workers.len()).filter(|worker| used & (1 << worker) == 0) {
        for end in start + 1..=problem.layers.len() {
            if pinned_here(end - 1).is_some() || problem.workers[worker].pinned_layers.is_some() {
                break;
            }
            if fits(problem, worker, &(start..end)) {
                least = least.min(least_missing(problem, used | 1 << worker, end));
            }
        }
    }
    least
}

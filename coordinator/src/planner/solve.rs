//! Chooses the plan: how good the best one is, whether the plan in force is good enough, and if not, which of the good ones moves
//! the fewest layers.

use std::ops::Range;

use grokpipe_proto::ids::LayerRange;

use super::problem::{Hole, LAYERS_MAX, Objective, Plan, PlannedStage, Problem, Refusal, WORKERS_MAX};
use super::search::{Key, Rules, Segment, Terrain, narrow};
use super::{ordered, subsets};

/// Most unpinned workers for which every subset and order is tried.
pub const EXACT_WORKERS_MAX: usize = 12;

/// Most layers for which every subset and order is tried: the time grows with their square.
const EXACT_LAYERS_MAX: usize = 128;

/// A plan that is slower than the best by less than one part in this many stays, or is preferred if it moves fewer layers.
/// Measured bandwidth wavers by a few percent from start to start, and a layer takes seconds to minutes to load.
const TOLERANCE_DIVISOR: u64 = 20;

/// Which stages are better, once it is known how good a plan can be.
struct Ranking<'a, 'p> {
    terrain: &'a Terrain<'p>,
    /// No stage may take longer.
    time_max: u64,
    objective: Objective,
    /// What loading a layer may cost in time, for [`Objective::Latency`].
    layer_price: u64,
}

impl Rules for Ranking<'_, '_> {
    fn stage(&self, worker: usize, start: usize, end: usize) -> Option<Key> {
        let time = self.terrain.stage_time(worker, start, end).filter(|&time| time <= self.time_max)?;
        let moved = self.terrain.costs.layers_to_load(worker, start, end);
        Some(match self.objective {
            Objective::Throughput => [moved, 1, time + evenness(time, self.time_max)],
            Objective::Latency => [time + moved * self.layer_price, moved, 1],
        })
    }

    fn hole(&self, _start: usize, _end: usize) -> Option<Key> {
        None
    }
}

/// A slight price on uneven stages, so that equal workers get equal shares where the sum of the times leaves that open.
fn evenness(time: u64, time_max: u64) -> u64 {
    let square = u128::from(time) * u128::from(time);
    u64::try_from(square / (u128::from(time_max.max(1)) * 64)).unwrap_or(u64::MAX >> 12)
}

/// For a model that does not fit: as few bytes as possible are left over, in as few holes as possible.
struct Packing<'a, 'p> {
    terrain: &'a Terrain<'p>,
}

impl Rules for Packing<'_, '_> {
    fn stage(&self, worker: usize, start: usize, end: usize) -> Option<Key> {
        self.terrain.costs.fits(worker, start, end).then_some([0, 0, 1])
    }

    fn hole(&self, start: usize, end: usize) -> Option<Key> {
        // Capped, so that sums of absurd sizes do not overflow.
        Some([self.terrain.costs.placed_bytes(start, end).min(u64::MAX >> 9), 1, 0])
    }
}

/// The plainest ranking: the sum of the times.
struct Times<'a, 'p> {
    terrain: &'a Terrain<'p>,
}

impl Rules for Times<'_, '_> {
    fn stage(&self, worker: usize, start: usize, end: usize) -> Option<Key> {
        Some([self.terrain.stage_time(worker, start, end)?, 0, 0])
    }

    fn hole(&self, _start: usize, _end: usize) -> Option<Key> {
        None
    }
}

/// The solver in use.
enum Solver {
    /// All subsets and orders.
    Exact,
    /// Some orders, improved step by step.
    Orders {
        /// Where the search begins. They do not depend on what the workers hold, so what it finds does not either.
        starts: Vec<Vec<usize>>,
        /// Further orders that count as they are: as the layers stand now, and answers found on the way.
        others: Vec<Vec<usize>>,
    },
}

/// Solves the problem.
///
/// # Errors
/// Every [`Refusal`]: figures that make no sense, pins that contradict each other or the model, too little memory.
pub fn plan(problem: &Problem) -> Result<Plan, Refusal> {
    check_size(problem)?;
    let terrain = Terrain::new(problem)?;
    let exact = terrain.unpinned.len() <= EXACT_WORKERS_MAX && terrain.num_layers() <= EXACT_LAYERS_MAX;
    let solver = if exact { Solver::Exact } else { Solver::orders(&terrain) };
    let segments = stages(problem, &terrain, solver)?;
    Ok(describe(problem, &terrain, &segments))
}

/// [`plan`] by searching over orders however few the workers are, to hold that search to the exact one.
#[cfg(test)]
pub(super) fn plan_by_orders(problem: &Problem) -> Result<Plan, Refusal> {
    check_size(problem)?;
    let terrain = Terrain::new(problem)?;
    let segments = stages(problem, &terrain, Solver::orders(&terrain))?;
    Ok(describe(problem, &terrain, &segments))
}

/// Sizes that the solver's tables can hold.
fn check_size(problem: &Problem) -> Result<(), Refusal> {
    let (layers, workers) = (problem.layers.len(), problem.workers.len());
    if layers == 0 {
        return Err(Refusal::NoLayers);
    }
    if workers == 0 {
        return Err(Refusal::NoWorkers { layers });
    }
    for (what, limit, found) in [("layers", LAYERS_MAX, layers), ("workers", WORKERS_MAX, workers)] {
        if found > limit {
            return Err(Refusal::TooLarge { what, limit, found });
        }
    }
    Ok(())
}

/// The stages, pinned ones included, in the order of the layers.
fn stages(problem: &Problem, terrain: &Terrain<'_>, mut solver: Solver) -> Result<Vec<Segment>, Refusal> {
    let objective = problem.objective;
    let incumbent = incumbent(problem, terrain);
    let anything_held = (0..problem.workers.len()).any(|worker| !terrain.costs.kept_layers(worker).is_empty());
    loop {
        let Some(value) = solver.best_value(objective, terrain) else {
            return Err(does_not_fit(problem, terrain, &solver));
        };
        let slack = if anything_held { value / TOLERANCE_DIVISOR } else { 0 };
        if let Some(kept) = incumbent.as_ref().filter(|kept| value_of(objective, terrain, kept) <= value + slack) {
            return Ok(kept.clone());
        }
        let ranking = match objective {
            Objective::Throughput => Ranking { terrain, time_max: value + slack, objective, layer_price: 0 },
            Objective::Latency => {
                let layer_price = slack / terrain.num_layers() as u64;
                Ranking { terrain, time_max: u64::MAX, objective, layer_price }
            }
        };
        let segments = solver.best_plan(terrain, &ranking).ok_or_else(|| does_not_fit(problem, terrain, &solver))?;
        // While it looks for fewer moved layers, a search over orders may find a better order. If so, repeat with that order as a start;
        // otherwise re-solving our own answer could find a better plan. The value falls each time, so this ends.
        match &mut solver {
            Solver::Orders { others, .. } => {
                let order = used_order(terrain, &segments);
                if order_value(objective, terrain, &order).is_none_or(|found| found >= value) {
                    return Ok(terrain.with_pins(segments));
                }
                others.push(order);
            }
            Solver::Exact => return Ok(terrain.with_pins(segments)),
        }
    }
}

impl Solver {
    /// The search over orders.
    fn orders(terrain: &Terrain<'_>) -> Self {
        let mut starts = ordered::starting_orders(terrain);
        if starts.iter().all(|order| ordered::smallest_bottleneck(terrain, order).is_none()) {
            // Memory is tight: begin with an order that wastes as little of it as possible.
            let left_over = |order: &[usize]| ordered::best(terrain, order, &Packing { terrain }).map(|(key, _)| key);
            starts.extend(ordered::improve(starts.clone(), prices(terrain), left_over).map(|(_, order)| order));
        }
        Self::Orders { starts, others: vec![ordered::held_order(terrain)] }
    }

    /// How good a plan can be: the time of the slowest stage, or of all stages together. `None` when the layers do not fit.
    fn best_value(&mut self, objective: Objective, terrain: &Terrain<'_>) -> Option<u64> {
        match (self, objective) {
            (Self::Exact, Objective::Throughput) => {
                subsets::smallest_bottleneck(terrain).map(|time| time.max(terrain.slowest_pin()))
            }
            (Self::Exact, Objective::Latency) => {
                subsets::best(terrain, &Times { terrain }).map(|(key, _)| key[0] + terrain.pin_times().sum::<u64>())
            }
            (Self::Orders { starts, others }, _) => {
                let evaluate = |order: &[usize]| order_value(objective, terrain, order);
                let graded = |order: &[usize]| {
                    let value = evaluate(order)?;
                    Some((value, ordered::left_over(terrain, order, value)))
                };
                let found = ordered::improve(starts.clone(), prices(terrain), graded);
                let least = others.iter().filter_map(|order| evaluate(order)).min();
                let value = found.as_ref().map(|((value, _), _)| *value);
                others.extend(found.map(|(_, order)| order));
                value.into_iter().chain(least).min()
            }
        }
    }

    /// The best plan under the rules, without pinned stages.
    fn best_plan(&self, terrain: &Terrain<'_>, rules: &impl Rules) -> Option<Vec<Segment>> {
        match self {
            Self::Exact => subsets::best(terrain, rules).map(|(_, segments)| segments),
            Self::Orders { starts, others } => {
                let evaluate = |order: &[usize]| ordered::best(terrain, order, rules).map(|(key, _)| key);
                let orders = others.iter().chain(starts).cloned().collect();
                let (_, order) = ordered::improve(orders, prices(terrain), evaluate)?;
                ordered::best(terrain, &order, rules).map(|(_, segments)| segments)
            }
        }
    }
}

/// How many stages the evaluation of one order prices at most, roughly.
fn prices(terrain: &Terrain<'_>) -> usize {
    let (workers, layers) = (terrain.unpinned.len(), terrain.num_layers());
    workers * layers * layers / 2
}

/// [`Solver::best_value`] for one order.
fn order_value(objective: Objective, terrain: &Terrain<'_>, order: &[usize]) -> Option<u64> {
    match objective {
        Objective::Throughput => {
            ordered::smallest_bottleneck(terrain, order).map(|time| time.max(terrain.slowest_pin()))
        }
        Objective::Latency => {
            let (key, _) = ordered::best(terrain, order, &Times { terrain })?;
            Some(key[0] + terrain.pin_times().sum::<u64>())
        }
    }
}

/// The order that a plan stands for: its workers, then the spare ones.
fn used_order(terrain: &Terrain<'_>, segments: &[Segment]) -> Vec<usize> {
    let mut order: Vec<usize> = segments.iter().filter_map(|segment| segment.worker).collect();
    let spares: Vec<usize> = terrain.unpinned.iter().copied().filter(|worker| !order.contains(worker)).collect();
    order.extend(spares);
    order
}

/// How good a given plan is.
fn value_of(objective: Objective, terrain: &Terrain<'_>, segments: &[Segment]) -> u64 {
    let timed = segments.iter().filter_map(|Segment { worker, layers }| Some((*worker.as_ref()?, layers)));
    let times = timed.map(|(worker, layers)| terrain.costs.step_picoseconds(worker, layers.start, layers.end));
    match objective {
        Objective::Throughput => times.max().unwrap_or(0),
        Objective::Latency => times.sum(),
    }
}

/// The plan in force (else what the workers hold), if it is still a plan: every layer once, pins kept, everybody's memory enough.
fn incumbent(problem: &Problem, terrain: &Terrain<'_>) -> Option<Vec<Segment>> {
    let held = |worker| (worker, terrain.costs.kept_layers(worker));
    let mut stages: Vec<(usize, Range<u32>)> = match &problem.previous {
        Some(previous) => previous.iter().map(|stage| (stage.worker, stage.layers.iter())).collect(),
        None => (0..problem.workers.len()).map(held).filter(|(_, layers)| !layers.is_empty()).collect(),
    };
    stages.sort_by_key(|(_, layers)| layers.start);
    let mut reached = 0;
    let mut segments = Vec::new();
    for (worker, layers) in stages {
        let range = layers.start as usize..layers.end as usize;
        let resources = problem.workers.get(worker)?;
        let taken = segments.iter().any(|segment: &Segment| segment.worker == Some(worker));
        let pin_kept = resources.pinned_layers.as_ref().is_none_or(|pin| *pin == layers);
        if taken || !pin_kept || range.is_empty() || range.start != reached || range.end > terrain.num_layers() {
            return None;
        }
        if !terrain.costs.fits(worker, range.start, range.end) {
            return None;
        }
        reached = range.end;
        segments.push(Segment { worker: Some(worker), layers: range });
    }
    let pins_used =
        terrain.pins.iter().all(|(worker, _)| segments.iter().any(|segment| segment.worker == Some(*worker)));
    (reached == terrain.num_layers() && pins_used).then_some(segments)
}

/// Says what is missing, by packing as much as possible.
fn does_not_fit(problem: &Problem, terrain: &Terrain<'_>, solver: &Solver) -> Refusal {
    let segments = solver.best_plan(terrain, &Packing { terrain }).unwrap_or_default();
    let left_over = segments.into_iter().filter(|segment| segment.worker.is_none());
    let holes: Vec<Hole> = left_over
        .map(|Segment { layers, .. }| Hole {
            bytes: terrain.costs.placed_bytes(layers.start, layers.end),
            layers: narrow(&layers),
        })
        .collect();
    Refusal::DoesNotFit {
        missing_bytes: holes.iter().fold(0, |sum, hole| hole.bytes.saturating_add(sum)),
        needed_bytes: terrain.costs.placed_bytes(0, terrain.num_layers()),
        memory_bytes: problem.workers.iter().fold(0, |sum, worker| worker.memory_bytes.saturating_add(sum)),
        workers: problem.workers.len(),
        holes,
    }
}

/// The answer in full.
fn describe(problem: &Problem, terrain: &Terrain<'_>, segments: &[Segment]) -> Plan {
    let costs = &terrain.costs;
    let stage = |segment: &Segment| {
        let (worker, start, end) = (segment.worker?, segment.layers.start, segment.layers.end);
        Some(PlannedStage {
            worker,
            layers: LayerRange::try_from(narrow(&segment.layers)).ok()?,
            weight_bytes: costs.weight_bytes(start, end),
            kv_bytes: costs.kv_bytes(start, end),
            scratch_bytes: costs.scratch_bytes(end),
            memory_bytes: costs.memory_bytes(start, end),
            step_seconds: costs.step_seconds(worker, start, end, problem.batch_tokens),
            layers_to_load: costs.layers_to_load(worker, start, end) as u32,
        })
    };
    let stages: Vec<PlannedStage> = segments.iter().filter_map(stage).collect();
    let slowest = stages.iter().map(|stage| stage.step_seconds).fold(0.0, f64::max);
    let one_token = stages
        .iter()
        .map(|stage| costs.step_seconds(stage.worker, stage.layers.start() as usize, stage.layers.end() as usize, 1));
    let one_token: f64 = one_token.sum();
    let standby =
        (0..problem.workers.len()).filter(|index| stages.iter().all(|stage| stage.worker != *index)).collect();
    Plan {
        stages,
        standby,
        predicted_tokens_per_second: f64::from(problem.batch_tokens) / slowest,
        predicted_stream_tokens_per_second: one_token.recip(),
    }
}

//! Turns a [`Problem`] into two questions with constant-time answers: what does this worker need for this range, and how long
//! does it take. Everything the solver compares comes from here.
//!
//! Times are compared as whole picoseconds: sums are then exact whatever their order, so that ties are ties and solving an
//! answer again finds the same answer. A layer's time is the sum over its products, each the slower of reading and computing at the
//! worker's rate for the format, so times of layers add up. Not modelled: reading the KV cache (it depends on how long sequences happen to be), and
//! what the coordinator itself costs.

use std::ops::Range;

use super::problem::{HeadCost, LayerCost, Overhead, Problem, Rate, Refusal, WorkerResources};

/// Longest time that is told apart, about 2.5 hours: 256 stages of it still add up in 64 bits.
const PICOSECONDS_MAX: f64 = (1_u64 << 53) as f64;

/// Costs of any layer range on any worker.
pub(super) struct Costs<'a> {
    problem: &'a Problem,
    /// Running sums: entry `i` is the sum over the layers before `i`.
    weight_bytes: Vec<u128>,
    /// By worker: running sums of the layers' times for the problem's batch, in picoseconds.
    layer_picoseconds: Vec<Vec<u64>>,
}

impl<'a> Costs<'a> {
    /// Checks the figures and sums them.
    pub(super) fn new(problem: &'a Problem) -> Result<Self, Refusal> {
        check_figures(problem)?;
        let mut costs = Self { problem, weight_bytes: vec![0], layer_picoseconds: Vec::new() };
        for layer in &problem.layers {
            let before = costs.weight_bytes[costs.weight_bytes.len() - 1];
            costs.weight_bytes.push(before + u128::from(layer.weight_bytes));
        }
        for worker in &problem.workers {
            let mut sum = 0;
            let times = problem.layers.iter().map(|layer| {
                sum += picoseconds(layer_seconds(problem, worker, layer, problem.batch_tokens));
                sum
            });
            costs.layer_picoseconds.push(std::iter::once(0).chain(times).collect());
        }
        Ok(costs)
    }

    /// Layers of the model.
    pub(super) fn num_layers(&self) -> usize {
        self.problem.layers.len()
    }

    /// Whether the stage that ends before layer `end` is the last one.
    fn has_head(&self, end: usize) -> bool {
        end == self.num_layers()
    }

    /// Device bytes of the weights of a range, with the head if it is the last.
    pub(super) fn weight_bytes(&self, start: usize, end: usize) -> u64 {
        let head = if self.has_head(end) { self.problem.head.weight_bytes } else { 0 };
        let layers = self.weight_bytes[end] - self.weight_bytes[start];
        u64::try_from(layers).unwrap_or(u64::MAX).saturating_add(head)
    }

    /// Device bytes of the KV pool of a range.
    pub(super) fn kv_bytes(&self, start: usize, end: usize) -> u64 {
        self.problem
            .kv_bytes_per_token_per_layer
            .saturating_mul(self.problem.kv_tokens)
            .saturating_mul((end - start) as u64)
    }

    /// Working memory of a stage that ends before layer `end`.
    pub(super) fn scratch_bytes(&self, end: usize) -> u64 {
        let head = if self.has_head(end) { self.problem.scratch.head_bytes } else { 0 };
        self.problem.scratch.stage_bytes.saturating_add(head)
    }

    /// Device bytes of a range without working memory: what is missing when no worker has room for it.
    pub(super) fn placed_bytes(&self, start: usize, end: usize) -> u64 {
        self.weight_bytes(start, end).saturating_add(self.kv_bytes(start, end))
    }

    /// Everything that the range takes on a device.
    pub(super) fn memory_bytes(&self, start: usize, end: usize) -> u64 {
        self.weight_bytes(start, end).saturating_add(self.kv_bytes(start, end)).saturating_add(self.scratch_bytes(end))
    }

    /// What the worker has.
    pub(super) fn worker_memory(&self, worker: usize) -> u64 {
        self.problem.workers[worker].memory_bytes
    }

    /// Whether the range fits into the worker.
    pub(super) fn fits(&self, worker: usize, start: usize, end: usize) -> bool {
        self.memory_bytes(start, end) <= self.problem.workers[worker].memory_bytes
    }

    /// Time of one micro-batch of `batch_tokens` in this stage: its layers one after the other, and the hop to the next.
    pub(super) fn step_seconds(&self, worker: usize, start: usize, end: usize, batch_tokens: u32) -> f64 {
        let resources = &self.problem.workers[worker];
        let layers = self.problem.layers[start..end].iter();
        let layers: f64 = layers.map(|layer| layer_seconds(self.problem, resources, layer, batch_tokens)).sum();
        layers + self.beside_layers(resources, end, batch_tokens)
    }

    /// The time of a stage that ends before layer `end`, without its layers: the step itself, the head if it is the last, and the hop.
    fn beside_layers(&self, resources: &WorkerResources, end: usize, batch_tokens: u32) -> f64 {
        let (problem, batch) = (self.problem, f64::from(batch_tokens));
        let seconds = resources.overhead.step_seconds + problem.link.seconds_per_hop;
        if !self.has_head(end) {
            return seconds + problem.hidden_bytes_per_token as f64 * batch / problem.link.bytes_per_second;
        }
        // The last stage hands on tokens, not hidden states.
        let HeadCost { weight_bytes, format, flops_per_token } = &problem.head;
        let head = product_seconds(resources, format, *weight_bytes as f64, flops_per_token * batch);
        seconds + head + resources.overhead.draw_seconds * batch
    }

    /// [`Self::step_seconds`] for the problem's batch, in picoseconds, at least one.
    pub(super) fn step_picoseconds(&self, worker: usize, start: usize, end: usize) -> u64 {
        let layers = self.layer_picoseconds[worker][end] - self.layer_picoseconds[worker][start];
        let rest = self.beside_layers(&self.problem.workers[worker], end, self.problem.batch_tokens);
        (layers + picoseconds(rest)).clamp(1, PICOSECONDS_MAX as u64)
    }

    /// Layers of the range that the worker would have to load.
    pub(super) fn layers_to_load(&self, worker: usize, start: usize, end: usize) -> u64 {
        let held = self.kept_layers(worker);
        let (held_start, held_end) = (held.start as usize, held.end as usize);
        let kept = end.min(held_end).saturating_sub(start.max(held_start));
        (end - start - kept) as u64
    }

    /// What the worker need not load again: what it says it holds, else what the plan in force gave it.
    pub(super) fn kept_layers(&self, worker: usize) -> Range<u32> {
        if let Some(held) = &self.problem.workers[worker].held_layers {
            return held.clone();
        }
        let previous = self.problem.previous.iter().flatten().find(|stage| stage.worker == worker);
        previous.map_or(0..0, |stage| stage.layers.iter())
    }
}

/// Time of one micro-batch in one layer.
fn layer_seconds(problem: &Problem, worker: &WorkerResources, layer: &LayerCost, batch_tokens: u32) -> f64 {
    let products = layer.products.iter().map(|product| {
        let share = if product.of_experts { touched_share(problem, batch_tokens) } else { 1.0 };
        let flops = product.flops_per_token * f64::from(batch_tokens);
        product_seconds(worker, &product.format, product.bytes as f64 * share, flops)
    });
    worker.overhead.layer_seconds + products.sum::<f64>()
}

/// The slower of reading and computing, at the worker's rate for the format, or at its general one.
fn product_seconds(worker: &WorkerResources, format: &str, bytes: f64, flops: f64) -> f64 {
    let general = Rate { bytes_per_second: worker.read_bandwidth, flops_per_second: worker.flop_rate };
    let rate = worker.rates.get(format).unwrap_or(&general);
    (bytes / rate.bytes_per_second).max(flops / rate.flops_per_second)
}

fn picoseconds(seconds: f64) -> u64 {
    (seconds * 1e12).round().clamp(0.0, PICOSECONDS_MAX) as u64
}

/// Share of a layer's experts that a batch is expected to touch: each token leaves a given expert alone with probability
/// `1 - k/E`, tokens choosing independently.
fn touched_share(problem: &Problem, batch_tokens: u32) -> f64 {
    let untouched = 1.0 - f64::from(problem.num_experts_per_tok) / f64::from(problem.num_experts);
    1.0 - untouched.powf(f64::from(batch_tokens))
}

/// Refuses figures with which no comparison would mean anything.
fn check_figures(problem: &Problem) -> Result<(), Refusal> {
    problem.workers.iter().try_for_each(check_worker)?;
    let positive = "a positive finite number";
    let not_negative = "a finite number that is not negative";
    let (experts, chosen) = (f64::from(problem.num_experts), f64::from(problem.num_experts_per_tok));
    check("link.bytes_per_second", positive, problem.link.bytes_per_second, |value| value > 0.0)?;
    check("link.seconds_per_hop", not_negative, problem.link.seconds_per_hop, |value| value >= 0.0)?;
    check("batch_tokens", "at least 1", f64::from(problem.batch_tokens), |value| value >= 1.0)?;
    check("num_experts", "at least 1", experts, |value| value >= 1.0)?;
    check("num_experts_per_tok", "1 to num_experts", chosen, |value| (1.0..=experts).contains(&value))?;
    check("head.flops_per_token", not_negative, problem.head.flops_per_token, |value| value >= 0.0)?;
    let mut products = problem.layers.iter().flat_map(|layer| &layer.products);
    products.try_for_each(|product| {
        check("layer.flops_per_token", not_negative, product.flops_per_token, |value| value >= 0.0)
    })
}

/// Refuses measurements that cannot be any.
fn check_worker(worker: &WorkerResources) -> Result<(), Refusal> {
    let refuse = |expected, figure: String, value| {
        Err(Refusal::BadWorkerFigure { worker: worker.name.clone(), expected, figure, value })
    };
    let general = [("read_bandwidth".to_owned(), worker.read_bandwidth), ("flop_rate".to_owned(), worker.flop_rate)];
    let by_format = worker.rates.iter().flat_map(|(format, rate)| {
        [("bytes_per_second", rate.bytes_per_second), ("flops_per_second", rate.flops_per_second)]
            .map(|(figure, value)| (format!("{figure} in {format}"), value))
    });
    for (figure, value) in general.into_iter().chain(by_format) {
        if !(value.is_finite() && value > 0.0) {
            return refuse("a positive finite", figure, value);
        }
    }
    let Overhead { step_seconds, layer_seconds, draw_seconds } = worker.overhead;
    for (figure, value) in
        [("step_seconds", step_seconds), ("layer_seconds", layer_seconds), ("draw_seconds", draw_seconds)]
    {
        if !(value.is_finite() && value >= 0.0) {
            return refuse("a finite, not negative", figure.to_owned(), value);
        }
    }
    Ok(())
}

/// One figure against its rule.
fn check(figure: &'static str, expected: &'static str, value: f64, rule: impl Fn(f64) -> bool) -> Result<(), Refusal> {
    if value.is_finite() && rule(value) { Ok(()) } else { Err(Refusal::BadFigure { figure, expected, value }) }
}

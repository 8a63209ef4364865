//! Turns a [`Problem`] into two questions with constant-time answers: what does this worker need for this range, and how long
//! does it take. Everything the solver compares comes from here.
//!
//! Times are compared as whole picoseconds: sums are then exact whatever their order, so that ties are ties and solving an
//! answer again finds the same answer. Not modelled: reading the KV cache (it depends on how long sequences happen to be), and
//! what the coordinator itself costs.

use std::ops::Range;

use super::problem::{Problem, Refusal};

/// Longest time that is told apart, about 2.5 hours: 256 stages of it still add up in 64 bits.
const PICOSECONDS_MAX: f64 = (1_u64 << 53) as f64;

/// Running sums over the layers: entry `i` is the sum over the layers before `i`.
struct Prefix {
    weight_bytes: Vec<u128>,
    flops_per_token: Vec<f64>,
    fixed_bytes: Vec<f64>,
    expert_bytes: Vec<f64>,
}

/// Costs of any layer range on any worker.
pub(super) struct Costs<'a> {
    problem: &'a Problem,
    prefix: Prefix,
}

impl<'a> Costs<'a> {
    /// Checks the figures and sums them.
    pub(super) fn new(problem: &'a Problem) -> Result<Self, Refusal> {
        check_figures(problem)?;
        let mut prefix = Prefix {
            weight_bytes: vec![0],
            flops_per_token: vec![0.0],
            fixed_bytes: vec![0.0],
            expert_bytes: vec![0.0],
        };
        for (index, layer) in problem.layers.iter().enumerate() {
            prefix.weight_bytes.push(prefix.weight_bytes[index] + u128::from(layer.weight_bytes));
            prefix.flops_per_token.push(prefix.flops_per_token[index] + layer.flops_per_token);
            prefix.fixed_bytes.push(prefix.fixed_bytes[index] + layer.read_bytes_fixed as f64);
            prefix.expert_bytes.push(prefix.expert_bytes[index] + layer.expert_read_bytes as f64);
        }
        Ok(Self { problem, prefix })
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
        let layers = self.prefix.weight_bytes[end] - self.prefix.weight_bytes[start];
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

    /// Device bytes of a range beside working memory: what is missing when nobody has room for it.
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

    /// Time of one micro-batch of `batch_tokens` in this stage: the slower of reading and computing, and the hop to the next.
    pub(super) fn step_seconds(&self, worker: usize, start: usize, end: usize, batch_tokens: u32) -> f64 {
        let (problem, prefix) = (self.problem, &self.prefix);
        let resources = &problem.workers[worker];
        let batch = f64::from(batch_tokens);
        let mut bytes = prefix.fixed_bytes[end] - prefix.fixed_bytes[start];
        bytes += (prefix.expert_bytes[end] - prefix.expert_bytes[start]) * touched_share(problem, batch_tokens);
        let mut flops = prefix.flops_per_token[end] - prefix.flops_per_token[start];
        // The last stage hands on a token, not hidden states.
        let mut hop = problem.link.seconds_per_hop;
        if self.has_head(end) {
            bytes += problem.head.weight_bytes as f64;
            flops += problem.head.flops_per_token;
        } else {
            hop += problem.hidden_bytes_per_token as f64 * batch / problem.link.bytes_per_second;
        }
        (bytes / resources.read_bandwidth).max(flops * batch / resources.flop_rate) + hop
    }

    /// [`Self::step_seconds`] for the problem's batch, in picoseconds, at least one.
    pub(super) fn step_picoseconds(&self, worker: usize, start: usize, end: usize) -> u64 {
        let seconds = self.step_seconds(worker, start, end, self.problem.batch_tokens);
        (seconds * 1e12).round().clamp(1.0, PICOSECONDS_MAX) as u64
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
        previous.map_or(0..0, |stage| stage.layers.clone())
    }
}

/// Share of a layer's experts that a batch is expected to touch: each token leaves a given expert alone with probability
/// `1 - k/E`, tokens choosing independently.
fn touched_share(problem: &Problem, batch_tokens: u32) -> f64 {
    let untouched = 1.0 - f64::from(problem.num_experts_per_tok) / f64::from(problem.num_experts);
    1.0 - untouched.powf(f64::from(batch_tokens))
}

/// Refuses figures with which no comparison would mean anything.
fn check_figures(problem: &Problem) -> Result<(), Refusal> {
    for worker in &problem.workers {
        for (figure, value) in [("read_bandwidth", worker.read_bandwidth), ("flop_rate", worker.flop_rate)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Refusal::BadWorkerFigure { worker: worker.name.clone(), figure, value });
            }
        }
    }
    let positive = "a positive finite number";
    let not_negative = "a finite number that is not negative";
    let (experts, chosen) = (f64::from(problem.num_experts), f64::from(problem.num_experts_per_tok));
    check("link.bytes_per_second", positive, problem.link.bytes_per_second, |value| value > 0.0)?;
    check("link.seconds_per_hop", not_negative, problem.link.seconds_per_hop, |value| value >= 0.0)?;
    check("batch_tokens", "at least 1", f64::from(problem.batch_tokens), |value| value >= 1.0)?;
    check("num_experts", "at least 1", experts, |value| value >= 1.0)?;
    check("num_experts_per_tok", "1 to num_experts", chosen, |value| (1.0..=experts).contains(&value))?;
    check("head.flops_per_token", not_negative, problem.head.flops_per_token, |value| value >= 0.0)?;
    problem
        .layers
        .iter()
        .try_for_each(|layer| check("layer.flops_per_token", not_negative, layer.flops_per_token, |value| value >= 0.0))
}

/// One figure against its rule.
fn check(figure: &'static str, expected: &'static str, value: f64, rule: impl Fn(f64) -> bool) -> Result<(), Refusal> {
    if value.is_finite() && rule(value) { Ok(()) } else { Err(Refusal::BadFigure { figure, expected, value }) }
}

//! The verdict: does the cluster serve, and if not, which layers lack a live stage and why.
//!
//! A pure function of plan, nodes, and what the coordinator knows of links. A stage counts as covered when its node is `ready` or
//! `draining`; as loading when its node is `loading`; as lost in every other case, also when its node has rejoined but has no layers
//! yet. Lost outweighs loading, loading outweighs serving. When all layers are loaded and something still keeps the cluster from
//! serving, the verdict names it.

use super::{NodeState, SnapshotNode, SnapshotPlan, Verdict, VerdictPhase};
use crate::ids::LayerRange;

/// What a verdict is made of.
#[derive(Clone, Copy, Debug)]
pub struct VerdictInput<'a> {
    /// Layers of the model.
    pub layers: u32,
    /// The plan in force, if there is one.
    pub plan: Option<&'a SnapshotPlan>,
    /// Every known node.
    pub nodes: &'a [SnapshotNode],
    /// How many workers the configuration names; 0 when it names none.
    pub workers_expected: u32,
    /// Why the workers present do not suffice, when the planner has refused them.
    pub refusal: Option<&'a str>,
    /// Whether a token has gone through all stages, and nothing broke since.
    pub serving: bool,
    /// What last went wrong, while the plan does not serve.
    pub trouble: Option<&'a str>,
}

impl Verdict {
    /// A verdict of this phase.
    pub fn new(phase: VerdictPhase, text: String, missing_layers: impl IntoIterator<Item = LayerRange>) -> Self {
        let missing_layers = missing_layers.into_iter().map(Into::into).collect();
        Self { serving: phase == VerdictPhase::Serving, phase: phase.into(), text, missing_layers }
    }
}

/// Says whether the cluster serves, in words.
pub fn verdict(input: VerdictInput<'_>) -> Verdict {
    let Some(plan) = input.plan else {
        return waiting(&input);
    };
    let coverage = Coverage::of(input.layers, plan, input.nodes);
    let missing_layers = merged(coverage.lost.iter().chain(&coverage.loading).map(|stage| stage.layers));
    if !coverage.lost.is_empty() {
        let text = down_text(&coverage.lost);
        return Verdict::new(VerdictPhase::Down, text, missing_layers);
    }
    let ready = input.layers - missing_layers.iter().map(|range| range.count()).sum::<u32>().min(input.layers);
    if !input.serving || !coverage.loading.is_empty() {
        let reads = coverage.loading.iter().any(Stage::is_reading);
        if let Some(trouble) = input.trouble.filter(|_| !reads) {
            let text = format!("Down: {trouble}");
            return Verdict::new(VerdictPhase::Down, text, missing_layers);
        }
        let mut text = format!("Loading: {ready} of {} layers", input.layers);
        if coverage.loading.is_empty() {
            text += ", waiting for a first token to go through";
        }
        for stage in &coverage.loading {
            text += ", ";
            text += &stage.progress();
        }
        if let Some(trouble) = input.trouble {
            text += "; before that ";
            text += trouble;
        }
        return Verdict::new(VerdictPhase::Loading, text, missing_layers);
    }
    let nodes = plan.stages.len();
    let text = format!("Serving: {ready} of {} layers on {}", input.layers, counted(nodes, "node"));
    Verdict::new(VerdictPhase::Serving, text, missing_layers)
}

fn waiting(input: &VerdictInput<'_>) -> Verdict {
    let joined = input.nodes.iter().filter(|node| node.state() != NodeState::Down).count();
    let expected = input.workers_expected as usize;
    let excluded: Vec<String> = input
        .nodes
        .iter()
        .filter(|node| node.state() == NodeState::Excluded)
        .map(|node| format!("{} is left out: {}", node.name, node.last_error.as_deref().unwrap_or("unknown")))
        .collect();
    let text = match input.refusal {
        Some(refusal) => format!("No plan: {refusal}"),
        None if !excluded.is_empty() => format!("Waiting for workers: {}", excluded.join("; ")),
        None if joined < expected => format!("Waiting for workers: {joined} of {expected} joined"),
        None if joined == 0 => "Waiting for workers: none joined".to_owned(),
        None => format!("Planning: {} joined", counted(joined, "worker")),
    };
    Verdict::new(VerdictPhase::Waiting, text, LayerRange::new(0, input.layers))
}

/// Layers that no ready node covers, and the node that should.
struct Stage<'a> {
    layers: LayerRange,
    /// Name in the plan; `None` for layers that are in no stage.
    name: Option<&'a str>,
    node: Option<&'a SnapshotNode>,
}

/// Which stages are not ready.
struct Coverage<'a> {
    lost: Vec<Stage<'a>>,
    loading: Vec<Stage<'a>>,
}

impl<'a> Coverage<'a> {
    fn of(layers: u32, plan: &'a SnapshotPlan, nodes: &'a [SnapshotNode]) -> Self {
        let mut coverage = Self { lost: Vec::new(), loading: Vec::new() };
        let planned = || plan.stages.iter().filter_map(|stage| Some((&*stage.node, stage.layers()?)));
        for (name, layers) in planned() {
            let node = nodes.iter().find(|node| node.name == name);
            let found = Stage { layers, name: Some(name), node };
            match node.map(SnapshotNode::state) {
                Some(NodeState::Ready | NodeState::Draining) => {}
                Some(NodeState::Loading) => coverage.loading.push(found),
                _ => coverage.lost.push(found),
            }
        }
        let gaps = gaps(layers, planned().map(|(_name, layers)| layers));
        coverage.lost.extend(gaps.into_iter().map(|layers| Stage { layers, name: None, node: None }));
        coverage
    }
}

impl Stage<'_> {
    /// Whether its layers are still being read.
    fn is_reading(&self) -> bool {
        self.node.and_then(|node| node.load().ratio()).is_some_and(|ratio| ratio < 1.0)
    }

    /// "w3 at 37 %".
    fn progress(&self) -> String {
        let name = self.name.unwrap_or("?");
        match self.node.and_then(|node| node.load().ratio()) {
            Some(1.0..) => format!("{name} has its layers, not yet its link"),
            // Rounded down.
            Some(ratio) => format!("{name} at {} %", (ratio * 100.0).floor()),
            None => format!("{name} has not begun"),
        }
    }

    /// "w2 lost: connection reset".
    fn reason(&self) -> String {
        let Some(name) = self.name else {
            return format!("{} in no stage of the plan", self.layers);
        };
        match self.node {
            None => format!("{name} has not joined"),
            Some(node) if node.state() == NodeState::Down => match &node.last_error {
                Some(error) => format!("{name} lost: {error}"),
                None => format!("{name} lost"),
            },
            Some(node) if node.state() == NodeState::Excluded => match &node.last_error {
                Some(error) => format!("{name} is left out: {error}"),
                None => format!("{name} is left out"),
            },
            Some(node) => format!("{name} is {}", node.state()),
        }
    }

    /// How long the stage has been lost. The error tells best; without one, the silence.
    fn lost_seconds(&self) -> Option<f64> {
        let node = self.node.filter(|node| matches!(node.state(), NodeState::Down | NodeState::Excluded))?;
        node.last_error_age_seconds.or(node.heartbeat_age_seconds)
    }
}

fn down_text(lost: &[Stage<'_>]) -> String {
    let ranges = merged(lost.iter().map(|stage| stage.layers));
    let noun = if let [only] = ranges[..] { only.to_string() } else { format!("layers {}", listed(&ranges)) };
    let verb = if ranges.iter().map(|range| range.count()).sum::<u32>() == 1 { "has" } else { "have" };
    let since = lost.iter().filter_map(Stage::lost_seconds).reduce(f64::max);
    let age = since.map_or_else(String::new, |seconds| format!(" for {}", age(seconds)));
    let reasons = lost.iter().map(Stage::reason).collect::<Vec<_>>().join("; ");
    format!("Down: {noun} {verb} no live stage{age}, {reasons}")
}

fn listed(ranges: &[LayerRange]) -> String {
    ranges.iter().map(|range| range.numbers()).collect::<Vec<_>>().join(", ")
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// A length of time in its largest unit: "4 s", "2 min", "3 h".
fn age(seconds: f64) -> String {
    match seconds.max(0.0) as u64 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

/// Layers of `0..layers` that are in none of `covered`.
fn gaps(layers: u32, covered: impl Iterator<Item = LayerRange>) -> Vec<LayerRange> {
    let mut gaps = Vec::new();
    let mut next = 0;
    for range in merged(covered) {
        gaps.extend(LayerRange::new(next, range.start().min(layers)));
        next = next.max(range.end());
    }
    gaps.extend(LayerRange::new(next, layers));
    gaps
}

/// Sorted, neighbours and overlaps joined.
fn merged(ranges: impl IntoIterator<Item = LayerRange>) -> Vec<LayerRange> {
    let mut ranges: Vec<_> = ranges.into_iter().collect();
    ranges.sort_unstable();
    let mut joined: Vec<LayerRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start() <= last.end() => *last = last.through(range.end()),
            _ => joined.push(range),
        }
    }
    joined
}

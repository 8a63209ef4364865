//! The ground that both solvers walk on: pins cut the layers into gaps, and each step of a search gives one unpinned worker a run
//! of layers inside one gap.
//!
//! Pinned stages are part of every plan, so they never enter a comparison: a search jumps over them.

use std::ops::Range;

use super::cost::Costs;
use super::problem::{Problem, Refusal};

/// What a search makes small: compared in order, added up over the stages.
pub(super) type Key = [u64; 3];

/// The sum of two keys.
pub(super) fn add(a: Key, b: Key) -> Key {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

/// A run of layers given to a worker, or to nobody where memory ran out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) worker: Option<usize>,
    pub(super) layers: Range<usize>,
}

/// How a search ranks what it may do.
pub(super) trait Rules {
    /// Price of giving layers `start..end` to `worker`; `None` when that is not allowed.
    fn stage(&self, worker: usize, start: usize, end: usize) -> Option<Key>;

    /// Price of giving them to nobody; `None` when every layer must be placed.
    fn hole(&self, start: usize, end: usize) -> Option<Key>;
}

/// Costs, pins and the workers that are free to move.
pub(super) struct Terrain<'a> {
    pub(super) costs: Costs<'a>,
    /// Workers without a pin, by index.
    pub(super) unpinned: Vec<usize>,
    /// Pinned workers, in the order of their layers.
    pub(super) pins: Vec<(usize, Range<usize>)>,
    /// Where a search stands once the layers before `i` are placed: past the pins that begin there.
    landing: Vec<usize>,
    /// The first pinned layer from `i` on, else the number of layers.
    wall: Vec<usize>,
}

impl<'a> Terrain<'a> {
    /// Checks the pins.
    pub(super) fn new(problem: &'a Problem) -> Result<Self, Refusal> {
        let costs = Costs::new(problem)?;
        let pins = checked_pins(problem, &costs)?;
        let num_layers = costs.num_layers();
        let mut landing: Vec<usize> = (0..=num_layers).collect();
        let mut wall = vec![num_layers; num_layers + 1];
        for (_, layers) in pins.iter().rev() {
            landing[layers.start] = landing[layers.end];
            wall[..=layers.start].fill(layers.start);
        }
        let unpinned =
            (0..problem.workers.len()).filter(|&worker| problem.workers[worker].pinned_layers.is_none()).collect();
        let terrain = Self { costs, unpinned, pins, landing, wall };
        let gaps = terrain.gaps();
        if gaps.len() > terrain.unpinned.len() {
            return Err(Refusal::PinsLeaveGaps { gaps, unpinned: terrain.unpinned.len() });
        }
        Ok(terrain)
    }

    /// The runs of layers that no pin has.
    fn gaps(&self) -> Vec<Range<u32>> {
        let mut gaps = Vec::new();
        let mut reached = 0;
        let end = self.num_layers()..self.num_layers();
        for layers in self.pins.iter().map(|(_, layers)| layers).chain([&end]) {
            if reached < layers.start {
                gaps.push(narrow(&(reached..layers.start)));
            }
            reached = layers.end;
        }
        gaps
    }

    /// Layers of the model.
    pub(super) fn num_layers(&self) -> usize {
        self.costs.num_layers()
    }

    /// Where the search stands when the layers before `layer` are placed.
    pub(super) fn landing(&self, layer: usize) -> usize {
        self.landing[layer]
    }

    /// Where a stage that begins at `start` may end.
    pub(super) fn ends(&self, start: usize) -> std::ops::RangeInclusive<usize> {
        start + 1..=self.wall[start]
    }

    /// Time of a stage, if it fits into the worker's memory.
    pub(super) fn stage_time(&self, worker: usize, start: usize, end: usize) -> Option<u64> {
        self.costs.fits(worker, start, end).then(|| self.costs.step_picoseconds(worker, start, end))
    }

    /// Time of the slowest pinned stage.
    pub(super) fn slowest_pin(&self) -> u64 {
        self.pin_times().max().unwrap_or(0)
    }

    /// Times of the pinned stages.
    pub(super) fn pin_times(&self) -> impl Iterator<Item = u64> {
        self.pins.iter().map(|(worker, layers)| self.costs.step_picoseconds(*worker, layers.start, layers.end))
    }

    /// Where a stage of `worker` that begins at `start` and takes at most `time` ends at the latest.
    ///
    /// Time and memory grow with every layer, but for the last one: there the hop becomes shorter and the head comes in.
    pub(super) fn furthest_end(&self, worker: usize, start: usize, time: u64) -> Option<usize> {
        let allowed = |end| self.stage_time(worker, start, end).is_some_and(|needed| needed <= time);
        let ends = self.ends(start);
        let last = *ends.end();
        if last > start && last == self.num_layers() && allowed(last) {
            return Some(last);
        }
        ends.take_while(|&end| allowed(end)).last()
    }

    /// The segments with the pinned stages among them, in the order of the layers.
    pub(super) fn with_pins(&self, mut segments: Vec<Segment>) -> Vec<Segment> {
        let pinned = self.pins.iter();
        segments.extend(pinned.map(|(worker, layers)| Segment { worker: Some(*worker), layers: layers.clone() }));
        segments.sort_by_key(|segment| segment.layers.start);
        segments
    }
}

/// The smallest time for which `feasible` holds, if it holds for any.
pub(super) fn smallest_time(feasible: impl Fn(u64) -> bool) -> Option<u64> {
    let (mut low, mut high) = (0_u64, 1_u64 << 53);
    if !feasible(high) {
        return None;
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if feasible(middle) { high = middle } else { low = middle + 1 }
    }
    Some(high)
}

/// Pins in the order of their layers: within the model, apart from one another, and not too large for their workers.
fn checked_pins(problem: &Problem, costs: &Costs<'_>) -> Result<Vec<(usize, Range<usize>)>, Refusal> {
    let mut pins = Vec::new();
    for (index, worker) in problem.workers.iter().enumerate() {
        let Some(pinned) = worker.pinned_layers.clone() else { continue };
        let layers = pinned.start as usize..pinned.end as usize;
        if layers.is_empty() || layers.end > costs.num_layers() {
            let num_layers = costs.num_layers() as u32;
            return Err(Refusal::PinOutOfRange { worker: worker.name.clone(), pinned, num_layers });
        }
        pins.push((index, layers));
    }
    pins.sort_by_key(|(_, layers)| layers.start);
    if let Some(pair) = pins.windows(2).find(|pair| pair[0].1.end > pair[1].1.start) {
        return Err(Refusal::PinsOverlap {
            first: problem.workers[pair[0].0].name.clone(),
            first_pinned: narrow(&pair[0].1),
            second: problem.workers[pair[1].0].name.clone(),
            second_pinned: narrow(&pair[1].1),
        });
    }
    for (index, layers) in &pins {
        let (needed_bytes, worker) = (costs.memory_bytes(layers.start, layers.end), &problem.workers[*index]);
        if needed_bytes > worker.memory_bytes {
            return Err(Refusal::PinDoesNotFit {
                worker: worker.name.clone(),
                pinned: narrow(layers),
                needed_bytes,
                memory_bytes: worker.memory_bytes,
                missing_bytes: needed_bytes - worker.memory_bytes,
            });
        }
    }
    Ok(pins)
}

/// A layer range as the outside has it.
pub(super) fn narrow(layers: &Range<usize>) -> Range<u32> {
    layers.start as u32..layers.end as u32
}

//! Best plans for a given order of the workers, and a search over orders: what is used where trying every subset would take too long.
//!
//! For one order the split is exact (dynamic programming over the layers, each worker taking a run or nothing). Orders matter
//! little, because layers are nearly alike: they decide who gets the head and whose memory is cut off at a pin. So a few sensible
//! orders, improved by moving and swapping workers, come close; a test holds them to the exact solver.

use super::search::{Key, Rules, Segment, Terrain, add, smallest_time};

/// How many stage prices a search may ask for: about a second in an unoptimised build.
const PRICES_MAX: usize = 20_000_000;

/// No plan reaches this state.
const UNREACHED: Key = [u64::MAX; 3];

/// The smallest possible time of the slowest stage for this order; `None` when the layers do not fit.
pub(super) fn smallest_bottleneck(terrain: &Terrain<'_>, order: &[usize]) -> Option<u64> {
    smallest_time(|time| reach(terrain, order, time) == terrain.num_layers())
}

/// How many layers the workers in this order cover when no stage may take longer than `time`.
fn reach(terrain: &Terrain<'_>, order: &[usize], time: u64) -> usize {
    order.iter().fold(terrain.landing(0), |reached, &worker| {
        if reached == terrain.num_layers() {
            return reached;
        }
        terrain.furthest_end(worker, reached, time).map_or(reached, |end| terrain.landing(end))
    })
}

/// How many layers the order would leave over if the slowest stage had to be faster than `bottleneck`. Of orders that are equally
/// good, the one that leaves fewer is nearer to a better one.
pub(super) fn left_over(terrain: &Terrain<'_>, order: &[usize], bottleneck: u64) -> usize {
    terrain.num_layers() - reach(terrain, order, bottleneck.saturating_sub(1))
}

/// How a state of the dynamic programme was reached from its predecessor.
#[derive(Clone, Copy)]
enum Move {
    /// The worker of this row takes nothing.
    Pass,
    /// It takes the layers from here.
    Take { start: usize, end: usize },
    /// Nobody takes the layers from here; the worker of this row is still free.
    Hole { start: usize, end: usize },
}

/// The best plan for this order under the rules.
pub(super) fn best(terrain: &Terrain<'_>, order: &[usize], rules: &impl Rules) -> Option<(Key, Vec<Segment>)> {
    let last = terrain.num_layers();
    let mut keys = vec![UNREACHED; last + 1];
    keys[terrain.landing(0)] = [0; 3];
    let mut steps = vec![vec![Move::Pass; last + 1]];
    relax_holes(terrain, rules, &mut keys, &mut steps[0]);
    for &worker in order {
        let mut next = keys.clone();
        let mut row = vec![Move::Pass; last + 1];
        for start in (0..last).filter(|&start| keys[start] != UNREACHED) {
            for end in terrain.ends(start) {
                let Some(price) = rules.stage(worker, start, end) else { continue };
                let (landing, key) = (terrain.landing(end), add(keys[start], price));
                if key < next[landing] {
                    next[landing] = key;
                    row[landing] = Move::Take { start, end };
                }
            }
        }
        relax_holes(terrain, rules, &mut next, &mut row);
        keys = next;
        steps.push(row);
    }
    (keys[last] != UNREACHED).then(|| (keys[last], walk_back(terrain, order, &steps)))
}

/// Lets nobody take runs of layers, where the rules allow that.
fn relax_holes(terrain: &Terrain<'_>, rules: &impl Rules, keys: &mut [Key], row: &mut [Move]) {
    for start in 0..terrain.num_layers() {
        if keys[start] == UNREACHED {
            continue;
        }
        for end in terrain.ends(start) {
            let Some(price) = rules.hole(start, end) else { return };
            let (landing, key) = (terrain.landing(end), add(keys[start], price));
            if key < keys[landing] {
                keys[landing] = key;
                row[landing] = Move::Hole { start, end };
            }
        }
    }
}

/// The stages that led to the end.
fn walk_back(terrain: &Terrain<'_>, order: &[usize], steps: &[Vec<Move>]) -> Vec<Segment> {
    let (mut row, mut at) = (order.len(), terrain.num_layers());
    let mut segments = Vec::new();
    loop {
        match steps[row][at] {
            Move::Hole { start, end } => {
                segments.push(Segment { worker: None, layers: start..end });
                at = start;
            }
            Move::Take { start, end } => {
                segments.push(Segment { worker: Some(order[row - 1]), layers: start..end });
                (row, at) = (row - 1, start);
            }
            Move::Pass if row == 0 => break,
            Move::Pass => row -= 1,
        }
    }
    segments.reverse();
    segments
}

/// Orders worth starting from: fastest first, fastest last, roomiest first.
pub(super) fn starting_orders(terrain: &Terrain<'_>) -> Vec<Vec<usize>> {
    let last = terrain.num_layers();
    let mut fastest = terrain.unpinned.clone();
    fastest.sort_by_key(|&worker| terrain.costs.step_picoseconds(worker, 0, last));
    let mut roomiest = terrain.unpinned.clone();
    roomiest.sort_by_key(|&worker| std::cmp::Reverse(terrain.costs.worker_memory(worker)));
    vec![fastest.clone(), fastest.into_iter().rev().collect(), roomiest]
}

/// The workers as their layers stand now; those without layers where layers are missing, else last.
pub(super) fn held_order(terrain: &Terrain<'_>) -> Vec<usize> {
    let (mut holders, spares): (Vec<usize>, Vec<usize>) =
        terrain.unpinned.iter().partition(|&&worker| !terrain.costs.kept_layers(worker).is_empty());
    holders.sort_by_key(|&worker| terrain.costs.kept_layers(worker).start);
    let mut spares = spares.into_iter();
    let mut order = Vec::new();
    let mut reached = terrain.landing(0);
    for worker in holders {
        let kept = terrain.costs.kept_layers(worker);
        if kept.start as usize > reached {
            order.extend(spares.next());
        }
        order.push(worker);
        reached = terrain.landing((kept.end as usize).min(terrain.num_layers())).max(reached);
    }
    order.extend(spares);
    order
}

/// The best order that moving workers to the end and swapping pairs finds, from each of `orders`; earlier ones win ties.
/// `price_count` is what one evaluation costs.
pub(super) fn improve<V: Ord>(
    orders: Vec<Vec<usize>>,
    price_count: usize,
    evaluate: impl Fn(&[usize]) -> Option<V>,
) -> Option<(V, Vec<usize>)> {
    let mut best: Option<(V, Vec<usize>)> = None;
    let mut evaluations_left = PRICES_MAX / price_count.max(1);
    for order in orders {
        consider(&mut best, order, &evaluate);
    }
    let (mut value, mut order) = best?;
    let mut improved = true;
    while improved && evaluations_left > 0 {
        improved = false;
        for candidate in neighbours(&order) {
            if evaluations_left == 0 {
                break;
            }
            evaluations_left -= 1;
            if let Some(found) = evaluate(&candidate).filter(|found| *found < value) {
                (value, order, improved) = (found, candidate, true);
                break;
            }
        }
    }
    Some((value, order))
}

/// Keeps the better of two.
fn consider<V: Ord>(best: &mut Option<(V, Vec<usize>)>, order: Vec<usize>, evaluate: &impl Fn(&[usize]) -> Option<V>) {
    let Some(value) = evaluate(&order) else { return };
    if best.as_ref().is_none_or(|(least, _)| value < *least) {
        *best = Some((value, order));
    }
}

/// Orders one move away: each worker put last, then each pair swapped.
fn neighbours(order: &[usize]) -> Vec<Vec<usize>> {
    let count = order.len();
    let last = |index: usize| {
        let mut moved = order.to_vec();
        moved[index..].rotate_left(1);
        moved
    };
    let swap = |first: usize, second: usize| {
        let mut swapped = order.to_vec();
        swapped.swap(first, second);
        swapped
    };
    let pairs = (0..count).flat_map(|first| (first + 1..count).map(move |second| (first, second)));
    let to_the_end = (0..count.saturating_sub(1)).map(last);
    to_the_end.chain(pairs.map(|(first, second)| swap(first, second))).collect()
}

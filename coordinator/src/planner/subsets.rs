//! Best plans over all subsets and orders of the unpinned workers, exactly.
//!
//! A state is the set of workers that have had their turn and how many layers are placed: 2^12 x 65 states for twelve workers and
//! 64 layers. What came before a state does not matter to what follows it, so the best way into it is enough.

use super::search::{Key, Rules, Segment, Terrain, add, smallest_time};

/// No plan reaches this state.
const UNREACHED: Key = [u64::MAX; 3];

/// Marks a hole among the predecessors; worker numbers stay far below.
const NOBODY: u8 = u8::MAX;

/// The smallest possible time of the slowest stage; `None` when the layers do not fit.
///
/// For a given limit on the time only the furthest layer that a set of workers reaches matters: whoever comes next can always
/// begin later instead.
pub(super) fn smallest_bottleneck(terrain: &Terrain<'_>) -> Option<u64> {
    let (count, last) = (terrain.unpinned.len(), terrain.num_layers());
    smallest_time(|time| {
        let furthest = |&worker: &usize| -> Vec<usize> {
            let landing = |start| terrain.furthest_end(worker, start, time).map_or(start, |end| terrain.landing(end));
            (0..=last).map(|start| if start == last { last } else { landing(start) }).collect()
        };
        let table: Vec<Vec<usize>> = terrain.unpinned.iter().map(furthest).collect();
        let mut reached = vec![terrain.landing(0); 1 << count];
        for set in 1..1_usize << count {
            let members = (0..count).filter(|index| set & (1 << index) != 0);
            let reach = members.map(|index| table[index][reached[set & !(1 << index)]]).max();
            reached[set] = reach.unwrap_or(reached[set]);
        }
        reached[(1 << count) - 1] == last
    })
}

/// The allowed ends and prices of one worker's stages that begin at one layer.
type Edges = Vec<(usize, Key)>;

/// How a state was reached.
#[derive(Clone, Copy)]
struct Parent {
    /// Index into the unpinned workers, or [`NOBODY`].
    member: u8,
    start: u16,
    end: u16,
}

/// The best plan under the rules.
pub(super) fn best(terrain: &Terrain<'_>, rules: &impl Rules) -> Option<(Key, Vec<Segment>)> {
    let (count, last) = (terrain.unpinned.len(), terrain.num_layers());
    let width = last + 1;
    let edges: Vec<Vec<Edges>> = terrain.unpinned.iter().map(|&worker| stage_edges(terrain, rules, worker)).collect();
    let holes = hole_edges(terrain, rules);
    let mut keys = vec![UNREACHED; width << count];
    let mut parents = vec![Parent { member: NOBODY, start: 0, end: 0 }; width << count];
    keys[terrain.landing(0)] = [0; 3];
    for set in 0..1_usize << count {
        for start in 0..last {
            let key = keys[set * width + start];
            if key == UNREACHED {
                continue;
            }
            let mut relax = |set: usize, member: u8, edges: &Edges| {
                for &(end, price) in edges {
                    let (state, key) = (set * width + terrain.landing(end), add(key, price));
                    if key < keys[state] {
                        keys[state] = key;
                        parents[state] = Parent { member, start: start as u16, end: end as u16 };
                    }
                }
            };
            relax(set, NOBODY, &holes[start]);
            for (member, edges) in edges.iter().enumerate().filter(|(member, _)| set & (1 << member) == 0) {
                relax(set | 1 << member, member as u8, &edges[start]);
            }
        }
    }
    // The first of equals is the set of the lowest workers.
    let set = (0..1_usize << count).min_by_key(|set| keys[set * width + last])?;
    let key = keys[set * width + last];
    (key != UNREACHED).then(|| (key, walk_back(terrain, &parents, set)))
}

/// Every stage of `worker` that the rules allow, by first layer.
fn stage_edges(terrain: &Terrain<'_>, rules: &impl Rules, worker: usize) -> Vec<Edges> {
    let from = |start| {
        let priced = terrain.ends(start).filter_map(|end| Some((end, rules.stage(worker, start, end)?)));
        priced.collect()
    };
    (0..terrain.num_layers()).map(from).collect()
}

/// Every hole that the rules allow, by first layer.
fn hole_edges(terrain: &Terrain<'_>, rules: &impl Rules) -> Vec<Edges> {
    let from = |start| terrain.ends(start).filter_map(|end| Some((end, rules.hole(start, end)?))).collect();
    (0..terrain.num_layers()).map(from).collect()
}

/// The stages that led to the end with this set.
fn walk_back(terrain: &Terrain<'_>, parents: &[Parent], set: usize) -> Vec<Segment> {
    let (mut set, mut at) = (set, terrain.num_layers());
    let mut segments = Vec::new();
    while at != terrain.landing(0) || set != 0 {
        let parent = parents[set * (terrain.num_layers() + 1) + at];
        let member = usize::from(parent.member);
        let worker = (parent.member != NOBODY).then(|| terrain.unpinned[member]);
        segments.push(Segment { worker, layers: usize::from(parent.start)..usize::from(parent.end) });
        if parent.member != NOBODY {
            set &= !(1 << member);
        }
        at = usize::from(parent.start);
    }
    segments.reverse();
    segments
}

//! Which links are measured, and in which order. Pure.

/// One end of a link: the coordinator, or a worker by its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LinkEnd {
    Coordinator,
    Worker(usize),
}

/// Both directions between the coordinator and each worker, then every ordered pair of workers; neighbours in the list first, for that
/// is how work mostly flows, and no worker is the other end twice in a row.
pub(super) fn links(workers: usize) -> Vec<(LinkEnd, LinkEnd)> {
    let star = (0..workers).flat_map(|worker| {
        [(LinkEnd::Coordinator, LinkEnd::Worker(worker)), (LinkEnd::Worker(worker), LinkEnd::Coordinator)]
    });
    let pairs = (1..workers).flat_map(|distance| {
        (0..workers).map(move |from| (LinkEnd::Worker(from), LinkEnd::Worker((from + distance) % workers)))
    });
    star.chain(pairs).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_ordered_pair_is_measured_once() {
        for workers in [0, 1, 2, 3, 4, 11] {
            let links = links(workers);
            let distinct: BTreeSet<_> = links.iter().copied().collect();
            assert_eq!(links.len(), workers * (workers + 1), "{workers}");
            assert_eq!(distinct.len(), links.len(), "{workers}");
            assert!(links.iter().all(|(from, to)| from != to), "{workers}");
        }
        assert_eq!(links(3)[6], (LinkEnd::Worker(0), LinkEnd::Worker(1)));
    }
}

//! What Linux says of this process's memory, and its own limits: `ulimit -v` and `ulimit -d`. Pure over a root folder.

use std::{fs, path::Path};

/// A limit of `/proc/self/limits`, and what of `/proc/self/status` counts against it.
const LIMITS: [(&str, &str); 2] = [("Max address space", "VmSize:"), ("Max data size", "VmData:")];

/// What the process's limits leave it; `None` where there are none.
pub(super) fn bytes_left(root: &Path) -> Option<u64> {
    let limits = fs::read_to_string(root.join("proc/self/limits")).ok()?;
    let status = status(root)?;
    let left = |(limit, used): (&str, &str)| {
        let soft = limits.lines().find_map(|line| line.strip_prefix(limit))?.split_whitespace().next()?;
        // `unlimited` is no number.
        soft.parse::<u64>().ok().map(|soft| soft.saturating_sub(bytes_of(&status, used).unwrap_or(0)))
    };
    LIMITS.into_iter().filter_map(left).min()
}

/// The most memory that the process has held at a time.
pub(super) fn peak_bytes(root: &Path) -> Option<u64> {
    bytes_of(&status(root)?, "VmHWM:")
}

fn status(root: &Path) -> Option<String> {
    fs::read_to_string(root.join("proc/self/status")).ok()
}

/// Of a line as `VmSize:     1234 kB`.
fn bytes_of(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::{super::cgroup::tests::Tree, *};

    const HEADER: &str = "Limit                     Soft Limit           Hard Limit           Units     \n";

    #[test]
    fn the_tighter_of_two_limits_counts_less_what_is_used() {
        let status = "Name:\tgrokpipe\nVmSize:\t    1000 kB\nVmHWM:\t  77 kB\nVmData:\t     200 kB\n";
        let line = |name: &str, soft: &str| format!("{name:<26}{soft:<21}unlimited            bytes     \n");
        for (space, data, left) in [
            ("unlimited", "unlimited", None),
            ("2048000", "unlimited", Some(2_048_000 - 1_024_000)),
            ("2048000", "1024000", Some(1_024_000 - 204_800)),
            ("1024", "unlimited", Some(0)),
        ] {
            let limits = [HEADER, &line("Max data size", data), &line("Max address space", space)].concat();
            let tree = Tree::new(&[("proc/self/limits", &limits), ("proc/self/status", status)]);
            assert_eq!(bytes_left(tree.root()), left, "{space}, {data}");
            assert_eq!(peak_bytes(tree.root()), Some(77 * 1024));
        }
    }

    #[test]
    fn a_system_that_says_nothing_limits_nothing() {
        let tree = Tree::new(&[]);
        assert_eq!((bytes_left(tree.root()), peak_bytes(tree.root())), (None, None));
    }
}

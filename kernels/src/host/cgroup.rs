//! What Linux's control groups leave this process. Pure over a root folder, so that any machine's files can be tried.
//!
//! A process is in one group of each hierarchy, and every group above it limits it too: systemd's slices, a Slurm job around its steps,
//! a Kubernetes pod around its containers. So the whole chain is read, up to the highest group that is mounted, and the tightest counts.
//! What a group has in use contains the page cache of files, which the system drops when the group reaches its limit; it counts as
//! free. Inside a container the groups above its own cannot be seen: of version 1 the group's statistics still tell the least limit.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

/// How a version of control groups names what is read here.
struct Version {
    /// Type of its mounts.
    mount: &'static str,
    /// The controller among a mount's options and in a group's line; version 2 has one hierarchy for all.
    controller: Option<&'static str>,
    /// A group may not use more than any of these.
    limits: &'static [&'static str],
    used: &'static str,
    /// In `memory.stat`: limits of this group and those above it.
    limits_of_chain: &'static [&'static str],
    /// In `memory.stat`: page cache of files of this group and those below it.
    cache: &'static [&'static str],
    /// A file that says `0` where groups below are not counted.
    counts_children: Option<&'static str>,
}

const VERSIONS: [Version; 2] = [
    Version {
        mount: "cgroup2",
        controller: None,
        // Above the second one the system does not end a process, it halts it.
        limits: &["memory.max", "memory.high"],
        used: "memory.current",
        limits_of_chain: &[],
        cache: &["inactive_file", "active_file"],
        counts_children: None,
    },
    Version {
        mount: "cgroup",
        controller: Some("memory"),
        limits: &["memory.limit_in_bytes"],
        used: "memory.usage_in_bytes",
        limits_of_chain: &["hierarchical_memory_limit"],
        cache: &["total_inactive_file", "total_active_file"],
        counts_children: Some("memory.use_hierarchy"),
    },
];

/// Numbers from here on mean that there is no limit: version 1 writes the largest multiple of a page.
const NO_LIMIT: u64 = 1 << 60;

/// A place where a hierarchy, or a part of it, is mounted.
struct Mount {
    /// The group that is seen there.
    group: PathBuf,
    folder: PathBuf,
}

/// The least that any of the process's groups leaves; `None` where none has a limit.
pub(super) fn bytes_left(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    VERSIONS.iter().filter_map(|version| version.bytes_left(root, &groups, &mounts)).min()
}

impl Version {
    fn bytes_left(&self, root: &Path, groups: &str, mounts: &str) -> Option<u64> {
        let own = self.own_group(groups)?;
        let mounts: Vec<Mount> = mounts.lines().filter_map(|line| self.mount(line)).collect();
        // A mount that shows the group; else one whose top stands for it, as in a container that has a view of its own.
        let below = |mount: &Mount| own.strip_prefix(&mount.group).ok().map(Path::to_owned);
        let seen = mounts.iter().find_map(|mount| Some((mount, below(mount)?)));
        let (mount, below) = seen.or_else(|| Some((mounts.first()?, PathBuf::new())))?;
        let top = root.join(mount.folder.strip_prefix("/").unwrap_or(&mount.folder));
        // From the group of the process up to the highest one, whether or not it is the top of the hierarchy.
        let own = top.join(below);
        own.ancestors()
            .take_while(|group| group.starts_with(&top))
            .enumerate()
            .filter(|(above, group)| *above == 0 || self.counts_children(group))
            .filter_map(|(_, group)| self.left_in(group))
            .min()
    }

    /// The process's group in this hierarchy, of lines `HIERARCHY:CONTROLLERS:GROUP`.
    fn own_group(&self, groups: &str) -> Option<PathBuf> {
        let group = groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, group) = (parts.next()?, parts.next()?);
            let is_its = match self.controller {
                Some(wanted) => controllers.split(',').any(|controller| controller == wanted),
                None => controllers.is_empty(),
            };
            is_its.then(|| PathBuf::from(group))
        })?;
        // Outside of what this process may see; then nothing below the mount is its own.
        let is_inside = group.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        Some(if is_inside { group } else { PathBuf::new() })
    }

    /// Of lines `ID PARENT DEVICE GROUP FOLDER OPTIONS [MORE] - TYPE SOURCE OPTIONS`.
    fn mount(&self, line: &str) -> Option<Mount> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (group, folder) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let is_its = kind.next()? == self.mount
            && self
                .controller
                .is_none_or(|wanted| kind.nth(1).is_some_and(|options| options.split(',').any(|o| o == wanted)));
        is_its.then(|| Mount { group: unescaped(group).into(), folder: unescaped(folder).into() })
    }

    /// Version 1 may be told not to count what groups below use.
    fn counts_children(&self, group: &Path) -> bool {
        let told = self.counts_children.and_then(|file| fs::read_to_string(group.join(file)).ok());
        told.is_none_or(|told| told.trim() != "0")
    }

    /// What a group's own limits leave.
    fn left_in(&self, group: &Path) -> Option<u64> {
        let number = |file: &&str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
        let statistics = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let statistic = |name: &&str| {
            let rest = statistics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
            rest.trim().parse::<u64>().ok()
        };
        let limits = self.limits.iter().filter_map(number);
        let limit = limits.chain(self.limits_of_chain.iter().filter_map(statistic)).min()?;
        if limit >= NO_LIMIT {
            return None;
        }
        let cache: u64 = self.cache.iter().filter_map(statistic).fold(0, u64::saturating_add);
        let used = number(&self.used)?.saturating_sub(cache);
        Some(limit.saturating_sub(used))
    }
}

/// A path as the kernel writes it there: a blank is `\040`.
fn unescaped(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use tempfile::TempDir;

    use super::*;

    /// Files in a folder of their own, which goes with the value.
    pub(in crate::host) struct Tree(TempDir);

    impl Tree {
        pub(in crate::host) fn new(files: &[(&str, &str)]) -> Self {
            let tree = Self(TempDir::new().unwrap());
            for (path, text) in files {
                let path = tree.root().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            tree
        }

        pub(in crate::host) fn root(&self) -> &Path {
            self.0.path()
        }
    }

    const NONE_V1: &str = "9223372036854771712\n";
    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
    const V1: &str = "32 30 0:28 / /sys/fs/cgroup/memory rw shared:15 - cgroup cgroup rw,memory\n\
                      33 30 0:29 / /sys/fs/cgroup/cpu rw shared:16 - cgroup cgroup rw,cpu";

    struct Machine {
        what: &'static str,
        cgroup: &'static str,
        mounts: &'static str,
        /// Below `sys/fs/cgroup`.
        files: &'static [(&'static str, &'static str)],
        left: Option<u64>,
    }

    const MACHINES: &[Machine] = &[
        Machine { what: "no groups at all", cgroup: "", mounts: "", files: &[], left: None },
        Machine {
            what: "version 2 without a limit",
            cgroup: "0::/user.slice\n",
            mounts: V2,
            files: &[("user.slice/memory.max", "max\n"), ("user.slice/memory.current", "7\n")],
            left: None,
        },
        Machine {
            what: "version 2, a container that sees its own group as the top",
            cgroup: "0::/\n",
            mounts: V2,
            files: &[("memory.max", "1000\n"), ("memory.current", "400\n"), ("memory.stat", "anon 100\n")],
            left: Some(600),
        },
        Machine {
            what: "page cache of files is free, memory of a tmpfs is not",
            cgroup: "0::/a\n",
            mounts: V2,
            files: &[
                ("a/memory.max", "1000\n"),
                ("a/memory.current", "900\n"),
                ("a/memory.stat", "anon 100\nfile 800\nshmem 50\ninactive_file 500\nactive_file 250\nunevictable 9\n"),
            ],
            left: Some(850),
        },
        Machine {
            what: "systemd: the slice is tighter than the service",
            cgroup: "0::/system.slice/grokpipe.service\n",
            mounts: V2,
            files: &[
                ("system.slice/grokpipe.service/memory.max", "5000\n"),
                ("system.slice/grokpipe.service/memory.current", "100\n"),
                ("system.slice/memory.max", "2000\n"),
                ("system.slice/memory.current", "1500\n"),
                ("system.slice/memory.stat", "inactive_file 200\nactive_file 0\n"),
            ],
            left: Some(700),
        },
        Machine {
            what: "Slurm: the step has no limit, the job has one, the user has room",
            cgroup: "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            mounts: V2,
            files: &[
                ("system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.max", "max\n"),
                ("system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.current", "10\n"),
                ("system.slice/slurmstepd.scope/job_7/memory.max", "300\n"),
                ("system.slice/slurmstepd.scope/job_7/memory.current", "20\n"),
                ("system.slice/slurmstepd.scope/memory.max", "9000\n"),
                ("system.slice/slurmstepd.scope/memory.current", "20\n"),
            ],
            left: Some(280),
        },
        Machine {
            what: "a process is halted above memory.high",
            cgroup: "0::/a\n",
            mounts: V2,
            files: &[("a/memory.max", "max\n"), ("a/memory.high", "500\n"), ("a/memory.current", "100\n")],
            left: Some(400),
        },
        Machine {
            what: "more in use than allowed leaves nothing",
            cgroup: "0::/a\n",
            mounts: V2,
            files: &[("a/memory.max", "10\n"), ("a/memory.current", "100\n")],
            left: Some(0),
        },
        Machine {
            what: "version 1 without a limit",
            cgroup: "4:memory:/a\n3:cpu:/b\n",
            mounts: V1,
            files: &[
                ("memory/a/memory.limit_in_bytes", NONE_V1),
                ("memory/a/memory.usage_in_bytes", "1\n"),
                ("memory/a/memory.stat", "hierarchical_memory_limit 9223372036854771712\n"),
                ("memory/memory.limit_in_bytes", NONE_V1),
                ("memory/memory.usage_in_bytes", "1\n"),
            ],
            left: None,
        },
        Machine {
            what: "version 1, the group above is tighter",
            cgroup: "11:cpuset:/\n4:cpuacct,memory:/pod/container\n",
            mounts: V1,
            files: &[
                ("memory/pod/container/memory.limit_in_bytes", "9000\n"),
                ("memory/pod/container/memory.usage_in_bytes", "100\n"),
                ("memory/pod/memory.limit_in_bytes", "3000\n"),
                ("memory/pod/memory.usage_in_bytes", "2500\n"),
                (
                    "memory/pod/memory.stat",
                    "cache 9\ninactive_file 1\ntotal_inactive_file 600\ntotal_active_file 400\n",
                ),
                ("memory/memory.limit_in_bytes", NONE_V1),
                ("memory/memory.usage_in_bytes", "99999\n"),
            ],
            left: Some(1500),
        },
        Machine {
            what: "version 1 in a container: the mount's top is the container's group, the pod above cannot be seen",
            cgroup: "4:memory:/kubepods/pod1/c1\n",
            mounts: "32 30 0:28 /kubepods/pod1/c1 /sys/fs/cgroup/memory ro master:15 - cgroup cgroup rw,memory",
            files: &[
                ("memory/memory.limit_in_bytes", NONE_V1),
                ("memory/memory.usage_in_bytes", "100\n"),
                ("memory/memory.stat", "hierarchical_memory_limit 700\n"),
            ],
            left: Some(600),
        },
        Machine {
            what: "version 1 that does not count groups below",
            cgroup: "4:memory:/a/b\n",
            mounts: V1,
            files: &[
                ("memory/a/b/memory.limit_in_bytes", "500\n"),
                ("memory/a/b/memory.usage_in_bytes", "100\n"),
                ("memory/a/memory.limit_in_bytes", "50\n"),
                ("memory/a/memory.usage_in_bytes", "0\n"),
                ("memory/a/memory.use_hierarchy", "0\n"),
            ],
            left: Some(400),
        },
        Machine {
            what: "hybrid: version 2 without controllers beside version 1",
            cgroup: "4:memory:/job\n1:name=systemd:/user.slice\n0::/user.slice\n",
            mounts: "31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                     32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
            files: &[
                ("unified/user.slice/cgroup.procs", "1\n"),
                ("memory/job/memory.limit_in_bytes", "800\n"),
                ("memory/job/memory.usage_in_bytes", "300\n"),
            ],
            left: Some(500),
        },
        Machine {
            what: "a group outside of the view, and a mount whose folder has a blank",
            cgroup: "0::/../other\n",
            mounts: "30 23 0:26 / /sys/fs/cgroup/my\\040groups rw - cgroup2 none rw",
            files: &[("my groups/memory.max", "90\n"), ("my groups/memory.current", "50\n")],
            left: Some(40),
        },
        Machine {
            what: "two mounts: the one that shows the process's group counts",
            cgroup: "0::/mine\n",
            mounts: "30 23 0:26 /theirs /sys/fs/cgroup/theirs rw - cgroup2 none rw\n\
                     31 23 0:26 / /sys/fs/cgroup/all rw - cgroup2 none rw",
            files: &[
                ("theirs/memory.max", "1\n"),
                ("theirs/memory.current", "0\n"),
                ("all/mine/memory.max", "60\n"),
                ("all/mine/memory.current", "20\n"),
            ],
            left: Some(40),
        },
        Machine {
            what: "files that make no sense",
            cgroup: "0\n::\nx:y\n",
            mounts: "- - -\n1 2 3\n\\9 - cgroup2",
            files: &[("memory.max", "many\n")],
            left: None,
        },
    ];

    #[test]
    fn the_tightest_group_of_the_chain_decides() {
        for Machine { what, cgroup, mounts, files, left } in MACHINES {
            let placed: Vec<_> = files.iter().map(|(path, text)| (format!("sys/fs/cgroup/{path}"), *text)).collect();
            let mut all = vec![("proc/self/cgroup", *cgroup), ("proc/self/mountinfo", *mounts)];
            all.extend(placed.iter().map(|(path, text)| (path.as_str(), *text)));
            let tree = Tree::new(&all);
            assert_eq!(bytes_left(tree.root()), *left, "{what}");
        }
    }

    #[test]
    fn a_system_without_these_files_limits_nothing() {
        assert_eq!(bytes_left(Tree::new(&[]).root()), None);
    }
}

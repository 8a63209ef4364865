//! Real control groups: what a process offers inside nested limits, and that it lives within them. Needs root and a memory controller
//! that may be used, of version 1 or 2; else the tests say that they are skipped.

use std::{
    fs, io,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use grokpipe_tests::processes::binary;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Two groups, one in the other; they go with the value.
struct Groups {
    outer: PathBuf,
    inner: PathBuf,
}

impl Groups {
    /// With these limits. `None` where there may be none.
    fn new(name: &str, outer: u64, inner: u64) -> Option<Self> {
        let made = Self::make(name, outer, inner);
        made.map_err(|reason| println!("skipped: no control groups can be made: {reason}")).ok()
    }

    fn make(name: &str, outer: u64, inner: u64) -> io::Result<Self> {
        let (version_1, version_2) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let has_controller = |controllers: String| controllers.split_whitespace().any(|name| name == "memory");
        let (top, limit) = if version_1.join("memory.limit_in_bytes").exists() {
            (version_1, "memory.limit_in_bytes")
        } else if fs::read_to_string(version_2.join("cgroup.subtree_control")).is_ok_and(has_controller) {
            (version_2, "memory.max")
        } else {
            return Err(io::Error::other("no memory controller"));
        };
        let path = top.join(format!("grokpipe-{name}-{}", std::process::id()));
        let groups = Self { inner: path.join("inner"), outer: path };
        fs::create_dir(&groups.outer)?;
        if limit == "memory.max" {
            fs::write(groups.outer.join("cgroup.subtree_control"), "+memory")?;
        }
        fs::create_dir(&groups.inner)?;
        fs::write(groups.inner.join(limit), inner.to_string())?;
        fs::write(groups.outer.join(limit), outer.to_string())?;
        Ok(groups)
    }

    /// A shell script that runs in the inner group; `$grokpipe` is the program.
    fn run(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("echo $$ >\"$group/cgroup.procs\" && {script}"));
        command.env("group", &self.inner).env("grokpipe", binary()).stdin(Stdio::null());
        command
    }

    /// What the CPU of a process in the inner group has free.
    fn free_bytes(&self, before: &str) -> u64 {
        let output = self.run(&format!("{before} exec \"$grokpipe\" devices --json")).output().expect("a shell");
        let listed: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        listed["cpu"]["free_bytes"].as_u64().expect("Linux says what is free")
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.inner);
        let _ = fs::remove_dir(&self.outer);
    }
}

#[test]
fn the_tightest_limit_around_a_process_decides_what_is_free() {
    for (outer, inner) in [(600, 4000), (4000, 600)] {
        let Some(groups) = Groups::new(&format!("nested-{outer}"), outer * MIB, inner * MIB) else { return };
        let free = groups.free_bytes("");
        println!("limits of {outer} and {inner} MiB: {} MiB free", free / MIB);
        assert!((300 * MIB..=600 * MIB).contains(&free), "{free}");
    }
}

#[test]
fn page_cache_of_files_counts_as_free() {
    let Some(groups) = Groups::new("cache", 600 * MIB, 600 * MIB) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("file");
    let free =
        groups.free_bytes(&format!("dd if=/dev/zero of={} bs=1M count=450 conv=fsync 2>/dev/null;", file.display()));
    println!("450 MiB of page cache in 600 MiB: {} MiB free", free / MIB);
    assert!((300 * MIB..=600 * MIB).contains(&free), "{free}");
}

#[test]
fn a_worker_measures_within_the_memory_that_it_is_told() {
    let Some(groups) = Groups::new("measure", 230 * MIB, 4000 * MIB) else { return };
    let worker =
        "exec \"$grokpipe\" worker --coordinator 127.0.0.1:1 --synthetic tiny --device cpu --threads 1 --memory 200MiB";
    let started = groups.run(worker).stdout(Stdio::null()).stderr(Stdio::piped()).env("GROKPIPE_LOG", "info").spawn();
    let mut child = started.expect("a shell");
    let mut said = String::new();
    // It says that it starts, or ends.
    for line in BufReader::new(child.stderr.take().expect("stderr is piped")).lines() {
        said += &(line.expect("text") + "\n");
        if said.contains("worker starts") {
            break;
        }
    }
    let _ = child.kill();
    let status = child.wait().expect("it has ended");
    assert!(said.contains("worker starts"), "{status}: {said}");
}

//! What this machine has: cores, memory and a name, as defaults for those who do not say.

use std::{fs, num::NonZero, thread, time::SystemTime};

/// Cores that this process may use.
pub(crate) fn cores() -> u32 {
    thread::available_parallelism().map_or(1, NonZero::get).try_into().unwrap_or(u32::MAX)
}

/// Memory that is free for use, by the kernel's estimate and the control group's limit; `None` where the system does not say.
pub(crate) fn available_memory_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let available = field_kib(&meminfo, "MemAvailable:")?.checked_mul(1024)?;
    Some(cgroup_memory_left().map_or(available, |left| left.min(available)))
}

/// The most memory that this process has had at a time; `None` where the system does not say.
pub(crate) fn peak_memory_bytes() -> Option<u64> {
    field_kib(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")?.checked_mul(1024)
}

fn field_kib(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// What the control group still allows: its limit less what is used, page cache counted as used.
fn cgroup_memory_left() -> Option<u64> {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let pairs = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    pairs.iter().find_map(|(limit, used)| Some(number(limit)?.saturating_sub(number(used)?)))
}

/// A worker's name for this machine: its host name, with everything replaced that a name may not have.
pub(crate) fn worker_name() -> String {
    as_name(host_name().as_deref().unwrap_or_default())
}

/// What the system calls this machine.
pub(crate) fn host_name() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok())
}

fn as_name(host: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c.to_ascii_lowercase() } else { '-' };
    let name: String = host.trim().chars().take(64).map(allowed).collect();
    if name.is_empty() { "worker".to_owned() } else { name }
}

/// Milliseconds since 1970: larger for a restarted process than for its predecessor.
pub(crate) fn generation() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::is_name;

    #[test]
    fn host_names_become_worker_names() {
        for (host, name) in [("Node-1.lan\n", "node-1.lan"), ("", "worker"), ("a b_ü", "a-b_-")] {
            assert_eq!(as_name(host), name);
            assert!(is_name(&as_name(host)));
        }
    }

    #[test]
    fn memory_is_read_from_its_line() {
        assert_eq!(field_kib("MemTotal: 9 kB\nMemAvailable:   1234 kB\n", "MemAvailable:"), Some(1234));
        assert_eq!(field_kib("MemTotal: 9 kB", "MemAvailable:"), None);
    }
}

//! What this machine has: cores and a name, as defaults for those who do not say. What memory is free the kernels know.

use std::{num::NonZero, thread, time::SystemTime};

/// Cores that this process may use.
pub(crate) fn cores() -> u32 {
    thread::available_parallelism().map_or(1, NonZero::get).try_into().unwrap_or(u32::MAX)
}

/// A worker's name for this machine: its host name, with everything replaced that a name may not have.
pub(crate) fn worker_name() -> String {
    as_name(host_name().as_deref().unwrap_or_default())
}

/// What the system calls this machine.
pub(crate) fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
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
    use grokpipe_proto::ids::WorkerName;

    use super::*;

    #[test]
    fn host_names_become_worker_names() {
        for (host, name) in [("Node-1.lan\n", "node-1.lan"), ("", "worker"), ("a b_ü", "a-b_-")] {
            assert_eq!(as_name(host), name);
            assert!(as_name(host).parse::<WorkerName>().is_ok());
        }
    }
}

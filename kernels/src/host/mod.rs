//! The memory of this machine as this process may use it: the one place that asks the system.
//!
//! What is free is the least of what the system has, what the process's control groups leave it (`cgroup.rs`) and what its own limits
//! leave it (`process.rs`). Page cache counts as free, because the system gives it up for those who ask. Asked anew at each call. Does not
//! know what others are about to take.

#[cfg(any(target_os = "linux", test))]
mod cgroup;
#[cfg(any(target_os = "linux", test))]
mod process;

use sysinfo::{MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// Where the system's files are.
#[cfg(target_os = "linux")]
const ROOT: &str = "/";

/// Memory that this process may still fill; `None` where the system does not say.
pub fn available_memory_bytes() -> Option<u64> {
    [system_has_free(), limits_leave()].into_iter().flatten().min()
}

fn system_has_free() -> Option<u64> {
    refreshed().map(|system| system.available_memory())
}

fn refreshed() -> Option<System> {
    let mut system = System::new().ok()?;
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    // A system that cannot tell reports no memory at all.
    (system.total_memory() > 0).then_some(system)
}

/// What control groups and the process's own limits leave; `None` where nothing limits it.
#[cfg(target_os = "linux")]
fn limits_leave() -> Option<u64> {
    let root = std::path::Path::new(ROOT);
    [cgroup::bytes_left(root), process::bytes_left(root)].into_iter().flatten().min()
}

#[cfg(not(target_os = "linux"))]
fn limits_leave() -> Option<u64> {
    None
}

/// Memory of the whole machine, whatever this process may have of it; `None` where the system does not say.
pub fn total_memory_bytes() -> Option<u64> {
    refreshed().map(|system| system.total_memory())
}

/// Memory that this process holds now; `None` where the system does not say.
pub fn resident_memory_bytes() -> Option<u64> {
    let mut system = System::new().ok()?;
    let own = Pid::from_u32(std::process::id());
    let memory_alone = ProcessRefreshKind::nothing().with_memory().without_tasks();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), true, memory_alone);
    system.process(own).map(|process| process.memory()).filter(|&bytes| bytes > 0)
}

/// The most memory that this process has held at a time; `None` where the system does not say.
pub fn peak_memory_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    return process::peak_bytes(std::path::Path::new(ROOT));
    #[cfg(not(target_os = "linux"))]
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn linux_says_what_is_free_and_what_this_process_holds() {
        for bytes in [available_memory_bytes(), resident_memory_bytes(), peak_memory_bytes()] {
            assert!(bytes.is_some_and(|bytes| bytes > 0), "{bytes:?}");
        }
    }
}

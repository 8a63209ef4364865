//! What a machine is and has, as far as a process can see without rights: for `doctor` and for what a process of a cluster says of itself.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use grokpipe_kernels::{available_memory_bytes, total_memory_bytes};
use grokpipe_proto::{probe::DescribeMachine, v1::MachineReport};
use sysinfo::System;

/// How a process that uses the model at `model` describes its machine.
pub(crate) fn describer(model: Option<PathBuf>) -> DescribeMachine {
    Arc::new(move |disk_speed| describe(model.as_deref(), disk_speed))
}

/// Describes this machine; with `disk_speed` it reads some of the model's files, for at most a second.
pub(crate) fn describe(model: Option<&Path>, disk_speed: bool) -> MachineReport {
    let disk = model.and_then(disk);
    MachineReport {
        build: env!("CARGO_PKG_VERSION").to_owned(),
        system: system(),
        memory_bytes: total_memory_bytes(),
        memory_available_bytes: available_memory_bytes(),
        disk_bytes: disk.map(|(all, _)| all),
        disk_free_bytes: disk.map(|(_, free)| free),
        disk_bytes_per_second: model.filter(|_| disk_speed).and_then(read_speed),
        open_files_limit: rlimit::Resource::NOFILE.get().ok().map(|(soft, _hard)| soft),
        ..MachineReport::default()
    }
}

fn system() -> String {
    let parts =
        [System::long_os_version().ok(), System::kernel_version().ok(), Some(std::env::consts::ARCH.to_owned())];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// Bytes in all and bytes free of the file system there.
fn disk(path: &Path) -> Option<(u64, u64)> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some((found.f_blocks.checked_mul(found.f_frsize)?, found.f_bavail.checked_mul(found.f_frsize)?))
}

/// Bytes a second of reading the largest of the model's files past the page cache; `None` where the system has no such way, or the file
/// is too small to tell.
#[cfg(target_os = "linux")]
fn read_speed(model: &Path) -> Option<f64> {
    use std::{
        io::Read,
        os::unix::fs::OpenOptionsExt,
        time::{Duration, Instant},
    };

    const WITHIN: Duration = Duration::from_millis(700);
    const MOST_BYTES: u64 = 256 << 20;
    const LEAST_BYTES: u64 = 16 << 20;
    const BLOCK: usize = 4 << 20;
    const ALIGNED: usize = 4096;

    let (path, bytes) = largest_file(model, 3)?;
    if bytes < LEAST_BYTES {
        return None;
    }
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).ok()?;
    let mut room = vec![0_u8; BLOCK + ALIGNED];
    let start = room.as_ptr().align_offset(ALIGNED);
    let block = room.get_mut(start..start + BLOCK)?;
    let (started, mut read) = (Instant::now(), 0_u64);
    while read < MOST_BYTES.min(bytes) && started.elapsed() < WITHIN {
        match file.read(block) {
            Ok(0) | Err(_) => break,
            Ok(count) => read += count as u64,
        }
    }
    (read >= LEAST_BYTES / 4).then(|| read as f64 / started.elapsed().as_secs_f64().max(1e-6))
}

#[cfg(not(target_os = "linux"))]
fn read_speed(_model: &Path) -> Option<f64> {
    None
}

#[cfg(target_os = "linux")]
fn largest_file(path: &Path, depth: u32) -> Option<(PathBuf, u64)> {
    let metadata = fs::metadata(path).ok()?;
    if metadata.is_file() {
        return Some((path.to_owned(), metadata.len()));
    }
    let entries = fs::read_dir(path).ok().filter(|_| depth > 0)?;
    entries.flatten().filter_map(|entry| largest_file(&entry.path(), depth - 1)).max_by_key(|(_, bytes)| *bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let found = describe(Some(Path::new(env!("CARGO_MANIFEST_DIR"))), true);
        assert!(!found.system.is_empty() && !found.build.is_empty());
        assert!(found.disk_bytes >= found.disk_free_bytes && found.disk_bytes > Some(0), "{found:?}");
        assert!(found.memory_bytes > found.memory_available_bytes && found.open_files_limit > Some(0), "{found:?}");
    }
}

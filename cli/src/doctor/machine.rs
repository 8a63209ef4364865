//! What a machine is and has, as far as a process can see without rights: for `doctor` and for what a process of a cluster says of itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use grokpipe_kernels::available_memory_bytes;
use grokpipe_proto::{probe::DescribeMachine, v1::MachineReport};

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
        memory_bytes: memory_bytes(),
        memory_available_bytes: available_memory_bytes(),
        disk_bytes: disk.map(|(all, _)| all),
        disk_free_bytes: disk.map(|(_, free)| free),
        disk_bytes_per_second: model.filter(|_| disk_speed).and_then(read_speed),
        open_files_limit: open_files_limit(),
        ..MachineReport::default()
    }
}

fn system() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let pretty = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or_default();
    let parts = [pretty.trim_matches('"'), std::env::consts::OS, kernel.trim(), std::env::consts::ARCH];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

fn memory_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn open_files_limit() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

/// Bytes in all and bytes free of the file system there, by POSIX's `df`.
fn disk(path: &Path) -> Option<(u64, u64)> {
    let said = Command::new("df").args(["-P", "-k", "--"]).arg(path).output().ok()?;
    parse_df(&String::from_utf8_lossy(&said.stdout))
}

fn parse_df(text: &str) -> Option<(u64, u64)> {
    // The device's name comes first and may have spaces; three numbers and a percentage follow it.
    let line = text.lines().nth(1)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let percent = words.iter().position(|word| word.ends_with('%'))?;
    let kib = |back: usize| words.get(percent.checked_sub(back)?)?.parse::<u64>().ok()?.checked_mul(1024);
    Some((kib(3)?, kib(1)?))
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
    fn free_space_is_read_from_df_whatever_the_device_is_called() {
        let head = "Filesystem 1024-blocks Used Available Capacity Mounted on\n";
        for (line, expected) in [
            ("/dev/sda1 1000 400 600 40% /", Some((1_024_000, 614_400))),
            ("map auto home 8 4 4 50% /with a space", Some((8192, 4096))),
            ("nonsense", None),
        ] {
            assert_eq!(parse_df(&format!("{head}{line}\n")), expected, "{line}");
        }
        assert_eq!(parse_df(""), None);
    }

    #[test]
    fn this_machine_is_described() {
        let found = describe(Some(Path::new(env!("CARGO_MANIFEST_DIR"))), true);
        assert!(!found.system.is_empty() && !found.build.is_empty());
        assert!(found.disk_bytes >= found.disk_free_bytes);
    }
}

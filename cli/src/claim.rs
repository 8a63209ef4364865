//! Which adapter a worker takes, so that no two of this machine fill the same memory.
//!
//! A worker that fills what its adapter has free must have it for itself; workers that name their memory may share one. Each holds a
//! lock on the adapter's file as long as it lives, alone or with others, so that separate commands know of each other. A worker whose
//! device is not named exactly takes the first adapter that it may have. Knows nothing of other users' workers, nor of those in other
//! containers: what they hold is missing from what the driver grants.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use grokpipe_kernels::{Device, GpuAdapter, GpuChoice, GpuKind, KernelError, gpu_adapters, gpu_choice};
use tracing::warn;

use crate::error::CliError;

/// What is read of a lock's file at most: a worker's name and a number.
const HOLDER_BYTES_MAX: u64 = 256;

/// An adapter's lock; it goes with the value.
#[derive(Debug)]
pub(crate) struct Claim {
    _held: File,
}

/// Why an adapter could not be claimed.
#[derive(Debug)]
enum Unclaimed {
    /// Another worker has it.
    Held(String),
    /// Nobody can tell.
    Unknown(io::Error),
}

/// An open device, how it is asked for again, and the claim to it.
pub(crate) struct Claimed {
    pub(crate) device: Box<dyn Device>,
    pub(crate) name: String,
    pub(crate) claim: Option<Claim>,
}

/// Opens the device that `wanted` names and claims its adapter for `worker`, alone or, if it names its memory, with others that do.
///
/// # Errors
/// What `open` fails with; a usage error when all adapters that it may be are others'.
pub(crate) fn open(
    wanted: &str,
    names_memory: bool,
    worker: &str,
    open: impl Fn(&str) -> Result<Box<dyn Device>, KernelError>,
) -> Result<Claimed, CliError> {
    let unclaimed = |name: &str| Ok(Claimed { device: open(name)?, name: name.to_owned(), claim: None });
    let Some(choice) = gpu_choice(wanted) else { return unclaimed(wanted) };
    let folder = folder();
    let (mut held, mut failed) = (Vec::new(), None);
    let adapters = gpu_adapters();
    for adapter in candidates(&choice, &adapters) {
        let claim = match claim(&folder, &adapter.key, names_memory, worker) {
            Ok(claim) => Some(claim),
            Err(Unclaimed::Held(holder)) => {
                held.push(format!("{holder} has {adapter}"));
                continue;
            }
            Err(Unclaimed::Unknown(error)) => {
                warn!(%error, folder = %folder.display(), "nobody can tell whether another worker has {adapter}");
                None
            }
        };
        match open(&adapter.device()) {
            Ok(device) => return Ok(Claimed { device, name: adapter.device(), claim }),
            Err(error) => {
                warn!(%error, "{adapter} cannot be used");
                failed.get_or_insert(error);
            }
        }
    }
    if choice == GpuChoice::Hardware {
        if !held.is_empty() {
            warn!("{}: this worker takes the CPU", held.join(", "));
        }
        return unclaimed("cpu");
    }
    match failed {
        Some(error) => Err(error.into()),
        // The error lists what there is.
        None if held.is_empty() => unclaimed(wanted),
        None => Err(CliError::usage(format!("every adapter that {wanted} may be is another worker's"))
            .because(held.join(", "))
            .advise("give this worker another --device, see `grokpipe devices`, or each of them its --memory")),
    }
}

/// The adapters that a choice may mean, best first. Software ones stand in where there is no hardware, not where it is taken.
pub(crate) fn candidates<'a>(choice: &GpuChoice, adapters: &'a [GpuAdapter]) -> Vec<&'a GpuAdapter> {
    let accepted: Vec<&GpuAdapter> = adapters.iter().filter(|adapter| choice.accepts(adapter)).collect();
    let is_hardware = |adapter: &&GpuAdapter| adapter.kind != GpuKind::Software;
    if *choice == GpuChoice::Best && accepted.iter().any(is_hardware) {
        return accepted.into_iter().filter(is_hardware).collect();
    }
    accepted
}

/// Where the locks of this user's workers are.
fn folder() -> PathBuf {
    let told = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let own = format!("grokpipe-{}", rustix::process::getuid().as_raw());
    told.map_or_else(|| Path::new("/tmp").join(own), |folder| folder.join("grokpipe"))
}

/// Makes the folder, for this user alone. One that others may write to is refused: they could take every lock.
fn make(folder: &Path) -> io::Result<()> {
    if let Err(error) = fs::DirBuilder::new().mode(0o700).create(folder)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(error);
    }
    let found = fs::symlink_metadata(folder)?;
    let is_ours = found.is_dir() && found.uid() == rustix::process::getuid().as_raw() && found.mode() & 0o022 == 0;
    is_ours.then_some(()).ok_or_else(|| io::Error::other("others may write there"))
}

/// Takes an adapter's lock.
fn claim(folder: &Path, key: &str, shares: bool, worker: &str) -> Result<Claim, Unclaimed> {
    make(folder).map_err(Unclaimed::Unknown)?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let path = folder.join(format!("{}.lock", key.chars().map(plain).collect::<String>()));
    let opened = File::options().create(true).truncate(false).read(true).write(true).open(path);
    let mut file = opened.map_err(Unclaimed::Unknown)?;
    match if shares { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => {
            // For messages alone: the lock is what counts.
            let holder = format!("worker {worker} (process {})", std::process::id());
            let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(holder.as_bytes()));
            Ok(Claim { _held: file })
        }
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.take(HOLDER_BYTES_MAX).read_to_string(&mut holder);
            Err(Unclaimed::Held(if holder.is_empty() { "another worker".to_owned() } else { holder }))
        }
        Err(TryLockError::Error(error)) => Err(Unclaimed::Unknown(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_adapter_is_one_workers_or_those_that_name_their_memory() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("locks");
        let key = "llvmpipe (LLVM 15, 256 bits) 0";
        let try_it = |shares, worker| claim(&folder, key, shares, worker);
        for (first, second, both) in
            [(false, false, false), (false, true, false), (true, false, false), (true, true, true)]
        {
            let held = try_it(first, "w1").unwrap();
            match try_it(second, "w2") {
                Ok(_) => assert!(both, "{first} {second}"),
                Err(Unclaimed::Held(holder)) => assert!(!both && holder.contains("worker w1 (process "), "{holder}"),
                Err(Unclaimed::Unknown(error)) => panic!("{error}"),
            }
            // Another adapter is nobody's.
            claim(&folder, "0000:41:00.0", false, "w3").unwrap();
            drop(held);
        }
        try_it(false, "w4").unwrap();
    }

    #[test]
    fn a_folder_that_others_write_to_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(claim(folder.path(), "a", false, "w1"), Err(Unclaimed::Unknown(_))));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(matches!(claim(&link, "a", false, "w1"), Err(Unclaimed::Unknown(_))));
    }
}

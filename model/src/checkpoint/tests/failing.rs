//! A folder whose files can be read only so much, and then fail, as a disk does that is pulled out.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::SystemTime,
};

use super::{Folder, ReadAt, Storage};

/// The folder. Reads fail once what is left does not suffice for them.
pub(crate) struct Failing {
    folder: Folder,
    left: Arc<AtomicU64>,
    cost: Cost,
}

/// What a read into this room costs.
type Cost = fn(&[u8]) -> u64;

struct FailingFile {
    file: Box<dyn ReadAt>,
    left: Arc<AtomicU64>,
    cost: Cost,
}

impl Failing {
    /// So many bytes can be read, all files together.
    pub(crate) fn after_bytes(folder: &Path, left: &Arc<AtomicU64>) -> Arc<Self> {
        Arc::new(Self { folder: Folder(folder.to_owned()), left: Arc::clone(left), cost: |out| out.len() as u64 })
    }

    /// So many reads succeed, of all files together.
    pub(crate) fn after_reads(folder: &Path, reads: u64) -> Arc<Self> {
        Arc::new(Self { folder: Folder(folder.to_owned()), left: Arc::new(AtomicU64::new(reads)), cost: |_| 1 })
    }
}

impl Storage for Failing {
    fn list(&self, folder: &str) -> io::Result<Option<Vec<(String, u64)>>> {
        self.folder.list(folder)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>> {
        Ok(Box::new(FailingFile { file: self.folder.open(name)?, left: Arc::clone(&self.left), cost: self.cost }))
    }

    fn changed(&self, name: &str) -> io::Result<Option<SystemTime>> {
        self.folder.changed(name)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }
}

impl ReadAt for FailingFile {
    fn length(&self) -> u64 {
        self.file.length()
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let cost = (self.cost)(out);
        if self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(cost)).is_err() {
            return Err(io::Error::other("the disk was pulled out"));
        }
        self.file.read_exact_at(out, offset)
    }
}

//! Where files are: a folder on disk, or whatever a test puts in its place.
//!
//! Files are read by position, never as a whole. Only regular files are opened: a pipe or a device in a model's folder would
//! otherwise hang the reader or feed it for ever.

use std::{fs::File, io, path::PathBuf, time::SystemTime};

/// An open file.
pub trait ReadAt: Send + Sync {
    /// Length in bytes.
    fn length(&self) -> u64;

    /// Fills `out` from `offset` on.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::UnexpectedEof`] past the end.
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A folder of files.
pub trait Storage: Send + Sync {
    /// Names of the files in `folder`, itself relative to the storage, with their lengths; `None` when there is no such folder.
    ///
    /// # Errors
    /// What the system says.
    fn list(&self, folder: &str) -> io::Result<Option<Vec<(String, u64)>>>;

    /// Opens a regular file.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidInput`] for anything that is not a regular file.
    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>>;

    /// When a file was last written to; `None` where a storage does not know.
    ///
    /// # Errors
    /// What the system says.
    fn changed(&self, name: &str) -> io::Result<Option<SystemTime>> {
        let _ = name;
        Ok(None)
    }

    /// Path of a file, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// A folder on disk.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Storage for Folder {
    fn list(&self, folder: &str) -> io::Result<Option<Vec<(String, u64)>>> {
        let entries = match std::fs::read_dir(self.0.join(folder)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            // Follows links, which model caches are full of; what they lead to must be a file.
            let Ok(metadata) = std::fs::metadata(entry.path()) else { continue };
            if metadata.is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), metadata.len()));
            }
        }
        files.sort();
        Ok(Some(files))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>> {
        let path = self.0.join(name);
        let not_a_file = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        // Asked before opening: opening a pipe waits for its other end.
        if !std::fs::metadata(&path)?.is_file() {
            return Err(not_a_file());
        }
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(not_a_file());
        }
        Ok(Box::new(DiskFile { file, length: metadata.len() }))
    }

    fn changed(&self, name: &str) -> io::Result<Option<SystemTime>> {
        std::fs::metadata(self.0.join(name))?.modified().map(Some)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

struct DiskFile {
    file: File,
    length: u64,
}

impl ReadAt for DiskFile {
    fn length(&self) -> u64 {
        self.length
    }

    #[cfg(unix)]
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut out: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !out.is_empty() {
            let read = std::os::windows::fs::FileExt::seek_read(&self.file, out, offset)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            out = &mut out[read..];
            offset += read as u64;
        }
        Ok(())
    }
}

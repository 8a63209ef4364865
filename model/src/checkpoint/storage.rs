//! Where files are: a folder on disk, or whatever a test puts in its place.
//!
//! Files are read by position, never as a whole. Only regular files are opened: a pipe or a device in a model's folder would
//! otherwise hang the reader or feed it for ever.
//!
//! A file is known by its name as text. A name that is not UTF-8 is known by its text with U+FFFD for what is no text, as long as no
//! other file of its folder has the same.

use std::{
    fs::{File, FileType},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

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
            let name = entry.file_name().to_string_lossy().into_owned();
            // What macOS writes beside a file on a foreign disk: its attributes, under its name and extension.
            if name.starts_with(APPLE_DOUBLE) {
                continue;
            }
            // Follows links, which model caches are full of; what they lead to must be a file.
            let Ok(metadata) = std::fs::metadata(entry.path()) else { continue };
            if metadata.is_file() {
                files.push((name, metadata.len()));
            }
        }
        files.sort();
        Ok(Some(files))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>> {
        open_regular(&self.real(name)?)
    }

    fn changed(&self, name: &str) -> io::Result<Option<SystemTime>> {
        std::fs::metadata(self.real(name)?)?.modified().map(Some)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.real(name).unwrap_or_else(|_| self.0.join(name))
    }
}

/// How names of AppleDouble files begin.
const APPLE_DOUBLE: &str = "._";

impl Folder {
    /// The path of the file that is known by this name.
    fn real(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.0.join(name);
        if !name.contains(char::REPLACEMENT_CHARACTER) || std::fs::symlink_metadata(&path).is_ok() {
            return Ok(path);
        }
        let (folder, name) = name.rsplit_once('/').unwrap_or(("", name));
        let mut found = None;
        for entry in std::fs::read_dir(self.0.join(folder))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy() == name && found.replace(entry.path()).is_some() {
                let reason = "two files have names that differ only in what is not UTF-8";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
        }
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Opens a regular file; what is none is refused with the word for what it is.
///
/// # Errors
/// What the system says; [`io::ErrorKind::InvalidInput`] for anything that is not a regular file.
pub fn open_regular(path: &Path) -> io::Result<Box<dyn ReadAt>> {
    let not_a_file = |kind| io::Error::new(io::ErrorKind::InvalidInput, format!("it is {}", what_is(kind)));
    // Asked before opening: opening a pipe waits for its other end.
    let metadata = std::fs::metadata(path).map_err(|error| dangling(path, error))?;
    if !metadata.is_file() {
        return Err(not_a_file(metadata.file_type()));
    }
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(not_a_file(metadata.file_type()));
    }
    Ok(Box::new(DiskFile { file, length: metadata.len() }))
}

/// The system calls a link that leads nowhere a missing file.
fn dangling(path: &Path, error: io::Error) -> io::Error {
    match std::fs::read_link(path) {
        Ok(target) if error.kind() == io::ErrorKind::NotFound => {
            let said = format!("it is a link to {}, where nothing is", target.display());
            io::Error::new(io::ErrorKind::InvalidInput, said)
        }
        _ => error,
    }
}

/// The word for what is not a regular file.
pub(crate) fn what_is(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a pipe, not a file";
        }
        if kind.is_socket() {
            return "a socket, not a file";
        }
        if kind.is_block_device() || kind.is_char_device() {
            return "a device, not a file";
        }
    }
    if kind.is_dir() { "a folder, not a file" } else { "no regular file" }
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

//! Files in memory, so that no input touches a disk.

use std::{io, path::PathBuf, sync::Arc};

use grokpipe_model::checkpoint::storage::{ReadAt, Storage};

/// One file.
#[derive(Clone)]
pub(super) struct Bytes(Arc<[u8]>);

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl ReadAt for Bytes {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let begin = usize::try_from(offset).map_err(io::Error::other)?;
        let piece = begin.checked_add(out.len()).and_then(|end| self.0.get(begin..end));
        out.copy_from_slice(piece.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A model's folder: files by name, in folders as the names say.
pub(super) struct Files(pub(super) Vec<(String, Bytes)>);

impl Storage for Files {
    fn list(&self, folder: &str) -> io::Result<Option<Vec<(String, u64)>>> {
        let within = |name: &String| {
            let (parent, file) = name.rsplit_once('/').unwrap_or(("", name));
            (parent == folder).then(|| file.to_owned())
        };
        let found: Vec<_> = self.0.iter().filter_map(|(name, bytes)| Some((within(name)?, bytes.length()))).collect();
        Ok(if found.is_empty() { None } else { Some(found) })
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>> {
        match self.0.iter().find(|(other, _)| other == name) {
            Some((_, bytes)) => Ok(Box::new(bytes.clone())),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

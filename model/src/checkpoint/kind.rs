//! What a file is, told by its first bytes. Names decide nothing here: caches have blobs without an extension, and a download that
//! went wrong has the right name.

use std::{fmt, io, path::Path};

use super::storage::{ReadAt, Storage};
use crate::{Bytes, ModelError};

/// What a file holds, as far as a reader of models is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// GGUF, of either byte order.
    Gguf,
    /// safetensors.
    Safetensors,
    /// A pickle: one tensor of xAI's checkpoint.
    Pickle,
    /// A JSON object.
    Json,
    /// Git LFS's stand-in for a file that was not fetched.
    Pointer {
        /// Length of the file that it stands for, where the pointer says it.
        bytes: Option<u64>,
    },
    /// What macOS writes beside a file on a foreign disk.
    AppleDouble,
    /// A web page.
    Html,
    /// A ZIP archive; PyTorch's own files are such.
    Zip,
    /// Zeros where every format has a mark.
    Zeros,
    /// Nothing.
    Empty,
    /// Something else.
    Other,
}

/// Longest pointer, as Git LFS has it.
const LONGEST_POINTER: u64 = 1024;
/// How a pointer begins.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
/// Bytes that suffice to tell.
const BEGINNING: usize = 512;

impl FileKind {
    /// Tells it by the first bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: &dyn ReadAt) -> io::Result<Self> {
        let mut beginning = vec![0; BEGINNING.min(file.length() as usize)];
        file.read_exact_at(&mut beginning, 0)?;
        Ok(Self::of_beginning(&beginning, file.length()))
    }

    fn of_beginning(bytes: &[u8], length: u64) -> Self {
        let text = bytes.trim_ascii_start();
        let begins = |with: &str| text.get(..with.len()).is_some_and(|text| text.eq_ignore_ascii_case(with.as_bytes()));
        if let Some(bytes) = pointer(bytes, length) {
            return Self::Pointer { bytes };
        }
        match bytes {
            [] => Self::Empty,
            [b'G', b'G', b'U', b'F', ..] => Self::Gguf,
            [b'P', b'K', 3, 4, ..] => Self::Zip,
            [0, 5, 0x16, 7, ..] => Self::AppleDouble,
            [0x80, 2..=5, ..] => Self::Pickle,
            _ if is_safetensors(bytes, length) => Self::Safetensors,
            _ if bytes.len() >= 8 && bytes.iter().all(|byte| *byte == 0) => Self::Zeros,
            _ if begins("<!doctype") || begins("<html") => Self::Html,
            _ if begins("{") => Self::Json,
            _ => Self::Other,
        }
    }
}

/// As a message says what was found.
impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gguf => f.write_str("a GGUF file"),
            Self::Safetensors => f.write_str("a safetensors file"),
            Self::Pickle => f.write_str("a pickle"),
            Self::Json => f.write_str("a JSON object"),
            Self::Pointer { bytes: Some(bytes) } => {
                write!(f, "a Git LFS pointer to its {}: fetch it with `git lfs pull`", Bytes(*bytes))
            }
            Self::Pointer { bytes: None } => f.write_str("a Git LFS pointer to it: fetch it with `git lfs pull`"),
            Self::AppleDouble => f.write_str("an AppleDouble file, which macOS leaves beside the real one"),
            Self::Html => f.write_str("a web page: the download was refused or needs a login"),
            Self::Zip => f.write_str("a ZIP archive, as PyTorch's .bin files are"),
            Self::Zeros => f.write_str("zeros: the download was not finished"),
            Self::Empty => f.write_str("an empty file"),
            Self::Other => f.write_str("another file"),
        }
    }
}

/// Whether these bytes are a Git LFS pointer; the length that it says.
fn pointer(bytes: &[u8], length: u64) -> Option<Option<u64>> {
    if length > LONGEST_POINTER || !bytes.starts_with(POINTER) {
        return None;
    }
    let text = String::from_utf8_lossy(bytes);
    Some(text.lines().find_map(|line| line.strip_prefix("size ")?.trim().parse().ok()))
}

fn is_safetensors(bytes: &[u8], length: u64) -> bool {
    let Some((prefix, rest)) = bytes.split_first_chunk::<8>() else { return false };
    let header = u64::from_le_bytes(*prefix);
    rest.first() == Some(&b'{') && header >= 2 && header <= length - 8
}

/// Refuses a pointer in place of a whole file that was read; `place` is for messages.
pub(crate) fn refuse_pointer(bytes: &[u8], place: &str) -> Result<(), ModelError> {
    match FileKind::of_beginning(bytes, bytes.len() as u64) {
        kind @ FileKind::Pointer { .. } => Err(ModelError::invalid(place, "the file itself", kind.to_string())),
        _ => Ok(()),
    }
}

/// Opens a file of a model; one that stands for another which was not fetched is refused.
pub(crate) fn open(storage: &dyn Storage, name: &str) -> Result<Box<dyn ReadAt>, ModelError> {
    let io = |source| ModelError::Io { path: storage.path(name), source };
    let file = storage.open(name).map_err(io)?;
    if file.length() <= LONGEST_POINTER
        && let kind @ FileKind::Pointer { .. } = FileKind::of(&*file).map_err(io)?
    {
        return Err(unfit(&storage.path(name), "the file itself", kind));
    }
    Ok(file)
}

/// A file of another kind than was expected.
pub(crate) fn unfit(path: &Path, expected: &str, found: FileKind) -> ModelError {
    ModelError::invalid(path.display().to_string(), expected, found.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_told_by_its_first_bytes() {
        let pointer =
            |size: &str| format!("version https://git-lfs.github.com/spec/v1\noid sha256:00\n{size}").into_bytes();
        let cases: [(Vec<u8>, FileKind); 17] = [
            (b"GGUF\x03\0\0\0".to_vec(), FileKind::Gguf),
            (b"\x08\0\0\0\0\0\0\0{      }".to_vec(), FileKind::Safetensors),
            (b"\x80\x04\x95".to_vec(), FileKind::Pickle),
            (b" {\"a\": 1}".to_vec(), FileKind::Json),
            (pointer("size 12345\n"), FileKind::Pointer { bytes: Some(12345) }),
            (pointer("size lots\n"), FileKind::Pointer { bytes: None }),
            (pointer(""), FileKind::Pointer { bytes: None }),
            ([pointer("size 5\n"), vec![b'\n'; 1024]].concat(), FileKind::Other),
            (b"\0\x05\x16\x07\0\x02\0\0Mac OS X".to_vec(), FileKind::AppleDouble),
            (b"\n<!DOCTYPE html><html>".to_vec(), FileKind::Html),
            (b"<HTML>".to_vec(), FileKind::Html),
            (b"PK\x03\x04".to_vec(), FileKind::Zip),
            (vec![0; 600], FileKind::Zeros),
            (Vec::new(), FileKind::Empty),
            (b"\xff\0\0\0\0\0\0\0{".to_vec(), FileKind::Other),
            (b"\x08\0\0\0\0\0\0\0".to_vec(), FileKind::Other),
            (b"GGU".to_vec(), FileKind::Other),
        ];
        for (bytes, kind) in cases {
            let beginning = &bytes[..BEGINNING.min(bytes.len())];
            assert_eq!(
                FileKind::of_beginning(beginning, bytes.len() as u64),
                kind,
                "{:?}",
                String::from_utf8_lossy(beginning)
            );
        }
    }
}

//! The manifest of a model: the SHA-256 of each file, as `sha256sum -c` reads it, and in its comments the sums that workers check while
//! they load.
//!
//! ```text
//! # grokpipe manifest 1
//! 5c69…  ckpt-0/tensor00000_000
//! # xxh3 6c62…  layer 3
//! ```
//!
//! Names are relative to the manifest's folder. What is known of a file comes from every `.sha256` file beside it, whoever wrote it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use crate::{
    ModelError,
    contents::{Part, Sum},
};

/// The manifest in a model's folder.
pub const NAME: &str = "grokpipe.sha256";
/// What a file's name is followed by in that of its own manifest.
pub const EXTENSION: &str = ".sha256";

const TITLE: &str = "# grokpipe manifest 1";
const SUM: &str = "# xxh3 ";
/// Longest manifest: 770 files and 67 parts need about 80 KB.
const LONGEST: u64 = 4 << 20;

/// What a manifest says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// SHA-256 in hex by name, as the bytes of the file name; `None` for the one file that the manifest is named after.
    pub files: Vec<(Option<Vec<u8>>, String)>,
    /// Sums of parts.
    pub sums: BTreeMap<Part, Sum>,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// [`ModelError`] when it cannot be read, or is none.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Io { path: path.to_owned(), source };
        let file = crate::checkpoint::storage::open_regular(path).map_err(failed)?;
        let place = path.display().to_string();
        if file.length() > LONGEST {
            let expected = format!("a manifest of at most {LONGEST} bytes");
            return Err(ModelError::invalid(place, expected, format!("{} bytes", file.length())));
        }
        let mut bytes = vec![0; file.length() as usize];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        Self::parse(&bytes, &place)
    }

    fn parse(bytes: &[u8], place: &str) -> Result<Self, ModelError> {
        let mut manifest = Self::default();
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let refuse = |expected: &str| {
                let found = format!("{:?}", String::from_utf8_lossy(line));
                ModelError::invalid(format!("{place}: line {}", index + 1), expected, found)
            };
            if let Some(sum) = line.strip_prefix(SUM.as_bytes()) {
                let parsed = std::str::from_utf8(sum).ok().and_then(|text| {
                    let (sum, part) = text.split_once("  ")?;
                    Some((Part::from_text(part)?, Sum::from_hex(sum)?))
                });
                let (part, sum) = parsed.ok_or_else(|| refuse("a sum of 32 hexadecimal digits and a part"))?;
                manifest.sums.insert(part, sum);
            } else if !line.is_empty() && !line.starts_with(b"#") {
                let parsed = file_line(line);
                manifest.files.push(parsed.ok_or_else(|| refuse("64 hexadecimal digits and a file's name"))?);
            }
        }
        Ok(manifest)
    }

    /// Writes it in place of what is there.
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), ModelError> {
        let failed = |source: io::Error| ModelError::Io { path: path.to_owned(), source };
        let mut text = format!("{TITLE}\n").into_bytes();
        for (name, checksum) in &self.files {
            let name = name.as_deref().unwrap_or_default();
            text.extend([checksum.as_bytes(), b"  ", name, b"\n"].concat());
        }
        for (part, sum) in &self.sums {
            text.extend(format!("{SUM}{sum}  {part}\n").bytes());
        }
        let mut temporary = OsString::from(path);
        temporary.push(".partial");
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        written.and_then(|()| std::fs::rename(&temporary, path)).map_err(failed)
    }
}

/// The sums of parts in this manifest; none where there is none.
pub(crate) fn sums_in(path: &Path) -> Result<BTreeMap<Part, Sum>, ModelError> {
    match std::fs::symlink_metadata(path) {
        Err(_) => Ok(BTreeMap::new()),
        Ok(_) => Manifest::read(path).map(|manifest| manifest.sums),
    }
}

/// `CHECKSUM  NAME`, `CHECKSUM *NAME`, or a checksum alone.
fn file_line(line: &[u8]) -> Option<(Option<Vec<u8>>, String)> {
    let (checksum, rest) = line.split_at_checked(64)?;
    let checksum = std::str::from_utf8(checksum).ok().filter(|text| is_sha256(text))?.to_ascii_lowercase();
    match rest {
        [] => Some((None, checksum)),
        [b' ', b' ' | b'*', name @ ..] if !name.is_empty() => Some((Some(name.to_vec()), checksum)),
        _ => None,
    }
}

/// Whether this is a SHA-256 in hex.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The path of a name in a manifest of this folder.
pub(crate) fn path_of(folder: &Path, name: &[u8]) -> PathBuf {
    #[cfg(unix)]
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name);
    #[cfg(not(unix))]
    let name = &*String::from_utf8_lossy(name);
    folder.join(name)
}

/// SHA-256 of a file in hex; `progress` is told bytes done since its last call.
pub(crate) fn sha256_of(path: &Path, progress: &dyn Fn(u64)) -> io::Result<String> {
    use sha2::{Digest, Sha256};
    let mut file = File::open(path)?;
    let mut piece = vec![0; 1 << 20];
    let mut hash = Sha256::new();
    loop {
        let read = match file.read(&mut piece) {
            Ok(0) => return Ok(crate::checkpoint::digest::hex(&hash.finalize())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&piece[..read]);
        progress(read as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_comes_back_as_it_was_written_and_others_lines_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        let manifest = Manifest {
            files: vec![(Some(b"ckpt-0/a b".to_vec()), "0a".repeat(32)), (Some(vec![b'm', 0xf6]), "1b".repeat(32))],
            sums: [(Part::Layer(3), Sum::of_vector(&[1.0])), (Part::FinalNorm, Sum::of_vector(&[2.0]))].into(),
        };
        manifest.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), manifest);
        let sum = "AB".repeat(32);
        for (line, name) in [
            (format!("{sum}\n"), None),
            (format!("{sum} *m.gguf\r\n"), Some(b"m.gguf".to_vec())),
            (format!("# by hand\n\n{sum}  m.gguf"), Some(b"m.gguf".to_vec())),
        ] {
            let read = Manifest::parse(line.as_bytes(), "m").unwrap();
            assert_eq!(read.files, [(name, sum.to_lowercase())], "{line:?}");
        }
        for line in ["no checksum", &format!("{sum}x  m"), &format!("{sum}  "), "# xxh3 12  layer 1", "# xxh3 "] {
            let message = Manifest::parse(line.as_bytes(), "m").unwrap_err().to_string();
            assert!(message.contains("m: line 1: expected"), "{message}");
        }
    }
}

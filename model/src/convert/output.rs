//! The files of a conversion: under temporary names while they are written, their checksums, and how they become the real ones.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    header::ALIGNMENT,
    parts::{Part, Record},
};
use crate::ModelError;

/// Bytes that are checked at a time.
const PIECE: usize = 1 << 20;

/// SHA-256 of what was added.
#[derive(Clone, Default)]
pub(super) struct Checksum(Sha256);

impl Checksum {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// So far, in hex.
    pub(super) fn hex(&self) -> String {
        self.0.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The names around a conversion's target.
pub(super) struct Output {
    out: PathBuf,
}

impl Output {
    pub(super) fn new(out: &Path) -> Self {
        Self { out: out.to_owned() }
    }

    pub(super) fn journal(&self) -> PathBuf {
        with_suffix(&self.out, ".journal")
    }

    pub(super) fn checksums(&self) -> PathBuf {
        with_suffix(&self.out, ".sha256")
    }

    /// There must be a folder to write into: a conversion makes none, and names it rather than a file in it.
    pub(super) fn check_folder(&self) -> Result<(), ModelError> {
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        let path = parent.unwrap_or(Path::new(".")).to_owned();
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => Ok(()),
            Ok(_) => Err(ModelError::invalid(path.display().to_string(), "a folder", "a file")),
            Err(source) => Err(ModelError::Io { path, source }),
        }
    }

    /// At the start of a conversion none of its files may exist, not even under their temporary names: nothing is ever overwritten.
    pub(super) fn check_free(&self, parts: &[Part]) -> Result<(), ModelError> {
        let results = parts.iter().map(|part| part.path.clone()).chain([self.checksums()]);
        let temporary = parts.iter().map(temporary).chain([with_suffix(&self.checksums(), ".partial")]);
        results.chain(temporary).try_for_each(|path| check_absent(&path))
    }

    /// On resume, an existing result file must be one that this conversion could have written: a part only if it was finished and has no
    /// temporary file left, checksums only if all parts exist. Whatever is read or continued must be a plain file, not a pipe or a link.
    pub(super) fn check_own(&self, parts: &[Part], records: &[Vec<Record>]) -> Result<(), ModelError> {
        let checksums = self.checksums();
        check_plain(&with_suffix(&checksums, ".partial"))?;
        check_plain(&checksums)?;
        for (part, records) in parts.iter().zip(records) {
            let temporary = temporary(part);
            check_plain(&temporary)?;
            check_plain(&part.path)?;
            let can_be_published = !exists(&temporary) && records.len() == part.tensors.len() + 1;
            if !can_be_published {
                check_absent(&part.path)?;
            }
            if !exists(&part.path) {
                check_absent(&checksums)?;
            }
        }
        Ok(())
    }

    /// Opens the file of a part and confirms what the journal says of it; `progress` is told bytes that were confirmed.
    pub(super) fn resume(
        &self,
        part: &Part,
        records: &[Record],
        progress: &mut dyn FnMut(u64),
    ) -> Result<Writing, ModelError> {
        let temporary = temporary(part);
        let count = part.tensors.len() + 1;
        // The last run may have ended between the renaming of two parts.
        if !exists(&temporary) && exists(&part.path) {
            let path = part.path.clone();
            let file = File::open(&path).map_err(failed(&path))?;
            let writing = confirmed(part, records, Writing::of(file, path), progress)?;
            let length = writing.file.metadata().map_err(failed(&writing.path))?.len();
            if writing.finished == count && length == writing.written {
                return Ok(writing);
            }
            return Err(ModelError::invalid(
                part.path.display().to_string(),
                "what the interrupted conversion wrote, or no such file yet",
                "another file",
            ));
        }
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&temporary);
        let file = open.map_err(failed(&temporary))?;
        let mut writing = confirmed(part, records, Writing::of(file, temporary), progress)?;
        writing.cut()?;
        Ok(writing)
    }

    /// Gives all parts their names, the first one last, since it is the one that a reader begins with; then writes the checksums.
    pub(super) fn publish(&self, parts: &[Part], files: &[(PathBuf, u64, String)]) -> Result<(), ModelError> {
        for part in parts.iter().rev() {
            let temporary = temporary(part);
            if exists(&temporary) {
                check_absent(&part.path)?;
                std::fs::rename(&temporary, &part.path).map_err(failed(&part.path))?;
            }
        }
        // As bytes: a name need not be UTF-8.
        let mut text = Vec::new();
        for (path, _, checksum) in files {
            // The file lies beside them.
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            text.extend([checksum.as_bytes(), b"  ", name, b"\n"].concat());
        }
        let checksums = self.checksums();
        // Those of a run that ended before it removed its journal.
        if std::fs::read(&checksums).is_ok_and(|found| found == text) {
            return Ok(());
        }
        check_absent(&checksums)?;
        let temporary = with_suffix(&checksums, ".partial");
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        written.and_then(|()| std::fs::rename(&temporary, &checksums)).map_err(failed(&checksums))?;
        sync_folder(&self.out);
        Ok(())
    }
}

fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

fn check_plain(path: &Path) -> Result<(), ModelError> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            Err(ModelError::invalid(path.display().to_string(), "a plain file, or no such file yet", "something else"))
        }
        _ => Ok(()),
    }
}

fn check_absent(path: &Path) -> Result<(), ModelError> {
    if exists(path) {
        return Err(ModelError::invalid(path.display().to_string(), "no such file yet", "one"));
    }
    Ok(())
}

/// Names are on the disk only once their folder is. Not every system can do that, and all files are whole without it.
fn sync_folder(out: &Path) {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn temporary(part: &Part) -> PathBuf {
    with_suffix(&part.path, ".partial")
}

pub(super) fn failed(path: &Path) -> impl Fn(io::Error) -> ModelError {
    move |source| ModelError::Io { path: path.to_owned(), source }
}

/// A file that is being written.
pub(super) struct Writing {
    file: File,
    path: PathBuf,
    sum: Checksum,
    /// Header and tensors that are whole.
    finished: usize,
    written: u64,
}

impl Writing {
    fn of(file: File, path: PathBuf) -> Self {
        Self { file, path, sum: Checksum::default(), finished: 0, written: 0 }
    }

    /// Header and tensors that are whole.
    pub(super) fn finished(&self) -> usize {
        self.finished
    }

    /// Length so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.file.write_all(bytes).map_err(failed(&self.path))?;
        self.sum.add(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Fills up to where the next tensor may begin.
    pub(super) fn pad(&mut self) -> Result<(), ModelError> {
        let missing = self.written.next_multiple_of(ALIGNMENT) - self.written;
        self.write(&[0; ALIGNMENT as usize][..missing as usize])
    }

    /// The header or a tensor is whole; the checksum up to here.
    pub(super) fn finish_one(&mut self) -> String {
        self.finished += 1;
        self.sum.hex()
    }

    /// The file is whole and on the disk; its checksum.
    pub(super) fn close(self) -> Result<String, ModelError> {
        self.file.sync_all().map_err(failed(&self.path))?;
        Ok(self.sum.hex())
    }

    /// Drops what is not confirmed.
    fn cut(&mut self) -> Result<(), ModelError> {
        let cut = self.file.set_len(self.written);
        cut.and_then(|()| self.file.seek(io::SeekFrom::Start(self.written))).map_err(failed(&self.path))?;
        Ok(())
    }
}

/// Reads the file as far as the records agree with it.
fn confirmed(
    part: &Part,
    records: &[Record],
    mut writing: Writing,
    progress: &mut dyn FnMut(u64),
) -> Result<Writing, ModelError> {
    let length = writing.file.metadata().map_err(failed(&writing.path))?.len();
    let mut piece = vec![0; PIECE];
    let mut sum = Checksum::default();
    let mut at = 0;
    for (index, record) in records.iter().enumerate().take(part.tensors.len() + 1) {
        let end = part.end_of(index);
        if end > length {
            break;
        }
        while at < end {
            let now = &mut piece[..(end - at).min(PIECE as u64) as usize];
            writing.file.read_exact(now).map_err(failed(&writing.path))?;
            sum.add(now);
            at += now.len() as u64;
        }
        if sum.hex() != record.checksum {
            break;
        }
        (writing.sum, writing.written, writing.finished) = (sum.clone(), at, index + 1);
        progress(at);
    }
    Ok(writing)
}

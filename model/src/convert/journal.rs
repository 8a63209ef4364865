//! The journal of an unfinished conversion: which tensors are whole, by the checksum of their file up to their end.
//!
//! Lines of text: first which conversion it is, then for each finished header or tensor its part, count, checksum and number of values
//! lost. A later line with a smaller count supersedes what follows it. Lines are only appended; an unfinished last line is cut off, so a
//! process that ends at any moment loses no other. Entries count only once the files' checksums confirm them, so writes that a crash lost
//! or reordered are harmless. The journal is locked while it is written; it knows nothing of what the files hold.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

use super::{
    output::{Output, failed},
    parts::{Part, Record},
};
use crate::ModelError;

const TITLE: &str = "grokpipe convert 2";
/// Longest journal: a line has about 100 bytes.
const LONGEST: u64 = 128 << 16;

pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// What was found when it was opened: of each part, of its header and of each tensor.
    found: Vec<Vec<Record>>,
}

impl Journal {
    /// Opens the journal of this conversion, or begins it; refuses one of another.
    pub(super) fn open(output: &Output, fingerprint: &str, parts: &[Part]) -> Result<Self, ModelError> {
        let path = output.journal();
        let place = path.display().to_string();
        let mut open = OpenOptions::new();
        match std::fs::symlink_metadata(&path) {
            // Also one that a failing machine left without a line owns the temporary files beside it.
            Ok(metadata) if metadata.is_file() && metadata.len() <= LONGEST => {}
            Ok(_) => {
                let expected = format!("a journal of at most {LONGEST} bytes, or nothing");
                return Err(ModelError::invalid(place, expected, "something else"));
            }
            Err(_) => {
                output.check_free(parts)?;
                open.create_new(true);
            }
        }
        let mut file = open.read(true).write(true).open(&path).map_err(failed(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let expected = "no other conversion to this file";
                return Err(ModelError::invalid(place, expected, "one that is running"));
            }
            // Not every file system has locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(failed(&path)(error)),
        }
        let mut bytes = Vec::new();
        (&mut file).take(LONGEST).read_to_end(&mut bytes).map_err(failed(&path))?;
        let title = format!("{TITLE} {fingerprint}\n");
        let mut records = vec![Vec::new(); parts.len()];
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').take_while(|line| line.ends_with(b"\n"));
        let mut believed = 0;
        match lines.next() {
            // Nothing, or a first line that was not finished.
            None if title.as_bytes().starts_with(&bytes) => {}
            Some(line) if line == title.as_bytes() => {
                let records_of = |line: &&[u8]| record_of(line, &mut records).is_some();
                believed = line.len() + lines.take_while(records_of).map(<[u8]>::len).sum::<usize>();
            }
            _ => {
                let expected = "the journal of this conversion; remove it and the .partial files to begin anew";
                return Err(ModelError::invalid(
                    place,
                    expected,
                    "that of a model since changed, another format or file",
                ));
            }
        }
        output.check_own(parts, &records)?;
        let mut journal = Self { path, file, found: records };
        journal.cut(believed as u64)?;
        if believed == 0 {
            journal.add(&title)?;
        }
        Ok(journal)
    }

    /// What it said of a part when it was opened.
    pub(super) fn found(&self, part: usize) -> &[Record] {
        self.found.get(part).map_or(&[], |records| records)
    }

    /// Adds the record of what was finished last, the `count`th of its part; what was said of it and of what follows is void.
    pub(super) fn record(&mut self, part: usize, count: usize, record: &Record) -> Result<(), ModelError> {
        self.add(&format!("{part} {count} {} {}\n", record.checksum, record.lost))
    }

    /// Has all records on the disk, before files get their names by them.
    pub(super) fn sync(&self) -> Result<(), ModelError> {
        self.file.sync_all().map_err(failed(&self.path))
    }

    /// The conversion is finished.
    pub(super) fn remove(self) -> Result<(), ModelError> {
        std::fs::remove_file(&self.path).map_err(failed(&self.path))
    }

    fn add(&mut self, line: &str) -> Result<(), ModelError> {
        self.file.write_all(line.as_bytes()).map_err(failed(&self.path))
    }

    /// Drops what stands behind the first `length` bytes.
    fn cut(&mut self, length: u64) -> Result<(), ModelError> {
        let cut = self.file.set_len(length).and_then(|()| self.file.seek(SeekFrom::Start(length)));
        cut.map(|_| ()).map_err(failed(&self.path))
    }
}

/// Takes in a line; `None` when it is none, or not of the next record of a part or of one before it.
fn record_of(line: &[u8], records: &mut [Vec<Record>]) -> Option<()> {
    let mut words = std::str::from_utf8(line).ok()?.strip_suffix('\n')?.split(' ');
    let (part, count) = (words.next()?.parse::<usize>().ok()?, words.next()?.parse::<usize>().ok()?);
    let (checksum, lost) = (words.next()?, words.next()?.parse().ok()?);
    let is_checksum = checksum.len() == 64 && checksum.bytes().all(|byte| byte.is_ascii_hexdigit());
    let records = records.get_mut(part)?;
    if words.next().is_some() || count > records.len() || !is_checksum {
        return None;
    }
    records.truncate(count);
    records.push(Record { checksum: checksum.to_owned(), lost });
    Some(())
}

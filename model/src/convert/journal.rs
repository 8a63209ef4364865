//! The journal of an unfinished conversion: which tensors are whole, by the checksum of their file up to their end.
//!
//! Lines of text: what conversion it is, then part, count and checksum of each finished header or tensor. A line that was not
//! finished counts as none. Nothing is believed that the files do not confirm, so that the order in which a failing machine wrote
//! its blocks does not matter. The journal is locked while it is written; it knows nothing of what the files hold.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    path::PathBuf,
};

use super::{
    output::{Output, failed},
    parts::Part,
};
use crate::ModelError;

const TITLE: &str = "grokpipe convert 1";
/// Longest journal: a line has less than 100 bytes.
const LONGEST: u64 = 100 << 16;

pub(super) struct Journal {
    path: PathBuf,
    file: File,
    fingerprint: String,
    /// Checksums of each part, after its header and after each tensor.
    records: Vec<Vec<String>>,
}

impl Journal {
    /// Opens the journal of this conversion, or begins it; refuses one of another.
    pub(super) fn open(output: &Output, fingerprint: &str, parts: &[Part]) -> Result<Self, ModelError> {
        let path = output.journal();
        let place = path.display().to_string();
        match std::fs::symlink_metadata(&path) {
            // A journal that a failing machine left without a line still owns the temporary files beside it.
            Ok(metadata) if metadata.is_file() && metadata.len() == 0 => output.check_free(parts, false)?,
            Ok(metadata) if metadata.is_file() && metadata.len() <= LONGEST => {}
            Ok(_) => {
                let expected = format!("a journal of at most {LONGEST} bytes, or nothing");
                return Err(ModelError::invalid(place, expected, "something else"));
            }
            Err(_) => output.check_free(parts, true)?,
        }
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(failed(&path))?;
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
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.split_inclusive('\n').map_while(|line| line.strip_suffix('\n'));
        let title = format!("{TITLE} {fingerprint}");
        let mut records = vec![Vec::new(); parts.len()];
        match lines.next() {
            None => {}
            Some(line) if line == title => {
                for line in lines {
                    if record_of(line, &mut records).is_none() {
                        break;
                    }
                }
            }
            Some(_) => {
                let expected = "the journal of this conversion; remove it and the .partial files to begin anew";
                return Err(ModelError::invalid(place, expected, "that of another model, format or file"));
            }
        }
        let mut journal = Self { path, file, fingerprint: fingerprint.to_owned(), records };
        journal.rewrite()?;
        Ok(journal)
    }

    /// What is said of a part.
    pub(super) fn records(&self, part: usize) -> &[String] {
        self.records.get(part).map_or(&[], |records| records)
    }

    /// Forgets all but the first `count` records of a part, which were confirmed.
    pub(super) fn keep(&mut self, part: usize, count: usize) -> Result<(), ModelError> {
        if let Some(records) = self.records.get_mut(part).filter(|records| records.len() > count) {
            records.truncate(count);
            self.rewrite()?;
        }
        Ok(())
    }

    /// Adds the record of what was finished last.
    pub(super) fn record(&mut self, part: usize, checksum: String) -> Result<(), ModelError> {
        let Some(records) = self.records.get_mut(part) else { return Ok(()) };
        let line = format!("{part} {} {checksum}\n", records.len());
        records.push(checksum);
        self.file.write_all(line.as_bytes()).map_err(failed(&self.path))
    }

    /// The conversion is finished.
    pub(super) fn remove(self) -> Result<(), ModelError> {
        std::fs::remove_file(&self.path).map_err(failed(&self.path))
    }

    fn rewrite(&mut self) -> Result<(), ModelError> {
        let mut text = format!("{TITLE} {}\n", self.fingerprint);
        for (part, records) in self.records.iter().enumerate() {
            for (count, checksum) in records.iter().enumerate() {
                text.push_str(&format!("{part} {count} {checksum}\n"));
            }
        }
        let written = self.file.set_len(0).and_then(|()| self.file.rewind());
        written.and_then(|()| self.file.write_all(text.as_bytes())).map_err(failed(&self.path))
    }
}

/// Takes in a line; `None` when it is not the next of a part.
fn record_of(line: &str, records: &mut [Vec<String>]) -> Option<()> {
    let mut words = line.split(' ');
    let (part, count) = (words.next()?.parse::<usize>().ok()?, words.next()?.parse::<usize>().ok()?);
    let checksum = words.next()?;
    let is_checksum = checksum.len() == 64 && checksum.bytes().all(|byte| byte.is_ascii_hexdigit());
    let records = records.get_mut(part)?;
    if words.next().is_some() || count != records.len() || !is_checksum {
        return None;
    }
    records.push(checksum.to_owned());
    Some(())
}

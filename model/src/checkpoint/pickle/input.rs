//! A pickle's bytes, fetched in small pieces and never past the file's end.
//!
//! What the bytes mean is decided by the machine that reads them. The contents of arrays are skipped, not read.

use super::{PickleError, ReadAt};

/// The file as a stream of small pieces; array contents are skipped, not read.
pub(super) struct Input<'a> {
    pub(super) file: &'a dyn ReadAt,
    /// Where the next byte is.
    pub(super) at: u64,
    buffer: Vec<u8>,
    buffer_at: u64,
}

/// Bytes read at once: a whole header.
const PIECE: u64 = 512;

impl<'a> Input<'a> {
    pub(super) fn new(file: &'a dyn ReadAt) -> Self {
        Self { file, at: 0, buffer: Vec::new(), buffer_at: 0 }
    }

    pub(super) fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.take(1)?[0])
    }

    /// The next `length` bytes, at most 255.
    pub(super) fn take(&mut self, length: usize) -> Result<Vec<u8>, PickleError> {
        let end = self.checked_end(length as u64)?;
        let buffered = self.buffer_at..self.buffer_at + self.buffer.len() as u64;
        if !(buffered.start <= self.at && end <= buffered.end) {
            let piece = PIECE.max(length as u64).min(self.file.length() - self.at);
            self.buffer.resize(piece as usize, 0);
            self.buffer_at = self.at;
            let read = self.file.read_exact_at(&mut self.buffer, self.at);
            read.map_err(|error| self.error("readable bytes", error.to_string()))?;
        }
        let begin = (self.at - self.buffer_at) as usize;
        self.at = end;
        Ok(self.buffer[begin..begin + length].to_vec())
    }

    pub(super) fn skip(&mut self, length: u64) -> Result<(), PickleError> {
        self.at = self.checked_end(length)?;
        Ok(())
    }

    /// Frames only help readers that fetch ahead; their length must still make sense.
    pub(super) fn skip_frame(&mut self, offset: u64) -> Result<(), PickleError> {
        let bytes = self.take(8)?;
        let length = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        match self.at.checked_add(length) {
            Some(end) if end <= self.file.length() => Ok(()),
            _ => Err(PickleError {
                offset,
                expected: "a frame within the file".into(),
                found: format!("one of {length} bytes"),
            }),
        }
    }

    fn checked_end(&self, length: u64) -> Result<u64, PickleError> {
        match self.at.checked_add(length) {
            Some(end) if end <= self.file.length() => Ok(end),
            _ => {
                Err(self
                    .error(format!("{length} more bytes"), format!("the end of the file at {}", self.file.length())))
            }
        }
    }

    fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> PickleError {
        PickleError { offset: self.at, expected: expected.into(), found: found.into() }
    }
}

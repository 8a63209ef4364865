//! Cuts a conversion into files: one, or the parts of a split one, none longer than asked for. A tensor is never cut; of each that is
//! whole there is a record.

use std::path::{Path, PathBuf};

use super::{
    header::{ALIGNMENT, Metadata, Value, info_length},
    plan::Tensor,
};
use crate::{
    ModelError,
    checkpoint::open_gguf::{EXTENSION, MOST_PARTS, part_of, part_suffix},
};

/// One file to be written.
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<Tensor>,
}

/// What is known of a header or a tensor that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Checksum of the file up to its end.
    pub(super) checksum: String,
    /// Numbers that became zero because they are too small.
    pub(super) lost: usize,
}

impl Part {
    pub(super) fn length(&self) -> u64 {
        self.end_of(self.tensors.len())
    }

    /// Where the header and so many tensors end.
    pub(super) fn end_of(&self, tensors: usize) -> u64 {
        let padded = |tensor: &Tensor| tensor.bytes.next_multiple_of(ALIGNMENT);
        self.header.len() as u64 + self.tensors.iter().take(tensors).map(padded).sum::<u64>()
    }
}

/// The name must be one under which the file is found again.
pub(super) fn check_name(out: &Path) -> Result<(), ModelError> {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    if name.len() <= EXTENSION.len() || !name.ends_with(EXTENSION) || part_of(&name).is_some() {
        let expected = "a name that ends in .gguf and is not that of a part";
        return Err(ModelError::invalid(out.display().to_string(), expected, format!("{name:?}")));
    }
    Ok(())
}

/// One file if that is short enough, else as few parts as tensors in this order allow.
pub(super) fn cut(
    metadata: &Metadata,
    tensors: &[Tensor],
    out: &Path,
    most: Option<u64>,
) -> Result<Vec<Part>, ModelError> {
    let whole = Part { path: out.to_owned(), header: metadata.header(tensors), tensors: tensors.to_vec() };
    let Some(most) = most.filter(|most| whole.length() > *most) else { return Ok(vec![whole]) };
    let place = || out.display().to_string();
    // Numbers have a fixed width, so that these headers are as long as the real ones.
    let (first, later) = (with_split(metadata, 0, 0, 0), with_split(&Metadata::default(), 0, 0, 0));
    let mut counts: Vec<usize> = Vec::new();
    let (mut head, mut data) = (0, 0);
    for tensor in tensors {
        let (info, bytes) = (info_length(tensor), tensor.bytes.next_multiple_of(ALIGNMENT));
        if let Some(count) = counts.last_mut()
            && (head + info).next_multiple_of(ALIGNMENT) + data + bytes <= most
        {
            *count += 1;
            (head, data) = (head + info, data + bytes);
            continue;
        }
        let begun = if counts.is_empty() { first.length() } else { later.length() };
        (head, data) = (begun + info, bytes);
        let needed = head.next_multiple_of(ALIGNMENT) + data;
        if needed > most {
            let expected = format!("parts of at least {needed} bytes, for {}", tensor.label);
            return Err(ModelError::invalid(place(), expected, format!("{most} bytes")));
        }
        counts.push(1);
    }
    if counts.len() > MOST_PARTS as usize {
        let expected = format!("at most {MOST_PARTS} parts");
        return Err(ModelError::invalid(place(), expected, format!("{} of {most} bytes", counts.len())));
    }
    let prefix = out.file_stem().unwrap_or_default();
    let (of, mut left) = (counts.len(), tensors);
    let part = |(index, count): (usize, &usize)| {
        let (own, rest) = left.split_at(*count);
        left = rest;
        let base = if index == 0 { metadata } else { &Metadata::default() };
        let header = with_split(base, index, of, tensors.len()).header(own);
        let mut name = prefix.to_owned();
        name.push(part_suffix(index as u32 + 1, of as u32));
        name.push(EXTENSION);
        let path = out.with_file_name(name);
        Part { path, header, tensors: own.to_vec() }
    };
    Ok(counts.iter().enumerate().map(part).collect())
}

fn with_split(metadata: &Metadata, index: usize, of: usize, tensors: usize) -> Metadata {
    let mut metadata = metadata.clone();
    metadata.add("split.no", &Value::U16(index as u16));
    metadata.add("split.count", &Value::U16(of as u16));
    metadata.add("split.tensors.count", &Value::I32(tensors as i32));
    metadata
}

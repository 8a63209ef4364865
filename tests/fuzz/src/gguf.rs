//! GGUF: the header by itself, then the model that it describes. A second `GGUF` in the input begins the second part of a split file.

use std::path::Path;

use grokpipe_model::checkpoint::gguf::{self, Header};

use super::{
    memory::Bytes,
    opened::{model, numbers, refused},
};

/// Reads the input as a GGUF model.
pub fn run(data: &[u8]) -> bool {
    let second = data.windows(4).skip(4).rposition(|window| window == b"GGUF").map(|at| at + 4);
    match gguf::read(&Bytes::from(data)) {
        Ok(header) => lies_within(&header, data),
        // Two parts in one file are refused, and read as two below.
        Err(_joined) if second.is_some() => {}
        Err(error) => return refused(&error),
    }
    let files = match second {
        None => vec![("m.gguf".to_owned(), data.into())],
        Some(at) => vec![
            ("m-00001-of-00002.gguf".to_owned(), data[..at].into()),
            ("m-00002-of-00002.gguf".to_owned(), data[at..].into()),
        ],
    };
    model(Path::new(""), files)
}

/// Every tensor has the bytes that its shape asks for, all within the file, none of them twice.
fn lies_within(header: &Header, data: &[u8]) {
    let mut in_all = 0;
    for (name, entry) in &header.tensors {
        let row = entry.shape.last().copied().unwrap_or_default();
        let rows = entry.shape.iter().rev().skip(1).product::<u64>();
        assert_eq!(entry.format.row_bytes_u64(row).map(|bytes| bytes * rows), Some(entry.length), "{name}: {entry:?}");
        let end = entry.offset + entry.length;
        assert!(end <= data.len() as u64, "{name}: {entry:?} in {} bytes", data.len());
        in_all += entry.length;
        numbers(entry.format, &data[entry.offset as usize..end as usize]);
    }
    assert!(in_all <= data.len() as u64, "{in_all} bytes of tensors in {}", data.len());
}

//! safetensors: the header by itself, then the model with the sizes of `tiny/config.json`. An input that begins with `{` is an index,
//! and after a zero byte the one file that it may name, `a.safetensors`.

use grokpipe_model::checkpoint::safetensors;

use super::{
    memory::Bytes,
    opened::{model, numbers, refused, tiny},
};

/// Reads the input as a safetensors model.
pub fn run(data: &[u8]) -> bool {
    if data.starts_with(b"{") {
        let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
        let (index, file) = data.split_at(end);
        let file = file.get(1..).unwrap_or_default();
        let files = [("m.safetensors.index.json", index), ("a.safetensors", file)];
        return model(tiny(), files.map(|(name, bytes)| (name.to_owned(), bytes.into())).into());
    }
    let entries = match safetensors::read(&Bytes::from(data)) {
        Ok(entries) => entries,
        Err(error) => return refused(&error),
    };
    let mut in_all = 0;
    for (name, entry) in entries {
        let count: u64 = entry.shape.iter().product();
        assert_eq!(entry.format.row_bytes_u64(count), Some(entry.length), "{name}: {entry:?}");
        let end = entry.offset + entry.length;
        assert!(end <= data.len() as u64, "{name}: {entry:?} in {} bytes", data.len());
        in_all += entry.length;
        numbers(entry.format, &data[entry.offset as usize..end as usize]);
    }
    assert!(in_all < data.len() as u64, "{in_all} bytes of tensors in {}", data.len());
    model(tiny(), vec![("model.safetensors".to_owned(), data.into())])
}

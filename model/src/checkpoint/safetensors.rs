//! Reads the header of a safetensors file: an 8-byte length, a JSON object, then the numbers.
//!
//! Only the header is read. Every tensor must lie within the file, none may overlap another, and together they must fill it.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize,
    de::{Deserializer, MapAccess, Visitor},
};

use super::{
    header::{HeaderError, refuse},
    storage::ReadAt,
};
use crate::{BlockType, Format};

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Sizes, outermost first; last index fastest.
    pub shape: Vec<u64>,
    /// How the numbers are stored.
    pub format: Format,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Longest header: 770 tensors need about 100 KB.
const LONGEST_HEADER: u64 = 16 << 20;

/// The tensors of a file by name.
///
/// # Errors
/// [`HeaderError`].
pub fn read(file: &dyn ReadAt) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let length = file.length();
    let mut prefix = [0; 8];
    if length < 8 || file.read_exact_at(&mut prefix, 0).is_err() {
        return refuse("header", "at least 8 bytes", format!("{length} bytes"));
    }
    let header = u64::from_le_bytes(prefix);
    let most = LONGEST_HEADER.min(length - 8);
    if header > most {
        return refuse("header", format!("at most {most} bytes"), format!("{header} bytes"));
    }
    let mut text = vec![0; header as usize];
    if let Err(error) = file.read_exact_at(&mut text, 8) {
        return refuse("header", format!("{header} readable bytes"), error.to_string());
    }
    let parsed: Header = match serde_json::from_slice(&text) {
        Ok(parsed) => parsed,
        Err(error) => return refuse("header", "a JSON object of tensors", error.to_string()),
    };
    placed(parsed, 8 + header, length)
}

fn placed(header: Header, begin: u64, end: u64) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let mut entries = BTreeMap::new();
    let mut spans = Vec::with_capacity(header.0.len());
    for (name, raw) in header.0 {
        let entry = checked(&name, &raw, begin, end)?;
        spans.push((entry.offset, entry.offset + entry.length, name.clone()));
        if entries.insert(name.clone(), entry).is_some() {
            return refuse(&name, "each tensor once", "it twice");
        }
    }
    spans.sort();
    let mut at = begin;
    for (from, to, name) in spans {
        if from != at {
            let what = if from < at { "an overlap with another tensor" } else { "a gap before it" };
            return refuse(&name, format!("its data at byte {at}"), format!("{what}: byte {from}"));
        }
        at = to;
    }
    if at != end {
        return refuse("file", format!("{at} bytes, as the header says"), format!("{end} bytes"));
    }
    Ok(entries)
}

fn checked(name: &str, raw: &Raw, begin: u64, end: u64) -> Result<Entry, HeaderError> {
    let format = match raw.dtype.as_str() {
        "F32" => Format::F32,
        "F16" => Format::Blocks(BlockType::F16),
        "BF16" => Format::Blocks(BlockType::Bf16),
        other => {
            let found = format!("dtype {}", other.chars().take(16).collect::<String>());
            return refuse(name, "dtype F32, F16 or BF16", found);
        }
    };
    if raw.shape.len() > 4 {
        return refuse(name, "at most 4 dimensions", raw.shape.len().to_string());
    }
    let [from, to] = raw.data_offsets;
    let needed = raw.shape.iter().try_fold(1_u64, |count, size| count.checked_mul(*size));
    let needed = needed.and_then(|count| format.row_bytes_u64(count));
    if from > to || needed != Some(to - from) {
        let expected =
            needed.map_or("a shape that fits a file".into(), |needed| format!("{needed} bytes for {:?}", raw.shape));
        return refuse(name, expected, format!("data offsets {from} to {to}"));
    }
    match (begin.checked_add(from), begin.checked_add(to)) {
        (Some(offset), Some(last)) if last <= end => {
            Ok(Entry { shape: raw.shape.clone(), format, offset, length: to - from })
        }
        _ => refuse(name, format!("data within the file's {end} bytes"), format!("data offsets {from} to {to}")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Keeps every entry, the same name twice as well: a map would silently keep one of them.
struct Header(Vec<(String, Raw)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

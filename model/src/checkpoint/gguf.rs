//! Reads the header of a GGUF file (versions 2 and 3, little-endian): metadata, then where each tensor lies.
//!
//! Only the header is read. Counts and lengths in it are somebody else's: nothing is allocated for more than the file can hold,
//! every tensor must lie within the file, and none may overlap another. What the metadata means is decided elsewhere.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
};

use super::{
    header::{HeaderError, refuse},
    storage::ReadAt,
};
use crate::{BlockType, Format};

const MAGIC: &[u8; 4] = b"GGUF";
/// Longest header: the vocabulary of Grok-1 takes 3 MB, names of 2115 tensors 150 KB.
const LONGEST_HEADER: u64 = 64 << 20;
/// Longest key, tensor name, or piece of the vocabulary.
const LONGEST_TEXT: u64 = 64 << 10;
/// Most tensors of a file; Grok-1 has 2115.
const MOST_TENSORS: u64 = 1 << 16;
/// Bytes fetched at a time.
const PIECE: usize = 1 << 16;

/// What a GGUF file says before its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, Entry>,
}

/// A value of the metadata. Arrays within arrays, of booleans, and of numbers of one or two bytes are passed over.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Whole numbers of any width.
    Integer(i128),
    /// Floats of either width.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Arrays of whole numbers.
    Integers(Vec<i64>),
    /// Arrays of floats.
    Floats(Vec<f32>),
    /// Arrays of texts.
    Texts(Vec<String>),
}

/// For messages: of a list only its length, of a text its first characters.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
            Self::Bool(value) => value.fmt(f),
            Self::Text(text) => write!(f, "{:?}", text.chars().take(60).collect::<String>()),
            Self::Integers(list) => write!(f, "a list of {}", list.len()),
            Self::Floats(list) => write!(f, "a list of {}", list.len()),
            Self::Texts(list) => write!(f, "a list of {}", list.len()),
        }
    }
}

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Sizes, outermost first; last index fastest. The file has them the other way round.
    pub shape: Vec<u64>,
    /// How the numbers are stored.
    pub format: Format,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Reads a header.
///
/// # Errors
/// [`HeaderError`].
pub fn read(file: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut cursor = Cursor { file, at: 0, piece: Vec::new(), piece_at: 0 };
    let magic: [u8; 4] = cursor.array()?;
    if &magic != MAGIC {
        return refuse("byte 0", "GGUF", format!("{:?}", String::from_utf8_lossy(&magic)));
    }
    match cursor.u32()? {
        2 | 3 => {}
        // The same bytes in the other order.
        version if (1..16).contains(&version.swap_bytes()) => {
            return refuse("byte 4", "a little-endian file", "a big-endian one");
        }
        version => return refuse("byte 4", "version 2 or 3", format!("version {version}")),
    }
    let tensors = cursor.count(MOST_TENSORS, "tensors")?;
    let keys = cursor.count(MOST_TENSORS, "keys")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..keys {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        if let Some(value) = cursor.value(kind, &key)?
            && metadata.insert(key.clone(), value).is_some()
        {
            return refuse(key, "each key once", "it twice");
        }
    }
    let infos = (0..tensors).map(|_| Info::read(&mut cursor)).collect::<Result<Vec<_>, _>>()?;
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Integer(alignment)) if (1..=1 << 20).contains(alignment) && alignment.count_ones() == 1 => {
            *alignment as u64
        }
        Some(other) => return refuse("general.alignment", "a power of two up to 1048576", other.to_string()),
    };
    let begin = cursor.at.next_multiple_of(alignment);
    let tensors = placed(infos, begin, alignment, file.length())?;
    let end = tensors.values().map(|entry| entry.offset + entry.length).max().unwrap_or(begin);
    refuse_joined(file, end, alignment)?;
    Ok(Header { metadata, tensors })
}

/// Parts of a split file that were joined with `cat`: a second header where the data ends.
fn refuse_joined(file: &dyn ReadAt, end: u64, alignment: u64) -> Result<(), HeaderError> {
    for at in [end, end.next_multiple_of(alignment)] {
        let mut magic = [0; MAGIC.len()];
        if at + magic.len() as u64 <= file.length() && file.read_exact_at(&mut magic, at).is_ok() && &magic == MAGIC {
            let advice = "keep the parts apart, or merge them with `llama-gguf-split --merge`";
            return refuse(
                format!("byte {at}"),
                format!("the end of the file ({advice})"),
                "another GGUF file joined to it",
            );
        }
    }
    Ok(())
}

struct Info {
    name: String,
    shape: Vec<u64>,
    format: Format,
    length: u64,
    offset: u64,
}

impl Info {
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, HeaderError> {
        let name = cursor.text()?;
        let dimensions = cursor.u32()?;
        if !(1..=4).contains(&dimensions) {
            return refuse(name, "1 to 4 dimensions", dimensions.to_string());
        }
        let mut shape = (0..dimensions).map(|_| cursor.u64()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let number = cursor.u32()?;
        let offset = cursor.u64()?;
        let format = match (number, BlockType::from_number(number)) {
            (0, _) => Format::F32,
            (_, Some(kind)) => Format::Blocks(kind),
            _ => return refuse(name, format!("a type of {}", known_types()), type_name(number)),
        };
        let row = shape.last().copied().unwrap_or_default();
        let count = shape.iter().try_fold(1_u64, |count, size| count.checked_mul(*size));
        let length = match (format.row_bytes_u64(row), count) {
            (Some(bytes), Some(count)) if count > 0 => bytes.checked_mul(count / row),
            _ => None,
        };
        let Some(length) = length else {
            let blocks = if let Format::Blocks(kind) = format { kind.weights() } else { 1 };
            return refuse(
                name,
                format!("a shape that fits a file, rows of whole blocks of {blocks}"),
                format!("{shape:?}"),
            );
        };
        Ok(Self { name, shape, format, length, offset })
    }
}

fn known_types() -> String {
    std::iter::once("F32").chain(BlockType::all().map(BlockType::name)).collect::<Vec<_>>().join(", ")
}

/// The names of other types, so that a refusal says more than a number.
fn type_name(number: u32) -> String {
    let name = match number {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24..=28 => "integers or f64",
        29 => "IQ1_M",
        31..=33 => "Q4_0 in rows that lie together",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36..=38 => "IQ4_NL in rows that lie together",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => return format!("type number {number}"),
    };
    format!("{name} (type number {number})")
}

fn placed(infos: Vec<Info>, begin: u64, alignment: u64, end: u64) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let mut names = HashSet::new();
    let mut spans: Vec<(u64, u64, &str)> = Vec::with_capacity(infos.len());
    for info in &infos {
        if !names.insert(&info.name) {
            return refuse(&*info.name, "each tensor once", "it twice");
        }
        if !info.offset.is_multiple_of(alignment) {
            return refuse(&*info.name, format!("an offset that {alignment} divides"), info.offset.to_string());
        }
        let from = begin.checked_add(info.offset);
        match (from, from.and_then(|from| from.checked_add(info.length))) {
            (Some(from), Some(to)) if to <= end => spans.push((from, to, &info.name)),
            _ => {
                let found = format!("{} bytes from {begin} + {}", info.length, info.offset);
                return refuse(&*info.name, format!("data within the file's {end} bytes"), found);
            }
        }
    }
    spans.sort_unstable();
    if let Some([before, after]) = spans.array_windows().find(|[before, after]| after.0 < before.1) {
        return refuse(
            after.2,
            format!("data after byte {}", before.1),
            format!("byte {}, within {:?}", after.0, before.2),
        );
    }
    let entry = |info: Info| {
        let Info { name, shape, format, length, offset } = info;
        (name, Entry { shape, format, offset: begin + offset, length })
    };
    Ok(infos.into_iter().map(entry).collect())
}

/// Reads forward through a file, a piece at a time.
struct Cursor<'a> {
    file: &'a dyn ReadAt,
    at: u64,
    piece: Vec<u8>,
    piece_at: u64,
}

impl Cursor<'_> {
    fn left(&self) -> u64 {
        self.file.length().min(LONGEST_HEADER).saturating_sub(self.at)
    }

    fn error<T>(&self, expected: impl Into<String>, found: impl Into<String>) -> Result<T, HeaderError> {
        refuse(format!("byte {}", self.at), expected, found)
    }

    /// The next bytes; few enough for one piece.
    fn take(&mut self, length: usize) -> Result<&[u8], HeaderError> {
        if length as u64 > self.left() {
            let expected = format!("{length} more bytes of a header of at most {LONGEST_HEADER}");
            return self.error(expected, format!("{} left", self.left()));
        }
        let have = (self.piece_at + self.piece.len() as u64).saturating_sub(self.at);
        if have < length as u64 {
            let fetch = (PIECE.max(length) as u64).min(self.file.length() - self.at) as usize;
            self.piece.resize(fetch, 0);
            if let Err(error) = self.file.read_exact_at(&mut self.piece, self.at) {
                return self.error(format!("{fetch} readable bytes"), error.to_string());
            }
            self.piece_at = self.at;
        }
        let start = (self.at - self.piece_at) as usize;
        self.at += length as u64;
        Ok(&self.piece[start..start + length])
    }

    /// Passes over bytes, without fetching them.
    fn skip(&mut self, length: u64) -> Result<(), HeaderError> {
        if length > self.left() {
            return self.error(format!("{length} more bytes"), format!("{} left", self.left()));
        }
        self.at += length;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HeaderError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, HeaderError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, HeaderError> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, most: u64, what: &str) -> Result<u64, HeaderError> {
        let count = self.u64()?;
        if count > most { self.error(format!("at most {most} {what}"), count.to_string()) } else { Ok(count) }
    }

    fn text(&mut self) -> Result<String, HeaderError> {
        let length = self.count(LONGEST_TEXT, "bytes of text")?;
        let at = self.at;
        let bytes = self.take(length as usize)?.to_vec();
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => refuse(format!("byte {at}"), "UTF-8", "other bytes"),
        }
    }

    fn scalar(&mut self, kind: u32) -> Result<Option<Value>, HeaderError> {
        let value = match kind {
            0 => Value::Integer(self.array::<1>()?[0].into()),
            1 => Value::Integer((self.array::<1>()?[0] as i8).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Ok(None),
        };
        Ok(Some(value))
    }

    /// A value of this kind; `None` for an array that is passed over.
    fn value(&mut self, kind: u32, key: &str) -> Result<Option<Value>, HeaderError> {
        if kind == 9 {
            return self.array_value(key, 0);
        }
        match self.scalar(kind)? {
            Some(value) => Ok(Some(value)),
            None => refuse(key, "a kind of value from 0 to 12", kind.to_string()),
        }
    }

    fn array_value(&mut self, key: &str, depth: u32) -> Result<Option<Value>, HeaderError> {
        let kind = self.u32()?;
        // Every element takes a byte at least, so that a count is bounded by what is left.
        let count = self.count(self.left(), "elements, as many as there are bytes left")?;
        if kind == 9 {
            if depth == 4 {
                return refuse(key, "arrays at most 4 deep", "deeper ones");
            }
            for _ in 0..count {
                self.array_value(key, depth + 1)?;
            }
            return Ok(None);
        }
        if matches!(kind, 0..=3 | 7) {
            // A table for a normaliser, perhaps. Nobody asks for it, and as numbers it would take up to eight times its room.
            let width = if matches!(kind, 2 | 3) { 2 } else { 1 };
            self.skip(count.saturating_mul(width))?;
            return Ok(None);
        }
        let (mut integers, mut floats, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            match self.scalar(kind)? {
                Some(Value::Integer(value)) => match i64::try_from(value) {
                    Ok(value) => integers.push(value),
                    Err(_) => return refuse(key, "whole numbers below 2^63", value.to_string()),
                },
                Some(Value::Float(value)) => floats.push(value as f32),
                Some(Value::Text(value)) => texts.push(value),
                _ => return refuse(key, "a kind of element from 0 to 12", kind.to_string()),
            }
        }
        Ok(Some(match kind {
            6 | 12 => Value::Floats(floats),
            8 => Value::Texts(texts),
            _ => Value::Integers(integers),
        }))
    }
}

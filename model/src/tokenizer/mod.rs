//! Grok-1's SentencePiece tokenizer: byte-pair encoding with user-defined pieces and byte fallback.
//!
//! Built from the file alone, without SentencePiece itself. Only models of Grok-1's kind are read (BPE, identity normaliser, one
//! space in front, byte fallback); any other is refused by what differs. Control ids never come from text; a GGUF file may ask for one
//! in front of it and one behind it.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
    fmt,
    path::Path,
};

use crate::{
    ModelError,
    checkpoint::{
        gguf::Header,
        kind::{FileKind, refuse_pointer},
        storage::open_regular,
    },
};

mod decode;
mod gguf;
mod proto;
mod vocabulary;

pub use decode::StreamDecoder;
use proto::Piece;
pub(crate) use proto::PieceKind;
use vocabulary::Vocabulary;

/// Stands for a space inside pieces.
const SPACE: char = '\u{2581}';
/// Largest file that is read.
const LONGEST_FILE: u64 = 256 << 20;

/// Text to token ids and back.
pub struct Tokenizer {
    pieces: Vec<Piece>,
    /// Learned pieces by text.
    learned: HashMap<String, u32>,
    /// User-defined pieces by first byte, longest first.
    user_defined: HashMap<u8, Vec<(String, u32)>>,
    /// The piece of each byte.
    bytes: [u32; 256],
    /// A space is put in front of a text, and dropped again.
    space_in_front: bool,
    /// What is put around the ids of a text, where the file asks for it.
    around: Around,
}

/// Control ids around a text. Grok-1 was trained without; a GGUF file may ask for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Around {
    /// In front.
    pub(crate) begin: Option<u32>,
    /// At the end.
    pub(crate) end: Option<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("pieces", &self.pieces.len()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.model`, or the vocabulary within a GGUF file.
    ///
    /// # Errors
    /// [`ModelError`] when the file is not a SentencePiece BPE model of Grok-1's kind.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let file = open_regular(path).map_err(io)?;
        if FileKind::of(&*file).map_err(io)? == FileKind::Gguf {
            return gguf::open(path);
        }
        let place = path.display().to_string();
        if file.length() > LONGEST_FILE {
            let expected = format!("a file of at most {LONGEST_FILE} bytes");
            return Err(ModelError::invalid(place, expected, format!("{} bytes", file.length())));
        }
        let mut bytes = vec![0; file.length() as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        Self::from_bytes(&bytes, &place)
    }

    /// Reads the bytes of a `tokenizer.model`; `place` is for messages.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_bytes(bytes: &[u8], place: &str) -> Result<Self, ModelError> {
        refuse_pointer(bytes, place)?;
        let model = proto::read(bytes).map_err(|error| {
            ModelError::invalid(format!("{place}: byte {}", error.offset), error.expected, error.found)
        })?;
        let flags = [
            (model.model_type == 2, "a BPE model"),
            (model.byte_fallback, "byte fallback"),
            (model.add_dummy_prefix, "a space put in front of the text"),
            (!model.remove_extra_whitespaces, "white space kept as it is"),
            (model.escape_whitespaces, "spaces written as U+2581"),
            (!model.whitespace_as_suffix, "white space at the beginning of pieces"),
            (!model.has_character_map, "the identity normaliser"),
        ];
        if let Some((_, expected)) = flags.iter().find(|(good, _)| !good) {
            return Err(ModelError::invalid(place, *expected, "a model without it"));
        }
        Self::of_pieces(model.pieces, true, Around::default(), place)
    }

    /// The vocabulary in the metadata of a GGUF file; `place` is for messages.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_gguf(header: &Header, place: &str) -> Result<Self, ModelError> {
        gguf::of(header, place)
    }

    fn of_pieces(pieces: Vec<Piece>, space_in_front: bool, around: Around, place: &str) -> Result<Self, ModelError> {
        let vocabulary = Vocabulary::of(&pieces, place)?;
        let bytes = vocabulary.all_bytes(place)?;
        let Vocabulary { learned, user_defined, .. } = vocabulary;
        Ok(Self { pieces, learned, user_defined, bytes, space_in_front, around })
    }

    /// Number of pieces.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The pieces, in the order of their ids.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Whether a space is put in front of a text.
    pub(crate) fn puts_space_in_front(&self) -> bool {
        self.space_in_front
    }

    /// Token ids of a text. No BOS and no EOS, unless the file asks for them.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let Around { begin, end } = self.around;
        begin.into_iter().chain(self.encode_alone(text)).chain(end).collect()
    }

    fn encode_alone(&self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut escaped = String::with_capacity(text.len() + 3);
        if self.space_in_front {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|char| if char == ' ' { SPACE } else { char }));
        let mut symbols = self.symbols(&escaped);
        self.merge(&escaped, &mut symbols);
        self.ids(&escaped, &symbols)
    }

    /// Token ids of bytes that need not be UTF-8: each byte that belongs to no character counts as one U+FFFD.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.encode(&decode::replace_invalid(bytes))
    }

    /// Text of token ids. Ids out of range decode to nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = StreamDecoder::default();
        let mut text: String = ids.iter().map(|id| decoder.push(self, *id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// Cuts a text into user-defined pieces (the longest at each place) and single characters.
    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len());
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            let candidates = self.user_defined.get(&rest.as_bytes()[0]);
            let piece = candidates.and_then(|pieces| pieces.iter().find(|(piece, _)| rest.starts_with(piece.as_str())));
            let (length, frozen) = match piece {
                Some((piece, id)) => (piece.len(), Some(*id)),
                None => (rest.chars().next().map_or(1, char::len_utf8), None),
            };
            symbols.push(Symbol {
                begin: at,
                length,
                frozen,
                previous: symbols.len().checked_sub(1),
                next: symbols.len() + 1,
            });
            at += length;
        }
        symbols
    }

    /// Joins neighbours, the best pair first, until no pair is a piece.
    fn merge(&self, text: &str, symbols: &mut [Symbol]) {
        let mut queue = BinaryHeap::new();
        for left in 0..symbols.len().saturating_sub(1) {
            self.offer(text, symbols, left, &mut queue);
        }
        while let Some(Pair { left, length, .. }) = queue.pop() {
            let right = symbols[left].next;
            // Outdated: one of the two has been joined with another since.
            if symbols[left].length == 0
                || right >= symbols.len()
                || symbols[left].length + symbols[right].length != length
            {
                continue;
            }
            symbols[left].length = length;
            symbols[right].length = 0;
            let after = symbols[right].next;
            symbols[left].next = after;
            if after < symbols.len() {
                symbols[after].previous = Some(left);
                self.offer(text, symbols, left, &mut queue);
            }
            if let Some(before) = symbols[left].previous {
                self.offer(text, symbols, before, &mut queue);
            }
        }
    }

    fn offer(&self, text: &str, symbols: &[Symbol], left: usize, queue: &mut BinaryHeap<Pair>) {
        let (a, b) = (&symbols[left], &symbols[symbols[left].next]);
        if a.frozen.is_some() || b.frozen.is_some() {
            return;
        }
        let length = a.length + b.length;
        if let Some(id) = self.learned.get(&text[a.begin..a.begin + length]) {
            queue.push(Pair { score: self.pieces[*id as usize].score, left, length });
        }
    }

    fn ids(&self, text: &str, symbols: &[Symbol]) -> Vec<u32> {
        let mut ids = Vec::new();
        for symbol in symbols.iter().filter(|symbol| symbol.length > 0) {
            let piece = &text[symbol.begin..symbol.begin + symbol.length];
            match symbol.frozen.or_else(|| self.learned.get(piece).copied()) {
                Some(id) => ids.push(id),
                None => ids.extend(piece.bytes().map(|byte| self.bytes[usize::from(byte)])),
            }
        }
        ids
    }
}

/// A stretch of the text; joined ones have length 0.
struct Symbol {
    begin: usize,
    length: usize,
    /// A user-defined piece, never joined.
    frozen: Option<u32>,
    previous: Option<usize>,
    /// `symbols.len()` for the last.
    next: usize,
}

/// Two neighbours that make a piece together.
struct Pair {
    score: f32,
    left: usize,
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        // Highest score first, then leftmost.
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

#[cfg(test)]
mod tests;

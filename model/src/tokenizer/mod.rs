//! Grok-1's SentencePiece tokenizer: byte-pair encoding with user-defined pieces and byte fallback.
//!
//! Built from the file alone, without SentencePiece itself. Only models of Grok-1's kind are read (BPE, identity normaliser, one
//! space in front, byte fallback); any other is refused by what differs. Control ids never come from text; a GGUF file may ask for one
//! in front of it and one behind it.

use std::{collections::HashMap, fmt, path::Path};

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
mod merge;
mod proto;
mod vocabulary;

pub use decode::StreamDecoder;
use merge::{LONGEST_STRETCH, Merger};
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
    /// Bytes of the longest of them.
    longest_learned: usize,
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
        let longest_learned = learned.keys().map(String::len).max().unwrap_or(0);
        Ok(Self { pieces, learned, longest_learned, user_defined, bytes, space_in_front, around })
    }

    /// Number of pieces.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Most bytes of a text that one token stands for.
    pub fn longest_piece(&self) -> usize {
        let user_defined = self.user_defined.values().flatten().map(|(piece, _)| piece.len());
        user_defined.max().unwrap_or(0).max(self.longest_learned).max(1)
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
        let mut ids = Vec::new();
        let mut merger = Merger::default();
        // User-defined pieces stand for themselves; what is between them is joined.
        let (mut begin, mut at) = (0, 0);
        while at < escaped.len() {
            let rest = &escaped[at..];
            let user_defined = self.user_defined_at(rest);
            if user_defined.is_some() || at - begin >= LONGEST_STRETCH {
                merger.encode(self, &escaped[begin..at], &mut ids);
                begin = at;
            }
            match user_defined {
                Some((piece, id)) => {
                    ids.push(*id);
                    at += piece.len();
                    begin = at;
                }
                None => at += rest.chars().next().map_or(1, char::len_utf8),
            }
        }
        merger.encode(self, &escaped[begin..], &mut ids);
        ids
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

    /// The longest user-defined piece that a text begins with.
    fn user_defined_at(&self, text: &str) -> Option<&(String, u32)> {
        let candidates = self.user_defined.get(text.as_bytes().first()?)?;
        candidates.iter().find(|(piece, _)| text.starts_with(piece.as_str()))
    }

    /// Adds the id of a symbol: a learned piece, or else its bytes.
    fn push_ids(&self, symbol: &str, ids: &mut Vec<u32>) {
        match self.learned.get(symbol) {
            Some(id) => ids.push(*id),
            None => ids.extend(symbol.bytes().map(|byte| self.bytes[usize::from(byte)])),
        }
    }
}

#[cfg(test)]
mod tests;

//! Token ids back to text, one at a time.
//!
//! Bytes are held back until they make a character or another piece ends their run; the space in front of the first piece is
//! dropped, as encoding put it there.

use super::{PieceKind, SPACE, Tokenizer};

/// Decodes a stream of ids piece by piece; never emits half a character. All parts joined, with [`StreamDecoder::finish`], equal
/// [`Tokenizer::decode`] of all ids.
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    /// Bytes that may be the beginning of a character.
    held: Vec<u8>,
    /// Something has been decoded, so that a space is a space.
    begun: bool,
}

impl StreamDecoder {
    /// A decoder for a continuation of `prompt`, whose text was shown elsewhere. The prompt decides whether a leading space is
    /// dropped, and bytes at its end that are only half a character are completed by what follows.
    pub fn after(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        let mut decoder = Self::default();
        for id in prompt {
            decoder.push(tokenizer, *id);
        }
        decoder
    }

    /// The text that this id completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let Some(piece) = tokenizer.pieces.get(id as usize) else { return String::new() };
        if piece.kind == PieceKind::Control {
            // It has no text, yet it ends a run of bytes: what stands on its two sides is no character together.
            return self.finish();
        }
        if piece.kind == PieceKind::Byte {
            self.begun = true;
            let byte = tokenizer.bytes.iter().position(|byte| *byte == id).unwrap_or(0) as u8;
            self.held.push(byte);
            return self.whole_characters();
        }
        let mut text = self.finish();
        let begun = std::mem::replace(&mut self.begun, true);
        let keeps_space = begun || !tokenizer.space_in_front;
        let piece_text =
            if keeps_space { piece.text.as_str() } else { piece.text.strip_prefix(SPACE).unwrap_or(&piece.text) };
        text.extend(piece_text.chars().map(|char| if char == SPACE { ' ' } else { char }));
        text
    }

    /// What is still held back.
    pub fn finish(&mut self) -> String {
        replace_invalid(&std::mem::take(&mut self.held))
    }

    /// Takes what is certain from the held bytes; what may still become a character stays.
    fn whole_characters(&mut self) -> String {
        let mut certain = 0;
        while certain < self.held.len() {
            match next_character(&self.held[certain..]) {
                Next::Valid(length) => certain += length,
                Next::Invalid => certain += 1,
                Next::Incomplete => break,
            }
        }
        let rest = self.held.split_off(certain);
        replace_invalid(&std::mem::replace(&mut self.held, rest))
    }
}

enum Next {
    Valid(usize),
    /// The first byte belongs to no character.
    Invalid,
    Incomplete,
}

fn next_character(bytes: &[u8]) -> Next {
    let window = &bytes[..bytes.len().min(4)];
    match std::str::from_utf8(window) {
        Ok(text) => Next::Valid(text.chars().next().map_or(1, char::len_utf8)),
        Err(error) if error.valid_up_to() > 0 => {
            let text = String::from_utf8_lossy(&window[..error.valid_up_to()]);
            Next::Valid(text.chars().next().map_or(1, char::len_utf8))
        }
        Err(error) if error.error_len().is_none() => Next::Incomplete,
        Err(_) => Next::Invalid,
    }
}

/// Text of bytes; each byte that belongs to no character becomes one U+FFFD.
pub(super) fn replace_invalid(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match next_character(&bytes[at..]) {
            Next::Valid(length) => {
                text.push_str(&String::from_utf8_lossy(&bytes[at..at + length]));
                at += length;
            }
            Next::Invalid | Next::Incomplete => {
                text.push(char::REPLACEMENT_CHARACTER);
                at += 1;
            }
        }
    }
    text
}

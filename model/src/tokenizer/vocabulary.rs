//! Sorts a model's pieces by what they do, and refuses vocabularies that would make encoding ambiguous or slow.

use std::collections::HashMap;

use super::proto::{Piece, PieceKind};
use crate::ModelError;

/// Longest piece in bytes; Grok-1's longest has 48. Joining two symbols costs their length, so this keeps encoding linear.
const LONGEST_PIECE: usize = 1024;
/// Each place of a text is compared with these; Grok-1 has 65.
const MOST_USER_DEFINED: usize = 4096;
/// And all of them together are no longer than this: those that begin alike are compared to their ends.
const MOST_USER_DEFINED_BYTES: usize = 64 << 10;

/// Pieces by what they do.
#[derive(Default)]
pub(super) struct Vocabulary {
    /// Learned pieces by text.
    pub(super) learned: HashMap<String, u32>,
    /// User-defined pieces by first byte, longest first.
    pub(super) user_defined: HashMap<u8, Vec<(String, u32)>>,
    user_defined_count: usize,
    user_defined_bytes: usize,
    bytes: HashMap<u8, u32>,
}

impl Vocabulary {
    /// Sorts these pieces, whose ids are their places.
    pub(super) fn of(pieces: &[Piece], place: &str) -> Result<Self, ModelError> {
        let mut vocabulary = Self::default();
        for (id, piece) in (0_u32..).zip(pieces) {
            vocabulary.add(id, piece).map_err(|expected| {
                let text: String = piece.text.chars().take(60).collect();
                let found = format!("{text:?} with score {}", piece.score);
                ModelError::invalid(format!("{place}: piece {id}"), expected, found)
            })?;
        }
        for candidates in vocabulary.user_defined.values_mut() {
            candidates.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
            if let Some([_, (text, id)]) = candidates.array_windows().find(|[a, b]| a.0 == b.0) {
                let found = format!("{:?} again", text.chars().take(60).collect::<String>());
                return Err(ModelError::invalid(format!("{place}: piece {id}"), ONCE, found));
            }
        }
        Ok(vocabulary)
    }

    /// The piece of every byte.
    pub(super) fn all_bytes(&self, place: &str) -> Result<[u32; 256], ModelError> {
        let mut all = [0; 256];
        for (byte, slot) in (0_u8..=255).zip(&mut all) {
            let missing = || ModelError::invalid(place, "a piece for every byte", format!("none for {byte:#04x}"));
            *slot = *self.bytes.get(&byte).ok_or_else(missing)?;
        }
        Ok(all)
    }

    /// Adds a piece, or says what it should have been.
    fn add(&mut self, id: u32, piece: &Piece) -> Result<(), String> {
        let Some(&first) = piece.text.as_bytes().first().filter(|_| piece.text.len() <= LONGEST_PIECE) else {
            return Err(format!("a text of 1 to {LONGEST_PIECE} bytes"));
        };
        let known = match piece.kind {
            PieceKind::Normal if !piece.score.is_finite() => return Err("a finite score".to_owned()),
            PieceKind::Normal => self.learned.insert(piece.text.clone(), id),
            PieceKind::UserDefined if self.user_defined_count == MOST_USER_DEFINED => {
                return Err(format!("at most {MOST_USER_DEFINED} user-defined pieces"));
            }
            PieceKind::UserDefined if self.user_defined_bytes + piece.text.len() > MOST_USER_DEFINED_BYTES => {
                return Err(format!("at most {MOST_USER_DEFINED_BYTES} bytes of user-defined pieces"));
            }
            PieceKind::UserDefined => {
                self.user_defined_count += 1;
                self.user_defined_bytes += piece.text.len();
                self.user_defined.entry(first).or_default().push((piece.text.clone(), id));
                None
            }
            PieceKind::Byte => {
                let byte = byte_value(&piece.text).ok_or("a byte as <0xNN>")?;
                self.bytes.insert(byte, id)
            }
            PieceKind::Unknown | PieceKind::Control | PieceKind::Unused => None,
        };
        if known.is_some() { Err(ONCE.to_owned()) } else { Ok(()) }
    }
}

const ONCE: &str = "each piece once";

/// The byte that a piece such as `<0x0A>` stands for.
fn byte_value(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let two_digits = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    two_digits.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

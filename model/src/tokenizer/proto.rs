//! Reads what matters of a SentencePiece `ModelProto`: pieces with score and type, and the flags that must be as Grok-1's.
//!
//! A protobuf reader of two wire types; unknown fields are skipped, lengths are checked against what is left.

/// Kinds of piece, by their numbers in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
    Unused,
}

impl PieceKind {
    /// The kind with this number, which is the same in GGUF files.
    pub(super) fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Its number.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }
}

/// One entry of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) kind: PieceKind,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ModelProto {
    pub(super) pieces: Vec<Piece>,
    /// 1 unigram, 2 BPE.
    pub(super) model_type: u64,
    pub(super) byte_fallback: bool,
    pub(super) add_dummy_prefix: bool,
    pub(super) remove_extra_whitespaces: bool,
    pub(super) escape_whitespaces: bool,
    pub(super) whitespace_as_suffix: bool,
    pub(super) has_character_map: bool,
}

/// What is wrong, and at which byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProtoError {
    pub(super) offset: usize,
    pub(super) expected: &'static str,
    pub(super) found: String,
}

impl ProtoError {
    /// The same error, as seen from the message that holds this one.
    fn within(self, outer: &Reader<'_>, message: &[u8]) -> Self {
        Self { offset: outer.at - message.len() + self.offset, ..self }
    }
}

/// More pieces than any vocabulary has.
const MOST_PIECES: usize = 1 << 22;

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn error<T>(&self, expected: &'static str, found: impl Into<String>) -> Result<T, ProtoError> {
        Err(ProtoError { offset: self.at, expected, found: found.into() })
    }

    fn varint(&mut self) -> Result<u64, ProtoError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes.get(self.at) else {
                return self.error("a number", "the end of the message");
            };
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        self.error("a number of at most 64 bits", "a longer one")
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], ProtoError> {
        let left = &self.bytes[self.at..];
        match usize::try_from(length).ok().and_then(|length| left.get(..length)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => self.error("a length within the message", format!("{length} with {} bytes left", left.len())),
        }
    }

    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, ProtoError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Bytes(&[])
            }
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Fixed32([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            other => return self.error("wire type 0, 1, 2 or 5", other.to_string()),
        };
        Ok(Some((key >> 3, field)))
    }
}

/// Reads a whole file.
pub(super) fn read(bytes: &[u8]) -> Result<ModelProto, ProtoError> {
    let mut model = ModelProto {
        pieces: Vec::new(),
        model_type: 1,
        byte_fallback: false,
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
        escape_whitespaces: true,
        whitespace_as_suffix: false,
        has_character_map: false,
    };
    let mut reader = Reader { bytes, at: 0 };
    while let Some((number, field)) = reader.next()? {
        match (number, field) {
            (1, Field::Bytes(piece)) => {
                if model.pieces.len() == MOST_PIECES {
                    return reader.error("at most 4194304 pieces", "more");
                }
                model.pieces.push(read_piece(piece).map_err(|error| error.within(&reader, piece))?);
            }
            (2, Field::Bytes(trainer)) => {
                read_trainer(trainer, &mut model).map_err(|error| error.within(&reader, trainer))?;
            }
            (3, Field::Bytes(normaliser)) => {
                read_normaliser(normaliser, &mut model).map_err(|error| error.within(&reader, normaliser))?;
            }
            _ => {}
        }
    }
    Ok(model)
}

fn read_piece(bytes: &[u8]) -> Result<Piece, ProtoError> {
    let mut reader = Reader { bytes, at: 0 };
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    while let Some((number, field)) = reader.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) => match std::str::from_utf8(text) {
                Ok(text) => piece.text = text.to_owned(),
                Err(_) => return reader.error("a piece in UTF-8", "other bytes"),
            },
            (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Field::Number(kind)) => {
                piece.kind = match PieceKind::from_number(kind) {
                    Some(kind) => kind,
                    None => return reader.error("a kind of piece from 1 to 6", kind.to_string()),
                };
            }
            _ => {}
        }
    }
    Ok(piece)
}

fn read_trainer(bytes: &[u8], model: &mut ModelProto) -> Result<(), ProtoError> {
    let mut reader = Reader { bytes, at: 0 };
    while let Some((number, field)) = reader.next()? {
        match (number, field) {
            (3, Field::Number(value)) => model.model_type = value,
            (24, Field::Number(value)) => model.whitespace_as_suffix = value != 0,
            (35, Field::Number(value)) => model.byte_fallback = value != 0,
            _ => {}
        }
    }
    Ok(())
}

fn read_normaliser(bytes: &[u8], model: &mut ModelProto) -> Result<(), ProtoError> {
    let mut reader = Reader { bytes, at: 0 };
    while let Some((number, field)) = reader.next()? {
        match (number, field) {
            (2, Field::Bytes(map)) => model.has_character_map = !map.is_empty(),
            (3, Field::Number(value)) => model.add_dummy_prefix = value != 0,
            (4, Field::Number(value)) => model.remove_extra_whitespaces = value != 0,
            (5, Field::Number(value)) => model.escape_whitespaces = value != 0,
            _ => {}
        }
    }
    Ok(())
}

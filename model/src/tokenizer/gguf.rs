//! The vocabulary within a GGUF file, as a tokenizer.

use std::path::Path;

use super::{
    Around, Tokenizer,
    proto::{Piece, PieceKind},
};
use crate::{
    ModelError,
    checkpoint::{
        gguf::{Header, Value},
        open_gguf,
        storage::{Folder, Storage},
    },
};

/// What begins and ends a text, where a SentencePiece vocabulary does not say it.
const BEGIN: usize = 1;
const END: usize = 2;

/// Reads the vocabulary of this file; of a split one, of its first part.
pub(super) fn open(path: &Path) -> Result<Tokenizer, ModelError> {
    let folder = Folder(path.parent().unwrap_or(Path::new(".")).to_owned());
    let first = open_gguf::first_part(&path.file_name().unwrap_or_default().to_string_lossy());
    let header = open_gguf::read(&folder, &first)?;
    of(&header, &folder.path(&first).display().to_string())
}

/// The vocabulary in this header.
pub(super) fn of(header: &Header, place: &str) -> Result<Tokenizer, ModelError> {
    let metadata = &header.metadata;
    let refuse = |key: &str, expected: &str| {
        let found = if metadata.contains_key(key) { "another value" } else { "none" };
        ModelError::invalid(format!("{place}: {key}"), expected, found)
    };
    match metadata.get("tokenizer.ggml.model") {
        Some(Value::Text(model)) if model == open_gguf::VOCABULARY => {}
        _ => return Err(refuse("tokenizer.ggml.model", "\"llama\", a SentencePiece BPE model")),
    }
    let Some(Value::Texts(texts)) = metadata.get("tokenizer.ggml.tokens") else {
        return Err(refuse("tokenizer.ggml.tokens", "a list of pieces"));
    };
    let scores = match metadata.get("tokenizer.ggml.scores") {
        Some(Value::Floats(scores)) if scores.len() == texts.len() => scores,
        _ => return Err(refuse("tokenizer.ggml.scores", "as many scores as pieces")),
    };
    let kinds = match metadata.get("tokenizer.ggml.token_type") {
        Some(Value::Integers(kinds)) if kinds.len() == texts.len() => kinds,
        _ => return Err(refuse("tokenizer.ggml.token_type", "as many kinds as pieces")),
    };
    let piece = |((text, score), kind): ((&String, &f32), &i64)| {
        let kind = u64::try_from(*kind).ok().and_then(PieceKind::from_number);
        let kind = kind.ok_or_else(|| refuse("tokenizer.ggml.token_type", "kinds from 1 to 6"))?;
        Ok(Piece { text: text.clone(), score: *score, kind })
    };
    let pieces = texts.iter().zip(scores).zip(kinds).map(piece).collect::<Result<_, ModelError>>()?;
    let flag = |key: &str, default| match metadata.get(key) {
        None => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(refuse(key, "true or false")),
    };
    let space_in_front = flag("tokenizer.ggml.add_space_prefix", true)?;
    // The id to add, where the file asks for it.
    let added = |wanted: &str, id: &str, default: usize| {
        if !flag(wanted, false)? {
            return Ok(None);
        }
        let place = format!("{place}: {id}");
        let found = match metadata.get(id) {
            None => Some(default),
            Some(Value::Integer(number)) => usize::try_from(*number).ok(),
            Some(_) => None,
        };
        match found.filter(|id| *id < texts.len()) {
            Some(id) => Ok(Some(id as u32)),
            None => {
                let found = metadata.get(id).map_or_else(|| "none".to_owned(), Value::to_string);
                Err(ModelError::invalid(place, format!("an id below {}, as {wanted} is true", texts.len()), found))
            }
        }
    };
    let around = Around {
        begin: added("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", BEGIN)?,
        end: added("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", END)?,
    };
    Tokenizer::of_pieces(pieces, space_in_front, around, place)
}

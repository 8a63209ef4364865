//! The vocabulary within a GGUF file, as a tokenizer.

use std::path::Path;

use super::{
    Tokenizer,
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

/// Reads the vocabulary of this file; of a split one, of its first part.
pub(super) fn open(path: &Path) -> Result<Tokenizer, ModelError> {
    let folder = Folder(path.parent().unwrap_or(Path::new(".")).to_owned());
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Err(ModelError::invalid(path.display().to_string(), "the name of a GGUF file", "another"));
    };
    let first = open_gguf::first_part(name);
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
    let space_in_front = match metadata.get("tokenizer.ggml.add_space_prefix") {
        None => true,
        Some(Value::Bool(value)) => *value,
        Some(_) => return Err(refuse("tokenizer.ggml.add_space_prefix", "true or false")),
    };
    Tokenizer::of_pieces(pieces, space_in_front, place)
}

//! A model's `config.json`, whoever wrote it: xAI's keys, or those of a Hugging Face copy.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{ModelConfig, ModelError, checkpoint::kind::refuse_pointer, hugging_face};

/// No configuration is near this; a file that is was named by mistake.
const LONGEST: u64 = 1 << 20;

/// Reads a `config.json`.
///
/// # Errors
/// [`ModelError::Invalid`] naming the key, what was expected and what was found.
pub(crate) fn open(path: &Path) -> Result<ModelConfig, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(io)?;
    let (length, place) = (metadata.len(), path.display().to_string());
    // A pipe would hang the reader and a device feed it for ever; both have length 0.
    if !metadata.is_file() {
        return Err(ModelError::invalid(place, "a file", "a folder, a pipe or a device"));
    }
    if length > LONGEST {
        return Err(ModelError::invalid(place, format!("at most {LONGEST} bytes"), format!("{length}")));
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    refuse_pointer(text.as_bytes(), &place)?;
    match serde_json::from_str::<Map<String, Value>>(&text) {
        Ok(object) if object.contains_key("model_type") => hugging_face::config(&object, &place),
        // What is no object either is refused there.
        _ => ModelConfig::from_json(&text, &place),
    }
}

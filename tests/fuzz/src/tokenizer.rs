//! The two forms of a vocabulary: a `tokenizer.model` (protobuf), and the metadata of a GGUF file, which begins with `GGUF`. Texts go to
//! ids and back: some that every vocabulary meets, and the input's own last bytes, which hold whatever its pieces are made of.

use grokpipe_model::{
    checkpoint::gguf,
    tokenizer::{StreamDecoder, Tokenizer},
};

use super::{memory::Bytes, opened::refused};

const TEXTS: [&str; 5] = ["", " ", "The capital of France is", "abab\n\tc  ab ", "naïve 🦀\0\u{2581}<0x0A>"];
/// Bytes of the input that are made a text.
const OWN: usize = 200;
/// Ids that are decoded one by one.
const IDS: u32 = 600;

/// Reads the input as a vocabulary.
pub fn run(data: &[u8]) -> bool {
    let tokenizer = if data.starts_with(b"GGUF") {
        match gguf::read(&Bytes::from(data)) {
            Ok(header) => Tokenizer::from_gguf(&header, "m.gguf"),
            Err(error) => return refused(&error),
        }
    } else {
        Tokenizer::from_bytes(data, "tokenizer.model")
    };
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(error) => return refused(&error),
    };
    let own = String::from_utf8_lossy(&data[data.len().saturating_sub(OWN)..]);
    TEXTS.into_iter().chain([&*own]).for_each(|text| there_and_back(&tokenizer, text));
    let ids: Vec<u32> = (0..IDS).chain([u32::MAX]).collect();
    let mut decoder = StreamDecoder::after(&tokenizer, &ids[..1]);
    ids.iter().for_each(|id| drop(decoder.push(&tokenizer, *id)));
    tokenizer.encode_bytes(&data[..data.len().min(OWN)]);
    true
}

/// A text survives but for the mark that stands for spaces, and the space in front where the vocabulary has no piece for it.
fn there_and_back(tokenizer: &Tokenizer, text: &str) {
    let ids = tokenizer.encode(text);
    let size = tokenizer.vocab_size();
    assert!(ids.iter().all(|id| (*id as usize) < size), "{ids:?} of {size}");
    let plain = |text: &str| text.replace('\u{2581}', " ");
    let (back, text) = (plain(&tokenizer.decode(&ids)), plain(text));
    assert!(back == text || back.strip_prefix(' ') == Some(&*text), "{text:?} came back as {back:?}");
}

//! What the fuzz targets do with their input: give it to a reader, and use whatever the reader accepts.
//!
//! One module a target, each with one `run`, which says whether the input was accepted to the end. A refusal is as good as an
//! acceptance; what must not happen is a panic, a hang, memory by the input's word, or an accepted file that breaks a promise of the
//! readers. `model/tests/fuzz_corpus.rs` runs the same functions over the committed inputs on every `cargo test`.

pub mod gguf;
mod memory;
mod opened;
pub mod pickle;
pub mod safetensors;
pub mod tokenizer;

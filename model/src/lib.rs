//! What Grok-1 is: its configuration, the names and shapes of its tensors, the readers of its files, and its tokenizer.
//!
//! No arithmetic beyond what a number format means, and no networks here. Everything that comes from a file is untrusted: sizes are checked before anything is
//! allocated, and a reader constructs nothing but numbers.

mod blocks;
mod bytes;
mod config;
mod config_file;
mod error;
mod hugging_face;
mod quantize;
mod source;
mod tensors;

pub mod checkpoint;
pub mod contents;
pub mod convert;
pub mod footprint;
pub mod manifest;
pub mod tokenizer;
pub mod verify;

pub use blocks::{BlockType, Codes, IQ4_VALUES, NotUnpacked, UnpackedScales};
pub use bytes::Bytes;
pub use checkpoint::Model;
pub use config::ModelConfig;
pub use error::ModelError;
pub use quantize::QuantizeError;
pub use source::{Format, Layout, MatrixSource, MatrixSpec, WeightSource, layer_matrices};
pub use tensors::{LayerTensor, TensorName, TensorShape};

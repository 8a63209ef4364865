//! What is known of the files that xAI published: 770 tensors of these lengths, and a tokenizer. Checksums of the tensors were not
//! published; where they were downloaded from may know them.

use std::path::{Path, PathBuf};

use super::{files::checkpoint_in, folder, storage::Folder};
use crate::{LayerTensor, ModelConfig, TensorName};

/// Name, length and SHA-256 of the tokenizer.
pub(crate) const TOKENIZER: (&str, u64, &str) =
    ("tokenizer.model", 2_229_219, "5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f");

/// The folder with the tensors, where this is the folder of a checkpoint without a configuration of its own: xAI's has none.
pub(crate) fn folder(root: &Path) -> Option<PathBuf> {
    let checkpoint = checkpoint_in(&Folder(root.to_owned())).ok()??;
    let configured = root.join("config.json").exists()
        || (checkpoint.is_empty() && folder::above(root).join("config.json").exists());
    (!configured).then(|| if checkpoint.is_empty() { root.to_owned() } else { root.join(checkpoint) })
}

/// Name and length of every tensor's file.
pub(crate) fn lengths() -> impl Iterator<Item = (String, u64)> {
    let names = TensorName::in_file_order(ModelConfig::grok_1().num_hidden_layers);
    names.into_iter().enumerate().map(|(index, name)| (format!("tensor{index:05}_000"), length(&name)))
}

fn length(name: &TensorName) -> u64 {
    use LayerTensor::{AttentionOutput, Key, MoeDown, MoeGate, MoeUp, Query, Router, Value};
    match name {
        TensorName::Embedding | TensorName::Head => 3_221_225_637,
        TensorName::Layer(_, MoeGate | MoeUp) => 1_611_137_347,
        TensorName::Layer(_, MoeDown) => 1_611_399_491,
        TensorName::Layer(_, Key | Value) => 6_293_814,
        TensorName::Layer(_, AttentionOutput) => 37_847_359,
        TensorName::Layer(_, Query) => 37_761_334,
        TensorName::Layer(_, Router) => 196_770,
        TensorName::FinalNorm | TensorName::Layer(..) => 24_727,
    }
}

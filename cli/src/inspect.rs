//! `grokpipe inspect`: what a model's files hold, without reading weights.

use std::{fmt::Write as _, path::PathBuf};

use grokpipe_model::{Format, Model, ModelConfig, TensorName, WeightSource, checkpoint::TensorSummary};
use serde_json::{Value, json};

use crate::{
    config::ByteSize,
    error::CliError,
    paths,
    text::{Table, print},
};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder or file of the model
    #[arg(value_parser = paths::parser())]
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `inspect`.
///
/// # Errors
/// What is wrong with the model's files.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let model = Model::open(&args.path)?;
    let tensors = tensors(&model)?;
    let layers = layer_bytes(&model, model.config().num_hidden_layers);
    let text = if args.json {
        format!("{}\n", to_json(model.config(), &model.digest(), &tensors, &layers))
    } else {
        render(model.config(), &model.digest(), &tensors, &layers)
    };
    print(&text)
}

fn layer_bytes(source: &dyn WeightSource, layers: u32) -> Vec<u64> {
    (0..layers).map(|layer| source.stored_bytes(layer..layer + 1, false)).collect()
}

/// All tensors, layers in the order of their numbers.
fn tensors(model: &Model) -> Result<Vec<TensorSummary>, CliError> {
    let mut tensors = model.inspect()?;
    tensors.sort_by_key(|tensor| tensor.name);
    Ok(tensors)
}

/// Name of the format, and its scale groups where these are stored beside the numbers.
fn format_of(tensor: &TensorSummary) -> (&'static str, Option<usize>) {
    match tensor.format {
        Format::F32 => ("f32", None),
        Format::Int8 { groups } => ("int8", Some(groups)),
        Format::Blocks(kind) => (kind.name(), None),
    }
}

fn config_json(config: &ModelConfig) -> Value {
    json!({
        "name": config.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "embedding_multiplier": config.embedding_multiplier,
        "output_multiplier": config.output_multiplier,
        "attention_multiplier": config.attention_multiplier,
        "attention_logit_cap": config.attention_logit_cap,
        "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "scale_groups_row_parallel": config.scale_groups_row_parallel,
    })
}

fn to_json(config: &ModelConfig, digest: &str, tensors: &[TensorSummary], layers: &[u64]) -> Value {
    let tensor = |tensor: &TensorSummary| {
        let (format, scale_groups) = format_of(tensor);
        json!({
            "name": tensor.name.to_string(),
            "shape": tensor.shape,
            "format": format,
            "scale_groups": scale_groups,
            "bytes": tensor.bytes,
            "file": tensor.file,
        })
    };
    json!({
        "config": config_json(config),
        "digest": digest,
        "tensors": tensors.iter().map(tensor).collect::<Vec<_>>(),
        "layer_bytes": layers,
        "parameters": parameters(tensors),
        "bytes": tensors.iter().map(|t| t.bytes).sum::<u64>(),
    })
}

/// Numbers in the model; a head of its own is the embedding once more.
fn parameters(tensors: &[TensorSummary]) -> u64 {
    let counted = tensors.iter().filter(|tensor| tensor.name != TensorName::Head);
    counted.map(|tensor| tensor.shape.iter().product::<u64>()).sum()
}

/// For people: sizes, each kind of tensor once, and bytes of each run of equal layers.
fn render(config: &ModelConfig, digest: &str, tensors: &[TensorSummary], layers: &[u64]) -> String {
    let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
    let mut text = format!("{}: {} parameters, {}\n", config.name, parameters(tensors), ByteSize(bytes));
    let _ = writeln!(text, "digest {digest}\n");
    if let Value::Object(fields) = config_json(config) {
        for (name, value) in fields {
            let _ = writeln!(text, "  {name:<28}{value}");
        }
    }
    text.push('\n');
    let mut table = Table::new(&["tensor", "shape", "format", "bytes"]);
    for tensor in tensors {
        let (name, groups) = format_of(tensor);
        let format = groups.map_or_else(|| name.to_owned(), |groups| format!("{name} / {groups}"));
        let shape = format!("{:?}", tensor.shape);
        table.row(vec![tensor.name.to_string(), shape, format, ByteSize(tensor.bytes).to_string()]);
    }
    let _ = writeln!(text, "{table}");
    let mut start = 0;
    for run in layers.chunk_by(|a, b| a == b) {
        let _ = writeln!(text, "layers {start}..{}: {} each", start + run.len(), ByteSize(run[0]));
        start += run.len();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_golden_model_is_listed_in_full() {
        let shared = std::env::var_os("GROKPIPE_SHARED").map_or_else(
            || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
            std::path::PathBuf::from,
        );
        let path = shared.join("golden/a4");
        if !path.is_dir() {
            println!("skipped: {} is not there", path.display());
            return;
        }
        let model = Model::open(&path).unwrap();
        let config = model.config().clone();
        let tensors = tensors(&model).unwrap();
        assert_eq!(tensors.len(), 2 + 12 * 4);
        let layers = layer_bytes(&model, config.num_hidden_layers);
        let json = to_json(&config, "d", &tensors, &layers);
        assert_eq!(json["config"]["hidden_size"], 64);
        assert_eq!(json["tensors"][0]["shape"], json!([512, 64]));
        assert_eq!(json["layer_bytes"].as_array().unwrap().len(), 4);
        let text = render(&config, "d", &tensors, &layers);
        assert!(text.contains("layers 0..4") && text.contains("transformer/decoder_layer_3/router/w"), "{text}");
    }
}

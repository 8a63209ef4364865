//! `grokpipe inspect`: what a model's files hold, without reading weights.

use std::{
    fmt::Write as _,
    io::{self, Write},
    path::PathBuf,
};

use grokpipe_model::LayerTensor;
use grokpipe_model::{Format, Layout, MatrixSpec, Model, ModelConfig, TensorName, WeightSource};
use serde_json::{Value, json};

use crate::{
    config::ByteSize,
    error::{CliError, output},
    text::Table,
};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder or file of the model
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One tensor as it is stored.
#[derive(Debug, PartialEq)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    format: &'static str,
    scale_groups: Option<usize>,
    bytes: u64,
}

/// Runs `inspect`.
///
/// # Errors
/// What is wrong with the model's files.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let model = Model::open(&args.path)?;
    let tensors = tensors(&model, model.config())?;
    let layers = layer_bytes(&model, model.config().num_hidden_layers);
    let text = if args.json {
        format!("{}\n", to_json(model.config(), &model.digest(), &tensors, &layers))
    } else {
        render(model.config(), &model.digest(), &tensors, &layers)
    };
    io::stdout().write_all(text.as_bytes()).map_err(|error| output(&error))
}

fn layer_bytes(source: &dyn WeightSource, layers: u32) -> Vec<u64> {
    (0..layers).map(|layer| source.stored_bytes(layer..layer + 1, false)).collect()
}

fn tensors(source: &dyn WeightSource, config: &ModelConfig) -> Result<Vec<Tensor>, CliError> {
    let mut tensors = vec![matrix(source, TensorName::Embedding)?];
    for layer in 0..config.num_hidden_layers {
        for tensor in LayerTensor::ALL {
            let name = TensorName::Layer(layer, tensor);
            tensors.push(match tensor {
                LayerTensor::PreAttentionNorm
                | LayerTensor::PostAttentionNorm
                | LayerTensor::PreMoeNorm
                | LayerTensor::PostMoeNorm => vector(source, name)?,
                _ => matrix(source, name)?,
            });
        }
    }
    tensors.push(vector(source, TensorName::FinalNorm)?);
    Ok(tensors)
}

fn matrix(source: &dyn WeightSource, name: TensorName) -> Result<Tensor, CliError> {
    let opened = source.matrix(&name)?;
    Ok(of_spec(name, opened.spec()))
}

fn of_spec(name: TensorName, spec: &MatrixSpec) -> Tensor {
    let (format, scale_groups) = match spec.format {
        Format::F32 => ("f32", None),
        Format::Int8 { groups } => ("int8", Some(groups)),
    };
    let plain = match spec.layout {
        Layout::InOut => [spec.inputs, spec.outputs],
        Layout::OutIn => [spec.outputs, spec.inputs],
    };
    let mut shape = if spec.experts > 1 { vec![spec.experts] } else { Vec::new() };
    shape.extend(plain);
    Tensor { name: name.to_string(), shape, format, scale_groups, bytes: spec.weight_bytes() }
}

fn vector(source: &dyn WeightSource, name: TensorName) -> Result<Tensor, CliError> {
    let length = source.vector(&name)?.len();
    Ok(Tensor {
        name: name.to_string(),
        shape: vec![length],
        format: "f32",
        scale_groups: None,
        bytes: 4 * length as u64,
    })
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

fn to_json(config: &ModelConfig, digest: &str, tensors: &[Tensor], layers: &[u64]) -> Value {
    let tensor = |t: &Tensor| json!({"name": t.name, "shape": t.shape, "format": t.format, "scale_groups": t.scale_groups, "bytes": t.bytes});
    json!({
        "config": config_json(config),
        "digest": digest,
        "tensors": tensors.iter().map(tensor).collect::<Vec<_>>(),
        "layer_bytes": layers,
        "parameters": parameters(tensors),
        "bytes": tensors.iter().map(|t| t.bytes).sum::<u64>(),
    })
}

fn parameters(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|t| t.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

/// For people: sizes, each kind of tensor once, and bytes of each run of equal layers.
fn render(config: &ModelConfig, digest: &str, tensors: &[Tensor], layers: &[u64]) -> String {
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
        let format =
            tensor.scale_groups.map_or_else(|| tensor.format.to_owned(), |g| format!("{} / {g}", tensor.format));
        let shape = format!("{:?}", tensor.shape);
        table.row(vec![tensor.name.clone(), shape, format, ByteSize(tensor.bytes).to_string()]);
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
    fn shapes_are_written_as_they_are_stored() {
        let spec = |experts, format, layout| MatrixSpec {
            name: String::new(),
            experts,
            inputs: 4,
            outputs: 6,
            format,
            layout,
        };
        let stacked =
            of_spec(TensorName::Layer(3, LayerTensor::MoeDown), &spec(8, Format::Int8 { groups: 2 }, Layout::InOut));
        assert_eq!((stacked.shape, stacked.format, stacked.scale_groups), (vec![8, 4, 6], "int8", Some(2)));
        assert_eq!(stacked.name, "transformer/decoder_layer_3/moe/linear_1/w");
        let embedding = of_spec(TensorName::Embedding, &spec(1, Format::F32, Layout::OutIn));
        assert_eq!((embedding.shape, embedding.bytes), (vec![6, 4], 96));
    }

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
        let tensors = tensors(&model, &config).unwrap();
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

//! The Hugging Face copies: their names, their layout, their formats.

use super::*;
use crate::LayerTensor;

/// A tensor of xAI's tree as this family names it, and its expert.
fn name_of(family: &str, tensor: LayerTensor, expert: usize) -> String {
    let hpcai = family == "hpcai";
    let name = match tensor {
        LayerTensor::MoeGate => format!("{}.{expert}.linear.weight", if hpcai { "moe_block.experts" } else { "moe" }),
        LayerTensor::MoeUp => format!("{}.{expert}.linear_v.weight", if hpcai { "moe_block.experts" } else { "moe" }),
        LayerTensor::MoeDown => format!("{}.{expert}.linear_1.weight", if hpcai { "moe_block.experts" } else { "moe" }),
        LayerTensor::Query if hpcai => "attn.q_proj.weight".into(),
        LayerTensor::Key if hpcai => "attn.k_proj.weight".into(),
        LayerTensor::Value if hpcai => "attn.v_proj.weight".into(),
        LayerTensor::AttentionOutput if hpcai => "attn.o_proj.weight".into(),
        LayerTensor::Router if hpcai => "moe_block.gate.weight".into(),
        LayerTensor::PreAttentionNorm if hpcai => "pre_attn_norm.scale".into(),
        LayerTensor::PostAttentionNorm if hpcai => "post_attn_norm.scale".into(),
        LayerTensor::PreMoeNorm if hpcai => "pre_moe_norm.scale".into(),
        LayerTensor::PostMoeNorm if hpcai => "post_moe_norm.scale".into(),
        LayerTensor::Query => "multi_head_attention.query.weight".into(),
        LayerTensor::Key => "multi_head_attention.key.weight".into(),
        LayerTensor::Value => "multi_head_attention.value.weight".into(),
        LayerTensor::AttentionOutput => "multi_head_attention.linear.weight".into(),
        LayerTensor::Router => "router.weight".into(),
        LayerTensor::PreAttentionNorm => "rms_norm.weight".into(),
        LayerTensor::PostAttentionNorm => "rms_norm_1.weight".into(),
        LayerTensor::PreMoeNorm => "rms_norm_2.weight".into(),
        LayerTensor::PostMoeNorm => "rms_norm_3.weight".into(),
    };
    format!("{}.0.{name}", if hpcai { "model.layers" } else { "transformer.decoder_layer" })
}

/// Name, shape `[outputs, inputs]`, and the number that all of it is.
fn tensors(family: &str) -> Vec<(String, Vec<usize>, f32)> {
    let config = tiny::config();
    let [embedding, norm] = match family {
        "hpcai" => ["model.embed_tokens.weight", "model.norm.scale"],
        _ => ["transformer.in_out_embed.weight", "transformer.rms_norm.weight"],
    };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut all = vec![
        (embedding.to_owned(), vec![vocab, hidden], 0.5),
        ("lm_head.weight".to_owned(), vec![vocab, hidden], 0.5),
        (norm.to_owned(), vec![hidden], 1.0),
    ];
    for (index, tensor) in LayerTensor::ALL.into_iter().enumerate() {
        let value = 2.0 + index as f32;
        match TensorName::Layer(0, tensor).shape(&config) {
            TensorShape::Vector(length) => all.push((name_of(family, tensor, 0), vec![length], value)),
            TensorShape::Matrix { experts, inputs, outputs, .. } => {
                for expert in 0..experts.unwrap_or(1) {
                    all.push((name_of(family, tensor, expert), vec![outputs, inputs], value + 16.0 * expert as f32));
                }
            }
        }
    }
    all
}

/// As one file in bf16.
fn file(tensors: &[(String, Vec<usize>, f32)]) -> Vec<u8> {
    use ::safetensors::{Dtype, tensor::TensorView};
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, value)| {
            let half = ((value.to_bits() >> 16) as u16).to_le_bytes();
            half.repeat(shape.iter().product())
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("bytes fit the shape"))
    });
    ::safetensors::serialize(views, None).unwrap()
}

fn folder_of(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "grok-1", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    files.iter().for_each(|(name, bytes)| std::fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

/// All numbers of a matrix, experts in order.
fn numbers(model: &Model, name: &TensorName) -> Vec<f32> {
    let matrix = model.matrix(name).unwrap();
    assert_eq!((matrix.spec().format, matrix.spec().layout), (Format::Blocks(BlockType::Bf16), Layout::OutIn));
    let mut bytes = vec![0; matrix.spec().weight_bytes() as usize];
    matrix.read(0, &mut bytes).unwrap();
    let mut values = vec![0.0; bytes.len() / 2];
    BlockType::Bf16.dequantize(&bytes, &mut values);
    values
}

/// A folder with the copy of this family.
pub(crate) fn copy(family: &str) -> tempfile::TempDir {
    folder_of(&[("model.safetensors", &file(&tensors(family)))])
}

#[test]
fn both_families_of_names_are_read_in_one_file_or_by_index() {
    for family in ["hpcai", "keyfan"] {
        let all = tensors(family);
        let (one, two) = all.split_at(all.len() / 2);
        let place =
            |name: &str| if one.iter().any(|(other, ..)| other == name) { "a.safetensors" } else { "b.safetensors" };
        let map: serde_json::Map<_, _> = all.iter().map(|(name, ..)| (name.clone(), place(name).into())).collect();
        let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
        let folders = [
            folder_of(&[("model.safetensors", &file(&all))]),
            folder_of(&[
                ("a.safetensors", &file(one)),
                ("b.safetensors", &file(two)),
                ("model.safetensors.index.json", index.as_bytes()),
            ]),
        ];
        for folder in folders {
            let model = Model::open(folder.path()).unwrap();
            for (index, tensor) in LayerTensor::ALL.into_iter().enumerate() {
                let name = TensorName::Layer(0, tensor);
                let value = 2.0 + index as f32;
                match name.shape(model.config()) {
                    TensorShape::Vector(length) => assert_eq!(model.vector(&name).unwrap(), vec![value; length]),
                    TensorShape::Matrix { experts, inputs, outputs, .. } => {
                        let one = inputs * outputs;
                        let expected: Vec<f32> = (0..experts.unwrap_or(1))
                            .flat_map(|expert| vec![value + 16.0 * expert as f32; one])
                            .collect();
                        assert_eq!(numbers(&model, &name), expected, "{family} {name}");
                    }
                }
            }
            assert_eq!(model.vector(&TensorName::FinalNorm).unwrap(), [1.0; 8]);
            assert_eq!(model.embedding_rows(&[3]).unwrap(), [0.5; 8]);
            assert_eq!(numbers(&model, &TensorName::Head), [0.5; 128]);
        }
    }
}

#[test]
fn a_missing_expert_is_named() {
    let all = tensors("hpcai");
    let gone = "model.layers.0.moe_block.experts.1.linear.weight";
    let without: Vec<_> = all.iter().filter(|(name, ..)| name != gone).cloned().collect();
    let folder = folder_of(&[("model.safetensors", &file(&without))]);
    let message = Model::open(folder.path()).unwrap_err().to_string();
    assert_refused("an expert is missing", &message, gone);
}

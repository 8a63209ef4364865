//! The names that other programs gave to Grok-1's tensors: GGUF files and the Hugging Face copies.
//!
//! In all of them a matrix is stored output by output, inputs fastest, and the experts may be apart. What a file really holds is
//! found out by whoever reads it.

use crate::{LayerTensor, TensorName};

/// Who named the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// llama.cpp's names, one tensor for all experts, or one an expert as before April 2024.
    Gguf,
    /// `hpcai-tech/grok-1`.
    Hpcai,
    /// `keyfan/grok-1-hf`.
    Keyfan,
}

/// Names of one tensor.
pub(super) struct Names {
    /// Any one of these holds all of it.
    pub(super) whole: Vec<String>,
    /// Or one of these an expert.
    pub(super) expert: Option<Box<dyn Fn(usize) -> String>>,
}

impl Family {
    /// The family whose embedding is among these names.
    pub(super) fn of<'a>(mut names: impl Iterator<Item = &'a String>) -> Option<Self> {
        names.find_map(|name| match name.as_str() {
            "token_embd.weight" => Some(Self::Gguf),
            "model.embed_tokens.weight" => Some(Self::Hpcai),
            "transformer.in_out_embed.weight" => Some(Self::Keyfan),
            _ => None,
        })
    }

    /// What this tensor is called.
    pub(super) fn names(self, name: &TensorName) -> Names {
        let (layer, tensor) = match name {
            TensorName::Embedding => return whole([self.pick(EMBEDDING)]),
            TensorName::Head => return whole([self.pick(HEAD)]),
            TensorName::FinalNorm => return whole([self.pick(FINAL_NORM)]),
            TensorName::Layer(layer, tensor) => (*layer, *tensor),
        };
        let prefix = match self {
            Self::Gguf => format!("blk.{layer}."),
            Self::Hpcai => format!("model.layers.{layer}."),
            Self::Keyfan => format!("transformer.decoder_layer.{layer}."),
        };
        if let Some(branch) = expert_branch(tensor) {
            let branch = branch[self as usize];
            return match self {
                Self::Gguf => Names {
                    whole: vec![format!("{prefix}{branch}_exps.weight")],
                    expert: Some(Box::new(move |expert| format!("{prefix}{branch}.{expert}.weight"))),
                },
                Self::Hpcai => apart(format!("{prefix}moe_block.experts."), branch),
                Self::Keyfan => apart(format!("{prefix}moe."), branch),
            };
        }
        let mut names = whole([format!("{prefix}{}", own(tensor)[self as usize])]);
        if self == Self::Gguf && tensor == LayerTensor::PostMoeNorm {
            // The name since August 2025.
            names.whole.push(format!("{prefix}post_ffw_norm.weight"));
        }
        names
    }

    fn pick(self, names: [&str; 3]) -> String {
        names[self as usize].to_owned()
    }
}

fn whole(names: [String; 1]) -> Names {
    Names { whole: names.into(), expert: None }
}

fn apart(prefix: String, branch: &'static str) -> Names {
    Names { whole: Vec::new(), expert: Some(Box::new(move |expert| format!("{prefix}{expert}.{branch}.weight"))) }
}

const EMBEDDING: [&str; 3] = ["token_embd.weight", "model.embed_tokens.weight", "transformer.in_out_embed.weight"];
const HEAD: [&str; 3] = ["output.weight", "lm_head.weight", "lm_head.weight"];
const FINAL_NORM: [&str; 3] = ["output_norm.weight", "model.norm.scale", "transformer.rms_norm.weight"];

/// Names of an expert's three matrices, by family.
fn expert_branch(tensor: LayerTensor) -> Option<[&'static str; 3]> {
    match tensor {
        LayerTensor::MoeGate => Some(["ffn_gate", "linear", "linear"]),
        LayerTensor::MoeUp => Some(["ffn_up", "linear_v", "linear_v"]),
        LayerTensor::MoeDown => Some(["ffn_down", "linear_1", "linear_1"]),
        _ => None,
    }
}

/// Names of a layer's other tensors, by family.
fn own(tensor: LayerTensor) -> [&'static str; 3] {
    match tensor {
        LayerTensor::Query => ["attn_q.weight", "attn.q_proj.weight", "multi_head_attention.query.weight"],
        LayerTensor::Key => ["attn_k.weight", "attn.k_proj.weight", "multi_head_attention.key.weight"],
        LayerTensor::Value => ["attn_v.weight", "attn.v_proj.weight", "multi_head_attention.value.weight"],
        LayerTensor::AttentionOutput => {
            ["attn_output.weight", "attn.o_proj.weight", "multi_head_attention.linear.weight"]
        }
        LayerTensor::Router => ["ffn_gate_inp.weight", "moe_block.gate.weight", "router.weight"],
        LayerTensor::PreAttentionNorm => ["attn_norm.weight", "pre_attn_norm.scale", "rms_norm.weight"],
        LayerTensor::PostAttentionNorm => ["attn_output_norm.weight", "post_attn_norm.scale", "rms_norm_1.weight"],
        LayerTensor::PreMoeNorm => ["ffn_norm.weight", "pre_moe_norm.scale", "rms_norm_2.weight"],
        LayerTensor::PostMoeNorm => ["layer_output_norm.weight", "post_moe_norm.scale", "rms_norm_3.weight"],
        LayerTensor::MoeGate | LayerTensor::MoeUp | LayerTensor::MoeDown => [""; 3],
    }
}

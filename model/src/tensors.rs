//! The names of Grok-1's tensors, their shapes, and their order in the published checkpoint.

use std::fmt;

use crate::{Layout, ModelConfig};

/// One tensor of the model. `Display` writes the path in xAI's parameter tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorName {
    /// Token embedding, `[vocab_size, hidden_size]`; f32 in xAI's files.
    Embedding,
    /// The head, of the same shape: the embedding again, but for files that store it a second time, perhaps in another format.
    Head,
    /// Norm before the head, f32 `[hidden_size]`.
    FinalNorm,
    /// A tensor of one layer.
    Layer(u32, LayerTensor),
}

/// A tensor within a layer, in the order of the published files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerTensor {
    /// `moe/linear/w`: the branch that goes through GELU, `[experts, hidden_size, intermediate_size]`.
    MoeGate,
    /// `moe/linear_1/w`: back to the residual stream, `[experts, intermediate_size, hidden_size]`; row-parallel.
    MoeDown,
    /// `moe/linear_v/w`: the branch without GELU, `[experts, hidden_size, intermediate_size]`.
    MoeUp,
    /// `multi_head_attention/key/w`, `[hidden_size, kv_heads * head_dim]`.
    Key,
    /// `multi_head_attention/linear/w`, `[heads * head_dim, hidden_size]`; row-parallel.
    AttentionOutput,
    /// `multi_head_attention/query/w`, `[hidden_size, heads * head_dim]`.
    Query,
    /// `multi_head_attention/value/w`, `[hidden_size, kv_heads * head_dim]`.
    Value,
    /// `rms_norm/scale`: before attention.
    PreAttentionNorm,
    /// `rms_norm_1/scale`: after attention, before the residual addition.
    PostAttentionNorm,
    /// `rms_norm_2/scale`: before the experts.
    PreMoeNorm,
    /// `rms_norm_3/scale`: after the experts, before the residual addition.
    PostMoeNorm,
    /// `router/w`, f32 `[hidden_size, experts]`.
    Router,
}

impl LayerTensor {
    /// All twelve, in the order of the published files.
    pub const ALL: [Self; 12] = [
        Self::MoeGate,
        Self::MoeDown,
        Self::MoeUp,
        Self::Key,
        Self::AttentionOutput,
        Self::Query,
        Self::Value,
        Self::PreAttentionNorm,
        Self::PostAttentionNorm,
        Self::PreMoeNorm,
        Self::PostMoeNorm,
        Self::Router,
    ];

    /// Whether it is a matrix, or one an expert; else it is a norm's scale.
    pub fn is_matrix(self) -> bool {
        !matches!(self, Self::PreAttentionNorm | Self::PostAttentionNorm | Self::PreMoeNorm | Self::PostMoeNorm)
    }

    /// Path below `transformer/decoder_layer_L/`.
    pub fn path(self) -> &'static str {
        match self {
            Self::MoeGate => "moe/linear/w",
            Self::MoeDown => "moe/linear_1/w",
            Self::MoeUp => "moe/linear_v/w",
            Self::Key => "multi_head_attention/key/w",
            Self::AttentionOutput => "multi_head_attention/linear/w",
            Self::Query => "multi_head_attention/query/w",
            Self::Value => "multi_head_attention/value/w",
            Self::PreAttentionNorm => "rms_norm/scale",
            Self::PostAttentionNorm => "rms_norm_1/scale",
            Self::PreMoeNorm => "rms_norm_2/scale",
            Self::PostMoeNorm => "rms_norm_3/scale",
            Self::Router => "router/w",
        }
    }
}

impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("language_model/in_out_embed/embeddings"),
            Self::Head => f.write_str("language_model/head"),
            Self::FinalNorm => f.write_str("language_model/rms_norm/scale"),
            Self::Layer(layer, tensor) => write!(f, "transformer/decoder_layer_{layer}/{}", tensor.path()),
        }
    }
}

/// What a tensor must look like for a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorShape {
    /// A norm's scale: f32, this many.
    Vector(usize),
    /// A matrix, or one an expert.
    Matrix {
        /// Stacked matrices; 1 with no dimension of its own.
        experts: Option<usize>,
        /// Length of the input vector.
        inputs: usize,
        /// Length of the output vector.
        outputs: usize,
        /// Which index runs fastest.
        layout: Layout,
        /// Scale groups in the published format; `None` for the two that stay in f32.
        groups: Option<usize>,
    },
}

impl TensorShape {
    /// Shape of the stored array.
    pub fn dimensions(&self) -> Vec<u64> {
        match *self {
            Self::Vector(length) => vec![length as u64],
            Self::Matrix { experts, inputs, outputs, layout, .. } => {
                let (first, last) = if layout == Layout::InOut { (inputs, outputs) } else { (outputs, inputs) };
                experts.into_iter().chain([first, last]).map(|size| size as u64).collect()
            }
        }
    }

    /// Shape of the scales beside it: groups in the place of the inputs.
    pub fn scale_dimensions(&self) -> Option<Vec<u64>> {
        match *self {
            Self::Matrix { experts, outputs, groups: Some(groups), .. } => {
                Some(experts.into_iter().chain([groups, outputs]).map(|size| size as u64).collect())
            }
            _ => None,
        }
    }
}

impl TensorName {
    /// Every tensor of a model, in the order of the published files: the tree's leaves with sorted keys, so that layers stand in
    /// the order of their decimal strings (0, 1, 10, 11, …, 2, 20, …) and not of their numbers. Without the head, which is none of them.
    pub fn in_file_order(layers: u32) -> Vec<Self> {
        let mut order: Vec<u32> = (0..layers).collect();
        order.sort_by_key(u32::to_string);
        let tensors = order.into_iter().flat_map(|layer| LayerTensor::ALL.map(|tensor| Self::Layer(layer, tensor)));
        [Self::Embedding, Self::FinalNorm].into_iter().chain(tensors).collect()
    }

    /// What this tensor must look like.
    pub fn shape(&self, config: &ModelConfig) -> TensorShape {
        let d = config.hidden_size;
        let (q, kv) = (config.num_attention_heads * config.head_dim, config.kv_width());
        let matrix = |experts, inputs, outputs, groups| TensorShape::Matrix {
            experts,
            inputs,
            outputs,
            layout: Layout::InOut,
            groups: Some(groups),
        };
        let (experts, f, row_parallel) =
            (Some(config.num_experts), config.intermediate_size, config.scale_groups_row_parallel);
        match self {
            Self::Embedding | Self::Head => TensorShape::Matrix {
                experts: None,
                inputs: d,
                outputs: config.vocab_size,
                layout: Layout::OutIn,
                groups: None,
            },
            Self::FinalNorm => TensorShape::Vector(d),
            Self::Layer(_, tensor) => match tensor {
                LayerTensor::MoeGate | LayerTensor::MoeUp => matrix(experts, d, f, 1),
                LayerTensor::MoeDown => matrix(experts, f, d, row_parallel),
                LayerTensor::Key | LayerTensor::Value => matrix(None, d, kv, 1),
                LayerTensor::AttentionOutput => matrix(None, q, d, row_parallel),
                LayerTensor::Query => matrix(None, d, q, 1),
                LayerTensor::Router => TensorShape::Matrix {
                    experts: None,
                    inputs: d,
                    outputs: config.num_experts,
                    layout: Layout::InOut,
                    groups: None,
                },
                LayerTensor::PreAttentionNorm
                | LayerTensor::PostAttentionNorm
                | LayerTensor::PreMoeNorm
                | LayerTensor::PostMoeNorm => TensorShape::Vector(d),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_stand_in_the_order_of_their_decimal_strings() {
        let names = TensorName::in_file_order(64);
        assert_eq!(names.len(), 770);
        let layers: Vec<u32> = names[2..]
            .chunks(12)
            .map(|chunk| match chunk[0] {
                TensorName::Layer(layer, _) => layer,
                _ => panic!("a layer's tensor"),
            })
            .collect();
        assert_eq!(&layers[..5], [0, 1, 10, 11, 12]);
        assert_eq!(&layers[11..14], [19, 2, 20]);
        assert_eq!(&layers[60..], [63, 7, 8, 9]);
    }

    #[test]
    fn the_published_shapes_are_those_of_grok_1() {
        let grok = ModelConfig::grok_1();
        let shape = |tensor| TensorName::Layer(3, tensor).shape(&grok);
        assert_eq!(shape(LayerTensor::MoeDown).dimensions(), [8, 32_768, 6144]);
        assert_eq!(shape(LayerTensor::MoeDown).scale_dimensions().unwrap(), [8, 8, 6144]);
        assert_eq!(shape(LayerTensor::AttentionOutput).scale_dimensions().unwrap(), [8, 6144]);
        assert_eq!(shape(LayerTensor::Key).dimensions(), [6144, 1024]);
        assert_eq!(shape(LayerTensor::Router).scale_dimensions(), None);
        assert_eq!(TensorName::Embedding.shape(&grok).dimensions(), [131_072, 6144]);
    }
}

//! Weights from a seed: a model of any size without a file, for benchmarks and for the check at join.
//!
//! Every number is a function of (seed, tensor, index), so any piece can be read alone, in any order, on any machine, and is the
//! same. Sizes are such that a random network behaves: norms of 1, products of about unit variance, router logits of about 1.

use std::ops::Range;

use grokpipe_model::{
    BlockType, Format, LayerTensor, Layout, MatrixSource, MatrixSpec, ModelConfig, ModelError, TensorName, WeightSource,
};
use half::{bf16, f16};

/// Standard deviation of a uniform signed byte.
const BYTE_DEVIATION: f32 = 73.9;

/// Generated weights of a configuration.
#[derive(Clone, Debug)]
pub struct SyntheticWeights {
    config: ModelConfig,
    seed: u64,
    blocks: Option<BlockType>,
}

impl SyntheticWeights {
    /// Weights of this shape from this seed.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self { config, seed, blocks: None }
    }

    /// As [`SyntheticWeights::new`], with the matrices of the layers in blocks. The router stays f32.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] when a matrix has no rows of whole blocks.
    pub fn in_blocks(config: ModelConfig, seed: u64, kind: BlockType) -> Result<Self, ModelError> {
        let weights = Self { config, seed, blocks: Some(kind) };
        for tensor in LayerTensor::ALL {
            let name = TensorName::Layer(0, tensor);
            if let Some(spec) = weights.spec(&name)
                && spec.format.row_bytes(spec.inputs).is_none()
            {
                let expected = format!("rows of whole blocks of {} for {}", kind.weights(), kind.name());
                return Err(weights.refuse(&name, &expected, format!("{} inputs", spec.inputs)));
            }
        }
        Ok(weights)
    }

    /// The shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn spec(&self, name: &TensorName) -> Option<MatrixSpec> {
        let c = &self.config;
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let (heads, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let int8 = Format::Int8 { groups: 1 };
        let grouped = Format::Int8 { groups: c.scale_groups_row_parallel };
        let (experts, inputs, outputs, format, layout) = match name {
            TensorName::Embedding | TensorName::Head => (1, hidden, c.vocab_size, Format::F32, Layout::OutIn),
            TensorName::FinalNorm => return None,
            TensorName::Layer(_, tensor) => match tensor {
                LayerTensor::MoeGate | LayerTensor::MoeUp => (c.num_experts, hidden, ffn, int8, Layout::InOut),
                LayerTensor::MoeDown => (c.num_experts, ffn, hidden, grouped, Layout::InOut),
                LayerTensor::Key | LayerTensor::Value => (1, hidden, kv, int8, Layout::InOut),
                LayerTensor::Query => (1, hidden, heads, int8, Layout::InOut),
                LayerTensor::AttentionOutput => (1, heads, hidden, grouped, Layout::InOut),
                LayerTensor::Router => (1, hidden, c.num_experts, Format::F32, Layout::InOut),
                LayerTensor::PreAttentionNorm
                | LayerTensor::PostAttentionNorm
                | LayerTensor::PreMoeNorm
                | LayerTensor::PostMoeNorm => return None,
            },
        };
        let (format, layout) = match (format, self.blocks) {
            (Format::Int8 { .. }, Some(kind)) => (Format::Blocks(kind), Layout::OutIn),
            _ => (format, layout),
        };
        Some(MatrixSpec { name: name.to_string(), experts, inputs, outputs, format, layout })
    }

    /// A number that tells tensors apart.
    fn stream(&self, name: &TensorName) -> u64 {
        let tensor = match name {
            TensorName::Embedding | TensorName::Head => 1,
            TensorName::FinalNorm => 2,
            TensorName::Layer(layer, tensor) => 16 + u64::from(*layer) * 16 + *tensor as u64,
        };
        mix(self.seed ^ mix(tensor))
    }

    fn refuse(&self, place: &TensorName, expected: &str, found: String) -> ModelError {
        let place = format!("{place} of synthetic weights {:?}", self.config.name);
        ModelError::Invalid { place, expected: expected.to_owned(), found }
    }
}

impl WeightSource for SyntheticWeights {
    fn matrix(&self, name: &TensorName) -> Result<Box<dyn MatrixSource>, ModelError> {
        let spec = self.spec(name).ok_or_else(|| self.refuse(name, "a matrix", "a vector".into()))?;
        Ok(Box::new(SyntheticMatrix::new(self.stream(name), spec)))
    }

    fn vector(&self, name: &TensorName) -> Result<Vec<f32>, ModelError> {
        match self.spec(name) {
            None => Ok(vec![1.0; self.config.hidden_size]),
            Some(_) => Err(self.refuse(name, "a vector", "a matrix".into())),
        }
    }

    fn embedding_rows(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let table = self.matrix(&TensorName::Embedding)?;
        let row_bytes = self.config.hidden_size * 4;
        let mut bytes = vec![0; row_bytes];
        let mut rows = Vec::with_capacity(ids.len() * self.config.hidden_size);
        for &id in ids {
            if id as usize >= self.config.vocab_size {
                let expected = format!("ids less than {}", self.config.vocab_size);
                return Err(self.refuse(&TensorName::Embedding, &expected, id.to_string()));
            }
            table.read(u64::from(id) * row_bytes as u64, &mut bytes)?;
            rows.extend(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
        Ok(rows)
    }

    fn stored_bytes(&self, layers: Range<u32>, with_head: bool) -> u64 {
        let hidden = 4 * self.config.hidden_size as u64;
        let bytes = |name: &TensorName| self.spec(name).map_or(hidden, |spec| spec.weight_bytes());
        let layer: u64 = LayerTensor::ALL.iter().map(|&tensor| bytes(&TensorName::Layer(0, tensor))).sum();
        let head = if with_head { bytes(&TensorName::Embedding) + hidden } else { 0 };
        layer * u64::from(layers.end.saturating_sub(layers.start)) + head
    }
}

/// One generated matrix.
pub(crate) struct SyntheticMatrix {
    stream: u64,
    spec: MatrixSpec,
    /// What blocks are multiplied by, for products of about unit variance.
    block_scale: f32,
}

impl SyntheticMatrix {
    /// The matrix of this shape from this number.
    pub(crate) fn new(stream: u64, spec: MatrixSpec) -> Self {
        let wanted = 1.0 / (spec.inputs as f32).sqrt();
        let block_scale = if let Format::Blocks(kind) = spec.format { wanted / deviation(kind) } else { 1.0 };
        Self { stream, spec, block_scale }
    }

    /// Eight stored bytes: eight int8, or two f32.
    #[inline(always)]
    fn word(&self, index: u64, deviation: f32) -> [u8; 8] {
        let bits = mix(self.stream.wrapping_add(index));
        match self.spec.format {
            Format::Int8 { .. } | Format::Blocks(_) => bits.to_le_bytes(),
            Format::F32 => {
                let [low, high] = [bits as u32, (bits >> 32) as u32].map(|bits| uniform(bits) * deviation);
                let (low, high) = (low.to_le_bytes(), high.to_le_bytes());
                [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
            }
        }
    }

    /// Blocks from the byte `offset` on.
    fn read_blocks(&self, kind: BlockType, offset: u64, out: &mut [u8]) {
        let size = kind.bytes();
        let (mut index, mut skip) = (offset / size as u64, (offset % size as u64) as usize);
        let mut block = vec![0; size];
        let mut rest = out;
        while !rest.is_empty() {
            fill_block(kind, self.stream, index, self.block_scale, &mut block);
            let (now, later) = rest.split_at_mut((size - skip).min(rest.len()));
            now.copy_from_slice(&block[skip..skip + now.len()]);
            (index, skip, rest) = (index + 1, 0, later);
        }
    }
}

/// Where the halves of a block stand; the second, where there is one, is so many times the first that the mean is 0.
fn halves(kind: BlockType) -> (usize, Option<(usize, f32)>) {
    match kind {
        BlockType::F16 | BlockType::Bf16 | BlockType::Q8_0 | BlockType::Q4_0 | BlockType::Q5_0 => (0, None),
        BlockType::Iq4Nl | BlockType::Iq4Xs => (0, None),
        BlockType::Q4_1 => (0, Some((2, -7.5))),
        BlockType::Q5_1 => (0, Some((2, -15.5))),
        BlockType::Q4K => (0, Some((2, 7.5))),
        BlockType::Q5K => (0, Some((2, 15.5))),
        BlockType::Q2K => (80, Some((82, 1.5))),
        BlockType::Q3K => (108, None),
        BlockType::Q6K => (208, None),
    }
}

/// Random bytes, but for the halves among them, which are near `scale`.
pub(crate) fn fill_block(kind: BlockType, stream: u64, index: u64, scale: f32, block: &mut [u8]) {
    let words = kind.bytes().div_ceil(8) as u64 + 1;
    let bits = |i: u64| mix(stream.wrapping_add(index * words + i));
    // Up to a quarter larger or smaller, so that a scale in the wrong place shows.
    let d = scale * (1.0 + 0.25 / 1.733 * uniform(bits(words - 1) as u32));
    match kind {
        BlockType::F16 | BlockType::Bf16 => {
            let value = scale * uniform((bits(0) >> 8) as u32);
            let number = if kind == BlockType::F16 {
                f16::from_f32(value).to_le_bytes()
            } else {
                bf16::from_f32(value).to_le_bytes()
            };
            block.copy_from_slice(&number);
        }
        _ => {
            for (i, word) in block.chunks_mut(8).enumerate() {
                word.copy_from_slice(&bits(i as u64).to_le_bytes()[..word.len()]);
            }
            let (at, second) = halves(kind);
            block[at..at + 2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
            if let Some((at, factor)) = second {
                block[at..at + 2].copy_from_slice(&f16::from_f32(factor * d).to_le_bytes());
            }
        }
    }
}

/// Standard deviation of the weights of generated blocks of scale 1.
fn deviation(kind: BlockType) -> f32 {
    const BLOCKS: u64 = 64;
    let (mut block, mut numbers) = (vec![0; kind.bytes()], vec![0.0; kind.weights()]);
    let mut squares = 0.0;
    for index in 0..BLOCKS {
        fill_block(kind, 1, index, 1.0, &mut block);
        kind.dequantize(&block, &mut numbers);
        squares += numbers.iter().map(|value| value * value).sum::<f32>();
    }
    (squares / (BLOCKS as usize * numbers.len()) as f32).sqrt()
}

impl MatrixSource for SyntheticMatrix {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        if let Format::Blocks(kind) = self.spec.format {
            self.read_blocks(kind, offset, out);
            return Ok(());
        }
        // The embedding is multiplied by sqrt(hidden_size) after it is gathered: this gives rows of unit variance then, and the
        // router logits of unit variance.
        let deviation = 1.0 / (self.spec.inputs as f32).sqrt();
        let skip = (offset % 8) as usize;
        let mut index = offset / 8;
        let lead = if skip == 0 { 0 } else { (8 - skip).min(out.len()) };
        let (head, rest) = out.split_at_mut(lead);
        if lead > 0 {
            head.copy_from_slice(&self.word(index, deviation)[skip..skip + lead]);
            index += 1;
        }
        let (words, tail) = rest.as_chunks_mut::<8>();
        for word in words {
            *word = self.word(index, deviation);
            index += 1;
        }
        let length = tail.len();
        tail.copy_from_slice(&self.word(index, deviation)[..length]);
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        let size = 1.0 / (BYTE_DEVIATION * (self.spec.inputs as f32).sqrt());
        // Up to a quarter larger or smaller, so that a scale in the wrong place shows.
        let scale = |i: usize| size * (1.0 + 0.25 / 1.733 * uniform(mix(!self.stream ^ i as u64) as u32));
        Ok((0..self.spec.scale_count()).map(scale).collect())
    }
}

/// Uniform with mean 0 and variance 1.
#[inline(always)]
fn uniform(bits: u32) -> f32 {
    (bits as i32 >> 8) as f32 * (1.732_050_8 / (1 << 23) as f32)
}

/// SplitMix64's output function: a bijection of 64 bits that scatters neighbours.
#[inline(always)]
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_piece_can_be_read_alone() {
        let weights = SyntheticWeights::new(ModelConfig::grok_1(), 5);
        for name in [TensorName::Layer(3, LayerTensor::Key), TensorName::Layer(3, LayerTensor::Router)] {
            let matrix = weights.matrix(&name).unwrap();
            let mut whole = vec![0; 4096];
            matrix.read(8000, &mut whole).unwrap();
            for (start, length) in [(0, 1), (1, 6), (3, 5), (7, 100), (8, 8), (13, 3), (4000, 96)] {
                let mut part = vec![0; length];
                matrix.read(8000 + start as u64, &mut part).unwrap();
                assert_eq!(part, whole[start..start + length], "{name} {start} {length}");
            }
        }
    }

    #[test]
    fn blocks_of_every_type_are_read_in_any_piece_and_give_unit_variance() {
        for kind in BlockType::all() {
            let weights = SyntheticWeights::in_blocks(ModelConfig::grok_1(), 5, kind).unwrap();
            let matrix = weights.matrix(&TensorName::Layer(3, LayerTensor::MoeDown)).unwrap();
            let (inputs, row) = (matrix.spec().inputs, matrix.spec().format.row_bytes(matrix.spec().inputs).unwrap());
            let mut whole = vec![0; 2 * row];
            matrix.read(row as u64, &mut whole).unwrap();
            for (start, length) in [(0, 1), (1, 6), (3, 500), (row - 1, 2), (row, 211)] {
                let mut part = vec![0; length];
                matrix.read((row + start) as u64, &mut part).unwrap();
                assert_eq!(part, whole[start..start + length], "{kind:?} {start} {length}");
            }
            let mut numbers = vec![0.0; inputs];
            kind.dequantize(&whole[..row], &mut numbers);
            let (sum, squares) = numbers.iter().fold((0.0, 0.0), |(s, q), &x| (s + f64::from(x), q + f64::from(x * x)));
            assert!((0.7..1.4).contains(&squares), "{kind:?}: {squares}");
            assert!((sum / inputs as f64).powi(2) < 0.02 * squares / inputs as f64, "{kind:?}: mean {sum}");
        }
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_refused() {
        let config = ModelConfig { hidden_size: 96, ..ModelConfig::grok_1() };
        assert!(SyntheticWeights::in_blocks(config.clone(), 1, BlockType::Q8_0).is_ok());
        let error = SyntheticWeights::in_blocks(config, 1, BlockType::Q4K).unwrap_err().to_string();
        assert!(error.contains("256") && error.contains("96"), "{error}");
    }

    #[test]
    fn tensors_and_seeds_differ() {
        let read = |seed, layer, tensor| {
            let weights = SyntheticWeights::new(ModelConfig::grok_1(), seed);
            let mut out = vec![0; 64];
            weights.matrix(&TensorName::Layer(layer, tensor)).unwrap().read(0, &mut out).unwrap();
            out
        };
        let one = read(1, 0, LayerTensor::Key);
        assert_eq!(one, read(1, 0, LayerTensor::Key));
        assert_ne!(one, read(2, 0, LayerTensor::Key));
        assert_ne!(one, read(1, 1, LayerTensor::Key));
        assert_ne!(one, read(1, 0, LayerTensor::Value));
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_refused() {
        let weights = SyntheticWeights::new(ModelConfig::grok_1(), 1);
        assert_eq!(weights.embedding_rows(&[5]).unwrap().len(), 6144);
        assert!(weights.embedding_rows(&[131_072]).unwrap_err().to_string().contains("131072"));
    }
}

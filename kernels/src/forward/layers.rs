//! Weights, buffers and the pass itself, without the backend that owns their memory.

use std::{borrow::Cow, ops::Range};

use grokpipe_model::{
    LayerTensor, MatrixSource, ModelConfig, ModelError, TensorName, WeightSource,
    contents::{self, Part, PartSum, Sum, Summed},
};

use super::{StageOptions, Trace, validate};
use crate::{AttentionParams, Backend, Batch, KV_BLOCK_TOKENS, KernelError, StepInput, StepOutput};

/// One layer's weights.
struct Layer<B: Backend> {
    pre_attention_norm: B::Vector,
    query: B::Matrix,
    key: B::Matrix,
    value: B::Matrix,
    attention_output: B::Matrix,
    post_attention_norm: B::Vector,
    pre_moe_norm: B::Vector,
    router: B::Matrix,
    gate: B::Matrix,
    up: B::Matrix,
    down: B::Matrix,
    post_moe_norm: B::Vector,
}

/// The head, and room for what it computes.
struct Head<B: Backend> {
    norm: B::Vector,
    embedding: B::Matrix,
    /// `[logit_rows, hidden_size]`.
    picked: B::Activations,
    /// `[logit_rows, hidden_size]`.
    normed: B::Activations,
    /// `[logit_rows, vocab_size]`.
    logits: B::Activations,
}

/// Room for one step.
struct Buffers<B: Backend> {
    /// Residual stream.
    residual: B::Activations,
    /// Its norm, input of a block.
    normed: B::Activations,
    /// Output of a block before its norm.
    block: B::Activations,
    q: B::Activations,
    k: B::Activations,
    v: B::Activations,
    /// Heads of attention, concatenated.
    heads: B::Activations,
    selection: B::Selection,
    /// `[max_rows * chosen, intermediate_size]`.
    expert_hidden: B::Activations,
}

/// A range of layers with all that a step needs but the device.
pub(crate) struct Layers<B: Backend> {
    config: ModelConfig,
    options: StageOptions,
    attention: AttentionParams,
    first: bool,
    layers: Vec<Layer<B>>,
    head: Option<Head<B>>,
    buffers: Buffers<B>,
    kv: B::KvPool,
    contents: Vec<PartSum>,
}

impl<B: Backend> Layers<B> {
    /// Loads everything. See [`super::StageModel::load`].
    pub(crate) fn load(
        backend: &mut B,
        config: &ModelConfig,
        weights: &dyn WeightSource,
        range: Range<u32>,
        options: StageOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, KernelError> {
        if range.is_empty() || range.end > config.num_hidden_layers {
            return Err(KernelError::Shape {
                what: "layers of a stage".into(),
                expected: format!("a range within 0..{}", config.num_hidden_layers),
                found: format!("{range:?}"),
            });
        }
        let with_head = options.has_head(config, &range);
        let total = weights.stored_bytes(range.clone(), with_head);
        progress(0, total);
        let (tensors, contents) = (Vec::new(), Vec::new());
        let mut loader = Loader { backend, config, weights, done: 0, total, progress, tensors, hole: None, contents };
        let head = if with_head { Some(loader.head(options.logit_rows)?) } else { None };
        let layers = range.clone().map(|layer| loader.layer(layer)).collect::<Result<Vec<_>, _>>()?;
        if range.start == 0 {
            loader.embedding()?;
        }
        let buffers = loader.buffers(options)?;
        let contents = loader.contents;
        let slots = options.kv_blocks as usize * KV_BLOCK_TOKENS;
        let kv = backend.kv_pool(layers.len(), slots, config.num_key_value_heads * config.head_dim)?;
        // Scales and padding of the files are not counted piece by piece.
        progress(total, total);
        let attention = AttentionParams {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            multiplier: config.attention_multiplier,
            logit_cap: config.attention_logit_cap,
            rope_theta: config.rope_theta,
        };
        let config = config.clone();
        Ok(Self { config, options, attention, first: range.start == 0, layers, head, buffers, kv, contents })
    }

    /// Sums of what was loaded.
    pub(crate) fn contents(&self) -> &[PartSum] {
        &self.contents
    }

    /// One step. See [`crate::Stage::run`].
    pub(crate) fn run(
        &mut self,
        backend: &mut B,
        weights: &dyn WeightSource,
        batch: &Batch,
        input: StepInput<'_>,
        wanted: &[u32],
        mut trace: Option<&mut Trace>,
    ) -> Result<StepOutput, KernelError> {
        validate::batch(&self.config, self.options, batch)?;
        if self.head.is_some() {
            validate::wanted(batch.rows.len(), wanted)?;
        }
        let values = self.input(weights, batch.rows.len(), input)?;
        backend.begin(batch, &mut self.kv)?;
        backend.write(&values, &mut self.buffers.residual)?;
        // A trace tells of all rows.
        let picked = self.head.is_some() && trace.is_none() && wanted.len() < batch.rows.len();
        for index in 0..self.layers.len() {
            let is_last = index + 1 == self.layers.len();
            self.layer(backend, index, (is_last && picked).then_some(wanted));
            backend.layer_done();
            if let Some(trace) = trace.as_deref_mut() {
                self.record(backend, batch.rows.len(), trace)?;
            }
        }
        if self.head.is_some() {
            self.logits(backend, wanted, picked)
        } else {
            let mut read = backend.finish(&[(&self.buffers.residual, batch.rows.len())])?;
            let hidden = read.pop().unwrap_or_default();
            validate::finite("hidden states", &hidden, self.config.hidden_size, None)?;
            Ok(StepOutput::HiddenStates(hidden))
        }
    }

    /// Checks the input, and gathers embedding rows where it is ids.
    fn input<'a>(
        &self,
        weights: &dyn WeightSource,
        rows: usize,
        input: StepInput<'a>,
    ) -> Result<Cow<'a, [f32]>, KernelError> {
        let wrong_kind = |expected: &str, found: &str| {
            Err(KernelError::Shape { what: "input of a stage".into(), expected: expected.into(), found: found.into() })
        };
        match input {
            StepInput::TokenIds(_) if !self.first => wrong_kind("hidden states, as layer 0 is elsewhere", "token ids"),
            StepInput::HiddenStates(_) if self.first => wrong_kind("token ids, as layer 0 is here", "hidden states"),
            StepInput::TokenIds(ids) => {
                validate::length("token ids of a step", rows, ids.len())?;
                let mut values = weights.embedding_rows(ids)?;
                validate::length("embedding rows", rows * self.config.hidden_size, values.len())?;
                values.iter_mut().for_each(|value| *value *= self.config.embedding_multiplier);
                Ok(Cow::Owned(values))
            }
            StepInput::HiddenStates(values) => {
                validate::length("hidden states of a step", rows * self.config.hidden_size, values.len())?;
                validate::finite("hidden states received", values, self.config.hidden_size, None)?;
                Ok(Cow::Borrowed(values))
            }
        }
    }

    /// One layer over the rows of the step. In the model's last layer every row's keys and values are stored. After attention only the
    /// `picked` rows go on, those whose logits are wanted; they become the first rows of the residual stream. Attention runs over all
    /// rows, because each row's position matters. If no logits are wanted, no rows are picked and attention is skipped.
    fn layer(&mut self, backend: &mut B, index: usize, picked: Option<&[u32]>) {
        let (layer, b, eps) = (&self.layers[index], &mut self.buffers, self.config.rms_norm_eps);
        backend.rms_norm(eps, &b.residual, &layer.pre_attention_norm, &mut b.normed);
        // A hint is for the batch's rows.
        if picked.is_none() {
            backend.upcoming(&[&layer.attention_output], None);
        }
        let products = &mut [(&layer.query, &mut b.q), (&layer.key, &mut b.k), (&layer.value, &mut b.v)];
        backend.matmul_each(&b.normed, products);
        backend.rope_store(&self.attention, &mut b.q, &b.k, &b.v, &mut self.kv, index);
        if picked.is_some_and(<[u32]>::is_empty) {
            return;
        }
        backend.attention(&self.attention, &b.q, &self.kv, index, &mut b.heads);
        if let Some(picked) = picked {
            backend.gather(&b.heads, picked, &mut b.q);
            backend.gather(&b.residual, picked, &mut b.normed);
            std::mem::swap(&mut b.heads, &mut b.q);
            std::mem::swap(&mut b.residual, &mut b.normed);
        }
        backend.matmul(&b.heads, &layer.attention_output, 1.0, &mut b.block);
        backend.rms_norm_add(eps, &b.block, &layer.post_attention_norm, &mut b.residual);

        backend.rms_norm(eps, &b.residual, &layer.pre_moe_norm, &mut b.normed);
        backend.route(&b.normed, &layer.router, &mut b.selection);
        backend.upcoming(&[&layer.down], Some(&b.selection));
        backend.expert_gate_up(&b.normed, &b.selection, &layer.gate, &layer.up, &mut b.expert_hidden);
        if let Some(next) = self.layers.get(index + 1) {
            backend.upcoming(&[&next.query, &next.key, &next.value], None);
        } else if let (Some(head), None) = (&self.head, picked) {
            backend.upcoming(&[&head.embedding], None);
        }
        backend.expert_down(&b.expert_hidden, &b.selection, &layer.down, &mut b.block);
        backend.rms_norm_add(eps, &b.block, &layer.post_moe_norm, &mut b.residual);
    }

    /// Adds what the layer that just ran left behind.
    fn record(&mut self, backend: &mut B, rows: usize, trace: &mut Trace) -> Result<(), KernelError> {
        for hidden in backend.finish(&[(&self.buffers.residual, rows)])? {
            trace.hidden.extend(hidden);
        }
        let (ids, probabilities) = backend.read_selection(&self.buffers.selection, rows)?;
        trace.expert_ids.extend(ids);
        trace.expert_probabilities.extend(probabilities);
        Ok(())
    }

    /// Logits of the wanted rows, some rows at a time; if they were `picked`, they are the first of the residual stream, in this order.
    fn logits(&mut self, backend: &mut B, wanted: &[u32], picked: bool) -> Result<StepOutput, KernelError> {
        let (config, residual) = (&self.config, &self.buffers.residual);
        let Some(head) = &mut self.head else { return Ok(StepOutput::Logits(Vec::new())) };
        if wanted.is_empty() {
            // Keys and values are written all the same; waiting tells whether the device is still there.
            backend.finish(&[])?;
        }
        let places: Vec<u32> = if picked { (0..wanted.len() as u32).collect() } else { wanted.to_vec() };
        let a_pass = self.options.logit_rows.max(1);
        let mut logits = Vec::new();
        for (rows, places) in wanted.chunks(a_pass).zip(places.chunks(a_pass)) {
            backend.gather(residual, places, &mut head.picked);
            backend.rms_norm(config.rms_norm_eps, &head.picked, &head.norm, &mut head.normed);
            backend.matmul(&head.normed, &head.embedding, config.output_multiplier, &mut head.logits);
            for part in backend.finish(&[(&head.logits, rows.len())])? {
                validate::finite("logits", &part, config.vocab_size, Some(rows))?;
                if logits.is_empty() {
                    logits = part;
                } else {
                    logits.extend(part);
                }
            }
        }
        Ok(StepOutput::Logits(logits))
    }
}

/// Loads tensors one after the other, counts the bytes and sums them.
struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    config: &'a ModelConfig,
    weights: &'a dyn WeightSource,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    /// Sums of the tensors since the last part was whole.
    tensors: Vec<(TensorName, Sum)>,
    /// Zeros in one of them that are no numbers.
    hole: Option<ModelError>,
    /// Sums of the parts.
    contents: Vec<PartSum>,
}

impl<B: Backend> Loader<'_, B> {
    fn matrix(
        &mut self,
        name: TensorName,
        experts: usize,
        inputs: usize,
        outputs: usize,
    ) -> Result<B::Matrix, KernelError> {
        let source: Box<dyn MatrixSource> = self.weights.matrix(&name)?;
        let spec = source.spec();
        if (spec.experts, spec.inputs, spec.outputs) != (experts, inputs, outputs) {
            return Err(KernelError::Shape {
                what: name.to_string(),
                expected: format!("{experts} matrices of {inputs} inputs and {outputs} outputs"),
                found: format!("{} of {} and {}", spec.experts, spec.inputs, spec.outputs),
            });
        }
        let Self { backend, done, total, progress, .. } = self;
        let mut progress = |bytes| {
            *done += bytes;
            progress((*done).min(*total), *total);
        };
        let mut load = |source: &dyn MatrixSource| match name {
            TensorName::Layer(_, LayerTensor::Router) => backend.load_router(source, &mut progress),
            _ => backend.load_matrix(source, &mut progress),
        };
        if self.weights.record().is_none() {
            return load(&*source);
        }
        let source = Summed::new(source);
        let matrix = load(&source)?;
        let (sum, hole) = source.finish()?;
        self.note(name, sum, hole);
        Ok(matrix)
    }

    fn note(&mut self, name: TensorName, sum: Sum, hole: Option<ModelError>) {
        self.tensors.push((name, sum));
        self.hole = self.hole.take().or(hole);
    }

    /// A part is whole: its sum is held to what is known of it. Zeros that a manifest confirms are the model's own.
    fn whole(&mut self, part: Part, sum: impl Fn(&[(TensorName, Sum)]) -> Option<Sum>) -> Result<(), KernelError> {
        let (tensors, hole) = (std::mem::take(&mut self.tensors), self.hole.take());
        let (Some(record), Some(sum)) = (self.weights.record(), sum(&tensors)) else { return Ok(()) };
        let sum = record.confirm(part, sum)?;
        match hole.filter(|_| !sum.confirmed) {
            Some(hole) => Err(hole.into()),
            None => {
                self.contents.push(sum);
                Ok(())
            }
        }
    }

    /// The first stage gathers rows of the embedding as tokens come; once it is read as a whole, so that another one is noticed.
    fn embedding(&mut self) -> Result<(), KernelError> {
        let is_summed = self.contents.iter().any(|sum| sum.part == Part::Embedding);
        if self.weights.record().is_none() || is_summed {
            return Ok(());
        }
        let (sum, hole) = contents::sum_of(&TensorName::Embedding, self.weights)?;
        self.note(TensorName::Embedding, sum, hole);
        self.whole(Part::Embedding, only)
    }

    fn vector(&mut self, name: TensorName) -> Result<B::Vector, KernelError> {
        let values = self.weights.vector(&name)?;
        validate::length(&name.to_string(), self.config.hidden_size, values.len())?;
        self.done += 4 * values.len() as u64;
        if self.weights.record().is_some() {
            self.note(name, Sum::of_vector(&values), None);
        }
        self.backend.load_vector(&values)
    }

    fn layer(&mut self, index: u32) -> Result<Layer<B>, KernelError> {
        let name = |tensor| TensorName::Layer(index, tensor);
        let c = self.config;
        let (hidden, ffn, experts) = (c.hidden_size, c.intermediate_size, c.num_experts);
        let (heads, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        // In the order of the file.
        let gate = self.matrix(name(LayerTensor::MoeGate), experts, hidden, ffn)?;
        let down = self.matrix(name(LayerTensor::MoeDown), experts, ffn, hidden)?;
        let up = self.matrix(name(LayerTensor::MoeUp), experts, hidden, ffn)?;
        self.backend.pair_experts(&gate, &up)?;
        let layer = Layer {
            gate,
            down,
            up,
            key: self.matrix(name(LayerTensor::Key), 1, hidden, kv)?,
            attention_output: self.matrix(name(LayerTensor::AttentionOutput), 1, heads, hidden)?,
            query: self.matrix(name(LayerTensor::Query), 1, hidden, heads)?,
            value: self.matrix(name(LayerTensor::Value), 1, hidden, kv)?,
            pre_attention_norm: self.vector(name(LayerTensor::PreAttentionNorm))?,
            post_attention_norm: self.vector(name(LayerTensor::PostAttentionNorm))?,
            pre_moe_norm: self.vector(name(LayerTensor::PreMoeNorm))?,
            post_moe_norm: self.vector(name(LayerTensor::PostMoeNorm))?,
            router: self.matrix(name(LayerTensor::Router), 1, hidden, experts)?,
        };
        self.whole(Part::Layer(index), |tensors| {
            let of_layer = tensors.iter().filter_map(|(name, sum)| match name {
                TensorName::Layer(_, tensor) => Some((*tensor, *sum)),
                _ => None,
            });
            Some(Sum::of_layer(&of_layer.collect::<Vec<_>>()))
        })?;
        Ok(layer)
    }

    fn head(&mut self, logit_rows: usize) -> Result<Head<B>, KernelError> {
        let (hidden, vocab, rows) = (self.config.hidden_size, self.config.vocab_size, logit_rows.max(1));
        let norm = self.vector(TensorName::FinalNorm)?;
        self.whole(Part::FinalNorm, only)?;
        let embedding = self.matrix(TensorName::Head, 1, hidden, vocab)?;
        if let Some(part) = self.weights.record().map(contents::Record::head) {
            self.whole(part, only)?;
        }
        Ok(Head {
            norm,
            embedding,
            picked: self.backend.activations(rows, hidden)?,
            normed: self.backend.activations(rows, hidden)?,
            logits: self.backend.activations(rows, vocab)?,
        })
    }

    fn buffers(&mut self, options: StageOptions) -> Result<Buffers<B>, KernelError> {
        let (c, rows) = (self.config, options.max_rows);
        let (heads, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let mut room = |rows, width| self.backend.activations(rows, width);
        Ok(Buffers {
            residual: room(rows, c.hidden_size)?,
            normed: room(rows, c.hidden_size)?,
            block: room(rows, c.hidden_size)?,
            q: room(rows, heads)?,
            k: room(rows, kv)?,
            v: room(rows, kv)?,
            heads: room(rows, heads)?,
            expert_hidden: room(rows.saturating_mul(c.num_experts_per_tok), c.intermediate_size)?,
            selection: self.backend.selection(rows, c.num_experts_per_tok)?,
        })
    }
}

/// The sum of a part of one tensor.
fn only(tensors: &[(TensorName, Sum)]) -> Option<Sum> {
    tensors.first().map(|(_, sum)| *sum)
}

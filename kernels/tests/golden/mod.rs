//! Outputs of xAI's own code on small models, and what to compare with them, for any backend.
//!
//! The folder is `GROKPIPE_SHARED`, or `shared` beside the workspace; without it a test says `skipped` and returns.
#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(clippy::unwrap_used, reason = "a test harness fails by panicking, with the place")]

use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use grokpipe_kernels::{
    Backend, Batch, KV_BLOCK_TOKENS, Row, Stage, StageModel, StageOptions, StepInput, StepOutput, TracedStage,
};
use grokpipe_model::{Model, ModelConfig, WeightSource};
use safetensors::SafeTensors;

/// The names of the small models.
pub(crate) const NAMES: [&str; 3] = ["a4", "b64", "c8way"];

/// A small model with what xAI's code gives for it.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) weights: Arc<dyn WeightSource>,
    pub(crate) prompts: Vec<Vec<u32>>,
    /// The prompt that was traced and continued.
    pub(crate) traced: usize,
    floats: HashMap<String, Vec<f32>>,
    ids: HashMap<String, Vec<i32>>,
}

/// Where the goldens are, if they are anywhere.
pub(crate) fn folder() -> Option<PathBuf> {
    let shared = std::env::var_os("GROKPIPE_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let folder = shared.join("golden");
    if folder.is_dir() {
        Some(folder)
    } else {
        println!("skipped: no goldens in {}", folder.display());
        None
    }
}

impl Golden {
    /// Opens a golden; `None` without the folder.
    pub(crate) fn open(name: &str) -> Option<Self> {
        let folder = folder()?.join(name);
        let model = Model::open(&folder).unwrap();
        let prompts: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("prompts.json")).unwrap()).unwrap();
        let bytes = std::fs::read(folder.join("expected_f32.safetensors")).unwrap();
        let (mut floats, mut ids) = (HashMap::new(), HashMap::new());
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let words = tensor.data().as_chunks::<4>().0;
            if tensor.dtype() == safetensors::Dtype::I32 {
                ids.insert(name, words.iter().map(|word| i32::from_le_bytes(*word)).collect());
            } else {
                floats.insert(name, words.iter().map(|word| f32::from_le_bytes(*word)).collect());
            }
        }
        Some(Self {
            name: name.to_owned(),
            config: model.config().clone(),
            weights: Arc::new(model),
            prompts: serde_json::from_value(prompts["prompts"].clone()).unwrap(),
            traced: serde_json::from_value(prompts["capture_prompt"].clone()).unwrap(),
            floats,
            ids,
        })
    }

    pub(crate) fn floats(&self, name: &str) -> &[f32] {
        &self.floats[name]
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        self.ids[name].iter().map(|&id| id as u32).collect()
    }

    /// A stage of this model.
    pub(crate) fn stage<B: Backend>(&self, backend: B, layers: Range<u32>) -> StageModel<B> {
        let options = StageOptions { kv_blocks: 24, max_rows: 64, head: true, logit_rows: 5 };
        let mut seen = Vec::new();
        let progress = &mut |done, total| seen.push((done, total));
        let stage = StageModel::load(backend, &self.config, self.weights.clone(), layers, options, progress).unwrap();
        assert!(seen.is_sorted(), "progress goes forward only: {seen:?}");
        assert!(
            seen.last().is_some_and(|&(done, total)| done == total && total > 0),
            "loading ends at 100 %: {seen:?}"
        );
        stage
    }

    /// The whole model.
    pub(crate) fn whole<B: Backend>(&self, backend: B) -> StageModel<B> {
        self.stage(backend, 0..self.config.num_hidden_layers)
    }
}

/// Positions `first..` of a sequence that owns the blocks of `table`.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    pub(crate) first: usize,
    pub(crate) ids: &'a [u32],
    pub(crate) table: Vec<u32>,
}

/// Blocks of a sequence of at most 128 tokens: sequence 0 has the last of the pool in descending order, and so on.
pub(crate) fn table(sequence: u32) -> Vec<u32> {
    (0..8).map(|i| 23 - sequence * 8 - i).collect()
}

/// A step of these parts, one after the other.
pub(crate) fn batch(parts: &[Part<'_>]) -> (Batch, Vec<u32>) {
    let (mut batch, mut ids) = (Batch::default(), Vec::new());
    for part in parts {
        assert!(part.first + part.ids.len() <= part.table.len() * KV_BLOCK_TOKENS);
        let table_offset = batch.block_tables.len() as u32;
        batch.block_tables.extend(&part.table);
        batch.rows.extend(part.ids.iter().enumerate().map(|(i, &id)| Row {
            position: (part.first + i) as u32,
            table_offset,
            attended: id != 0,
        }));
        ids.extend(part.ids);
    }
    (batch, ids)
}

/// Runs a step through stages one after the other; logits of all rows.
pub(crate) fn step(stages: &mut [&mut dyn Stage], parts: &[Part<'_>]) -> Vec<f32> {
    let (batch, ids) = batch(parts);
    let wanted: Vec<u32> = (0..ids.len() as u32).collect();
    let mut hidden: Option<Vec<f32>> = None;
    for stage in stages {
        let input = hidden.as_deref().map_or(StepInput::TokenIds(&ids), StepInput::HiddenStates);
        match stage.run(&batch, input, &wanted).unwrap() {
            StepOutput::HiddenStates(values) => hidden = Some(values),
            StepOutput::Logits(values) => return values,
        }
    }
    panic!("no stage has the head");
}

/// Logits of a whole prompt in one step, as sequence 0.
pub(crate) fn prompt<S: Stage>(stage: &mut S, ids: &[u32]) -> Vec<f32> {
    step(&mut [stage], &[Part { first: 0, ids, table: table(0) }])
}

/// Asserts `|got - want| <= bound` everywhere, and says where not.
pub(crate) fn close(what: &str, got: &[f32], want: &[f32], bound: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let distance = |i: usize| if got[i].is_nan() { f32::INFINITY } else { (got[i] - want[i]).abs() };
    let worst = (0..got.len()).max_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap();
    println!("{what}: largest difference {:e}", distance(worst));
    assert!(distance(worst) <= bound, "{what}: at {worst} got {}, want {}", got[worst], want[worst]);
}

/// Asserts equal bits.
pub(crate) fn same_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    if let Some(i) = (0..got.len()).find(|&i| got[i].to_bits() != want[i].to_bits()) {
        panic!("{what}: at {i} got {:?}, want {:?}", got[i], want[i]);
    }
}

/// The largest; the lowest index on a tie.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// Logits of every prompt of a model within `bound`.
pub(crate) fn check_logits<B: Backend>(golden: &Golden, backend: B, bound: f32) {
    let mut model = golden.whole(backend);
    for (index, ids) in golden.prompts.iter().enumerate() {
        let got = prompt(&mut model, ids);
        let what = format!("{} logits of prompt {index}", golden.name);
        close(&what, &got, golden.floats(&format!("prompt{index}.logits")), bound);
    }
}

/// Hidden states after every layer within `bound`, and equal experts.
pub(crate) fn check_trace<B: Backend>(golden: &Golden, backend: B, bound: f32) {
    let mut model = golden.whole(backend);
    let ids = &golden.prompts[golden.traced];
    let (batch, ids) = batch(&[Part { first: 0, ids, table: table(0) }]);
    let (_, trace) = model.run_traced(&batch, StepInput::TokenIds(&ids), &[]).unwrap();
    close(&format!("{} hidden states", golden.name), &trace.hidden, golden.floats("hidden"), bound);
    assert_eq!(trace.expert_ids, golden.ids("topk_idx"), "{} experts", golden.name);
    let what = format!("{} probabilities", golden.name);
    close(&what, &trace.expert_probabilities, golden.floats("topk_prob"), bound);
}

/// 32 greedy tokens through the KV cache.
pub(crate) fn check_greedy<B: Backend>(golden: &Golden, backend: B, bound: f32) {
    let mut model = golden.whole(backend);
    let (want, vocab) = (golden.ids("greedy.ids"), golden.config.vocab_size);
    let mut ids = golden.prompts[golden.traced].clone();
    let mut logits = prompt(&mut model, &ids);
    let mut seen = Vec::new();
    for (index, want) in want.into_iter().enumerate() {
        let last = logits[logits.len() - vocab..].to_vec();
        let id = argmax(&last);
        assert_eq!(id, want, "{} greedy token {index}", golden.name);
        seen.extend(last);
        ids.push(id);
        let part = Part { first: ids.len() - 1, ids: &[id], table: table(0) };
        logits = step(&mut [&mut model], &[part]);
    }
    close(&format!("{} greedy logits", golden.name), &seen, golden.floats("greedy.logits"), bound);
}

/// Logits of some of a prompt's rows, or of none, have the bits that they have among all, and so has the token after them.
pub(crate) fn check_wanted<B: Backend>(golden: &Golden, backend: B) {
    let mut model = golden.whole(backend);
    let ids = golden.prompts.iter().max_by_key(|ids| ids.len()).unwrap();
    let (count, vocab) = (ids.len() as u32, golden.config.vocab_size);
    let next = |model: &mut StageModel<B>, sequence| {
        step(&mut [model], &[Part { first: ids.len(), ids: &ids[..1], table: table(sequence) }])
    };
    let (whole, after) = (prompt(&mut model, ids), next(&mut model, 0));
    let backwards: Vec<u32> = ids.iter().rev().copied().collect();
    let halves = (0..count).step_by(2).collect();
    for wanted in [Vec::new(), vec![count - 1], vec![0, count / 2], halves] {
        let rows = wanted.iter().flat_map(|&row| &whole[row as usize * vocab..][..vocab]);
        let want: Vec<f32> = rows.copied().collect();
        // Alone, and as the second of two sequences, of which the first has none.
        for before in [0, 3] {
            let other = Part { first: 0, ids: &ids[..before], table: table(2) };
            let (batch, tokens) = batch(&[other, Part { first: 0, ids, table: table(1) }]);
            let wanted: Vec<u32> = wanted.iter().map(|row| row + before as u32).collect();
            let what = format!("{} rows {wanted:?} behind {before}", golden.name);
            // Keys and values of other tokens are there before, so that none can be left out.
            step(&mut [&mut model], &[Part { first: 0, ids: &backwards, table: table(1) }]);
            let output = model.run(&batch, StepInput::TokenIds(&tokens), &wanted).unwrap();
            same_bits(&format!("after {what}"), &next(&mut model, 1), &after);
            let (traced, _) = model.run_traced(&batch, StepInput::TokenIds(&tokens), &wanted).unwrap();
            assert_eq!(traced, output, "{what}, traced");
            let StepOutput::Logits(got) = output else { panic!("the whole model has the head") };
            same_bits(&what, &got, &want);
        }
    }
    same_bits(&format!("{} again", golden.name), &prompt(&mut model, ids), &whole);
}

/// What a stage's memory gives is measured between two chunks of a prompt, whose bits stay what they are without.
pub(crate) fn check_measured<B: Backend>(golden: &Golden, backend: B) {
    let mut model = golden.whole(backend);
    let ids = golden.prompts.iter().max_by_key(|ids| ids.len()).unwrap();
    let want = prompt(&mut model, ids);
    let mut found = Vec::new();
    let half = ids.len().div_ceil(2);
    for (first, chunk) in [0, half].into_iter().zip(ids.chunks(half)) {
        let gigabytes = model.measure_read_bandwidth(u64::MAX).unwrap() / 1e9;
        assert!(gigabytes.is_finite() && gigabytes > 0.0, "{gigabytes}");
        found.extend(step(&mut [&mut model], &[Part { first, ids: chunk, table: table(1) }]));
    }
    same_bits(&format!("{} measured in between", golden.name), &found, &want);
}

//! tokens a second of some layers, of a model or with weights from a seed, in the manner of llama-bench.
//!
//! A decode step reads every weight it uses once, so that its share of the memory's measured bandwidth says how far the kernels
//! are from the machine's limit. Decodes and prefills are timed several times over; medians are shown, with least and most. What the
//! memory gives is measured before and after each of them: on a shared machine it changes within seconds.

mod report;

use std::{ops::Range, sync::Arc, time::Instant};

use grokpipe_kernels::{
    Batch, KV_BLOCK_TOKENS, KernelError, Precision, Prefill, Row, Stage, StageOptions, StepInput, select_device,
};
use grokpipe_model::{ModelConfig, WeightSource};

pub use self::report::{Bandwidth, Measured, Report, Run};
use crate::{BenchError, CHUNK_ROWS, Loading, Reads, WARM_UP_STEPS, chunks, inputs, median};

/// What is measured, and how often.
#[derive(Clone)]
pub struct Settings {
    /// The model's sizes.
    pub config: ModelConfig,
    /// Its weights.
    pub weights: Arc<dyn WeightSource>,
    /// Layers of the stage, within the model's.
    pub layers: Range<u32>,
    /// Whether a stage that ends with the model's last layer has the head.
    pub head: bool,
    /// As [`select_device`] takes it.
    pub device: String,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// How exactly products are computed.
    pub precision: Precision,
    /// How a GPU computes steps of many rows.
    pub prefill: Prefill,
    /// Lengths of prompts, none beyond the model's context.
    pub prompts: Vec<u32>,
    /// Numbers of sequences that decode together.
    pub batches: Vec<u32>,
    /// Tokens that each sequence decodes.
    pub decoded: u32,
    /// Times that everything is measured.
    pub repeat: u32,
}

impl Settings {
    /// Tokens of the longest sequence, with the steps that do not count.
    pub fn longest(&self) -> u32 {
        self.longest_prompt().max(self.decode_steps())
    }

    fn longest_prompt(&self) -> u32 {
        self.prompts.iter().copied().max().unwrap_or(0)
    }

    fn decode_steps(&self) -> u32 {
        WARM_UP_STEPS + self.decoded
    }
}

/// Loads the stage and times it. `progress` hears how far loading is.
///
/// # Errors
/// What the model or the device reports.
pub fn run(settings: &Settings, progress: &mut dyn FnMut(Loading)) -> Result<Report, BenchError> {
    let Settings { config, weights, layers, threads, .. } = settings;
    let mut device = select_device(&settings.device, *threads, settings.precision, settings.prefill)?;
    let before_loading = device.measure_read_bandwidth(u64::MAX)?;
    let sequences = settings.batches.iter().copied().max().unwrap_or(1);
    let blocks = |tokens: u32| tokens.div_ceil(KV_BLOCK_TOKENS as u32);
    let options = StageOptions {
        kv_blocks: blocks(settings.longest_prompt()).max(sequences * blocks(settings.decode_steps())),
        max_rows: CHUNK_ROWS.min(settings.longest_prompt().max(sequences)) as usize,
        head: settings.head,
        ..StageOptions::default()
    };
    let has_head = options.has_head(config, layers);
    let reads = Reads::of(config, weights.as_ref(), layers, has_head)?;
    let started = Instant::now();
    let mut stage = device.load(config, Arc::clone(weights), layers.clone(), options, &mut |loaded, total| {
        progress(Loading::Bytes { loaded, total });
    })?;
    progress(Loading::Done);
    let load_seconds = started.elapsed().as_secs_f64();
    let mut bench = Bench {
        stage: stage.as_mut(),
        config,
        is_first: layers.start == 0,
        has_head,
        bandwidth: Vec::new(),
        before_loading,
    };
    let mut results = Vec::new();
    for &batch in &settings.batches {
        let runs = bench.repeated(settings.repeat, |bench| bench.decode(batch, settings.decoded))?;
        results.push(Measured { test: "decode", batch, prompt: 0, tokens: batch * settings.decoded, runs });
    }
    for &prompt in &settings.prompts {
        let runs = bench.repeated(settings.repeat, |bench| bench.prefill(prompt))?;
        results.push(Measured { test: "prefill", batch: 1, prompt, tokens: prompt, runs });
    }
    let bandwidth = bench.bandwidth();
    Ok(Report {
        model: config.name.clone(),
        device: stage.device().name.clone(),
        threads: *threads,
        precision: settings.precision,
        // What is in use, not what was asked for: few devices have it.
        prefill: Prefill::of_fingerprint(&stage.device().fingerprint),
        layers: layers.clone(),
        weights_bytes: stage.weights_bytes(),
        load_seconds,
        peak_memory: grokpipe_kernels::peak_memory_bytes(),
        bandwidth,
        reads,
        results,
    })
}

/// A stage that is timed.
struct Bench<'a> {
    stage: &'a mut dyn Stage,
    config: &'a ModelConfig,
    is_first: bool,
    has_head: bool,
    /// Bytes a second that the memory gave so far; nothing where the weights leave no room to measure.
    bandwidth: Vec<f64>,
    /// The same, measured before they were loaded.
    before_loading: f64,
}

impl Bench<'_> {
    /// Runs a test `times` times, with what the memory gives around each run.
    fn repeated(
        &mut self,
        times: u32,
        mut run: impl FnMut(&mut Self) -> Result<f64, BenchError>,
    ) -> Result<Vec<Run>, BenchError> {
        let mut before = self.measure_bandwidth()?;
        let mut runs = Vec::new();
        for _ in 0..times {
            let seconds = run(self)?;
            let after = self.measure_bandwidth()?;
            runs.push(Run { seconds, bandwidth: f64::midpoint(before, after) });
            before = after;
        }
        Ok(runs)
    }

    /// What the memory gives now; where the weights leave no room to measure, what it gave before they were loaded.
    fn measure_bandwidth(&mut self) -> Result<f64, BenchError> {
        match self.stage.measure_read_bandwidth(u64::MAX) {
            Err(KernelError::OutOfMemory { .. }) => Ok(self.before_loading),
            found => {
                let found = found?;
                self.bandwidth.push(found);
                Ok(found)
            }
        }
    }

    /// What the memory gave.
    fn bandwidth(&self) -> Bandwidth {
        if self.bandwidth.is_empty() {
            Bandwidth::BeforeLoading(self.before_loading)
        } else {
            Bandwidth::AroundRuns(median(self.bandwidth.iter().copied()))
        }
    }

    /// Seconds of `steps` steps of `sequences` sequences, a token each a step, from empty sequences on.
    fn decode(&mut self, sequences: u32, steps: u32) -> Result<f64, BenchError> {
        let warm_up = WARM_UP_STEPS;
        let a_table = (warm_up + steps).div_ceil(KV_BLOCK_TOKENS as u32);
        let wanted: Vec<u32> = if self.has_head { (0..sequences).collect() } else { Vec::new() };
        let mut started = Instant::now();
        for position in 0..warm_up + steps {
            if position == warm_up {
                started = Instant::now();
            }
            let row = |sequence| Row { position, table_offset: sequence * a_table, attended: true };
            let batch =
                Batch { rows: (0..sequences).map(row).collect(), block_tables: (0..sequences * a_table).collect() };
            self.step(&batch, position, &wanted)?;
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// Seconds of a prompt of this many tokens; of the last one logits are wanted.
    fn prefill(&mut self, tokens: u32) -> Result<f64, BenchError> {
        let started = Instant::now();
        for Range { start: first, end } in chunks(tokens) {
            let row = |position| Row { position, table_offset: 0, attended: true };
            let batch = Batch {
                rows: (first..end).map(row).collect(),
                block_tables: (0..tokens.div_ceil(KV_BLOCK_TOKENS as u32)).collect(),
            };
            let wanted = if self.has_head && end == tokens { vec![end - first - 1] } else { Vec::new() };
            self.step(&batch, first, &wanted)?;
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// One step, with inputs of this seed.
    fn step(&mut self, batch: &Batch, seed: u32, wanted: &[u32]) -> Result<(), BenchError> {
        let rows = batch.rows.len();
        let output = if self.is_first {
            let ids = inputs::token_ids(seed, rows, self.config.vocab_size);
            self.stage.run(batch, StepInput::TokenIds(&ids), wanted)?
        } else {
            let hidden = inputs::hidden_states(seed, rows, self.config.hidden_size);
            self.stage.run(batch, StepInput::HiddenStates(&hidden), wanted)?
        };
        std::hint::black_box(output);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use grokpipe_kernels::{DeviceInfo, StepOutput};
    use grokpipe_model::Model;

    use super::*;

    fn model() -> Model {
        Model::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo")).unwrap()
    }

    /// Two layers of the demo on the CPU.
    fn demo() -> (ModelConfig, Box<dyn Stage>) {
        let model = model();
        let config = model.config().clone();
        let options = StageOptions { kv_blocks: 16, max_rows: 40, head: false, logit_rows: 1 };
        let device = select_device("cpu", 1, Precision::Fast, Prefill::Invariant).unwrap();
        let stage = device.load(&config, Arc::new(model), 0..2, options, &mut |_, _| ()).unwrap();
        (config, stage)
    }

    #[test]
    fn the_demo_is_measured_and_reported() {
        let (config, mut stage) = demo();
        let reads = Reads::of(&config, &model(), &(0..2), false).unwrap();
        let mut bench = Bench {
            stage: stage.as_mut(),
            config: &config,
            is_first: true,
            has_head: false,
            bandwidth: Vec::new(),
            before_loading: 1.0,
        };
        let decode = bench.repeated(2, |bench| bench.decode(3, 4)).unwrap();
        let prefill = bench.repeated(2, |bench| bench.prefill(40)).unwrap();
        assert_eq!(bench.bandwidth.len(), 6, "measured before and after each run");
        assert!(matches!(bench.bandwidth(), Bandwidth::AroundRuns(bytes) if bytes > 0.0));
        let report = Report {
            model: config.name.clone(),
            device: "cpu".into(),
            threads: 1,
            precision: Precision::Fast,
            prefill: Prefill::Invariant,
            layers: 0..2,
            weights_bytes: 1000,
            load_seconds: 1.0,
            peak_memory: None,
            bandwidth: Bandwidth::AroundRuns(1e9),
            reads,
            results: vec![
                Measured { test: "decode", batch: 3, prompt: 0, tokens: 12, runs: decode },
                Measured { test: "prefill", batch: 1, prompt: 40, tokens: 40, runs: prefill },
            ],
        };
        let json = report.to_json();
        assert_eq!(json["results"][0]["batch"], 3);
        assert!(json["results"][1]["tokens_per_second"].as_f64().unwrap() > 0.0);
    }

    #[test]
    fn a_stage_without_room_is_refused_before_anything_is_loaded() {
        let device = select_device("cpu", 1, Precision::Fast, Prefill::Invariant).unwrap();
        if device.info().memory_bytes == 0 {
            println!("skipped: this system does not say what memory is free");
            return;
        }
        let options = StageOptions { kv_blocks: u32::MAX, max_rows: 1, head: false, logit_rows: 1 };
        let model = model();
        let config = model.config().clone();
        let loaded = device.load(&config, Arc::new(model), 0..2, options, &mut |_, _| panic!("it was begun"));
        let refused = loaded.err().unwrap().to_string();
        assert!(refused.contains("a stage of layers 0..2"), "{refused}");
    }

    /// A stage that leaves no room to measure.
    struct Full(Box<dyn Stage>);

    impl Stage for Full {
        fn run(&mut self, batch: &Batch, input: StepInput<'_>, wanted: &[u32]) -> Result<StepOutput, KernelError> {
            self.0.run(batch, input, wanted)
        }

        fn device(&self) -> &DeviceInfo {
            self.0.device()
        }

        fn weights_bytes(&self) -> u64 {
            self.0.weights_bytes()
        }

        fn kv_bytes(&self) -> u64 {
            self.0.kv_bytes()
        }

        fn measure_read_bandwidth(&mut self, _: u64) -> Result<f64, KernelError> {
            let (what, device) = ("the bandwidth measurement".to_owned(), "cpu".to_owned());
            Err(KernelError::OutOfMemory { what, needed_bytes: 2, available_bytes: 1, device })
        }
    }

    #[test]
    fn where_there_is_no_room_to_measure_a_run_is_compared_with_what_was_measured_before_loading() {
        let (config, stage) = demo();
        let mut stage = Full(stage);
        let mut bench = Bench {
            stage: &mut stage,
            config: &config,
            is_first: true,
            has_head: false,
            bandwidth: Vec::new(),
            before_loading: 3e9,
        };
        let runs = bench.repeated(2, |bench| bench.decode(1, 1)).unwrap();
        assert!(runs.iter().all(|run| run.bandwidth == 3e9));
        assert_eq!(bench.bandwidth(), Bandwidth::BeforeLoading(3e9));
    }
}

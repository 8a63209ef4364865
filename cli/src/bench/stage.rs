//! `grokpipe bench stage`: tokens a second of some layers, of a model or with weights from a seed, in the manner of llama-bench.
//!
//! A decode step reads every weight it uses once, so that its share of the memory's measured bandwidth says how far the kernels
//! are from the machine's limit. Decodes and prefills are timed several times over; medians are shown, with least and most. What the
//! memory gives is measured before and after each of them: on a shared machine it changes within seconds.

use std::{error::Error, ops::Range, path::PathBuf, time::Instant};

use grokpipe_kernels::{
    Batch, KV_BLOCK_TOKENS, KernelError, Precision, Prefill, Row, Stage, StageOptions, StepInput, select_device,
};
use grokpipe_model::ModelConfig;
use serde_json::{Value, json};

use super::{CHUNK_ROWS, TestArgs, WARM_UP_STEPS, inputs, median, open, parse_layers, progress_bar, reads::Reads};
use crate::{
    config::{precision_name, prefill_name},
    error::CliError,
    machine,
    text::Table,
    weights::{SyntheticArgs, Weights},
};

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model to measure; without one, weights from a seed
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    #[command(flatten)]
    synthetic: SyntheticArgs,
    /// Layers, the second number not included [default: all of a model, 0..1 of weights from a seed]
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<u32>>,
    /// Device: auto, gpu, gpu:NAME or cpu
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads of the CPU backend; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Tokens that each sequence decodes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), default_value_t = 16)]
    r#gen: u32,
    #[command(flatten)]
    tests: TestArgs,
}

/// Runs `bench stage`.
///
/// # Errors
/// What the model or the device reports.
pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let Weights { config, source: weights, .. } = open(args.model.as_deref(), &args.synthetic)?;
    let all = 0..config.num_hidden_layers;
    let layers = args.layers.clone().unwrap_or(if args.model.is_some() { all.clone() } else { 0..1 });
    if layers.end > all.end {
        return Err(CliError::usage(format!("--layers is {}..{}", layers.start, layers.end))
            .because(format!("expected layers within 0..{}", all.end))
            .into());
    }
    let threads = args.threads.unwrap_or_else(machine::cores) as usize;
    let mut device = select_device(&args.device, threads, args.tests.precision, args.tests.prefill)?;
    let before_loading = device.measure_read_bandwidth()?;
    let longest = args.tests.prompt.iter().copied().max().unwrap_or(0);
    let sequences = args.tests.batch.iter().copied().max().unwrap_or(1);
    let decoded = WARM_UP_STEPS + args.r#gen;
    let blocks = |tokens: u32| tokens.div_ceil(KV_BLOCK_TOKENS as u32);
    let options = StageOptions {
        kv_blocks: blocks(longest).max(sequences * blocks(decoded)),
        max_rows: CHUNK_ROWS.min(longest.max(sequences)) as usize,
        // Of a model's last layers, as it is used; alone, layers are measured without it.
        head: args.model.is_some(),
        ..StageOptions::default()
    };
    let has_head = options.has_head(&config, &layers);
    let reads = Reads::of(&config, weights.as_ref(), &layers, has_head)?;
    let started = Instant::now();
    let bar = progress_bar();
    let mut stage = device.load(&config, weights, layers.clone(), options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let load_seconds = started.elapsed().as_secs_f64();
    let mut bench = Bench {
        stage: stage.as_mut(),
        config: &config,
        is_first: layers.start == 0,
        has_head,
        bandwidth: Vec::new(),
        before_loading,
    };
    let mut results = Vec::new();
    for &batch in &args.tests.batch {
        let runs = bench.repeated(args.tests.repeat, |bench| bench.decode(batch, args.r#gen))?;
        results.push(Measured { test: "decode", batch, prompt: 0, tokens: batch * args.r#gen, runs });
    }
    for &prompt in &args.tests.prompt {
        let runs = bench.repeated(args.tests.repeat, |bench| bench.prefill(prompt))?;
        results.push(Measured { test: "prefill", batch: 1, prompt, tokens: prompt, runs });
    }
    let bandwidth = bench.bandwidth();
    let report = Report {
        model: config.name.clone(),
        device: stage.device().name.clone(),
        threads,
        precision: args.tests.precision,
        // What is in use, not what was asked for: few devices have it.
        prefill: Prefill::of_fingerprint(&stage.device().fingerprint),
        layers,
        weights_bytes: stage.weights_bytes(),
        load_seconds,
        peak_memory: machine::peak_memory_bytes(),
        bandwidth,
        reads,
        results,
    };
    if args.tests.json {
        println!("{}", report.to_json());
    } else {
        print!("{}", report.render());
    }
    Ok(())
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
    /// Times a test so often, with what the memory gives around each run.
    fn repeated(
        &mut self,
        times: u32,
        mut run: impl FnMut(&mut Self) -> Result<f64, Failure>,
    ) -> Result<Vec<Run>, Failure> {
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
    fn measure_bandwidth(&mut self) -> Result<f64, Failure> {
        match self.stage.measure_read_bandwidth() {
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
            Bandwidth::AroundRuns(median(self.bandwidth.clone()))
        }
    }

    /// Seconds of `steps` steps of `sequences` sequences, a token each a step, from empty sequences on.
    fn decode(&mut self, sequences: u32, steps: u32) -> Result<f64, Failure> {
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
    fn prefill(&mut self, tokens: u32) -> Result<f64, Failure> {
        let started = Instant::now();
        for first in (0..tokens).step_by(CHUNK_ROWS as usize) {
            let end = tokens.min(first + CHUNK_ROWS);
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
    fn step(&mut self, batch: &Batch, seed: u32, wanted: &[u32]) -> Result<(), Failure> {
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

struct Measured {
    test: &'static str,
    batch: u32,
    prompt: u32,
    tokens: u32,
    /// At least one.
    runs: Vec<Run>,
}

/// One run of a test.
#[derive(Clone, Copy)]
struct Run {
    seconds: f64,
    /// Bytes a second that the memory gave before and after, the mean.
    bandwidth: f64,
}

impl Measured {
    /// Tokens a second of each run, in their order.
    fn rates(&self) -> impl Iterator<Item = f64> {
        self.runs.iter().map(|run| f64::from(self.tokens) / run.seconds)
    }

    fn rate(&self) -> f64 {
        median(self.rates().collect())
    }

    /// Tokens a second of the slowest run and of the fastest.
    fn spread(&self) -> [f64; 2] {
        [self.rates().fold(f64::INFINITY, f64::min), self.rates().fold(0.0, f64::max)]
    }

    /// Bytes a second that the memory gave around the runs.
    fn bandwidth(&self) -> f64 {
        median(self.runs.iter().map(|run| run.bandwidth).collect())
    }

    /// Share of it that tokens of so many bytes read: the median of the runs, each beside what the memory gave around it.
    fn share(&self, bytes_a_token: f64) -> f64 {
        median(self.rates().zip(&self.runs).map(|(rate, run)| bytes_a_token * rate / run.bandwidth).collect())
    }
}

/// Bytes a second that the memory gave, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bandwidth {
    /// Before and after each run, the median.
    AroundRuns(f64),
    /// Once: the weights left no room to measure beside them.
    BeforeLoading(f64),
}

impl Bandwidth {
    fn gigabytes(self) -> f64 {
        let (Self::AroundRuns(bytes) | Self::BeforeLoading(bytes)) = self;
        bytes / 1e9
    }

    fn when(self) -> &'static str {
        match self {
            Self::AroundRuns(_) => "around each run",
            Self::BeforeLoading(_) => "before loading",
        }
    }
}

struct Report {
    model: String,
    device: String,
    threads: usize,
    precision: Precision,
    prefill: Prefill,
    layers: Range<u32>,
    weights_bytes: u64,
    load_seconds: f64,
    /// Of this process, with what measuring the bandwidth takes, where the system tells.
    peak_memory: Option<u64>,
    bandwidth: Bandwidth,
    reads: Reads,
    results: Vec<Measured>,
}

impl Report {
    /// Bytes that each token of a measurement reads.
    fn bytes_a_token(&self, measured: &Measured) -> f64 {
        match measured.test {
            "decode" => self.reads.step_bytes(measured.batch) / f64::from(measured.batch),
            _ => self.reads.prompt_bytes(measured.prompt) / f64::from(measured.prompt),
        }
    }

    /// Multiply-adds of each token of a measurement, without the head's.
    fn multiply_adds_a_token(&self, measured: &Measured) -> f64 {
        match measured.test {
            "decode" => self.reads.multiply_adds(1, 1),
            _ => self.reads.multiply_adds(measured.prompt, 1) / f64::from(measured.prompt),
        }
    }

    fn to_json(&self) -> Value {
        let results: Vec<Value> = self
            .results
            .iter()
            .map(|measured| {
                let (rate, [least, most]) = (measured.rate(), measured.spread());
                let bytes = self.bytes_a_token(measured);
                json!({
                    "test": measured.test,
                    "batch": measured.batch,
                    "prompt": measured.prompt,
                    "tokens_per_second": rate,
                    "tokens_per_second_least": least,
                    "tokens_per_second_most": most,
                    "bytes_per_token": bytes,
                    "gigabytes_per_second": bytes * rate / 1e9,
                    "read_gigabytes_per_second": measured.bandwidth() / 1e9,
                    "share_of_bandwidth": measured.share(bytes),
                    "gigaflops_per_second": 2e-9 * self.multiply_adds_a_token(measured) * rate,
                })
            })
            .collect();
        json!({
            "machine": {
                "device": self.device,
                "threads": self.threads,
                "read_gigabytes_per_second": self.bandwidth.gigabytes(),
                "read_measured": self.bandwidth.when(),
            },
            "model": self.model,
            "precision": precision_name(self.precision),
            "prefill": prefill_name(self.prefill),
            "layers": [self.layers.start, self.layers.end],
            "weights_bytes": self.weights_bytes,
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": self.peak_memory,
            "load_gigabytes_per_second": self.weights_bytes as f64 / self.load_seconds / 1e9,
            "results": results,
        })
    }

    fn render(&self) -> String {
        let gigabytes = self.weights_bytes as f64 / 1e9;
        let mut text = format!("{}, layers {}..{}, {}\n", self.model, self.layers.start, self.layers.end, self.device);
        let rate = gigabytes / self.load_seconds;
        let peak =
            self.peak_memory.map_or(String::new(), |bytes| format!(", peak memory {:.2} GB", bytes as f64 / 1e9));
        text += &format!("loaded {gigabytes:.2} GB in {:.1} s, {rate:.1} GB/s{peak}\n", self.load_seconds);
        let (precision, prefill) = (precision_name(self.precision), prefill_name(self.prefill));
        let (gigabytes, when) = (self.bandwidth.gigabytes(), self.bandwidth.when());
        text +=
            &format!("precision {precision}, prefill {prefill}; memory reads {gigabytes:.1} GB/s, measured {when}\n\n");
        let mut table =
            Table::new(&["test", "tokens/s", "least", "most", "a token", "reads", "GB/s", "of memory", "GFLOP/s"]);
        for measured in &self.results {
            let (rate, [least, most]) = (measured.rate(), measured.spread());
            let bytes = self.bytes_a_token(measured);
            let name = match measured.test {
                "decode" => format!("decode × {}", measured.batch),
                _ => format!("prefill {}", measured.prompt),
            };
            table.row(vec![
                name,
                format!("{rate:.1}"),
                format!("{least:.1}"),
                format!("{most:.1}"),
                format!("{:.2} ms", 1e3 / rate),
                format!("{:.3} GB", bytes / 1e9),
                format!("{:.1}", bytes * rate / 1e9),
                format!("{:.0} %", 100.0 * measured.share(bytes)),
                format!("{:.0}", 2e-9 * self.multiply_adds_a_token(measured) * rate),
            ]);
        }
        text + &table.to_string()
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
        assert!(report.render().contains("decode × 3") && report.render().contains("prefill 40"));
    }

    #[test]
    fn a_run_is_compared_with_what_the_memory_gave_around_it() {
        let run = |seconds, bandwidth| Run { seconds, bandwidth };
        // Twice as fast while the memory was: the share is the same, whatever the medians of both are.
        let runs = vec![run(2.0, 100.0), run(1.0, 200.0), run(4.0, 50.0), run(1.0, 200.0), run(8.0, 25.0)];
        let measured = Measured { test: "decode", batch: 1, prompt: 0, tokens: 8, runs };
        assert_eq!((measured.rate(), measured.spread(), measured.bandwidth()), (4.0, [1.0, 8.0], 100.0));
        assert_eq!(measured.share(10.0), 0.4);
        // Where shares differ, theirs is the middle, and not that of the middle rate in the middle bandwidth.
        let measured = Measured { runs: vec![run(1.0, 100.0), run(2.0, 100.0), run(4.0, 25.0)], ..measured };
        assert_eq!((measured.rate(), measured.bandwidth(), measured.share(25.0)), (4.0, 100.0, 2.0));
    }

    /// A stage beside which there is no room to measure.
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

        fn measure_read_bandwidth(&mut self) -> Result<f64, KernelError> {
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

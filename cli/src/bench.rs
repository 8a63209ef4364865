//! `grokpipe bench stage`: how long a token takes in full-size layers, with weights from a seed.
//!
//! Prints time and bytes a token, and what share of the memory's measured bandwidth that is: a decode step reads every weight it
//! uses once, so that share says how far the kernels are from the machine's limit.

use std::{error::Error, ops::Range, sync::Arc, time::Instant};

use grokpipe_kernels::{
    Batch, KV_BLOCK_TOKENS, Precision, Row, Stage, StageOptions, StepInput, StepOutput, SyntheticWeights, select_device,
};
use grokpipe_model::{LayerTensor, ModelConfig, TensorName, WeightSource};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{config::parse_precision, error::CliError, machine};

/// Steps before the ones that count: caches, clocks and page tables settle.
const WARM_UP_STEPS: usize = 2;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Time decode steps of some layers
    Stage(StageArgs),
}

#[derive(Debug, clap::Args)]
struct StageArgs {
    /// Shape of the weights, which come from a seed: grok1
    #[arg(long, value_name = "SHAPE", value_parser = ["grok1"], default_value = "grok1")]
    synthetic: String,
    /// Layers, the second number not included
    #[arg(long, value_name = "A..B", value_parser = parse_layers, default_value = "0..1")]
    layers: Range<u32>,
    /// Device: auto, gpu, gpu:NAME or cpu
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads of the CPU backend; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// exact computes products in f32, fast with 8-bit inputs
    #[arg(long, value_name = "exact|fast", value_parser = parse_precision, default_value = "exact")]
    precision: Precision,
    /// Tokens that are timed, one a step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), default_value_t = 16)]
    tokens: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn parse_layers(text: &str) -> Result<Range<u32>, String> {
    let most = ModelConfig::grok_1().num_hidden_layers;
    let range = text.split_once("..").and_then(|(a, b)| Some(a.trim().parse().ok()?..b.trim().parse().ok()?));
    range
        .filter(|range: &Range<u32>| !range.is_empty() && range.end <= most)
        .ok_or_else(|| format!("expected A..B within 0..{most}, found {text:?}"))
}

/// Runs `bench`.
///
/// # Errors
/// What the device reports.
pub(crate) fn run(args: Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let What::Stage(args) = args.what;
    let config = ModelConfig::grok_1();
    let weights = SyntheticWeights::new(config.clone(), 1);
    let threads = args.threads.unwrap_or_else(machine::cores) as usize;
    let mut device = select_device(&args.device, threads, args.precision)?;
    let bandwidth = device.measure_read_bandwidth()?;
    let steps = WARM_UP_STEPS + args.tokens as usize;
    let options = StageOptions {
        kv_blocks: steps.div_ceil(KV_BLOCK_TOKENS).try_into()?,
        max_rows: 1,
        // Of what the layers read, the head is a different matter.
        head: false,
        ..StageOptions::default()
    };
    let bytes = bytes_a_token(&config, &weights, args.layers.end - args.layers.start)?;
    let started = Instant::now();
    let bar = progress_bar();
    let source = Arc::new(weights);
    let mut stage = device.load(&config, source, args.layers.clone(), options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let load_seconds = started.elapsed().as_secs_f64();
    let mut seconds = time_steps(stage.as_mut(), &config, &args.layers, steps)?.split_off(WARM_UP_STEPS);
    seconds.sort_by(f64::total_cmp);
    let report = Report {
        device: stage.device().name.clone(),
        layers: args.layers.clone(),
        weights_bytes: stage.weights_bytes(),
        load_seconds,
        bytes_a_token: bytes,
        median_seconds: seconds[seconds.len() / 2],
        least_seconds: seconds[0],
        bandwidth,
    };
    report.print(args.json);
    Ok(())
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("loading {bar:30} {bytes}/{total_bytes} {bytes_per_sec}") {
        bar.set_style(style);
    }
    bar
}

/// Weights, scales and norms that a decode step of one token reads: of the experts only the chosen ones.
fn bytes_a_token(config: &ModelConfig, weights: &dyn WeightSource, layers: u32) -> Result<u64, CliError> {
    let mut bytes = 0;
    for tensor in LayerTensor::ALL {
        bytes += match tensor {
            LayerTensor::PreAttentionNorm
            | LayerTensor::PostAttentionNorm
            | LayerTensor::PreMoeNorm
            | LayerTensor::PostMoeNorm => 4 * config.hidden_size as u64,
            _ => {
                let matrix = weights.matrix(&TensorName::Layer(0, tensor))?;
                let spec = matrix.spec();
                let used = spec.experts.min(config.num_experts_per_tok) as u64;
                (spec.weight_bytes() + 4 * spec.scale_count() as u64) / spec.experts as u64
                    * if spec.experts == 1 { 1 } else { used }
            }
        };
    }
    Ok(bytes * u64::from(layers))
}

/// Seconds of each step of one sequence, a token a step.
fn time_steps(
    stage: &mut dyn Stage,
    config: &ModelConfig,
    layers: &Range<u32>,
    steps: usize,
) -> Result<Vec<f64>, Box<dyn Error + Send + Sync>> {
    let block_tables: Vec<u32> = (0..steps.div_ceil(KV_BLOCK_TOKENS) as u32).collect();
    let mut seconds = Vec::with_capacity(steps);
    let mut hidden: Vec<f32> = (0..config.hidden_size).map(|i| ((i * 7919) % 2001) as f32 / 1000.0 - 1.0).collect();
    for position in 0..steps as u32 {
        let row = Row { position, table_offset: 0, attended: true };
        let batch = Batch { rows: vec![row], block_tables: block_tables.clone() };
        // Different tokens, so that different experts are chosen and no cache helps more than it would.
        let ids = [1 + position * 7919 % (config.vocab_size as u32 - 1)];
        hidden.rotate_left(1);
        let input = if layers.start == 0 { StepInput::TokenIds(&ids) } else { StepInput::HiddenStates(&hidden) };
        let started = Instant::now();
        let output = stage.run(&batch, input, &[])?;
        seconds.push(started.elapsed().as_secs_f64());
        let (StepOutput::HiddenStates(values) | StepOutput::Logits(values)) = output;
        std::hint::black_box(values);
    }
    Ok(seconds)
}

struct Report {
    device: String,
    layers: Range<u32>,
    weights_bytes: u64,
    load_seconds: f64,
    bytes_a_token: u64,
    median_seconds: f64,
    least_seconds: f64,
    bandwidth: f64,
}

impl Report {
    fn print(&self, json: bool) {
        let rate = self.bytes_a_token as f64 / self.median_seconds;
        let (median, least) = (self.median_seconds * 1e3, self.least_seconds * 1e3);
        if json {
            let object = json!({
                "device": self.device,
                "layers": [self.layers.start, self.layers.end],
                "weights_bytes": self.weights_bytes,
                "load_seconds": self.load_seconds,
                "bytes_per_token": self.bytes_a_token,
                "ms_per_token_median": median,
                "ms_per_token_min": least,
                "bytes_per_second": rate,
                "read_bandwidth_bytes_per_second": self.bandwidth,
                "share_of_bandwidth": rate / self.bandwidth,
            });
            println!("{object}");
            return;
        }
        println!("device     {}", self.device);
        println!("layers     {}..{} of Grok-1, weights from a seed", self.layers.start, self.layers.end);
        let gb = self.weights_bytes as f64 / 1e9;
        println!("loaded     {gb:.2} GB in {:.1} s", self.load_seconds);
        println!("per token  {median:.1} ms median, {least:.1} ms least");
        println!("reads      {:.3} GB of weights a token, {:.1} GB/s", self.bytes_a_token as f64 / 1e9, rate / 1e9);
        let share = 100.0 * rate / self.bandwidth;
        println!("memory     {:.1} GB/s measured, of which {share:.0} % are used", self.bandwidth / 1e9);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_a_range_within_the_model() {
        assert_eq!(parse_layers("0..1"), Ok(0..1));
        assert_eq!(parse_layers("60..64"), Ok(60..64));
        for wrong in ["", "1", "1..1", "2..1", "0..65", "a..b", "-1..2", "0...2"] {
            assert!(parse_layers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_token_reads_two_experts_of_eight() {
        let config = ModelConfig::grok_1();
        let weights = SyntheticWeights::new(config.clone(), 1);
        let bytes = bytes_a_token(&config, &weights, 1).unwrap();
        // 2 experts of 3 * 6144 * 32768, attention of 88,080,384, and under 2 MB of scales, router and norms.
        let numbers = 2 * 3 * 6144 * 32_768 + 88_080_384;
        assert!((numbers..numbers + 2_000_000).contains(&bytes), "{bytes}");
    }
}

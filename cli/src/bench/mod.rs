//! `grokpipe bench`: how fast this machine runs layers, alone and in a pipeline, and products alone, in the manner of
//! llama-bench, and what speed costs.

mod inputs;
mod kernels;
mod pipeline;
mod precision;
mod reads;
mod spread;
mod stage;

use std::{error::Error, ops::Range, path::Path};

use grokpipe_kernels::{Precision, Prefill};
use grokpipe_model::ModelError;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    config::{parse_precision, parse_prefill},
    weights::{Shape, SyntheticArgs, Weights},
};

/// Decode steps before the ones that count: caches, clocks and page tables settle.
const WARM_UP_STEPS: u32 = 2;
/// Most rows of a prefill step.
const CHUNK_ROWS: u32 = 512;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

/// What `stage` and `pipeline` time, how often, and how they tell it.
#[derive(Clone, Debug, clap::Args)]
struct TestArgs {
    /// fast multiplies quantised weights by 8-bit inputs, exact by f32
    #[arg(long, value_name = "exact|fast", value_parser = parse_precision, default_value = "fast")]
    precision: Precision,
    /// How a GPU computes steps of many rows: fast takes its tensor cores, where it has them
    #[arg(long, value_name = "invariant|fast", value_parser = parse_prefill, default_value = "invariant")]
    prefill: Prefill,
    /// Lengths of prompts whose prefill is timed
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=8192))]
    prompt: Vec<u32>,
    /// Numbers of sequences that decode together
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64), default_value = "1")]
    batch: Vec<u32>,
    /// Times that everything is measured
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100), default_value_t = 3)]
    repeat: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Time decode and prefill of some layers
    Stage(stage::Args),
    /// Time several workers against one, as processes with gRPC between them
    Pipeline(Box<pipeline::Args>),
    /// Time products alone, format by format
    Kernels(kernels::Args),
    /// Compare the quality of `fast` with that of `exact`
    Precision(precision::Args),
}

/// Runs `bench`.
///
/// # Errors
/// What the model or the device reports.
pub(crate) fn run(args: Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    match args.what {
        What::Stage(args) => stage::run(&args),
        What::Pipeline(args) => pipeline::run(&args),
        What::Kernels(args) => kernels::run(&args),
        What::Precision(args) => precision::run(&args),
    }
}

/// What is to be measured: a model, or else weights from a seed, of Grok-1's shape if nothing is said.
fn open(model: Option<&Path>, synthetic: &SyntheticArgs) -> Result<Weights, ModelError> {
    match model {
        Some(path) => Weights::of_model(path),
        None => synthetic.weights_or(Shape::Grok1),
    }
}

/// Layers as `A..B`, the second number not included.
fn parse_layers(text: &str) -> Result<Range<u32>, String> {
    let range = text.split_once("..").and_then(|(a, b)| Some(a.trim().parse().ok()?..b.trim().parse().ok()?));
    range
        .filter(|range: &Range<u32>| !range.is_empty())
        .ok_or_else(|| format!("expected A..B with A below B, found {text:?}"))
}

/// The positions of a prompt, a step's at a time.
fn chunks(prompt: u32) -> impl Iterator<Item = Range<u32>> {
    (0..prompt).step_by(CHUNK_ROWS as usize).map(move |first| first..prompt.min(first + CHUNK_ROWS))
}

/// How far loading is, on standard error.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("loading {bar:30} {bytes}/{total_bytes} {bytes_per_sec}") {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_a_range() {
        assert_eq!(parse_layers("0..1"), Ok(0..1));
        for wrong in ["", "1", "1..1", "2..1", "a..b", "-1..2", "0...2"] {
            assert!(parse_layers(wrong).is_err(), "{wrong}");
        }
    }
}

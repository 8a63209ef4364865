//! `grokpipe bench`: how fast this machine runs layers, alone and in a pipeline, and products alone, in the manner of
//! llama-bench, and what speed costs.
//!
//! The crate `grokpipe-bench` measures. Here are the flags, the processes of `bench pipeline`, and what people are shown.

mod kernels;
mod pipeline;
mod precision;
mod stage;

use std::{ops::Range, path::Path};

use grokpipe_bench::{BenchError, Loading};
use grokpipe_kernels::{Precision, Prefill};
use grokpipe_model::ModelError;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    config::{parse_precision, parse_prefill},
    error::{CliError, Code},
    weights::{Shape, SyntheticArgs, Weights},
};

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
pub(crate) fn run(args: Args) -> Result<(), CliError> {
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

/// How far loading is, on standard error.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("loading {bar:30} {bytes}/{total_bytes} {bytes_per_sec}") {
        bar.set_style(style);
    }
    bar
}

/// Shows on this bar how far loading is, and takes it away before anything is timed.
fn show(bar: ProgressBar) -> impl FnMut(Loading) {
    move |loading| match loading {
        Loading::Bytes { loaded, total } => {
            bar.set_length(total);
            bar.set_position(loaded);
        }
        Loading::Done => bar.finish_and_clear(),
    }
}

impl From<BenchError> for CliError {
    fn from(error: BenchError) -> Self {
        /// The headline of whatever is noticed of a failure.
        const FAILED: &str = "the workers failed";
        match error {
            BenchError::Model(error) => error.into(),
            BenchError::Kernel(error) => error.into(),
            BenchError::Listen(error) => Self::failed("no port could be opened on 127.0.0.1").because(error),
            BenchError::NoPrediction(refusal) => Self::failed("no prediction can be made").because(refusal),
            BenchError::NotStarted { name, source } => {
                Self::failed(format!("worker {name} cannot be started")).because(source)
            }
            BenchError::Exited { name, code, how } => {
                let code = code.map_or(Code::Failed, Code::from_exit);
                Self::new(code, format!("worker {name} {how}")).because("its own message, if any, stands above")
            }
            BenchError::NoOrders(_) | BenchError::Cancelled => Self::failed(error.to_string()),
            BenchError::NoLink(why) => Self::failed("a worker takes no frames").because(why),
            BenchError::StageFailed { name, message, is_out_of_memory } => {
                let code = if is_out_of_memory { Code::OutOfMemory } else { Code::Failed };
                Self::new(code, FAILED).because(format!("worker {name}: {message}"))
            }
            BenchError::Workers(why) => Self::failed(FAILED).because(why),
            BenchError::TimedOut(_) => Self::new(Code::TimedOut, error.to_string()),
            BenchError::HiddenStates(why) => {
                Self::failed("the last stage handed on hidden states that no stage would take").because(why)
            }
        }
    }
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

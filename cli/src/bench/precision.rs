//! `grokpipe bench precision`: what precision `fast` costs in quality on given texts, compared with `exact` on the same device.

use std::{fs, path::PathBuf};

use grokpipe_bench::precision;
use grokpipe_model::Model;
use indicatif::ProgressBar;

use crate::{
    error::CliError,
    machine, paths,
    text::{print, without_mark},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model to measure
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: PathBuf,
    /// Texts as token ids: a JSON list of lists of ids, or of objects with such a list as "ids"
    #[arg(long, value_name = "FILE", value_parser = paths::parser())]
    tokens: PathBuf,
    /// Threads; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `bench precision`.
///
/// # Errors
/// What is wrong with the texts, the model or the device.
pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let vocab_size = Model::open(&args.model)?.config().vocab_size;
    let refuse = |reason: String| {
        CliError::failed("the texts cannot be read").at(args.tokens.display().to_string()).because(reason)
    };
    let file = fs::read_to_string(&args.tokens).map_err(|error| refuse(error.to_string()))?;
    let texts = precision::parse_texts(without_mark(&file), vocab_size).map_err(refuse)?;
    let threads = args.threads.unwrap_or_else(machine::cores) as usize;
    let bar = ProgressBar::new(texts.len() as u64);
    let report = precision::run(&args.model, &texts, threads, &mut |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    if args.json { print(&format!("{}\n", report.to_json())) } else { print(&report.render()) }
}

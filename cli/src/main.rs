//! `grokpipe`: the one binary. Coordinator, worker and everything that people ask of a cluster are its subcommands.
//!
//! This file decides how the command line is cut into subcommands and how failures end: a message of up to four parts on
//! standard error (what, where, why, what to do) and an exit code: 0 ok, 1 failed, 2 usage, 3 unreachable, 4 time-out,
//! 5 out of memory. Each subcommand is a file.

mod bench;
mod client;
mod common;
mod config;
mod convert;
mod coordinator;
mod descriptors;
mod error;
mod generate;
mod host_names;
mod inspect;
mod logging;
mod logits;
mod machine;
mod plan;
mod progress;
mod rates;
mod status;
mod text;
mod tokenizer;
mod up;
mod verify;
mod weights;
mod worker;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::error::CliError;

/// Runs Grok-1 on a cluster of ordinary machines.
#[derive(Debug, Parser)]
#[command(name = "grokpipe", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole cluster: coordinator and workers, here and over SSH
    Up(Box<up::Args>),
    /// Run the coordinator alone
    Coordinator(Box<coordinator::Args>),
    /// Run one worker
    Worker(Box<worker::Args>),
    /// Continue a text
    Generate(Box<generate::Args>),
    /// Show which worker would run or runs which layers
    Plan(plan::Args),
    /// Show how a cluster is; exit code 0 while it serves
    Status(status::Args),
    /// Show what a model's files hold
    Inspect(inspect::Args),
    /// Check a model's files: lengths, checksums, holes; exit code 1 when something is wrong
    Verify(verify::Args),
    /// Write a model as GGUF, in another format
    Convert(convert::Args),
    /// Turn lines of text into token ids, or back
    Tokenize(tokenizer::Args),
    /// Compute the logits of token ids in this process, for parity checks
    Logits(logits::Args),
    /// Measure
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            // Nobody may read standard error any more; the exit code still tells.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(error.code() as u8)
        }
    }
}

fn run(command: Command) -> Result<ExitCode, CliError> {
    let serves = matches!(command, Command::Coordinator(_) | Command::Worker(_));
    logging::start(if serves { "info" } else { "warn" })?;
    match command {
        Command::Up(args) => up::run(&args)?,
        Command::Coordinator(args) => coordinator::run(&args)?,
        Command::Worker(args) => worker::run(*args)?,
        Command::Generate(args) => generate::run(*args)?,
        Command::Plan(args) => plan::run(&args)?,
        Command::Status(args) => {
            let serving = status::run(&args)?;
            return Ok(if serving { ExitCode::SUCCESS } else { ExitCode::from(error::Code::Failed as u8) });
        }
        Command::Inspect(args) => inspect::run(&args)?,
        Command::Verify(args) => {
            let good = verify::run(&args)?;
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(error::Code::Failed as u8) });
        }
        Command::Convert(args) => convert::run(&args)?,
        Command::Tokenize(args) => tokenizer::run(&args)?,
        Command::Logits(args) => logits::run(args)?,
        Command::Bench(args) => bench::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_the_manual_are_understood() {
        let lines = [
            "up --config c.toml --workers 2 --model m --device cpu --threads 1 --tokenizer t --http 127.0.0.1:0 --grpc 127.0.0.1:0 --once P --no-restart --insecure",
            "coordinator --config c.toml --model m --tokenizer t --http 127.0.0.1:0 --grpc 127.0.0.1:0 --insecure",
            "worker --coordinator node:7070 --name w1 --config c.toml --model m --device gpu:H200 --threads 2 --memory 8GiB --listen 127.0.0.1:0 --advertise node:0 --insecure",
            "generate PROMPT --server node:7070 --max-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 7 --stop a --stop b --ignore-eos --json",
            "generate --token-ids 1,2,3",
            "generate -",
            "status --server node:7070 --json",
            "plan --config c.toml --json",
            "plan --server node:7070",
            "inspect m --json",
            "verify m --write --json",
            "convert m out.gguf --type q8_0",
            "convert m out.gguf --type mixed --split-max-size 40GB",
            "tokenize --tokenizer t --json --decode",
            "logits --model m --token-ids 1,2,3 --device cpu --threads 2 --prefill fast --out f.safetensors --trace",
            "bench stage --synthetic grok1 --layers 0..1 --device cpu --threads 2 --gen 4 --json",
            "bench stage --synthetic grok1 --layers 0..1 --type q4_0 --precision fast --prompt 32,128 --batch 1,2,4",
            "bench pipeline --workers 2 --synthetic grok1 --layers 0..2 --type q4_0 --threads 1 --precision exact --gen 64 --batch 1,8 --prompt 128 --repeat 5 --json",
            "bench pipeline --model m --workers 3 --device gpu:H200",
            "bench stage --type q8_0 --seed 7",
            "worker --coordinator node:7070 --synthetic grok1 --type q8_0 --seed 7",
            "bench precision --model m --tokens t.json --threads 2 --json",
            "bench kernels --type q8_0,q4_k --inputs 6144 --outputs 32768 --rows 1,64 --threads 1 --precision fast --prefill fast --json",
        ];
        for line in lines {
            let parsed = Cli::try_parse_from(std::iter::once("grokpipe").chain(line.split(' ')));
            assert!(parsed.is_ok(), "{line}: {}", parsed.err().map_or_else(String::new, |error| error.to_string()));
        }
    }

    #[test]
    fn the_launch_script_passes_every_subcommand_on() {
        let script = include_str!("../../launch.sh");
        let list = script.lines().find(|line| line.contains("--version |")).expect("a list of subcommands");
        for subcommand in Cli::command().get_subcommands() {
            assert!(list.split([' ', '|', ')']).any(|word| word == subcommand.get_name()), "{}", subcommand.get_name());
        }
    }

    #[test]
    fn nonsense_on_the_command_line_is_refused() {
        let lines = [
            "",
            "convert",
            "convert m out.gguf",
            "convert m --type q8_0",
            "convert m out.gguf --type q5_k",
            "convert m out.gguf --type q8_0 --split-max-size 0",
            "drain w1",
            "generate",
            "generate PROMPT --token-ids 1",
            "generate --token-ids 1,x",
            "generate PROMPT --temperature hot",
            "generate PROMPT --server http://node:7070",
            "worker --name w1",
            "worker --coordinator node",
            "worker --coordinator node:1 --device tpu",
            "worker --coordinator node:1 --synthetic grok1 --model m",
            "bench pipeline --workers 1",
            "bench pipeline --model m --seed 7",
            "worker --coordinator node:1 --memory lots",
            "worker --coordinator node:1 --name Bad_Name!",
            "up --workers 0",
            "up --threads many",
            "inspect",
        ];
        for line in lines {
            let words = std::iter::once("grokpipe").chain(line.split(' ').filter(|word| !word.is_empty()));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}

//! `grokpipe`: the one binary. Coordinator, worker and everything that people ask of a cluster are its subcommands.
//!
//! This file decides how the command line is cut into subcommands and how failures end: a message of up to four parts on
//! standard error (what, where, why, what to do) and an exit code: 0 ok, 1 failed, 2 usage, 3 unreachable, 4 time-out,
//! 5 out of memory. Each subcommand is a file.

mod bench;
mod claim;
mod client;
mod common;
mod config;
mod convert;
mod coordinator;
mod descriptors;
mod devices;
mod doctor;
mod ending;
mod error;
mod generate;
mod host_names;
mod inspect;
mod listen;
mod logging;
mod logits;
mod machine;
mod paths;
mod plan;
mod progress;
mod rates;
mod status;
mod stderr;
mod text;
mod tokenizer;
mod up;
mod verify;
mod weights;
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::CliError;

const VARIABLES: &str = "\
Environment (a variable that is empty counts as unset):
  GROKPIPE_CONFIG          configuration file, as --config
  GROKPIPE_SERVER          gRPC address of the cluster to ask, as --server
  GROKPIPE_LOG             what is logged: a level, or levels by target, as warn,grokpipe_worker=debug
  GROKPIPE_LOG_STYLE       how: pretty or json [default: pretty on a terminal]
  GROKPIPE__SECTION__KEY   a key of the configuration, as GROKPIPE__KV__TOKENS=16384
  NO_COLOR                 no colours
Exit codes: 0 ok, 1 failed, 2 usage, 3 unreachable, 4 time-out, 5 out of memory";

/// Runs Grok-1 on a cluster of ordinary machines.
#[derive(Debug, Parser)]
#[command(name = "grokpipe", version, about, disable_help_subcommand = true, after_help = VARIABLES)]
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
    /// Look for what is wrong: here, and in a running cluster; exit code 0 when nothing failed
    Doctor(doctor::Args),
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
    /// List the CPU and the GPUs of this machine, and how to ask for each
    Devices(devices::Args),
    /// Measure
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    keep_drivers_quiet();
    let code = match run(cli.command) {
        Ok(code) => code,
        Err(error) if error.is_closed_output() => ExitCode::SUCCESS,
        Err(error) => {
            stderr::line(&format!("error: {error}"));
            ExitCode::from(error.code() as u8)
        }
    };
    stderr::flush();
    code
}

/// Mesa asks the desktop which GPU it uses, and where there is none, Wayland's library writes a bare line to standard error each time.
/// Which device is used is for our own flags to say.
fn keep_drivers_quiet() {
    const NO_DESKTOP: &str = "NODEVICE_SELECT";
    let is_asked_for = common::variable("MESA_VK_DEVICE_SELECT").is_some() || common::variable(NO_DESKTOP).is_some();
    if common::variable("XDG_RUNTIME_DIR").is_none() && !is_asked_for {
        #[expect(unsafe_code, reason = "C libraries read the environment themselves")]
        // SAFETY: no other thread runs yet that could read the environment meanwhile.
        unsafe {
            std::env::set_var(NO_DESKTOP, "1");
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
        Command::Doctor(args) => {
            let sound = doctor::run(&args)?;
            return Ok(if sound { ExitCode::SUCCESS } else { ExitCode::from(error::Code::Failed as u8) });
        }
        Command::Inspect(args) => inspect::run(&args)?,
        Command::Verify(args) => {
            let good = verify::run(&args)?;
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(error::Code::Failed as u8) });
        }
        Command::Convert(args) => convert::run(&args)?,
        Command::Tokenize(args) => tokenizer::run(&args)?,
        Command::Logits(args) => logits::run(args)?,
        Command::Devices(args) => devices::run(&args)?,
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
            "doctor --config c.toml --server node:7070 --gentle --json --bundle folder --log f",
            "plan --server node:7070",
            "plan --server [fd00::1]:7070",
            "plan --synthetic Grok1 --type Q8_0",
            "plan --model m",
            "inspect m --json",
            "verify m --write --json",
            "convert m out.gguf --type q8_0",
            "convert m out.gguf --type Q8_0",
            "up --device CPU --precision Exact --prefill FAST",
            "convert m out.gguf --type mixed --split-max-size 40GB",
            "tokenize --tokenizer t --json --decode",
            "logits --model m --token-ids 1,2,3 --device cpu --threads 2 --prefill fast --out f.safetensors --trace",
            "bench stage --synthetic grok1 --layers 0..1 --device cpu --threads 2 --gen 4 --json",
            "bench stage --synthetic grok1 --layers 0..1 --type q4_0 --precision fast --prompt 32,128 --batch 1,2,4",
            "bench pipeline --workers 2 --synthetic grok1 --layers 0..2 --type q4_0 --threads 1 --precision exact --gen 64 --batch 1,8 --prompt 128 --repeat 5 --json",
            "bench pipeline --model m --workers 3 --device gpu:H200",
            "bench stage --type q8_0 --seed 7",
            "devices --json",
            "worker --coordinator node:7070 --device gpu:0000:41:00.0",
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
    fn the_launch_script_can_tell_subcommands_from_flags_of_up() {
        use clap::error::ErrorKind;
        let answer =
            |first: &str| Cli::try_parse_from(["grokpipe", first, "--help"]).map_err(|error| error.kind()).err();
        let command = Cli::command();
        for subcommand in command.get_subcommands() {
            assert_eq!(answer(subcommand.get_name()), Some(ErrorKind::DisplayHelp), "{}", subcommand.get_name());
        }
        let up = command.find_subcommand("up").expect("up");
        for flag in up.get_arguments().filter_map(clap::Arg::get_long) {
            assert_eq!(answer(&format!("--{flag}")), Some(ErrorKind::UnknownArgument), "{flag}");
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
            "worker --coordinator fd00::1:7070",
            "inspect ~somebody/model",
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

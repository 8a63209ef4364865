//! `grokpipe bench`: how fast this machine runs layers, and products alone, in the manner of llama-bench, and what speed costs.

mod kernels;
mod precision;
mod stage;

use std::error::Error;

use grokpipe_model::BlockType;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Time decode and prefill of some layers
    Stage(stage::Args),
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
        What::Kernels(args) => kernels::run(&args),
        What::Precision(args) => precision::run(&args),
    }
}

/// A stored type by the name that GGUF files give it, in either case.
fn parse_type(text: &str) -> Result<BlockType, String> {
    BlockType::all().find(|kind| kind.name().eq_ignore_ascii_case(text)).ok_or_else(|| {
        let names: Vec<String> = BlockType::all().map(|kind| kind.name().to_lowercase()).collect();
        format!("expected one of {}, found {text:?}", names.join(", "))
    })
}

/// Seconds of each run, ascending.
fn repeated<E>(times: u32, mut run: impl FnMut() -> Result<f64, E>) -> Result<Vec<f64>, E> {
    let mut seconds = (0..times).map(|_| run()).collect::<Result<Vec<_>, E>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_known_by_name() {
        assert_eq!(parse_type("q4_k"), Ok(BlockType::Q4K));
        assert_eq!(parse_type("IQ4_XS"), Ok(BlockType::Iq4Xs));
        assert!(parse_type("q9").unwrap_err().contains("q8_0"));
    }
}

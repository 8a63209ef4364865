//! `grokpipe convert`: any model that can be read, as GGUF. This file knows flags, progress and the closing report; what is written
//! is decided in `grokpipe_model::convert`.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use grokpipe_model::{
    Model, ModelError,
    convert::{self, Mix, Options, Report},
};

use crate::{config::ByteSize, error::CliError, machine, paths, progress::Screen, text::print};

/// Arguments of `convert`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder or file of the model
    #[arg(value_name = "IN", value_parser = paths::parser())]
    model: PathBuf,
    /// GGUF file to write; an interrupted conversion is continued
    #[arg(value_name = "OUT", value_parser = paths::parser())]
    out: PathBuf,
    /// Format of the matrices: q8_0, q4_0, q4_k, q6_k, bf16, or mixed as llama.cpp's Q4_K_M
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_mix)]
    mix: Mix,
    /// Write parts of at most this size, such as 40GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    split_max_size: Option<ByteSize>,
}

fn parse_mix(text: &str) -> Result<Mix, String> {
    Mix::from_name(&text.to_ascii_lowercase()).ok_or_else(|| format!("expected one of {}", Mix::names().join(", ")))
}

fn parse_size(text: &str) -> Result<ByteSize, String> {
    let size = ByteSize::parse(text).filter(|size| size.0 > 0);
    size.ok_or_else(|| "expected a size such as 40GB or 512MiB".to_owned())
}

/// Runs `convert`.
///
/// # Errors
/// What is wrong with the model, and why a file could not be written.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let model = Model::open(&args.model)?;
    let options = Options {
        mix: args.mix,
        split_max_bytes: args.split_max_size.map(|size| size.0),
        threads: machine::cores() as usize,
    };
    let mut screen = Screen::new();
    let converted = convert::convert(&model, &args.out, &options, &mut |done, total| screen.show(done, total));
    screen.clear();
    let report = converted.map_err(|error| {
        // What is wrong with the model, or with what lies in the way, stays wrong.
        let may_pass = matches!(error, ModelError::Io { .. });
        let failed = CliError::failed("the model was not converted").because(error);
        if may_pass && convert::is_unfinished(&args.out) {
            failed.advise("once the reason is gone, the same command goes on from where this one ended")
        } else {
            failed
        }
    })?;
    print(&render(&report))
}

fn render(report: &Report) -> String {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut text = String::new();
    for (path, bytes, checksum) in &report.files {
        let _ = writeln!(text, "{}  {}  sha256 {checksum}", name(path), ByteSize(*bytes));
    }
    let _ = writeln!(text, "checksums: {}", name(&report.checksums));
    if report.resumed_bytes > 0 {
        let _ = writeln!(text, "continued an interrupted conversion: {} were there", ByteSize(report.resumed_bytes));
    }
    if let Some(reason) = &report.no_tokenizer {
        let _ = writeln!(text, "no tokenizer in it: {reason}");
    }
    if !report.notes.is_empty() {
        let _ = writeln!(text, "not carried over as asked:");
    }
    let width = report.notes.iter().map(|note| note.tensor.len()).max().unwrap_or(0);
    for note in &report.notes {
        let _ = writeln!(text, "  {:<width$}  {}", note.tensor, note.reason);
    }
    text
}

#[cfg(test)]
mod tests {
    use grokpipe_model::convert::{Note, Reason};

    use super::*;

    #[test]
    fn types_and_sizes_are_those_of_the_manual() {
        for name in ["q8_0", "q4_0", "q4_k", "q6_k", "bf16", "mixed"] {
            assert!(parse_mix(name).is_ok(), "{name}");
        }
        assert!(parse_mix("q5_k").unwrap_err().contains("q8_0, q4_0"));
        assert_eq!(parse_size("40GB").unwrap().0, 40_000_000_000);
        assert!(parse_size("0").is_err() && parse_size("much").is_err());
    }

    #[test]
    fn the_report_names_files_checksums_and_every_tensor_that_is_not_as_asked() {
        let reason = Reason::ScalesNotHalves { count: 3, of: 64 };
        let report = Report {
            files: vec![("a/m.gguf".into(), 2048, "00ff".into())],
            checksums: "a/m.gguf.sha256".into(),
            resumed_bytes: 0,
            notes: vec![Note { tensor: "blk.0.attn_q.weight".into(), reason }],
            no_tokenizer: Some("why".into()),
        };
        assert_eq!(
            render(&report),
            "m.gguf  2.0 KiB  sha256 00ff\nchecksums: m.gguf.sha256\nno tokenizer in it: why\nnot carried over as asked:\n  \
             blk.0.attn_q.weight  quantised anew where a scale is not exact in F16: 3 of 64\n"
        );
    }
}

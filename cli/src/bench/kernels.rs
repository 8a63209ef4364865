//! `grokpipe bench kernels`: products alone, of every stored type, by how many rows are multiplied at a time.

use grokpipe_bench::kernels::{self, OfType, Report, all, name};
use grokpipe_kernels::{Precision, Prefill};
use grokpipe_model::Format;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    common,
    config::{parse_precision, parse_prefill},
    error::CliError,
    machine,
    text::{Table, print},
    weights::by_name,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stored types: f32, int8 as xAI published them, or a type of GGUF files [default: all of them]
    #[arg(long, value_name = "TYPE,TYPE", value_delimiter = ',', value_parser = parse_format)]
    r#type: Vec<Format>,
    /// Inputs of the matrix; a multiple of 256
    #[arg(long, value_name = "N", value_parser = parse_inputs, default_value_t = 6144)]
    inputs: u32,
    /// Outputs of the matrix
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20), default_value_t = 32_768)]
    outputs: u32,
    /// Numbers of rows that are multiplied at a time
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=4096), default_value = "1,8,64")]
    rows: Vec<u32>,
    /// Device: auto, gpu, gpu:NAME or cpu
    #[arg(long, value_parser = common::parse_device, default_value = "auto")]
    device: String,
    /// Threads of the CPU backend; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// exact computes products in f32, fast with 8-bit inputs
    #[arg(long, value_name = "exact|fast", value_parser = parse_precision, default_value = "fast")]
    precision: Precision,
    /// How a GPU computes steps of many rows: fast takes its tensor cores, where it has them
    #[arg(long, value_name = "invariant|fast", value_parser = parse_prefill, default_value = "invariant")]
    prefill: Prefill,
    /// Times that each product is measured
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), default_value_t = 5)]
    repeat: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `bench kernels`.
///
/// # Errors
/// What the device reports.
pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let settings = kernels::Settings {
        types: if args.r#type.is_empty() { all().collect() } else { args.r#type.clone() },
        inputs: args.inputs as usize,
        outputs: args.outputs as usize,
        rows: args.rows.iter().map(|&rows| rows as usize).collect(),
        device: args.device.clone(),
        threads: args.threads.unwrap_or_else(machine::cores) as usize,
        precision: args.precision,
        prefill: args.prefill,
        repeat: args.repeat as usize,
    };
    let bar = ProgressBar::new(settings.types.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("timing {msg:8} {bar:30} {pos}/{len}") {
        bar.set_style(style);
    }
    let report = kernels::run(&settings, &mut |index, format| {
        bar.set_position(index as u64);
        bar.set_message(name(format));
    })?;
    bar.finish_and_clear();
    if args.json {
        print(&format!("{}\n", report.to_json()))
    } else {
        print(&format!("{}\n{}", heading(&report), table(&report)))
    }
}

/// A stored type by its name, in either case.
fn parse_format(text: &str) -> Result<Format, String> {
    by_name(all(), name, text)
}

/// Inputs of a matrix: whole blocks of every type.
fn parse_inputs(text: &str) -> Result<u32, String> {
    let inputs =
        text.parse().ok().filter(|inputs| (256..=1 << 20).contains(inputs) && u32::is_multiple_of(*inputs, 256));
    inputs.ok_or_else(|| format!("expected a multiple of 256 up to {}, found {text:?}", 1 << 20))
}

fn heading(report: &Report) -> String {
    let Report { device, precision, prefill, inputs, outputs, .. } = report;
    let (precision, prefill) = (precision.name(), prefill.name());
    let bandwidth = report.bandwidth() / 1e9;
    format!(
        "{inputs} inputs, {outputs} outputs, {device}, precision {precision}, prefill {prefill}; memory reads {bandwidth:.1} GB/s\n"
    )
}

fn table(report: &Report) -> String {
    let mut table = Table::new(&["type", "rows", "a product", "bytes", "GB/s", "of memory", "GFLOP/s"]);
    for OfType { format, bandwidth, times } in &report.times {
        for time in times {
            let (bytes, work) = report.rates(time);
            table.row(vec![
                name(*format).to_owned(),
                time.rows.to_string(),
                format!("{:.3} ms", 1e3 * time.seconds),
                format!("{:.1} MB", time.bytes as f64 / 1e6),
                format!("{:.1}", bytes / 1e9),
                format!("{:.0} %", 100.0 * bytes / bandwidth),
                format!("{:.0}", work / 1e9),
            ]);
        }
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use grokpipe_kernels::ProductTime;
    use grokpipe_model::BlockType;

    use super::*;

    #[test]
    fn the_share_of_the_memory_and_the_kind_of_prefill_are_shown() {
        let time = ProductTime { rows: 8, bytes: 1_000_000, seconds: 1e-3 };
        let of_type = OfType { format: Format::Blocks(BlockType::Q8_0), bandwidth: 2e9, times: vec![time] };
        let report = Report {
            device: "cpu".into(),
            precision: Precision::Fast,
            prefill: Prefill::Invariant,
            inputs: 1000,
            outputs: 500,
            times: vec![of_type],
        };
        assert!(table(&report).contains("50 %"), "{}", table(&report));
        assert!(heading(&report).contains("prefill invariant"), "{}", heading(&report));
    }

    #[test]
    fn inputs_are_whole_blocks() {
        assert_eq!((parse_inputs("256"), parse_inputs("1048576")), (Ok(256), Ok(1 << 20)));
        for wrong in ["", "0", "255", "288", "300", "1048832", "-256", "4294967552"] {
            assert!(parse_inputs(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_stored_type_can_be_asked_for_by_the_name_that_it_is_shown_with() {
        for format in all() {
            assert_eq!(parse_format(name(format)), Ok(format));
            assert_eq!(parse_format(&name(format).to_lowercase()), Ok(format));
        }
        assert!(parse_format("q9").unwrap_err().contains("f32, int8, f16"));
    }
}

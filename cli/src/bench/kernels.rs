//! `grokpipe bench kernels`: products alone, of every stored type, by how many rows are multiplied at a time.
//!
//! Few rows read every weight for little work, so that their share of the memory's bandwidth counts; many rows work on weights
//! that are already near, so that their arithmetic does. What the memory gives is measured around each type, as it may change.

use std::error::Error;

use grokpipe_kernels::{KernelError, Precision, Prefill, ProductShape, ProductTime, select_device};
use grokpipe_model::{BlockType, Format};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::spread::median;
use crate::{
    common,
    config::{parse_precision, parse_prefill, precision_name, prefill_name},
    machine,
    rates::settled,
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
pub(super) fn run(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let threads = args.threads.unwrap_or_else(machine::cores) as usize;
    let mut device = select_device(&args.device, threads, args.precision, args.prefill)?;
    let types = if args.r#type.is_empty() { all().collect() } else { args.r#type.clone() };
    let rows: Vec<usize> = args.rows.iter().map(|&rows| rows as usize).collect();
    let (inputs, outputs) = (args.inputs as usize, args.outputs as usize);
    let bar = ProgressBar::new(types.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("timing {msg:8} {bar:30} {pos}/{len}") {
        bar.set_style(style);
    }
    let times = settled(device.as_mut(), |device| {
        bar.set_position(0);
        let mut before = device.measure_read_bandwidth(u64::MAX)?;
        let of_type = |&format: &Format| {
            bar.set_message(name(format));
            let shape = ProductShape { format, inputs, outputs };
            let times = device.time_products(shape, &rows, args.repeat as usize)?;
            let after = device.measure_read_bandwidth(u64::MAX)?;
            let bandwidth = f64::midpoint(std::mem::replace(&mut before, after), after);
            bar.inc(1);
            Ok::<_, KernelError>(OfType { format, bandwidth, times })
        };
        types.iter().map(of_type).collect::<Result<Vec<_>, _>>()
    })?;
    bar.finish_and_clear();
    let info = device.info();
    let report = Report {
        device: info.name.clone(),
        precision: precision_name(args.precision),
        // What is in use, not what was asked for: few devices have it.
        prefill: prefill_name(Prefill::of_fingerprint(&info.fingerprint)),
        inputs,
        outputs,
        times,
    };
    if args.json {
        print(&format!("{}\n", report.to_json()))?;
    } else {
        print(&format!("{}\n{}", report.heading(), report.table()))?;
    }
    Ok(())
}

/// int8 with the scale groups of the published checkpoint's row-parallel matrices.
const INT8: Format = Format::Int8 { groups: 8 };

fn all() -> impl Iterator<Item = Format> {
    [Format::F32, INT8].into_iter().chain(BlockType::all().map(Format::Blocks))
}

fn name(format: Format) -> &'static str {
    match format {
        Format::F32 => "F32",
        Format::Int8 { .. } => "int8",
        Format::Blocks(kind) => kind.name(),
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

struct Report {
    device: String,
    precision: &'static str,
    prefill: &'static str,
    inputs: usize,
    outputs: usize,
    times: Vec<OfType>,
}

/// Products with matrices of one type.
struct OfType {
    format: Format,
    /// Bytes a second that the memory gave before and after, the mean.
    bandwidth: f64,
    times: Vec<ProductTime>,
}

impl Report {
    /// Bytes a second that the memory gave, the median over the types.
    fn bandwidth(&self) -> f64 {
        median(self.times.iter().map(|of_type| of_type.bandwidth))
    }

    /// Bytes and multiply-adds times two a second.
    fn rates(&self, time: &ProductTime) -> (f64, f64) {
        let work = 2.0 * (time.rows * self.inputs * self.outputs) as f64;
        (time.bytes as f64 / time.seconds, work / time.seconds)
    }

    fn heading(&self) -> String {
        let Self { device, precision, prefill, inputs, outputs, .. } = self;
        let bandwidth = self.bandwidth() / 1e9;
        format!(
            "{inputs} inputs, {outputs} outputs, {device}, precision {precision}, prefill {prefill}; memory reads {bandwidth:.1} GB/s\n"
        )
    }

    fn table(&self) -> String {
        let mut table = Table::new(&["type", "rows", "a product", "bytes", "GB/s", "of memory", "GFLOP/s"]);
        for OfType { format, bandwidth, times } in &self.times {
            for time in times {
                let (bytes, work) = self.rates(time);
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

    fn to_json(&self) -> Value {
        let results = self.times.iter().flat_map(|OfType { format, bandwidth, times }| {
            times.iter().map(move |time| {
                let (bytes, work) = self.rates(time);
                json!({
                    "type": name(*format),
                    "rows": time.rows,
                    "seconds": time.seconds,
                    "bytes": time.bytes,
                    "gigabytes_per_second": bytes / 1e9,
                    "read_gigabytes_per_second": bandwidth / 1e9,
                    "share_of_bandwidth": bytes / bandwidth,
                    "gigaflops_per_second": work / 1e9,
                })
            })
        });
        json!({
            "machine": { "device": self.device, "read_gigabytes_per_second": self.bandwidth() / 1e9 },
            "precision": self.precision,
            "prefill": self.prefill,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "results": results.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn rates_are_of_bytes_and_of_work() {
        let time = ProductTime { rows: 8, bytes: 1_000_000, seconds: 1e-3 };
        let (inputs, outputs) = (1000, 500);
        let of_type = |kind, bandwidth| OfType { format: Format::Blocks(kind), bandwidth, times: vec![time] };
        let times = vec![of_type(BlockType::Q8_0, 2e9), of_type(BlockType::Q4K, 4e9)];
        let (precision, prefill) = ("fast", "invariant");
        let report = Report { device: "cpu".into(), precision, prefill, inputs, outputs, times };
        let json = report.to_json();
        assert_eq!(json["results"][0]["share_of_bandwidth"], 0.5);
        assert_eq!(json["results"][1]["share_of_bandwidth"], 0.25);
        assert_eq!(json["machine"]["read_gigabytes_per_second"], 3.0);
        assert_eq!(json["results"][0]["gigaflops_per_second"], 8.0);
        assert!(report.table().contains("50 %"), "{}", report.table());
        assert_eq!(json["prefill"], "invariant");
        assert!(report.heading().contains("prefill invariant"), "{}", report.heading());
    }
}

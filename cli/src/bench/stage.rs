//! `grokpipe bench stage`: tokens a second of some layers, of a model or with weights from a seed.

use std::{ops::Range, path::PathBuf};

use grokpipe_bench::{
    COUNTED, Spread, WARM_UP_STEPS,
    stage::{self, Report},
};

use super::{TestArgs, open, parse_layers, progress_bar, show};
use crate::{
    common,
    error::CliError,
    machine, paths,
    text::{Table, print},
    weights::{SyntheticArgs, Weights},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model to measure; without one, weights from a seed
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: Option<PathBuf>,
    #[command(flatten)]
    synthetic: SyntheticArgs,
    /// Layers, the second number not included [default: all of a model, 0..1 of weights from a seed]
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<u32>>,
    /// Device: auto, gpu, gpu:NAME or cpu
    #[arg(long, value_parser = common::parse_device, default_value = "auto")]
    device: String,
    /// Threads of the CPU backend; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Tokens that each sequence decodes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), default_value_t = 16)]
    r#gen: u32,
    #[command(flatten)]
    tests: TestArgs,
}

/// Runs `bench stage`.
///
/// # Errors
/// What the model or the device reports.
pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let Weights { config, source: weights, .. } = open(args.model.as_deref(), &args.synthetic)?;
    let all = 0..config.num_hidden_layers;
    let layers = args.layers.clone().unwrap_or(if args.model.is_some() { all.clone() } else { 0..1 });
    if layers.end > all.end {
        return Err(CliError::usage(format!("--layers is {}..{}", layers.start, layers.end))
            .because(format!("expected layers within 0..{}", all.end)));
    }
    let context = config.max_position_embeddings;
    let settings = stage::Settings {
        config,
        weights,
        layers,
        // Of a model's last layers, as it is used; alone, layers are measured without it.
        head: args.model.is_some(),
        device: args.device.clone(),
        threads: args.threads.unwrap_or_else(machine::cores) as usize,
        precision: args.tests.precision,
        prefill: args.tests.prefill,
        prompts: args.tests.prompt.clone(),
        batches: args.tests.batch.clone(),
        decoded: args.r#gen,
        repeat: args.tests.repeat,
    };
    check_context(settings.longest(), context)?;
    let report = stage::run(&settings, &mut show(progress_bar()))?;
    if args.tests.json { print(&format!("{}\n", report.to_json())) } else { print(&render(&report)) }
}

/// Refuses sequences that are longer than a model's context, before it is loaded.
fn check_context(longest: u32, context: usize) -> Result<(), CliError> {
    if longest as usize <= context {
        return Ok(());
    }
    Err(CliError::usage(format!("--prompt or --gen, with {WARM_UP_STEPS} steps before it, takes {longest} tokens"))
        .because(format!("the model's context is {context}")))
}

/// For people.
fn render(report: &Report) -> String {
    let gigabytes = report.weights_bytes as f64 / 1e9;
    let mut text =
        format!("{}, layers {}..{}, {}\n", report.model, report.layers.start, report.layers.end, report.device);
    let rate = gigabytes / report.load_seconds;
    let peak = report.peak_memory.map_or(String::new(), |bytes| format!(", peak memory {:.2} GB", bytes as f64 / 1e9));
    text += &format!("loaded {gigabytes:.2} GB in {:.1} s, {rate:.1} GB/s{peak}\n", report.load_seconds);
    let (precision, prefill) = (report.precision.name(), report.prefill.name());
    let (gigabytes, when) = (report.bandwidth.gigabytes(), report.bandwidth.when());
    text += &format!("precision {precision}, prefill {prefill}; memory reads {gigabytes:.1} GB/s, measured {when}\n\n");
    let mut table =
        Table::new(&["test", "tokens/s", "least", "most", "a token", "reads", "GB/s", "of memory", "GFLOP/s"]);
    for measured in &report.results {
        let Spread { median: rate, least, most } = measured.rates();
        let bytes = report.bytes_a_token(measured);
        let name = match measured.test {
            "decode" => format!("decode × {}", measured.batch),
            _ => format!("prefill {}", measured.prompt),
        };
        table.row(vec![
            name,
            format!("{rate:.1}"),
            format!("{least:.1}"),
            format!("{most:.1}"),
            format!("{:.2} ms", 1e3 / rate),
            format!("{:.3} GB", bytes / 1e9),
            format!("{:.1}", bytes * rate / 1e9),
            format!("{:.0} %", 100.0 * measured.share(bytes)),
            format!("{:.0}", 2e-9 * report.multiply_adds_a_token(measured) * rate),
        ]);
    }
    text + &format!("{table}\nbytes are counted {COUNTED}\n")
}

#[cfg(test)]
mod tests {
    use grokpipe_bench::{
        Reads,
        stage::{Bandwidth, Measured, Run},
    };
    use grokpipe_kernels::{Precision, Prefill};

    use super::*;
    use crate::{error::Code, weights::Shape};

    #[test]
    fn each_test_has_a_row() {
        let weights = Weights::synthetic(Shape::Tiny, None, None).unwrap();
        let run = || vec![Run { seconds: 1.0, bandwidth: 1e9 }];
        let report = Report {
            model: weights.config.name.clone(),
            device: "cpu".into(),
            threads: 1,
            precision: Precision::Fast,
            prefill: Prefill::Invariant,
            layers: 0..2,
            weights_bytes: 1000,
            load_seconds: 1.0,
            peak_memory: None,
            bandwidth: Bandwidth::AroundRuns(1e9),
            reads: Reads::of(&weights.config, weights.source.as_ref(), &(0..2), false).unwrap(),
            results: vec![
                Measured { test: "decode", batch: 3, prompt: 0, tokens: 12, runs: run() },
                Measured { test: "prefill", batch: 1, prompt: 40, tokens: 40, runs: run() },
            ],
        };
        let text = render(&report);
        assert!(text.contains("decode × 3") && text.contains("prefill 40"), "{text}");
    }

    #[test]
    fn sequences_longer_than_the_context_are_refused() {
        assert!(check_context(128, 128).is_ok());
        let refused = check_context(129, 128).unwrap_err();
        assert_eq!(refused.code(), Code::Usage);
        assert!(refused.to_string().contains("129") && refused.to_string().contains("128"), "{refused}");
    }
}

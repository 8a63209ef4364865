//! `grokpipe bench pipeline`: several workers against one, over the same layers, in the manner of `bench stage`.

mod workers;

use std::{ffi::OsString, ops::Range, path::PathBuf};

use grokpipe_bench::{
    COUNTED, Reads, median,
    pipeline::{self, HopCost, Report, Test},
};
use grokpipe_coordinator::facts::ModelFacts;

use self::workers::Processes;
use super::{TestArgs, open, parse_layers, progress_bar, show};
use crate::{
    common,
    config::{self, SecretText},
    ending::{Stdin, shutdown_token},
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
    /// Layers, the second number not included, without the model's last [default: all others of a model, 0..N of weights from a seed]
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<u32>>,
    /// Workers that share the layers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=64), default_value_t = 2)]
    workers: u32,
    /// Device of each worker: auto, gpu, gpu:NAME or cpu
    #[arg(long, value_parser = common::parse_device, default_value = "auto")]
    device: String,
    /// CPU threads of each worker
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), default_value_t = 1)]
    threads: u32,
    /// Tokens that each sequence decodes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), default_value_t = 64)]
    r#gen: u32,
    #[command(flatten)]
    tests: TestArgs,
}

/// Runs `bench pipeline`; no process is left when it returns.
///
/// # Errors
/// What the workers report, and when the two arrangements do not hand on the same bytes.
pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let weights = open(args.model.as_deref(), &args.synthetic)?;
    let layers = layers(args, &weights)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::failed("the runtime could not start").because(error))?;
    let measured = runtime.block_on(measure(args, &weights, layers));
    runtime.shutdown_background();
    let report = measured?;
    if args.tests.json {
        print(&format!("{}\n", report.to_json()))?;
    } else {
        print(&render(&report))?;
    }
    match report.difference {
        None => Ok(()),
        Some(place) => {
            Err(CliError::failed(format!("{} workers hand on other hidden states than one does", args.workers))
                .at(place))
        }
    }
}

/// The layers to measure. The model's last one belongs with the head, and a stage with the head hands on tokens, not hidden states.
fn layers(args: &Args, weights: &Weights) -> Result<Range<u32>, CliError> {
    let all = 0..weights.config.num_hidden_layers.saturating_sub(1);
    let few = 0..args.workers.min(all.end);
    let layers = args.layers.clone().unwrap_or(if args.model.is_some() { all.clone() } else { few });
    if layers.end > all.end {
        return Err(CliError::usage(format!("--layers is {}..{}", layers.start, layers.end))
            .because(format!("expected layers within {}..{}: the last one hands on tokens", all.start, all.end)));
    }
    if (layers.len() as u64) < u64::from(args.workers) {
        return Err(CliError::usage(format!("--workers is {}", args.workers))
            .because(format!("expected at most one for each of {} layers", layers.len())));
    }
    Ok(layers)
}

async fn measure(args: &Args, weights: &Weights, layers: Range<u32>) -> Result<Report, CliError> {
    let program = std::env::current_exe()
        .map_err(|error| CliError::failed("this program's own path is not known").because(error))?;
    let secret = SecretText::random()?;
    let settings = pipeline::Settings {
        facts: ModelFacts::of_weights(weights.config.clone(), weights.digest.clone(), weights.source.as_ref())?,
        reads: Reads::of(&weights.config, weights.source.as_ref(), &layers, false)?,
        layers,
        workers: args.workers,
        threads: args.threads,
        precision: args.tests.precision,
        tests: tests(args),
        repeat: args.tests.repeat,
        secret: secret.to_secret(),
        link_key: config::link_key()?,
        generation: machine::generation().into(),
    };
    let interrupted = shutdown_token(&Stdin::default())?;
    let mut workers = Processes::new(program, flags(args), secret);
    Ok(pipeline::run(&settings, &mut workers, &mut show(progress_bar()), interrupted).await?)
}

fn tests(args: &Args) -> Vec<Test> {
    let decodes = args.tests.batch.iter().map(|&batch| Test::Decode { batch, tokens: args.r#gen });
    decodes.chain(args.tests.prompt.iter().map(|&prompt| Test::Prefill { prompt })).collect()
}

/// The flags of every worker for its weights and its device.
fn flags(args: &Args) -> Vec<OsString> {
    let mut flags: Vec<OsString> = match &args.model {
        Some(path) => vec!["--model".into(), path.into()],
        None => {
            let shape = args.synthetic.synthetic.unwrap_or(crate::weights::Shape::Grok1);
            let synthetic = SyntheticArgs { synthetic: Some(shape), ..args.synthetic.clone() };
            synthetic.to_flags().into_iter().map(OsString::from).collect()
        }
    };
    let threads = args.threads.to_string();
    let (precision, prefill) = (args.tests.precision.name(), args.tests.prefill.name());
    let more = ["--device", &args.device, "--threads", &threads, "--precision", precision, "--prefill", prefill];
    flags.extend(more.map(OsString::from));
    flags
}

/// For people.
fn render(report: &Report) -> String {
    let Report { model, device, precision, prefill, layers, .. } = report;
    let (precision, prefill) = (precision.name(), prefill.name());
    let Range { start, end } = layers;
    let mut text =
        format!("{model}, layers {start}..{end}, {device} a worker, precision {precision}, prefill {prefill}");
    text += &format!("; memory read {:.1} GB/s when a worker started\n\n", report.bandwidth / 1e9);
    let mut table = Table::new(&["test", "workers", "tokens/s", "least", "most", "a token", "GB/s", "of memory"]);
    for (test, workers, timed) in report.rows() {
        let (rates, bytes) = (timed.rates(test), report.bytes_a_token(test));
        table.row(vec![
            test.to_string(),
            workers.to_string(),
            format!("{:.2}", rates.median),
            format!("{:.2}", rates.least),
            format!("{:.2}", rates.most),
            format!("{:.3} ms", 1e3 / rates.median),
            format!("{:.1}", bytes * rates.median / 1e9),
            format!("{:.0} %", 100.0 * bytes * rates.median / report.bandwidth),
        ]);
    }
    text += &format!("{table}\nbytes are counted {COUNTED}\n\n");
    let mut table = Table::new(&["test", "worker", "layers", "compute", "queue", "wire"]);
    for (test, _workers, timed) in report.rows() {
        for stage in &timed.stages {
            let milliseconds = |values: &[f64]| format!("{:.3} ms", median(values.to_vec()) / 1e3);
            table.row(vec![
                test.to_string(),
                stage.worker.clone(),
                format!("{}..{}", stage.layers.start, stage.layers.end),
                milliseconds(&stage.compute),
                milliseconds(&stage.queue),
                milliseconds(&stage.wire),
            ]);
        }
    }
    text += &format!("{table}\n");
    for (test, workers, timed) in report.rows() {
        if let Some(prediction) = timed.prediction(test) {
            text += &format!("{test}, {workers}: {prediction}\n");
        }
    }
    for tested in &report.tests {
        let HopCost { seconds, share, spread } = tested.hop_cost(report.hops());
        text += &format!(
            "{}: a hop costs {:.3} ms, {:.2} % ({:.2} to {:.2} % by run)\n",
            tested.test,
            1e3 * seconds,
            100.0 * share,
            100.0 * spread.least,
            100.0 * spread.most
        );
    }
    text + &match &report.difference {
        None => format!("hidden states: the same bytes in all {} frames\n", report.compared),
        Some(place) => format!("hidden states differ: {place}\n"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use grokpipe_bench::pipeline::{Tested, Timed};
    use grokpipe_kernels::{Precision, Prefill};

    use super::*;
    use crate::weights::Shape;

    #[test]
    fn predictions_and_whether_bytes_are_equal_are_shown() {
        let weights = Weights::synthetic(Shape::Tiny, None, None).unwrap();
        let runs = [[0.1, 0.2, 0.1], [0.2, 0.3, 0.1], [0.3, 0.1, 0.1]];
        let timed = || Timed { runs: runs.map(Vec::from).to_vec(), stages: Vec::new(), predicted: Some(8.0) };
        let mut report = Report {
            model: weights.config.name.clone(),
            device: "cpu".into(),
            threads: 1,
            precision: Precision::Fast,
            prefill: Prefill::Invariant,
            layers: 0..3,
            workers: 3,
            bandwidth: 1e9,
            reads: Reads::of(&weights.config, weights.source.as_ref(), &(0..3), false).unwrap(),
            tests: vec![Tested { test: Test::Decode { batch: 1, tokens: 3 }, alone: timed(), split: timed() }],
            compared: 12,
            difference: None,
        };
        let text = render(&report);
        assert!(text.contains("the same bytes in all 12 frames"), "{text}");
        assert!(text.contains("decode × 1, 1: predicted 8.0 tokens/s, measured 6.0, −25 %"), "{text}");
        report.difference = Some("here".into());
        assert!(render(&report).contains("hidden states differ: here"));
    }

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn layers_of(line: &str) -> Result<Range<u32>, String> {
        let line =
            Line::try_parse_from(std::iter::once("x").chain(line.split_whitespace())).map_err(|e| e.to_string())?;
        let weights = open(line.args.model.as_deref(), &line.args.synthetic).map_err(|e| e.to_string())?;
        layers(&line.args, &weights).map_err(|error| error.to_string())
    }

    #[test]
    fn layers_end_before_the_head_and_suffice_for_the_workers() {
        assert_eq!(layers_of("--synthetic tiny"), Ok(0..2));
        assert_eq!(layers_of("--synthetic tiny --workers 3 --layers 5..9"), Ok(5..9));
        for (line, part) in [
            ("--synthetic tiny --layers 60..64", "within 0..63"),
            ("--synthetic tiny --layers 0..2 --workers 3", "2 layers"),
            ("--synthetic tiny --workers 1", "2..=64"),
        ] {
            let error = layers_of(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn workers_are_told_what_is_measured() {
        let line = Line::try_parse_from(["x", "--type", "q4_0", "--synthetic", "tiny", "--threads", "3"]).unwrap();
        let flags: Vec<String> = flags(&line.args).iter().map(|flag| flag.to_string_lossy().into_owned()).collect();
        assert_eq!(
            flags.join(" "),
            "--synthetic tiny --type q4_0 --device auto --threads 3 --precision fast --prefill invariant"
        );
        let line = Line::try_parse_from(["x"]).unwrap();
        assert!(flags_text(&line.args).starts_with("--synthetic grok1 --device"), "Grok-1 if nothing is said");
    }

    fn flags_text(args: &Args) -> String {
        flags(args).iter().map(|flag| flag.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }
}

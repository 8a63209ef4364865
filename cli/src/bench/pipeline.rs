//! `grokpipe bench pipeline`: several workers against one, over the same layers, in the manner of `bench stage`.
//!
//! The workers are the processes that serve, with the links, frames and checksums of a cluster; this process plays the coordinator's
//! part and that of the stage which follows the last. Every step is run by one worker and by several, right after one another and
//! in turn first, so that what the machine does meanwhile disturbs both alike. What the last stages hand on must be the same bytes.

mod port;
mod report;
mod stages;
mod workload;

use std::{error::Error, ffi::OsString, ops::Range, path::PathBuf};

use grokpipe_coordinator::{
    facts::{self, ModelFacts, PlanRequirements},
    planner::{self, Objective, Overhead, WorkerResources},
};
use grokpipe_kernels::Prefill;
use grokpipe_proto::v1::Frame;

use self::{
    report::{Report, Tested, Timed},
    stages::{Arrangement, Cluster, Member, Setup},
    workload::Test,
};
use super::{TestArgs, open, parse_layers, progress_bar, reads::Reads};
use crate::{
    common,
    config::{precision_name, prefill_name},
    ending::{Stdin, shutdown_token},
    error::CliError,
    paths,
    plan::even_shares,
    text::print,
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
pub(super) fn run(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
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
        print(&report.render())?;
    }
    match report.difference {
        None => Ok(()),
        Some(place) => {
            Err(CliError::failed(format!("{} workers hand on other hidden states than one does", args.workers))
                .at(place)
                .into())
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
    let reads = Reads::of(&weights.config, weights.source.as_ref(), &layers, false)?;
    let facts = ModelFacts::of_weights(weights.config.clone(), weights.digest.clone(), weights.source.as_ref())?;
    let facts = facts.part(layers.clone());
    let tests = tests(args);
    let setup = Setup {
        program: std::env::current_exe()
            .map_err(|error| CliError::failed("this program's own path is not known").because(error))?,
        flags: flags(args),
        config: weights.config.clone(),
        digest: weights.digest.clone(),
        kv_blocks: tests.iter().map(|test| test.kv_blocks()).max().unwrap_or(1),
        max_batch_tokens: tests.iter().map(|test| test.rows()).max().unwrap_or(1),
    };
    let interrupted = shutdown_token(&Stdin::default())?;
    let mut cluster = Cluster::open(setup).await?;
    let outcome = tokio::select! {
        outcome = async {
            let arrangements = start(&mut cluster, &layers, args.workers).await?;
            let mut bench = Bench::new(&mut cluster, &arrangements, weights, layers.start == 0);
            let mut tested = Vec::new();
            for &test in &tests {
                let mut found = bench.test(test, args.tests.repeat).await?;
                found.alone.predicted = Some(predicted(&facts, &arrangements[0], test)?);
                found.split.predicted = Some(predicted(&facts, &arrangements[1], test)?);
                tested.push(found);
            }
            let hello = &arrangements[0].members[0].hello;
            Ok(Report {
                model: weights.config.name.clone(),
                device: hello.device.clone(),
                threads: args.threads,
                precision: precision_name(args.tests.precision),
                prefill: prefill_name(Prefill::of_fingerprint(&hello.fingerprint)),
                layers,
                workers: args.workers,
                bandwidth: hello.read_bandwidth,
                reads,
                tests: tested,
                compared: bench.compared,
                difference: bench.difference.take(),
            })
        } => outcome,
        () = interrupted.cancelled() => Err(CliError::failed("cancelled")),
    };
    cluster.end().await;
    outcome
}

/// Tokens a second by the planner's word: frames that are under way together follow one another through the stages.
fn predicted(facts: &ModelFacts, arrangement: &Arrangement, test: Test) -> Result<f64, CliError> {
    let mut free_at = vec![0.0; arrangement.members.len()];
    for rows in test.step_rows() {
        let mut arrives_at: f64 = 0.0;
        for (free_at, seconds) in free_at.iter_mut().zip(step_seconds(facts, arrangement, rows)?) {
            *free_at = arrives_at.max(*free_at) + seconds;
            arrives_at = *free_at;
        }
    }
    let tokens: u32 = test.step_rows().iter().sum();
    Ok(f64::from(tokens) / free_at.last().copied().unwrap_or(f64::NAN))
}

/// Seconds that a frame of so many rows takes in each stage, with the hop to the next.
fn step_seconds(facts: &ModelFacts, arrangement: &Arrangement, rows: u32) -> Result<Vec<f64>, CliError> {
    let first = arrangement.members.first().map_or(0, |member| member.layers.start);
    let worker = |member: &Member| {
        let told = facts::resources(&member.hello.clone().into());
        WorkerResources {
            // It fits: it has been loaded. No token is drawn.
            memory_bytes: u64::MAX,
            overhead: Overhead { draw_seconds: 0.0, ..told.overhead },
            pinned_layers: Some(member.layers.start - first..member.layers.end - first),
            ..told
        }
    };
    let requirements =
        PlanRequirements { kv_tokens: 0, max_batch_tokens: 1, batch_tokens: rows, objective: Objective::Latency };
    let plan = planner::plan(&facts.problem(&requirements, arrangement.members.iter().map(worker).collect(), None));
    let plan = plan.map_err(|refusal| CliError::failed("no prediction can be made").because(refusal))?;
    Ok(plan.stages.iter().map(|stage| stage.step_seconds).collect())
}

fn tests(args: &Args) -> Vec<Test> {
    let decodes = args.tests.batch.iter().map(|&batch| Test::Decode { batch, tokens: args.r#gen });
    decodes.chain(args.tests.prompt.iter().map(|&prompt| Test::Prefill { prompt })).collect()
}

/// What every worker is told of its weights and its device.
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
    let (precision, prefill) = (precision_name(args.tests.precision), prefill_name(args.tests.prefill));
    let more = ["--device", &args.device, "--threads", &threads, "--precision", precision, "--prefill", prefill];
    flags.extend(more.map(OsString::from));
    flags
}

/// One worker with all layers, and several that share them, all loaded.
async fn start(cluster: &mut Cluster, layers: &Range<u32>, workers: u32) -> Result<[Arrangement; 2], CliError> {
    let available = grokpipe_kernels::available_memory_bytes();
    // Half for each arrangement, and there by layers.
    let memory = |run: &Range<u32>| Some((available? as f64 / 2.0 * run.len() as f64 / layers.len() as f64) as u64);
    let shares = even_shares(layers.clone(), workers);
    let named = (1..).zip(shares).map(|(number, run): (u32, _)| (format!("w{number}"), run)).collect();
    let alone = cluster.start(1, vec![("alone".to_owned(), layers.clone())], memory).await?;
    let split = cluster.start(2, named, memory).await?;
    let mut arrangements = [alone, split];
    let progress = progress_bar();
    cluster.load(&mut arrangements, &progress).await?;
    progress.finish_and_clear();
    Ok(arrangements)
}

/// Runs tests through both arrangements and compares what comes out.
struct Bench<'a> {
    cluster: &'a mut Cluster,
    arrangements: &'a [Arrangement; 2],
    weights: &'a Weights,
    is_first: bool,
    /// The next sequence's number; those in `open` are ended by the next run.
    next_sequence: u64,
    open: Range<u64>,
    /// Which arrangement is first in the next pair.
    first: usize,
    compared: usize,
    difference: Option<String>,
}

impl<'a> Bench<'a> {
    fn new(cluster: &'a mut Cluster, arrangements: &'a [Arrangement; 2], weights: &'a Weights, is_first: bool) -> Self {
        let (compared, difference) = (0, None);
        Self { cluster, arrangements, weights, is_first, next_sequence: 1, open: 1..1, first: 0, compared, difference }
    }

    async fn test(&mut self, test: Test, repeat: u32) -> Result<Tested, CliError> {
        let mut timed = [Timed::default(), Timed::default()];
        // A prompt has no steps to warm up with: one run more, which does not count.
        let uncounted = u32::from(matches!(test, Test::Prefill { .. }));
        for run in 0..repeat + uncounted {
            let counts = run >= uncounted;
            if counts {
                timed.iter_mut().for_each(|timed| timed.runs.push(Vec::new()));
            }
            let sequences = self.next_sequence..self.next_sequence + u64::from(test.batch());
            let steps = test.run(&self.weights.config, self.is_first, sequences.start, self.open.clone());
            (self.next_sequence, self.open) = (sequences.end, sequences);
            for (index, step) in steps.into_iter().enumerate() {
                let mut pair = [Vec::new(), Vec::new()];
                for which in [self.first, 1 - self.first] {
                    let ran = self.cluster.run(&self.arrangements[which], &step.frames).await?;
                    if counts && step.counts {
                        timed[which].runs.iter_mut().last().into_iter().for_each(|run| run.push(ran.seconds));
                        ran.frames.iter().for_each(|frame| timed[which].frame(&frame.timings));
                    }
                    pair[which] = ran.frames;
                }
                self.first = 1 - self.first;
                let [alone, split] = &pair;
                self.compared += alone.len();
                if self.difference.is_none() {
                    let found = alone.iter().zip(split).find_map(|(alone, split)| difference(alone, split));
                    self.difference = found.map(|at| format!("{test}, run {run}, step {index}, {at}"));
                }
            }
        }
        let [alone, split] = timed;
        Ok(Tested { test, alone, split })
    }
}

/// Where the hidden states of two frames first differ.
fn difference(alone: &Frame, split: &Frame) -> Option<String> {
    let (alone, split) = (alone.hidden_states.as_ref()?, split.hidden_states.as_ref()?);
    if alone.data == split.data {
        return None;
    }
    let numbers =
        |data: &[u8]| -> Vec<f32> { data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect() };
    let (a, b) = (numbers(&alone.data), numbers(&split.data));
    let common = a.len().min(b.len());
    // Data of which one is only longer differ behind the common part.
    let at = (0..common).find(|&at| a[at].to_bits() != b[at].to_bits()).unwrap_or(common);
    let (Some(one), Some(other)) = (a.get(at), b.get(at)) else {
        return Some(format!("{} numbers of one worker, {} of several", a.len(), b.len()));
    };
    let (row, column) = (at / (alone.width as usize).max(1), at % (alone.width as usize).max(1));
    Some(format!("row {row}, column {column}: {one:e} of one worker, {other:e} of several"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use grokpipe_proto::hidden_states::encode;

    use super::*;

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

    #[test]
    fn the_first_different_number_is_named() {
        let frame = |values: &[f32]| Frame { hidden_states: Some(encode(values, 2)), ..Frame::default() };
        let one = frame(&[1.0, 2.0, 0.0, 4.0]);
        assert_eq!(difference(&one, &one.clone()), None);
        let text = difference(&one, &frame(&[1.0, 2.0, -0.0, 5.0])).unwrap();
        assert!(text.starts_with("row 1, column 0"), "{text}: equal numbers of other bytes differ too");
        assert!(difference(&one, &frame(&[1.0, 2.0])).unwrap().starts_with("4 numbers"));
    }
}

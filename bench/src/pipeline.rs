//! Several workers against one, over the same layers.
//!
//! The workers are ordinary worker processes, with the links, frames and checksums of a cluster. This process takes the part of the
//! coordinator, with the coordinator's port and planner, and of the stage after the last one. One worker and several run every step in
//! turn, so that other load on the machine disturbs both alike. The last stages must send the same bytes.

mod port;
mod report;
mod stages;
mod workload;

use std::ops::Range;

use grokpipe_coordinator::{
    facts::{self, ModelFacts, PlanRequirements},
    planner::{self, Objective, Overhead, WorkerResources},
};
use grokpipe_kernels::{Precision, Prefill};
use grokpipe_model::ModelConfig;
use grokpipe_proto::{
    ids::{Generation, PlanEpoch},
    link_token::LinkKey,
    secret::Secret,
    v1::Frame,
};
use tokio_util::sync::CancellationToken;

use self::stages::{Arrangement, Cluster, Member, Setup};
pub use self::{
    report::{HopCost, Report, StageTimes, Tested, Timed},
    stages::{Launch, Workers},
    workload::Test,
};
use crate::{BenchError, Loading, Reads};

/// What is measured, and by whom.
#[derive(Clone)]
pub struct Settings {
    /// The model.
    pub facts: ModelFacts,
    /// What steps read of the layers.
    pub reads: Reads,
    /// The layers, without the model's last: a stage with the head hands on tokens.
    pub layers: Range<u32>,
    /// Workers that share them; at most one a layer.
    pub workers: u32,
    /// Threads of each worker.
    pub threads: u32,
    /// How exactly the workers compute products.
    pub precision: Precision,
    /// What is timed.
    pub tests: Vec<Test>,
    /// Times that each test is measured.
    pub repeat: u32,
    /// The secret that the workers present.
    pub secret: Secret,
    /// What the tokens of links are derived from: random bytes of this process.
    pub link_key: LinkKey,
    /// As a coordinator's: larger than that of every earlier run.
    pub generation: Generation,
}

/// Starts the workers, times them, and ends them; none is left when it returns. `progress` hears how far loading is.
///
/// # Errors
/// What the workers report, and [`BenchError::Cancelled`]. Hidden states that differ are in the report.
pub async fn run<W: Workers>(
    settings: &Settings,
    workers: &mut W,
    progress: &mut dyn FnMut(Loading),
    interrupted: CancellationToken,
) -> Result<Report, BenchError> {
    let config = &settings.facts.config;
    let setup = Setup {
        config: config.clone(),
        digest: settings.facts.digest.clone(),
        secret: settings.secret.clone(),
        link_key: settings.link_key.clone(),
        generation: settings.generation,
        kv_blocks: settings.tests.iter().map(|test| test.kv_blocks()).max().unwrap_or(1),
        max_batch_tokens: settings.tests.iter().map(|test| test.rows()).max().unwrap_or(1),
    };
    let mut cluster = Cluster::open(setup, workers).await?;
    let outcome = tokio::select! {
        outcome = measure(settings, &mut cluster, progress) => outcome,
        () = interrupted.cancelled() => Err(BenchError::Cancelled),
    };
    cluster.end().await;
    outcome
}

async fn measure<W: Workers>(
    settings: &Settings,
    cluster: &mut Cluster<'_, W>,
    progress: &mut dyn FnMut(Loading),
) -> Result<Report, BenchError> {
    let (layers, config) = (&settings.layers, &settings.facts.config);
    let facts = settings.facts.clone().part(layers.clone());
    let arrangements = start(cluster, layers, settings.workers, progress).await?;
    let mut bench = Bench::new(cluster, &arrangements, config, layers.start == 0);
    let mut tested = Vec::new();
    for &test in &settings.tests {
        let mut found = bench.test(test, settings.repeat).await?;
        found.alone.predicted = Some(predicted(&facts, &arrangements[0], test)?);
        found.split.predicted = Some(predicted(&facts, &arrangements[1], test)?);
        tested.push(found);
    }
    let hello = &arrangements[0].members[0].hello;
    Ok(Report {
        model: config.name.clone(),
        device: hello.device.clone(),
        threads: settings.threads,
        precision: settings.precision,
        prefill: Prefill::of_fingerprint(&hello.fingerprint),
        layers: layers.clone(),
        workers: settings.workers,
        bandwidth: hello.read_bandwidth,
        reads: settings.reads.clone(),
        tests: tested,
        compared: bench.compared,
        difference: bench.difference.take(),
    })
}

/// Tokens a second as the planner predicts them: frames that are under way together follow one another through the stages.
fn predicted(facts: &ModelFacts, arrangement: &Arrangement, test: Test) -> Result<f64, BenchError> {
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
fn step_seconds(facts: &ModelFacts, arrangement: &Arrangement, rows: u32) -> Result<Vec<f64>, BenchError> {
    let first = arrangement.members.first().map_or(0, |member| member.layers.start);
    let worker = |member: &Member| {
        let offered = facts::resources(&member.hello);
        WorkerResources {
            // It fits: it has been loaded. No token is drawn.
            memory_bytes: u64::MAX,
            overhead: Overhead { draw_seconds: 0.0, ..offered.overhead },
            pinned_layers: Some(member.layers.start - first..member.layers.end - first),
            ..offered
        }
    };
    let requirements =
        PlanRequirements { kv_tokens: 0, max_batch_tokens: 1, batch_tokens: rows, objective: Objective::Latency };
    let plan = planner::plan(&facts.problem(&requirements, arrangement.members.iter().map(worker).collect(), None));
    let plan = plan.map_err(BenchError::NoPrediction)?;
    Ok(plan.stages.iter().map(|stage| stage.step_seconds).collect())
}

/// One worker with all layers, and several that share them, all loaded.
async fn start<W: Workers>(
    cluster: &mut Cluster<'_, W>,
    layers: &Range<u32>,
    workers: u32,
    progress: &mut dyn FnMut(Loading),
) -> Result<[Arrangement; 2], BenchError> {
    let available = grokpipe_kernels::available_memory_bytes();
    // Half for each arrangement, and there by layers.
    let memory = |run: &Range<u32>| Some((available? as f64 / 2.0 * run.len() as f64 / layers.len() as f64) as u64);
    let shares = planner::even_shares(layers.clone(), workers);
    let named = (1..).zip(shares).map(|(number, run): (u32, _)| (format!("w{number}"), run)).collect();
    let alone = cluster.start(PlanEpoch(1), vec![("alone".to_owned(), layers.clone())], memory).await?;
    let split = cluster.start(PlanEpoch(2), named, memory).await?;
    let mut arrangements = [alone, split];
    cluster.load(&mut arrangements, progress).await?;
    progress(Loading::Done);
    Ok(arrangements)
}

/// Runs tests through both arrangements and compares what comes out.
struct Bench<'a, 'w, W> {
    cluster: &'a mut Cluster<'w, W>,
    arrangements: &'a [Arrangement; 2],
    config: &'a ModelConfig,
    is_first: bool,
    /// The next sequence's number; those in `open` are ended by the next run.
    next_sequence: u64,
    open: Range<u64>,
    /// Which arrangement is first in the next pair.
    first: usize,
    compared: usize,
    difference: Option<String>,
}

impl<'a, 'w, W: Workers> Bench<'a, 'w, W> {
    fn new(
        cluster: &'a mut Cluster<'w, W>,
        arrangements: &'a [Arrangement; 2],
        config: &'a ModelConfig,
        is_first: bool,
    ) -> Self {
        let (compared, difference) = (0, None);
        Self { cluster, arrangements, config, is_first, next_sequence: 1, open: 1..1, first: 0, compared, difference }
    }

    async fn test(&mut self, test: Test, repeat: u32) -> Result<Tested, BenchError> {
        let mut timed = [Timed::default(), Timed::default()];
        // A prompt has no steps to warm up with: one run more, which does not count.
        let uncounted = u32::from(matches!(test, Test::Prefill { .. }));
        for run in 0..repeat + uncounted {
            let counts = run >= uncounted;
            if counts {
                timed.iter_mut().for_each(|timed| timed.runs.push(Vec::new()));
            }
            let sequences = self.next_sequence..self.next_sequence + u64::from(test.batch());
            let steps = test.run(self.config, self.is_first, sequences.start, self.open.clone());
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
    use grokpipe_proto::hidden_states::encode;

    use super::*;

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

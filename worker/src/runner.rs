//! A stage at work under one plan epoch: takes frames from its queue, runs them in order, and hands the results on.
//!
//! While a frame is on the device, the next one is being received and the last one sent; the queue and the link are tasks of
//! their own. The runner decides nothing about which frames come.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use grokpipe_kernels::{KernelError, Stage, StepInput, StepOutput};
use grokpipe_proto::{
    hidden_states,
    link::Link,
    v1::{
        DrawnToken, Frame, FrameAck, FrameRefusal, MicroBatchResult, RefusalReason, RunResponse, StageTiming,
        TokenScores, run_response::Answer,
    },
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, debug_span, warn};

use crate::{
    executor::{Executor, compute},
    sampler,
    sequences::{Refusal, Sequences, StageLimits, Step, Wanted},
    stats::Stats,
};

/// A stage that the executor, the runner of one epoch and the next epoch's can all hold; only the executor locks it.
pub type SharedStage = Arc<Mutex<Box<dyn Stage>>>;

/// A frame that waits, with the way back to who sent it.
#[derive(Debug)]
pub struct Job {
    /// The frame.
    pub frame: Frame,
    /// When it came.
    pub received: Instant,
    /// Where its answer goes.
    pub answers: mpsc::Sender<Result<RunResponse, tonic::Status>>,
}

/// Where a stage's results go.
#[derive(Debug)]
pub enum Outlet {
    /// To the next stage.
    Next(Link),
    /// From the last stage to the coordinator.
    Coordinator(mpsc::Sender<MicroBatchResult>),
}

/// What the runner tells the worker when it cannot go on.
#[derive(Debug)]
pub struct RunnerFailed {
    /// What broke.
    pub reason: String,
    /// True if whoever takes this stage's results failed, false if the stage itself did.
    pub outlet: bool,
}

impl RunnerFailed {
    fn device(reason: impl ToString) -> Self {
        Self { reason: reason.to_string(), outlet: false }
    }
    fn outlet() -> Self {
        Self { reason: "nobody takes this stage's results any more".into(), outlet: true }
    }
}

/// Everything that one epoch's runner works with.
pub struct Runner {
    /// Name of this worker.
    pub worker: String,
    /// This process's generation.
    pub generation: u64,
    /// First and last layer, half-open.
    pub layers: std::ops::Range<u32>,
    /// What frames may ask.
    pub limits: StageLimits,
    /// The layers.
    pub stage: SharedStage,
    /// Where they run.
    pub executor: Arc<dyn Executor>,
    /// Where results go.
    pub outlet: Outlet,
    /// Counters.
    pub stats: Arc<Stats>,
}

/// Why a step gave nothing.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("sequence {sequence_id} at position {position}: {source}")]
    Draw { sequence_id: u64, position: u32, source: sampler::DrawError },
}

impl StepError {
    /// Whether every other frame would fail as well: the device is gone, or what the stage reads at each step cannot be read.
    fn is_of_the_stage(&self) -> bool {
        matches!(
            self,
            Self::Kernel(KernelError::DeviceLost { .. } | KernelError::Model(grokpipe_model::ModelError::Io { .. }))
        )
    }
}

enum Computed {
    Hidden(Vec<f32>),
    Results { tokens: Vec<DrawnToken>, scores: Vec<TokenScores> },
}

impl Runner {
    /// Runs until `stop`, or until something breaks that a new epoch must mend.
    ///
    /// # Errors
    /// [`RunnerFailed`] when the device or the outlet is gone.
    pub async fn run(self, mut queue: mpsc::Receiver<Job>, stop: CancellationToken) -> Result<(), RunnerFailed> {
        let mut sequences = Sequences::new(self.limits);
        loop {
            let job = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                job = queue.recv() => match job {
                    None => return Ok(()),
                    Some(job) => job,
                },
            };
            self.stats.queue_depth(queue.len());
            let span = debug_span!("step", stage = self.worker, micro_batch = job.frame.micro_batch_id);
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                done = self.run_frame(job, &mut sequences).instrument(span) => done?,
            }
        }
    }

    async fn run_frame(&self, job: Job, sequences: &mut Sequences) -> Result<(), RunnerFailed> {
        let Job { frame, received, answers } = job;
        let queue_time = received.elapsed();
        let step = match sequences.accept(&frame) {
            Ok(step) => step,
            Err(refusal) => {
                self.refuse(&answers, frame.micro_batch_id, refusal);
                return Ok(());
            }
        };
        let rows = step.batch.rows.len();
        let started = Instant::now();
        let (stage, is_first) = (Arc::clone(&self.stage), self.limits.is_first);
        // Counted from here: a device's thread that hangs may not even begin.
        let running = self.stats.begin_step(rows);
        let computed = compute(&*self.executor, move || {
            let _running = running;
            run_step(&stage, &step, is_first)
        });
        let computed = computed.await.map_err(RunnerFailed::device)?;
        let compute_time = started.elapsed();
        match computed {
            Ok(computed) => {
                self.stats.step_done(rows, compute_time);
                debug!(
                    target: "grokpipe_worker::stage",
                    stage = self.worker,
                    layer_start = self.layers.start,
                    layer_end = self.layers.end,
                    epoch = frame.plan_epoch,
                    micro_batch = frame.micro_batch_id,
                    rows,
                    queue_us = queue_time.as_micros() as u64,
                    compute_us = compute_time.as_micros() as u64,
                    "frame computed"
                );
                let ack = FrameAck {
                    micro_batch_id: frame.micro_batch_id,
                    queue_us: queue_time.as_micros() as u64,
                    compute_us: compute_time.as_micros() as u64,
                };
                self.hand_on(frame, computed, queue_time, compute_time).await?;
                self.answer(&answers, Answer::Ack(ack));
                Ok(())
            }
            Err(error) if error.is_of_the_stage() => Err(RunnerFailed::device(error)),
            Err(error) => {
                for slice in &frame.sequences {
                    sequences.close(slice.sequence_id);
                }
                let refusal = Refusal { reason: RefusalReason::Compute, message: error.to_string() };
                self.refuse(&answers, frame.micro_batch_id, refusal);
                Ok(())
            }
        }
    }

    async fn hand_on(
        &self,
        frame: Frame,
        computed: Computed,
        queue: Duration,
        compute: Duration,
    ) -> Result<(), RunnerFailed> {
        let mut timings = frame.timings;
        timings.push(StageTiming {
            worker: self.worker.clone(),
            layer_start: self.layers.start,
            layer_end: self.layers.end,
            queue_us: queue.as_micros() as u64,
            compute_us: compute.as_micros() as u64,
            wire_us: match &self.outlet {
                Outlet::Next(link) => link.wire_us(),
                Outlet::Coordinator(_) => 0,
            },
        });
        match (&self.outlet, computed) {
            (Outlet::Next(link), Computed::Hidden(hidden)) => {
                let hidden_states = Some(hidden_states::encode(&hidden, self.limits.hidden_size));
                let next = Frame { sender_generation: self.generation, hidden_states, timings, ..frame };
                link.send(next).await.map_err(|_closed| RunnerFailed::outlet())
            }
            (Outlet::Coordinator(results), Computed::Results { tokens, scores }) => {
                let result = MicroBatchResult {
                    plan_epoch: frame.plan_epoch,
                    sender_generation: self.generation,
                    micro_batch_id: frame.micro_batch_id,
                    tokens,
                    scores,
                    timings,
                };
                results.send(result).await.map_err(|_closed| RunnerFailed::outlet())
            }
            _ => Err(RunnerFailed::device("expected the head in the last stage and only there")),
        }
    }

    fn refuse(
        &self,
        answers: &mpsc::Sender<Result<RunResponse, tonic::Status>>,
        micro_batch_id: u64,
        refusal: Refusal,
    ) {
        warn!(micro_batch = micro_batch_id, reason = refusal.message, "frame refused");
        let worker = self.worker.clone();
        let reason = refusal.reason as i32;
        self.answer(
            answers,
            Answer::Refusal(FrameRefusal { micro_batch_id, reason, message: refusal.message, worker }),
        );
    }

    fn answer(&self, answers: &mpsc::Sender<Result<RunResponse, tonic::Status>>, answer: Answer) {
        // A sender that reads no answers gets no credit either; waiting for it would stall everybody else.
        if answers.try_send(Ok(RunResponse { answer: Some(answer) })).is_err() {
            debug!("an answer found no reader");
        }
    }
}

fn run_step(stage: &SharedStage, step: &Step, is_first: bool) -> Result<Computed, StepError> {
    let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
    let input = if is_first { StepInput::TokenIds(&step.token_ids) } else { StepInput::HiddenStates(&step.hidden) };
    match stage.run(&step.batch, input, &step.wanted_rows)? {
        StepOutput::HiddenStates(hidden) => Ok(Computed::Hidden(hidden)),
        StepOutput::Logits(logits) => draw_all(&logits, &step.wanted),
    }
}

fn draw_all(logits: &[f32], wanted: &[Wanted]) -> Result<Computed, StepError> {
    let (mut tokens, mut scores) = (Vec::new(), Vec::new());
    let vocab_size = logits.len() / wanted.len().max(1);
    for (row, wanted) in logits.chunks_exact(vocab_size.max(1)).zip(wanted) {
        let (sequence_id, position) = (wanted.sequence_id, wanted.position);
        if let Some((sampling, choice_index)) = &wanted.draw {
            let drawn = sampler::draw(row, sampling, *choice_index, position).map_err(|source| StepError::Draw {
                sequence_id,
                position,
                source,
            })?;
            tokens.push(DrawnToken { sequence_id, position, token_id: drawn.token_id, logprob: drawn.logprob });
        }
        if !wanted.target_ids.is_empty() {
            let logprobs = sampler::log_probability(row, &wanted.target_ids);
            scores.push(TokenScores { sequence_id, position, logprobs });
        }
    }
    Ok(Computed::Results { tokens, scores })
}

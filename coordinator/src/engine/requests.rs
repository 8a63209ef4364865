//! The engine's part that concerns requests: taking them, keeping the pipeline full, passing tokens on, ending them.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use grokpipe_proto::ids::{MicroBatchId, PlanEpoch, SequenceId};
use tokio::{sync::oneshot, time::Instant};
use tracing::{debug, info, info_span, warn};

use super::{
    Engine, Running, SentBatch,
    outlet::{ClientStream, Outlet},
};
use crate::{
    cluster::messages::{BatchResult, StageTiming},
    request::{Accepted, Field, Finished, Request, RequestError, RequestEvent, Sampling, StageUse, Timings, Token},
    scheduler::{ClientId, Rejected},
    session::{End, Session},
};

/// The client that owns the cluster's own proof tokens.
const OURSELVES: ClientId = 0;

impl Engine {
    /// Ends all running requests with this error; nothing of the old epoch is awaited.
    pub(super) fn interrupt(&mut self, error: &RequestError) {
        self.pipeline = None;
        self.epoch_stop.cancel();
        self.in_flight.clear();
        self.proof = None;
        for sequence in self.scheduler.abort_all() {
            self.end_with(sequence, error.clone());
        }
        let left: Vec<SequenceId> = self.running.keys().copied().collect();
        for sequence in left {
            self.end_with(sequence, error.clone());
        }
    }

    fn end_with(&mut self, sequence: SequenceId, error: RequestError) {
        if let Some(running) = self.running.remove(&sequence) {
            info!(parent: &running.span, tokens = running.session.produced(), error = error.in_full(), "request ended early");
            running.outlet.end(error);
        }
    }

    /// Sends a token of its own through all stages, before any request may come.
    pub(super) fn prove(&mut self, epoch: PlanEpoch) {
        let sequence = self.next_sequence;
        self.next_sequence = self.next_sequence.next();
        match self.scheduler.submit(sequence, OURSELVES, vec![self.settings.proof_token], 1) {
            Ok(()) => self.proof = Some(sequence),
            Err(rejected) => {
                let now = self.now();
                self.cluster.pipeline_failed(now, epoch, None, &format!("no token can be sent through: {rejected}"));
            }
        }
    }

    pub(super) fn submit(&mut self, request: Request, reply: oneshot::Sender<Result<ClientStream, RequestError>>) {
        let answer = self.try_submit(request);
        // A client that has left dropped its stream; the next tick notices.
        let _ = reply.send(answer);
    }

    fn try_submit(&mut self, request: Request) -> Result<ClientStream, RequestError> {
        if !self.cluster.is_serving() {
            return Err(RequestError::NotServing(self.snapshot_now().verdict().text.clone()));
        }
        let sequence = self.next_sequence;
        let (client, max_tokens) = (request.client, request.rules.max_tokens);
        self.scheduler.submit(sequence, client, request.prompt.clone(), max_tokens).map_err(rejected)?;
        self.next_sequence = self.next_sequence.next();
        let accepted = Accepted {
            id: request.id.clone(),
            label: request.label.clone(),
            prompt: request.prompt.clone(),
            seed: request.sampling.seed,
            model: self.settings.model.clone(),
        };
        let span = info_span!("request", id = request.id, sequence = sequence.0);
        let (outlet, stream) = Outlet::open(span.clone());
        outlet.send(RequestEvent::Accepted(accepted));
        info!(parent: &span, prompt_tokens = request.prompt.len(), "request accepted");
        let session = Session::new(request.rules.clone(), self.tokenizer.as_deref(), &request.prompt);
        let running = Running {
            request,
            span,
            session,
            outlet,
            accepted_at: Instant::now(),
            first_scheduled: None,
            first_token: None,
            stages: BTreeMap::new(),
        };
        self.running.insert(sequence, running);
        Ok(stream)
    }

    /// Sends micro-batches while the scheduler has any.
    pub(super) fn schedule(&mut self) {
        let Some(pipeline) = self.pipeline.as_ref().filter(|pipeline| pipeline.epoch == self.cluster.epoch()) else {
            return;
        };
        let epoch = pipeline.epoch;
        while let Some(batch) = self.scheduler.next_micro_batch() {
            let now = Instant::now();
            for slice in &batch.slices {
                if let Some(running) = self.running.get_mut(&slice.sequence) {
                    running.first_scheduled.get_or_insert(now);
                }
            }
            let sampling = batch.slices.iter().map(|slice| self.sampling(slice.sequence)).collect();
            let tokens = batch.slices.iter().map(|slice| slice.token_ids.len()).sum();
            self.in_flight.insert(batch.id, SentBatch { tokens, since: now });
            if pipeline.frames.send(batch, sampling).is_err() {
                // The frame is lost, and its requests would wait for it for ever: the epoch ends here.
                let now = self.now();
                self.cluster.pipeline_failed(now, epoch, None, "the link to the first stage takes no frames");
                self.carry_out();
                return;
            }
        }
    }

    fn sampling(&self, sequence: SequenceId) -> Option<Sampling> {
        match self.running.get(&sequence) {
            Some(running) => Some(running.request.sampling),
            // Any token proves the plan.
            None => (self.proof == Some(sequence)).then_some(Sampling::GREEDY),
        }
    }

    pub(super) fn result(&mut self, result: BatchResult) {
        let current = result.plan_epoch == self.cluster.epoch();
        if current && self.cluster.last_generation() != Some(result.sender_generation) {
            warn!(micro_batch = %result.micro_batch_id, "a result of another process than the last stage's is ignored");
            return;
        }
        let Some(done) = current.then(|| self.in_flight.remove(&result.micro_batch_id)).flatten() else {
            debug!(epoch = %result.plan_epoch, micro_batch = %result.micro_batch_id, "a result of the past is ignored");
            return;
        };
        let seconds = done.since.elapsed().as_secs_f64();
        self.cluster.step_done(result.plan_epoch, done.tokens, seconds, &result.timings);
        let drawn: Vec<(SequenceId, u32)> =
            result.tokens.iter().map(|token| (token.sequence, token.token_id)).collect();
        let logprobs: HashMap<SequenceId, f32> =
            result.tokens.iter().map(|token| (token.sequence, token.logprob)).collect();
        match self.scheduler.complete(result.micro_batch_id, &drawn) {
            Err(error) => {
                warn!(%error, "a result does not fit its micro-batch");
                let now = self.now();
                self.cluster.pipeline_failed(now, result.plan_epoch, None, &error.to_string());
            }
            Ok(completions) => {
                for completion in completions {
                    if self.proof == Some(completion.sequence) {
                        self.proof = None;
                        self.scheduler.release(completion.sequence);
                        let now = self.now();
                        self.cluster.proven(now, result.plan_epoch);
                        self.publish();
                        continue;
                    }
                    let logprob = logprobs.get(&completion.sequence).copied().unwrap_or(f32::NAN);
                    self.advance(completion.sequence, completion.token, logprob, &result.timings);
                }
            }
        }
    }

    /// A micro-batch came back: one of its sequences has a token, or a chunk of its prompt is done.
    fn advance(&mut self, sequence: SequenceId, token: Option<u32>, logprob: f32, timings: &[StageTiming]) {
        let Some(running) = self.running.get_mut(&sequence) else { return };
        for timing in timings {
            let key = (timing.layer_start, timing.layer_end, timing.worker.clone());
            let usage = running.stages.entry(key).or_insert_with(|| StageUse {
                worker: timing.worker.clone(),
                layer_start: timing.layer_start,
                layer_end: timing.layer_end,
                ..StageUse::default()
            });
            usage.frames += 1;
            usage.compute = usage.compute.saturating_add(Duration::from_micros(timing.compute_us));
            usage.queue = usage.queue.saturating_add(Duration::from_micros(timing.queue_us));
        }
        let Some(token) = token else { return };
        running.first_token.get_or_insert_with(Instant::now);
        let step = running.session.push(self.tokenizer.as_deref(), token);
        let token =
            Token { id: running.request.id.clone(), index: step.index, token_id: token, text: step.text, logprob };
        if !running.outlet.send(RequestEvent::Token(token)) {
            self.abandon(sequence);
        } else if let Some(end) = step.end {
            self.finish(sequence, end);
        }
    }

    fn finish(&mut self, sequence: SequenceId, end: End) {
        self.scheduler.release(sequence);
        let Some(running) = self.running.remove(&sequence) else { return };
        let since = |at: Option<Instant>| at.map(|at| at.duration_since(running.accepted_at)).unwrap_or_default();
        let timings = Timings {
            queued: since(running.first_scheduled),
            first_token: since(running.first_token),
            total: running.accepted_at.elapsed(),
            prompt_tokens: running.request.prompt.len() as u32,
            output_tokens: running.session.produced(),
        };
        let total_us = timings.total.as_micros() as u64;
        info!(parent: &running.span, tokens = timings.output_tokens, total_us, "request finished");
        let finished = Finished {
            id: running.request.id.clone(),
            reason: end.reason,
            stop_text: end.stop_text,
            text: end.text,
            timings,
            stages: running.stages.into_values().collect(),
        };
        running.outlet.send(RequestEvent::Finished(finished));
    }

    /// The client is gone, or does not read: its blocks are free again once its micro-batch is back.
    fn abandon(&mut self, sequence: SequenceId) {
        self.scheduler.release(sequence);
        if let Some(running) = self.running.remove(&sequence) {
            info!(parent: &running.span, tokens = running.session.produced(), "client gone, request ended");
        }
    }

    /// A stage refused a frame for good: its requests end, the others go on.
    pub(super) fn frame_failed(&mut self, micro_batch: MicroBatchId, worker: &str, message: &str) {
        if self.in_flight.remove(&micro_batch).is_none() {
            return;
        }
        let (now, epoch) = (self.now(), self.cluster.epoch());
        for sequence in self.scheduler.fail(micro_batch) {
            if self.proof == Some(sequence) {
                self.proof = None;
                self.cluster.pipeline_failed(now, epoch, Some(worker), message);
                return;
            }
            let (worker, reason) = (worker.to_owned(), message.to_owned());
            self.end_with(sequence, RequestError::StageFailed { worker, reason });
        }
        self.cluster.frame_failed(now, worker, message);
    }

    pub(super) fn end_overdue(&mut self) {
        let waited_on = self.cluster.slowest_step(self.now());
        let overdue: Vec<(SequenceId, RequestError)> = self
            .running
            .iter()
            .filter(|(_, running)| running.request.deadline.is_over())
            .map(|(sequence, running)| {
                let error = RequestError::Deadline {
                    limit: running.request.deadline.limit,
                    produced: running.session.produced(),
                    waited_on: waited_on.clone(),
                };
                (*sequence, error)
            })
            .collect();
        for (sequence, error) in overdue {
            self.scheduler.release(sequence);
            self.end_with(sequence, error);
        }
        let gone: Vec<SequenceId> = self
            .running
            .iter()
            .filter(|(_, running)| running.outlet.is_closed())
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in gone {
            self.abandon(sequence);
        }
        if let Some(oldest) = self.in_flight.values().min_by_key(|batch| batch.since) {
            let now = self.now();
            self.cluster.watch_frame(now, oldest.tokens, oldest.since.elapsed());
        }
    }
}

fn rejected(rejected: Rejected) -> RequestError {
    match rejected {
        Rejected::QueueFull { limit, .. } => RequestError::QueueFull { limit },
        Rejected::ShareTaken { limit, waiting, .. } => RequestError::ShareTaken { limit, waiting },
        Rejected::TooLong { limit, found, what } => RequestError::TooLong { limit, found, what },
        other => RequestError::invalid(Field::Prompt, other.to_string()),
    }
}

//! The life of this worker's stage: from an assignment to a stage at work, one plan epoch after the other.
//!
//! The newest assignment wins. Layers that are already on the device are kept across epochs, so that a plan that changes nothing
//! for this worker costs it nothing, and given up for others only once those can be read. What is loaded where is the coordinator's
//! decision.

use std::{ops::Range, sync::Arc, time::Duration};

use grokpipe_kernels::KernelError;
use grokpipe_model::{ModelConfig, ModelError, contents::PartSum};
use grokpipe_proto::{
    LOST_AFTER, bounds,
    link::{Link, LinkEvent, LinkSettings},
    link_token::LinkToken,
    max_frame_bytes,
    secret::Secret,
    transport::{self, Keepalive, Net},
    v1::{
        ActivationDtype, Assignment, ContentSum, DeliverRequest, FrameFailed, LoadProgress, MicroBatchResult,
        StageBlocked, StageFailed, StageReady, join_request::Message, result_service_client::ResultServiceClient,
    },
};
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::{Instant, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};

use crate::{
    BATCH_TOKENS_MAX,
    executor::{Executor, compute},
    loader::{LoadRequest, StageLoader},
    runner::{Outlet, Runner, SharedStage},
    sequences::StageLimits,
    service::ActiveStage,
    stats::Stats,
};

/// Progress of a load is reported this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// The next stage is dialled again after this long; it may still be starting.
const REDIAL: Duration = Duration::from_millis(100);
/// The coordinator hears of it when the next stage does not answer for so long.
const BLOCKED_AFTER: Duration = Duration::from_secs(1);

/// What the coordinator last asked of this worker.
#[derive(Clone, Debug, Default)]
pub enum Order {
    /// Nothing: keep what is held, compute nothing.
    #[default]
    Idle,
    /// Run these layers.
    Run(Box<Assignment>),
}

struct Held {
    stage: SharedStage,
    request: LoadRequest,
    /// Bytes that were read for it.
    stored_bytes: u64,
    weights_bytes: u64,
    kv_bytes: u64,
    /// Sums of what was loaded.
    contents: Vec<ContentSum>,
}

fn content_sum(PartSum { part, sum, confirmed }: &PartSum, layers: u32) -> ContentSum {
    ContentSum { part: part.index(layers), sum: sum.as_bytes().to_vec().into(), confirmed: *confirmed }
}

/// What [`Controller`] works with.
pub struct Controller {
    /// Name of this worker.
    pub worker: String,
    /// This process's generation.
    pub generation: u64,
    /// The coordinator's address, for results.
    pub coordinator: String,
    /// The cluster's secret.
    pub secret: Secret,
    /// How connections are made.
    pub net: Arc<dyn Net>,
    /// Where computations run.
    pub executor: Arc<dyn Executor>,
    /// How stages are loaded.
    pub loader: Arc<std::sync::Mutex<Box<dyn StageLoader>>>,
    /// The model's sizes.
    pub config: ModelConfig,
    /// The model's digest.
    pub model_digest: String,
    /// Where the port finds the stage at work.
    pub active: ActiveStage,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Layers on the device, for the next hello.
    pub held_layers: watch::Sender<Option<Range<u32>>>,
    /// What the coordinator is to be told.
    pub reports: mpsc::Sender<Message>,
}

#[derive(Default)]
struct Failure {
    message: String,
    retryable: bool,
    /// The worker at the other end of a broken link.
    lost_peer: String,
    out_of_memory: bool,
}

impl Failure {
    fn fatal(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }
    fn passing(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: true, ..Self::default() }
    }
    /// What a read of the system's or a device gave may be better the next time; what a file says will not.
    fn of_kernel(error: KernelError) -> Self {
        Self {
            retryable: matches!(error, KernelError::DeviceLost { .. } | KernelError::Model(ModelError::Io { .. })),
            out_of_memory: matches!(error, KernelError::OutOfMemory { .. }),
            ..Self::fatal(error.to_string())
        }
    }
}

impl Controller {
    /// Follows the orders until `shutdown`.
    pub async fn run(self, mut orders: watch::Receiver<Order>, shutdown: CancellationToken) {
        let held = Mutex::new(None);
        loop {
            let order = orders.borrow_and_update().clone();
            let epoch_ends = async {
                tokio::select! {
                    () = shutdown.cancelled() => false,
                    changed = orders.changed() => changed.is_ok(),
                }
            };
            let go_on = match order {
                Order::Idle => epoch_ends.await,
                Order::Run(assignment) => {
                    let span = info_span!("epoch", stage = self.worker, epoch = assignment.plan_epoch);
                    let stop = CancellationToken::new();
                    let _stops_with_the_epoch = stop.clone().drop_guard();
                    let work = self.follow(*assignment, &held, stop.clone()).instrument(span);
                    // Loading goes on to its end even when the epoch ends: what it loads will most likely be wanted again.
                    let ended = async {
                        let go_on = epoch_ends.await;
                        stop.cancel();
                        self.active.clear();
                        go_on
                    };
                    tokio::join!(work, ended).1
                }
            };
            self.active.clear();
            if !go_on {
                // Weights are freed where they were made.
                let dropped = held.lock().await.take();
                let _ = compute(&*self.executor, move || drop(dropped)).await;
                return;
            }
        }
    }

    async fn follow(&self, assignment: Assignment, held: &Mutex<Option<Held>>, stop: CancellationToken) {
        let (plan_epoch, coordinator_generation) = (assignment.plan_epoch, assignment.coordinator_generation);
        if let Err(failure) = self.try_follow(assignment, held, stop.clone()).await {
            self.active.clear();
            if !stop.is_cancelled() {
                warn!(reason = failure.message, "stage failed");
                let Failure { message, retryable, lost_peer, out_of_memory } = failure;
                let message = bounds::cut(message, bounds::REASON_BYTES_MAX);
                let failed =
                    StageFailed { plan_epoch, coordinator_generation, message, retryable, lost_peer, out_of_memory };
                self.report(Message::StageFailed(failed)).await;
            }
        }
    }

    async fn try_follow(
        &self,
        assignment: Assignment,
        held: &Mutex<Option<Held>>,
        stop: CancellationToken,
    ) -> Result<(), Failure> {
        let request = self.check(&assignment)?;
        let next_token = self.expect(&assignment)?;
        let mut held = held.lock().await;
        self.hold(&assignment, &request, &mut held).await?;
        let Some(held) = &*held else { return Err(Failure::passing("expected loaded layers, found none")) };
        if stop.is_cancelled() {
            return Ok(());
        }
        let (events, lost) = mpsc::channel(64);
        let Some(outlet) = self.open_outlet(&assignment, &next_token, events, &stop).await? else { return Ok(()) };
        self.stats.start_epoch(held.weights_bytes, held.kv_bytes);
        let (queue, jobs) = mpsc::channel(assignment.max_frames_in_flight as usize);
        let runner = Runner {
            worker: self.worker.clone(),
            generation: self.generation,
            layers: request.layers.clone(),
            limits: self.limits(&assignment, &request),
            stage: Arc::clone(&held.stage),
            executor: Arc::clone(&self.executor),
            outlet,
            stats: Arc::clone(&self.stats),
        };
        self.active.set(assignment.plan_epoch, queue);
        info!(layers = ?request.layers, "stage ready");
        self.report(Message::StageReady(StageReady {
            plan_epoch: assignment.plan_epoch,
            contents: held.contents.clone(),
            coordinator_generation: assignment.coordinator_generation,
        }))
        .await;
        tokio::select! {
            ended = runner.run(jobs, stop.clone()) => ended.map_err(|failed| {
                let lost_peer = if failed.outlet { assignment.next_worker.clone() } else { String::new() };
                Failure { lost_peer, ..Failure::passing(failed.reason) }
            }),
            lost = self.watch_link(&assignment, lost) => {
                Err(Failure { lost_peer: assignment.next_worker.clone(), ..Failure::passing(lost) })
            }
        }
    }

    fn check(&self, assignment: &Assignment) -> Result<LoadRequest, Failure> {
        let (start, end) = (assignment.layer_start, assignment.layer_end);
        let layers = self.config.num_hidden_layers;
        if start >= end || end > layers {
            return Err(Failure::fatal(format!("expected a range of layers within 0..{layers}, found {start}..{end}")));
        }
        if assignment.model_digest != self.model_digest {
            return Err(Failure::fatal(format!(
                "expected model {} with digest {}, found {} with digest {} here",
                assignment.model_name, assignment.model_digest, self.config.name, self.model_digest
            )));
        }
        if assignment.kv_block_tokens as usize != grokpipe_kernels::KV_BLOCK_TOKENS {
            return Err(Failure::fatal(format!(
                "expected KV blocks of {} tokens, found {}",
                grokpipe_kernels::KV_BLOCK_TOKENS,
                assignment.kv_block_tokens
            )));
        }
        if assignment.activation_dtype != ActivationDtype::F32 as i32 {
            return Err(Failure::fatal("expected activations in f32, found another dtype"));
        }
        if assignment.kv_blocks == 0 || !(1..=BATCH_TOKENS_MAX).contains(&(assignment.max_batch_tokens as usize)) {
            return Err(Failure::fatal(format!("expected KV blocks and 1 to {BATCH_TOKENS_MAX} tokens a frame")));
        }
        if !(1..=4096).contains(&assignment.max_frames_in_flight) {
            return Err(Failure::fatal("expected 1 to 4096 frames in flight"));
        }
        if assignment.next_address.is_empty() != (end == layers) {
            return Err(Failure::fatal("expected a next stage before the last layer, and none after it"));
        }
        Ok(LoadRequest {
            layers: start..end,
            kv_blocks: assignment.kv_blocks,
            max_batch_tokens: assignment.max_batch_tokens as usize,
        })
    }

    /// Takes links of this assignment from now on; what its own link is to present.
    fn expect(&self, assignment: &Assignment) -> Result<LinkToken, Failure> {
        let token = |bytes: &[u8]| {
            let found = format!("expected link tokens of 32 bytes, found {}", bytes.len());
            LinkToken::from_wire(bytes).ok_or_else(|| Failure::fatal(found))
        };
        self.active.expect(assignment.plan_epoch, token(&assignment.link_token)?);
        token(&assignment.next_token)
    }

    fn limits(&self, assignment: &Assignment, request: &LoadRequest) -> StageLimits {
        StageLimits {
            plan_epoch: assignment.plan_epoch,
            previous_generation: assignment.previous_generation,
            kv_blocks: request.kv_blocks,
            max_batch_tokens: request.max_batch_tokens,
            max_positions: self.config.max_position_embeddings,
            vocab_size: self.config.vocab_size,
            hidden_size: self.config.hidden_size,
            pad_token_id: self.config.pad_token_id,
            is_first: request.layers.start == 0,
            is_last: request.layers.end == self.config.num_hidden_layers,
        }
    }

    /// Makes `held` what the request asks for, loading only if it is not that already.
    async fn hold(
        &self,
        assignment: &Assignment,
        request: &LoadRequest,
        held: &mut Option<Held>,
    ) -> Result<(), Failure> {
        if let Some(kept) = held.as_ref().filter(|held| held.request == *request) {
            info!(layers = ?request.layers, "layers kept from an earlier epoch");
            self.report_progress(assignment, kept.stored_bytes, kept.stored_bytes).await;
            return Ok(());
        }
        let old = self.make_room(request, held).await?;
        info!(layers = ?request.layers, "loading");
        let (progress, seen) = watch::channel((0_u64, 0_u64));
        let (loader, wanted) = (Arc::clone(&self.loader), request.clone());
        let loading = compute(&*self.executor, move || {
            drop(old);
            let mut loader = loader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            loader.load(&wanted, &mut |done, total| {
                progress.send_replace((done, total));
            })
        });
        let loaded = tokio::select! {
            loaded = loading => loaded,
            () = self.watch_progress(assignment, seen.clone()) => unreachable!("progress is reported for ever"),
        };
        let stage = loaded.map_err(|failed| Failure::passing(failed.to_string()))?.map_err(Failure::of_kernel)?;
        let (weights_bytes, kv_bytes) = (stage.weights_bytes(), stage.kv_bytes());
        let contents = stage.contents().iter().map(|sum| content_sum(sum, self.config.num_hidden_layers)).collect();
        let (_, stored_bytes) = *seen.borrow();
        self.report_progress(assignment, stored_bytes, stored_bytes).await;
        if let Some(old) = held.take() {
            let _ = compute(&*self.executor, move || drop(old)).await;
        }
        *held = Some(Held {
            stage: Arc::new(std::sync::Mutex::new(stage)),
            request: request.clone(),
            stored_bytes,
            weights_bytes,
            kv_bytes,
            contents,
        });
        self.held_layers.send_replace(Some(request.layers.clone()));
        Ok(())
    }

    /// Layers that must go before others can be loaded. They stay in `held` where there is room for both, and go only when the new
    /// ones can be read.
    async fn make_room(&self, request: &LoadRequest, held: &mut Option<Held>) -> Result<Option<Held>, Failure> {
        let Some(kept) = held.as_ref() else { return Ok(None) };
        let kept_bytes = kept.weights_bytes.saturating_add(kept.kv_bytes);
        let (loader, wanted) = (Arc::clone(&self.loader), request.clone());
        let checked = compute(&*self.executor, move || {
            let loader = loader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            loader.check_readable(&wanted)?;
            let needed = loader.memory_needed(&wanted);
            Ok(needed.is_some_and(|needed| needed.saturating_add(kept_bytes) <= loader.device().memory_bytes))
        });
        let fits = checked.await.map_err(|failed| Failure::passing(failed.to_string()))?.map_err(Failure::of_kernel)?;
        if fits {
            return Ok(None);
        }
        self.held_layers.send_replace(None);
        Ok(held.take())
    }

    async fn report_progress(&self, assignment: &Assignment, bytes: u64, bytes_total: u64) {
        let (plan_epoch, coordinator_generation) = (assignment.plan_epoch, assignment.coordinator_generation);
        let progress = LoadProgress { plan_epoch, coordinator_generation, bytes, bytes_total };
        self.report(Message::LoadProgress(progress)).await;
    }

    async fn watch_progress(&self, assignment: &Assignment, seen: watch::Receiver<(u64, u64)>) {
        loop {
            tokio::time::sleep(PROGRESS_INTERVAL).await;
            let (bytes, bytes_total) = *seen.borrow();
            self.report_progress(assignment, bytes, bytes_total).await;
        }
    }

    /// Dials the next stage, or the coordinator from the last stage, until it answers or the epoch ends (`None`).
    async fn open_outlet(
        &self,
        assignment: &Assignment,
        token: &LinkToken,
        events: mpsc::Sender<LinkEvent>,
        stop: &CancellationToken,
    ) -> Result<Option<Outlet>, Failure> {
        let began = Instant::now();
        let mut told: Option<String> = None;
        loop {
            let opened = tokio::select! {
                () = stop.cancelled() => return Ok(None),
                opened = self.try_open_outlet(assignment, token, events.clone(), stop) => opened,
            };
            match opened {
                Ok(outlet) => return Ok(Some(outlet)),
                Err(reason) => {
                    if began.elapsed() >= BLOCKED_AFTER && told.as_ref() != Some(&reason) {
                        warn!(reason, "the next stage does not answer, trying again");
                        told = Some(reason.clone());
                        self.report_blocked(assignment, reason).await;
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(REDIAL) => {}
            }
        }
    }

    async fn report_blocked(&self, assignment: &Assignment, reason: String) {
        let (plan_epoch, coordinator_generation) = (assignment.plan_epoch, assignment.coordinator_generation);
        let peer = assignment.next_worker.clone();
        self.report(Message::StageBlocked(StageBlocked { plan_epoch, coordinator_generation, peer, reason })).await;
    }

    async fn try_open_outlet(
        &self,
        assignment: &Assignment,
        token: &LinkToken,
        events: mpsc::Sender<LinkEvent>,
        stop: &CancellationToken,
    ) -> Result<Outlet, String> {
        if !assignment.next_address.is_empty() {
            let settings = LinkSettings {
                address: assignment.next_address.clone(),
                worker: assignment.next_worker.clone(),
                secret: self.secret.clone(),
                token: token.clone(),
                max_frame_bytes: max_frame_bytes(assignment.max_batch_tokens as usize, self.config.hidden_size),
                max_in_flight: assignment.max_frames_in_flight as usize,
            };
            let link = Link::open(&self.net, settings, events, stop.clone()).await;
            return link.map(Outlet::Next).map_err(|error| error.to_string());
        }
        let channel = transport::connect(&self.net, &self.coordinator, Keepalive::Cluster)
            .await
            .map_err(|error| format!("cannot reach the coordinator at {error}"))?;
        let mut client = ResultServiceClient::with_interceptor(channel, self.secret.attach());
        let (results, outgoing) = mpsc::channel::<MicroBatchResult>(assignment.max_frames_in_flight as usize);
        let outgoing = ReceiverStream::new(outgoing).map(|result| DeliverRequest { result: Some(result) });
        let answers = timeout(LOST_AFTER, client.deliver(token.present(outgoing))).await;
        let mut answers = answers
            .map_err(|_late| format!("cannot reach the coordinator: no answer within {} s", LOST_AFTER.as_secs()))?
            .map_err(|status| {
                format!("cannot reach the coordinator: refused with {:?}, {}", status.code(), status.message())
            })?
            .into_inner();
        let stop = stop.clone();
        // Owned by the epoch: ends with it, or when the coordinator hangs up.
        tokio::spawn(async move {
            let reason = tokio::select! {
                () = stop.cancelled() => return,
                ended = answers.message() => match ended {
                    Ok(_) => "the result stream was closed by the coordinator".to_owned(),
                    Err(status) => format!("the result stream broke: {}", status.message()),
                },
            };
            let _ = events.send(LinkEvent::Lost { reason }).await;
        });
        Ok(Outlet::Coordinator(results))
    }

    /// Reports refused frames; returns when the link is lost.
    async fn watch_link(&self, assignment: &Assignment, mut events: mpsc::Receiver<LinkEvent>) -> String {
        let (plan_epoch, coordinator_generation) = (assignment.plan_epoch, assignment.coordinator_generation);
        loop {
            match events.recv().await {
                Some(LinkEvent::FrameFailed { micro_batch_id, worker, message }) => {
                    let micro_batch_id = micro_batch_id.into();
                    let message = bounds::cut(message, bounds::REASON_BYTES_MAX);
                    let failed = FrameFailed { plan_epoch, coordinator_generation, micro_batch_id, worker, message };
                    self.report(Message::FrameFailed(failed)).await;
                }
                Some(LinkEvent::Lost { reason }) => return reason,
                None => std::future::pending().await,
            }
        }
    }

    async fn report(&self, message: Message) {
        // Without a coordinator there is nobody to tell; the next hello tells what is held.
        let _ = self.reports.send(message).await;
    }
}

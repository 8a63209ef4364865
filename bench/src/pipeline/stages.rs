//! The workers under test: real processes that get their layers by the coordinator's messages, each arrangement of them a pipeline of
//! its own under its own plan epoch.
//!
//! Every wait has a deadline, and whatever goes wrong meanwhile (a process that ends, a link that breaks, a stage that fails) ends
//! the wait with an error that says so. [`Cluster::end`] ends every process.

use std::{collections::HashMap, ops::Range, sync::Arc, time::Duration};

use grokpipe_coordinator::{
    FRAMES_IN_FLIGHT_MAX,
    cluster::messages::{Assignment, Hello, Order, Report, Welcome},
    engine::Event,
};
use grokpipe_model::ModelConfig;
use grokpipe_proto::{
    PROTOCOL_VERSIONS, hidden_states,
    ids::{Generation, PlanEpoch},
    link::{Link, LinkEvent, LinkSettings},
    link_token::LinkKey,
    max_frame_bytes,
    secret::Secret,
    transport::{Net, Tcp},
    v1::Frame,
};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use super::port::Port;
use crate::{BenchError, Loading};

/// Time for a worker to open its model and its device and to join.
const JOIN_TIMEOUT: Duration = Duration::from_secs(120);
/// A load that gains nothing for this long is stuck.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);
/// Time for a step; far above any real one.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// News of a process's end may come this much later than that of its broken connections, and says more.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Few, so that they disturb little; a worker that dies is noticed by its stream's end.
const HEARTBEAT_INTERVAL_MS: u32 = 1500;
/// The name of the stage after the last one, in messages.
const BENCH: &str = "bench";

/// A worker to start.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Its name.
    pub name: String,
    /// Where its coordinator is.
    pub coordinator: String,
    /// Bytes of this machine's memory that it may fill, where they are known.
    pub memory_bytes: Option<u64>,
}

/// The processes of the workers. Whoever runs the benchmark knows how they are started and ended.
pub trait Workers {
    /// Starts one; should that fail, [`Workers::lost`] says so.
    fn start(&mut self, launch: Launch);

    /// Waits until one has ended, or did not start. May be dropped and called again.
    fn lost(&mut self) -> impl Future<Output = BenchError>;

    /// Ends all of them and waits until they have ended.
    fn end(&mut self) -> impl Future<Output = ()>;
}

/// What all workers have in common.
#[derive(Clone)]
pub(super) struct Setup {
    /// The model's sizes.
    pub(super) config: ModelConfig,
    /// The weights' digest.
    pub(super) digest: String,
    /// The secret that the workers present.
    pub(super) secret: Secret,
    /// What the tokens of links are derived from.
    pub(super) link_key: LinkKey,
    /// That of this process, as a coordinator has one.
    pub(super) generation: Generation,
    /// KV blocks of each worker.
    pub(super) kv_blocks: u32,
    /// Most tokens in a frame.
    pub(super) max_batch_tokens: u32,
}

impl Setup {
    fn max_frame_bytes(&self) -> usize {
        max_frame_bytes(self.max_batch_tokens as usize, self.config.hidden_size)
    }
}

/// One worker and its layers.
pub(super) struct Member {
    /// What it said of itself.
    pub(super) hello: Hello,
    /// What it runs.
    pub(super) layers: Range<u32>,
}

/// Workers in a row.
pub(super) struct Arrangement {
    epoch: PlanEpoch,
    /// In the order of their layers.
    pub(super) members: Vec<Member>,
    link: Option<Link>,
}

/// A step that was run.
pub(super) struct Ran {
    /// From the first frame's way into the first stage to the last one's way out of the last.
    pub(super) seconds: f64,
    /// The frames as the last stage handed them on, in the order in which they were sent.
    pub(super) frames: Vec<Frame>,
}

/// All workers, and what is heard of them.
pub(super) struct Cluster<'a, W> {
    setup: Setup,
    net: Arc<dyn Net>,
    workers: &'a mut W,
    port: Port,
    links: mpsc::Receiver<LinkEvent>,
    tell_links: mpsc::Sender<LinkEvent>,
    /// Where each worker's orders go. Kept to the end: without its coordinator a worker would dial again.
    outboxes: HashMap<String, mpsc::Sender<Order>>,
    next_micro_batch: u64,
    /// Ends the port and the links, once the processes have ended.
    closed: CancellationToken,
}

/// What is heard that is no bad news.
enum Heard {
    Joined(Box<Hello>),
    Said { worker: String, report: Box<Report> },
    Frame(Box<Frame>),
}

impl<'a, W: Workers> Cluster<'a, W> {
    /// Opens the port; no process runs yet.
    ///
    /// # Errors
    /// When the system gives no port.
    pub(super) async fn open(setup: Setup, workers: &'a mut W) -> Result<Self, BenchError> {
        let net: Arc<dyn Net> = Arc::new(Tcp);
        let closed = CancellationToken::new();
        let port = Port::open(&net, &setup.secret, setup.max_frame_bytes(), closed.clone()).await?;
        let (tell_links, links) = mpsc::channel(64);
        let (outboxes, next_micro_batch) = (HashMap::new(), 1);
        Ok(Self { setup, net, workers, port, links, tell_links, outboxes, next_micro_batch, closed })
    }

    /// Starts a worker for each run of layers and waits until all have joined: one after the other, so that what each measures of
    /// its device is not disturbed by the next.
    ///
    /// # Errors
    /// When one does not start or does not join.
    pub(super) async fn start(
        &mut self,
        epoch: PlanEpoch,
        workers: Vec<(String, Range<u32>)>,
        memory: impl Fn(&Range<u32>) -> Option<u64>,
    ) -> Result<Arrangement, BenchError> {
        let mut members = Vec::new();
        for (name, layers) in workers {
            let memory_bytes = memory(&layers);
            let coordinator = self.port.address.clone();
            self.workers.start(Launch { name: name.clone(), coordinator, memory_bytes });
            let deadline = Instant::now() + JOIN_TIMEOUT;
            let hello = loop {
                match self.next(deadline, &format!("worker {name} to join")).await? {
                    Heard::Joined(hello) if hello.name == name => break *hello,
                    _ => {}
                }
            };
            members.push(Member { hello, layers });
        }
        Ok(Arrangement { epoch, members, link: None })
    }

    /// Tells all workers their layers, waits until they have them, and opens the links to the first stages.
    ///
    /// # Errors
    /// When a stage fails, or loads nothing for too long.
    pub(super) async fn load(
        &mut self,
        arrangements: &mut [Arrangement],
        progress: &mut dyn FnMut(Loading),
    ) -> Result<(), BenchError> {
        for arrangement in arrangements.iter() {
            self.assign(arrangement)?;
        }
        let mut waiting: usize = arrangements.iter().map(|arrangement| arrangement.members.len()).sum();
        let mut loaded: HashMap<String, (u64, u64)> = HashMap::new();
        let mut deadline = Instant::now() + LOAD_TIMEOUT;
        while waiting > 0 {
            let Heard::Said { worker, report } = self.next(deadline, "the layers to be loaded").await? else {
                continue;
            };
            match *report {
                Report::StageReady(_) => {
                    waiting -= 1;
                    deadline = Instant::now() + LOAD_TIMEOUT;
                }
                Report::LoadProgress(now) => {
                    let now = (now.bytes, now.bytes_total);
                    if loaded.insert(worker, now) != Some(now) {
                        deadline = Instant::now() + LOAD_TIMEOUT;
                        let sum = |part: fn(&(u64, u64)) -> u64| loaded.values().map(part).sum();
                        progress(Loading::Bytes { loaded: sum(|(bytes, _)| *bytes), total: sum(|(_, total)| *total) });
                    }
                }
                _ => {}
            }
        }
        for arrangement in arrangements {
            let Some(first) = arrangement.members.first() else { continue };
            let settings = LinkSettings {
                address: first.hello.data_address.clone(),
                worker: first.hello.name.clone(),
                secret: self.setup.secret.clone(),
                token: self.setup.link_key.frames(arrangement.epoch, 0),
                max_frame_bytes: self.setup.max_frame_bytes(),
                max_in_flight: FRAMES_IN_FLIGHT_MAX,
            };
            let link = Link::open(&self.net, settings, self.tell_links.clone(), self.closed.clone()).await;
            arrangement.link = Some(link.map_err(|error| BenchError::NoLink(error.to_string()))?);
        }
        Ok(())
    }

    fn assign(&self, arrangement: &Arrangement) -> Result<(), BenchError> {
        let mut previous_generation = self.setup.generation;
        for (index, member) in arrangement.members.iter().enumerate() {
            let next = arrangement.members.get(index + 1);
            let next_address = next.map_or(&self.port.address, |next| &next.hello.data_address);
            let assignment = Assignment {
                plan_epoch: arrangement.epoch,
                layer_start: member.layers.start,
                layer_end: member.layers.end,
                model_digest: self.setup.digest.clone(),
                model_name: self.setup.config.name.clone(),
                next_address: next_address.clone(),
                next_worker: next.map_or(BENCH, |next| &next.hello.name).to_owned(),
                previous_generation,
                kv_blocks: self.setup.kv_blocks,
                max_batch_tokens: self.setup.max_batch_tokens,
                max_frames_in_flight: FRAMES_IN_FLIGHT_MAX as u32,
                coordinator_generation: self.setup.generation,
                link_token: self.setup.link_key.frames(arrangement.epoch, index),
                next_token: self.setup.link_key.frames(arrangement.epoch, index + 1),
            };
            let outbox = self.outboxes.get(&member.hello.name);
            if outbox.is_none_or(|outbox| outbox.try_send(Order::Assign(assignment)).is_err()) {
                return Err(BenchError::NoOrders(member.hello.name.clone()));
            }
            previous_generation = member.hello.generation;
        }
        Ok(())
    }

    /// Runs a step through an arrangement.
    ///
    /// # Errors
    /// When a frame is refused, damaged or late, or a worker is lost.
    pub(super) async fn run(&mut self, arrangement: &Arrangement, frames: &[Frame]) -> Result<Ran, BenchError> {
        let first_number = self.next_micro_batch;
        self.next_micro_batch += frames.len() as u64;
        let numbered = (first_number..).zip(frames).map(|(micro_batch_id, frame)| Frame {
            plan_epoch: arrangement.epoch.into(),
            sender_generation: self.setup.generation.into(),
            micro_batch_id,
            ..frame.clone()
        });
        let numbered: Vec<Frame> = numbered.collect();
        let mut back: Vec<Option<Frame>> = vec![None; frames.len()];
        let mut missing = frames.len();
        let started = Instant::now();
        let deadline = started + STEP_TIMEOUT;
        for frame in numbered {
            let Some(link) = &arrangement.link else {
                return Err(BenchError::NoLink("the workers have no layers yet".to_owned()));
            };
            if !matches!(time::timeout_at(deadline, link.send(frame)).await, Ok(Ok(()))) {
                let noticed = BenchError::Workers("the link to the first stage takes no frames".to_owned());
                return Err(self.lost(noticed).await);
            }
        }
        while missing > 0 {
            let Heard::Frame(frame) = self.next(deadline, "a frame to come back").await? else { continue };
            let index = frame.micro_batch_id.checked_sub(first_number).map(|index| index as usize);
            if let Some(place) = index.and_then(|index| back.get_mut(index))
                && place.replace(*frame).is_none()
            {
                missing -= 1;
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let frames: Vec<Frame> = back.into_iter().flatten().collect();
        frames.iter().try_for_each(|frame| self.check(frame))?;
        Ok(Ran { seconds, frames })
    }

    /// Looks at what a last stage handed on as a next stage would.
    fn check(&self, frame: &Frame) -> Result<(), BenchError> {
        let rows = frame.sequences.iter().map(|slice| slice.token_ids.len()).sum();
        let hidden = frame.hidden_states.as_ref();
        let hidden = hidden.ok_or_else(|| BenchError::HiddenStates("there are none".to_owned()))?;
        hidden_states::decode(hidden, rows, self.setup.config.hidden_size)
            .map_err(|error| BenchError::HiddenStates(error.to_string()))?;
        Ok(())
    }

    /// What is heard next that is no bad news.
    async fn next(&mut self, deadline: Instant, wanted: &str) -> Result<Heard, BenchError> {
        loop {
            let noticed = tokio::select! {
                biased;
                error = self.workers.lost() => return Err(error),
                Some(event) = self.links.recv() => match event {
                    LinkEvent::FrameFailed { message, .. } => BenchError::Workers(message),
                    LinkEvent::Lost { reason } => BenchError::Workers(reason),
                },
                Some(frame) = self.port.frames.recv() => return Ok(Heard::Frame(Box::new(frame))),
                Some(event) = self.port.events.recv() => match self.heard(event) {
                    Ok(Some(heard)) => return Ok(heard),
                    Ok(None) => continue,
                    Err(noticed) => noticed,
                },
                () = time::sleep_until(deadline) => return Err(BenchError::TimedOut(wanted.to_owned())),
            };
            return Err(self.lost(noticed).await);
        }
    }

    /// What a worker's event means here. Every worker is welcome: this process has started it.
    fn heard(&mut self, event: Event) -> Result<Option<Heard>, BenchError> {
        match event {
            Event::Joined { hello, outbox, reply, .. } => {
                self.outboxes.insert(hello.name.clone(), outbox);
                let welcome = Welcome {
                    version: *PROTOCOL_VERSIONS.end(),
                    cluster: BENCH.to_owned(),
                    coordinator_generation: self.setup.generation,
                    heartbeat_interval_ms: HEARTBEAT_INTERVAL_MS,
                };
                // A worker that has gone meanwhile is reported by the end of its stream.
                let _ = reply.send(Ok(welcome));
                Ok(Some(Heard::Joined(hello)))
            }
            Event::FromWorker { name, report, .. } => match *report {
                Report::StageFailed(failed) => Err(BenchError::StageFailed {
                    name,
                    is_out_of_memory: failed.is_out_of_memory,
                    message: failed.message,
                }),
                Report::FrameFailed(failed) => Err(BenchError::Workers(failed.message)),
                Report::Heartbeat(_) => Ok(None),
                report => Ok(Some(Heard::Said { worker: name, report: Box::new(report) })),
            },
            Event::Left { name, .. } => Err(BenchError::Workers(format!("worker {name} has gone"))),
            // The port brings nothing else.
            _ => Ok(None),
        }
    }

    /// Why something broke: the end of a process, if that is why, otherwise what was noticed first.
    async fn lost(&mut self, noticed: BenchError) -> BenchError {
        time::timeout(EXIT_TIMEOUT, self.workers.lost()).await.unwrap_or(noticed)
    }

    /// Ends every process, then the port.
    pub(super) async fn end(self) {
        self.workers.end().await;
        self.closed.cancel();
    }
}

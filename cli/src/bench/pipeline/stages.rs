//! The workers under test: real processes, told their layers as a coordinator tells them, each arrangement of them a pipeline of
//! its own under its own plan epoch.
//!
//! Every wait has a deadline, and whatever goes wrong meanwhile (a process that ends, a link that breaks, a stage that fails) ends
//! the wait with an error that says so. [`Cluster::end`] ends every process.

use std::{collections::HashMap, ffi::OsString, ops::Range, path::PathBuf, sync::Arc, time::Duration};

use grokpipe_kernels::KV_BLOCK_TOKENS;
use grokpipe_model::ModelConfig;
use grokpipe_proto::{
    hidden_states,
    link::{Link, LinkEvent, LinkSettings},
    link_token::LinkKey,
    max_frame_bytes,
    transport::{Net, Tcp},
    v1::{ActivationDtype, Assignment, Frame, Hello, JoinResponse, join_request::Message, join_response},
};
use indicatif::ProgressBar;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use super::port::{Event, Outbox, Port};
use crate::{
    config::{self, SecretText},
    error::{CliError, Code},
    machine,
    up::{
        child::{self, Child},
        command::Launch,
        screen::Screen,
    },
};

/// Time for a worker to open its model and its device and to join.
const JOIN_WITHIN: Duration = Duration::from_secs(120);
/// A load that gains nothing for this long is stuck.
const STALLED_AFTER: Duration = Duration::from_secs(120);
/// Time for a step; far above any real one.
const STEP_WITHIN: Duration = Duration::from_secs(120);
/// News of a process's end may come this much later than that of its broken connections, and says more.
const EXIT_WITHIN: Duration = Duration::from_secs(1);
/// Unanswered frames on a link, as a coordinator allows them.
const FRAMES_IN_FLIGHT: usize = 64;
/// The headline of whatever is noticed of a failure.
const FAILED: &str = "the workers failed";
/// The name of the stage after the last one, in messages.
const BENCH: &str = "bench";

/// What all workers have in common.
pub(super) struct Setup {
    /// This program.
    pub(super) program: PathBuf,
    /// Flags of each worker: its weights, device, threads, precision and prefill.
    pub(super) flags: Vec<OsString>,
    /// The model's sizes.
    pub(super) config: ModelConfig,
    /// The weights' digest.
    pub(super) digest: String,
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
    epoch: u64,
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

/// All processes, and what is heard of them.
pub(super) struct Cluster {
    setup: Setup,
    net: Arc<dyn Net>,
    secret: SecretText,
    generation: u64,
    link_key: LinkKey,
    port: Port,
    processes: mpsc::Receiver<child::Event>,
    tell_processes: mpsc::Sender<child::Event>,
    links: mpsc::Receiver<LinkEvent>,
    tell_links: mpsc::Sender<LinkEvent>,
    children: JoinSet<child::Ended>,
    /// Where each worker's orders go. Kept to the end: without its coordinator a worker would dial again.
    outboxes: HashMap<String, Outbox>,
    screen: Arc<Screen>,
    next_micro_batch: u64,
    /// Ends the processes.
    stop: CancellationToken,
    /// Ends the port and the links, once the processes have ended.
    closed: CancellationToken,
}

impl Cluster {
    /// Opens the port; no process runs yet.
    ///
    /// # Errors
    /// When the system gives no port.
    pub(super) async fn open(setup: Setup) -> Result<Self, CliError> {
        let net: Arc<dyn Net> = Arc::new(Tcp);
        let (secret, generation, closed) = (SecretText::random()?, machine::generation(), CancellationToken::new());
        let port = Port::open(&net, &secret.to_secret(), generation, setup.max_frame_bytes(), closed.clone()).await?;
        let (tell_processes, processes) = mpsc::channel(256);
        let (tell_links, links) = mpsc::channel(64);
        Ok(Self {
            setup,
            net,
            secret,
            generation,
            link_key: config::link_key()?,
            port,
            processes,
            tell_processes,
            links,
            tell_links,
            children: JoinSet::new(),
            outboxes: HashMap::new(),
            screen: Arc::new(Screen::new()),
            next_micro_batch: 1,
            stop: CancellationToken::new(),
            closed,
        })
    }

    /// Starts a worker for each run of layers and waits until all have joined: one after the other, so that what each measures of
    /// its device is not disturbed by the next.
    ///
    /// # Errors
    /// When one does not start or does not join.
    pub(super) async fn start(
        &mut self,
        epoch: u64,
        workers: Vec<(String, Range<u32>)>,
        memory: impl Fn(&Range<u32>) -> Option<u64>,
    ) -> Result<Arrangement, CliError> {
        let mut members = Vec::new();
        for (name, layers) in workers {
            let launch = self.launch(&name, memory(&layers));
            let child = Child {
                name: name.clone(),
                launch: Box::new(move || launch.clone()),
                restart: false,
                screen: Arc::clone(&self.screen),
                events: self.tell_processes.clone(),
                stop: self.stop.clone(),
            };
            self.children.spawn(child.supervise());
            let deadline = Instant::now() + JOIN_WITHIN;
            let (hello, outbox) = loop {
                match self.next(deadline, &format!("worker {name} to join")).await? {
                    Event::Joined { hello, outbox } if hello.name == name => break (*hello, outbox),
                    _ => {}
                }
            };
            self.outboxes.insert(name, outbox);
            members.push(Member { hello, layers });
        }
        Ok(Arrangement { epoch, members, link: None })
    }

    fn launch(&self, name: &str, memory: Option<u64>) -> Launch {
        let mut args: Vec<OsString> = ["worker", "--exit-with-stdin", "--secret-stdin", "--no-config", "--coordinator"]
            .map(OsString::from)
            .to_vec();
        args.extend([&self.port.address, "--name", name].map(OsString::from));
        args.extend(self.setup.flags.iter().cloned());
        if let Some(bytes) = memory {
            args.extend(["--memory-share".to_owned(), bytes.to_string()].map(OsString::from));
        }
        Launch::new(&self.setup.program, args, self.secret.text().map(str::to_owned))
    }

    /// Tells all workers their layers, waits until they have them, and opens the links to the first stages.
    ///
    /// # Errors
    /// When a stage fails, or loads nothing for too long.
    pub(super) async fn load(
        &mut self,
        arrangements: &mut [Arrangement],
        progress: &ProgressBar,
    ) -> Result<(), CliError> {
        for arrangement in arrangements.iter() {
            self.assign(arrangement)?;
        }
        let mut waiting: usize = arrangements.iter().map(|arrangement| arrangement.members.len()).sum();
        let mut loaded: HashMap<String, (u64, u64)> = HashMap::new();
        let mut deadline = Instant::now() + STALLED_AFTER;
        while waiting > 0 {
            let Event::Said { worker, message } = self.next(deadline, "the layers to be loaded").await? else {
                continue;
            };
            match *message {
                Message::StageReady(_) => {
                    waiting -= 1;
                    deadline = Instant::now() + STALLED_AFTER;
                }
                Message::LoadProgress(now) => {
                    let now = (now.bytes, now.bytes_total);
                    if loaded.insert(worker, now) != Some(now) {
                        deadline = Instant::now() + STALLED_AFTER;
                        progress.set_length(loaded.values().map(|(_, total)| total).sum());
                        progress.set_position(loaded.values().map(|(bytes, _)| bytes).sum());
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
                secret: self.secret.to_secret(),
                token: self.link_key.frames(arrangement.epoch.into(), 0),
                max_frame_bytes: self.setup.max_frame_bytes(),
                max_in_flight: FRAMES_IN_FLIGHT,
            };
            let link = Link::open(&self.net, settings, self.tell_links.clone(), self.closed.clone()).await;
            arrangement.link = Some(link.map_err(|error| CliError::failed("a worker takes no frames").because(error))?);
        }
        Ok(())
    }

    fn assign(&self, arrangement: &Arrangement) -> Result<(), CliError> {
        let mut previous_generation = self.generation;
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
                kv_block_tokens: KV_BLOCK_TOKENS as u32,
                max_batch_tokens: self.setup.max_batch_tokens,
                max_frames_in_flight: FRAMES_IN_FLIGHT as u32,
                activation_dtype: ActivationDtype::F32 as i32,
                coordinator_generation: self.generation,
                link_token: self.link_key.frames(arrangement.epoch.into(), index).to_wire(),
                next_token: self.link_key.frames(arrangement.epoch.into(), index + 1).to_wire(),
            };
            let order = JoinResponse { message: Some(join_response::Message::Assignment(assignment)) };
            let outbox = self.outboxes.get(&member.hello.name);
            if outbox.is_none_or(|outbox| outbox.try_send(Ok(order)).is_err()) {
                return Err(CliError::failed(format!("worker {} takes no orders", member.hello.name)));
            }
            previous_generation = member.hello.generation;
        }
        Ok(())
    }

    /// Runs a step through an arrangement.
    ///
    /// # Errors
    /// When a frame is refused, damaged or late, or a worker is lost.
    pub(super) async fn run(&mut self, arrangement: &Arrangement, frames: &[Frame]) -> Result<Ran, CliError> {
        let first_number = self.next_micro_batch;
        self.next_micro_batch += frames.len() as u64;
        let numbered = (first_number..).zip(frames).map(|(micro_batch_id, frame)| Frame {
            plan_epoch: arrangement.epoch,
            sender_generation: self.generation,
            micro_batch_id,
            ..frame.clone()
        });
        let numbered: Vec<Frame> = numbered.collect();
        let mut back: Vec<Option<Frame>> = vec![None; frames.len()];
        let mut missing = frames.len();
        let started = Instant::now();
        let deadline = started + STEP_WITHIN;
        for frame in numbered {
            let Some(link) = &arrangement.link else { return Err(CliError::failed("the workers have no layers yet")) };
            if !matches!(time::timeout_at(deadline, link.send(frame)).await, Ok(Ok(()))) {
                let noticed = CliError::failed(FAILED).because("the link to the first stage takes no frames");
                return Err(self.lost(noticed).await);
            }
        }
        while missing > 0 {
            let Event::Frame(frame) = self.next(deadline, "a frame to come back").await? else { continue };
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
    fn check(&self, frame: &Frame) -> Result<(), CliError> {
        let rows = frame.sequences.iter().map(|slice| slice.token_ids.len()).sum();
        let failed = || CliError::failed("the last stage handed on hidden states that no stage would take");
        let hidden = frame.hidden_states.as_ref().ok_or_else(|| failed().because("there are none"))?;
        hidden_states::decode(hidden, rows, self.setup.config.hidden_size).map_err(|error| failed().because(error))?;
        Ok(())
    }

    /// The next event that is no bad news.
    async fn next(&mut self, deadline: Instant, wanted: &str) -> Result<Event, CliError> {
        loop {
            let noticed = tokio::select! {
                biased;
                Some(event) = self.processes.recv() => match process_error(event) {
                    Some(error) => return Err(error),
                    None => continue,
                },
                Some(event) = self.links.recv() => match event {
                    LinkEvent::FrameFailed { message, .. } => CliError::failed(FAILED).because(message),
                    LinkEvent::Lost { reason } => CliError::failed(FAILED).because(reason),
                },
                Some(event) = self.port.events.recv() => match event {
                    Event::Left { worker } => CliError::failed(FAILED).because(format!("worker {worker} has gone")),
                    Event::Said { worker, message } => match *message {
                        Message::StageFailed(failed) => {
                            let code = if failed.out_of_memory { Code::OutOfMemory } else { Code::Failed };
                            CliError::new(code, FAILED).because(format!("worker {worker}: {}", failed.message))
                        }
                        Message::FrameFailed(failed) => CliError::failed(FAILED).because(failed.message),
                        Message::Heartbeat(_) => continue,
                        other => return Ok(Event::Said { worker, message: Box::new(other) }),
                    },
                    event => return Ok(event),
                },
                () = time::sleep_until(deadline) => {
                    return Err(CliError::new(Code::TimedOut, format!("waited too long for {wanted}")));
                }
            };
            return Err(self.lost(noticed).await);
        }
    }

    /// Why something broke: the end of a process, if that is why, else what was noticed first.
    async fn lost(&mut self, noticed: CliError) -> CliError {
        let exit = time::timeout(EXIT_WITHIN, async {
            loop {
                if let Some(error) = process_error(self.processes.recv().await?) {
                    return Some(error);
                }
            }
        });
        exit.await.ok().flatten().unwrap_or(noticed)
    }

    /// Ends every process, then the port.
    pub(super) async fn end(mut self) {
        self.stop.cancel();
        self.processes.close();
        while let Some(ended) = self.children.join_next().await {
            if let Ok(ended) = ended
                && ended.killed
            {
                self.screen.say(&format!("{} did not end within 5 s and was killed", ended.name));
            }
        }
        self.closed.cancel();
    }
}

/// What the end of a process means; a line that it printed means nothing.
fn process_error(event: child::Event) -> Option<CliError> {
    match event {
        child::Event::Line { .. } => None,
        child::Event::NotStarted { name, error } => {
            Some(CliError::failed(format!("worker {name} cannot be started")).because(error))
        }
        child::Event::Exited { name, code, how } => {
            let code = code.map_or(Code::Failed, Code::from_exit);
            Some(CliError::new(code, format!("worker {name} {how}")).because("its own message, if any, stands above"))
        }
    }
}

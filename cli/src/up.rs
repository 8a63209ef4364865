//! `grokpipe up`: a whole cluster with one command. Starts the coordinator and the workers as processes of this same program,
//! shows how they load, says where they are reached, and ends all of them when it ends.
//!
//! Decides which processes there are and how they find each other. What a process does is its own subcommand's.

pub(crate) mod child;
pub(crate) mod command;
mod picture;
mod reach;
pub(crate) mod screen;

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use grokpipe_kernels::{Precision, Prefill};
use grokpipe_proto::{
    snapshot::{ClusterSnapshot, VerdictPhase},
    v1::{GenerateRequest, generate_request::Prompt},
};
use serde::Deserialize;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use self::{
    child::{Child, Event},
    command::Common,
    screen::Screen,
};
use crate::{
    client::Client,
    common::{ConfigArgs, parse_device},
    config::{Config, SecretText, WorkerSection, parse_precision, parse_prefill},
    devices,
    ending::{Stdin, shutdown_token},
    error::{CliError, Code},
    generate::generate,
    listen::dialled_here,
    machine, paths,
    plan::PlanView,
    text::print_aside,
};

/// Name of the coordinator's process in messages.
const COORDINATOR: &str = "coordinator";
/// Time between two looks at the cluster while it starts.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Time for the coordinator to open its ports; it reads no weights before that.
const LISTEN_WITHIN: Duration = Duration::from_secs(60);
/// How long a cluster with all its workers may go without a plan before that is worth a word, or with `--once` an end.
const PLAN_WITHIN: Duration = Duration::from_secs(20);
/// How long with `--once` a cluster with all its workers may get no further before it counts as stuck.
const PROGRESS_WITHIN: Duration = Duration::from_secs(30);
/// How long the coordinator may take to tell its clients that it ends, before the workers end too.
const FAREWELL_WITHIN: Duration = Duration::from_secs(1);
/// What the first generated text continues.
const FIRST_PROMPT: &str = "The capital of France is";
/// Its length, and that of `--once`.
const FIRST_TOKENS: u32 = 16;
const ONCE_TOKENS: u32 = 32;

/// Arguments of `up`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Number of workers: the first ones described, and plain local ones beyond
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Option<u32>,
    /// Folder or file of the model
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: Option<PathBuf>,
    /// Device of all workers: auto, cpu, gpu, or gpu: and an index, a PCI address or a part of its name
    #[arg(long, value_name = "D", value_parser = parse_device)]
    device: Option<String>,
    /// CPU threads of each worker
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// fast multiplies quantised weights by 8-bit inputs, exact by f32 [default: fast]
    #[arg(long, value_name = "exact|fast", value_parser = parse_precision)]
    precision: Option<Precision>,
    /// How a GPU computes steps of many rows: fast takes its tensor cores, where it has them [default: invariant]
    #[arg(long, value_name = "invariant|fast", value_parser = parse_prefill)]
    prefill: Option<Prefill>,
    /// The tokenizer.model
    #[arg(long, value_name = "F", value_parser = paths::parser())]
    tokenizer: Option<PathBuf>,
    /// Address of the page and the HTTP routes
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Address of gRPC
    #[arg(long, value_name = "ADDR")]
    grpc: Option<String>,
    /// Print the continuation of PROMPT, end everything
    #[arg(long, value_name = "PROMPT")]
    once: Option<String>,
    /// Do not start processes again that died
    #[arg(long)]
    no_restart: bool,
    /// Allow addresses that others can reach without a secret
    #[arg(long)]
    insecure: bool,
}

/// Where the coordinator listens, as it says on its standard output.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Listening {
    grpc: SocketAddr,
    http: SocketAddr,
}

/// Runs `up` until it is told to end.
///
/// # Errors
/// [`CliError`] with the exit code of what failed; nothing is left running.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let mut config = load(args)?;
    let mut roster = config.roster(args.workers);
    for worker in &mut roster {
        worker.device = args.device.clone().unwrap_or_else(|| worker.device.clone());
        worker.threads = args.threads.or(worker.threads);
        worker.precision = args.precision.or(worker.precision);
        worker.prefill = args.prefill.or(worker.prefill);
    }
    check_addresses(&config, &roster, args.insecure)?;
    // Others on this machine could join, or play a worker. Who gives --insecure may want to start workers by hand.
    if !config.secret.is_set() && !args.insecure {
        config.secret = SecretText::random()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::failed("the runtime could not start").because(error))?;
    let done = runtime.block_on(Up::start(args, config, roster));
    runtime.shutdown_background();
    done
}

fn load(args: &Args) -> Result<Config, CliError> {
    args.config
        .layers()
        .path_flag("model.path", args.model.as_deref())
        .path_flag("model.tokenizer", args.tokenizer.as_deref())
        .flag("coordinator.grpc", args.grpc.as_ref())
        .flag("coordinator.http", args.http.as_ref())
        .load()
}

/// Refuses addresses that need a secret, hosts that could not meet, and ports that are taken, before anything runs.
fn check_addresses(config: &Config, roster: &[WorkerSection], insecure: bool) -> Result<(), CliError> {
    let listen = &config.coordinator;
    for (key, address) in [("coordinator.grpc", listen.grpc), ("coordinator.http", listen.http)] {
        config.check_exposure(key, &address, insecure)?;
    }
    for worker in roster {
        let reach = reach::of(worker, roster, config, listen.grpc)?;
        config.check_exposure(&format!("the address of worker {}", worker.name), &reach.exposed(), insecure)?;
    }
    // Held together, so that the two are not one address; both are closed again when this ends.
    let _held =
        [free_port("coordinator.grpc", listen.grpc, "--grpc")?, free_port("coordinator.http", listen.http, "--http")?];
    Ok(())
}

fn free_port(key: &str, address: SocketAddr, flag: &str) -> Result<TcpListener, CliError> {
    TcpListener::bind(address).map_err(|error| {
        let error_is_taken = error.kind() == io::ErrorKind::AddrInUse;
        let what = if error_is_taken { "is in use" } else { "cannot be opened" };
        CliError::failed(format!("{key} = {address} {what}"))
            .because(error)
            .advise(format!("end what uses it, or choose another one with {flag}"))
    })
}

/// A cluster that is being started or runs.
struct Up<'a> {
    args: &'a Args,
    config: Config,
    roster: Vec<WorkerSection>,
    program: PathBuf,
    screen: Arc<Screen>,
    events: mpsc::Sender<Event>,
    stop: Stop,
    children: JoinSet<child::Ended>,
}

/// Ends the processes: first the coordinator, so that it is what its clients hear the last of, not the loss of a worker.
#[derive(Default)]
struct Stop {
    coordinator: CancellationToken,
    workers: CancellationToken,
}

impl<'a> Up<'a> {
    async fn start(args: &'a Args, config: Config, roster: Vec<WorkerSection>) -> Result<(), CliError> {
        let program = std::env::current_exe()
            .map_err(|error| CliError::failed("this program's own path is not known").because(error))?;
        let interrupted = shutdown_token(&Stdin::default())?;
        let (events, mut inbox) = mpsc::channel(256);
        let mut up = Self {
            args,
            config,
            roster,
            program,
            screen: Arc::new(Screen::new()),
            events,
            stop: Stop::default(),
            children: JoinSet::new(),
        };
        let outcome = tokio::select! {
            outcome = up.live(&mut inbox) => outcome,
            () = interrupted.cancelled() => match args.once {
                Some(_) => Err(CliError::failed("cancelled")),
                None => Ok(()),
            },
        };
        drop(inbox);
        up.end().await;
        outcome
    }

    /// Starts everything, serves, and returns only with `--once` or with an error.
    async fn live(&mut self, inbox: &mut mpsc::Receiver<Event>) -> Result<(), CliError> {
        let listening = self.start_coordinator(inbox).await?;
        self.deal_gpus().await;
        self.start_workers(listening)?;
        let grpc = dialled_here(listening.grpc).to_string();
        let client = attended(connected(&grpc), inbox, |event| self.early(event)).await?;
        attended(self.until_serving(&client), inbox, |event| self.early(event)).await?;
        self.screen.clear();
        if let Some(prompt) = &self.args.once {
            return attended(once(&client, prompt), inbox, |event| self.late(event)).await;
        }
        attended(self.introduce(&client, listening), inbox, |event| self.late(event)).await?;
        while let Some(event) = inbox.recv().await {
            self.late(event)?;
        }
        Ok(())
    }

    async fn start_coordinator(&mut self, inbox: &mut mpsc::Receiver<Event>) -> Result<Listening, CliError> {
        // A coordinator that is started again must be found where it was.
        let known: Arc<OnceLock<Listening>> = Arc::default();
        let wanted = Listening { grpc: self.config.coordinator.grpc, http: self.config.coordinator.http };
        let (launch, found) = (self.coordinator_launch(), Arc::clone(&known));
        self.keep_alive(COORDINATOR.to_owned(), Box::new(move || launch(found.get().unwrap_or(&wanted))));
        let listening = async {
            while let Some(event) = inbox.recv().await {
                match event {
                    Event::Line { text, .. } => {
                        return serde_json::from_str::<Listening>(&text).map_err(|error| {
                            CliError::failed("the coordinator does not say where it listens").because(error)
                        });
                    }
                    event => self.early(event)?,
                }
            }
            Err(CliError::failed("the coordinator is gone"))
        };
        let listening = time::timeout(LISTEN_WITHIN, listening).await.map_err(|_elapsed| {
            CliError::new(Code::TimedOut, "the coordinator does not open its ports")
                .because(format!("expected them within {} s", LISTEN_WITHIN.as_secs()))
        })??;
        let _ = known.set(listening);
        Ok(listening)
    }

    /// How the coordinator is started at given addresses. Owns what it needs, so that it can outlive this borrow.
    fn coordinator_launch(&self) -> impl Fn(&Listening) -> command::Launch + Send + Sync + use<> {
        let (config, roster, program) = (self.config.clone(), self.roster.clone(), self.program.clone());
        let (pretty, filter, insecure) = (self.screen.is_terminal(), self.filter(), self.args.insecure);
        move |at| {
            let common = Common { config: &config, program: &program, insecure, pretty, filter };
            common.coordinator(&at.grpc.to_string(), &at.http.to_string(), &roster)
        }
    }

    /// Gives the workers of this machine that leave their GPU open one each.
    async fn deal_gpus(&mut self) {
        let mut local: Vec<_> = self.roster.iter_mut().filter(|worker| worker.host.is_none()).collect();
        if local.len() < 2 || !local.iter().any(|worker| devices::is_open(&worker.device)) {
            return;
        }
        let wish = |worker: &&mut WorkerSection| devices::Wish {
            device: worker.device.clone(),
            names_memory: worker.memory.is_some(),
        };
        let wishes: Vec<_> = local.iter().map(wish).collect();
        let adapters = devices::adapters(&self.program).await;
        for (worker, device) in local.iter_mut().zip(devices::deal(&adapters, &wishes)) {
            if worker.device != device {
                tracing::info!(worker = worker.name, device, "the GPUs of this machine are dealt");
                worker.device = device;
            }
        }
    }

    fn start_workers(&mut self, listening: Listening) -> Result<(), CliError> {
        let local = self.roster.iter().filter(|worker| worker.host.is_none()).count().max(1);
        let threads = (machine::cores() / u32::try_from(local).unwrap_or(u32::MAX)).max(1);
        let share = grokpipe_kernels::available_memory_bytes().map(|bytes| bytes / local as u64);
        let mut launches = Vec::new();
        for worker in &self.roster {
            let reach = reach::of(worker, &self.roster, &self.config, listening.grpc)?;
            let launch = match &worker.host {
                None => self.common().local_worker(worker, &reach, worker.threads.unwrap_or(threads), share),
                Some(host) => self.common().remote_worker(worker, host, &reach)?,
            };
            launches.push((worker.name.clone(), launch));
        }
        for (name, launch) in launches {
            self.keep_alive(name, Box::new(move || launch.clone()));
        }
        Ok(())
    }

    fn keep_alive(&mut self, name: String, launch: Box<dyn Fn() -> command::Launch + Send + Sync>) {
        let stop = if name == COORDINATOR { &self.stop.coordinator } else { &self.stop.workers };
        let child = Child {
            stop: stop.clone(),
            name,
            launch,
            restart: !self.args.no_restart,
            screen: Arc::clone(&self.screen),
            events: self.events.clone(),
        };
        self.children.spawn(child.supervise());
    }

    fn common(&self) -> Common<'_> {
        Common {
            config: &self.config,
            program: &self.program,
            insecure: self.args.insecure,
            pretty: self.screen.is_terminal(),
            filter: self.filter(),
        }
    }

    fn filter(&self) -> &'static str {
        if self.args.once.is_some() { "error" } else { "info" }
    }

    /// An event before the cluster served for the first time: a process that gives up by itself ends the start.
    fn early(&self, event: Event) -> Result<(), CliError> {
        match event {
            Event::NotStarted { name, error } => {
                Err(CliError::failed(format!("{name} cannot be started")).because(error))
            }
            Event::Exited { name, code: Some(code), how } => {
                let remote = self.roster.iter().find(|worker| worker.name == name).and_then(|w| w.host.as_deref());
                // ssh itself ends with 255 when it reaches nobody.
                let kind = if remote.is_some() && code == 255 { Code::Unreachable } else { Code::from_exit(code) };
                let error = CliError::new(kind, format!("{name} {how} before the cluster served"));
                Err(match remote {
                    Some(host) => match (self.no_program(&name, code), code) {
                        (Some(why), _) => error
                            .at(host.to_owned())
                            .because(why)
                            .advise(format!("install it on {host}, or set binary under its [[worker]] to where it is")),
                        (None, 255) => {
                            error.at(host.to_owned()).advise(format!("try it by hand: ssh -o BatchMode=yes {host}"))
                        }
                        (None, _) => error.at(host.to_owned()).because("its own message stands above"),
                    },
                    None => error.because("its own message stands above"),
                })
            }
            event => self.late(event),
        }
    }

    /// An event of a cluster that has served: it is told, and the process is started again.
    fn late(&self, event: Event) -> Result<(), CliError> {
        let next = if self.args.no_restart { "it stays down" } else { "it is started again in 1 s" };
        match event {
            Event::Exited { name, code, how } => {
                let why = code
                    .and_then(|code| self.no_program(&name, code))
                    .map_or_else(String::new, |why| format!(" ({why})"));
                self.screen.say(&format!("{name} {how}{why}; {next}"));
            }
            Event::NotStarted { name, error } => self.screen.say(&format!("{name} cannot be started: {error}; {next}")),
            Event::Line { name, text } => {
                // A coordinator that was started again says where it listens; that has not changed.
                if name != COORDINATOR {
                    self.screen.say(&format!("{name} | {text}"));
                }
            }
        }
        Ok(())
    }

    /// What the exit codes mean by which the shell of another host says that it has no such program, or may not run it.
    fn no_program(&self, name: &str, code: i32) -> Option<String> {
        let worker = self.roster.iter().find(|worker| worker.name == name)?;
        let (host, program) = (worker.host.as_ref()?, &worker.binary);
        match code {
            126 => Some(format!("{program} cannot be run on {host}")),
            127 => Some(format!("there is no program {program} on {host}")),
            _ => None,
        }
    }

    /// Shows progress until all layers are loaded.
    async fn until_serving(&self, client: &Client) -> Result<(), CliError> {
        let mut waiting_since: Option<Instant> = None;
        let mut told = false;
        let mut most_loaded: Option<(u64, Instant)> = None;
        let mut silent_since: Option<Instant> = None;
        loop {
            let answer = client.status().await;
            if answer.is_ok() {
                silent_since = None;
            }
            match answer {
                Ok(snapshot) if snapshot.verdict().serving => return Ok(()),
                Ok(snapshot) => {
                    self.screen.progress(&snapshot);
                    let all_here = snapshot.nodes.len() >= self.roster.len();
                    if snapshot.verdict().phase() == VerdictPhase::Waiting && all_here {
                        let since = *waiting_since.get_or_insert_with(Instant::now);
                        if since.elapsed() >= PLAN_WITHIN && self.args.once.is_some() {
                            // The plan's refusal tells a lack of memory from other reasons.
                            let refused = client.plan().await.err().filter(|error| error.code() == Code::OutOfMemory);
                            return Err(refused.unwrap_or_else(|| stuck(&snapshot, PLAN_WITHIN)));
                        }
                        if since.elapsed() >= PLAN_WITHIN && !told {
                            told = true;
                            self.screen.say(&snapshot.verdict().text);
                        }
                    } else {
                        waiting_since = None;
                    }
                    let all_joined = all_here && snapshot.nodes.iter().all(|node| node.joins > 0);
                    let loaded =
                        snapshot.nodes.iter().filter_map(|node| node.load().bytes).fold(0, u64::saturating_add);
                    match most_loaded {
                        Some((before, since)) if all_joined && loaded <= before => {
                            if since.elapsed() >= PROGRESS_WITHIN && self.args.once.is_some() {
                                return Err(stuck(&snapshot, PROGRESS_WITHIN));
                            }
                        }
                        _ => most_loaded = Some((loaded, Instant::now())),
                    }
                }
                // A coordinator that is being started again does not answer for a moment.
                Err(error) if error.is_passing() => {
                    let since = *silent_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= PROGRESS_WITHIN {
                        if self.args.once.is_some() {
                            return Err(error);
                        }
                        self.screen.say(&error.to_string());
                        silent_since = Some(Instant::now());
                    }
                }
                Err(error) => return Err(error),
            }
            time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Prints the plan, the addresses and a first generated text.
    async fn introduce(&self, client: &Client, listening: Listening) -> Result<(), CliError> {
        let mut text = match PlanView::of_cluster(client).await {
            Ok(plan) => plan.render(),
            // It serves; that nobody can say how is no reason to end it.
            Err(error) => format!("the plan is not known: {error}\n"),
        };
        let http = dialled_here(listening.http);
        text.push_str(&format!("\ngRPC  {}\npage  http://{http}/\n", listening.grpc));
        print_aside(format!("{text}\n")).await?;
        match generate(client, prompt(FIRST_PROMPT, FIRST_TOKENS), async |_text| Ok(())).await {
            Ok(generation) => print_aside(format!("{FIRST_PROMPT}{}\n\n", generation.text.trim_end())).await?,
            Err(error) => self.screen.say(&format!("no first text: {error}")),
        }
        print_aside("Ctrl-C ends the cluster.\n".to_owned()).await
    }

    /// Ends every process and says which ones had to be killed.
    async fn end(mut self) {
        self.screen.clear();
        self.stop.coordinator.cancel();
        let workers = self.stop.workers.clone();
        let farewell = time::sleep(FAREWELL_WITHIN);
        tokio::pin!(farewell);
        loop {
            let ended = tokio::select! {
                ended = self.children.join_next() => ended,
                () = &mut farewell, if !workers.is_cancelled() => {
                    workers.cancel();
                    continue;
                }
            };
            let Some(ended) = ended else { break };
            if ended.as_ref().is_ok_and(|ended| ended.name == COORDINATOR) {
                workers.cancel();
            }
            match ended {
                Ok(ended) if ended.killed => {
                    self.screen.say(&format!("{} did not end within 5 s and was killed", ended.name))
                }
                Ok(_) => {}
                Err(error) => self.screen.say(&format!("a process could not be watched: {error}")),
            }
        }
        if self.args.once.is_none() {
            self.screen.say("all processes have ended");
        }
    }
}

/// A client of the coordinator, which may be started again or be silent for a moment.
async fn connected(grpc: &str) -> Result<Client, CliError> {
    let until = Instant::now() + LISTEN_WITHIN;
    loop {
        match Client::connect(grpc).await {
            Err(error) if error.is_passing() && Instant::now() < until => time::sleep(POLL_INTERVAL).await,
            done => return done,
        }
    }
}

/// A cluster that got no further for so long.
fn stuck(snapshot: &ClusterSnapshot, waited: Duration) -> CliError {
    let mut why = snapshot.verdict().text.clone();
    for node in &snapshot.nodes {
        if let Some(error) = node.last_error.as_ref().filter(|error| !why.contains(error.as_str())) {
            why.push_str(&format!("; {}: {error}", node.name));
        }
    }
    CliError::new(
        Code::TimedOut,
        format!("the cluster is not ready and has made no progress for {} s", waited.as_secs()),
    )
    .because(why)
}

/// Waits for `work` while events are told to `on_event`, whose error ends the wait.
async fn attended<T>(
    work: impl Future<Output = Result<T, CliError>>,
    inbox: &mut mpsc::Receiver<Event>,
    on_event: impl Fn(Event) -> Result<(), CliError>,
) -> Result<T, CliError> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(event) = inbox.recv() => on_event(event)?,
        }
    }
}

/// Prints the continuation of a prompt and nothing else.
async fn once(client: &Client, text: &str) -> Result<(), CliError> {
    generate(client, prompt(text, ONCE_TOKENS), async |text| print_aside(text).await).await?;
    print_aside("\n".to_owned()).await
}

fn prompt(text: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text(text.to_owned())),
        max_tokens: Some(max_tokens),
        ..GenerateRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    #[test]
    fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = Layers { no_file: true, ..Layers::default() }.load().unwrap();
        config.coordinator.http = taken.local_addr().unwrap();
        config.coordinator.grpc.set_port(0);
        let error = check_addresses(&config, &config.roster(None), false).unwrap_err();
        let message = error.to_string();
        assert_eq!(error.code(), Code::Failed);
        assert!(
            message.contains("coordinator.http") && message.contains("in use") && message.contains("--http"),
            "{message}"
        );
    }
}

//! Faults of every kind, at every stage, in every phase: the request that meets one ends with its exact tokens or with a typed error;
//! whenever the cluster says that it serves, the next request gets its exact tokens, within 5 s and without anyone's help; and no KV
//! block stays taken.
//!
//! Real coordinator and workers under simulated network and time. `SEED=17 cargo test --test faults` runs with another seed.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex},
    time::Duration,
};

use grokpipe_coordinator::Coordinator;
use grokpipe_proto::{
    secret::Secret,
    snapshot::ClusterSnapshot,
    transport::{self, Keepalive, Net},
    v1::{
        GenerateRequest, GetStatusRequest, SamplingOptions, cluster_service_client::ClusterServiceClient,
        inference_service_client::InferenceServiceClient,
    },
};
use grokpipe_tests::{
    faults::{Faults, FaultyExecutor, FaultyLoader, FaultyNet, Phase, StepFault, WireFault},
    simulated::{
        GRPC_PORT, SimulatedNet, SmallLoader, address, coordinator_settings, reference_tokens, request, small_config,
        small_facts, token_of, worker_settings,
    },
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

const MODEL_SEED: u64 = 5;
const LAYERS: u32 = 6;
const STAGES: usize = 3;
/// As many as the longest sequence takes: one that gets them all proves that no other has any.
const KV_TOKENS: u32 = 256;
/// How soon the next request must get its tokens.
const NEXT_WITHIN: Duration = Duration::from_secs(5);
/// How long a request that meets a fault may take; it would take a second without one.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// What a fault may do to the request that meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// Nothing: it gets its tokens.
    None,
    /// It ends with a typed error, if not with its tokens.
    Error,
}

/// How a fault is planned, and how it ends by itself.
type Strike = Arc<dyn Fn(&Faults) + Send + Sync>;

struct Cell {
    name: String,
    /// Index of the worker, from 0.
    stage: usize,
    strike: Strike,
    /// Ends by itself after this long.
    lasts: Option<Duration>,
    /// Strikes before the cluster starts.
    from_the_start: bool,
    harm: Harm,
}

impl Cell {
    fn new(
        name: impl Into<String>,
        stage: usize,
        harm: Harm,
        strike: impl Fn(&Faults) + Send + Sync + 'static,
    ) -> Self {
        let place = ["first", "middle", "last"][stage];
        let (name, strike) = (format!("{}, {place} stage", name.into()), Arc::new(strike));
        Self { name, stage, strike, lasts: None, from_the_start: false, harm }
    }

    fn for_a_while(self, lasts: Duration) -> Self {
        Self { lasts: Some(lasts), ..self }
    }

    fn at_the_start(self) -> Self {
        Self { from_the_start: true, ..self }
    }
}

fn seed() -> u64 {
    std::env::var("SEED").map_or(1, |seed| seed.parse().expect("SEED is a number"))
}

fn short() -> GenerateRequest {
    request(&[5, 9, 13], 12, SamplingOptions::default())
}

fn long_prompt() -> Vec<u32> {
    (1..=40).collect()
}

/// A prompt of three chunks, then steps of one row.
fn long() -> GenerateRequest {
    request(&long_prompt(), 12, SamplingOptions::default())
}

/// Takes every KV block.
fn whole_pool() -> GenerateRequest {
    request(&[7, 8], KV_TOKENS - 2, SamplingOptions::default())
}

/// What requests get from one stage that holds all layers.
struct Expected {
    short: Vec<u32>,
    long: Vec<u32>,
    whole_pool: Vec<u32>,
}

impl Expected {
    fn new() -> Arc<Self> {
        let of = |prompt: &[u32], count| {
            reference_tokens(&small_config(LAYERS), MODEL_SEED, prompt, count).expect("a sound device")
        };
        let whole_pool = of(&[7, 8], KV_TOKENS as usize - 2);
        Arc::new(Self { short: of(&[5, 9, 13], 12), long: of(&long_prompt(), 12), whole_pool })
    }
}

fn secret() -> Secret {
    Secret::new("simulated-secret-16").expect("long enough")
}

async fn run_coordinator() -> turmoil::Result {
    let mut settings = coordinator_settings(format!("0.0.0.0:{GRPC_PORT}"), secret(), STAGES);
    settings.kv_tokens = KV_TOKENS.into();
    let coordinator =
        Coordinator::bind(settings, small_facts(&small_config(LAYERS)), None, Arc::new(SimulatedNet)).await?;
    coordinator.serve(CancellationToken::new()).await?;
    Ok(())
}

async fn run_worker(index: usize, faults: Faults) -> turmoil::Result {
    let loader = Box::new(FaultyLoader::new(SmallLoader::new(small_config(LAYERS), MODEL_SEED), faults.clone()));
    let executor = Arc::new(FaultyExecutor::new(faults.clone()));
    let net = Arc::new(FaultyNet::new(SimulatedNet, faults));
    let settings = worker_settings(index + 1, 1, secret());
    grokpipe_worker::run(settings, net, executor, loader, CancellationToken::new()).await?;
    Ok(())
}

/// A client that opens a connection when it has none: a fault of the network is not to be one of this client.
struct Client(Channel);

impl Client {
    async fn open() -> Self {
        let net: Arc<dyn Net> = Arc::new(SimulatedNet);
        loop {
            if let Ok(channel) = transport::connect(&net, &address("coordinator", GRPC_PORT), Keepalive::Client).await {
                return Self(channel);
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn snapshot(&self) -> ClusterSnapshot {
        let status = ClusterServiceClient::new(self.0.clone()).get_status(GetStatusRequest {}).await;
        let snapshot = status.expect("the coordinator answers").into_inner().snapshot.expect("a snapshot");
        snapshot.checked().expect("a good snapshot")
    }

    async fn until_serving(&self) {
        while !self.snapshot().await.verdict().serving {
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn generate(&self, request: GenerateRequest) -> Result<Vec<u32>, Status> {
        let mut stream = InferenceServiceClient::new(self.0.clone()).generate(request).await?.into_inner();
        let mut ids = Vec::new();
        while let Some(response) = stream.message().await? {
            ids.extend(token_of(response, ids.len()));
        }
        Ok(ids)
    }
}

/// The request that meets the fault: `Err` says what it should not have come to.
fn judge(harm: Harm, found: Result<Vec<u32>, Status>, expected: &[u32]) -> Result<(), String> {
    match found {
        Ok(ids) if ids == expected => Ok(()),
        Ok(ids) => Err(format!("WRONG TOKENS: expected {expected:?}, found {ids:?}")),
        Err(status) if harm == Harm::None => Err(format!("expected its tokens, found {status:?}")),
        Err(status) if matches!(status.code(), Code::Unavailable | Code::Internal) => Ok(()),
        Err(status) => Err(format!("expected UNAVAILABLE or INTERNAL, found {status:?}")),
    }
}

/// What becomes of a cluster that meets a fault.
async fn meet(cell: &Cell, faults: &Faults, expected: &Expected) -> Result<String, String> {
    let client = Client::open().await;
    if timeout(ENDS_WITHIN, client.until_serving()).await.is_err() {
        let told = client.snapshot().await;
        return Err(format!("it does not serve: {}; {:?}", told.verdict().text, told.events));
    }
    let before = client.generate(short()).await.map_err(|status| format!("before the fault: {status}"))?;
    if before != expected.short {
        return Err(format!("before the fault: expected {:?}, found {before:?}", expected.short));
    }
    if cell.from_the_start {
        return if faults.struck() > 0 { Ok("it serves".into()) } else { Err("the fault never struck".into()) };
    }

    (cell.strike)(faults);
    let struck_at = Instant::now();
    if let Some(lasts) = cell.lasts {
        let faults = faults.clone();
        tokio::spawn(async move {
            sleep(lasts).await;
            faults.mend();
        });
    }
    let met = timeout(ENDS_WITHIN, client.generate(long())).await;
    let met = met.map_err(|_elapsed| format!("HUNG: the request had no end after {ENDS_WITHIN:?}"))?;
    let mut said = match &met {
        Ok(_) => "its tokens".to_owned(),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    };
    judge(cell.harm, met, &expected.long)?;
    if faults.struck() == 0 {
        return Err("the fault never struck".into());
    }
    // The clock of the next request starts when what lasts is over; what the cluster says is held to all the time.
    let since = Instant::now().max(struck_at + cell.lasts.unwrap_or_default());
    let mut lies = Vec::new();
    loop {
        let told = client.snapshot().await.verdict.expect("a verdict");
        if told.serving {
            match timeout(ENDS_WITHIN, client.generate(short())).await {
                Err(_elapsed) => return Err(format!("HUNG: the next request had no end after {ENDS_WITHIN:?}")),
                Ok(Ok(ids)) if ids == expected.short => break,
                Ok(Ok(ids)) => return Err(format!("WRONG TOKENS afterwards: {ids:?}")),
                Ok(Err(status)) => lies.push(format!("{:?} while it said {:?}", status.message(), told.text)),
            }
        }
        if Instant::now() > since + NEXT_WITHIN {
            let told = client.snapshot().await;
            return Err(format!(
                "no tokens within {NEXT_WITHIN:?}: {}; lies: {lies:?}; {:?}",
                told.verdict().text,
                told.events
            ));
        }
        sleep(Duration::from_millis(20)).await;
    }
    let _ = write!(said, "; exact again after {:.2} s", Instant::now().saturating_duration_since(since).as_secs_f64());
    if !lies.is_empty() {
        return Err(format!("it said that it served, and did not: {lies:?}"));
    }
    match client.generate(whole_pool()).await {
        Ok(ids) if ids == expected.whole_pool => Ok(said),
        other => Err(format!("a request that takes every KV block: {other:?}")),
    }
}

/// Runs the cells, each in a cluster of its own; fails with all that went wrong.
fn run(cells: Vec<Cell>) {
    let (seed, expected) = (seed(), Expected::new());
    println!("SEED={seed}");
    let mut wrong = Vec::new();
    let count = cells.len();
    for cell in cells {
        let mut sim = turmoil::Builder::new()
            .rng_seed(seed)
            .simulation_duration(Duration::from_secs(300))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(4))
            .tcp_capacity(4096)
            .enable_tokio_io()
            .build();
        sim.host("coordinator", run_coordinator);
        let faults: [Faults; STAGES] = Default::default();
        if cell.from_the_start {
            (cell.strike)(&faults[cell.stage]);
        }
        for (index, faults) in faults.iter().enumerate() {
            let faults = faults.clone();
            sim.host(format!("w{}", index + 1), move || run_worker(index, faults.clone()));
        }
        let name = cell.name.clone();
        let (outcome, expected) = (Arc::new(Mutex::new(None)), Arc::clone(&expected));
        let (told, of_stage) = (Arc::clone(&outcome), faults[cell.stage].clone());
        sim.client("client", async move {
            let met = meet(&cell, &of_stage, &expected).await;
            *told.lock().expect("no panic") = Some(met);
            Ok(())
        });
        let ended = sim.run().map_err(|error| error.to_string());
        let outcome = outcome.lock().expect("no panic").take();
        match ended.and_then(|()| outcome.unwrap_or_else(|| Err("the client never ended".into()))) {
            Ok(said) => println!("{name}: {said}"),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "SEED={seed}: {} of {count} cells went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

const PHASES: [Phase; 2] = [Phase::Prefill, Phase::Decode];

fn every_stage_and_phase(cell: impl Fn(usize, Phase) -> Cell) -> Vec<Cell> {
    let places = (0..STAGES).flat_map(|stage| PHASES.map(|phase| (stage, phase)));
    places.map(|(stage, phase)| cell(stage, phase)).collect()
}

fn step_fault(fault: StepFault) -> Vec<Cell> {
    every_stage_and_phase(|stage, phase| {
        Cell::new(format!("{fault:?} in {phase:?}"), stage, Harm::Error, move |faults| faults.fail_step(phase, fault))
    })
}

#[test]
fn a_step_that_computes_no_numbers_harms_no_later_request() {
    run(step_fault(StepFault::Compute));
}

#[test]
fn a_step_that_cannot_read_its_weights_harms_no_later_request() {
    run(step_fault(StepFault::Read));
}

#[test]
fn a_device_that_is_lost_in_a_step_harms_no_later_request() {
    run(step_fault(StepFault::DeviceLost));
}

#[test]
fn a_step_that_panics_harms_no_later_request() {
    run(step_fault(StepFault::Panic));
}

/// The first stage's frames carry no hidden states.
fn damaged_frames(times: u32, harm: Harm) -> Vec<Cell> {
    let cell = |stage, phase| {
        let strike = move |faults: &Faults| faults.fail_wire(WireFault::Damage(phase, times));
        Cell::new(format!("damaged {times} times in {phase:?}"), stage, harm, strike)
    };
    every_stage_and_phase(cell).into_iter().filter(|cell| cell.stage > 0).collect()
}

#[test]
fn hidden_states_damaged_on_the_way_are_sent_again_and_nobody_notices() {
    run([damaged_frames(1, Harm::None), damaged_frames(2, Harm::None)].into_iter().flatten().collect());
}

#[test]
fn hidden_states_damaged_time_and_again_harm_no_later_request() {
    run(damaged_frames(3, Harm::Error));
}

#[test]
fn links_that_break_off_harm_no_later_request() {
    let cell = |stage| Cell::new("reset", stage, Harm::Error, |faults| faults.fail_wire(WireFault::Reset));
    run((0..STAGES).map(cell).collect());
}

#[test]
fn a_link_that_is_late_harms_nobody() {
    let cell = |stage| {
        let strike = |faults: &Faults| faults.fail_wire(WireFault::Delay(Duration::from_millis(800)));
        Cell::new("late by 0.8 s", stage, Harm::None, strike)
    };
    run((0..STAGES).map(cell).collect());
}

#[test]
fn a_link_that_is_silent_for_a_while_harms_no_later_request() {
    let cell = |stage| {
        Cell::new("silent for 6 s", stage, Harm::Error, |faults| faults.fail_wire(WireFault::Silent))
            .for_a_while(Duration::from_secs(6))
    };
    run((0..STAGES).map(cell).collect());
}

#[test]
fn layers_that_cannot_be_read_at_first_are_read_again() {
    let cell = |stage| Cell::new("two loads fail", stage, Harm::None, |faults| faults.fail_loads(2)).at_the_start();
    run((0..STAGES).map(cell).collect());
}

#[test]
fn a_device_that_hangs_is_noticed_and_harms_no_later_request() {
    let cell =
        |stage| Cell::new("hangs for 30 s", stage, Harm::Error, Faults::hang).for_a_while(Duration::from_secs(30));
    run((0..STAGES).map(cell).collect());
}

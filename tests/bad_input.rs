//! Bad input against a live cluster: every case is refused with a typed error that says what was expected and found, while
//! requests that run beside it get the tokens they would have got alone.
//!
//! The cluster is real coordinator and workers over TCP with a small model made from a seed. Hostile checkpoints are tested
//! where they are read, in `model/`; bad flags and settings where they are parsed, in `cli/`.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use grokpipe_coordinator::{Coordinator, CoordinatorError, Settings as CoordinatorSettings};
use grokpipe_model::{ModelConfig, tokenizer::Tokenizer};
use grokpipe_proto::{
    PROTOCOL_VERSIONS, hidden_states,
    ids::PlanEpoch,
    link_token::{LinkKey, LinkToken},
    secret::Secret,
    snapshot::{ClusterSnapshot, NodeStats, SnapshotEvent, SnapshotMemory},
    transport::{self, ConnectionLimits, Keepalive, Net, Tcp},
    v1::{
        ActivationDtype, Assignment, DeliverRequest, DetokenizeRequest, DrawnToken, FormatRate, Frame, FrameFailed,
        GenerateRequest, GetStatusRequest, Heartbeat, Hello, JoinRequest, JoinResponse, LoadProgress, MicroBatchResult,
        RefusalReason, RunRequest, Sampling, SamplingOptions, SequenceOpen, SequenceSlice, StageFailed, StageReady,
        StepOverhead, TokenizeRequest, WantedLogits, Welcome,
        cluster_service_client::ClusterServiceClient,
        generate_request::Prompt,
        inference_service_client::InferenceServiceClient,
        join_request, join_response,
        membership_service_client::MembershipServiceClient,
        membership_service_server::{MembershipService, MembershipServiceServer},
        pipeline_service_client::PipelineServiceClient,
        result_service_client::ResultServiceClient,
        run_response::Answer,
    },
};
use grokpipe_tests::{
    demo_model,
    processes::PATIENCE,
    simulated::{SmallLoader, coordinator_settings, link_key, request, small_config, small_facts, token_of},
};
use grokpipe_worker::{WorkerError, executor::InlineExecutor};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming, transport::Channel};

const MODEL_SEED: u64 = 5;
const STAGES: usize = 3;
const LAYERS: u32 = 6;
const KV_BLOCKS: u32 = 2048 / 16;
const SECRET: &str = "a-secret-of-this-test";
/// No sequence or micro-batch of a live request has such a number.
const UNUSED_ID: u64 = 1 << 50;

fn net() -> Arc<dyn Net> {
    Arc::new(Tcp)
}

fn secret() -> Secret {
    Secret::new(SECRET).expect("long enough")
}

/// As many ids as the demo's tokenizer has, so that text can be asked for.
fn config() -> ModelConfig {
    ModelConfig { vocab_size: 131_072, ..small_config(LAYERS) }
}

fn settings(grpc: &str) -> CoordinatorSettings {
    let mut settings = coordinator_settings(grpc.into(), secret(), STAGES);
    for (expected, begin) in settings.expected.iter_mut().zip((0..LAYERS).step_by(2)) {
        expected.layers = Some(begin..begin + 2);
    }
    settings
}

fn worker_settings(coordinator: &str, index: usize) -> grokpipe_worker::Settings {
    grokpipe_worker::Settings {
        coordinator: coordinator.into(),
        name: format!("w{index}"),
        listen: "127.0.0.1:0".into(),
        advertise: None,
        connections: ConnectionLimits::default(),
        secret: secret(),
        generation: 10 + index as u64,
    }
}

/// What a case came to, if it was refused as it should have been.
type Outcome = Result<(), String>;

/// Its name, what is sent, how it must be refused, and words that the refusal must say.
type Case<Sent, Refusal> = (&'static str, Sent, Refusal, &'static [&'static str]);

/// Counts cases, and remembers those that went wrong.
#[derive(Default)]
struct Table {
    names: BTreeSet<String>,
    wrong: Vec<String>,
}

impl Table {
    fn note(&mut self, name: impl Into<String>, outcome: Outcome) {
        let name = name.into();
        assert!(self.names.insert(name.clone()), "two cases are called {name}");
        if let Err(found) = outcome {
            self.wrong.push(format!("{name}: {found}"));
        }
    }
}

/// A status of this code whose message has all these words.
fn refused<T>(found: Result<T, Status>, code: Code, words: &[&str]) -> Outcome {
    match found {
        Ok(_) => Err(format!("expected {code:?}, found it accepted")),
        Err(status) if status.code() != code => Err(format!("expected {code:?}, found {status:?}")),
        Err(status) => match words.iter().find(|word| !status.message().contains(**word)) {
            Some(word) => Err(format!("expected {word:?} in {:?}", status.message())),
            None => Ok(()),
        },
    }
}

/// Within the patience of a test.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("an answer within its deadline")
}

async fn channel(address: &str) -> Channel {
    transport::connect(&net(), address, Keepalive::Client).await.expect("somebody listens")
}

async fn snapshot(coordinator: &str) -> ClusterSnapshot {
    let mut client = ClusterServiceClient::new(channel(coordinator).await);
    let status = client.get_status(GetStatusRequest {}).await.expect("a status").into_inner();
    status.snapshot.expect("a snapshot").checked().expect("a good snapshot")
}

async fn generate(coordinator: &str, request: GenerateRequest) -> Result<Vec<u32>, Status> {
    let mut stream = InferenceServiceClient::new(channel(coordinator).await).generate(request).await?.into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.message().await? {
        ids.extend(token_of(response, ids.len()));
    }
    Ok(ids)
}

/// A live cluster, and a request that is repeated beside all cases.
struct Live {
    coordinator: String,
    shutdown: CancellationToken,
    beside: JoinHandle<Result<usize, String>>,
    beside_ends: CancellationToken,
}

impl Live {
    async fn start() -> Self {
        let tokenizer = Tokenizer::open(&demo_model().join("tokenizer.model")).expect("the demo's tokenizer");
        let facts = small_facts(&config());
        let coordinator = Coordinator::bind(settings("127.0.0.1:0"), facts, Some(Arc::new(tokenizer)), net())
            .await
            .expect("a port of loopback");
        let address = coordinator.grpc_address().to_string();
        let shutdown = CancellationToken::new();
        tokio::spawn(coordinator.serve(shutdown.clone()));
        for index in 1..=STAGES {
            let loader = Box::new(SmallLoader::new(config(), MODEL_SEED));
            let settings = worker_settings(&address, index);
            tokio::spawn(grokpipe_worker::run(settings, net(), Arc::new(InlineExecutor), loader, shutdown.clone()));
        }
        soon(async {
            while !snapshot(&address).await.verdict().serving {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        let alone = generate(&address, beside()).await.expect("a request that runs alone");
        assert!(alone.iter().collect::<BTreeSet<_>>().len() > 3, "tokens that tell nothing: {alone:?}");
        let beside_ends = CancellationToken::new();
        let beside = tokio::spawn(run_beside(address.clone(), alone, beside_ends.clone()));
        Self { coordinator: address, shutdown, beside, beside_ends }
    }

    async fn node(&self, index: usize) -> String {
        let snapshot = snapshot(&self.coordinator).await;
        let layers = snapshot.plan.expect("a plan").stages;
        let name = &layers[index].node;
        let node = snapshot.nodes.iter().find(|node| node.name == *name).expect("a node of the plan");
        node.address.clone().expect("an address")
    }

    async fn epoch(&self) -> u64 {
        snapshot(&self.coordinator).await.plan.expect("a plan").epoch
    }

    /// Ends everything; the number of requests that ran beside the cases, all with the right tokens.
    async fn end(self) -> Result<usize, String> {
        self.beside_ends.cancel();
        let requests = soon(self.beside).await.expect("no panic")?;
        self.shutdown.cancel();
        Ok(requests)
    }
}

/// What the request beside the cases gets: drawn, so that a token in the wrong place is noticed.
fn beside() -> GenerateRequest {
    let sampling = SamplingOptions { temperature: Some(5.0), seed: Some(7), ..SamplingOptions::default() };
    request(&[5, 9, 13, 700, 96], 12, sampling)
}

async fn run_beside(coordinator: String, expected: Vec<u32>, ends: CancellationToken) -> Result<usize, String> {
    let mut requests = 0;
    // At least one, however fast the cases were.
    loop {
        match soon(generate(&coordinator, beside())).await {
            Ok(ids) if ids == expected => requests += 1,
            other => {
                return Err(format!("request {requests} beside the cases: expected {expected:?}, found {other:?}"));
            }
        }
        if ends.is_cancelled() {
            return Ok(requests);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn bad_input_gets_a_typed_error_and_harms_no_other_request() {
    grokpipe_tests::start_logs();
    let live = Live::start().await;
    let mut table = Table::default();
    requests(&live, &mut table).await;
    texts(&live, &mut table).await;
    hellos(&live, &mut table).await;
    first_messages(&live, &mut table).await;
    reports(&live, &mut table).await;
    frames(&live, &mut table).await;
    results(&live, &mut table).await;
    tokens(&live, &mut table).await;
    secrets(&live, &mut table).await;
    ports(&live, &mut table).await;
    assignments(&mut table).await;
    let serving = snapshot(&live.coordinator).await.verdict.expect("a verdict");
    assert!(serving.serving, "{}", serving.text);
    let beside = live.end().await.expect("requests beside the cases");
    println!("{} cases of bad input refused, {beside} requests beside them unharmed", table.names.len());
    assert!(table.wrong.is_empty(), "{} cases went wrong:\n{}", table.wrong.len(), table.wrong.join("\n"));
    assert!(table.names.len() >= 100, "{} cases", table.names.len());
}

fn sampled(change: impl FnOnce(&mut SamplingOptions)) -> GenerateRequest {
    let mut options = SamplingOptions::default();
    change(&mut options);
    request(&[5, 9], 4, options)
}

async fn requests(live: &Live, table: &mut Table) {
    use Code::{InvalidArgument as Invalid, OutOfRange, Unimplemented};
    let ids = |ids: Vec<u32>| request(&ids, 4, SamplingOptions::default());
    let with = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = request(&[5, 9], 4, SamplingOptions::default());
        change(&mut request);
        request
    };
    let temperature = |value| sampled(|options| options.temperature = Some(value));
    let top_p = |value| sampled(|options| options.top_p = Some(value));
    let min_p = |value| sampled(|options| options.min_p = Some(value));
    let cases: Vec<Case<GenerateRequest, Code>> = vec![
        ("no prompt", with(&|r| r.prompt = None), Invalid, &["prompt", "neither"]),
        ("empty text", with(&|r| r.prompt = Some(Prompt::Text(String::new()))), Invalid, &["prompt", "none"]),
        ("no ids", ids(vec![]), Invalid, &["prompt", "none"]),
        ("first id beyond the vocabulary", ids(vec![131_072]), Invalid, &["token_ids", "131072 at 0"]),
        ("later id beyond the vocabulary", ids(vec![5, 6, u32::MAX]), Invalid, &["4294967295 at 2"]),
        ("padding first", ids(vec![0, 5]), Invalid, &["token_ids", "padding"]),
        ("padding alone", ids(vec![0]), Invalid, &["padding"]),
        ("prompt one beyond the context", ids(vec![5; 257]), OutOfRange, &["256", "257"]),
        ("prompt far beyond the context", ids(vec![5; 100_000]), OutOfRange, &["256", "100000"]),
        ("prompt that fills the context", ids(vec![5; 256]), OutOfRange, &["256"]),
        (
            "text beyond the context",
            with(&|r| r.prompt = Some(Prompt::Text("word ".repeat(2000)))),
            OutOfRange,
            &["256"],
        ),
        (
            "text beyond its bytes",
            with(&|r| r.prompt = Some(Prompt::Text("a".repeat((1 << 20) + 1)))),
            Invalid,
            &["1048576", "1048577"],
        ),
        ("no tokens wanted", with(&|r| r.max_tokens = Some(0)), Invalid, &["max_tokens", "found 0"]),
        ("tokens beyond the context", with(&|r| r.max_tokens = Some(255)), OutOfRange, &["256", "257"]),
        ("most tokens a number holds", with(&|r| r.max_tokens = Some(u32::MAX)), OutOfRange, &["256"]),
        ("temperature not a number", temperature(f32::NAN), Invalid, &["temperature", "NaN"]),
        ("negative temperature", temperature(-0.1), Invalid, &["temperature", "-0.1"]),
        ("infinite temperature", temperature(f32::INFINITY), Invalid, &["temperature", "inf"]),
        ("temperature of minus infinity", temperature(f32::NEG_INFINITY), Invalid, &["temperature"]),
        ("temperature above 100", temperature(100.5), Invalid, &["temperature", "100.5"]),
        ("top_p not a number", top_p(f32::NAN), Invalid, &["top_p", "NaN"]),
        ("top_p of 0", top_p(0.0), Invalid, &["top_p", "found 0"]),
        ("negative top_p", top_p(-1.0), Invalid, &["top_p", "-1"]),
        ("top_p above 1", top_p(1.01), Invalid, &["top_p", "1.01"]),
        ("infinite top_p", top_p(f32::INFINITY), Invalid, &["top_p"]),
        ("min_p not a number", min_p(f32::NAN), Invalid, &["min_p", "NaN"]),
        ("negative min_p", min_p(-0.5), Invalid, &["min_p", "-0.5"]),
        ("min_p above 1", min_p(2.0), Invalid, &["min_p", "found 2"]),
        ("infinite min_p", min_p(f32::NEG_INFINITY), Invalid, &["min_p"]),
        ("empty stop", with(&|r| r.stop = vec![String::new()]), Invalid, &["stop", "of 0"]),
        ("stop too long", with(&|r| r.stop = vec!["x".repeat(1025)]), Invalid, &["stop", "1025"]),
        ("too many stops", with(&|r| r.stop = vec!["x".into(); 17]), Invalid, &["stop", "17"]),
        ("one empty stop among good ones", with(&|r| r.stop = vec!["x".into(), String::new()]), Invalid, &["stop"]),
        ("request id too long", with(&|r| r.request_id = "r".repeat(257)), Invalid, &["request_id", "257"]),
        ("deadline beyond the longest", with(&|r| r.deadline_ms = 600_001), Invalid, &["deadline_ms", "600001"]),
        ("deadline of for ever", with(&|r| r.deadline_ms = u64::MAX), Invalid, &["deadline_ms"]),
        ("resuming, which is not built", with(&|r| r.from_index = 3), Unimplemented, &["from_index"]),
        ("a key, which is not built", with(&|r| r.idempotency_key = "k".into()), Unimplemented, &["idempotency_key"]),
    ];
    for (name, request, code, words) in cases {
        let found = soon(generate(&live.coordinator, request)).await;
        table.note(format!("request: {name}"), refused(found, code, words));
    }
}

async fn texts(live: &Live, table: &mut Table) {
    let mut client = InferenceServiceClient::new(channel(&live.coordinator).await);
    let text = "a".repeat((1 << 20) + 1);
    let found = soon(client.tokenize(TokenizeRequest { text })).await;
    table.note("text: too long to tokenize", refused(found, Code::InvalidArgument, &["text", "1048577"]));
    for (name, token_ids) in [("beyond the vocabulary", vec![131_072]), ("the largest number", vec![5, u32::MAX])] {
        let found = soon(client.detokenize(DetokenizeRequest { token_ids })).await;
        table.note(format!("ids to text: {name}"), refused(found, Code::InvalidArgument, &["131072"]));
    }
}

fn hello(change: impl FnOnce(&mut Hello)) -> Hello {
    let mut hello = Hello {
        name: "rogue".into(),
        generation: 1,
        version_min: *PROTOCOL_VERSIONS.start(),
        version_max: *PROTOCOL_VERSIONS.start(),
        device: "none".into(),
        fingerprint: "none/1".into(),
        memory_bytes: 1 << 30,
        read_bandwidth: 1e9,
        flop_rate: 1e9,
        data_address: "127.0.0.1:9".into(),
        model_digest: "small".into(),
        ..Hello::default()
    };
    change(&mut hello);
    hello
}

async fn joined(
    coordinator: &str,
    secret: &Secret,
    first: Vec<JoinRequest>,
) -> Result<(mpsc::Sender<JoinRequest>, Streaming<JoinResponse>), Status> {
    let (sender, stream) = mpsc::channel(16);
    let empty = first.is_empty();
    for message in first {
        sender.try_send(message).expect("room");
    }
    let mut client = MembershipServiceClient::with_interceptor(channel(coordinator).await, secret.attach());
    let kept = if empty {
        drop(sender);
        mpsc::channel(1).0
    } else {
        sender
    };
    let answers = client.join(ReceiverStream::new(stream)).await?.into_inner();
    Ok((kept, answers))
}

fn saying(message: join_request::Message) -> JoinRequest {
    JoinRequest { message: Some(message) }
}

async fn hellos(live: &Live, table: &mut Table) {
    use Code::{AlreadyExists, FailedPrecondition, InvalidArgument as Invalid, OutOfRange};
    let cases: Vec<Case<Hello, Code>> = vec![
        ("no name", hello(|h| h.name.clear()), Invalid, &["name"]),
        ("name too long", hello(|h| h.name = "n".repeat(65)), Invalid, &["name"]),
        ("name of a megabyte", hello(|h| h.name = "n".repeat(1 << 20)), OutOfRange, &["too large"]),
        ("device of a page", hello(|h| h.device = "d".repeat(4096)), Invalid, &["device", "4096"]),
        ("device of a megabyte", hello(|h| h.device = "d".repeat(1 << 20)), OutOfRange, &["too large"]),
        ("name with capitals", hello(|h| h.name = "Worker".into()), Invalid, &["name", "Worker"]),
        ("name with a path", hello(|h| h.name = "../w1".into()), Invalid, &["name"]),
        ("name with markup", hello(|h| h.name = "<b>".into()), Invalid, &["name"]),
        ("name with a line break", hello(|h| h.name = "w\n1".into()), Invalid, &["name"]),
        ("generation 0", hello(|h| h.generation = 0), Invalid, &["generation"]),
        ("bandwidth not a number", hello(|h| h.read_bandwidth = f64::NAN), Invalid, &["read_bandwidth", "NaN"]),
        ("bandwidth 0", hello(|h| h.read_bandwidth = 0.0), Invalid, &["read_bandwidth"]),
        ("negative bandwidth", hello(|h| h.read_bandwidth = -1.0), Invalid, &["read_bandwidth", "-1"]),
        ("infinite bandwidth", hello(|h| h.read_bandwidth = f64::INFINITY), Invalid, &["read_bandwidth"]),
        ("rate not a number", hello(|h| h.flop_rate = f64::NAN), Invalid, &["flop_rate"]),
        ("negative rate", hello(|h| h.flop_rate = -5.0), Invalid, &["flop_rate"]),
        ("infinite rate", hello(|h| h.flop_rate = f64::INFINITY), Invalid, &["flop_rate"]),
        ("rate by format 0", hello(|h| h.format_rates = vec![FormatRate::default()]), Invalid, &["format_rates"]),
        (
            "overhead not a number",
            hello(|h| h.step_overhead = Some(StepOverhead { step_seconds: f64::NAN, ..StepOverhead::default() })),
            Invalid,
            &["step_overhead", "NaN"],
        ),
        ("no address", hello(|h| h.data_address.clear()), Invalid, &["data_address"]),
        ("address without a port", hello(|h| h.data_address = "node".into()), Invalid, &["data_address", "node"]),
        ("address without a host", hello(|h| h.data_address = ":80".into()), Invalid, &["data_address"]),
        ("port 0", hello(|h| h.data_address = "node:0".into()), Invalid, &["data_address"]),
        ("port too large", hello(|h| h.data_address = "node:65536".into()), Invalid, &["data_address"]),
        ("address too long", hello(|h| h.data_address = "n".repeat(300) + ":80"), Invalid, &["data_address"]),
        (
            "layers backwards",
            hello(|h| (h.held_layer_start, h.held_layer_end) = (5, 2)),
            Invalid,
            &["held_layers", "5..2"],
        ),
        ("versions of tomorrow", hello(|h| (h.version_min, h.version_max) = (3, 9)), FailedPrecondition, &["version"]),
        ("no version", hello(|h| (h.version_min, h.version_max) = (0, 0)), FailedPrecondition, &["version"]),
        ("name of a live worker", hello(|h| h.name = "w1".into()), AlreadyExists, &["w1"]),
        ("name of a live worker, newer", hello(|h| (h.name, h.generation) = ("w2".into(), 99)), AlreadyExists, &["w2"]),
    ];
    for (name, hello, code, words) in cases {
        let messages = vec![saying(join_request::Message::Hello(hello))];
        let found = soon(joined(&live.coordinator, &secret(), messages)).await;
        table.note(format!("hello: {name}"), refused(found, code, words));
    }
}

async fn first_messages(live: &Live, table: &mut Table) {
    use join_request::Message;
    let cases: Vec<(&str, Vec<JoinRequest>)> = vec![
        ("nothing at all", vec![]),
        ("a message that is empty", vec![JoinRequest { message: None }]),
        ("a heartbeat", vec![saying(Message::Heartbeat(Heartbeat::default()))]),
        ("a report", vec![saying(Message::StageReady(StageReady { plan_epoch: 1, ..StageReady::default() }))]),
        ("a failure", vec![saying(Message::StageFailed(StageFailed::default()))]),
    ];
    for (name, messages) in cases {
        let found = soon(joined(&live.coordinator, &secret(), messages)).await;
        table.note(format!("first message: {name}"), refused(found, Code::InvalidArgument, &["hello"]));
    }
}

/// A stranger with a good hello may say what it likes: the plan in force does not change.
async fn reports(live: &Live, table: &mut Table) {
    use join_request::Message;
    let epoch = live.epoch().await;
    let stats = NodeStats {
        step_seconds_p50: Some(f64::NAN),
        tokens_per_second: Some(f64::NEG_INFINITY),
        idle_ratio: Some(f64::INFINITY),
        memory: Some(SnapshotMemory {
            free_bytes: Some(u64::MAX),
            rss_bytes: Some(u64::MAX),
            ..SnapshotMemory::default()
        }),
        ..NodeStats::default()
    };
    let wild = Heartbeat { stats: Some(stats), ..Heartbeat::default() };
    let failed = |plan_epoch| StageFailed {
        plan_epoch,
        coordinator_generation: 1,
        message: "made up".into(),
        ..StageFailed::default()
    };
    let lost = StageFailed { lost_peer: "w1".into(), ..failed(epoch) };
    let frame = FrameFailed {
        plan_epoch: epoch,
        coordinator_generation: 1,
        micro_batch_id: 1,
        message: "made up".into(),
        worker: "w1".into(),
    };
    let progress = LoadProgress { plan_epoch: epoch, coordinator_generation: 1, bytes: u64::MAX, bytes_total: 1 };
    let cases = vec![
        ("a heartbeat of wild numbers", Message::Heartbeat(wild)),
        ("a second hello", Message::Hello(hello(|_| ()))),
        ("progress beyond the total", Message::LoadProgress(progress)),
        (
            "ready for a stage that it has not",
            Message::StageReady(StageReady { plan_epoch: epoch, coordinator_generation: 1, ..StageReady::default() }),
        ),
        (
            "ready for an epoch of tomorrow",
            Message::StageReady(StageReady {
                plan_epoch: u64::MAX,
                coordinator_generation: 1,
                ..StageReady::default()
            }),
        ),
        ("failure of a stage that it has not", Message::StageFailed(failed(epoch))),
        ("failure of an epoch of tomorrow", Message::StageFailed(failed(u64::MAX))),
        ("blame for a live worker", Message::StageFailed(lost)),
        ("failure of a frame that it never saw", Message::FrameFailed(frame)),
    ];
    for (name, message) in cases {
        let messages = vec![saying(Message::Hello(hello(|_| ()))), saying(message)];
        let (sender, mut answers) =
            soon(joined(&live.coordinator, &secret(), messages)).await.expect("a good hello is welcome");
        let welcome = soon(answers.message()).await;
        let welcomed = matches!(
            welcome,
            Ok(Some(JoinResponse { message: Some(join_response::Message::Welcome(Welcome { .. })) }))
        );
        // The stream's end reaches the coordinator behind the report.
        drop((sender, answers));
        soon(async {
            while snapshot(&live.coordinator)
                .await
                .nodes
                .iter()
                .any(|node| node.name == "rogue" && node.state() != grokpipe_proto::snapshot::NodeState::Down)
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        let after = snapshot(&live.coordinator).await;
        let kept = after.verdict().serving && after.plan.as_ref().is_some_and(|plan| plan.epoch == epoch);
        let outcome = if welcomed && kept { Ok(()) } else { Err(format!("welcomed {welcomed}, {after:?}")) };
        table.note(format!("report: {name}"), outcome);
    }
}

fn slice(change: impl FnOnce(&mut SequenceSlice)) -> SequenceSlice {
    let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1 };
    let mut slice = SequenceSlice {
        sequence_id: UNUSED_ID,
        first_position: 0,
        token_ids: vec![5, 6],
        new_blocks: vec![KV_BLOCKS - 1],
        open: Some(SequenceOpen { sampling: Some(sampling), ..SequenceOpen::default() }),
        ..SequenceSlice::default()
    };
    change(&mut slice);
    slice
}

fn drawing(change: impl FnOnce(&mut Sampling)) -> SequenceSlice {
    slice(|slice| {
        if let Some(sampling) = slice.open.as_mut().and_then(|open| open.sampling.as_mut()) {
            change(sampling);
        }
    })
}

fn flipped(data: &[u8]) -> Bytes {
    data.iter().enumerate().map(|(at, byte)| if at == 17 { byte ^ 4 } else { *byte }).collect()
}

/// The refusal of one frame sent straight to a worker.
async fn refusal(
    address: &str,
    secret: &Secret,
    token: Option<&LinkToken>,
    frame: Option<Frame>,
) -> Result<(RefusalReason, String), Status> {
    let mut client = PipelineServiceClient::with_interceptor(channel(address).await, secret.attach());
    let (sender, stream) = mpsc::channel(1);
    sender.try_send(RunRequest { frame }).expect("room");
    let stream = ReceiverStream::new(stream);
    let request = token.map_or_else(|| Request::new(()), |token| token.present(())).map(|()| stream);
    let mut answers = client.run(request).await?.into_inner();
    match answers.message().await?.and_then(|response| response.answer) {
        Some(Answer::Refusal(refusal)) => Ok((refusal.reason(), refusal.message)),
        other => Err(Status::ok(format!("no refusal but {other:?}"))),
    }
}

async fn frames(live: &Live, table: &mut Table) {
    use RefusalReason::{Checksum, Malformed, StaleEpoch, StaleGeneration};
    let epoch = live.epoch().await;
    let frame = |stage: usize, change: &dyn Fn(&mut Frame)| {
        let generation = [1, 11, 12][stage];
        let mut frame = Frame {
            plan_epoch: epoch,
            sender_generation: generation,
            micro_batch_id: UNUSED_ID,
            sequences: vec![slice(|_| ())],
            hidden_states: (stage > 0).then(|| hidden_states::encode(&[0.5; 64], 32)),
            ..Frame::default()
        };
        change(&mut frame);
        (stage, frame)
    };
    let first = |slice: SequenceSlice| frame(0, &|frame| frame.sequences = vec![slice.clone()]);
    let last = |slice: SequenceSlice| frame(2, &|frame| frame.sequences = vec![slice.clone()]);
    let hidden = |change: &dyn Fn(&mut grokpipe_proto::v1::HiddenStates)| {
        frame(1, &|frame| {
            if let Some(hidden) = frame.hidden_states.as_mut() {
                change(hidden);
            }
        })
    };
    // One of each kind, over the wire; all of them are held to account beside the state, in `worker/src/sequences/tests.rs`.
    let cases: Vec<Case<(usize, Frame), RefusalReason>> = vec![
        ("epoch 0", frame(0, &|f| f.plan_epoch = 0), StaleEpoch, &["epoch", "found 0"]),
        ("generation of another", frame(1, &|f| f.sender_generation = 1), StaleGeneration, &["generation 11"]),
        ("no sequence", frame(0, &|f| f.sequences.clear()), Malformed, &["1 to 64", "found 0"]),
        ("one token too many", first(slice(|s| s.token_ids = vec![5; 65])), Malformed, &["1 to 64", "found 65"]),
        ("the largest id", last(slice(|s| s.token_ids[0] = u32::MAX)), Malformed, &["4294967295"]),
        ("an unknown sequence", first(slice(|s| s.open = None)), Malformed, &["to be open"]),
        ("a block beyond the pool", first(slice(|s| s.new_blocks = vec![KV_BLOCKS])), Malformed, &["KV blocks below"]),
        ("negative temperature", last(drawing(|s| s.temperature = -1.0)), Malformed, &["temperature"]),
        ("no hidden states into a later stage", frame(1, &|f| f.hidden_states = None), Malformed, &["found none"]),
        ("hidden states of very many rows", hidden(&|h| h.rows = u32::MAX), Malformed, &["rows"]),
        ("a flipped bit", hidden(&|h| h.data = flipped(&h.data)), Checksum, &["CRC32C"]),
        (
            "a wanted position beyond",
            last(slice(|s| s.wanted = vec![WantedLogits { position: 2, draw: true, target_ids: vec![] }])),
            Malformed,
            &["0..2", "found 2"],
        ),
    ];
    for (name, (stage, frame), reason, words) in cases {
        let token = link_key().frames(PlanEpoch(epoch), stage);
        let found = soon(refusal(&live.node(stage).await, &secret(), Some(&token), Some(frame))).await;
        let outcome = match found {
            Ok((found, message)) if found == reason && words.iter().all(|word| message.contains(word)) => Ok(()),
            other => Err(format!("expected {reason:?} with {words:?}, found {other:?}")),
        };
        table.note(format!("frame: {name}"), outcome);
    }
    let address = live.node(0).await;
    let found = soon(refusal(&address, &secret(), Some(&link_key().frames(PlanEpoch(epoch), 0)), None)).await;
    table.note("frame: none in the request", refused(found, Code::InvalidArgument, &["expected a frame"]));
}

/// Results of a stranger are dropped: the requests beside this one would get wrong tokens otherwise.
async fn results(live: &Live, table: &mut Table) {
    let epoch = live.epoch().await;
    let result = |plan_epoch, sender_generation, micro_batch_id| MicroBatchResult {
        plan_epoch,
        sender_generation,
        micro_batch_id,
        tokens: vec![DrawnToken { sequence_id: 1, position: 4, token_id: u32::MAX, logprob: f32::NAN }],
        ..MicroBatchResult::default()
    };
    let cases = [
        ("of epoch 0", Some(result(0, 13, 1))),
        ("of an epoch of tomorrow", Some(result(u64::MAX, 13, 1))),
        ("of another generation", Some(result(epoch, 12, 1))),
        ("of generation 0", Some(result(epoch, 0, 1))),
        ("of a micro-batch that never was", Some(result(epoch, 13, UNUSED_ID))),
        ("that is none", None),
    ];
    for (name, result) in cases {
        let mut client = ResultServiceClient::with_interceptor(channel(&live.coordinator).await, secret().attach());
        let (sender, stream) = mpsc::channel(1);
        sender.try_send(DeliverRequest { result }).expect("room");
        drop(sender);
        let request = link_key().results(PlanEpoch(epoch)).present(ReceiverStream::new(stream));
        let mut answers = soon(client.deliver(request)).await.expect("a stream").into_inner();
        // The answer stream ends when the coordinator has taken what came.
        let ended = soon(answers.message()).await;
        let after = snapshot(&live.coordinator).await;
        let kept = after.verdict().serving && after.plan.is_some_and(|plan| plan.epoch == epoch);
        let outcome = if matches!(ended, Ok(None)) && kept { Ok(()) } else { Err(format!("{ended:?}, kept {kept}")) };
        table.note(format!("result: {name}"), outcome);
    }
}

/// Who has the secret but not the token of a link may send neither frames nor results.
async fn tokens(live: &Live, table: &mut Table) {
    let epoch = live.epoch().await;
    let key = link_key();
    let others = [
        ("none", None),
        ("of another stage", Some(key.frames(PlanEpoch(epoch), 2))),
        ("of the epoch before", Some(key.frames(PlanEpoch(epoch - 1), 1))),
        ("of another coordinator", Some(LinkKey::new([8; 32]).frames(PlanEpoch(epoch), 1))),
        ("of another use", Some(key.results(PlanEpoch(epoch - 1)))),
    ];
    for (name, token) in others {
        let frame = Frame { plan_epoch: epoch, sender_generation: 11, ..Frame::default() };
        let found = soon(refusal(&live.node(1).await, &secret(), token.as_ref(), Some(frame))).await;
        table.note(format!("token for frames: {name}"), refused(found, Code::PermissionDenied, &["token"]));
        let mut client = ResultServiceClient::with_interceptor(channel(&live.coordinator).await, secret().attach());
        let result =
            DeliverRequest { result: Some(MicroBatchResult { plan_epoch: epoch, ..MicroBatchResult::default() }) };
        let stream = tokio_stream::iter([result]);
        let request = token.map_or_else(|| Request::new(()), |token| token.present(())).map(|()| stream);
        let found = soon(client.deliver(request)).await;
        table.note(format!("token for results: {name}"), refused(found, Code::PermissionDenied, &["token"]));
    }
}

async fn secrets(live: &Live, table: &mut Table) {
    let almost = SECRET[..SECRET.len() - 1].to_owned() + "x";
    let longer = SECRET.to_owned() + "x";
    let wrong = |text: &str| Secret::new(text).expect("long enough");
    let cases = [
        ("none", Secret::none(), "found none"),
        ("another", wrong("another-secret-of-16"), "another one"),
        ("one character off", wrong(&almost), "another one"),
        ("one character more", wrong(&longer), "another one"),
    ];
    for (name, secret, word) in cases {
        let messages = vec![saying(join_request::Message::Hello(hello(|_| ())))];
        let found = soon(joined(&live.coordinator, &secret, messages)).await;
        table.note(format!("secret to join: {name}"), refused(found, Code::Unauthenticated, &[word]));
        let found = soon(refusal(&live.node(1).await, &secret, None, None)).await;
        table.note(format!("secret for frames: {name}"), refused(found, Code::Unauthenticated, &[word]));
        let mut client = ResultServiceClient::with_interceptor(channel(&live.coordinator).await, secret.attach());
        let found = soon(client.deliver(tokio_stream::empty())).await;
        table.note(format!("secret for results: {name}"), refused(found, Code::Unauthenticated, &[word]));
    }
    let stranger = grokpipe_worker::Settings { secret: Secret::none(), ..worker_settings(&live.coordinator, 9) };
    table.note("secret: a whole worker without one", refused_worker(stranger, &["secret", &live.coordinator]).await);
    let namesake = grokpipe_worker::Settings { generation: 99, ..worker_settings(&live.coordinator, 3) };
    table.note("hello: a whole worker with a name that is taken", waits_for_its_name(live, namesake).await);
}

/// The other one may be a stranger, or dead and not yet known to be: people are told, and the worker tries on.
async fn waits_for_its_name(live: &Live, settings: grokpipe_worker::Settings) -> Outcome {
    let loader = Box::new(SmallLoader::new(config(), MODEL_SEED));
    let shutdown = CancellationToken::new();
    let run = grokpipe_worker::run(settings, net(), Arc::new(InlineExecutor), loader, shutdown.clone());
    let worker = tokio::spawn(run);
    soon(async {
        let told = |events: &[SnapshotEvent]| {
            events.iter().any(|event| event.code == "name_taken" && event.text.contains("w3"))
        };
        while !told(&snapshot(&live.coordinator).await.events) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let waits = !worker.is_finished();
    shutdown.cancel();
    match soon(worker).await.expect("no panic") {
        Ok(()) if waits => Ok(()),
        other => Err(format!("expected a worker that waits, found {other:?}, waiting {waits}")),
    }
}

/// A worker that ends by itself with an error of these words.
async fn refused_worker(settings: grokpipe_worker::Settings, words: &[&str]) -> Outcome {
    let loader = Box::new(SmallLoader::new(small_config(LAYERS), MODEL_SEED));
    let run = grokpipe_worker::run(settings, net(), Arc::new(InlineExecutor), loader, CancellationToken::new());
    let said = match soon(run).await {
        Ok(()) => return Err("expected an error, found a worker that ended well".into()),
        Err(error) => error.to_string(),
    };
    let missing = words.iter().find(|word| !said.contains(**word));
    missing.map_or(Ok(()), |word| Err(format!("expected {word:?} in {said:?}")))
}

async fn ports(live: &Live, table: &mut Table) {
    let taken = live.coordinator.clone();
    let other = CoordinatorSettings { http: Some(taken.clone()), ..settings("127.0.0.1:0") };
    for (name, settings, what) in [("gRPC", settings(&taken), "gRPC address"), ("HTTP", other, "HTTP address")] {
        let bound = Coordinator::bind(settings, small_facts(&config()), None, net()).await;
        let outcome = match bound {
            Err(error @ CoordinatorError::Listen { .. })
                if error.to_string().contains(what) && error.to_string().contains(&taken) =>
            {
                Ok(())
            }
            Err(error) => Err(error.to_string()),
            Ok(_) => Err("expected a refusal, found the port opened twice".into()),
        };
        table.note(format!("port in use: {name} of a coordinator"), outcome);
    }
    let worker = grokpipe_worker::Settings { listen: taken.clone(), ..worker_settings(&taken, 8) };
    table.note("port in use: of a worker", refused_worker(worker, &[&taken]).await);
    let nowhere = grokpipe_worker::Settings { advertise: "0.0.0.0:0".parse().ok(), ..worker_settings(&taken, 8) };
    table.note("address: of a worker that says it is everywhere", refused_worker(nowhere, &["every address"]).await);
    let odd = grokpipe_worker::Settings { listen: "not an address".into(), ..worker_settings(&taken, 8) };
    table.note("address: of a worker that is none", refused_worker(odd, &["not an address"]).await);
    let named = grokpipe_worker::Settings { name: "W 8".into(), ..worker_settings(&taken, 8) };
    table.note("hello: a whole worker with a bad name", refused_worker(named, &["W 8"]).await);
}

type Orders = mpsc::Receiver<Result<JoinResponse, Status>>;

/// A coordinator that sends what the test wants.
#[derive(Clone)]
struct FakeCoordinator {
    /// What it sends to the first worker that joins.
    orders: Arc<Mutex<Option<Orders>>>,
    said: mpsc::Sender<join_request::Message>,
}

#[tonic::async_trait]
impl MembershipService for FakeCoordinator {
    type JoinStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<JoinResponse, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut messages = request.into_inner();
        let said = self.said.clone();
        tokio::spawn(async move {
            while let Ok(Some(JoinRequest { message: Some(message) })) = messages.message().await {
                if said.send(message).await.is_err() {
                    return;
                }
            }
        });
        let orders = self.orders.lock().expect("no panic").take();
        let orders = orders.ok_or_else(|| Status::unavailable("this worker joined before"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(orders))))
    }
}

async fn assignments(table: &mut Table) {
    let (orders, receiver) = mpsc::channel(16);
    let (said, mut heard) = mpsc::channel(64);
    let fake = FakeCoordinator { orders: Arc::new(Mutex::new(Some(receiver))), said };
    let listening = net().bind("127.0.0.1:0".into()).await.expect("a port of loopback");
    let address = listening.address;
    let incoming = listening.connections(ConnectionLimits::default());
    let service = MembershipServiceServer::new(fake);
    tokio::spawn(transport::server(Keepalive::Cluster).add_service(service).serve_with_incoming(incoming));
    let shutdown = CancellationToken::new();
    let loader = Box::new(SmallLoader::new(small_config(LAYERS), MODEL_SEED));
    let settings = worker_settings(&address.to_string(), 1);
    let worker =
        tokio::spawn(grokpipe_worker::run(settings, net(), Arc::new(InlineExecutor), loader, shutdown.clone()));
    let tell = |message| orders.try_send(Ok(JoinResponse { message: Some(message) })).expect("room");
    let welcome = Welcome { version: 1, heartbeat_interval_ms: 500, ..Welcome::default() };
    tell(join_response::Message::Welcome(welcome));

    let assignment = |change: &dyn Fn(&mut Assignment)| {
        let mut assignment = Assignment {
            layer_start: 0,
            layer_end: LAYERS,
            model_digest: "small".into(),
            model_name: "small".into(),
            previous_generation: 1,
            kv_blocks: 8,
            kv_block_tokens: 16,
            max_batch_tokens: 64,
            max_frames_in_flight: 4,
            activation_dtype: ActivationDtype::F32 as i32,
            link_token: vec![1; 32].into(),
            next_token: vec![2; 32].into(),
            ..Assignment::default()
        };
        change(&mut assignment);
        assignment
    };
    let cases: Vec<(&str, Assignment, &[&str])> = vec![
        ("no layers", assignment(&|a| a.layer_end = 0), &["0..6", "0..0"]),
        ("layers backwards", assignment(&|a| (a.layer_start, a.layer_end) = (4, 2)), &["4..2"]),
        ("layers beyond the model", assignment(&|a| a.layer_end = 7), &["0..6", "0..7"]),
        ("the largest layer", assignment(&|a| a.layer_end = u32::MAX), &["4294967295"]),
        ("a model that is not here", assignment(&|a| a.model_digest = "grok-1".into()), &["grok-1", "small"]),
        ("blocks of another size", assignment(&|a| a.kv_block_tokens = 32), &["16", "32"]),
        ("no blocks", assignment(&|a| a.kv_blocks = 0), &["KV blocks"]),
        ("no tokens a frame", assignment(&|a| a.max_batch_tokens = 0), &["1 to 65536"]),
        ("too many tokens a frame", assignment(&|a| a.max_batch_tokens = u32::MAX), &["1 to 65536"]),
        ("no frames", assignment(&|a| a.max_frames_in_flight = 0), &["1 to 4096"]),
        ("too many frames", assignment(&|a| a.max_frames_in_flight = u32::MAX), &["1 to 4096"]),
        ("no token of its link", assignment(&|a| a.link_token.clear()), &["32 bytes", "found 0"]),
        ("a short token of the next link", assignment(&|a| a.next_token.truncate(31)), &["32 bytes", "found 31"]),
        ("no dtype", assignment(&|a| a.activation_dtype = 0), &["f32"]),
        ("a dtype of tomorrow", assignment(&|a| a.activation_dtype = 77), &["f32"]),
        ("a stage after the last", assignment(&|a| a.next_address = "127.0.0.1:9".into()), &["next stage"]),
        ("no stage after the first", assignment(&|a| a.layer_end = 3), &["next stage"]),
        ("more KV than there is memory", assignment(&|a| a.kv_blocks = u32::MAX), &["KV pool", "TiB"]),
    ];
    for (epoch, (name, assignment, words)) in (1..).zip(cases) {
        tell(join_response::Message::Assignment(Assignment { plan_epoch: epoch, ..assignment }));
        let failed = soon(async {
            loop {
                match heard.recv().await.expect("the worker is there") {
                    join_request::Message::StageFailed(failed) if failed.plan_epoch == epoch => return Ok(failed),
                    join_request::Message::StageReady(ready) if ready.plan_epoch == epoch => return Err(ready),
                    _other => {}
                }
            }
        })
        .await;
        let outcome = match failed {
            Ok(failed) if words.iter().all(|word| failed.message.contains(word)) => Ok(()),
            other => Err(format!("expected {words:?}, found {other:?}")),
        };
        table.note(format!("assignment: {name}"), outcome);
    }
    shutdown.cancel();
    let ended: Result<(), WorkerError> = soon(worker).await.expect("no panic");
    assert!(ended.is_ok(), "{ended:?}");
}

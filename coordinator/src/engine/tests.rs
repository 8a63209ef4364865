//! The engine with a worker and a pipeline that the test plays, under a paused clock.

use std::ops::Range;

use futures_util::StreamExt;
use grokpipe_model::ModelConfig;
use grokpipe_proto::link_token::LinkKey;
use tokio::{sync::oneshot, time::sleep};

use super::*;
use crate::{
    cluster::{
        ClusterSettings, ExpectedWorker,
        messages::{Assignment, BatchResult, DrawnToken, Hello, StageReady},
    },
    deadline::Deadline,
    facts::{ModelFacts, PlanRequirements},
    pipeline::Outgoing,
    planner::Objective,
    request::{FinishReason, RequestEvent, Sampling},
    session::StopRules,
};

const GENERATION: Generation = Generation(77);
const KV_BLOCKS: u32 = 64;
const STAGE: Range<u32> = 0..8;
const PROOF_TOKEN: u32 = 1;

/// An engine, and everything around it.
struct World {
    handle: Handle,
    orders: mpsc::Receiver<Order>,
    opened: mpsc::Receiver<(FirstStage, mpsc::Sender<Event>)>,
    shutdown: CancellationToken,
    /// The pipeline in force.
    frames: Option<mpsc::Receiver<Outgoing>>,
    events: Option<mpsc::Sender<Event>>,
    epoch: PlanEpoch,
}

impl World {
    fn new() -> Self {
        let mut config = ModelConfig::grok_1();
        (config.hidden_size, config.vocab_size, config.num_hidden_layers) = (64, 512, STAGE.end);
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (4, 2, 16);
        config.intermediate_size = 96;
        let facts = ModelFacts::new(config, "test".into(), vec![1 << 20; STAGE.end as usize]);
        let settings = ClusterSettings {
            name: "test".into(),
            generation: GENERATION,
            expected: vec![ExpectedWorker { name: "w1".into(), layers: None }],
            replan_after: Duration::from_secs(30),
            requirements: PlanRequirements {
                kv_tokens: 1024,
                max_batch_tokens: 64,
                batch_tokens: 1,
                objective: Objective::Throughput,
            },
            kv_blocks: KV_BLOCKS,
            max_frames_in_flight: 8,
            link_key: LinkKey::new([7; 32]),
        };
        let scheduler = SchedulerConfig {
            stages: 1,
            kv_blocks: KV_BLOCKS,
            block_tokens: 16,
            prefill_chunk_tokens: 64,
            max_batch_tokens: 64,
            max_context: 1024,
            max_batch_sequences: 8,
            max_waiting: 8,
            max_running: 8,
        };
        let settings_of_engine = EngineSettings { scheduler, model: "test".into(), proof_token: PROOF_TOKEN };
        let (opens, opened) = mpsc::channel(8);
        let open_pipeline = move |first, events, _stop| opens.try_send((first, events)).expect("room");
        let (engine, handle, inbox) =
            Engine::new(settings_of_engine, Box::new(open_pipeline), Cluster::new(settings, facts), None);
        let shutdown = CancellationToken::new();
        tokio::spawn(engine.run(inbox, shutdown.clone()));
        let (_, orders) = mpsc::channel(1);
        Self { handle, orders, opened, shutdown, frames: None, events: None, epoch: PlanEpoch(0) }
    }

    /// A worker joins on a connection of this number.
    async fn join(&mut self, connection: u64) {
        let hello = Hello {
            name: "w1".into(),
            generation: Generation(connection),
            version_min: *grokpipe_proto::PROTOCOL_VERSIONS.start(),
            version_max: *grokpipe_proto::PROTOCOL_VERSIONS.end(),
            memory_bytes: 1 << 30,
            read_bandwidth: 1e10,
            flop_rate: 1e11,
            data_address: "node:1".into(),
            model_digest: "test".into(),
            ..Hello::default()
        };
        let (outbox, orders) = mpsc::channel(8);
        let (reply, welcome) = oneshot::channel();
        self.orders = orders;
        self.handle.send(Event::Joined { connection, hello: Box::new(hello), outbox, reply }).await;
        assert!(welcome.await.expect("an answer").is_ok());
    }

    async fn say(&self, connection: u64, report: Report) {
        let (name, report) = ("w1".to_owned(), Box::new(report));
        self.handle.send(Event::FromWorker { connection, name, generation: Generation(connection), report }).await;
    }

    async fn assigned(&mut self) -> Assignment {
        match self.orders.recv().await {
            Some(Order::Assign(assignment)) => assignment,
            other => panic!("expected an assignment, found {other:?}"),
        }
    }

    /// Makes the worker's stage ready and opens the pipeline; the proof is under way then.
    async fn open(&mut self, connection: u64) {
        let assignment = self.assigned().await;
        assert_eq!((assignment.layer_start..assignment.layer_end, assignment.kv_blocks), (STAGE, KV_BLOCKS));
        self.epoch = assignment.plan_epoch;
        let ready = StageReady { plan_epoch: self.epoch, coordinator_generation: GENERATION, ..StageReady::default() };
        self.say(connection, Report::StageReady(ready)).await;
        let (first, events) = self.opened.recv().await.expect("an opening");
        assert_eq!((first.epoch, first.worker.as_str()), (self.epoch, "w1"));
        let (frames, queue) = Frames::with_room(8);
        self.frames = Some(queue);
        self.events = Some(events);
        self.tell(PipelineEvent::Opened(Ok(frames))).await;
    }

    async fn tell(&self, event: PipelineEvent) {
        let told = Event::Pipeline(Told { epoch: self.epoch, event });
        self.events.as_ref().expect("a pipeline").send(told).await.expect("an engine");
    }

    async fn frame(&mut self) -> Outgoing {
        self.frames.as_mut().expect("a pipeline").recv().await.expect("a micro-batch")
    }

    /// What the worker of this connection draws for a micro-batch: one token for all that want one.
    async fn answer(&self, connection: u64, batch: &Outgoing, token_id: u32) {
        let wanting = batch.0.slices.iter().filter(|slice| slice.wants_token);
        let tokens = wanting.map(|slice| DrawnToken { sequence: slice.sequence, token_id, logprob: -1.0 }).collect();
        let (plan_epoch, micro_batch_id) = (self.epoch, batch.0.id);
        let result = BatchResult {
            plan_epoch,
            sender_generation: Generation(connection),
            micro_batch_id,
            tokens,
            timings: vec![],
        };
        self.handle.send(Event::Result(Box::new(result))).await;
    }

    /// A cluster that serves.
    async fn serving() -> Self {
        let mut world = Self::new();
        world.join(1).await;
        world.open(1).await;
        let proof = world.frame().await;
        world.answer(1, &proof, 9).await;
        world.until(|snapshot| snapshot.verdict().serving).await;
        world
    }

    async fn until(&self, wanted: impl Fn(&ClusterSnapshot) -> bool) {
        let mut snapshot = self.handle.snapshot();
        let found = snapshot.wait_for(|snapshot| wanted(snapshot));
        tokio::time::timeout(Duration::from_secs(60), found).await.expect("in time").expect("an engine");
    }

    async fn submit(&self, max_tokens: u32, limit: Duration) -> Result<ClientStream, RequestError> {
        let request = Request {
            id: "gen-1".into(),
            client: 1,
            label: "mine".into(),
            prompt: vec![5, 6, 7],
            sampling: Sampling { seed: 3, ..Sampling::GREEDY },
            rules: StopRules { max_tokens, stop: Vec::new(), eos_token_id: Some(2) },
            deadline: Deadline::after(limit),
        };
        self.handle.submit(request).await
    }
}

const MINUTE: Duration = Duration::from_secs(60);

/// Token ids, and how it ended.
async fn read(stream: ClientStream) -> (Vec<u32>, Result<FinishReason, RequestError>) {
    let mut tokens = Vec::new();
    let mut stream = stream;
    while let Some(event) = stream.next().await {
        match event {
            Ok(RequestEvent::Accepted(accepted)) => {
                assert_eq!((accepted.id.as_str(), accepted.label.as_str(), accepted.seed), ("gen-1", "mine", 3));
            }
            Ok(RequestEvent::Token(token)) => {
                assert_eq!(token.index as usize, tokens.len());
                tokens.push(token.token_id);
            }
            Ok(RequestEvent::Finished(finished)) => return (tokens, Ok(finished.reason)),
            Err(error) => return (tokens, Err(error)),
        }
    }
    panic!("the stream ended without saying how, after {tokens:?}");
}

#[tokio::test(start_paused = true)]
async fn a_plan_serves_only_once_its_proof_has_come_back() {
    let mut world = World::new();
    world.join(1).await;
    world.open(1).await;
    let proof = world.frame().await;
    assert_eq!(proof.0.slices[0].token_ids, [PROOF_TOKEN]);
    assert_eq!(proof.1, [Some(Sampling::GREEDY)]);
    let refused = world.submit(4, MINUTE).await.err();
    assert!(matches!(refused, Some(RequestError::NotServing(_))), "{refused:?}");
    world.answer(1, &proof, 9).await;
    world.until(|snapshot| snapshot.verdict().serving).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_gets_its_tokens_and_its_end() {
    let mut world = World::serving().await;
    let stream = world.submit(3, MINUTE).await.expect("accepted");
    for token in [11, 12, 13] {
        let batch = world.frame().await;
        assert_eq!(batch.1, [Some(Sampling { seed: 3, ..Sampling::GREEDY })]);
        world.answer(1, &batch, token).await;
    }
    assert_eq!(read(stream).await, (vec![11, 12, 13], Ok(FinishReason::Length)));
    let stream = world.submit(3, MINUTE).await.expect("accepted");
    let batch = world.frame().await;
    // The first request's blocks are closed by the next frame that goes out.
    assert_eq!(batch.0.closed.len(), 1);
    world.answer(1, &batch, 2).await;
    assert_eq!(read(stream).await, (vec![2], Ok(FinishReason::Stop)));
}

#[tokio::test(start_paused = true)]
async fn a_refused_frame_ends_its_requests_and_what_it_closed_is_closed_by_the_next() {
    let mut world = World::serving().await;
    let stream = world.submit(1, MINUTE).await.expect("accepted");
    let batch = world.frame().await;
    world.answer(1, &batch, 11).await;
    assert!(read(stream).await.1.is_ok());
    let stream = world.submit(3, MINUTE).await.expect("accepted");
    let refused = world.frame().await;
    let (micro_batch_id, closed) = (refused.0.id, refused.0.closed.clone());
    assert!(!closed.is_empty());
    let (worker, message) = ("w1".to_owned(), "/a/path: a bit is wrong".to_owned());
    world.tell(PipelineEvent::Refused { micro_batch_id, worker, message }).await;
    let (tokens, end) = read(stream).await;
    assert!(tokens.is_empty() && matches!(&end, Err(RequestError::StageFailed { worker, .. }) if worker == "w1"));
    let stream = world.submit(1, MINUTE).await.expect("the cluster serves on");
    let next = world.frame().await;
    assert!(closed.iter().all(|sequence| next.0.closed.contains(sequence)), "{closed:?}, {:?}", next.0.closed);
    world.answer(1, &next, 11).await;
    assert_eq!(read(stream).await, (vec![11], Ok(FinishReason::Length)));
}

#[tokio::test(start_paused = true)]
async fn a_lost_worker_ends_its_requests_by_name_and_serves_again_when_it_is_back() {
    let mut world = World::serving().await;
    let stream = world.submit(3, MINUTE).await.expect("accepted");
    let batch = world.frame().await;
    world.answer(1, &batch, 11).await;
    let reason = "its connection was reset".to_owned();
    world.handle.send(Event::Left { connection: 1, name: "w1".into(), generation: Generation(1), reason }).await;
    let (tokens, end) = read(stream).await;
    assert_eq!(tokens, [11]);
    assert!(
        matches!(&end, Err(RequestError::WorkerLost { worker, layers, .. }) if worker == "w1" && layers.iter() == STAGE)
    );
    let late = world.epoch;
    world.join(2).await;
    world.open(2).await;
    assert!(world.epoch > late);
    let proof = world.frame().await;
    // What the old process still says changes nothing.
    world.answer(1, &proof, 9).await;
    sleep(Duration::from_secs(1)).await;
    assert!(!world.handle.snapshot().borrow().verdict().serving);
    world.answer(2, &proof, 9).await;
    world.until(|snapshot| snapshot.verdict().serving).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_time_is_up_ends_and_one_whose_client_left_makes_room() {
    let mut world = World::serving().await;
    let stream = world.submit(3, Duration::from_secs(2)).await.expect("accepted");
    let overdue = world.frame().await;
    let (tokens, end) = read(stream).await;
    assert!(tokens.is_empty() && matches!(end, Err(RequestError::Deadline { produced: 0, .. })), "{end:?}");
    world.answer(1, &overdue, 11).await;
    drop(world.submit(3, MINUTE).await.expect("accepted"));
    let abandoned = world.frame().await;
    world.answer(1, &abandoned, 11).await;
    world.until(|snapshot| snapshot.requests().running == 0).await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_when_the_coordinator_ends_is_told_so() {
    let mut world = World::serving().await;
    let stream = world.submit(3, MINUTE).await.expect("accepted");
    let _under_way = world.frame().await;
    world.shutdown.cancel();
    assert_eq!(read(stream).await, (vec![], Err(RequestError::ShuttingDown)));
    assert_eq!(world.submit(3, MINUTE).await.err(), Some(RequestError::ShuttingDown));
}

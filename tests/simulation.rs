//! A three-stage cluster under simulated network and time: real coordinator, real workers, one seed a run.
//!
//! `SEED=17 cargo test --test simulation` repeats a run; without it a few fixed seeds are run. The seed is printed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use grokpipe_proto::{
    LOST_AFTER,
    ids::PlanEpoch,
    link::{Link, LinkEvent, LinkSettings},
    secret::Secret,
    transport::{self, ConnectionLimits, Keepalive, Net},
    v1::{
        DiagnoseRequest, Frame, GenerateRequest, GenerateResponse, GetStatusRequest, SamplingOptions,
        cluster_service_client::ClusterServiceClient, diagnose_response::Finding,
        inference_service_client::InferenceServiceClient, pipeline_service_server::PipelineServiceServer,
    },
};
use grokpipe_tests::simulated::{
    GRPC_PORT, SimulatedNet, address, link_key, reference_tokens, request, run_coordinator, run_worker, small_config,
    token_of,
};
use grokpipe_worker::service::{ActiveStage, Pipeline};
use tokio::{
    sync::mpsc,
    time::{Instant, error::Elapsed, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, transport::Channel};

const MODEL_SEED: u64 = 5;
const STAGES: usize = 3;

fn seeds() -> Vec<u64> {
    match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => vec![1, 2, 3],
    }
}

fn secret() -> Secret {
    Secret::new("simulated-secret-16").expect("long enough")
}

/// A simulation of a coordinator and three workers over a network with delays; restarts count incarnations.
fn simulation<'a>(seed: u64) -> turmoil::Sim<'a> {
    println!("SEED={seed}");
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(Duration::from_secs(120))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(4096)
        .enable_tokio_io()
        .build();
    let config = small_config(6);
    let for_coordinator = config.clone();
    sim.host("coordinator", move || run_coordinator(for_coordinator.clone(), STAGES, secret()));
    for index in 1..=STAGES {
        let (config, incarnation) = (config.clone(), Arc::new(AtomicU64::new(1)));
        sim.host(format!("w{index}"), move || {
            run_worker(config.clone(), MODEL_SEED, index, incarnation.fetch_add(1, Ordering::Relaxed), secret())
        });
    }
    sim
}

async fn channel() -> Channel {
    let net: Arc<dyn Net> = Arc::new(SimulatedNet);
    loop {
        if let Ok(channel) = transport::connect(&net, &address("coordinator", GRPC_PORT), Keepalive::Client).await {
            return channel;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn until_serving(channel: &Channel) {
    let mut client = ClusterServiceClient::new(channel.clone());
    loop {
        let status = client.get_status(GetStatusRequest {}).await.expect("the coordinator answers").into_inner();
        if status.snapshot.and_then(|snapshot| snapshot.verdict).is_some_and(|verdict| verdict.serving) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn generate(channel: &Channel, request: GenerateRequest) -> Result<Vec<u32>, Status> {
    let mut stream = InferenceServiceClient::new(channel.clone()).generate(request).await?.into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.message().await? {
        ids.extend(token_of(response, ids.len()));
    }
    Ok(ids)
}

/// The error that a stream ends with, whatever tokens come before.
async fn error_of(stream: &mut Streaming<GenerateResponse>) -> Result<Status, Elapsed> {
    loop {
        match timeout(Duration::from_secs(30), stream.message()).await? {
            Ok(Some(_)) => {}
            Ok(None) => panic!("expected an error, found the end"),
            Err(status) => return Ok(status),
        }
    }
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![5, 9, 13], (1..=40).collect(), vec![96], (20..53).rev().collect()]
}

#[test]
fn concurrent_requests_over_three_stages_get_the_tokens_of_one() {
    let expected: Vec<Vec<u32>> =
        prompts().iter().map(|prompt| reference_tokens(&small_config(6), MODEL_SEED, prompt, 20).unwrap()).collect();
    for seed in seeds() {
        let mut sim = simulation(seed);
        let expected = expected.clone();
        sim.client("client", async move {
            let channel = channel().await;
            until_serving(&channel).await;
            let running = prompts().into_iter().map(|prompt| {
                let channel = channel.clone();
                tokio::spawn(async move { generate(&channel, request(&prompt, 20, SamplingOptions::default())).await })
            });
            for (request, expected) in running.collect::<Vec<_>>().into_iter().zip(expected) {
                assert_eq!(request.await??, expected);
            }
            Ok(())
        });
        sim.run().unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
    }
}

#[test]
fn a_killed_worker_ends_its_requests_with_a_typed_error_and_serves_again_after_its_return() {
    let expected = reference_tokens(&small_config(6), MODEL_SEED, &[5, 9, 13], 12).unwrap();
    for seed in seeds() {
        let mut sim = simulation(seed);
        let expected = expected.clone();
        let (killed, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (kill, done) = (Arc::clone(&killed), Arc::clone(&seen));
        sim.client("client", async move {
            let channel = channel().await;
            until_serving(&channel).await;
            let mut stream = InferenceServiceClient::new(channel.clone())
                .generate(request(&[5, 9, 13], 200, SamplingOptions::default()))
                .await?
                .into_inner();
            for _ in 0..4 {
                stream.message().await?.expect("tokens come");
            }
            kill.store(1, Ordering::Relaxed);
            let since = Instant::now();
            let error = error_of(&mut stream).await?;
            assert!(since.elapsed() <= Duration::from_secs(4), "found {:?}", since.elapsed());
            assert_eq!(error.code(), Code::Unavailable);
            assert!(error.message().contains("worker w2 with layers 2–3 was lost"), "{}", error.message());
            done.store(1, Ordering::Relaxed);
            until_serving(&channel).await;
            assert_eq!(generate(&channel, request(&[5, 9, 13], 12, SamplingOptions::default())).await?, expected);
            Ok(())
        });
        let mut state = 0;
        loop {
            let finished = sim.step().unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
            if state == 0 && killed.load(Ordering::Relaxed) == 1 {
                sim.crash("w2");
                state = 1;
            }
            if state == 1 && seen.load(Ordering::Relaxed) == 1 {
                sim.bounce("w2");
                state = 2;
            }
            if finished {
                break;
            }
        }
        assert_eq!(state, 2, "SEED={seed}: the worker was killed and returned");
    }
}

/// The last worker dies while the way from its neighbour to the coordinator is slow: a frame that the first stage sends meanwhile
/// is refused as of an ended epoch, and that news is the first to arrive.
#[test]
fn a_refusal_that_arrives_before_the_news_of_a_dead_worker_does_not_end_the_request() {
    for seed in seeds() {
        let mut sim = simulation(seed);
        let (killed, kill) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let for_client = Arc::clone(&kill);
        sim.client("client", async move {
            let channel = channel().await;
            until_serving(&channel).await;
            let mut streams = Vec::new();
            for prompt in prompts() {
                let request = request(&prompt, 150, SamplingOptions::default());
                streams.push(InferenceServiceClient::new(channel.clone()).generate(request).await?.into_inner());
            }
            for stream in &mut streams {
                stream.message().await?.expect("tokens come");
            }
            for_client.store(1, Ordering::Relaxed);
            for stream in &mut streams {
                let error = error_of(stream).await?;
                assert_eq!(error.code(), Code::Unavailable, "{}", error.message());
                assert!(error.message().contains("worker w3 with layers 4–5 was lost"), "{}", error.message());
            }
            Ok(())
        });
        loop {
            let finished = sim.step().unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
            if kill.load(Ordering::Relaxed) == 1 && killed.swap(1, Ordering::Relaxed) == 0 {
                for host in ["w2", "w3"] {
                    sim.set_link_latency(host, "coordinator", Duration::from_millis(700));
                }
                sim.crash("w3");
            }
            if finished {
                break;
            }
        }
        assert_eq!(killed.load(Ordering::Relaxed), 1, "SEED={seed}: the worker was killed");
    }
}

/// Nobody explains why the next stage has left the epoch: the sender does not wait for its answers for ever.
#[test]
fn a_link_to_a_stage_that_has_left_the_epoch_is_lost_when_nobody_says_why() {
    for seed in seeds() {
        println!("SEED={seed}");
        let mut sim = turmoil::Builder::new().rng_seed(seed).simulation_duration(Duration::from_secs(60)).build();
        sim.host("w2", || async {
            let net: Arc<dyn Net> = Arc::new(SimulatedNet);
            let listening = net.bind(format!("0.0.0.0:{GRPC_PORT}")).await?;
            // No stage is at work here.
            let active = ActiveStage::default();
            active.expect(7, link_key().frames(PlanEpoch(7), 1));
            let pipeline = Pipeline { worker: "w2".into(), active, max_answers: 4, shutdown: CancellationToken::new() };
            let served = transport::server(Keepalive::Cluster)
                .add_service(PipelineServiceServer::new(pipeline))
                .serve_with_incoming(listening.connections(ConnectionLimits::default()));
            Ok(served.await?)
        });
        sim.client("w1", async {
            let net: Arc<dyn Net> = Arc::new(SimulatedNet);
            let settings = LinkSettings {
                address: address("w2", GRPC_PORT),
                worker: "w2".into(),
                secret: secret(),
                token: link_key().frames(PlanEpoch(7), 1),
                max_frame_bytes: 1 << 20,
                max_in_flight: 2,
            };
            let (events, mut heard) = mpsc::channel(4);
            let link = Link::open(&net, settings, events, CancellationToken::new()).await?;
            let since = Instant::now();
            // More than may be unanswered: refused frames are answered ones.
            for micro_batch_id in 0..5 {
                link.send(Frame { plan_epoch: 7, micro_batch_id, ..Frame::default() }).await?;
            }
            let event = timeout(2 * LOST_AFTER, heard.recv()).await?;
            let Some(LinkEvent::Lost { reason }) = event else { panic!("expected a loss, found {event:?}") };
            assert!(reason.contains("w2") && reason.contains("left this plan epoch"), "{reason}");
            assert!(since.elapsed() >= LOST_AFTER, "{:?}", since.elapsed());
            Ok(())
        });
        sim.run().unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
    }
}

#[test]
fn a_partition_of_a_stage_is_noticed_and_heals() {
    for seed in seeds() {
        let mut sim = simulation(seed);
        sim.client("client", async move {
            let channel = channel().await;
            until_serving(&channel).await;
            let before = generate(&channel, request(&[7, 8], 10, SamplingOptions::default())).await?;
            for host in ["coordinator", "w1", "w3", "client"] {
                turmoil::partition("w2", host);
            }
            let cut =
                timeout(Duration::from_secs(10), generate(&channel, request(&[7, 8], 10, SamplingOptions::default())));
            let error = cut.await?.expect_err("no token can come");
            assert_eq!(error.code(), Code::Unavailable, "{}", error.message());
            for host in ["coordinator", "w1", "w3", "client"] {
                turmoil::repair("w2", host);
            }
            timeout(Duration::from_secs(30), until_serving(&channel)).await?;
            assert_eq!(generate(&channel, request(&[7, 8], 10, SamplingOptions::default())).await?, before);
            Ok(())
        });
        sim.run().unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
    }
}

#[test]
fn a_diagnosis_measures_every_link_and_names_the_one_that_is_cut() {
    for seed in seeds() {
        let mut sim = simulation(seed);
        sim.client("client", async move {
            let channel = channel().await;
            until_serving(&channel).await;
            turmoil::partition_oneway("w1", "w3");
            let mut client = ClusterServiceClient::new(channel);
            let mut stream = client.diagnose(DiagnoseRequest { gentle: false }).await?.into_inner();
            let again = client.diagnose(DiagnoseRequest { gentle: false }).await.expect_err("one runs already");
            assert_eq!(again.code(), Code::ResourceExhausted);
            let (mut nodes, mut links, mut done) = (Vec::new(), Vec::new(), false);
            while let Some(response) = stream.message().await? {
                assert!(!done, "nothing follows the last finding");
                match response.finding {
                    Some(Finding::Started(started)) => assert_eq!(started.links, 12),
                    Some(Finding::Node(node)) => nodes.push(node.name),
                    Some(Finding::Link(link)) => links.push(link),
                    Some(Finding::Done(_)) => done = true,
                    None => panic!("expected a finding"),
                }
            }
            assert!(done);
            assert_eq!(nodes, ["", "w1", "w2", "w3"]);
            assert_eq!(links.len(), 12);
            for link in links {
                let report = link.report.expect("a report");
                if [&link.from, &link.to].iter().all(|end| *end == "w1" || *end == "w3") {
                    assert!(!report.error.is_empty() && report.round_trip_seconds.is_none(), "{report:?}");
                } else {
                    assert_eq!((report.error.as_str(), &report.answered_by), ("", &link.to), "from {}", link.from);
                    assert!(report.round_trip_seconds.expect("a time") >= 0.002, "{report:?}");
                    assert!(report.bytes_per_second.is_some(), "{report:?}");
                }
            }
            Ok(())
        });
        sim.run().unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
    }
}

#[test]
fn a_worker_with_a_wrong_secret_is_refused() {
    let mut sim = turmoil::Builder::new().rng_seed(1).simulation_duration(Duration::from_secs(60)).build();
    let config = small_config(6);
    let for_coordinator = config.clone();
    sim.host("coordinator", move || run_coordinator(for_coordinator.clone(), 1, secret()));
    sim.client("w1", async move {
        let wrong = Secret::new("another-secret-of-16").expect("long enough");
        let refused = run_worker(config, MODEL_SEED, 1, 1, wrong).await.expect_err("the secret is wrong").to_string();
        assert!(refused.contains("expected the cluster's secret, found another one"), "{refused}");
        Ok(())
    });
    sim.run().unwrap();
}

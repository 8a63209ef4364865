//! Many long texts at once: they cost the coordinator little memory, and nobody else his answer.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::{Duration, Instant},
};

use grokpipe_proto::{
    transport::{self, Keepalive, Net, Tcp},
    v1::{
        GenerateRequest, TokenizeRequest, generate_request::Prompt, generate_response::Event,
        inference_service_client::InferenceServiceClient,
    },
};
use grokpipe_tests::processes::{Cluster, ClusterOptions, PATIENCE, peak_rss, runtime};
use tonic::{Code, transport::Channel};

const AT_ONCE: usize = 64;
const MEBIBYTE: usize = 1 << 20;
/// Memory of the coordinator.
const MOST_BYTES: u64 = 300_000_000;
/// Short requests beside them, before and meanwhile.
const BESIDE: usize = 20;

async fn client(cluster: &Cluster) -> InferenceServiceClient<Channel> {
    let net: std::sync::Arc<dyn Net> = std::sync::Arc::new(Tcp);
    let channel = transport::connect(&net, &cluster.grpc, Keepalive::Client).await.expect("the coordinator listens");
    InferenceServiceClient::new(channel)
}

/// The tokens of a short request.
async fn short(mut client: InferenceServiceClient<Channel>) -> Vec<u32> {
    let request = GenerateRequest {
        prompt: Some(Prompt::Text("The capital of France is".into())),
        max_tokens: Some(4),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let mut answer = client.generate(request).await.expect("accepted").into_inner();
    let mut tokens = Vec::new();
    while let Some(message) = answer.message().await.expect("no error") {
        if let Some(Event::Token(token)) = message.event {
            tokens.push(token.token_id);
        }
    }
    tokens
}

/// How long each of so many short requests took, all with the tokens of the first.
async fn beside(client: &InferenceServiceClient<Channel>, until: impl Fn(usize) -> bool) -> Vec<Duration> {
    let expected = short(client.clone()).await;
    let mut took = Vec::new();
    while !until(took.len()) {
        let began = Instant::now();
        let tokens = tokio::time::timeout(PATIENCE, short(client.clone())).await.expect("in time");
        assert_eq!(tokens, expected, "beside long texts");
        took.push(began.elapsed());
    }
    took.sort();
    took
}

/// What becomes of one long text.
async fn long(mut client: InferenceServiceClient<Channel>, text: String, generates: bool) -> Result<(), Code> {
    if generates {
        let prompt = Some(Prompt::Text(text));
        let request = GenerateRequest { prompt, max_tokens: Some(1), ..GenerateRequest::default() };
        client.generate(request).await.map(|_accepted| ()).map_err(|status| status.code())
    } else {
        client.tokenize(TokenizeRequest { text }).await.map(|_answer| ()).map_err(|status| status.code())
    }
}

#[test]
fn sixty_four_long_texts_at_once_take_little_memory_and_leave_others_their_answers() {
    let cluster = Cluster::start(ClusterOptions::demo());
    runtime().block_on(async {
        let others = client(&cluster).await;
        let alone = beside(&others, |count| count >= BESIDE).await;
        let small = peak_rss(cluster.coordinator_pid());
        // The longest that is allowed, and the longest that is worth encoding: 8,192 tokens of the demo's longest piece, or so.
        for (what, text, generates) in [
            ("Tokenize of 1 MiB", "ab".repeat(MEBIBYTE / 2), false),
            ("Generate with 1 MiB", "ab".repeat(MEBIBYTE / 2), true),
            ("Tokenize of 48 KiB", "ab".repeat(24 << 10), false),
        ] {
            let mut calls = tokio::task::JoinSet::new();
            for _ in 0..AT_ONCE {
                calls.spawn(long(client(&cluster).await, text.clone(), generates));
            }
            let over = AtomicBool::new(false);
            let ended = async {
                let mut ended = Vec::new();
                while let Some(end) = calls.join_next().await {
                    ended.push(end.expect("no panic"));
                }
                over.store(true, SeqCst);
                ended
            };
            let enough = |count| over.load(SeqCst) && count >= BESIDE;
            let meanwhile = async { tokio::time::timeout(PATIENCE, ended).await.expect("every one ends") };
            let (ended, beside) = tokio::join!(meanwhile, beside(&others, enough));
            let served = ended.iter().filter(|end| end.is_ok()).count();
            for end in ended {
                let expected = [Ok(()), Err(Code::OutOfRange), Err(Code::ResourceExhausted)];
                assert!(expected.contains(&end), "{what}: {end:?}");
            }
            let peak = peak_rss(cluster.coordinator_pid());
            println!(
                "{what} × {AT_ONCE}: {served} served; coordinator {} MB, at its peak {} MB; short requests beside them, slowest {:.0} \
                 ms, before {:.0} ms",
                small / 1_000_000,
                peak / 1_000_000,
                beside.last().map_or(f64::NAN, |slowest| slowest.as_secs_f64() * 1e3),
                alone.last().map_or(f64::NAN, |slowest| slowest.as_secs_f64() * 1e3),
            );
            assert!(peak < MOST_BYTES, "{what}: the coordinator had {peak} bytes");
        }
    });
    let snapshot = cluster.snapshot();
    assert!(snapshot.verdict().serving && snapshot.plan.is_some_and(|plan| plan.epoch == 1), "nobody was lost");
}

//! The health page over invented snapshots: no model, no workers. For those who change the page.
//!
//! `cargo run -p grokpipe-coordinator --example health_page [SCENE]` prints an address to open. Without a scene the cluster lives
//! through all of them in a minute; `waiting`, `loading`, `serving`, `down`, `returning` and `frozen` hold one still (`frozen`
//! publishes nothing after the first snapshot, as an engine that hangs).

use std::{sync::Arc, time::Duration};

use grokpipe_coordinator::http::{AllowedHosts, HttpState, serve};
use grokpipe_proto::{
    ids::LayerRange,
    snapshot::{
        ClusterSnapshot, NodeState, NodeStats, SnapshotEvent, SnapshotLoad, SnapshotMemory, SnapshotModel,
        SnapshotNode, SnapshotPlan, SnapshotRequests, SnapshotStage, VerdictInput, verdict,
    },
    transport::ConnectionLimits,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

const LAYERS: u32 = 64;
const GIB: u64 = 1 << 30;

/// Node, first layer, layer after the last, device, bytes of weights.
const NODES: [(&str, u32, u32, &str, u64); 4] = [
    ("w1", 0, 18, "gpu: AMD Radeon RX 7900 XTX (vulkan)", 51 * GIB),
    ("w2", 18, 32, "gpu: NVIDIA GeForce RTX 4090 (vulkan)", 39 * GIB),
    ("w3", 32, 48, "gpu: Apple M2 Ultra (metal)", 44 * GIB),
    ("w4", 48, 64, "cpu: 32 threads, AVX-512", 46 * GIB),
];

/// Seconds at which each scene begins when all are played; the last begins the next round.
const SCENES: [(&str, u64); 5] = [("waiting", 0), ("loading", 6), ("serving", 20), ("down", 40), ("returning", 48)];
const ROUND_SECONDS: u64 = 60;

/// The scene at `seconds`, and how long it has lasted.
fn scene(fixed: Option<&str>, seconds: u64) -> (&str, f64) {
    if let Some(scene) = fixed {
        return (scene, (seconds + 3) as f64);
    }
    let now = seconds % ROUND_SECONDS;
    let (name, begin) = SCENES.into_iter().rev().find(|(_, begin)| *begin <= now).unwrap_or(SCENES[0]);
    (name, (now - begin) as f64)
}

fn state_of(scene: &str, index: usize, lasted: f64) -> (NodeState, f64) {
    let loaded = |share: f64| if share < 1.0 { (NodeState::Loading, share) } else { (NodeState::Ready, 1.0) };
    match (scene, index) {
        ("waiting", _) => (NodeState::Joining, 0.0),
        ("loading", _) => loaded((0.2 + 0.05 * lasted) * (1.8 - 0.4 * index as f64)),
        ("down", 2) => (NodeState::Down, 0.0),
        ("returning", 2) => loaded(0.12 * lasted),
        _ => (NodeState::Ready, 1.0),
    }
}

fn node(scene: &str, index: usize, lasted: f64) -> SnapshotNode {
    let (name, start, end, device, weights) = NODES[index];
    let (state, share) = state_of(scene, index, lasted);
    let mut node = SnapshotNode::new(name, state);
    let ready = state == NodeState::Ready;
    let busy = ready && !matches!(scene, "down" | "returning" | "loading");
    node.address = Some(format!("10.0.0.{}:7071", index + 11));
    node.device = Some(device.to_owned());
    node.pid = Some(4711 + 13 * index as u32);
    node.joins = 1;
    node.heartbeat_age_seconds = Some(if state == NodeState::Down { lasted } else { 0.1 + 0.1 * index as f64 });
    if index == 2 && matches!(scene, "down" | "returning" | "serving") {
        node.last_error = Some("stream to w4 broke: connection reset by peer".to_owned());
        node.last_error_age_seconds = Some(if scene == "down" { lasted } else { lasted + 8.0 });
        node.joins = if scene == "down" { 1 } else { 2 };
    }
    if scene == "waiting" {
        return node;
    }
    let loaded = (weights as f64 * share) as u64;
    let kv = 4 * GIB;
    node.layers = LayerRange::new(start, end).ok().map(Into::into);
    node.load = Some(SnapshotLoad { bytes: Some(loaded), bytes_total: Some(weights) });
    let memory = SnapshotMemory {
        weights_bytes: Some(loaded),
        kv_bytes: Some(kv),
        free_bytes: Some(64 * GIB - loaded - kv),
        rss_bytes: Some(loaded / 16 + GIB / 4),
    };
    let wobble = (lasted * 0.7 + index as f64).sin();
    let stats = NodeStats { memory: Some(memory), ..NodeStats::default() };
    node.stats = Some(NodeStats {
        tokens_per_second: ready.then(|| if busy { 38.4 + 2.5 * (lasted * 0.7).sin() } else { 0.0 }),
        step_seconds_p50: ready.then_some(0.0231 + 0.004 * index as f64 + 0.001 * wobble),
        queue_depth: ready.then_some(if busy { index as u32 % 2 } else { 0 }),
        idle_ratio: ready.then_some(if busy { 0.12 + 0.03 * index as f64 } else { 1.0 }),
        ..stats
    });
    node
}

fn event(id: u64, age_seconds: f64, code: &str, node: &str, text: &str) -> SnapshotEvent {
    SnapshotEvent { id, age_seconds, code: code.into(), node: Some(node.into()), text: text.into() }
}

fn events(scene: &str, lasted: f64) -> Vec<SnapshotEvent> {
    let mut events = vec![event(1, lasted + 95.0, "worker_joined", "w1", "w1 joined from 10.0.0.11:7071")];
    if scene != "waiting" {
        events.push(event(2, lasted + 90.0, "plan_changed", "", "plan 1: w1 0–17, w2 18–31, w3 32–47, w4 48–63"));
    }
    if matches!(scene, "down" | "returning") {
        let text = "w3 lost with layers 32–47: stream to w4 broke: connection reset by peer";
        events.push(event(3, lasted, "worker_lost", "w3", text));
    }
    if scene == "returning" {
        events.push(event(4, lasted, "worker_joined", "w3", "w3 joined again, reads layers 32–47"));
    }
    events
}

fn snapshot(scene: &str, lasted: f64) -> ClusterSnapshot {
    let count = if scene == "waiting" { 2 } else { NODES.len() };
    let nodes: Vec<_> = (0..count).map(|index| node(scene, index, lasted)).collect();
    let stages = || nodes.iter().map(|node| SnapshotStage { node: node.name.clone(), layers: node.layers });
    let plan = (scene != "waiting").then(|| SnapshotPlan {
        epoch: 1,
        predicted_tokens_per_second: Some(41.0),
        measured_tokens_per_second: Some(39.2),
        predicted_stream_tokens_per_second: Some(11.0),
        measured_stream_tokens_per_second: Some(10.7),
        stages: stages().collect(),
    });
    let input = VerdictInput {
        layers: LAYERS,
        plan: plan.as_ref(),
        nodes: &nodes,
        workers_expected: 4,
        refusal: None,
        serving: true,
        trouble: None,
    };
    let serving = matches!(scene, "serving" | "frozen");
    ClusterSnapshot {
        cluster: "attic".into(),
        verdict: Some(verdict(input)),
        model: Some(SnapshotModel { name: "grok-1".into(), layers: LAYERS }),
        plan: plan.clone(),
        requests: Some(SnapshotRequests {
            running: if serving { 6 } else { 0 },
            waiting: if scene == "down" { 3 } else { 0 },
        }),
        nodes,
        events: events(scene, lasted),
    }
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let fixed = std::env::args().nth(1);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let first = scene(fixed.as_deref(), 0);
    let (publish, snapshots) = watch::channel(Arc::new(snapshot(first.0, first.1)));
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(serve(
        listener,
        HttpState::new(snapshots, AllowedHosts::bound_to(address)),
        ConnectionLimits::default(),
        shutdown.clone(),
    ));
    println!("http://{address}/");

    let play = async {
        for seconds in 1.. {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (name, lasted) = scene(fixed.as_deref(), seconds);
            if name != "frozen" {
                publish.send_replace(Arc::new(snapshot(name, lasted)));
            }
        }
    };
    tokio::select! {
        () = play => {}
        stop = tokio::signal::ctrl_c() => stop?,
    }
    shutdown.cancel();
    server.await?
}

use serde_json::Value;

use super::*;

fn range(start: u32, end: u32) -> crate::v1::LayerRange {
    crate::v1::LayerRange { start, end }
}

fn node(name: &str, state: NodeState, layers: Option<[u32; 2]>) -> SnapshotNode {
    SnapshotNode { layers: layers.map(|[start, end]| range(start, end)), ..SnapshotNode::new(name, state) }
}

fn plan(stages: &[(&str, u32, u32)]) -> SnapshotPlan {
    let stage =
        |&(node, start, end): &(&str, u32, u32)| SnapshotStage { node: node.into(), layers: Some(range(start, end)) };
    SnapshotPlan {
        epoch: 3,
        predicted_tokens_per_second: Some(41.0),
        measured_tokens_per_second: Some(38.5),
        predicted_stream_tokens_per_second: Some(12.0),
        measured_stream_tokens_per_second: None,
        stages: stages.iter().map(stage).collect(),
    }
}

/// Every field set, or every field that may be absent absent.
fn snapshot(full: bool) -> ClusterSnapshot {
    let mut w1 = node("w1", NodeState::Ready, Some([0, 16]));
    w1.address = Some("10.0.0.1:7071".into());
    w1.device = Some("cpu".into());
    w1.pid = Some(4711);
    let memory = SnapshotMemory { weights_bytes: Some(5), kv_bytes: Some(0), free_bytes: Some(7), rss_bytes: Some(9) };
    w1.load = Some(SnapshotLoad { bytes: Some(0), bytes_total: Some(12) });
    let stats = NodeStats { memory: Some(memory), ..NodeStats::default() };
    w1.stats = Some(NodeStats {
        tokens_per_second: Some(0.0),
        step_seconds_p50: Some(0.25),
        queue_depth: Some(0),
        idle_ratio: Some(0.5),
        ..stats
    });
    w1.heartbeat_age_seconds = Some(0.5);
    w1.last_error = Some("connection reset".into());
    w1.last_error_age_seconds = Some(90.5);
    w1.joins = 2;
    let event = SnapshotEvent {
        id: 8,
        age_seconds: 1.5,
        code: "worker_lost".into(),
        node: Some("w1".into()),
        text: "w1 lost".into(),
    };
    ClusterSnapshot {
        cluster: "demo".into(),
        verdict: Some(Verdict {
            serving: false,
            phase: VerdictPhase::Down.into(),
            text: "Down".into(),
            missing_layers: vec![range(16, 64)],
        }),
        model: Some(SnapshotModel { name: "grok-1".into(), layers: 64 }),
        plan: full.then(|| plan(&[("w1", 0, 16)])),
        nodes: if full { vec![w1] } else { vec![node("w2", NodeState::Joining, None)] },
        requests: Some(SnapshotRequests { running: 1, waiting: 2 }),
        events: if full { vec![event] } else { vec![] },
    }
}

/// Whether `found` is `expected`, apart from members that were added to objects.
fn holds(found: &Value, expected: &Value) -> bool {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            expected.iter().all(|(name, value)| found.get(name).is_some_and(|found| holds(found, value)))
        }
        (Value::Array(found), Value::Array(expected)) => {
            found.len() == expected.len() && found.iter().zip(expected).all(|(found, value)| holds(found, value))
        }
        _ => found == expected,
    }
}

#[test]
fn json_has_the_documented_shape() {
    let full = serde_json::json!({
        "cluster": "demo",
        "verdict": {"serving": false, "phase": "down", "text": "Down", "missing_layers": [[16, 64]]},
        "model": {"name": "grok-1", "layers": 64},
        "plan": {
            "epoch": 3, "predicted_tokens_per_second": 41.0, "measured_tokens_per_second": 38.5,
            "predicted_stream_tokens_per_second": 12.0, "measured_stream_tokens_per_second": null,
            "stages": [{"node": "w1", "layers": [0, 16]}]
        },
        "nodes": [{
            "name": "w1", "state": "ready", "layers": [0, 16], "address": "10.0.0.1:7071", "device": "cpu", "pid": 4711,
            "memory": {"weights_bytes": 5, "kv_bytes": 0, "free_bytes": 7, "rss_bytes": 9},
            "load": {"bytes": 0, "bytes_total": 12},
            "tokens_per_second": 0.0, "step_seconds_p50": 0.25, "heartbeat_age_seconds": 0.5,
            "last_error": "connection reset", "last_error_age_seconds": 90.5,
            "queue_depth": 0, "idle_ratio": 0.5, "joins": 2,
        }],
        "requests": {"running": 1, "waiting": 2},
        "events": [{"id": 8, "age_seconds": 1.5, "code": "worker_lost", "node": "w1", "text": "w1 lost"}],
    });
    let found = serde_json::to_value(snapshot(true)).expect("serialises");
    assert!(holds(&found, &full), "expected {full:#}, found {found:#}");

    let bare = serde_json::to_value(snapshot(false)).expect("serialises");
    assert_eq!(bare["plan"], Value::Null);
    let unknown = &bare["nodes"][0];
    for field in ["layers", "address", "device", "pid", "tokens_per_second", "step_seconds_p50", "last_error"] {
        assert_eq!(unknown.get(field), Some(&Value::Null), "{field} is there and null");
    }
    assert_eq!(unknown["memory"]["weights_bytes"], Value::Null);
}

#[test]
fn states_are_called_the_same_in_words_and_in_json() {
    for number in 1..=7 {
        let state = NodeState::try_from(number).expect("a state");
        let name = state.as_str_name().trim_start_matches("NODE_STATE_").to_lowercase();
        assert_eq!(state.to_string(), name);
        assert_eq!(serde_json::to_value(SnapshotNode::new("w1", state)).expect("serialises")["state"], name);
    }
}

#[test]
fn faulty_messages_are_refused_by_name() {
    type Spoil = fn(&mut ClusterSnapshot);
    let cases: [(Spoil, &str); 8] = [
        (|s| s.verdict = None, "expected \"verdict\" in the cluster snapshot, found none"),
        (|s| s.model = None, "expected \"model\" in the cluster snapshot, found none"),
        (|s| s.requests = None, "expected \"requests\" in the cluster snapshot, found none"),
        (|s| s.nodes[0].state = 0, "expected a known \"nodes.state\", found number 0"),
        (|s| s.verdict.as_mut().expect("set").phase = 77, "expected a known \"verdict.phase\", found number 77"),
        (
            |s| s.nodes[0].layers = Some(range(9, 3)),
            "expected a layer range [start, end) with start < end, found [9, 3)",
        ),
        (
            |s| s.verdict.as_mut().expect("set").missing_layers = vec![range(4, 4)],
            "expected a layer range [start, end) with start < end, found [4, 4)",
        ),
        (
            |s| s.plan.as_mut().expect("set").stages[0].layers = None,
            "expected \"plan.stages.layers\" in the cluster snapshot, found none",
        ),
    ];
    assert_eq!(snapshot(true).checked(), Ok(snapshot(true)));
    assert_eq!(snapshot(false).checked(), Ok(snapshot(false)));
    for (spoil, expected) in cases {
        let mut message = snapshot(true);
        spoil(&mut message);
        assert_eq!(message.checked().expect_err(expected).to_string(), expected);
    }
}

/// Whoever adds a figure with a fraction is reminded of [`NodeStats::plausible`].
#[test]
fn no_figure_of_a_worker_is_infinite() {
    for field in 1..64_u8 {
        let key: &[u8] = if field < 16 { &[field << 3 | 1] } else { &[(field & 15) << 3 | 0x81, field >> 4] };
        for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            let message = [key, &value.to_le_bytes()].concat();
            // Fields of other types are refused.
            let Ok(stats) = <NodeStats as prost::Message>::decode(&message[..]) else { continue };
            assert_eq!(stats.plausible(), NodeStats::default(), "field {field}");
        }
    }
}

fn lost(name: &str, error: Option<&str>, age: f64) -> SnapshotNode {
    SnapshotNode {
        last_error: error.map(Into::into),
        last_error_age_seconds: error.map(|_| age),
        heartbeat_age_seconds: Some(age),
        ..node(name, NodeState::Down, None)
    }
}

fn loading(name: &str, bytes: Option<u64>) -> SnapshotNode {
    let load = Some(SnapshotLoad { bytes, bytes_total: bytes.map(|_| 1000) });
    SnapshotNode { load, ..node(name, NodeState::Loading, None) }
}

#[test]
fn verdict_says_it_in_words() {
    use NodeState::{Down, Draining, Joining, Ready, Standby};
    let four = plan(&[("w0", 0, 16), ("w1", 16, 32), ("w2", 32, 48), ("w3", 48, 64)]);
    let one = plan(&[("w0", 0, 64)]);
    let holed = plan(&[("w0", 0, 10), ("w1", 11, 63)]);
    let is = |name: &str, state| node(name, state, None);
    let ready = |names: &[&str]| names.iter().map(|name| is(name, Ready)).collect::<Vec<_>>();
    let with = |mut nodes: Vec<SnapshotNode>, more: Vec<SnapshotNode>| {
        nodes.extend(more);
        nodes
    };
    type Case<'a> = (Option<&'a SnapshotPlan>, Vec<SnapshotNode>, VerdictPhase, &'a str, Vec<[u32; 2]>);
    let cases: Vec<Case<'_>> = vec![
        (None, vec![], VerdictPhase::Waiting, "Waiting for workers: 0 of 4 joined", vec![[0, 64]]),
        (
            None,
            vec![is("w0", Joining), is("w1", Joining), is("w2", Down)],
            VerdictPhase::Waiting,
            "Waiting for workers: 2 of 4 joined",
            vec![[0, 64]],
        ),
        (
            None,
            ["w0", "w1", "w2", "w3"].map(|name| is(name, Joining)).to_vec(),
            VerdictPhase::Waiting,
            "Planning: 4 workers joined",
            vec![[0, 64]],
        ),
        (
            Some(&four),
            ready(&["w0", "w1", "w2", "w3"]),
            VerdictPhase::Serving,
            "Serving: 64 of 64 layers on 4 nodes",
            vec![],
        ),
        (
            Some(&one),
            vec![is("w0", Draining), is("w9", Standby), is("w8", Down)],
            VerdictPhase::Serving,
            "Serving: 64 of 64 layers on 1 node",
            vec![],
        ),
        (
            Some(&four),
            with(ready(&["w0", "w1"]), vec![loading("w2", Some(999)), loading("w3", None)]),
            VerdictPhase::Loading,
            "Loading: 32 of 64 layers, w2 at 99 %, w3 has not begun",
            vec![[32, 64]],
        ),
        (
            Some(&four),
            with(ready(&["w0", "w1", "w3"]), vec![lost("w2", Some("connection reset"), 4.7)]),
            VerdictPhase::Down,
            "Down: layers 32–47 have no live stage for 4 s, w2 lost: connection reset",
            vec![[32, 48]],
        ),
        (
            Some(&four),
            with(
                ready(&["w2"]),
                vec![lost("w0", None, 200.0), lost("w1", Some("killed"), 10.0), loading("w3", Some(0))],
            ),
            VerdictPhase::Down,
            "Down: layers 0–31 have no live stage for 3 min, w0 lost; w1 lost: killed",
            vec![[0, 32], [48, 64]],
        ),
        (
            Some(&four),
            with(ready(&["w1", "w3"]), vec![is("w2", Joining)]),
            VerdictPhase::Down,
            "Down: layers 0–15, 32–47 have no live stage, w0 has not joined; w2 is joining",
            vec![[0, 16], [32, 48]],
        ),
        (
            Some(&holed),
            ready(&["w0", "w1"]),
            VerdictPhase::Down,
            "Down: layers 10, 63 have no live stage, layer 10 in no stage of the plan; layer 63 in no stage of the plan",
            vec![[10, 11], [63, 64]],
        ),
    ];
    for (plan, nodes, phase, text, missing) in cases {
        let found = verdict(VerdictInput {
            layers: 64,
            plan,
            nodes: &nodes,
            workers_expected: 4,
            refusal: None,
            serving: true,
            trouble: None,
        });
        let missing_layers = missing.into_iter().map(|[start, end]| range(start, end)).collect();
        let serving = phase == VerdictPhase::Serving;
        assert_eq!(found, Verdict { serving, phase: phase.into(), text: text.into(), missing_layers });
    }
}

#[test]
fn verdict_without_a_plan_gives_the_planners_reason() {
    let input = VerdictInput {
        layers: 64,
        plan: None,
        nodes: &[],
        workers_expected: 0,
        refusal: None,
        serving: true,
        trouble: None,
    };
    assert_eq!(verdict(input).text, "Waiting for workers: none joined");
    let refused = VerdictInput { refusal: Some("9.1 GiB missing on w1"), ..input };
    assert_eq!(verdict(refused).text, "No plan: 9.1 GiB missing on w1");
}

#[test]
fn load_ratio_is_known_only_with_a_total() {
    let ratio = |bytes, bytes_total| SnapshotLoad { bytes, bytes_total }.ratio();
    assert_eq!(ratio(None, Some(5)), None);
    assert_eq!(ratio(Some(5), None), None);
    assert_eq!(ratio(Some(0), Some(0)), Some(1.0));
    assert_eq!(ratio(Some(1), Some(4)), Some(0.25));
    assert_eq!(ratio(Some(9), Some(4)), Some(1.0));
}

#[test]
fn what_keeps_a_loaded_plan_from_serving_is_the_verdict() {
    let plan = plan(&[("w1", 0, 32), ("w2", 32, 64)]);
    let node = |name: &str, state, load: Option<u64>| SnapshotNode {
        load: Some(SnapshotLoad { bytes: load, bytes_total: load.map(|_| 100) }),
        ..SnapshotNode::new(name, state)
    };
    let ready = |name: &str| node(name, NodeState::Ready, Some(100));
    let trouble = "w1 cannot reach w2 at 10.0.0.2:43197: connection timed out";
    // Nodes, what went wrong last, phase, text.
    let cases = [
        (
            vec![ready("w1"), ready("w2")],
            None,
            VerdictPhase::Loading,
            "Loading: 64 of 64 layers, waiting for a first token to go through".to_owned(),
        ),
        (vec![ready("w1"), ready("w2")], Some(trouble), VerdictPhase::Down, format!("Down: {trouble}")),
        (
            vec![node("w1", NodeState::Loading, Some(100)), ready("w2")],
            Some(trouble),
            VerdictPhase::Down,
            format!("Down: {trouble}"),
        ),
        (
            vec![node("w1", NodeState::Loading, Some(100)), ready("w2")],
            None,
            VerdictPhase::Loading,
            "Loading: 32 of 64 layers, w1 has its layers, not yet its link".to_owned(),
        ),
        (
            vec![node("w1", NodeState::Loading, Some(7)), ready("w2")],
            Some(trouble),
            VerdictPhase::Loading,
            format!("Loading: 32 of 64 layers, w1 at 7 %; before that {trouble}"),
        ),
        (
            vec![
                SnapshotNode { last_error: Some("no such tensor".into()), ..node("w1", NodeState::Excluded, None) },
                ready("w2"),
            ],
            Some(trouble),
            VerdictPhase::Down,
            "Down: layers 0–31 have no live stage, w1 is left out: no such tensor".to_owned(),
        ),
    ];
    for (nodes, trouble, phase, text) in cases {
        let input = VerdictInput {
            layers: 64,
            plan: Some(&plan),
            nodes: &nodes,
            workers_expected: 2,
            refusal: None,
            serving: false,
            trouble,
        };
        let found = verdict(input);
        assert_eq!((found.serving, found.phase(), found.text), (false, phase, text));
    }
}

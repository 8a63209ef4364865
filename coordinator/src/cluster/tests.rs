//! The cluster's life, step by step, without clocks and sockets.

use grokpipe_model::{ModelConfig, contents::Sum};
use grokpipe_proto::{
    PROTOCOL_VERSIONS, bounds,
    snapshot::{NodeState, SnapshotRequests, VerdictPhase},
};

use super::{
    messages::{
        Assignment, ContentSum, FormatRate, LoadProgress, StageBlocked, StageFailed, StageReady, StageTiming,
        StepOverhead,
    },
    *,
};
use crate::planner::Objective;

const MIB: u64 = 1 << 20;

fn facts() -> ModelFacts {
    ModelFacts::new(ModelConfig { num_hidden_layers: 8, ..small_config() }, "test".into(), vec![MIB; 8])
}

fn small_config() -> ModelConfig {
    let mut config = ModelConfig::grok_1();
    config.hidden_size = 64;
    config.vocab_size = 512;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = 16;
    config.intermediate_size = 96;
    config
}

fn cluster(expected: &[&str]) -> Cluster {
    let expected = expected.iter().map(|name| ExpectedWorker { name: (*name).into(), layers: None }).collect();
    let settings = ClusterSettings {
        name: "test".into(),
        generation: Generation(77),
        expected,
        replan_after: Duration::from_secs(30),
        requirements: PlanRequirements {
            kv_tokens: 1024,
            max_batch_tokens: 64,
            batch_tokens: 1,
            objective: Objective::Throughput,
        },
        kv_blocks: 64,
        max_frames_in_flight: 8,
        link_key: LinkKey::new([7; 32]),
    };
    Cluster::new(settings, facts())
}

fn hello(name: &str, generation: u64) -> Hello {
    Hello {
        name: name.into(),
        generation: Generation(generation),
        version_min: *PROTOCOL_VERSIONS.start(),
        version_max: *PROTOCOL_VERSIONS.start(),
        device: "test device".into(),
        memory_bytes: 1 << 30,
        read_bandwidth: 1e10,
        flop_rate: 1e11,
        data_address: format!("127.0.0.1:{}", 1000 + generation),
        model_digest: facts().digest,
        ..Hello::default()
    }
}

fn rate(format: &str, decode_bytes_per_second: f64, prefill_flops_per_second: f64) -> FormatRate {
    FormatRate { format: format.into(), decode_bytes_per_second, prefill_flops_per_second }
}

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn join(cluster: &mut Cluster, now: Duration, name: &str, generation: u64) {
    cluster.join(now, hello(name, generation)).unwrap();
    cluster.joined(now);
}

fn assignments(cluster: &mut Cluster) -> Vec<(WorkerName, Assignment)> {
    let sent = cluster.take_commands().into_iter().filter_map(|command| match command {
        Command::Send { node, order: Order::Assign(assignment), .. } => Some((node, assignment)),
        _ => None,
    });
    sent.collect()
}

/// Two workers, planned, loaded and connected.
fn serving() -> Cluster {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    join(&mut cluster, at(0.1), "w2", 2);
    make_ready(&mut cluster, at(0.2), &[("w1", 1), ("w2", 2)]);
    assert!(cluster.is_serving());
    cluster.take_commands();
    cluster
}

fn make_ready(cluster: &mut Cluster, now: Duration, workers: &[(&str, u64)]) {
    let epoch = cluster.epoch();
    for (name, generation) in workers {
        cluster.stage_ready(now, name, Generation(*generation), &ready(epoch));
    }
    cluster.pipeline_open(epoch);
    cluster.proven(now, epoch);
}

fn ready(plan_epoch: PlanEpoch) -> StageReady {
    StageReady { plan_epoch, coordinator_generation: Generation(77), ..StageReady::default() }
}

fn failed(cluster: &Cluster, message: &str) -> StageFailed {
    StageFailed {
        plan_epoch: cluster.epoch(),
        coordinator_generation: Generation(77),
        message: message.into(),
        retryable: true,
        ..StageFailed::default()
    }
}

/// Time passes while these workers are heard of: every tenth of a second until `until`.
fn pass(cluster: &mut Cluster, from: f64, until: f64, workers: &[(&str, u64)]) {
    let mut now = from;
    while now < until {
        for (name, generation) in workers {
            cluster.heartbeat(at(now), name, Generation(*generation), Heartbeat::default());
        }
        cluster.tick(at(now));
        now += 0.1;
    }
}

fn snapshot(cluster: &Cluster, now: Duration) -> grokpipe_proto::snapshot::ClusterSnapshot {
    cluster.snapshot(now, SnapshotRequests::default())
}

#[test]
fn a_plan_waits_for_the_workers_that_the_configuration_names() {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    cluster.tick(at(2.0));
    assert_eq!(cluster.epoch(), PlanEpoch(0));
    assert_eq!(snapshot(&cluster, at(2.0)).verdict().text, "Waiting for workers: 1 of 2 joined");
    cluster.heartbeat(at(2.0), "w1", Generation(1), Heartbeat::default());
    join(&mut cluster, at(2.1), "w2", 2);
    let sent = assignments(&mut cluster);
    assert_eq!(sent.len(), 2);
    let ranges: Vec<_> = sent.iter().map(|(_, a)| (a.layer_start, a.layer_end)).collect();
    assert_eq!((ranges[0].0, ranges[0].1, ranges[1].1), (0, ranges[1].0, 8));
    assert_eq!(sent[0].1.next_worker, sent[1].0.as_str());
    assert_eq!(sent[0].1.previous_generation, Generation(77));
    assert!(sent[1].1.next_address.is_empty());
}

#[test]
fn missing_workers_are_not_waited_for_for_ever() {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    for second in 1..=31 {
        cluster.heartbeat(at(f64::from(second)), "w1", Generation(1), Heartbeat::default());
        cluster.tick(at(f64::from(second)));
    }
    assert_eq!(assignments(&mut cluster).len(), 1);
}

#[test]
fn readiness_said_again_or_by_a_worker_without_a_stage_changes_nothing() {
    let mut cluster = serving();
    join(&mut cluster, at(0.5), "spare", 3);
    cluster.take_commands();
    let epoch = cluster.epoch();
    for (name, generation) in [("w1", 1), ("w2", 2), ("spare", 3), ("stranger", 4)] {
        cluster.stage_ready(at(1.0), name, Generation(generation), &ready(epoch));
        let commands = cluster.take_commands();
        assert!(commands.is_empty(), "{name}: {commands:?}");
        assert!(cluster.is_serving());
    }
}

#[test]
fn a_lost_worker_interrupts_with_its_name_and_layers_and_its_return_begins_a_new_epoch() {
    let mut cluster = serving();
    let layers = snapshot(&cluster, at(1.0)).nodes.iter().find(|node| node.name == "w2").unwrap().layers.unwrap();
    cluster.leave(at(1.0), "w2", Generation(2), "its connection was reset");
    let interrupted = cluster.take_commands();
    let [Command::Interrupt(RequestError::WorkerLost { worker, layers: lost, .. })] = &interrupted[..] else {
        panic!("{interrupted:?}")
    };
    assert_eq!((worker.as_str(), lost.start(), lost.end()), ("w2", layers.start, layers.end));
    let seen = snapshot(&cluster, at(2.0));
    assert_eq!(seen.verdict().phase(), VerdictPhase::Down);
    assert!(seen.verdict().text.contains("w2 lost: its connection was reset"), "{}", seen.verdict().text);
    assert_eq!(seen.verdict().missing_layers, vec![layers]);

    cluster.heartbeat(at(2.9), "w1", Generation(1), Heartbeat::default());
    join(&mut cluster, at(3.0), "w2", 9);
    cluster.tick(at(4.0));
    let sent = assignments(&mut cluster);
    assert_eq!(sent.len(), 2);
    assert!(sent.iter().all(|(_, a)| a.plan_epoch == PlanEpoch(2)));
    assert_eq!(sent[0].1.next_address, "127.0.0.1:1009");
    make_ready(&mut cluster, at(5.0), &[("w1", 1), ("w2", 9)]);
    let seen = snapshot(&cluster, at(5.0));
    assert!(seen.verdict().serving);
    let returned = seen.nodes.iter().find(|node| node.name == "w2").unwrap();
    assert_eq!((returned.joins, returned.last_error.as_deref()), (2, Some("its connection was reset")));
}

#[test]
fn silence_for_three_seconds_is_a_loss() {
    let mut cluster = serving();
    cluster.heartbeat(at(3.0), "w1", Generation(1), Heartbeat::default());
    cluster.tick(at(3.15));
    assert!(cluster.is_serving(), "2.95 s of silence are not a loss");
    cluster.tick(at(3.3));
    assert!(!cluster.is_serving());
    assert!(snapshot(&cluster, at(3.3)).verdict().text.contains("no heartbeat for 3 s"));
}

#[test]
fn without_its_worker_for_too_long_the_others_take_over() {
    let mut cluster = serving();
    cluster.leave(at(1.0), "w2", Generation(2), "gone");
    cluster.take_commands();
    for second in 2..=31 {
        cluster.heartbeat(at(f64::from(second)), "w1", Generation(1), Heartbeat::default());
        cluster.tick(at(f64::from(second)));
    }
    let sent = assignments(&mut cluster);
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].1.layer_start, sent[0].1.layer_end), (0, 8));
}

#[test]
fn pins_hold_while_all_pinned_workers_are_there() {
    let mut cluster = cluster(&["w1", "w2"]);
    cluster.settings.expected[0].layers = Some(0..3);
    cluster.settings.expected[1].layers = Some(3..8);
    join(&mut cluster, at(0.0), "w1", 1);
    join(&mut cluster, at(0.1), "w2", 2);
    let ranges =
        |sent: &[(WorkerName, Assignment)]| sent.iter().map(|(_, a)| (a.layer_start, a.layer_end)).collect::<Vec<_>>();
    assert_eq!(ranges(&assignments(&mut cluster)), [(0, 3), (3, 8)]);
    cluster.leave(at(1.0), "w2", Generation(2), "gone");
    cluster.take_commands();
    for second in 2..=31 {
        cluster.heartbeat(at(f64::from(second)), "w1", Generation(1), Heartbeat::default());
        cluster.tick(at(f64::from(second)));
    }
    assert_eq!(ranges(&assignments(&mut cluster)), [(0, 8)]);
}

#[test]
fn a_standby_takes_over_at_once() {
    let mut cluster = cluster(&["w1"]);
    join(&mut cluster, at(0.0), "w1", 1);
    make_ready(&mut cluster, at(0.1), &[("w1", 1)]);
    join(&mut cluster, at(0.2), "spare", 5);
    cluster.take_commands();
    assert_eq!(cluster.standby(), ["spare"]);
    cluster.leave(at(1.0), "w1", Generation(1), "gone");
    let sent = assignments(&mut cluster);
    assert_eq!((sent.len(), sent[0].0.as_str()), (1, "spare"));
}

#[test]
fn what_an_earlier_incarnation_says_is_ignored() {
    let mut cluster = serving();
    cluster.leave(at(1.0), "w2", Generation(2), "gone");
    join(&mut cluster, at(1.1), "w2", 9);
    cluster.tick(at(2.0));
    let epoch = cluster.epoch();
    cluster.leave(at(2.1), "w2", Generation(2), "late news");
    cluster.stage_ready(at(2.2), "w2", Generation(2), &ready(epoch));
    let late = StageFailed { plan_epoch: PlanEpoch(epoch.0 - 1), ..failed(&cluster, "late") };
    cluster.stage_failed(at(2.3), "w2", Generation(9), &late);
    let of_another_coordinator = StageFailed { coordinator_generation: Generation(76), ..failed(&cluster, "late") };
    cluster.stage_failed(at(2.3), "w2", Generation(9), &of_another_coordinator);
    assert_eq!(cluster.epoch(), epoch);
    assert!(cluster.standby().is_empty());
    make_ready(&mut cluster, at(2.5), &[("w1", 1)]);
    assert!(!cluster.is_serving(), "the new incarnation has not said that it is ready");
}

#[test]
fn a_failed_stage_is_tried_again_with_growing_pauses() {
    let mut cluster = serving();
    let mut now = 1.0;
    for _ in 0..4 {
        let epoch = cluster.epoch();
        let failed = failed(&cluster, "link broke");
        cluster.stage_failed(at(now), "w1", Generation(1), &failed);
        assert_eq!(cluster.epoch(), epoch, "not at once");
        while cluster.epoch() == epoch {
            now += 0.1;
            cluster.heartbeat(at(now), "w1", Generation(1), Heartbeat::default());
            cluster.heartbeat(at(now), "w2", Generation(2), Heartbeat::default());
            cluster.tick(at(now));
            assert!(now < 20.0);
        }
    }
    assert!(now > 3.0, "0.2 + 0.4 + 0.8 + 1.6 s, found {now}");
}

#[test]
fn a_broken_link_is_blamed_on_the_worker_at_its_other_end() {
    let mut cluster = serving();
    let failed = StageFailed { lost_peer: "w2".into(), ..failed(&cluster, "the link to w2 broke") };
    cluster.stage_failed(at(1.0), "w1", Generation(1), &failed);
    let interrupted = cluster.take_commands();
    assert!(
        matches!(&interrupted[..], [Command::Interrupt(RequestError::WorkerLost { worker, .. })] if worker == "w2"),
        "{interrupted:?}"
    );
}

#[test]
fn a_worker_that_failed_for_good_is_left_out() {
    let mut cluster = serving();
    let failed = StageFailed { retryable: false, ..failed(&cluster, "no such tensor") };
    cluster.stage_failed(at(1.0), "w2", Generation(2), &failed);
    cluster.take_commands();
    let verdict = snapshot(&cluster, at(2.0)).verdict.expect("a verdict");
    assert_eq!(verdict.phase(), VerdictPhase::Down);
    assert!(verdict.text.ends_with("w2 is left out: no such tensor"), "{}", verdict.text);
    for second in 2..=40 {
        let now = at(f64::from(second));
        cluster.heartbeat(now, "w1", Generation(1), Heartbeat::default());
        cluster.heartbeat(now, "w2", Generation(2), Heartbeat::default());
        cluster.tick(now);
    }
    let sent = assignments(&mut cluster);
    assert_eq!((sent.len(), sent[0].0.as_str()), (1, "w1"));
    let seen = snapshot(&cluster, at(41.0));
    let node = seen.nodes.iter().find(|node| node.name == "w2").unwrap();
    assert_eq!((node.state(), node.last_error.as_deref()), (NodeState::Excluded, Some("no such tensor")));
}

#[test]
fn hellos_that_make_no_sense_are_refused() {
    let good = hello("w9", 9);
    let cases: Vec<(&str, Hello)> = vec![
        ("empty name", Hello { name: String::new(), ..good.clone() }),
        ("long name", Hello { name: "x".repeat(65), ..good.clone() }),
        ("path as name", Hello { name: "../w".into(), ..good.clone() }),
        ("upper case", Hello { name: "W1".into(), ..good.clone() }),
        ("no generation", Hello { generation: Generation(0), ..good.clone() }),
        ("no bandwidth", Hello { read_bandwidth: 0.0, ..good.clone() }),
        ("negative bandwidth", Hello { read_bandwidth: -1.0, ..good.clone() }),
        ("bandwidth not a number", Hello { read_bandwidth: f64::NAN, ..good.clone() }),
        ("infinite rate", Hello { flop_rate: f64::INFINITY, ..good.clone() }),
        ("a rate of 0", Hello { format_rates: vec![rate("q4_0", 0.0, 1.0)], ..good.clone() }),
        ("a rate that is no number", Hello { format_rates: vec![rate("q4_0", 1.0, f64::NAN)], ..good.clone() }),
        ("a format without a name", Hello { format_rates: vec![rate("", 1.0, 1.0)], ..good.clone() }),
        ("a format with markup", Hello { format_rates: vec![rate("<b>", 1.0, 1.0)], ..good.clone() }),
        ("too many formats", Hello { format_rates: vec![rate("q4_0", 1.0, 1.0); 65], ..good.clone() }),
        (
            "a negative overhead",
            Hello { step_overhead: StepOverhead { layer_seconds: -1.0, ..StepOverhead::default() }, ..good.clone() },
        ),
        ("no port", Hello { data_address: "127.0.0.1".into(), ..good.clone() }),
        ("port 0", Hello { data_address: "127.0.0.1:0".into(), ..good.clone() }),
        ("port too large", Hello { data_address: "127.0.0.1:70000".into(), ..good.clone() }),
        ("no host", Hello { data_address: ":80".into(), ..good.clone() }),
        ("inverted layers", Hello { held_layer_start: 3, held_layer_end: 1, ..good.clone() }),
        ("too old", Hello { version_min: 1, version_max: 1, ..good.clone() }),
        ("too new", Hello { version_min: 3, version_max: 9, ..good.clone() }),
    ];
    for (name, bad) in cases {
        let refusal = serving().join(at(1.0), bad).expect_err(name);
        assert!(refusal.to_string().contains("expected"), "{name}: {refusal}");
    }
    let refusal = serving().join(at(1.0), hello("w1", 99)).unwrap_err();
    assert_eq!(refusal, JoinRefusal::NameTaken("w1".into()));
}

#[test]
fn a_worker_with_another_model_gets_no_layers() {
    let mut cluster = cluster(&["w1"]);
    let wrong = Hello { model_digest: "other".into(), ..hello("w1", 1) };
    cluster.join(at(0.0), wrong).unwrap();
    cluster.joined(at(0.0));
    cluster.tick(at(1.0));
    assert_eq!(cluster.epoch(), PlanEpoch(0));
    let seen = snapshot(&cluster, at(1.0));
    assert!(seen.nodes[0].last_error.as_deref().unwrap().contains("digest other"));
}

#[test]
fn too_little_memory_is_a_verdict_that_says_how_much_is_missing() {
    let mut cluster = cluster(&["w1"]);
    cluster.join(at(0.0), Hello { memory_bytes: 1000, ..hello("w1", 1) }).unwrap();
    cluster.joined(at(0.0));
    let verdict = snapshot(&cluster, at(0.1)).verdict.expect("a verdict");
    assert!(!verdict.serving);
    assert!(verdict.text.starts_with("No plan: 10.1 MiB are missing"), "{}", verdict.text);
}

#[test]
fn plans_rest_on_the_rates_that_workers_measured_for_the_models_formats() {
    let predicted = |hello: Hello| {
        let mut cluster = cluster(&["w1"]);
        cluster.join(at(0.0), hello).unwrap();
        cluster.joined(at(0.0));
        cluster.plan().unwrap().0.predicted_stream_tokens_per_second
    };
    let without = predicted(hello("w1", 1));
    let with = |format: &str| predicted(Hello { format_rates: vec![rate(format, 1e8, 1e11)], ..hello("w1", 1) });
    assert_eq!(with("q4_0"), without, "a format that the model lacks");
    assert!(with("int8") < without / 2.0, "{} {without}", with("int8"));
    let overhead = StepOverhead { step_seconds: 0.5, layer_seconds: 0.0625, draw_seconds: 0.25 };
    let slowed = predicted(Hello { step_overhead: overhead, ..hello("w1", 1) });
    let expected = 1.0 / (1.0 / without + 0.5 + 8.0 * 0.0625 + 0.25);
    assert!((slowed / expected - 1.0).abs() < 1e-9, "{slowed} {expected}");
}

#[test]
fn what_a_prediction_came_to_is_told_after_enough_steps_of_its_size() {
    let mut cluster = cluster(&["w1"]);
    join(&mut cluster, at(0.0), "w1", 1);
    let timing = StageTiming { compute_us: 1900, ..StageTiming::default() };
    let plan = |cluster: &Cluster| cluster.snapshot(at(1.0), SnapshotRequests::default()).plan.unwrap();
    for _ in 0..100 {
        cluster.step_done(cluster.epoch(), 8, 0.5, std::slice::from_ref(&timing));
        cluster.step_done(cluster.epoch().next(), 1, 0.5, std::slice::from_ref(&timing));
    }
    let unknown = plan(&cluster);
    assert!(unknown.predicted_tokens_per_second.is_some() && unknown.predicted_stream_tokens_per_second.is_some());
    assert_eq!((unknown.measured_tokens_per_second, unknown.measured_stream_tokens_per_second), (None, None));
    for _ in 0..100 {
        cluster.step_done(cluster.epoch(), 1, 0.002, std::slice::from_ref(&timing));
    }
    let known = plan(&cluster);
    for measured in [known.measured_tokens_per_second, known.measured_stream_tokens_per_second] {
        assert!((measured.unwrap() - 500.0).abs() < 1e-6, "{known:?}");
    }
}

#[test]
fn a_worker_with_another_copy_of_a_layer_is_named_and_left_out() {
    let loaded = |epoch, number: f32| {
        let sum =
            |part| ContentSum { part, sum: Sum::of_vector(&[number]).as_bytes().to_vec().into(), confirmed: false };
        StageReady { contents: (4..8).map(sum).collect(), ..ready(epoch) }
    };
    // w2 has loaded the upper half, and is lost; w3 takes over with its own copy.
    for (number, is_trusted) in [(1.0, true), (2.0, false)] {
        let mut cluster = serving();
        let second = cluster.active.as_ref().unwrap().stages[1].node.clone();
        let generation = cluster.nodes[&second].hello.generation;
        assert!(cluster.check_contents(at(0.3), &second, generation, &loaded(cluster.epoch(), 1.0)));
        join(&mut cluster, at(1.0), "w3", 3);
        cluster.leave(at(1.1), &second, generation, "unplugged");
        assert!(cluster.runs_stage("w3"));
        assert_eq!(cluster.check_contents(at(1.2), "w3", Generation(3), &loaded(cluster.epoch(), number)), is_trusted);
        let seen = snapshot(&cluster, at(1.3));
        let differ = seen.events.iter().find(|event| event.code == "contents_differ");
        let error = seen.nodes.iter().find(|node| node.name == "w3").unwrap().last_error.clone();
        if is_trusted {
            assert_eq!((differ, error), (None, None));
            continue;
        }
        let text = &differ.unwrap().text;
        assert!(text.contains(&format!("w3 has other numbers than {second} has in layers 4–7")), "{text}");
        assert!(error.unwrap().contains(&*second));
        assert!(cluster.nodes["w3"].excluded == Some(Until::Rejoin) && !cluster.is_serving());
        // A report of an epoch that is over says nothing.
        assert!(cluster.check_contents(at(1.4), "w3", Generation(3), &loaded(cluster.epoch().next(), 3.0)));
    }
}

#[test]
fn a_plan_serves_once_a_token_has_gone_through_it() {
    let mut cluster = cluster(&["w1"]);
    join(&mut cluster, at(0.0), "w1", 1);
    let epoch = cluster.epoch();
    cluster.stage_ready(at(0.1), "w1", Generation(1), &ready(epoch));
    cluster.take_commands();
    cluster.pipeline_open(epoch);
    assert_eq!(cluster.take_commands(), [Command::Prove { epoch }]);
    let seen = snapshot(&cluster, at(0.2)).verdict.expect("a verdict");
    assert_eq!((seen.serving, cluster.is_serving()), (false, false));
    assert_eq!(seen.text, "Loading: 8 of 8 layers, waiting for a first token to go through");
    cluster.proven(at(0.3), epoch.next());
    assert!(!cluster.is_serving(), "a token of another epoch");
    cluster.proven(at(0.3), epoch);
    let seen = snapshot(&cluster, at(0.4)).verdict.expect("a verdict");
    assert_eq!((seen.serving, cluster.is_serving()), (true, true));
}

#[test]
fn a_stage_that_cannot_reach_the_next_one_says_so_to_everybody_and_is_given_up_in_time() {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    join(&mut cluster, at(0.0), "w2", 2);
    let epoch = cluster.epoch();
    let second = cluster.active.as_ref().unwrap().stages[1].node.clone();
    let first = cluster.active.as_ref().unwrap().stages[0].node.clone();
    let generation = |name: &str| if name == "w1" { 1 } else { 2 };
    cluster.stage_ready(at(0.1), &second, Generation(generation(&second)), &ready(epoch));
    let loaded = LoadProgress { plan_epoch: epoch, bytes: 5, bytes_total: 5, coordinator_generation: Generation(77) };
    cluster.load_progress(at(0.1), &first, Generation(generation(&first)), &loaded);
    let reason = format!("cannot reach {second} at 10.0.0.2:43197: connection refused");
    let blocked =
        StageBlocked { plan_epoch: epoch, coordinator_generation: Generation(77), peer: second.to_string(), reason };
    for now in [1.0, 2.0] {
        cluster.stage_blocked(at(now), &first, Generation(generation(&first)), &blocked);
        let verdict = snapshot(&cluster, at(now)).verdict.expect("a verdict");
        assert_eq!(verdict.phase(), VerdictPhase::Down);
        assert_eq!(verdict.text, format!("Down: {first} cannot reach {second} at 10.0.0.2:43197: connection refused"));
    }
    assert_eq!(cluster.events.iter().filter(|event| event.code == "stage_blocked").count(), 1, "said once");
    pass(&mut cluster, 2.0, 10.5, &[("w1", 1), ("w2", 2)]);
    assert_eq!(cluster.epoch(), epoch, "it may still be starting");
    pass(&mut cluster, 10.5, 12.0, &[("w1", 1), ("w2", 2)]);
    assert!(cluster.epoch() > epoch);
    assert!(cluster.is_suspect(&second) && !cluster.is_suspect(&first));
}

#[test]
fn a_load_that_does_not_go_on_fails_and_others_take_over() {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    join(&mut cluster, at(0.0), "w2", 2);
    let epoch = cluster.epoch();
    cluster.stage_ready(at(0.1), "w1", Generation(1), &ready(epoch));
    let both = [("w1", 1), ("w2", 2)];
    let bytes = |bytes| LoadProgress {
        plan_epoch: PlanEpoch(1),
        bytes,
        bytes_total: 9,
        coordinator_generation: Generation(77),
    };
    for second in 0..60_u32 {
        let now = f64::from(second);
        cluster.load_progress(at(now), "w2", Generation(2), &bytes(1 + u64::from(second) / 20));
        pass(&mut cluster, now, now + 1.0, &both);
    }
    assert_eq!(cluster.epoch(), epoch, "a slow load is no stalled one");
    cluster.take_commands();
    pass(&mut cluster, 60.0, 72.0, &both);
    assert!(cluster.epoch() > epoch, "no byte since 40 s");
    assert!(cluster.events.iter().any(|event| event.code == "stage_given_up" && event.text.contains("w2")));
    let second_try = cluster.epoch();
    cluster.stage_ready(at(72.0), "w1", Generation(1), &ready(second_try));
    pass(&mut cluster, 72.0, 103.0, &both);
    let sent = assignments(&mut cluster);
    let last = sent.last().unwrap();
    assert_eq!((last.0.as_str(), last.1.layer_start, last.1.layer_end), ("w1", 0, 8));
}

#[test]
fn a_suspect_is_tried_again_when_nobody_can_do_without_it() {
    let mut cluster = cluster(&["w1", "w2"]);
    cluster.join(at(0.0), Hello { memory_bytes: 72 * MIB, ..hello("w1", 1) }).unwrap();
    cluster.join(at(0.0), Hello { memory_bytes: 72 * MIB, ..hello("w2", 2) }).unwrap();
    cluster.joined(at(0.0));
    assert_eq!(assignments(&mut cluster).len(), 2);
    let mut now = 0.0;
    for _ in 0..20 {
        let (epoch, reason) = (cluster.epoch(), failed(&cluster, "read error"));
        cluster.stage_failed(at(now), "w2", Generation(2), &reason);
        pass(&mut cluster, now, now + 6.0, &[("w1", 1), ("w2", 2)]);
        now += 6.0;
        assert!(cluster.epoch() > epoch, "at {now} s");
        assert_eq!(assignments(&mut cluster).len(), 2);
    }
    assert!(cluster.is_suspect("w2"));
    let verdict = snapshot(&cluster, at(now)).verdict.expect("a verdict");
    assert!(!verdict.serving && verdict.text.contains("w2: read error"), "{}", verdict.text);
}

#[test]
fn a_device_that_hangs_is_named_left_out_and_taken_back_when_it_has_finished() {
    let mut cluster = serving();
    let timing = |compute_us| StageTiming { compute_us, ..StageTiming::default() };
    for _ in 0..50 {
        cluster.step_done(PlanEpoch(1), 1, 0.01, &[timing(2000), timing(3000)]);
    }
    let busy = |step_age_seconds| Heartbeat { step_age_seconds, step_rows: 1, ..Heartbeat::default() };
    cluster.heartbeat(at(10.0), "w2", Generation(2), busy(2.9));
    assert!(cluster.is_serving(), "a pause is no hang");
    for odd in [f64::NAN, -1.0, f64::INFINITY] {
        cluster.heartbeat(at(10.2), "w1", Generation(1), busy(odd));
        assert!(cluster.is_serving(), "{odd}");
    }
    cluster.heartbeat(at(10.5), "w2", Generation(2), busy(3.4));
    assert!(!cluster.is_serving());
    let interrupted = cluster.take_commands();
    assert!(
        matches!(&interrupted[..], [Command::Interrupt(RequestError::WorkerLost { worker, .. })] if worker == "w2"),
        "{interrupted:?}"
    );
    let seen = snapshot(&cluster, at(11.0));
    assert!(
        seen.verdict().text.contains("w2 is left out: its device hangs in a step of 1 token"),
        "{}",
        seen.verdict().text
    );
    assert_eq!(seen.nodes.iter().find(|node| node.name == "w2").unwrap().state(), NodeState::Excluded);
    for tenth in 106..200 {
        let now = at(f64::from(tenth) / 10.0);
        cluster.heartbeat(now, "w1", Generation(1), Heartbeat::default());
        cluster.heartbeat(now, "w2", Generation(2), busy(now.as_secs_f64() - 7.0));
        cluster.tick(now);
    }
    assert_eq!(cluster.epoch(), PlanEpoch(1), "nothing is planned with it while it hangs");
    pass(&mut cluster, 20.0, 26.0, &[("w1", 1), ("w2", 2)]);
    assert_eq!(cluster.epoch(), PlanEpoch(2));
    make_ready(&mut cluster, at(26.0), &[("w1", 1), ("w2", 2)]);
    assert!(cluster.is_serving());
}

#[test]
fn a_standby_takes_the_layers_of_a_hung_device_at_once() {
    let mut cluster = serving();
    join(&mut cluster, at(1.0), "spare", 5);
    cluster.take_commands();
    let hung = Heartbeat { step_age_seconds: 61.0, step_rows: 1, ..Heartbeat::default() };
    cluster.heartbeat(at(2.0), "w2", Generation(2), hung);
    let sent: Vec<WorkerName> = assignments(&mut cluster).into_iter().map(|(name, _)| name).collect();
    assert!(sent.iter().any(|name| *name == "spare") && sent.iter().all(|name| *name != "w2"), "{sent:?}");
}

#[test]
fn one_refused_frame_concerns_its_requests_and_several_in_a_row_the_plan() {
    let mut cluster = serving();
    let timing = [StageTiming::default(), StageTiming::default()];
    for _ in 0..5 {
        cluster.frame_failed(at(1.0), "w2", "w2 refused a frame: not finite");
        cluster.frame_failed(at(1.0), "w2", "w2 refused a frame: not finite");
        assert!(cluster.is_serving());
        cluster.step_done(PlanEpoch(1), 1, 0.01, &timing);
    }
    for _ in 0..3 {
        cluster.frame_failed(at(2.0), "w2", "w2 refused a frame: not finite");
    }
    assert!(!cluster.is_serving());
    assert!(matches!(cluster.take_commands().last(),
        Some(Command::Interrupt(RequestError::WorkerLost { worker, .. })) if worker == "w2"));
}

#[test]
fn a_frame_that_does_not_come_back_is_blamed_on_the_stage_that_has_not_done_it() {
    let mut cluster = serving();
    let frames = |frames_total| Heartbeat { frames_total, ..Heartbeat::default() };
    cluster.heartbeat(at(1.0), "w1", Generation(1), frames(7));
    cluster.heartbeat(at(1.0), "w2", Generation(2), frames(6));
    let (first, second) = {
        let stages = &cluster.active.as_ref().unwrap().stages;
        (stages[0].node.clone(), stages[1].node.clone())
    };
    cluster.watch_frame(at(2.0), 1, Duration::from_secs(119));
    assert!(cluster.is_serving());
    cluster.watch_frame(at(3.0), 1, Duration::from_secs(121));
    assert!(!cluster.is_serving());
    let blamed = if first == "w1" { second } else { first };
    assert!(matches!(cluster.take_commands().last(),
        Some(Command::Interrupt(RequestError::WorkerLost { worker, .. })) if blamed == *worker.as_str()));
}

#[test]
fn pauses_grow_until_a_request_has_come_through() {
    let mut cluster = serving();
    let pause_after_failure = |cluster: &mut Cluster, now: f64| {
        let reason = failed(cluster, "flaps");
        cluster.stage_failed(at(now), "w2", Generation(2), &reason);
        let retry = cluster.active.as_ref().unwrap().retry_at.unwrap() - at(now);
        pass(cluster, now, now + 6.0, &[("w1", 1), ("w2", 2)]);
        make_ready(cluster, at(now + 6.0), &[("w1", 1), ("w2", 2)]);
        retry
    };
    let first = pause_after_failure(&mut cluster, 1.0);
    let second = pause_after_failure(&mut cluster, 8.0);
    assert_eq!(second, first * 2, "the token that proves a plan is no request");
    let epoch = cluster.epoch();
    cluster.step_done(epoch, 1, 0.01, &[StageTiming::default(), StageTiming::default()]);
    assert_eq!(pause_after_failure(&mut cluster, 15.0), first);
}

#[test]
fn every_stage_is_told_the_token_of_its_own_link_and_of_the_next() {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    join(&mut cluster, at(0.0), "w2", 2);
    let told = assignments(&mut cluster);
    let key = LinkKey::new([7; 32]);
    let links = told.iter().map(|(_, assignment)| (assignment.link_token.clone(), assignment.next_token.clone()));
    let last = told.len();
    let expected = (0..last).map(|stage| {
        let next = if stage + 1 == last { key.results(PlanEpoch(1)) } else { key.frames(PlanEpoch(1), stage + 1) };
        (key.frames(PlanEpoch(1), stage), next)
    });
    assert!(links.eq(expected));
}

#[test]
fn what_a_worker_says_of_itself_is_bounded() {
    let long = |bytes: usize| "x".repeat(bytes);
    let cases: [(&str, Hello, bool); 9] = [
        ("device", Hello { device: long(bounds::DEVICE_BYTES_MAX), ..hello("a", 1) }, true),
        ("device", Hello { device: long(bounds::DEVICE_BYTES_MAX + 1), ..hello("a", 1) }, false),
        ("fingerprint", Hello { fingerprint: long(bounds::FINGERPRINT + 1), ..hello("a", 1) }, false),
        ("build", Hello { build: long(bounds::BUILD_BYTES_MAX + 1), ..hello("a", 1) }, false),
        ("model_digest", Hello { model_digest: long(bounds::DIGEST_BYTES_MAX + 1), ..hello("a", 1) }, false),
        ("notes", Hello { notes: vec![long(bounds::NOTE_BYTES_MAX); bounds::NOTES_MAX], ..hello("a", 1) }, true),
        ("notes", Hello { notes: vec![String::new(); bounds::NOTES_MAX + 1], ..hello("a", 1) }, false),
        ("notes", Hello { notes: vec![long(bounds::NOTE_BYTES_MAX + 1)], ..hello("a", 1) }, false),
        ("device", Hello { device: long(3 << 20), ..hello("a", 1) }, false),
    ];
    for (name, hello, taken) in cases {
        match (cluster(&[]).join(at(0.0), hello), taken) {
            (Ok(_), true) => {}
            (Err(JoinRefusal::Invalid { field, .. }), false) => assert_eq!(field, name),
            (other, _) => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn workers_that_are_gone_are_forgotten_and_expected_ones_are_not() {
    let mut cluster = cluster(&["w1", "w2"]);
    join(&mut cluster, at(0.0), "w1", 1);
    join(&mut cluster, at(0.0), "w2", 2);
    for number in 0..2000 {
        let (name, now) = (format!("n{number}"), at(f64::from(number) * 1e-3));
        join(&mut cluster, now, &name, 9);
        cluster.leave(now, &name, Generation(9), "it left");
    }
    cluster.leave(at(2.0), "w2", Generation(2), "it left");
    let beat = |cluster: &mut Cluster, now| cluster.heartbeat(now, "w1", Generation(1), Heartbeat::default());
    beat(&mut cluster, at(2.0));
    cluster.tick(at(2.1));
    let names = |cluster: &Cluster| cluster.nodes.keys().cloned().collect::<Vec<_>>();
    let kept = names(&cluster);
    assert!(
        kept.len() <= 18 && kept.iter().any(|name| *name == "n1999") && kept.iter().any(|name| *name == "w2"),
        "{kept:?}"
    );
    let snapshot = cluster.snapshot(at(2.1), SnapshotRequests::default());
    let bytes = serde_json::to_vec(&snapshot).unwrap().len();
    assert!(bytes < 64 << 10, "a snapshot of {bytes} bytes");
    beat(&mut cluster, at(700.0));
    cluster.tick(at(700.1));
    assert_eq!(names(&cluster), ["w1", "w2"]);
}

#[test]
fn there_are_so_many_workers_and_no_more() {
    let mut cluster = cluster(&[]);
    for number in 0..256 {
        join(&mut cluster, at(0.0), &format!("n{number}"), 1);
    }
    assert_eq!(cluster.join(at(0.0), hello("one-more", 1)).unwrap_err(), JoinRefusal::Full(256));
}

#[test]
fn workers_that_do_not_compute_alike_are_told_of() {
    for (fingerprints, told) in [(["cpu/fast", "cpu/fast"], false), (["cpu/fast", "cpu/exact"], true)] {
        let mut cluster = cluster(&["w1", "w2"]);
        for (name, fingerprint) in ["w1", "w2"].into_iter().zip(fingerprints) {
            cluster.join(Duration::ZERO, Hello { fingerprint: fingerprint.into(), ..hello(name, 1) }).unwrap();
            cluster.joined(Duration::ZERO);
        }
        assert_eq!(cluster.epoch(), PlanEpoch(1));
        let events = cluster.snapshot(Duration::ZERO, SnapshotRequests::default()).events;
        let event = events.iter().find(|event| event.code == "mixed_numerics");
        assert_eq!(event.is_some(), told, "{events:?}");
        assert!(event.is_none_or(|event| event.text.contains("w1 as \"cpu/fast\"")), "{events:?}");
    }
}

#[test]
fn a_worker_that_is_refused_leaves_an_event_and_only_one() {
    let mut cluster = cluster(&["w1"]);
    let told = |cluster: &Cluster| {
        let events = cluster.snapshot(Duration::ZERO, SnapshotRequests::default()).events;
        events.into_iter().filter(|event| event.code == "worker_refused").map(|event| event.text).collect::<Vec<_>>()
    };
    for _ in 0..3 {
        assert!(cluster.join(Duration::ZERO, Hello { version_max: 1, version_min: 1, ..hello("w1", 1) }).is_err());
        assert!(cluster.join(Duration::ZERO, Hello { device: "x".repeat(5000), ..hello("w1", 1) }).is_err());
        cluster.stranger_refused(Duration::ZERO, "10.0.0.9", "expected the cluster's secret, found another one");
    }
    let texts = told(&cluster);
    assert_eq!(texts.len(), 3, "{texts:?}");
    assert!(texts[0].contains("protocol version 2, found 1 to 1") && texts[1].contains("device"), "{texts:?}");
    assert!(texts[2].contains("10.0.0.9") && texts[2].contains("found another one"), "{texts:?}");
    for seconds in 1..60 {
        cluster.stranger_refused(Duration::from_secs(seconds), &format!("10.0.1.{seconds}"), "none");
    }
    assert_eq!(told(&cluster).len(), 3 + 5, "one in ten seconds");
}

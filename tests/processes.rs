//! The real processes: coordinator and workers as users run them, on loopback, with the demo model and the goldens.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read},
    process::{Child, Output, Stdio},
    time::{Duration, Instant},
};

use grokpipe_tests::{
    demo_model, gpu_required,
    processes::{Cluster, ClusterOptions, PATIENCE, grokpipe, peak_rss, read_json, token_ids, wait},
    shared,
};
use serde_json::Value;

/// The longest that a client may wait for the news that its worker is gone: ten times the 3 s that are promised.
const ERROR_WITHIN: Duration = Duration::from_secs(30);

struct Question {
    prompt: String,
    prompt_ids: Vec<u32>,
    answer_ids: Vec<u32>,
}

fn quiz() -> Vec<Question> {
    let text = std::fs::read_to_string(demo_model().join("quiz.json")).expect("the quiz lies beside the demo model");
    let items: Vec<Value> = serde_json::from_str(&text).expect("the quiz is JSON");
    let question = |item: &Value| Question {
        prompt: item["prompt"].as_str().expect("a prompt").to_owned(),
        prompt_ids: token_ids(item, "prompt_ids"),
        answer_ids: token_ids(item, "answer_ids"),
    };
    items.iter().map(question).collect()
}

fn ids_text(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn has_gpu() -> bool {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let found = grokpipe(["logits", "--device", "gpu", "--token-ids", "422", "--model"])
        .arg(demo_model())
        .arg("--out")
        .arg(folder.path().join("logits.safetensors"))
        .output()
        .expect("grokpipe runs");
    if found.status.success() {
        return true;
    }
    assert!(!gpu_required(), "GPU_REQUIRED=1, but: {}", String::from_utf8_lossy(&found.stderr));
    println!("skipped: no Vulkan adapter");
    false
}

/// Asks every question through four workers, a few at a time.
fn answers_of_four_workers(device: &str, precision: &str) {
    let options = ClusterOptions { device: device.into(), precision: precision.into(), ..ClusterOptions::demo() };
    let cluster = Cluster::start(options);
    let questions = quiz();
    for some in questions.chunks(8) {
        let running: Vec<Child> = some
            .iter()
            .map(|question| {
                let count = question.answer_ids.len().to_string();
                cluster.generate([&question.prompt, "--max-tokens", &count, "--ignore-eos"])
            })
            .collect();
        for (question, child) in some.iter().zip(running) {
            let generated = read_json(child.wait_with_output().expect("generate ends"));
            assert_eq!(token_ids(&generated, "prompt_token_ids"), question.prompt_ids, "{:?}", question.prompt);
            assert_eq!(token_ids(&generated, "output_token_ids"), question.answer_ids, "{:?}", question.prompt);
        }
    }
}

#[test]
fn the_quiz_through_four_workers_is_answered_token_for_token_on_the_cpu() {
    answers_of_four_workers("cpu", "exact");
}

#[test]
fn the_quiz_through_four_workers_is_answered_token_for_token_in_fast() {
    answers_of_four_workers("cpu", "fast");
}

#[test]
fn the_quiz_through_four_workers_is_answered_token_for_token_on_a_gpu() {
    if has_gpu() {
        answers_of_four_workers("gpu", "exact");
    }
}

/// Greedy and drawn continuations of a short and a long prompt, alone or eight at a time.
fn continuations(options: ClusterOptions, together: bool) -> Vec<Vec<u32>> {
    let vocab = if options.model == demo_model() { 131_072 } else { 1024 };
    let cluster = Cluster::start(options);
    let long: Vec<u32> = (0..45).map(|i| 5 + (i * 7919) % (vocab - 5)).collect();
    let (short, long) = (ids_text(&[422, 307, 359]), ids_text(&long));
    let greedy: &[&str] = &["--max-tokens", "24", "--ignore-eos"];
    let drawn: &[&str] =
        &["--max-tokens", "24", "--ignore-eos", "--temperature", "0.9", "--top-p", "0.95", "--seed", "7"];
    let requests: Vec<Vec<&str>> = [(&short, greedy), (&long, greedy), (&short, drawn), (&long, drawn)]
        .into_iter()
        .map(|(prompt, options)| [&["--token-ids", prompt.as_str()], options].concat())
        .collect();
    let copies = if together { 2 } else { 1 };
    let ask = |request: &Vec<&str>| cluster.generate(request);
    let finished: Vec<Output> = if together {
        let running: Vec<Child> = requests.iter().cycle().take(copies * requests.len()).map(ask).collect();
        running.into_iter().map(|child| child.wait_with_output().expect("generate ends")).collect()
    } else {
        requests.iter().map(|request| ask(request).wait_with_output().expect("generate ends")).collect()
    };
    let tokens: Vec<Vec<u32>> =
        finished.into_iter().map(|output| token_ids(&read_json(output), "output_token_ids")).collect();
    for copy in tokens.chunks(requests.len()) {
        assert_eq!(copy, &tokens[..requests.len()], "two equal requests differ");
    }
    tokens[..requests.len()].to_vec()
}

/// The same tokens for every number of workers and threads, chunk size, alone and together.
fn split_equals_whole(model: std::path::PathBuf, device: &str, precision: &str) {
    let options = |workers, threads, prefill_chunk_tokens| ClusterOptions {
        model: model.clone(),
        workers,
        threads,
        prefill_chunk_tokens,
        device: device.into(),
        precision: precision.into(),
        ..ClusterOptions::demo()
    };
    let whole = continuations(options(1, 1, 64), false);
    assert!(whole.iter().all(|tokens| tokens.len() == 24));
    for (workers, threads, chunk, together) in [(2, 2, 7, false), (4, 1, 64, true), (7, 2, 7, true), (1, 2, 7, true)] {
        let split = continuations(options(workers, threads, chunk), together);
        assert_eq!(
            split, whole,
            "{device}: {workers} workers, {threads} threads, chunks of {chunk}, together: {together}"
        );
    }
}

#[test]
fn any_split_of_the_demo_gives_the_same_tokens_on_the_cpu() {
    split_equals_whole(demo_model(), "cpu", "exact");
}

#[test]
fn any_split_of_the_demo_gives_the_same_tokens_in_fast() {
    split_equals_whole(demo_model(), "cpu", "fast");
}

#[test]
fn any_split_of_a_gguf_file_gives_the_same_tokens_in_fast() {
    if let Some(model) = shared("golden/llamacpp/tiny64-Q4_0.gguf") {
        split_equals_whole(model, "cpu", "fast");
    }
}

#[test]
fn any_split_of_the_demo_gives_the_same_tokens_on_a_gpu() {
    if has_gpu() {
        split_equals_whole(demo_model(), "gpu", "exact");
    }
}

#[test]
fn any_split_of_b64_gives_the_same_tokens_on_the_cpu() {
    if let Some(model) = shared("golden/b64") {
        split_equals_whole(model, "cpu", "exact");
    }
}

#[test]
fn any_split_of_b64_gives_the_same_tokens_on_a_gpu() {
    if let Some(model) = shared("golden/b64")
        && has_gpu()
    {
        split_equals_whole(model, "gpu", "exact");
    }
}

#[test]
fn a_log_of_frames_proves_that_every_stage_ran_its_layers() {
    let options = ClusterOptions { log: "info,grokpipe_worker::stage=debug".into(), ..ClusterOptions::demo() };
    let cluster = Cluster::start(options);
    let generated = cluster.generated(["The capital of France is", "--max-tokens", "6", "--ignore-eos"]);
    // One frame for the prompt, one for each further token.
    let stages = generated["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), 4);
    let mut covered = 0;
    for stage in stages {
        assert_eq!(stage["frames"], 6, "{stage}");
        assert_eq!(stage["layers"][0], covered, "{stage}");
        covered = stage["layers"][1].as_u64().expect("a layer");
    }
    assert_eq!(covered, 64);
    let mut micro_batches: Vec<BTreeSet<u64>> = Vec::new();
    for index in 0..4 {
        let log = cluster.worker_log(index);
        let frames: Vec<Value> = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|line| line["message"] == "frame computed")
            .collect();
        let name = format!("w{}", index + 1);
        let stage = stages.iter().find(|stage| stage["worker"] == name.as_str()).expect("every worker is a stage");
        for frame in &frames {
            assert_eq!((&frame["layer_start"], &frame["layer_end"]), (&stage["layers"][0], &stage["layers"][1]));
        }
        micro_batches.push(frames.iter().map(|frame| frame["micro_batch"].as_u64().expect("a number")).collect());
    }
    // Those of the request, and the one that proved the plan.
    assert_eq!(micro_batches[0].len(), 7);
    assert!(micro_batches.iter().all(|seen| *seen == micro_batches[0]), "{micro_batches:?}");
}

/// A copy of the demo model in which one bit of one tensor is another.
fn copy_with_another_bit(tensor: &str) -> tempfile::TempDir {
    let (demo, copy) = (demo_model(), tempfile::tempdir().expect("a temporary folder"));
    std::fs::create_dir(copy.path().join("ckpt-0")).expect("a folder");
    std::fs::copy(demo.join("config.json"), copy.path().join("config.json")).expect("a configuration");
    for entry in std::fs::read_dir(demo.join("ckpt-0")).expect("tensors") {
        let (path, target) =
            entry.map(|entry| (entry.path(), copy.path().join("ckpt-0").join(entry.file_name()))).expect("a tensor");
        std::fs::copy(path, target).expect("a copy");
    }
    let path = copy.path().join("ckpt-0").join(tensor);
    let mut bytes = std::fs::read(&path).expect("a tensor");
    bytes[9000] ^= 1;
    std::fs::write(path, bytes).expect("a tensor");
    copy
}

#[test]
fn a_spare_whose_copy_of_a_layer_differs_by_a_bit_is_named_and_computes_nothing() {
    // The gate of layer 9, the last of the files.
    let copy = copy_with_another_bit("tensor00758_000");
    let mut cluster = Cluster::start(ClusterOptions { workers: 1, ..ClusterOptions::demo() });
    cluster.start_worker_of(1, copy.path());
    cluster.wait_until("joined", |snapshot| snapshot.nodes.iter().any(|node| node.name == "w2"));
    cluster.kill_worker(0);
    let named = |snapshot: &grokpipe_proto::snapshot::ClusterSnapshot| {
        let is_it = |event: &grokpipe_proto::snapshot::SnapshotEvent| {
            event.code == "contents_differ" && event.text.contains("w2 has other numbers than w1 has in layer 9:")
        };
        snapshot.events.iter().any(is_it)
    };
    cluster.wait_until("named", named);
    assert!(!cluster.snapshot().verdict().serving);
    cluster.start_worker(0);
    cluster.wait_until("serving", |snapshot| snapshot.verdict().serving);
    let question = &quiz()[0];
    let count = question.answer_ids.len().to_string();
    let generated = cluster.generated([&question.prompt, "--max-tokens", &count, "--ignore-eos"]);
    assert_eq!(token_ids(&generated, "output_token_ids"), question.answer_ids);
}

#[test]
fn a_model_with_holes_is_refused_and_verified_as_damaged() {
    let copy = copy_with_another_bit("tensor00002_000");
    let path = copy.path().join("ckpt-0/tensor00002_000");
    let mut bytes = std::fs::read(&path).expect("a tensor");
    bytes[8192..40_960].fill(0);
    std::fs::write(&path, bytes).expect("a tensor");
    let logits = grokpipe(["logits", "--device", "cpu", "--token-ids", "422", "--model"])
        .arg(copy.path())
        .arg("--out")
        .arg(copy.path().join("logits.safetensors"))
        .output()
        .expect("grokpipe runs");
    let verify = |flags: &[&str]| grokpipe(["verify"]).args(flags).arg(copy.path()).output().expect("grokpipe runs");
    let written = verify(&["--write"]);
    let said = String::from_utf8_lossy(&written.stdout).into_owned();
    assert_eq!((logits.status.code(), written.status.code()), (Some(1), Some(1)), "{said}");
    assert!(!copy.path().join("grokpipe.sha256").exists() && said.contains("no manifest was written"), "{said}");
    for said in [String::from_utf8_lossy(&logits.stderr).into_owned(), said] {
        assert!(said.contains("tensor00002_000") && said.contains("32768 zeros"), "{said}");
    }
    // Once the files are said to be as they should be, the zeros are the model's own.
    let sums =
        std::process::Command::new("sha256sum").arg("tensor00002_000").current_dir(copy.path().join("ckpt-0")).output();
    let Ok(sums) = sums else { return };
    std::fs::write(copy.path().join("ckpt-0/all.sha256"), sums.stdout).expect("a checksum");
    assert_eq!(verify(&["--write"]).status.code(), Some(0));
    assert_eq!(verify(&[]).status.code(), Some(0));
}

#[test]
fn a_worker_killed_in_mid_generation_is_a_typed_error_and_its_return_serves_again() {
    let mut cluster = Cluster::start(ClusterOptions::demo());
    let expected = cluster.generated(["The capital of France is", "--max-tokens", "8"]);
    // Streams text, so that the test knows when generation is under way.
    let mut streaming =
        grokpipe(["generate", "--server", &cluster.grpc, "--ignore-eos", "--max-tokens", "4000", "Count: 1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("generate starts");
    let mut text = BufReader::new(streaming.stdout.take().expect("stdout is piped"));
    text.read_exact(&mut [0; 8]).expect("text comes");
    let lost =
        cluster.snapshot().nodes.iter().find(|node| node.name == "w3").and_then(|node| node.layers).expect("layers");
    let killed = Instant::now();
    cluster.kill_worker(2);
    let mut complaint = String::new();
    let mut stderr = streaming.stderr.take().expect("stderr is piped");
    let drained = std::thread::spawn(move || {
        let mut rest = String::new();
        while text.read_line(&mut rest).is_ok_and(|read| read > 0) {}
    });
    stderr.read_to_string(&mut complaint).expect("a complaint");
    let status = streaming.wait().expect("generate ends");
    let took = killed.elapsed();
    drained.join().expect("stdout is read");
    println!("typed error after {took:?}: {complaint}");
    assert!(took < ERROR_WITHIN, "{took:?}");
    assert!(!status.success());
    let named = format!("worker w3 with layers {}–{} was lost", lost.start, lost.end - 1);
    assert!(complaint.contains(&named), "{complaint}");

    let snapshot = cluster.snapshot();
    assert!(!snapshot.verdict().serving && snapshot.verdict().text.contains("w3"), "{}", snapshot.verdict().text);
    assert_eq!(snapshot.verdict().missing_layers, [lost]);
    let refused = cluster.generate(["x"]).wait_with_output().expect("generate ends");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("w3"), "a request meanwhile is told what is missing");

    cluster.start_worker(2);
    let back = cluster.wait_until("serving again", |snapshot| snapshot.verdict().serving);
    println!("serving again {back:?} after the worker's return");
    let again = cluster.generated(["The capital of France is", "--max-tokens", "8"]);
    assert_eq!(token_ids(&again, "output_token_ids"), token_ids(&expected, "output_token_ids"));
    assert_eq!(cluster.snapshot().nodes.iter().map(|node| node.joins).sum::<u32>(), 5, "nobody else joined again");
}

#[test]
fn a_client_that_leaves_frees_its_place_on_every_stage() {
    let cluster = Cluster::start(ClusterOptions::demo());
    let mut leaving = cluster.generate(["Count: 1", "--ignore-eos", "--max-tokens", "4000"]);
    cluster.wait_until("running", |snapshot| snapshot.requests().running == 1);
    leaving.kill().expect("a process of ours");
    leaving.wait().expect("a process of ours");
    cluster.wait_until("idle", |snapshot| snapshot.requests().running == 0 && snapshot.requests().waiting == 0);
    // The pool of 4096 tokens has room for this only if the other's blocks are free again.
    let generated = cluster.generated(["Count: 1", "--ignore-eos", "--max-tokens", "5"]);
    assert_eq!(token_ids(&generated, "output_token_ids").len(), 5);
}

#[test]
fn processes_take_little_more_memory_than_weights_and_kv() {
    const ROOM: u64 = 300 << 20;
    let cluster = Cluster::start(ClusterOptions::demo());
    cluster.generated(["The capital of France is", "--max-tokens", "32", "--ignore-eos"]);
    // Heartbeats bring the figures.
    cluster.wait_until("told what weights and KV take", |snapshot| {
        snapshot
            .nodes
            .iter()
            .all(|node| node.stats().memory().weights_bytes.is_some() && node.stats().memory().kv_bytes.is_some())
    });
    for (index, node) in cluster.snapshot().nodes.iter().enumerate() {
        let pid = node.pid.expect("a process");
        let held = node.stats().memory().weights_bytes.expect("weights") + node.stats().memory().kv_bytes.expect("KV");
        let peak = peak_rss(pid);
        println!("worker {}: peak {} MB, weights and KV {} MB", index + 1, peak >> 20, held >> 20);
        assert!(peak <= held + ROOM, "worker {}: {peak} bytes for {held}", node.name);
    }
    let coordinator = peak_rss(cluster.coordinator_pid());
    println!("coordinator: peak {} MB", coordinator >> 20);
    assert!(coordinator <= ROOM, "{coordinator}");
}

#[test]
fn up_once_prints_the_continuation_and_leaves_nothing_behind() {
    let output = grokpipe(["up", "--once", "The capital of France is", "--device", "cpu"])
        .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .output()
        .expect("grokpipe runs");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaints}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Paris"), "{text:?}\n{complaints}");
}

#[test]
fn up_without_room_for_the_model_says_how_much_is_missing_and_ends_with_the_code_for_memory() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("cluster.toml");
    let text = format!("[model]\npath = {:?}\n[[worker]]\nname = \"w1\"\nmemory = \"1 MiB\"\n", demo_model());
    std::fs::write(&config, text).expect("a file");
    let output = grokpipe(["up", "--once", "The capital of France is", "--device", "cpu"])
        .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
        .arg("--config")
        .arg(&config)
        .stdin(Stdio::null())
        .output()
        .expect("grokpipe runs");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{complaints}");
    assert!(complaints.contains("MiB are missing") && complaints.contains("one worker has 1.0 MiB"), "{complaints}");
}

/// Children of a process of ours, the oldest first.
fn children(pid: u32) -> Vec<u32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn signal(name: &str, pid: u32) {
    let sent = std::process::Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
    assert!(sent.expect("kill runs").success(), "{name} to {pid}");
}

#[test]
fn a_coordinator_that_is_silent_for_eight_seconds_while_a_cluster_starts_does_not_end_the_cluster() {
    let mut up = grokpipe(["up", "--once", "The capital of France is", "--device", "cpu"])
        .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("grokpipe runs");
    let began = Instant::now();
    // Workers are started once the coordinator listens.
    let coordinator = loop {
        match children(up.id())[..] {
            [coordinator, _worker, ..] => break coordinator,
            _ if began.elapsed() > PATIENCE || up.try_wait().expect("a child").is_some() => {
                let output = up.wait_with_output().expect("an end");
                panic!("no workers: {}", String::from_utf8_lossy(&output.stderr));
            }
            _ => wait(Duration::from_millis(20)),
        }
    };
    signal("STOP", coordinator);
    wait(Duration::from_secs(8));
    signal("CONT", coordinator);
    let output = up.wait_with_output().expect("an end");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {complaints}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("Paris"), "{complaints}");
}

#[test]
fn a_closed_pipe_ends_a_command_quietly() {
    let demo = demo_model();
    let demo = demo.to_str().expect("a text");
    let commands: [&[&str]; 7] = [
        &["--help"],
        &["up", "--help"],
        &["inspect", demo],
        &["inspect", demo, "--json"],
        &["plan", "--model", demo],
        &["plan", "--model", demo, "--json"],
        &["devices"],
    ];
    for command in commands {
        let mut child = grokpipe(command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("grokpipe runs");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("an end");
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert!(complaints.is_empty(), "{command:?}: {}: {complaints}", output.status);
        assert!(matches!(output.status.code(), Some(0 | 141)), "{command:?}: {}", output.status);
    }
}

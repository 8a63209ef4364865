//! `grokpipe bench` as users run it, most of all `pipeline`: workers as processes, one against several. Facts only; no time is asserted.

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use grokpipe_tests::{
    demo_model,
    processes::{PATIENCE, grokpipe, read_json, wait},
};
use serde_json::{Value, json};

/// Benchmarks one after the other: workers measure their device until it settles, which takes long while others measure too.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bench(arguments: &str, model: Option<&Path>) -> Value {
    let _alone = alone();
    let mut command = grokpipe(["bench", "pipeline", "--device", "cpu", "--json"]);
    command.args(arguments.split_whitespace());
    if let Some(model) = model {
        command.arg("--model").arg(model);
    }
    read_json(command.output().expect("grokpipe runs"))
}

/// What must hold of every report.
fn check(report: &Value, workers: u64, tests: &[(&str, u64, u64)]) {
    assert_eq!(report["hidden_states_equal"], true, "{report}");
    assert!(report["hidden_states_compared"].as_u64().expect("a count") > 0);
    assert!(report["machine"]["read_gigabytes_per_second"].as_f64().expect("a rate") > 0.0);
    assert!(report["hop_cost_percent"].is_f64() && report["hop_cost_milliseconds"].is_f64(), "{report}");
    let results = report["results"].as_array().expect("results");
    let expected: Vec<_> = tests
        .iter()
        .flat_map(|&(test, batch, prompt)| [1, workers].map(|count| (test, batch, prompt, count)))
        .collect();
    let found: Vec<_> = results
        .iter()
        .map(|result| {
            let number = |key: &str| result[key].as_u64().expect("a number");
            (result["test"].as_str().expect("a name"), number("batch"), number("prompt"), number("workers"))
        })
        .collect();
    assert_eq!(found, expected);
    for result in results {
        let rate = |key: &str| result[key].as_f64().expect("a rate");
        let (least, median, most) =
            (rate("tokens_per_second_least"), rate("tokens_per_second"), rate("tokens_per_second_most"));
        assert!(0.0 < least && least <= median && median <= most, "{result}");
        // The stages of the frames, in order, cover the layers.
        let stages = result["stages"].as_array().expect("stages");
        assert_eq!(stages.len() as u64, result["workers"].as_u64().expect("a number"));
        let mut next = report["layers"][0].clone();
        for stage in stages {
            assert_eq!(stage["layers"][0], next, "{result}");
            assert!(stage["compute_milliseconds"].as_f64().expect("a time") > 0.0, "{result}");
            next = stage["layers"][1].clone();
        }
        assert_eq!(next, report["layers"][1], "{result}");
    }
}

#[test]
fn two_workers_hand_on_the_same_bytes_as_one_with_weights_from_a_seed() {
    for precision in ["exact", "fast"] {
        let flags =
            "--synthetic tiny --type q4_0 --layers 0..4 --workers 2 --gen 6 --batch 1,3 --prompt 600 --repeat 2";
        // A CPU does not compute prefill as it is asked to here, and says so.
        let report = bench(&format!("{flags} --precision {precision} --prefill fast"), None);
        check(&report, 2, &[("decode", 1, 0), ("decode", 3, 0), ("prefill", 1, 600)]);
        assert_eq!((&report["precision"], &report["prefill"]), (&json!(precision), &json!("invariant")));
    }
}

#[test]
fn three_workers_hand_on_the_same_bytes_as_one_in_the_middle_of_a_model() {
    let report = bench("--layers 3..10 --workers 3 --gen 20 --batch 2 --repeat 1 --threads 2", Some(&demo_model()));
    check(&report, 3, &[("decode", 2, 0)]);
    assert_eq!(report["layers"], json!([3, 10]));
    assert_eq!(report["machine"]["threads"], 2);
}

#[test]
fn a_worker_that_gives_up_ends_the_benchmark_with_its_reason() {
    let run = grokpipe(["bench", "pipeline", "--synthetic", "tiny", "--device", "gpu:no such adapter"]);
    let output = { run }.output().expect("grokpipe runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("worker alone ended") && said.contains("no such adapter"), "{said}");
}

/// Bytes in all.
fn memory_of_this_machine() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("Linux");
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("Linux says how much there is");
    total.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
fn a_worker_without_room_ends_the_benchmark_with_the_code_for_memory() {
    // Half of this machine's memory is offered; 63 layers of Grok-1 in bfloat16 need 619 GB.
    if memory_of_this_machine() > 1 << 40 {
        return println!("skipped: this machine may have room for it");
    }
    let _alone = alone();
    let run = grokpipe(["bench", "pipeline", "--type", "bf16", "--layers", "0..63", "--device", "cpu"]);
    let output = { run }.output().expect("grokpipe runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    // All three workers are short of it, and any of them may be the first to say so.
    let named = |worker| said.contains(&format!("worker {worker}: a stage of layers "));
    assert!(["alone", "w1", "w2"].into_iter().any(named) && said.contains(" needs "), "{said}");
}

/// Processes of this machine with these words on their command lines.
fn processes(words: &[&str]) -> usize {
    let entries = fs::read_dir("/proc").expect("Linux").flatten();
    let lines = entries.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| words.iter().all(|word| line.split('\0').any(|found| found == *word))).count()
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not {what} within {PATIENCE:?}");
        wait(Duration::from_millis(20));
    }
}

#[test]
fn no_worker_outlives_the_benchmark() {
    // `stop` ends it in its own way; the seed tells its workers from others on this machine, those of another run of this test too.
    let check = |number: u32, stop: &dyn Fn(&mut Child)| {
        let seed = &(u64::from(std::process::id()) * 10 + u64::from(number)).to_string();
        let _alone = alone();
        let mut running = grokpipe(["bench", "pipeline", "--synthetic", "tiny", "--device", "cpu", "--gen", "4096"])
            .args(["--repeat", "100", "--seed", seed])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("grokpipe runs");
        wait_until("three workers", || processes(&["worker", "--seed", seed]) == 3);
        stop(&mut running);
        let code = running.wait().expect("an end").code();
        wait_until("without workers", || processes(&["worker", "--seed", seed]) == 0);
        code
    };
    let interrupt = |running: &mut Child| {
        let sent = std::process::Command::new("kill").args(["-INT", &running.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    };
    assert_eq!(check(1, &interrupt), Some(1), "Ctrl-C");
    assert_eq!(check(2, &|running| running.kill().expect("a process of ours")), None, "a power failure");
}

#[cfg(target_os = "linux")]
#[test]
fn results_that_cannot_be_written_are_an_error() {
    for arguments in [
        "stage --model model/demo --layers 0..1 --gen 1",
        "stage --model model/demo --layers 0..1 --gen 1 --json",
        "kernels --type q8_0 --inputs 256 --outputs 1 --rows 1",
    ] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a disk that is always full");
        let mut command = grokpipe(["bench"]);
        command.args(arguments.split_whitespace()).args(["--device", "cpu", "--threads", "1", "--repeat", "1"]);
        let output = command.stdout(full).output().expect("grokpipe runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {said}");
        assert!(said.contains("the output could not be written"), "{arguments}: {said}");
    }
}

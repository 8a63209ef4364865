//! Several GPUs in one machine, without any: two equal software adapters, by a second driver file that names a copy of the first one's
//! library. How they are listed, asked for, dealt to the workers of one command, and kept from being two workers' at once.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use grokpipe_tests::{demo_model, gpu_required, processes::grokpipe};
use serde_json::Value;
use tempfile::TempDir;

/// Where distributions put the descriptions of Vulkan drivers.
const DRIVERS: &str = "/usr/share/vulkan/icd.d";

/// A machine with two equal adapters, and a folder for its locks.
struct Machine {
    folder: TempDir,
}

impl Machine {
    /// `None` where there is no software adapter.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let machine = Self { folder };
        if let Err(reason) = machine.install() {
            assert!(!gpu_required(), "GPU_REQUIRED=1, but {reason}");
            println!("skipped: {reason}");
            return None;
        }
        Some(machine)
    }

    fn install(&self) -> Result<(), String> {
        let entries = fs::read_dir(DRIVERS).map_err(|error| format!("{DRIVERS}: {error}"))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let is_lavapipe =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lvp"));
        let first = paths.into_iter().find(is_lavapipe).ok_or("there is no software Vulkan driver")?;
        let text = fs::read_to_string(&first).map_err(|error| error.to_string())?;
        let mut driver: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let named = driver["ICD"]["library_path"].as_str().unwrap_or_default().to_owned();
        let places = ["", "/usr/lib/x86_64-linux-gnu/", "/usr/lib/aarch64-linux-gnu/", "/usr/lib64/", "/usr/lib/"];
        let library = places
            .iter()
            .map(|place| PathBuf::from(format!("{place}{named}")))
            .find(|path| path.is_absolute() && path.exists());
        let copy = self.path("second_adapter.so");
        fs::copy(library.ok_or(format!("{named} is not found"))?, &copy).map_err(|error| error.to_string())?;
        driver["ICD"]["library_path"] = copy.display().to_string().into();
        fs::write(self.path("second.json"), driver.to_string()).map_err(|error| error.to_string())?;
        fs::copy(first, self.path("first.json")).map_err(|error| error.to_string())?;
        fs::create_dir(self.path("run")).map_err(|error| error.to_string())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// This program on that machine.
    fn grokpipe(&self, arguments: &[&str]) -> Command {
        let files = format!("{}:{}", self.path("first.json").display(), self.path("second.json").display());
        let mut command = grokpipe(arguments);
        command.env("VK_DRIVER_FILES", &files).env("VK_ICD_FILENAMES", &files).env("XDG_RUNTIME_DIR", self.path("run"));
        command.env("GROKPIPE_LOG", "info").stdin(Stdio::null());
        command
    }

    /// A worker of a coordinator that is not there: it opens its device first.
    fn worker(&self, name: &str, arguments: &[&str]) -> Worker {
        let fixed = ["worker", "--coordinator", "127.0.0.1:1", "--synthetic", "tiny", "--threads", "1", "--name", name];
        let mut command = self.grokpipe(&[&fixed, arguments].concat());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("a worker starts");
        let lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        // It says this, or ends.
        let mut said = String::new();
        for line in lines {
            said += &(line.expect("text") + "\n");
            if said.contains("worker starts") {
                return Worker { child, outcome: Ok(said) };
            }
        }
        let code = child.wait().expect("it has ended").code();
        Worker { child, outcome: Err((code, said)) }
    }
}

/// A worker that has started, or its exit code and what it said. It ends with the value.
struct Worker {
    child: Child,
    outcome: Result<String, (Option<i32>, String)>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn equal_adapters_are_listed_with_their_indices() {
    let Some(machine) = Machine::new() else { return };
    let output = machine.grokpipe(&["devices", "--json"]).output().expect("it runs");
    let listed: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(listed["cpu"]["free_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{listed}");
    let gpus = listed["gpus"].as_array().expect("a list");
    assert_eq!(gpus.len(), 2, "{listed}");
    assert_eq!(gpus[0]["name"], gpus[1]["name"], "they are equal");
    for (index, gpu) in gpus.iter().enumerate() {
        assert_eq!((&gpu["index"], &gpu["kind"]), (&index.into(), &"software".into()), "{listed}");
        assert_eq!(gpu["device"], format!("gpu:{index}"));
        assert!(gpu["free_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{listed}");
    }
    assert_ne!(gpus[0]["key"], gpus[1]["key"]);
    let text = machine.grokpipe(&["devices"]).output().expect("it runs").stdout;
    let text = String::from_utf8(text).expect("text");
    assert!(
        ["cpu ", "gpu:0 ", "gpu:1 "].iter().all(|device| text.lines().any(|line| line.starts_with(device))),
        "{text}"
    );
}

#[test]
fn the_error_for_an_adapter_that_is_not_there_lists_those_there_are() {
    let Some(machine) = Machine::new() else { return };
    let worker = machine.worker("w1", &["--device", "gpu:2"]);
    let (_, said) = worker.outcome.as_ref().expect_err("there is no third one");
    assert!(said.contains("gpu:2") && said.contains("0: llvmpipe") && said.contains("1: llvmpipe"), "{said}");
}

#[test]
fn an_adapter_is_one_workers_unless_each_names_its_memory() {
    let Some(machine) = Machine::new() else { return };
    let first = machine.worker("w1", &["--device", "gpu:0"]);
    first.outcome.as_ref().expect("nobody else is there");
    for device in [&["--device", "gpu:0"][..], &["--device", "gpu:0", "--memory", "64MiB"]] {
        let second = machine.worker("w2", device);
        let (code, said) = second.outcome.as_ref().expect_err("it is the first one's");
        assert_eq!(*code, Some(2), "{said}");
        assert!(said.contains("worker w1 (process ") && said.contains("--memory"), "{said}");
    }
    // The other one is free; what is not named exactly finds it, and a third finds none.
    let second = machine.worker("w2", &["--device", "gpu:llvmpipe"]);
    second.outcome.as_ref().expect("the second adapter is free");
    machine.worker("w3", &["--device", "gpu"]).outcome.as_ref().expect_err("both are taken");
    drop((first, second));
    let sharing: Vec<Worker> =
        ["w1", "w2"].iter().map(|name| machine.worker(name, &["--device", "gpu:1", "--memory", "64MiB"])).collect();
    for worker in &sharing {
        worker.outcome.as_ref().expect("each names its memory");
    }
}

/// Runs `up --once` with so many workers that leave it open which adapter is theirs; whether it ended well, and what it said.
fn up(machine: &Machine, model: &Path, workers: &str) -> (bool, String) {
    let mut command =
        machine.grokpipe(&["up", "--no-config", "--workers", workers, "--device", "gpu", "--threads", "1"]);
    command.args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--once", "The capital of France is", "--model"]);
    let output = command.arg(model).output().expect("it runs");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    (output.status.success(), said)
}

#[test]
fn one_command_deals_the_adapters_of_a_machine_to_its_workers() {
    let Some(machine) = Machine::new() else { return };
    let (ended_well, said) = up(&machine, &demo_model(), "2");
    assert!(ended_well && said.contains("Paris"), "{said}");
    assert!(said.contains("gpu:0") && said.contains("gpu:1"), "{said}");
    let (ended_well, said) = up(&machine, &demo_model(), "3");
    assert!(!ended_well && said.contains("is another worker's"), "{said}");
}

//! What configurations are accepted and refused, layer by layer.

use std::{fs, time::Duration};

use grokpipe_kernels::Prefill;
use tempfile::TempDir;

use super::*;
use crate::error::Code;

/// A folder with a `cluster.toml` of this text.
fn written(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cluster.toml");
    fs::write(&file, text).unwrap();
    (folder, file)
}

fn load(text: &str, environment: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Config, CliError> {
    let (_folder, file) = written(text);
    layers(Some(file), environment, flags).load()
}

fn layers(file: Option<PathBuf>, environment: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Layers {
    Layers {
        no_file: file.is_none(),
        file,
        environment: environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        flags: flags.iter().map(|(k, v)| (*k, (*v).to_owned())).collect(),
        ..Layers::default()
    }
}

#[test]
fn without_anything_the_demo_is_served_on_loopback() {
    let config = layers(None, &[], &[]).load().unwrap();
    assert_eq!(config.model, ModelSection::default());
    assert_eq!(config.coordinator, CoordinatorSection::default());
    assert_eq!(config.limits, LimitsSection::default());
    assert!(config.workers.is_empty() && config.file.is_none() && !config.secret.is_set());
}

#[test]
fn bad_values_name_key_value_place_and_what_is_allowed() {
    // Text of the file; what the message must contain.
    let cases: &[(&str, &[&str])] = &[
        ("[modle]\npath = \"x\"", &["unknown section modle", "cluster.toml:1", "did you mean model?"]),
        (
            "[model]\npaht = \"x\"",
            &["unknown key model.paht", "cluster.toml:2", "did you mean model.path?", "tokenizer"],
        ),
        ("[kv]\ntoken = 1", &["unknown key kv.token", "did you mean kv.tokens?"]),
        ("[limits]\nzzz = 1", &["unknown key limits.zzz", "remove it", "max_running"]),
        ("[[worker]]\nnam = \"w1\"", &["unknown key worker[0].nam", "cluster.toml:2", "did you mean worker[0].name?"]),
        ("[[worker]]\nname = \"a\"\n[[worker]]\nname = \"b\"\nthread = 2", &["worker[1].thread", "cluster.toml:5"]),
        ("model = 3", &["model is 3", "a section, not a value"]),
        ("worker = \"w1\"", &["worker is \"w1\"", "[[worker]]"]),
        ("[worker]\nname = \"w1\"", &["worker is a table", "[[worker]]"]),
        ("[model]\npath = 5", &["model.path is 5", "expected a path", "cluster.toml:2"]),
        ("[model]\npath = \"\"", &["model.path is \"\"", "expected a path"]),
        ("[kv]\n# many\ntokens = \"many\"", &["kv.tokens is \"many\"", "cluster.toml:3", "from 16 to"]),
        ("[kv]\ntokens = -5", &["kv.tokens is -5", "from 16 to"]),
        ("[kv]\ntokens = 15", &["kv.tokens is 15"]),
        ("[kv]\ntokens = 8192.5", &["kv.tokens is 8192.5"]),
        ("[kv]\ntokens = 99999999999", &["kv.tokens is 99999999999"]),
        ("[kv]\ntokens = [1]", &["kv.tokens is a list"]),
        ("[kv]\ndtype = \"f16\"", &["kv.dtype is \"f16\"", "\"f32\"", "not built yet"]),
        ("[coordinator]\ngrpc = \"7070\"", &["coordinator.grpc is \"7070\"", "an IP address and a port"]),
        ("[coordinator]\nhttp = \"127.0.0.1:99999\"", &["coordinator.http is \"127.0.0.1:99999\""]),
        ("[coordinator]\nhttp = 8080", &["coordinator.http is 8080", "127.0.0.1:7070"]),
        ("[coordinator]\nadvertise = \"http://node:1\"", &["coordinator.advertise", "a host and a port"]),
        ("[coordinator]\nhttp_names = [\"node0:8080\"]", &["coordinator.http_names", "node0:8080", "without scheme"]),
        ("[coordinator]\nhttp_names = \"node0\"", &["coordinator.http_names", "a list"]),
        ("[coordinator]\nreplan_after = \"soon\"", &["coordinator.replan_after is \"soon\"", "from \"1s\""]),
        ("[coordinator]\nreplan_after = 30", &["coordinator.replan_after is 30"]),
        ("[limits]\nrequest_timeout = \"25h\"", &["limits.request_timeout is \"25h\"", "\"24h\""]),
        ("[limits]\nmax_prompt_bytes = \"1 TiB\"", &["limits.max_prompt_bytes is \"1 TiB\"", "\"64 MiB\""]),
        (
            "[limits]\nrequest_timeout = \"30m\"\nlongest_request = \"10m\"",
            &["limits.request_timeout is 1800s", "limits.longest_request is 600s", "may name"],
        ),
        ("[limits]\nprefill_chunk_tokens = 0", &["limits.prefill_chunk_tokens is 0", "from 1 to"]),
        ("[limits]\nprefill_chunk_tokens = 600", &["prefill_chunk_tokens is 600", "max_batch_tokens is 512"]),
        ("[limits]\nmax_running = true", &["limits.max_running is true"]),
        ("[plan]\nobjective = \"speed\"", &["plan.objective is \"speed\"", "\"throughput\" or \"latency\""]),
        ("[plan]\nsplit = \"odd\"", &["plan.split is \"odd\"", "\"best\" or \"even\""]),
        ("[plan]\nsplit = \"even\"\n[[worker]]\nlayers = \"0..9\"", &["plan.split", "worker w1 has layers"]),
        ("[cluster]\nname = \"\"", &["cluster.name is \"\""]),
        ("[cluster]\nssh_options = \"-p 1\"", &["cluster.ssh_options is \"-p 1\"", "a list of texts"]),
        ("[cluster]\nsecret_file = \"nowhere\"", &["nowhere cannot be used", "cluster.toml:2"]),
        ("[[worker]]\nname = \"W 1\"", &["worker[0].name is \"W 1\"", "a-z"]),
        ("[[worker]]\nname = \"w1\"\n[[worker]]\nname = \"w1\"", &["two workers have the name \"w1\""]),
        ("[[worker]]\nhost = \"-oProxyCommand=x\"", &["worker[0].host", "user@node"]),
        ("[[worker]]\nhost = \"u@-x\"", &["worker[0].host"]),
        ("[[worker]]\nhost = \"a b\"", &["worker[0].host is \"a b\""]),
        ("[[worker]]\ndevice = \"tpu\"", &["worker[0].device is \"tpu\"", "\"auto\", \"cpu\", \"gpu\""]),
        ("[[worker]]\ndevice = \"gpu:\"", &["worker[0].device is \"gpu:\""]),
        ("[[worker]]\nthreads = 0", &["worker[0].threads is 0", "from 1 to 1024"]),
        ("[[worker]]\nprefill = \"slow\"", &["worker[0].prefill is \"slow\"", "\"invariant\" or \"fast\""]),
        ("[[worker]]\nmemory = \"8 Gibi\"", &["worker[0].memory is \"8 Gibi\"", "8 GiB"]),
        ("[[worker]]\nlayers = \"16..16\"", &["worker[0].layers is \"16..16\"", "0..16"]),
        (
            "[[worker]]\nlayers = \"0..9\"\n[[worker]]\nlayers = \"8..16\"",
            &["w1 is to run layers 0..9", "w2 layers 8..16"],
        ),
        ("[kv\ntokens = 1", &["is not TOML", "cluster.toml"]),
        ("[model]\npath = \"~somebody/grok\"", &["model.path is \"~somebody/grok\"", "only the own one"]),
    ];
    for (text, parts) in cases {
        let error = load(text, &[], &[]).expect_err(text);
        let message = error.to_string();
        assert_eq!(error.code(), Code::Usage, "{text:?}: {message}");
        for part in *parts {
            assert!(message.contains(part), "{text:?} gives\n{message}\nwithout {part:?}");
        }
    }
}

#[test]
fn bad_environment_and_flags_are_named_as_such() {
    type Pairs = &'static [(&'static str, &'static str)];
    let cases: &[(Pairs, Pairs, &[&str])] = &[
        (&[("GROKPIPE__KV__TOKNES", "1")], &[], &["unknown key kv.toknes", "GROKPIPE__KV__TOKNES", "kv.tokens?"]),
        (&[("GROKPIPE__KVV__TOKENS", "1")], &[], &["unknown section kvv", "GROKPIPE__KVV__TOKENS", "did you mean kv?"]),
        (
            &[("GROKPIPE__KV__TOKENS", "few")],
            &[],
            &["kv.tokens is \"few\"", "environment variable GROKPIPE__KV__TOKENS"],
        ),
        (&[("GROKPIPE__KV", "1")], &[], &["GROKPIPE__KV", "GROKPIPE__SECTION__KEY"]),
        (&[("GROKPIPE__A__B__C", "1")], &[], &["GROKPIPE__A__B__C", "GROKPIPE__SECTION__KEY"]),
        (&[("GROKPIPE__WORKER__NAME", "w1")], &[], &["GROKPIPE__WORKER__NAME", "[[worker]]"]),
        (&[], &[("coordinator.http", "here")], &["coordinator.http is \"here\"", "the command line"]),
    ];
    for (environment, flags, parts) in cases {
        let error = load("", environment, flags).expect_err("must be refused");
        let message = error.to_string();
        assert_eq!(error.code(), Code::Usage, "{message}");
        for part in *parts {
            assert!(message.contains(part), "{environment:?} {flags:?} gives\n{message}\nwithout {part:?}");
        }
    }
}

#[test]
fn more_workers_than_a_plan_may_have_are_refused_before_they_are_read() {
    let tables = |count: usize| "[[worker]]\n".repeat(count);
    assert_eq!(load(&tables(256), &[], &[]).unwrap().workers.len(), 256);
    let message = load(&tables(257), &[], &[]).expect_err("too many").to_string();
    assert!(message.contains("257 tables [[worker]]") && message.contains("at most 256"), "{message}");
}

#[test]
fn what_is_no_configuration_file_is_refused_unopened() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    let large = fs::File::create(path("large.toml")).unwrap();
    large.set_len(2 << 30).unwrap();
    let cases = [
        (path("socket"), "a socket"),
        (path("."), "a folder"),
        ("/dev/zero".into(), "device"),
        (path("large.toml"), "2.0 GiB"),
    ];
    for (file, why) in cases {
        let message = layers(Some(file), &[], &[]).load().expect_err(why).to_string();
        assert!(message.contains(why), "{message}");
    }
}

#[test]
fn the_empty_device_is_no_file_at_all() {
    let config = layers(Some("/dev/null".into()), &[], &[]).load().unwrap();
    assert_eq!((config.file, config.model), (None, ModelSection::default()));
}

#[test]
fn a_variable_that_is_empty_counts_as_unset() {
    let config = load("[kv]\ntokens = 100", &[("GROKPIPE__KV__TOKENS", ""), ("GROKPIPE__A", " ")], &[]).unwrap();
    assert_eq!(config.kv.tokens, 100);
}

#[test]
fn words_of_the_file_may_have_capitals() {
    let text = "[plan]\nobjective = \"Latency\"\n[[worker]]\ndevice = \"GPU:H200\"\nprecision = \"EXACT\"";
    let config = load(text, &[], &[]).unwrap();
    assert_eq!((config.plan.objective, config.workers[0].device.as_str()), (Objective::Latency, "gpu:H200"));
}

#[test]
fn later_layers_win_over_earlier_ones() {
    let text = "[kv]\ntokens = 100\n[limits]\nmax_running = 2\nmax_waiting = 3\n[cluster]\nname = \"file\"";
    let environment = [
        ("GROKPIPE__LIMITS__MAX_RUNNING", "5"),
        ("GROKPIPE__CLUSTER__NAME", "environment"),
        ("GROKPIPE__CLUSTER__SSH_OPTIONS", "-p 2222"),
        ("GROKPIPE__COORDINATOR__REPLAN_AFTER", "2m"),
        ("GROKPIPE_LOG", "not a key"),
        ("PATH", "not ours"),
    ];
    let config = load(text, &environment, &[("cluster.name", "flag")]).unwrap();
    assert_eq!((config.kv.tokens, config.limits.max_running, config.limits.max_waiting), (100, 5, 3));
    assert_eq!(config.limits.max_batch_tokens, 512);
    assert_eq!(config.cluster.name, "flag");
    assert_eq!(config.cluster.ssh_options, ["-p", "2222"]);
    assert_eq!(config.coordinator.replan_after, Duration::from_secs(120));
}

#[test]
fn paths_count_from_the_file_and_outside_of_it_from_here() {
    let (folder, file) = written("[model]\npath = \"m\"\ntokenizer = \"/t\"");
    let from_file = layers(Some(file.clone()), &[], &[]).load().unwrap();
    assert_eq!(from_file.model.path, folder.path().join("m"));
    assert_eq!(from_file.model.tokenizer, Some(PathBuf::from("/t")));
    for (environment, flags) in [(vec![("GROKPIPE__MODEL__PATH", "m")], vec![]), (vec![], vec![("model.path", "m")])] {
        let config = layers(Some(file.clone()), &environment, &flags).load().unwrap();
        assert_eq!(config.model.path, PathBuf::from("m"));
    }
}

#[test]
fn workers_are_read_with_units() {
    let text = "[[worker]]\nhost = \"me@node\"\nmemory = \"8 GiB\"\nlayers = \"0..16\"\nthreads = 3\nlisten = \"0.0.0.0:7101\"\n\
                advertise = \"node:7101\"\nbinary = \"/opt/grokpipe\"\nmodel = \"/m\"\ndevice = \"gpu:H200\"\nprefill = \"fast\"\n\
                [[worker]]\nhost = \"localhost\"";
    let config = load(text, &[], &[]).unwrap();
    let first = &config.workers[0];
    assert_eq!((first.name.as_str(), first.host.as_deref()), ("w1", Some("me@node")));
    assert_eq!((first.memory, first.layers.clone(), first.threads), (Some(ByteSize(8 << 30)), Some(0..16), Some(3)));
    assert_eq!(first.device, "gpu:H200");
    assert_eq!((first.prefill, config.workers[1].prefill), (Some(Prefill::Fast), None));
    assert_eq!(config.workers[1], WorkerSection::named("w2"));
    assert_eq!(config.worker("w1"), *first);
    assert_eq!(config.worker("other"), WorkerSection::named("other"));
}

#[test]
fn a_missing_file_is_refused_and_none_is_fine() {
    let error = layers(Some(PathBuf::from("no/such.toml")), &[], &[]).load().expect_err("missing");
    assert!(error.to_string().contains("no/such.toml"), "{error}");
    assert_eq!(error.code(), Code::Usage);
}

#[test]
fn an_address_others_can_reach_needs_a_secret() {
    let (folder, file) = written("[coordinator]\ngrpc = \"0.0.0.0:7070\"");
    let secret = folder.path().join("secret");
    let write_secret = |text: &str, mode: u32| {
        fs::write(&secret, text).unwrap();
        set_mode(&secret, mode);
    };
    let check = |flags: &[(&'static str, &str)], insecure: bool| {
        let config = layers(Some(file.clone()), &[], flags).load()?;
        config.check_exposure("coordinator.grpc", &config.coordinator.grpc, insecure)
    };
    let with_secret = [("cluster.secret_file", secret.to_str().unwrap())];

    let error = check(&[], false).expect_err("exposed");
    assert_eq!(error.code(), Code::Usage);
    assert!(error.to_string().contains("0.0.0.0:7070") && error.to_string().contains("secret_file"), "{error}");
    assert!(check(&[], true).is_ok());
    assert!(check(&[("coordinator.grpc", "127.0.0.1:0")], false).is_ok());
    assert!(check(&[("coordinator.grpc", "[::1]:0")], false).is_ok());

    write_secret("0123456789abcdef\n", 0o600);
    assert!(check(&with_secret, false).is_ok());
    write_secret("too short\n", 0o600);
    assert!(check(&with_secret, false).expect_err("short").to_string().contains("16"));
    write_secret("0123456789abcdef\n", 0o640);
    if cfg!(unix) {
        let message = check(&with_secret, false).expect_err("readable by others").to_string();
        assert!(message.contains("640") && message.contains("chmod 600"), "{message}");
    }
}

#[cfg(unix)]
fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[cfg(not(unix))]
fn set_mode(_: &Path, _: u32) {}

#[test]
fn a_secret_is_never_printed() {
    let secret = SecretText::new("correct-horse-battery", "here").unwrap();
    assert!(!format!("{secret:?}").contains("horse"));
}

#[test]
fn the_committed_file_is_the_demo_and_explains_every_key() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster.toml");
    let text = fs::read_to_string(&file).unwrap();
    let config = layers(Some(file.clone()), &[], &[]).load().unwrap();
    assert_eq!(config.model.path, file.parent().unwrap().join("model/demo"));
    let names: Vec<&str> = config.workers.iter().map(|w| w.name.as_str()).collect();
    assert_eq!(names, ["w1", "w2", "w3", "w4"]);
    assert!(config.workers.iter().all(|w| w.device == "auto" && w.host.is_none()));
    assert_eq!(config.limits, LimitsSection::default());
    assert_eq!(config.kv, KvSection::default());
    assert_eq!(config.coordinator, CoordinatorSection::default());

    // Uncommented, every example still is a configuration, and every key that exists stands in it.
    let example: String = text
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| is_setting(rest)).unwrap_or(line))
        // A secret that is not there, and pins beside an even split, are refused.
        .filter(|line| !line.starts_with("secret_file") && !line.starts_with("split"))
        .map(|line| format!("{line}\n"))
        .collect();
    load(&example, &[], &[]).unwrap();
    for key in known_keys() {
        let found = text.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} =")));
        assert!(found, "{key} is not explained in cluster.toml");
    }
}

/// `key = value`, as opposed to prose.
fn is_setting(line: &str) -> bool {
    line.split_once(" = ").is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
}

/// The keys that the sections name when they refuse an unknown one.
fn known_keys() -> Vec<String> {
    let sections = ["[model]", "[cluster]", "[coordinator]", "[kv]", "[limits]", "[plan]", "[[worker]]"];
    let keys_of = |section: &str| {
        let message = load(&format!("{section}\nzzzz = 1"), &[], &[]).expect_err(section).to_string();
        let list = message.split("the known ones are ").nth(1).unwrap().lines().next().unwrap().to_owned();
        list.split(", ").map(str::to_owned).collect::<Vec<_>>()
    };
    sections.iter().flat_map(|section| keys_of(section)).collect()
}

#[test]
fn the_roster_is_cut_and_filled_to_the_number_wanted() {
    let cases: [(&[&str], Option<u32>, &[&str]); 6] = [
        (&[], None, &["w1", "w2", "w3", "w4"]),
        (&["a", "b"], None, &["a", "b"]),
        (&["w1", "w2", "w3", "w4"], Some(1), &["w1"]),
        (&["w1", "w2", "w3", "w4"], Some(7), &["w1", "w2", "w3", "w4", "w5", "w6", "w7"]),
        (&["w2", "x"], Some(4), &["w2", "x", "w1", "w3"]),
        (&[], Some(2), &["w1", "w2"]),
    ];
    for (described, count, expected) in cases {
        let mut config = layers(None, &[], &[]).load().unwrap();
        config.workers = described.iter().map(|name| WorkerSection::named(*name)).collect();
        let names: Vec<String> = config.roster(count).into_iter().map(|worker| worker.name).collect();
        assert_eq!(names, expected, "{described:?} {count:?}");
    }
}

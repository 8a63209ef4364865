//! The sections of `cluster.toml`: one struct each, with all defaults in its `Default` and all checks of single values in its
//! `read`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use grokpipe_kernels::{Precision, Prefill};
use grokpipe_proto::{
    address::{self, Address},
    ids::WorkerName,
};

use super::{
    table::Table,
    units::{self, ByteSize},
};
use crate::{error::CliError, paths};

/// Most layers that a worker's pin may name; Grok-1 has 64.
const LAYERS_MAX: u32 = 4096;

/// `[model]`: what is served.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelSection {
    /// Folder or file of the model.
    pub(crate) path: PathBuf,
    /// `tokenizer.model`; absent: a GGUF file's own, or looked for in the model's folder and its parent.
    pub(crate) tokenizer: Option<PathBuf>,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self { path: PathBuf::from("model/demo"), tokenizer: None }
    }
}

impl ModelSection {
    pub(super) fn read(mut table: Table<'_>, resolve: &dyn Fn(bool, PathBuf) -> PathBuf) -> Result<Self, CliError> {
        let default = Self::default();
        let read = Self {
            path: path(&mut table, "path", resolve)?.unwrap_or_else(|| resolve(false, default.path)),
            tokenizer: path(&mut table, "tokenizer", resolve)?,
        };
        table.finish().map(|()| read)
    }
}

/// `[cluster]`: what belongs together, and how hosts are reached.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ClusterSection {
    /// For people.
    pub(crate) name: String,
    /// File with the shared secret.
    pub(crate) secret_file: Option<PathBuf>,
    /// Where the key was set, for messages.
    pub(crate) secret_place: String,
    /// Further options of `ssh`.
    pub(crate) ssh_options: Vec<String>,
}

impl Default for ClusterSection {
    fn default() -> Self {
        Self { name: "grokpipe".to_owned(), secret_file: None, secret_place: String::new(), ssh_options: Vec::new() }
    }
}

impl ClusterSection {
    pub(super) fn read(mut table: Table<'_>, resolve: &dyn Fn(bool, PathBuf) -> PathBuf) -> Result<Self, CliError> {
        let default = Self::default();
        let secret_place = table.place("secret_file");
        let read = Self {
            name: table
                .get("name", "a text of 1 to 64 characters", |v| v.filled().filter(|name| name.chars().count() <= 64))?
                .unwrap_or(default.name),
            secret_file: path(&mut table, "secret_file", resolve)?,
            secret_place,
            ssh_options: table.texts("ssh_options")?.unwrap_or(default.ssh_options),
        };
        table.finish().map(|()| read)
    }
}

/// `[coordinator]`: where it listens, and how patient it is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CoordinatorSection {
    /// gRPC: clients and workers.
    pub(crate) grpc: SocketAddr,
    /// HTTP: page and health.
    pub(crate) http: SocketAddr,
    /// Where workers on other hosts reach `grpc`; absent: `grpc` itself.
    pub(crate) advertise: Option<Address>,
    /// Further names by which `http` may be called.
    pub(crate) http_names: Vec<String>,
    /// How long a lost worker may take to return before its layers are planned anew.
    pub(crate) replan_after: Duration,
}

impl Default for CoordinatorSection {
    fn default() -> Self {
        Self {
            grpc: SocketAddr::from((Ipv4Addr::LOCALHOST, 7070)),
            http: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            advertise: None,
            http_names: Vec::new(),
            replan_after: Duration::from_secs(30),
        }
    }
}

impl CoordinatorSection {
    pub(super) fn read(mut table: Table<'_>) -> Result<Self, CliError> {
        let default = Self::default();
        let read = Self {
            grpc: address(&mut table, "grpc")?.unwrap_or(default.grpc),
            http: address(&mut table, "http")?.unwrap_or(default.http),
            advertise: reachable(&mut table, "advertise")?,
            http_names: http_names(&mut table)?.unwrap_or(default.http_names),
            replan_after: hours(&mut table, "replan_after")?.unwrap_or(default.replan_after),
        };
        table.finish().map(|()| read)
    }
}

/// Type of the cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvDtype {
    /// 32-bit floats, the only one that is built.
    F32,
}

/// `[kv]`: the cache of keys and values.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KvSection {
    /// Tokens that all sequences together may hold.
    pub(crate) tokens: u32,
    /// How they are stored.
    pub(crate) dtype: KvDtype,
}

impl Default for KvSection {
    fn default() -> Self {
        Self { tokens: 8192, dtype: KvDtype::F32 }
    }
}

impl KvSection {
    pub(super) fn read(mut table: Table<'_>) -> Result<Self, CliError> {
        let default = Self::default();
        let read = Self {
            tokens: whole(&mut table, "tokens", 16..=67_108_864)?.unwrap_or(default.tokens),
            dtype: table
                .get("dtype", r#""f32" ("f16" is not built yet)"#, |v| {
                    v.text()?.eq_ignore_ascii_case("f32").then_some(KvDtype::F32)
                })?
                .unwrap_or(default.dtype),
        };
        table.finish().map(|()| read)
    }
}

/// `[limits]`: what a request and a micro-batch may take.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LimitsSection {
    /// Prompt tokens of one sequence in one micro-batch.
    pub(crate) prefill_chunk_tokens: u32,
    /// Tokens in one micro-batch.
    pub(crate) max_batch_tokens: u32,
    /// Sequences in one micro-batch.
    pub(crate) max_batch_sequences: u32,
    /// Requests that run at once.
    pub(crate) max_running: u32,
    /// Requests that wait for their turn.
    pub(crate) max_waiting: u32,
    /// Time for a request that names none.
    pub(crate) request_timeout: Duration,
    /// The most time that a request may name; no less than `request_timeout`.
    pub(crate) longest_request: Duration,
    /// Longest prompt as text, checked before it is tokenised.
    pub(crate) max_prompt_bytes: ByteSize,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            prefill_chunk_tokens: 64,
            max_batch_tokens: 512,
            max_batch_sequences: 32,
            max_running: 64,
            max_waiting: 256,
            request_timeout: Duration::from_secs(600),
            longest_request: Duration::from_secs(3600),
            max_prompt_bytes: ByteSize(1 << 20),
        }
    }
}

impl LimitsSection {
    pub(super) fn read(mut table: Table<'_>) -> Result<Self, CliError> {
        let default = Self::default();
        let request_timeout = hours(&mut table, "request_timeout")?.unwrap_or(default.request_timeout);
        let read = Self {
            prefill_chunk_tokens: whole(&mut table, "prefill_chunk_tokens", 1..=8192)?
                .unwrap_or(default.prefill_chunk_tokens),
            max_batch_tokens: whole(&mut table, "max_batch_tokens", 1..=8192)?.unwrap_or(default.max_batch_tokens),
            max_batch_sequences: whole(&mut table, "max_batch_sequences", 1..=4096)?
                .unwrap_or(default.max_batch_sequences),
            max_running: whole(&mut table, "max_running", 1..=65_536)?.unwrap_or(default.max_running),
            max_waiting: whole(&mut table, "max_waiting", 0..=65_536)?.unwrap_or(default.max_waiting),
            request_timeout,
            longest_request: hours(&mut table, "longest_request")?
                .unwrap_or_else(|| default.longest_request.max(request_timeout)),
            max_prompt_bytes: table
                .get("max_prompt_bytes", r#"a size from "1 KiB" to "64 MiB""#, |v| {
                    ByteSize::parse(v.any()).filter(|size| (1 << 10..=64 << 20).contains(&size.0))
                })?
                .unwrap_or(default.max_prompt_bytes),
        };
        table.finish().map(|()| read)
    }
}

/// What a plan makes as good as it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Objective {
    /// Tokens a second of all requests together: the slowest stage counts.
    Throughput,
    /// Time per token of one request: the sum of the stages counts.
    Latency,
}

/// `exact` or `fast`.
pub(crate) fn precision(text: &str) -> Option<Precision> {
    [Precision::Exact, Precision::Fast].into_iter().find(|known| known.name().eq_ignore_ascii_case(text))
}

/// As [`precision`], for a flag.
///
/// # Errors
/// In words.
pub(crate) fn parse_precision(text: &str) -> Result<Precision, String> {
    precision(text).ok_or_else(|| "expected exact or fast".to_owned())
}

/// `invariant` or `fast`.
pub(crate) fn prefill(text: &str) -> Option<Prefill> {
    [Prefill::Invariant, Prefill::Fast].into_iter().find(|known| known.name().eq_ignore_ascii_case(text))
}

/// As [`prefill`], for a flag.
///
/// # Errors
/// In words.
pub(crate) fn parse_prefill(text: &str) -> Result<Prefill, String> {
    prefill(text).ok_or_else(|| "expected invariant or fast".to_owned())
}

/// Who decides how many layers a worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// The planner, by memory and speed. Workers that would only slow things down stand by.
    Best,
    /// Every worker runs as many as the next one, in the order of their description.
    Even,
}

/// `[plan]`: how layers are given to workers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlanSection {
    /// What to optimise.
    pub(crate) objective: Objective,
    /// Who decides.
    pub(crate) split: Split,
}

impl Default for PlanSection {
    fn default() -> Self {
        Self { objective: Objective::Throughput, split: Split::Best }
    }
}

impl PlanSection {
    pub(super) fn read(mut table: Table<'_>) -> Result<Self, CliError> {
        let default = Self::default();
        let objective = table.get("objective", r#""throughput" or "latency""#, |v| {
            match v.text()?.to_ascii_lowercase().as_str() {
                "throughput" => Some(Objective::Throughput),
                "latency" => Some(Objective::Latency),
                _ => None,
            }
        })?;
        let split = table.get("split", r#""best" or "even""#, |v| match v.text()?.to_ascii_lowercase().as_str() {
            "best" => Some(Split::Best),
            "even" => Some(Split::Even),
            _ => None,
        })?;
        let read = Self { objective: objective.unwrap_or(default.objective), split: split.unwrap_or(default.split) };
        table.finish().map(|()| read)
    }
}

/// `[[worker]]`: one process that runs layers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WorkerSection {
    /// Unique within the cluster.
    pub(crate) name: String,
    /// `user@node` for a worker that is started over SSH; absent: on this machine.
    pub(crate) host: Option<String>,
    /// `auto`, `cpu`, `gpu` or `gpu:NAME`.
    pub(crate) device: String,
    /// CPU threads; absent: the machine's cores shared by its workers.
    pub(crate) threads: Option<u32>,
    /// How exactly products are computed; absent: fast.
    pub(crate) precision: Option<Precision>,
    /// How steps of many rows are computed; absent: as all others.
    pub(crate) prefill: Option<Prefill>,
    /// Memory that it may fill; absent: what the device has free.
    pub(crate) memory: Option<ByteSize>,
    /// Layers that it must run; absent: as planned.
    pub(crate) layers: Option<Range<u32>>,
    /// Where it waits for the previous stage; absent: any port, on loopback here and on all interfaces of another host.
    pub(crate) listen: Option<SocketAddr>,
    /// Where others reach it; absent: as it finds out itself.
    pub(crate) advertise: Option<Address>,
    /// The program on its host.
    pub(crate) binary: String,
    /// Where the model lies on its host; absent: the same path as here.
    pub(crate) model: Option<PathBuf>,
}

impl WorkerSection {
    /// A worker of this name on this machine, with everything else as by default.
    pub(crate) fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            host: None,
            device: "auto".to_owned(),
            threads: None,
            precision: None,
            prefill: None,
            memory: None,
            layers: None,
            listen: None,
            advertise: None,
            binary: "grokpipe".to_owned(),
            model: None,
        }
    }

    pub(super) fn read(mut table: Table<'_>, index: usize) -> Result<Self, CliError> {
        let name = table.get("name", WorkerName::EXPECTED, |v| v.text()?.parse::<WorkerName>().ok())?;
        let default = Self::named(name.map_or_else(|| format!("w{}", index + 1), |name| name.to_string()));
        let host = table.get("host", r#""localhost" or "user@node""#, |v| v.filled().filter(|host| is_host(host)))?;
        let read = Self {
            host: host.filter(|host| host != "localhost"),
            device: table.get("device", DEVICES, |v| device(v.text()?))?.unwrap_or(default.device),
            threads: whole(&mut table, "threads", 1..=1024)?,
            precision: table.get("precision", r#""exact" or "fast""#, |value| precision(value.text()?))?,
            prefill: table.get("prefill", r#""invariant" or "fast""#, |value| prefill(value.text()?))?,
            memory: table.get("memory", r#"a size of at least "1 MiB", as "8 GiB""#, |v| {
                ByteSize::parse(v.any()).filter(|size| size.0 >= 1 << 20)
            })?,
            layers: table.get("layers", r#"a range from a layer to before a layer, as "0..16""#, |v| {
                units::layer_range(v.text()?).filter(|range| range.end <= LAYERS_MAX)
            })?,
            listen: address(&mut table, "listen")?,
            advertise: reachable(&mut table, "advertise")?,
            binary: table.get("binary", "the path of a program", |v| v.filled())?.unwrap_or(default.binary),
            model: table.get("model", "a path", |v| v.filled().map(PathBuf::from))?,
            name: default.name,
        };
        table.finish().map(|()| read)
    }
}

/// What a device may be, for messages.
pub(crate) const DEVICES: &str = r#""auto", "cpu", "gpu", or "gpu:" and an index, a PCI address or a part of its name"#;

/// A device's name, if it is one.
pub(crate) fn device(text: &str) -> Option<String> {
    let (kind, name) = text.split_once(':').map_or((text, None), |(kind, name)| (kind, Some(name)));
    let kind = kind.to_ascii_lowercase();
    match (kind.as_str(), name) {
        ("auto" | "cpu" | "gpu", None) => Some(kind),
        ("gpu", Some(name)) if !name.trim().is_empty() => Some(format!("gpu:{name}")),
        _ => None,
    }
}

/// `node` or `user@node`. Nothing that `ssh` could take for an option.
fn is_host(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-:[]%".contains(c))
    };
    match text.split_once('@') {
        Some((user, node)) => plain(user) && plain(node),
        None => plain(text),
    }
}

fn address(table: &mut Table<'_>, key: &'static str) -> Result<Option<SocketAddr>, CliError> {
    table.get(key, r#"an IP address and a port, as "127.0.0.1:7070""#, |v| address::socket_addr(v.text()?))
}

fn reachable(table: &mut Table<'_>, key: &'static str) -> Result<Option<Address>, CliError> {
    table.get(key, r#"a host and a port, as "node1:7070" or "[fd00::1]:7070""#, |v| v.text()?.parse().ok())
}

/// Names or addresses as a `Host` header has them, without the port.
fn http_names(table: &mut Table<'_>) -> Result<Option<Vec<String>>, CliError> {
    let place = table.place("http_names");
    let names = table.texts("http_names")?;
    let is_name = |name: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let bracketed = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        bracketed.parse::<IpAddr>().is_ok() || (!name.is_empty() && name.len() <= 253 && name.chars().all(plain))
    };
    match names.iter().flatten().find(|name| !is_name(name)) {
        Some(bad) => Err(CliError::usage(format!("coordinator.http_names has {bad:?}"))
            .at(place)
            .because(r#"expected names or addresses without scheme and port, as ["node0", "grok.example.com"]"#)),
        None => Ok(names),
    }
}

/// What a path may be, for messages.
const PATH: &str = "a path; of the homes only the own one is known, as ~/, where HOME is set";

fn path(
    table: &mut Table<'_>,
    key: &'static str,
    resolve: &dyn Fn(bool, PathBuf) -> PathBuf,
) -> Result<Option<PathBuf>, CliError> {
    let outside = table.is_from_outside(key);
    let found = table.get(key, PATH, |v| paths::expanded(Path::new(&v.filled()?)).ok())?;
    Ok(found.map(|path| resolve(outside, path)))
}

/// A time that people may have to wait for.
fn hours(table: &mut Table<'_>, key: &'static str) -> Result<Option<Duration>, CliError> {
    table.get(key, r#"a time from "1s" to "24h""#, |v| {
        units::duration(v.any()).filter(|time| (1..=86_400).contains(&time.as_secs()))
    })
}

fn whole(
    table: &mut Table<'_>,
    key: &'static str,
    allowed: std::ops::RangeInclusive<u32>,
) -> Result<Option<u32>, CliError> {
    let expected = format!("a whole number from {} to {}", allowed.start(), allowed.end());
    table.get(key, &expected, |v| {
        units::whole(v.any()).and_then(|n| u32::try_from(n).ok()).filter(|n| allowed.contains(n))
    })
}

//! The configuration: defaults, `cluster.toml`, environment and flags, in this order, merged and checked before any port opens.
//!
//! Decides what may be configured and what may not. Knows nothing of models or sockets: whether a path holds a model or a port
//! is free is found out by those who use them. Unknown keys are refused wherever they come from.

mod places;
mod secret;
mod sections;
mod table;
#[cfg(test)]
mod tests;
mod units;

use std::{
    collections::HashMap,
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use config::{ConfigError, File, FileFormat, Map, Source, Value};
use grokpipe_coordinator::planner::WORKERS_MAX;
use grokpipe_proto::secret::needs_secret;

use self::{
    places::{FLAGS, Places},
    table::Table,
};
pub(crate) use self::{
    secret::{SecretText, link_key},
    sections::{
        ClusterSection, CoordinatorSection, DEVICES, KvSection, LimitsSection, ModelSection, Objective, PlanSection,
        Split, WorkerSection, device, parse_precision, parse_prefill,
    },
    units::{ByteSize, duration},
};
use crate::error::CliError;

/// Looked for in the current folder when no `--config` is given.
pub(crate) const DEFAULT_FILE: &str = "cluster.toml";

/// Most bytes of a configuration file: far more than any needs, far less than a file named by mistake.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Workers of a cluster that nobody described.
const DEFAULT_WORKERS: usize = 4;

/// Everything that can be configured, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// What is served.
    pub(crate) model: ModelSection,
    /// What belongs together.
    pub(crate) cluster: ClusterSection,
    /// Where the coordinator listens.
    pub(crate) coordinator: CoordinatorSection,
    /// The cache of keys and values.
    pub(crate) kv: KvSection,
    /// What requests and micro-batches may take.
    pub(crate) limits: LimitsSection,
    /// How layers are given to workers.
    pub(crate) plan: PlanSection,
    /// The workers, in order; empty if none is described.
    pub(crate) workers: Vec<WorkerSection>,
    /// The file in use.
    pub(crate) file: Option<PathBuf>,
    /// The shared secret, read from its file.
    pub(crate) secret: SecretText,
}

/// Where to read from.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    /// `--config`; without it, [`DEFAULT_FILE`] if there is one.
    pub(crate) file: Option<PathBuf>,
    /// Use no file, whatever lies in the current folder.
    pub(crate) no_file: bool,
    /// Variables of the environment; only those that begin with `GROKPIPE__` count.
    pub(crate) environment: HashMap<String, String>,
    /// Values that flags set: `model.path` and the like.
    pub(crate) flags: Vec<(&'static str, String)>,
    /// Paths of flags and of the environment that are not UTF-8, by the text that stands for them among the values.
    pub(crate) exact: HashMap<String, PathBuf>,
}

impl Layers {
    /// The layers of this process.
    pub(crate) fn of_process(file: Option<PathBuf>) -> Self {
        let mut layers = Self { file, ..Self::default() };
        for (name, value) in env::vars_os() {
            let Ok(name) = name.into_string() else { continue };
            let value = layers.text_of(Path::new(&value));
            layers.environment.insert(name, value);
        }
        layers
    }

    /// Sets a key to a path if the flag was given.
    pub(crate) fn path_flag(mut self, key: &'static str, path: Option<&Path>) -> Self {
        if let Some(path) = path {
            let text = self.text_of(path);
            self.flags.push((key, text));
        }
        self
    }

    /// The text that stands for a path.
    fn text_of(&mut self, path: &Path) -> String {
        let text = path.to_string_lossy().into_owned();
        if path.to_str().is_none() {
            self.exact.insert(text.clone(), path.to_owned());
        }
        text
    }

    /// Sets a key if the flag was given.
    pub(crate) fn flag(mut self, key: &'static str, value: Option<impl ToString>) -> Self {
        self.flags.extend(value.map(|value| (key, value.to_string())));
        self
    }

    /// Merges and checks.
    ///
    /// # Errors
    /// A [`CliError`] that names key, value, place and what is allowed.
    pub(crate) fn load(self) -> Result<Config, CliError> {
        let file = self.file_in_use()?;
        let places = read_places(file)?;
        let merged = merge(&places, &self.environment, &self.flags)?;
        let folder = places.path.as_deref().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default();
        let exact = |path: PathBuf| path.to_str().and_then(|text| self.exact.get(text)).cloned().unwrap_or(path);
        let resolve = |outside: bool, path: PathBuf| if outside { exact(path) } else { folder.join(path) };

        let mut root = Table::root(merged, &places)?;
        let model = ModelSection::read(root.section("model")?, &resolve)?;
        let cluster = ClusterSection::read(root.section("cluster")?, &resolve)?;
        let coordinator = CoordinatorSection::read(root.section("coordinator")?)?;
        let kv = KvSection::read(root.section("kv")?)?;
        let limits = LimitsSection::read(root.section("limits")?)?;
        let plan = PlanSection::read(root.section("plan")?)?;
        let tables = root.sections("worker", WORKERS_MAX)?;
        root.finish()?;
        let workers = tables
            .into_iter()
            .enumerate()
            .map(|(index, table)| WorkerSection::read(table, index))
            .collect::<Result<Vec<_>, _>>()?;
        let secret = match &cluster.secret_file {
            Some(path) => SecretText::read(path, &cluster.secret_place)?,
            None => SecretText::default(),
        };
        let config = Config { model, cluster, coordinator, kv, limits, plan, workers, file: places.path, secret };
        config.check_together()?;
        Ok(config)
    }

    fn file_in_use(&self) -> Result<Option<PathBuf>, CliError> {
        if self.no_file {
            return Ok(None);
        }
        match &self.file {
            // As elsewhere: no file at all.
            Some(path) if path == Path::new("/dev/null") => Ok(None),
            Some(path) => check_file(path).map(|()| Some(path.clone())),
            None => {
                let found = Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists());
                found.map_or(Ok(None), |path| check_file(&path).map(|()| Some(path)))
            }
        }
    }
}

impl Config {
    /// Checks that concern more than one key.
    fn check_together(&self) -> Result<(), CliError> {
        let place = self.file.as_deref().map_or_else(|| "the configuration".to_owned(), |f| f.display().to_string());
        let limits = &self.limits;
        if limits.prefill_chunk_tokens > limits.max_batch_tokens {
            return Err(CliError::usage(format!(
                "limits.prefill_chunk_tokens is {}, limits.max_batch_tokens is {}",
                limits.prefill_chunk_tokens, limits.max_batch_tokens
            ))
            .at(place)
            .because("expected a chunk to fit into a micro-batch"));
        }
        if limits.request_timeout > limits.longest_request {
            return Err(CliError::usage(format!(
                "limits.request_timeout is {:?}, limits.longest_request is {:?}",
                limits.request_timeout, limits.longest_request
            ))
            .at(place)
            .because("expected the time of a request that names none to be one that a request may name"));
        }
        let pinned = self.workers.iter().find(|worker| worker.layers.is_some());
        if let (Split::Even, Some(worker)) = (self.plan.split, pinned) {
            return Err(CliError::usage(format!(
                "plan.split is \"even\", and worker {} has layers of its own",
                worker.name
            ))
            .at(place)
            .because("expected layers from one place only")
            .advise("remove the layers of all workers, or set plan.split = \"best\""));
        }
        for (index, worker) in self.workers.iter().enumerate() {
            for other in &self.workers[..index] {
                if other.name == worker.name {
                    return Err(CliError::usage(format!("two workers have the name {:?}", worker.name))
                        .at(place)
                        .because("expected a name of its own for every [[worker]]"));
                }
                if let (Some(a), Some(b)) = (&other.layers, &worker.layers)
                    && a.start < b.end
                    && b.start < a.end
                {
                    return Err(CliError::usage(format!(
                        "{} is to run layers {}..{} and {} layers {}..{}",
                        other.name, a.start, a.end, worker.name, b.start, b.end
                    ))
                    .at(place)
                    .because("expected every layer on one worker"));
                }
            }
        }
        Ok(())
    }

    /// Refuses an address that others can reach, unless a secret guards it or the user insists.
    ///
    /// # Errors
    /// [`CliError`] that names `key`.
    pub(crate) fn check_exposure(&self, key: &str, address: &SocketAddr, insecure: bool) -> Result<(), CliError> {
        if insecure || self.secret.is_set() || !needs_secret(address) {
            return Ok(());
        }
        Err(CliError::usage(format!("{key} is {address}, which other machines can reach, and there is no secret"))
            .because("expected a loopback address, or [cluster] secret_file")
            .advise("set [cluster] secret_file, or give --insecure if you trust the network"))
    }

    /// The description of the worker of this name; a plain one if there is none.
    pub(crate) fn worker(&self, name: &str) -> WorkerSection {
        self.workers.iter().find(|w| w.name == name).cloned().unwrap_or_else(|| WorkerSection::named(name))
    }

    /// The workers of a cluster: those described, cut to or filled up to `count`; four plain ones if none is described.
    pub(crate) fn roster(&self, count: Option<u32>) -> Vec<WorkerSection> {
        let mut roster = self.workers.clone();
        let count = match count {
            Some(count) => count as usize,
            None if roster.is_empty() => DEFAULT_WORKERS,
            None => roster.len(),
        };
        roster.truncate(count);
        let names = (1..).map(|number: u32| format!("w{number}"));
        let free: Vec<String> =
            names.filter(|name| roster.iter().all(|w| w.name != *name)).take(count - roster.len()).collect();
        roster.extend(free.into_iter().map(WorkerSection::named));
        roster
    }
}

/// Values of flags as a layer of their own, so that messages can say where a value comes from.
#[derive(Clone, Debug)]
struct Flags(Vec<(&'static str, String)>);

impl Source for Flags {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        let origin = FLAGS.to_owned();
        let value = |(key, text): &(&'static str, String)| ((*key).to_owned(), Value::new(Some(&origin), text.clone()));
        Ok(self.0.iter().map(value).collect())
    }
}

/// Refuses what is no file to read a configuration from, before it is opened: a pipe would be waited for.
fn check_file(path: &Path) -> Result<(), CliError> {
    let refuse = |why: String| {
        CliError::usage("the configuration file cannot be read")
            .at(path.display().to_string())
            .because(why)
            .advise("name another one with --config, or leave it out for the demo")
    };
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => refuse("there is no such file".to_owned()),
        _ => refuse(error.to_string()),
    })?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a folder" } else { "a pipe, a socket or a device" };
        return Err(refuse(format!("expected a file, found {found}")));
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err(refuse(format!(
            "expected at most {}, found {}",
            ByteSize(FILE_BYTES_MAX),
            ByteSize(metadata.len())
        )));
    }
    Ok(())
}

fn read_places(path: Option<PathBuf>) -> Result<Places, CliError> {
    let Some(path) = path else { return Ok(Places::default()) };
    let text = std::fs::read_to_string(&path).map_err(|error| {
        CliError::usage("the configuration file cannot be read").at(path.display().to_string()).because(error)
    })?;
    Ok(Places { path: Some(path), text })
}

fn merge(
    places: &Places,
    environment: &HashMap<String, String>,
    flags: &[(&'static str, String)],
) -> Result<Value, CliError> {
    let mut builder = config::Config::builder();
    if let Some(path) = &places.path {
        builder = builder.add_source(File::from(path.as_path()).format(FileFormat::Toml));
    }
    let ours: Map<String, String> = environment
        .iter()
        // One that is empty counts as unset.
        .filter(|(name, value)| name.to_ascii_uppercase().starts_with("GROKPIPE__") && !value.trim().is_empty())
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    check_variables(&ours)?;
    builder = builder
        .add_source(
            config::Environment::with_prefix("GROKPIPE").prefix_separator("__").separator("__").source(Some(ours)),
        )
        .add_source(Flags(flags.to_vec()));
    let merged = builder.build().map_err(|error| match error {
        ConfigError::FileParse { cause, .. } => CliError::usage("the configuration file is not TOML")
            .at(places.path.as_deref().map_or_else(String::new, |path| path.display().to_string()))
            .because(cause.to_string().trim_end().replace('\n', "\n         ")),
        other => CliError::usage("the configuration cannot be read").because(other),
    })?;
    Ok(merged.cache)
}

/// A variable names one section and one key; lists of tables cannot be written in the environment.
fn check_variables(variables: &Map<String, String>) -> Result<(), CliError> {
    let mut names: Vec<&String> = variables.keys().collect();
    names.sort();
    for name in names {
        let parts: Vec<&str> = name.split("__").skip(1).collect();
        let refuse = |why: &str| {
            CliError::usage(format!("environment variable {name} sets no key"))
                .at(format!("environment variable {name}"))
                .because(why)
                .advise("unset it, or set it as GROKPIPE__KV__TOKENS=8192")
        };
        if parts.len() != 2 || parts.iter().any(|part| part.is_empty()) {
            return Err(refuse("expected GROKPIPE__SECTION__KEY"));
        }
        if parts[0].eq_ignore_ascii_case("worker") {
            return Err(refuse("workers are described in the file only, each under [[worker]]"));
        }
    }
    Ok(())
}

//! `grokpipe plan`: which worker runs which layers, what that takes, and how fast it should be.
//!
//! With `--server` it shows the plan of a running cluster. Otherwise it predicts one from the configuration, before anything is
//! loaded or started; speeds are then assumed, because only a worker that runs can measure them.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    ops::Range,
    path::PathBuf,
};

use grokpipe_coordinator::{
    engine,
    facts::{ModelFacts, PlanRequirements},
    planner::{self, Overhead, Refusal, WorkerResources},
};
use grokpipe_model::Model;
use grokpipe_proto::{
    ids::{BadName, LayerRange, PlanEpoch, WorkerName},
    snapshot::ClusterSnapshot,
    v1::{GetPlanResponse, PlannedStage},
};
use serde_json::{Value, json};

use crate::{
    client::{self, Client},
    common::ConfigArgs,
    config::{ByteSize, Config, Objective, Split},
    error::CliError,
    paths,
    text::{Table, print},
    weights::{SyntheticArgs, Weights},
};

/// Assumed read bandwidth of a machine that nobody has measured: two channels of ordinary memory.
const ASSUMED_BYTES_PER_SECOND: f64 = 30e9;
/// Assumed rate of such a machine, in multiply-adds times two a second.
const ASSUMED_FLOPS: f64 = 200e9;

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder or file of the model
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: Option<PathBuf>,
    #[command(flatten)]
    synthetic: SyntheticArgs,
    /// Show the plan of the running cluster with this gRPC address instead
    #[arg(long, value_name = "ADDR", value_parser = client::parse_server)]
    server: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A plan and what its workers offer.
pub(crate) struct PlanView {
    /// The plan.
    pub(crate) plan: GetPlanResponse,
    /// Bytes that each worker may fill, where known.
    pub(crate) offered: HashMap<String, u64>,
    /// Speeds were assumed, not measured.
    pub(crate) assumed: bool,
}

/// Runs `plan`.
///
/// # Errors
/// Exit code 5 when memory does not suffice, 3 when the server cannot be reached.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let view = match &args.server {
        Some(server) => client::block_on(async { PlanView::of_cluster(&Client::connect(server).await?).await })?,
        None => {
            let mut config = args.config.layers().load()?;
            if let Some(path) = &args.model {
                config.model.path.clone_from(path);
            }
            PlanView::predicted(&config, args.synthetic.weights()?)?
        }
    };
    let text = if args.json { format!("{}\n", view.to_json()) } else { view.render() };
    print(&text)
}

impl PlanView {
    /// The plan of a running cluster.
    ///
    /// # Errors
    /// What the server said.
    pub(crate) async fn of_cluster(client: &Client) -> Result<Self, CliError> {
        let (plan, snapshot) = (client.plan().await?, client.status().await?);
        Ok(Self { plan, offered: offered(&snapshot), assumed: false })
    }

    /// The plan that the configuration's workers would get, for these weights or the configuration's model.
    pub(crate) fn predicted(config: &Config, weights: Option<Weights>) -> Result<Self, CliError> {
        let facts = match weights {
            Some(Weights { config, source, digest, .. }) => ModelFacts::of_weights(config, digest, source.as_ref())?,
            None => ModelFacts::of(&Model::open(&config.model.path)?)?,
        };
        let mut workers = resources(config)?;
        let names: Vec<String> = workers.iter().map(|worker| worker.name.clone()).collect();
        for (worker, pinned) in workers.iter_mut().zip(pins(config, &names, facts.config.num_hidden_layers)) {
            worker.pinned_layers = pinned;
        }
        let offered: HashMap<String, u64> =
            workers.iter().map(|worker| (worker.name.clone(), worker.memory_bytes)).collect();
        let problem = facts.problem(&requirements(config), workers, None);
        let plan = planner::plan(&problem).map_err(|refusal| refused(&refusal))?;
        let names: Result<Vec<WorkerName>, BadName> = names.iter().map(|name| name.parse()).collect();
        let names = names.map_err(|bad| CliError::usage("a worker's name cannot be used").because(bad))?;
        let with_memory = |name: &WorkerName| (name.clone(), offered.get(name.as_str()).copied().unwrap_or_default());
        let view = engine::PlanView {
            workers: plan.stages.iter().filter_map(|stage| names.get(stage.worker).map(with_memory)).collect(),
            standby: plan.standby.iter().filter_map(|&index| names.get(index).cloned()).collect(),
            epoch: PlanEpoch::default(),
            plan,
        };
        Ok(Self { plan: view.into(), offered, assumed: true })
    }

    /// For people: a row a stage, then what to expect.
    pub(crate) fn render(&self) -> String {
        let plan = &self.plan;
        let mut table = Table::new(&["worker", "layers", "weights", "kv", "scratch", "in all", "of", "step"]);
        for stage in &plan.stages {
            table.row(vec![
                stage.worker.clone(),
                LayerRange::new(stage.layer_start, stage.layer_end)
                    .map_or_else(|_| "-".to_owned(), LayerRange::numbers),
                ByteSize(stage.weights_bytes).to_string(),
                ByteSize(stage.kv_bytes).to_string(),
                ByteSize(stage.scratch_bytes).to_string(),
                ByteSize(stage.memory_bytes).to_string(),
                self.offered.get(&stage.worker).map_or_else(|| "-".to_owned(), |&bytes| ByteSize(bytes).to_string()),
                format!("{:.2} ms", stage.step_seconds * 1e3),
            ]);
        }
        let mut text = table.to_string();
        if !plan.standby.is_empty() {
            let _ = writeln!(text, "standby: {}", plan.standby.join(", "));
        }
        let _ = writeln!(
            text,
            "predicted: {:.1} tokens/s with every stage busy, {:.1} tokens/s for one stream alone",
            plan.predicted_tokens_per_second, plan.predicted_stream_tokens_per_second
        );
        if self.assumed {
            let _ = writeln!(
                text,
                "speeds are assumed ({:.0} GB/s a machine, shared by its workers); a running cluster measures them",
                ASSUMED_BYTES_PER_SECOND / 1e9
            );
        }
        text
    }

    fn to_json(&self) -> Value {
        let stage = |stage: &PlannedStage| {
            json!({
                "worker": stage.worker,
                "layers": [stage.layer_start, stage.layer_end],
                "weights_bytes": stage.weights_bytes,
                "kv_bytes": stage.kv_bytes,
                "scratch_bytes": stage.scratch_bytes,
                "memory_bytes": stage.memory_bytes,
                "offered_bytes": self.offered.get(&stage.worker),
                "step_seconds": stage.step_seconds,
            })
        };
        json!({
            "epoch": Some(self.plan.plan_epoch).filter(|_| !self.assumed),
            "stages": self.plan.stages.iter().map(stage).collect::<Vec<_>>(),
            "standby": self.plan.standby,
            "predicted_tokens_per_second": self.plan.predicted_tokens_per_second,
            "predicted_stream_tokens_per_second": self.plan.predicted_stream_tokens_per_second,
            "speeds_assumed": self.assumed,
        })
    }
}

/// What a plan makes room for, as the coordinator states it from the same configuration.
fn requirements(config: &Config) -> PlanRequirements {
    PlanRequirements {
        kv_tokens: u64::from(config.kv.tokens),
        max_batch_tokens: config.limits.max_batch_tokens as usize,
        batch_tokens: 1,
        objective: objective(config.plan.objective),
    }
}

/// The layers that each worker must run: as described for it, or an even share of the model. The shares of workers beyond the
/// number of layers are none.
pub(crate) fn pins(config: &Config, names: &[String], layers: u32) -> Vec<Option<Range<u32>>> {
    match config.plan.split {
        Split::Best => names.iter().map(|name| config.worker(name).layers).collect(),
        Split::Even => {
            let shares = planner::even_shares(0..layers, u32::try_from(names.len()).unwrap_or(u32::MAX));
            (0..names.len()).map(|index| shares.get(index).cloned()).collect()
        }
    }
}

/// The planner's word for an objective.
pub(crate) fn objective(objective: Objective) -> planner::Objective {
    match objective {
        Objective::Throughput => planner::Objective::Throughput,
        Objective::Latency => planner::Objective::Latency,
    }
}

/// Memory as configured, else a share of this machine's; speeds shared by the workers of a machine.
fn resources(config: &Config) -> Result<Vec<WorkerResources>, CliError> {
    let workers = config.roster(None);
    let local = workers.iter().filter(|worker| worker.host.is_none()).count().max(1) as u64;
    let here = grokpipe_kernels::available_memory_bytes();
    let resource = |worker: &crate::config::WorkerSection| {
        let memory = match (worker.memory, &worker.host, here) {
            (Some(memory), _, _) => memory.0,
            (None, None, Some(bytes)) => bytes / local,
            _ => {
                return Err(CliError::usage(format!("the memory of worker {} is not known", worker.name))
                    .because(
                        "expected [[worker]] memory for a worker on another host, or where the system does not say",
                    )
                    .advise("set memory = \"64 GiB\", or the like, under its [[worker]]"));
            }
        };
        let share = if worker.host.is_none() { local as f64 } else { 1.0 };
        Ok(WorkerResources {
            name: worker.name.clone(),
            memory_bytes: memory,
            read_bandwidth: ASSUMED_BYTES_PER_SECOND / share,
            flop_rate: ASSUMED_FLOPS / share,
            rates: BTreeMap::new(),
            overhead: Overhead::default(),
            pinned_layers: None,
            held_layers: None,
        })
    };
    workers.iter().map(resource).collect()
}

fn refused(refusal: &Refusal) -> CliError {
    if refusal.is_out_of_memory() {
        CliError::no_room(refusal)
    } else {
        let error = CliError::usage("there is no plan for these workers").because(refusal);
        match refusal {
            Refusal::PinsLeaveGaps { .. } => error
                .advise("add a worker, or change the layers of the [[worker]] tables until all layers are among them"),
            _ => error,
        }
    }
}

fn offered(snapshot: &ClusterSnapshot) -> HashMap<String, u64> {
    let of = |node: &grokpipe_proto::snapshot::SnapshotNode| {
        let memory = node.stats().memory();
        let parts = [memory.weights_bytes, memory.kv_bytes, memory.free_bytes];
        Some((node.name.clone(), parts.into_iter().flatten().sum())).filter(|_| memory.free_bytes.is_some())
    };
    snapshot.nodes.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn stages_and_prediction_are_shown() {
        let stage =
            PlannedStage { worker: "w1".into(), layer_end: 16, memory_bytes: 1 << 30, ..PlannedStage::default() };
        let plan = GetPlanResponse {
            stages: vec![stage],
            predicted_tokens_per_second: 41.0,
            standby: vec!["w9".into()],
            ..GetPlanResponse::default()
        };
        let view = PlanView { plan, offered: HashMap::from([("w1".into(), 2 << 30)]), assumed: true };
        let text = view.render();
        for part in ["0–15", "1.0 GiB", "2.0 GiB", "standby: w9", "41.0 tokens/s", "assumed"] {
            assert!(text.contains(part), "{text}");
        }
        let json = view.to_json();
        assert_eq!(json["stages"][0]["layers"], json!([0, 16]));
        assert_eq!((&json["epoch"], &json["speeds_assumed"]), (&Value::Null, &json!(true)));
    }

    #[test]
    fn an_even_split_covers_every_layer_once() {
        let mut config = crate::config::Layers { no_file: true, ..Default::default() }.load().unwrap();
        let names = |count: u32| (1..=count).map(|number| format!("w{number}")).collect::<Vec<_>>();
        assert_eq!(pins(&config, &names(2), 64), [None, None]);
        config.plan.split = Split::Even;
        assert_eq!(pins(&config, &names(4), 64), [Some(0..16), Some(16..32), Some(32..48), Some(48..64)]);
        for (count, layers) in [(1, 64), (7, 64), (3, 2), (64, 64), (200, 64)] {
            let shares: Vec<Range<u32>> = pins(&config, &names(count), layers).into_iter().flatten().collect();
            assert_eq!((shares[0].start, shares[shares.len() - 1].end), (0, layers), "{count} {layers}");
            assert!(shares.iter().all(|share| !share.is_empty()));
            assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start), "{count} {layers}");
        }
    }

    #[test]
    fn too_little_memory_is_exit_code_5() {
        let refusal =
            Refusal::DoesNotFit { missing_bytes: 9, holes: Vec::new(), needed_bytes: 10, memory_bytes: 1, workers: 1 };
        assert_eq!(refused(&refusal).code(), Code::OutOfMemory);
        assert_eq!(refused(&Refusal::NoLayers).code(), Code::Usage);
    }
}

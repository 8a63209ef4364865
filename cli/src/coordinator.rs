//! `grokpipe coordinator`: reads the model's sizes and the tokenizer, opens the ports, and hands over to the coordinator library.
//!
//! It loads no weights. Once its ports are open it says where, as one JSON line on standard output.

use std::{io, path::PathBuf, sync::Arc};

use grokpipe_coordinator::{
    Coordinator, CoordinatorError, Settings, cluster::ExpectedWorker, facts::ModelFacts, request::check::RequestLimits,
};
use grokpipe_model::Model;
use grokpipe_proto::{
    address::Address,
    ids::{BadName, WorkerName},
    transport::Tcp,
};
use serde_json::json;
use tracing::info;

use crate::{
    common::{self, ConfigArgs},
    config::{self, Config, SecretText},
    descriptors, doctor,
    ending::Stdin,
    error::CliError,
    host_names, machine, paths, plan,
    text::print_aside,
    tokenizer,
};

/// Threads for connections, tokenising and decisions.
const THREADS: usize = 2;

/// Arguments of `coordinator`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder or file of the model
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: Option<PathBuf>,
    /// The tokenizer.model
    #[arg(long, value_name = "F", value_parser = paths::parser())]
    tokenizer: Option<PathBuf>,
    /// Address of the page and the HTTP routes
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Address of gRPC
    #[arg(long, value_name = "ADDR")]
    grpc: Option<String>,
    /// Allow addresses that others can reach without a secret
    #[arg(long)]
    insecure: bool,
    /// Names of the workers to wait for before the first plan [default: those described in the configuration]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', hide = true)]
    expect: Option<Vec<String>>,
    /// The first line of standard input is the cluster's secret
    #[arg(long, hide = true)]
    secret_stdin: bool,
    /// End when standard input closes
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
}

/// Runs `coordinator` until it is told to end.
///
/// # Errors
/// [`CliError`] with the exit code of what failed.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let mut config = args
        .config
        .layers()
        .path_flag("model.path", args.model.as_deref())
        .path_flag("model.tokenizer", args.tokenizer.as_deref())
        .flag("coordinator.grpc", args.grpc.as_ref())
        .flag("coordinator.http", args.http.as_ref())
        .load()?;
    if args.secret_stdin {
        config.secret = SecretText::from_stdin()?;
    }
    for (key, address) in [("coordinator.grpc", config.coordinator.grpc), ("coordinator.http", config.coordinator.http)]
    {
        config.check_exposure(key, &address, args.insecure)?;
    }
    let stdin = Stdin::watched(args.exit_with_stdin)?;
    let model = Model::open(&config.model.path)?;
    let tokenizer = tokenizer::of_model(&config.model, &model)?.map(Arc::new);
    let facts = ModelFacts::of(&model)?;
    let settings = settings(&config, args.expect.as_deref(), model.config().num_hidden_layers)?;
    let machine = doctor::machine::describer(Some(config.model.path.clone()));
    common::serve(THREADS, &stdin, |shutdown| async move {
        let coordinator = Coordinator::bind(settings, facts, tokenizer, Arc::new(Tcp)).await.map_err(explain)?;
        let coordinator = coordinator.on_machine(machine);
        announce(&coordinator).await?;
        coordinator.serve(shutdown).await.map_err(explain)
    })
}

fn settings(config: &Config, expect: Option<&[String]>, num_layers: u32) -> Result<Settings, CliError> {
    let names = match expect {
        Some(names) => names.to_vec(),
        None => config.workers.iter().map(|worker| worker.name.clone()).collect(),
    };
    for name in &names {
        let refuse =
            |bad: BadName| CliError::usage(format!("{:?} is no worker's name", bad.found)).at("--expect").because(bad);
        name.parse::<WorkerName>().map_err(refuse)?;
    }
    let pins = plan::pins(config, &names, num_layers);
    let expected = names.into_iter().zip(pins).map(|(name, layers)| ExpectedWorker { name, layers }).collect();
    let (coordinator, limits) = (&config.coordinator, &config.limits);
    let (grpc_connections, http_connections) = descriptors::of_coordinator(descriptors::raise());
    Ok(Settings {
        name: config.cluster.name.clone(),
        grpc: coordinator.grpc.to_string(),
        http: Some(coordinator.http.to_string()),
        http_names: http_names(config),
        grpc_connections,
        http_connections,
        secret: config.secret.to_secret(),
        link_key: config::link_key()?,
        generation: machine::generation(),
        expected,
        replan_after: coordinator.replan_after,
        objective: plan::objective(config.plan.objective),
        kv_tokens: u64::from(config.kv.tokens),
        prefill_chunk_tokens: limits.prefill_chunk_tokens,
        max_batch_tokens: limits.max_batch_tokens as usize,
        max_batch_sequences: limits.max_batch_sequences as usize,
        max_running: limits.max_running as usize,
        max_waiting: limits.max_waiting as usize,
        limits: RequestLimits {
            request_timeout: limits.request_timeout,
            longest_request: limits.longest_request,
            max_prompt_bytes: usize::try_from(limits.max_prompt_bytes.0).unwrap_or(usize::MAX),
        },
    })
}

/// Names by which the page may be called: the machine's own, that of `advertise`, and those of the configuration.
fn http_names(config: &Config) -> Vec<String> {
    let coordinator = &config.coordinator;
    let advertised = coordinator.advertise.as_ref().map(Address::host);
    let mut names = host_names::of_this_machine();
    names.extend(advertised.map(str::to_owned));
    names.extend(coordinator.http_names.iter().cloned());
    names
}

/// Says where it listens, for people and for programs.
async fn announce(coordinator: &Coordinator) -> Result<(), CliError> {
    let (grpc, http) = (coordinator.grpc_address(), coordinator.http_address());
    info!(%grpc, http = http.map(tracing::field::display), "coordinator listens");
    let line = json!({"grpc": grpc.to_string(), "http": http.map(|address| address.to_string())});
    print_aside(format!("{line}\n")).await
}

fn explain(error: CoordinatorError) -> CliError {
    match error {
        CoordinatorError::Listen { what, address, source } if source.kind() == io::ErrorKind::AddrInUse => {
            CliError::failed(format!("{what} {address} is in use"))
                .because(source)
                .advise("end what uses it, or choose another one with --grpc or --http")
        }
        CoordinatorError::Listen { what, address, source } => {
            CliError::failed(format!("{what} {address} cannot be opened")).because(source)
        }
        error => CliError::failed("the coordinator failed").because(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Layers, WorkerSection};

    #[test]
    fn expected_workers_come_from_the_flag_or_the_file_with_their_pins() {
        let mut config = Layers { no_file: true, ..Layers::default() }.load().unwrap();
        config.workers = vec![WorkerSection { layers: Some(0..9), ..WorkerSection::named("w1") }];
        let of = |expect: Option<&[String]>| {
            let expected = settings(&config, expect, 64).unwrap().expected;
            expected.into_iter().map(|worker| (worker.name, worker.layers)).collect::<Vec<_>>()
        };
        assert_eq!(of(None), [("w1".to_owned(), Some(0..9))]);
        assert_eq!(of(Some(&["w1".into(), "w2".into()])), [("w1".to_owned(), Some(0..9)), ("w2".to_owned(), None)]);
        assert!(settings(&config, Some(&["W 2".to_owned()]), 64).is_err());
    }

    #[test]
    fn the_page_is_called_by_the_names_of_the_configuration() {
        let mut config = Layers { no_file: true, ..Layers::default() }.load().unwrap();
        config.coordinator.advertise = "[fd00::7]:7070".parse().ok();
        config.coordinator.http_names = vec!["grok.example".into()];
        let names = http_names(&config);
        assert!(names.ends_with(&["fd00::7".to_owned(), "grok.example".to_owned()]), "{names:?}");
    }

    #[test]
    fn a_port_in_use_is_named() {
        let source = io::Error::from(io::ErrorKind::AddrInUse);
        let error = explain(CoordinatorError::Listen { what: "gRPC address", address: "127.0.0.1:1".into(), source });
        assert!(error.to_string().contains("127.0.0.1:1 is in use"), "{error}");
    }
}

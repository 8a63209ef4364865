//! One stage of the pipeline: joins a cluster, loads the layers that it is assigned, and turns frames into frames.
//!
//! The coordinator decides, a worker computes: it holds weights and KV bytes, knows nothing of requests, and answers the same
//! frame with the same bytes. Device, executor, listener and connector are given to it, so that a whole cluster can run inside a
//! test with simulated time and network.
//!
//! A frame's way: [`service`] queues it, [`sequences`] checks it, [`runner`] has it computed by the [`executor`], and hands the
//! result to the next stage, or draws tokens ([`sampler`]) in the last one. [`controller`] follows assignments, [`probe`]
//! measures links where the coordinator wants to know, [`membership`] talks with the coordinator.

use std::sync::{Arc, Mutex, PoisonError};

use grokpipe_proto::{
    address::Address,
    max_frame_bytes,
    probe::ProbePort,
    secret::Secret,
    transport::{self, ConnectionLimits, Keepalive, Net},
    v1::pipeline_service_server::PipelineServiceServer,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;

pub mod address;
pub mod controller;
pub mod executor;
pub mod loader;
pub mod membership;
pub mod probe;
pub mod runner;
pub mod sampler;
pub mod sequences;
pub mod service;
pub mod stats;

use executor::Executor;
use loader::StageLoader;

/// Most tokens in a frame of any assignment.
const BATCH_TOKENS_MAX: usize = 65_536;
/// Answers that may wait for a previous stage to read them.
const ANSWERS: usize = 4096;

/// What a worker is started with. Checked by whoever made it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The coordinator's gRPC address, `host:port`.
    pub coordinator: String,
    /// Unique in the cluster.
    pub name: String,
    /// Address to listen on for frames; port 0 lets the system choose.
    pub listen: String,
    /// Address that others reach it by, if it is not to find that out by itself; port 0 stands for the port it listens on.
    pub advertise: Option<Address>,
    /// How many connections its port takes.
    pub connections: ConnectionLimits,
    /// The cluster's secret.
    pub secret: Secret,
    /// Larger than that of every earlier process of this name: milliseconds since 1970 will do.
    pub generation: u64,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The port for frames could not be opened.
    #[error("{address}: {source}")]
    Listen {
        /// Which address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nobody could reach this worker there.
    #[error("expected an address that other machines can dial, found {found}, {why}")]
    Advertise {
        /// The address.
        found: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The coordinator does not want this worker.
    #[error("coordinator {coordinator} refused this worker: {said}")]
    Refused {
        /// Which coordinator.
        coordinator: String,
        /// Its reason.
        said: String,
    },
    /// The port for frames failed.
    #[error("the port for frames failed: {0}")]
    Serve(tonic::transport::Error),
}

/// Runs a worker until `shutdown`, or until it is refused for good.
///
/// # Errors
/// [`WorkerError`].
pub async fn run(
    settings: Settings,
    net: Arc<dyn Net>,
    executor: Arc<dyn Executor>,
    loader: Box<dyn StageLoader>,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let listening = net
        .bind(settings.listen.clone())
        .await
        .map_err(|source| WorkerError::Listen { address: settings.listen.clone(), source })?;
    let own = address::OwnAddress { advertise: settings.advertise.clone(), listening: listening.address };
    let connections = listening.connections(settings.connections);
    let (device, config) = (loader.device().clone(), loader.config().clone());
    let model_digest = loader.model_digest().to_owned();
    let machine = loader.describe_machine();
    let loader = Arc::new(Mutex::new(loader));
    let active = service::ActiveStage::default();
    let stats = Arc::new(stats::Stats::default());
    let (held_tx, held_rx) = watch::channel(None);
    let (orders_tx, orders_rx) = watch::channel(controller::Order::default());
    let (reports_tx, reports_rx) = mpsc::channel(64);
    let (probes_tx, probes_rx) = mpsc::channel(probe::MOST_WAITING);

    let pipeline = service::Pipeline {
        worker: settings.name.clone(),
        active: active.clone(),
        max_answers: ANSWERS,
        shutdown: shutdown.clone(),
    };
    let controller = controller::Controller {
        worker: settings.name.clone(),
        generation: settings.generation,
        coordinator: settings.coordinator.clone(),
        secret: settings.secret.clone(),
        net: Arc::clone(&net),
        executor: Arc::clone(&executor),
        loader: Arc::clone(&loader),
        config: config.clone(),
        model_digest: model_digest.clone(),
        active,
        stats: Arc::clone(&stats),
        held_layers: held_tx,
        reports: reports_tx,
    };
    let prober = probe::Prober {
        coordinator: settings.coordinator.clone(),
        secret: settings.secret.clone(),
        net: Arc::clone(&net),
        machine,
        reports: controller.reports.clone(),
    };
    let probed = ProbePort::service(settings.name.clone());
    let frames = PipelineServiceServer::new(pipeline)
        .max_decoding_message_size(max_frame_bytes(BATCH_TOKENS_MAX, config.hidden_size));
    let secret = settings.secret.clone();
    let membership = membership::Membership {
        settings,
        net,
        device,
        model_digest,
        own,
        stats,
        held_layers: held_rx,
        orders: orders_tx,
        probes: probes_tx,
        reports: reports_rx,
    };

    // All four end with this token, whichever ends first and why.
    let ending = shutdown.child_token();
    let serving = transport::server(Keepalive::Cluster)
        .add_service(InterceptedService::new(frames, secret.require()))
        .add_service(InterceptedService::new(probed, secret.require()))
        .serve_with_incoming_shutdown(connections, ending.clone().cancelled_owned());
    let serving = async {
        let served = serving.await.map_err(WorkerError::Serve);
        ending.cancel();
        served
    };
    let belonging = async {
        let ended = membership.run(ending.clone()).await;
        ending.cancel();
        ended
    };
    let (served, belonged, (), ()) = tokio::join!(
        serving,
        belonging,
        controller.run(orders_rx, ending.clone()),
        prober.run(probes_rx, ending.clone())
    );
    drop(loader.lock().unwrap_or_else(PoisonError::into_inner));
    belonged.and(served)
}

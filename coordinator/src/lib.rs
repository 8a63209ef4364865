//! The coordinator decides: which worker runs which layers, which sequences are in the next micro-batch, when a request ends.
//!
//! It loads no weights and computes nothing. Decisions are made in pure modules without clocks and sockets: [`planner`],
//! [`scheduler`], [`cluster`], [`session`]; the [`engine`] is the one task that owns their state and connects them with the
//! outside: [`api`] (gRPC), [`http`] (health, snapshot, page). [`diagnosis`] examines machines and links.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use grokpipe_model::{footprint, tokenizer::Tokenizer};
use grokpipe_proto::{
    DESCRIPTORS, bounds,
    link_token::LinkKey,
    max_frame_bytes,
    probe::{DescribeMachine, ProbePort},
    secret::Secret,
    transport::{self, ConnectionLimits, Keepalive, Net, Peer},
    v1::{
        cluster_service_server::ClusterServiceServer, inference_service_server::InferenceServiceServer,
        membership_service_server::MembershipServiceServer, result_service_server::ResultServiceServer,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request,
    service::{Interceptor, interceptor::InterceptedService},
};

pub mod api;
pub mod cluster;
pub mod deadline;
pub mod diagnosis;
pub mod engine;
pub mod facts;
pub mod frames;
pub mod http;
pub mod pipeline;
pub mod planner;
pub mod request;
pub mod scheduler;
pub mod session;
pub mod text;

use api::{
    intake::{self, Intake, Received},
    timed::Timed,
};
use cluster::{Cluster, ClusterSettings, ExpectedWorker};
use engine::{Engine, EngineSettings, Handle};
use facts::{ModelFacts, PlanRequirements};
use pipeline::PipelineSettings;
use planner::Objective;
use request::check::{Checker, RequestLimits};
use scheduler::SchedulerConfig;
use text::TextDesk;

/// Most unanswered frames on a link: twice the stages of the largest sensible cluster.
pub const FRAMES_IN_FLIGHT_MAX: usize = 64;
/// Time that connections get to end once the coordinator does.
const GRACE: Duration = Duration::from_secs(2);

/// What a coordinator is started with. Checked by whoever made it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the cluster, for people.
    pub name: String,
    /// Address for gRPC; port 0 lets the system choose.
    pub grpc: String,
    /// Address for HTTP, none for no HTTP.
    pub http: Option<String>,
    /// Names by which HTTP may be called, besides loopback and the address that it is bound to.
    pub http_names: Vec<String>,
    /// How many connections gRPC takes.
    pub grpc_connections: ConnectionLimits,
    /// How many connections HTTP takes.
    pub http_connections: ConnectionLimits,
    /// The cluster's secret.
    pub secret: Secret,
    /// What the tokens of links are derived from: random bytes of this process.
    pub link_key: LinkKey,
    /// Larger than that of every earlier coordinator of this cluster: milliseconds since 1970 will do.
    pub generation: u64,
    /// Workers to wait for before the first plan.
    pub expected: Vec<ExpectedWorker>,
    /// How long a lost or missing worker is waited for.
    pub replan_after: Duration,
    /// What a plan minimises.
    pub objective: Objective,
    /// Tokens in the KV pool.
    pub kv_tokens: u64,
    /// Tokens in a chunk of prefill.
    pub prefill_chunk_tokens: u32,
    /// Most tokens in a frame.
    pub max_batch_tokens: usize,
    /// Most sequences in a micro-batch.
    pub max_batch_sequences: usize,
    /// Most requests that run.
    pub max_running: usize,
    /// Most requests that wait.
    pub max_waiting: usize,
    /// What a request may ask for.
    pub limits: RequestLimits,
}

/// Why a coordinator could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// A port could not be opened.
    #[error("{what} {address}: {source}")]
    Listen {
        /// Which port.
        what: &'static str,
        /// Which address.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Reflection could not read the descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The gRPC port failed.
    #[error("the gRPC port failed: {0}")]
    Grpc(tonic::transport::Error),
    /// The HTTP port failed.
    #[error("the HTTP port failed: {0}")]
    Http(io::Error),
}

/// A coordinator whose ports are open.
pub struct Coordinator {
    grpc: transport::Listening,
    http: Option<tokio::net::TcpListener>,
    settings: Settings,
    facts: ModelFacts,
    tokenizer: Option<Arc<Tokenizer>>,
    net: Arc<dyn Net>,
    machine: Option<DescribeMachine>,
}

impl Coordinator {
    /// Opens the ports; nothing is served yet.
    ///
    /// # Errors
    /// [`CoordinatorError::Listen`].
    pub async fn bind(
        settings: Settings,
        facts: ModelFacts,
        tokenizer: Option<Arc<Tokenizer>>,
        net: Arc<dyn Net>,
    ) -> Result<Self, CoordinatorError> {
        let failed = |what, address: &str| {
            let address = address.to_owned();
            move |source| CoordinatorError::Listen { what, address, source }
        };
        let grpc = net.bind(settings.grpc.clone()).await.map_err(failed("gRPC address", &settings.grpc))?;
        let http = match &settings.http {
            None => None,
            Some(address) => {
                Some(tokio::net::TcpListener::bind(address).await.map_err(failed("HTTP address", address))?)
            }
        };
        Ok(Self { grpc, http, settings, facts, tokenizer, net, machine: None })
    }

    /// With a way to describe this machine, for a diagnosis of the cluster.
    #[must_use]
    pub fn on_machine(self, machine: DescribeMachine) -> Self {
        Self { machine: Some(machine), ..self }
    }

    /// Where gRPC listens.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc.address
    }

    /// Where HTTP listens.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// [`CoordinatorError`] when a port fails.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), CoordinatorError> {
        let Self { grpc, http, settings, facts, tokenizer, net, machine } = self;
        let config = Arc::new(facts.config.clone());
        let (engine, handle, inbox) = engine(&settings, &facts, tokenizer.clone(), Arc::clone(&net));
        let ending = shutdown.child_token();
        let diagnosis = diagnosis::Diagnosis {
            desk: diagnosis::Desk::default(),
            net,
            secret: settings.secret.clone(),
            snapshot: handle.snapshot(),
            machine,
            shutdown: ending.clone(),
            one: Arc::new(tokio::sync::Semaphore::new(1)),
        };

        let (health_reporter, health) = tonic_health::server::health_reporter();
        // Both versions: some clients ask the one, some the other.
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let reflection_v1 = reflection().build_v1()?;
        let reflection_v1alpha = reflection().build_v1alpha()?;
        let membership = api::membership::Membership {
            events: handle.events(),
            desk: diagnosis.desk.clone(),
            shutdown: ending.clone(),
            connections: Arc::default(),
        };
        let membership =
            MembershipServiceServer::new(membership).max_decoding_message_size(bounds::MEMBERSHIP_MESSAGE_BYTES_MAX);
        let results = api::results::Results {
            engine: handle.clone(),
            link_key: settings.link_key.clone(),
            shutdown: ending.clone(),
        };
        let (context, limits) = (config.max_position_embeddings, settings.limits);
        let text = tokenizer.map(|tokenizer| Arc::new(TextDesk::new(tokenizer, context, limits.max_prompt_bytes)));
        let pool_tokens = usize::try_from(settings.kv_tokens).unwrap_or(usize::MAX);
        let checker = Checker { config, text, pool_tokens, limits };
        let inference = api::inference::Inference { engine: handle.clone(), checker };
        let inference =
            InferenceServiceServer::new(inference).max_decoding_message_size(limits.max_request_bytes(context));
        let cluster_service = ClusterServiceServer::new(api::cluster::ClusterApi { engine: handle.clone(), diagnosis });
        let intake = Intake::new(intake::ROOM);
        let serving = transport::server(Keepalive::Client)
            .add_service(health)
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha)
            .add_service(InterceptedService::new(
                membership,
                reporting_refusals(settings.secret.require(), handle.clone()),
            ))
            .add_service(InterceptedService::new(ResultServiceServer::new(results), settings.secret.require()))
            .add_service(InterceptedService::new(ProbePort::service(""), settings.secret.require()))
            .add_service(Received::new(Timed(inference), &intake))
            .add_service(Received::new(Timed(cluster_service), &intake))
            .serve_with_incoming_shutdown(
                grpc.connections(settings.grpc_connections),
                ending.clone().cancelled_owned(),
            );

        // Streams end with the engine; a client that holds its connection all the same is not waited for.
        let overdue = async {
            ending.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        let serving = async {
            tokio::select! {
                served = serving => served.map_err(CoordinatorError::Grpc),
                () = overdue => Ok(()),
            }
        };
        let serving = ends(serving, &ending);
        let http =
            ends(serve_http(http, &settings.http_names, settings.http_connections, &handle, ending.clone()), &ending);
        let health = report_health(handle.clone(), health_reporter, ending.clone());
        let (served, http, (), ()) = tokio::join!(serving, http, health, engine.run(inbox, ending.clone()));
        served.and(http)
    }
}

/// `guard`, which also reports each refusal as an event: whoever waits for that worker looks here, not into its log.
fn reporting_refusals(mut guard: impl Interceptor + Clone, engine: Handle) -> impl Interceptor + Clone {
    move |request: Request<()>| {
        let peer = request.extensions().get::<Peer>().map(|peer| peer.address.ip().to_string());
        guard.call(request).inspect_err(|refusal| {
            let (from, reason) = (peer.unwrap_or_else(|| "an unknown address".into()), refusal.message().to_owned());
            engine.try_send(engine::Event::Refused { from, reason });
        })
    }
}

/// Ends everything else when `part` ends.
async fn ends<T>(part: impl Future<Output = T>, ending: &CancellationToken) -> T {
    let result = part.await;
    ending.cancel();
    result
}

fn engine(
    settings: &Settings,
    facts: &ModelFacts,
    tokenizer: Option<Arc<Tokenizer>>,
    net: Arc<dyn Net>,
) -> (Engine, Handle, tokio::sync::mpsc::Receiver<engine::Event>) {
    // Workers and scheduler count in the same blocks.
    let kv_blocks = footprint::kv_blocks(settings.kv_tokens);
    let cluster = Cluster::new(
        ClusterSettings {
            name: settings.name.clone(),
            generation: settings.generation.into(),
            expected: settings.expected.clone(),
            replan_after: settings.replan_after,
            requirements: PlanRequirements {
                kv_tokens: settings.kv_tokens,
                max_batch_tokens: settings.max_batch_tokens,
                batch_tokens: 1,
                objective: settings.objective,
            },
            kv_blocks,
            max_frames_in_flight: FRAMES_IN_FLIGHT_MAX as u32,
            link_key: settings.link_key.clone(),
        },
        facts.clone(),
    );
    let engine_settings = EngineSettings {
        scheduler: SchedulerConfig {
            stages: 1,
            kv_blocks,
            block_tokens: footprint::KV_BLOCK_TOKENS,
            prefill_chunk_tokens: settings.prefill_chunk_tokens,
            max_batch_tokens: settings.max_batch_tokens,
            max_context: facts.config.max_position_embeddings as u32,
            max_batch_sequences: settings.max_batch_sequences,
            max_waiting: settings.max_waiting,
            max_running: settings.max_running,
        },
        model: facts.config.name.clone(),
        proof_token: u32::from(facts.config.pad_token_id == 0),
    };
    let pipeline = PipelineSettings {
        secret: settings.secret.clone(),
        max_frame_bytes: max_frame_bytes(settings.max_batch_tokens, facts.config.hidden_size),
        max_frames_in_flight: FRAMES_IN_FLIGHT_MAX,
        generation: settings.generation.into(),
    };
    let open_pipeline =
        move |first, events, stop| pipeline::open(Arc::clone(&net), pipeline.clone(), first, events, stop);
    Engine::new(engine_settings, Box::new(open_pipeline), cluster, tokenizer)
}

async fn serve_http(
    listener: Option<tokio::net::TcpListener>,
    names: &[String],
    limits: ConnectionLimits,
    engine: &Handle,
    ending: CancellationToken,
) -> Result<(), CoordinatorError> {
    let Some(listener) = listener else {
        ending.cancelled().await;
        return Ok(());
    };
    let bound = listener.local_addr().map_err(CoordinatorError::Http)?;
    let hosts = http::AllowedHosts::bound_to(bound).and(names);
    let state = http::HttpState::new(engine.snapshot(), hosts);
    http::serve(listener, state, limits, ending).await.map_err(CoordinatorError::Http)
}

/// gRPC health: serving only while all layers are covered and loaded, for the service and for the empty name that
/// probes ask by default.
async fn report_health(engine: Handle, reporter: tonic_health::server::HealthReporter, ending: CancellationToken) {
    use tonic_health::ServingStatus;
    let mut snapshot = engine.snapshot();
    let service = <InferenceServiceServer<api::inference::Inference> as tonic::server::NamedService>::NAME;
    let mut known = None;
    loop {
        let serving = snapshot.borrow_and_update().verdict().serving;
        if known != Some(serving) {
            known = Some(serving);
            let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
            for name in ["", service] {
                reporter.set_service_status(name, status).await;
            }
        }
        tokio::select! {
            () = ending.cancelled() => break,
            changed = snapshot.changed() => if changed.is_err() {
                break;
            },
        }
    }
    for name in ["", service] {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
}

//! A whole cluster inside one test: real coordinator and workers, simulated network and time, a small model made from a seed.
//!
//! Computations run inline and time stands still while they do, so that a run is repeated exactly by its seed.

use std::{collections::BTreeMap, io, net::SocketAddr, ops::Range, sync::Arc, time::Duration};

use grokpipe_coordinator::{
    Coordinator, Settings as CoordinatorSettings, cluster::ExpectedWorker, facts::ModelFacts, planner::Objective,
    request::check::RequestLimits,
};
use grokpipe_kernels::{
    Batch, CpuBackend, KernelError, Precision, Row, Stage, StageModel, StageOptions, StepInput, StepOutput,
    StepOverhead, SyntheticWeights,
};
use grokpipe_model::{ModelConfig, WeightSource};
use grokpipe_proto::{
    link_token::LinkKey,
    secret::Secret,
    transport::{BoxFuture, BoxIo, ConnectionLimits, Listening, Net},
    v1::{
        GenerateRequest, GenerateResponse, SamplingOptions, TokenIds, generate_request::Prompt,
        generate_response::Event,
    },
};
use grokpipe_worker::{
    executor::InlineExecutor,
    loader::{DeviceFacts, LoadRequest, StageLoader},
};
use tokio_util::sync::CancellationToken;

/// Simulated sockets; every host of a simulation has the same.
#[derive(Clone, Copy, Debug)]
pub struct SimulatedNet;

impl Net for SimulatedNet {
    fn connect(&self, address: String) -> BoxFuture<io::Result<BoxIo>> {
        Box::pin(async move { Ok(BoxIo::new(turmoil::net::TcpStream::connect(address).await?)) })
    }

    fn bind(&self, address: String) -> BoxFuture<io::Result<Listening>> {
        Box::pin(async move {
            let listener = turmoil::net::TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            let (connections, incoming) = tokio::sync::mpsc::channel(16);
            tokio::spawn(async move {
                loop {
                    let accepted = listener.accept().await.map(|(stream, peer)| (BoxIo::new(stream), peer));
                    if connections.send(accepted).await.is_err() {
                        return;
                    }
                }
            });
            Ok(Listening { address, incoming: Box::pin(tokio_stream::wrappers::ReceiverStream::new(incoming)) })
        })
    }
}

/// A model of a few thousand numbers, of Grok-1's architecture.
pub fn small_config(layers: u32) -> ModelConfig {
    ModelConfig {
        name: "small".into(),
        vocab_size: 97,
        hidden_size: 32,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        intermediate_size: 24,
        max_position_embeddings: 256,
        ..ModelConfig::grok_1()
    }
}

/// What a coordinator knows of [`small_config`].
pub fn small_facts(config: &ModelConfig) -> ModelFacts {
    ModelFacts::new(config.clone(), "small".into(), vec![64 << 10; config.num_hidden_layers as usize])
}

/// Loads layers of a seeded model on the CPU.
pub struct SmallLoader {
    config: ModelConfig,
    weights: Arc<dyn WeightSource>,
    device: DeviceFacts,
}

impl SmallLoader {
    /// A loader; equal seeds give equal models.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        let weights = Arc::new(SyntheticWeights::new(config.clone(), seed));
        let device = DeviceFacts {
            name: "simulated".into(),
            fingerprint: "simulated/1".into(),
            memory_bytes: 1 << 30,
            read_bandwidth: 1e10,
            flop_rate: 1e11,
            format_rates: BTreeMap::new(),
            overhead: StepOverhead::default(),
            draw_seconds: 0.0,
            notes: Vec::new(),
        };
        Self { config, weights, device }
    }

    /// A stage over these layers.
    ///
    /// # Errors
    /// What the device says.
    pub fn stage(&self, layers: Range<u32>, kv_blocks: u32, max_rows: usize) -> Result<Box<dyn Stage>, KernelError> {
        let options = StageOptions { kv_blocks, max_rows, ..StageOptions::default() };
        let stage = StageModel::load(
            CpuBackend::new(1, Precision::Exact)?,
            &self.config,
            Arc::clone(&self.weights),
            layers,
            options,
            &mut |_done, _total| {},
        )?;
        Ok(Box::new(stage))
    }
}

impl StageLoader for SmallLoader {
    fn device(&self) -> &DeviceFacts {
        &self.device
    }
    fn config(&self) -> &ModelConfig {
        &self.config
    }
    fn model_digest(&self) -> &str {
        "small"
    }
    fn load(
        &mut self,
        request: &LoadRequest,
        _progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn Stage>, KernelError> {
        self.stage(request.layers.clone(), request.kv_blocks, request.max_batch_tokens)
    }
}

/// The address of a simulated host's port.
pub fn address(host: &str, port: u16) -> String {
    SocketAddr::new(turmoil::lookup(host), port).to_string()
}

/// Port of the simulated coordinator.
pub const GRPC_PORT: u16 = 7070;
const DATA_PORT: u16 = 7100;

/// What the tokens of links are derived from in a test.
pub fn link_key() -> LinkKey {
    LinkKey::new([7; 32])
}

/// Settings of a coordinator that expects the workers w1, w2, …
pub fn coordinator_settings(grpc: String, secret: Secret, workers: usize) -> CoordinatorSettings {
    CoordinatorSettings {
        name: "test".into(),
        grpc,
        http: None,
        http_names: Vec::new(),
        grpc_connections: ConnectionLimits::default(),
        http_connections: ConnectionLimits::default(),
        secret,
        link_key: link_key(),
        generation: 1,
        expected: (1..=workers).map(|index| ExpectedWorker { name: format!("w{index}"), layers: None }).collect(),
        replan_after: Duration::from_secs(30),
        objective: Objective::Throughput,
        kv_tokens: 2048,
        prefill_chunk_tokens: 16,
        max_batch_tokens: 64,
        max_batch_sequences: 8,
        max_running: 16,
        max_waiting: 16,
        limits: RequestLimits {
            request_timeout: Duration::from_secs(60),
            longest_request: Duration::from_secs(600),
            max_prompt_bytes: 1 << 20,
        },
    }
}

/// Runs the coordinator on its simulated host, for ever.
///
/// # Errors
/// Whatever ends it.
pub async fn run_coordinator(config: ModelConfig, workers: usize, secret: Secret) -> turmoil::Result {
    let settings = coordinator_settings(format!("0.0.0.0:{GRPC_PORT}"), secret, workers);
    let coordinator = Coordinator::bind(settings, small_facts(&config), None, Arc::new(SimulatedNet)).await?;
    coordinator.serve(CancellationToken::new()).await?;
    Ok(())
}

/// Settings of the worker w1, w2, … on its simulated host. `incarnation` counts its restarts.
pub fn worker_settings(index: usize, incarnation: u64, secret: Secret) -> grokpipe_worker::Settings {
    let name = format!("w{index}");
    grokpipe_worker::Settings {
        coordinator: address("coordinator", GRPC_PORT),
        listen: format!("0.0.0.0:{DATA_PORT}"),
        advertise: address(&name, DATA_PORT).parse().ok(),
        name,
        connections: ConnectionLimits::default(),
        secret,
        generation: 10 * incarnation + index as u64,
    }
}

/// Runs a worker on its simulated host, for ever. `incarnation` counts its restarts.
///
/// # Errors
/// Whatever ends it.
pub async fn run_worker(
    config: ModelConfig,
    seed: u64,
    index: usize,
    incarnation: u64,
    secret: Secret,
) -> turmoil::Result {
    let settings = worker_settings(index, incarnation, secret);
    let loader = Box::new(SmallLoader::new(config, seed));
    let (net, executor) = (Arc::new(SimulatedNet), Arc::new(InlineExecutor));
    grokpipe_worker::run(settings, net, executor, loader, CancellationToken::new()).await?;
    Ok(())
}

/// A request for this many tokens after these.
pub fn request(prompt: &[u32], max_tokens: u32, sampling: SamplingOptions) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt.to_vec() })),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

/// The token of a stream's event; panics when indices have gaps.
pub fn token_of(response: GenerateResponse, index: usize) -> Option<u32> {
    match response.event {
        Some(Event::Token(token)) => {
            assert_eq!(token.index as usize, index, "indices count up without gaps");
            Some(token.token_id)
        }
        _ => None,
    }
}

/// The greedy continuation of `prompt` by one stage that holds all layers: what every split must give.
///
/// # Errors
/// What the device says.
pub fn reference_tokens(
    config: &ModelConfig,
    seed: u64,
    prompt: &[u32],
    count: usize,
) -> Result<Vec<u32>, KernelError> {
    let loader = SmallLoader::new(config.clone(), seed);
    let mut stage = loader.stage(0..config.num_hidden_layers, 16, 256)?;
    let mut ids = prompt.to_vec();
    let mut fed = 0;
    while ids.len() < prompt.len() + count {
        let rows = (fed..ids.len()).map(|position| Row { position: position as u32, table_offset: 0, attended: true });
        let batch = Batch { rows: rows.collect(), block_tables: (0..16).collect() };
        let last = (batch.rows.len() - 1) as u32;
        let StepOutput::Logits(logits) = stage.run(&batch, StepInput::TokenIds(&ids[fed..]), &[last])? else {
            unreachable!("all layers and the head are in this stage")
        };
        fed = ids.len();
        let greedy = grokpipe_worker::sampler::Sampling::greedy();
        let drawn = grokpipe_worker::sampler::draw(&logits, &greedy, 0, fed as u32 - 1);
        ids.push(drawn.expect("finite logits").token_id);
    }
    Ok(ids[prompt.len()..].to_vec())
}

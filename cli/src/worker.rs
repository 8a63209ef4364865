//! `grokpipe worker`: one stage. Opens the device and the model, and hands both to the worker library.
//!
//! Decides what a worker offers: its device, threads and memory. Layers come from the coordinator.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use grokpipe_kernels::{
    CpuBackend, Device, KernelError, MemoryNeed, Precision, Prefill, Stage, StageModel, StageOptions,
    available_memory_bytes, select_device,
};
use grokpipe_model::{MatrixSpec, ModelConfig, layer_matrices};
use grokpipe_proto::{
    address::{Address, socket_addr},
    ids::WorkerName,
    transport::Tcp,
};
use grokpipe_worker::{
    Settings, WorkerError,
    executor::ThreadExecutor,
    loader::{DeviceFacts, LoadRequest, StageLoader},
};
use tracing::{info, warn};

use crate::{
    claim::{self, Claim, Claimed},
    common::{self, ConfigArgs, parse_device},
    config::{ByteSize, SecretText, WorkerSection, parse_precision, parse_prefill},
    descriptors,
    ending::Stdin,
    error::CliError,
    listen, machine, paths,
    rates::{self, Rates},
    weights::{SyntheticArgs, Weights},
};

/// Of the machine's free memory, what a worker leaves for everything that is not its layers.
const MARGIN_PART: u64 = 20;
const MARGIN_BYTES_MAX: u64 = 1 << 30;

/// Arguments of `worker`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// gRPC address of the coordinator
    #[arg(long, value_name = "ADDR")]
    coordinator: Address,
    /// Name within the cluster [default: this machine's name]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: Option<String>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder or file of the model
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: Option<PathBuf>,
    #[command(flatten)]
    synthetic: SyntheticArgs,
    /// auto, cpu, gpu, or gpu: and an index, a PCI address or a part of its name; see `grokpipe devices`
    #[arg(long, value_name = "D", value_parser = parse_device)]
    device: Option<String>,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// fast multiplies quantised weights by 8-bit inputs, exact by f32 [default: fast]
    #[arg(long, value_name = "exact|fast", value_parser = parse_precision)]
    precision: Option<Precision>,
    /// How a GPU computes steps of many rows: fast takes its tensor cores, where it has them [default: invariant]
    #[arg(long, value_name = "invariant|fast", value_parser = parse_prefill)]
    prefill: Option<Prefill>,
    /// Memory that it may fill, as 8GiB [default: what the device has free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<ByteSize>,
    /// Where it listens for the previous stage [default: a free port, on loopback if the coordinator is there, else everywhere]
    #[arg(long, value_name = "ADDR", value_parser = parse_listen)]
    listen: Option<SocketAddr>,
    /// Where others reach it, port 0 standing for the port it listens on [default: its own end of the way to the coordinator]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<Address>,
    /// Allow an address that others can reach without a secret
    #[arg(long)]
    insecure: bool,
    /// End when standard input closes
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
    /// The first line of standard input is the cluster's secret
    #[arg(long, hide = true)]
    secret_stdin: bool,
    /// Bytes of the machine's memory that are this worker's, if its device is the CPU and nothing else is said
    #[arg(long, value_name = "SIZE", hide = true, value_parser = parse_size)]
    memory_share: Option<ByteSize>,
}

fn parse_name(text: &str) -> Result<String, String> {
    text.parse().map(|name: WorkerName| name.to_string()).map_err(|_bad| format!("expected {}", WorkerName::EXPECTED))
}

fn parse_size(text: &str) -> Result<ByteSize, String> {
    ByteSize::parse(text).filter(|size| size.0 > 0).ok_or_else(|| "expected a size, as 8GiB".to_owned())
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    socket_addr(text).ok_or_else(|| "expected an IP address and a port, as 127.0.0.1:0 or [::]:0".to_owned())
}

/// Runs `worker` until it is told to end.
///
/// # Errors
/// [`CliError`] with the exit code of what failed.
pub(crate) fn run(args: Args) -> Result<(), CliError> {
    let mut config = args.config.layers().path_flag("model.path", args.model.as_deref()).load()?;
    if args.secret_stdin {
        config.secret = SecretText::from_stdin()?;
    }
    let stdin = Stdin::watched(args.exit_with_stdin)?;
    let name = args.name.clone().unwrap_or_else(machine::worker_name);
    let described = config.worker(&name);
    let listen = args.listen.or(described.listen).unwrap_or_else(|| listen::for_worker_of(&args.coordinator));
    config.check_exposure("the worker's address", &listen, args.insecure)?;
    let weights = match args.synthetic.weights()? {
        Some(weights) => weights,
        None => {
            let path = args.model.as_ref().or(described.model.as_ref()).unwrap_or(&config.model.path);
            let refuse = |why: String| CliError::usage("the model's path cannot be used").because(why);
            Weights::of_model(&paths::expanded(path).map_err(refuse)?)?
        }
    };
    let loader = DeviceLoader::open(&args, &name, &described, weights)?;
    let settings = Settings {
        coordinator: args.coordinator.to_string(),
        name,
        listen: listen.to_string(),
        advertise: args.advertise.or(described.advertise),
        connections: descriptors::of_worker(descriptors::raise()),
        secret: config.secret.to_secret(),
        generation: machine::generation(),
    };
    info!(
        worker = settings.name,
        device = loader.facts.name,
        memory = %ByteSize(loader.facts.memory_bytes),
        gigabytes_per_second = loader.facts.read_bandwidth / 1e9,
        coordinator = settings.coordinator,
        "worker starts"
    );
    let executor =
        ThreadExecutor::start().map_err(|error| CliError::failed("the device's thread cannot start").because(error))?;
    // One thread suffices for frames and heartbeats; the device has its own.
    common::serve(1, &stdin, |shutdown| async move {
        let ran = grokpipe_worker::run(settings, Arc::new(Tcp), Arc::new(executor), Box::new(loader), shutdown).await;
        ran.map_err(explain)
    })
}

fn explain(error: WorkerError) -> CliError {
    match error {
        WorkerError::Listen { address, source } => CliError::failed(format!("{address} cannot be opened"))
            .because(source)
            .advise("end what uses it, or choose another one with --listen"),
        WorkerError::Advertise { found, why } => CliError::usage("nobody could reach this worker")
            .at(format!("{found}, {why}"))
            .because("expected an address that other machines can dial")
            .advise("give --advertise HOST:0, or another --listen"),
        WorkerError::Refused { coordinator, said } => {
            CliError::failed("the coordinator refused this worker").at(coordinator).because(said)
        }
        error => CliError::failed("the worker failed").because(error),
    }
}

/// Opens the device anew for each stage: a device belongs to the stage that was loaded on it.
struct DeviceLoader {
    device: String,
    threads: usize,
    precision: Precision,
    prefill: Prefill,
    weights: Weights,
    facts: DeviceFacts,
    /// Held as long as the worker lives.
    _claim: Option<Claim>,
}

impl DeviceLoader {
    fn open(args: &Args, name: &str, described: &WorkerSection, weights: Weights) -> Result<Self, CliError> {
        let wanted = args.device.clone().unwrap_or_else(|| described.device.clone());
        let threads = args.threads.or(described.threads).unwrap_or_else(machine::cores) as usize;
        let precision = args.precision.or(described.precision).unwrap_or(Precision::Fast);
        let prefill = args.prefill.or(described.prefill).unwrap_or_default();
        let memory = args.memory.or(described.memory);
        let open = |device: &str| select_device(device, threads, precision, prefill);
        let Claimed { device: mut opened, name: device, claim } = claim::open(&wanted, memory.is_some(), name, open)?;
        let memory_bytes = memory_offered(memory, args.memory_share, opened.as_ref())?;
        // What a worker measures with is a part of what it may fill.
        let most_to_measure = memory_bytes / 2;
        // Plans count in stored bytes.
        let specs = rates::all_matrices(&weights)?;
        let memory_bytes = (memory_bytes as f64 / growth(&specs, opened.as_ref())) as u64;
        // First: kernels of a format that its driver refuses may change what the device says of itself.
        let Rates { read_bandwidth, flop_rate, formats: format_rates, overhead, draw_seconds } =
            Rates::measure(opened.as_mut(), &weights, &specs, most_to_measure)?;
        let invariance = opened.check_batch_invariance()?;
        let mut notes: Vec<String> = invariance.difference.into_iter().collect();
        for note in &notes {
            warn!(device = opened.info().name, note, "results depend on the batch: splits may change tokens");
        }
        if let Some(rows) = opened.info().invariant_below {
            let note = format!("prefill is fast, as asked for: steps of {rows} rows and more are not batch-invariant");
            info!(device = opened.info().name, "{note}");
            notes.push(note);
        }
        let facts = DeviceFacts {
            name: opened.info().name.clone(),
            fingerprint: opened.info().fingerprint.clone(),
            memory_bytes,
            read_bandwidth,
            flop_rate,
            format_rates,
            overhead,
            draw_seconds,
            notes,
        };
        // Run exactly what the hello reported, even for a stage that does not contain the format that the driver refused.
        let prefill = Prefill::of_fingerprint(&facts.fingerprint);
        Ok(Self { device, threads, precision, prefill, weights, facts, _claim: claim })
    }
}

/// How many times their stored bytes matrices take on this device; at least 1.
fn growth(specs: &[MatrixSpec], device: &dyn Device) -> f64 {
    let stored: u64 = specs.iter().map(MatrixSpec::weight_bytes).sum();
    let held: u64 = specs.iter().map(|spec| device.held_bytes(spec)).sum();
    (held as f64 / stored.max(1) as f64).max(1.0)
}

/// What was said; else what the device has; else, for the CPU and devices that do not tell, this machine's free memory.
fn memory_offered(said: Option<ByteSize>, share: Option<ByteSize>, device: &dyn Device) -> Result<u64, CliError> {
    let info = device.info();
    if let Some(said) = said {
        return Ok(said.0);
    }
    if info.is_gpu && info.memory_bytes > 0 {
        return Ok(info.memory_bytes);
    }
    if info.is_gpu {
        warn!(device = info.name, "the device does not tell its memory, taking this machine's; give --memory");
    }
    let here = share.map(|share| share.0).or_else(available_memory_bytes);
    // A system ends a process that takes the last of it, and a worker has more than its layers.
    here.map(|bytes| bytes - (bytes / MARGIN_PART).min(MARGIN_BYTES_MAX)).ok_or_else(|| {
        CliError::usage("the memory of this worker is not known")
            .because("this system does not say how much is free")
            .advise("give --memory, as 8GiB")
    })
}

impl DeviceLoader {
    fn options(request: &LoadRequest) -> StageOptions {
        StageOptions { kv_blocks: request.kv_blocks, max_rows: request.max_batch_tokens, ..StageOptions::default() }
    }

    fn need(&self, request: &LoadRequest) -> MemoryNeed {
        // Which backend counts does not matter here: the need is that of the model.
        let (config, weights) = (&self.weights.config, self.weights.source.as_ref());
        StageModel::<CpuBackend>::memory_needed(config, weights, request.layers.clone(), Self::options(request))
    }
}

impl StageLoader for DeviceLoader {
    fn device(&self) -> &DeviceFacts {
        &self.facts
    }

    fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    fn model_digest(&self) -> &str {
        &self.weights.digest
    }

    fn memory_needed(&self, request: &LoadRequest) -> Option<u64> {
        Some(self.need(request).total_bytes())
    }

    fn check_readable(&self, request: &LoadRequest) -> Result<(), KernelError> {
        for layer in request.layers.clone() {
            layer_matrices(self.weights.source.as_ref(), layer)?;
        }
        Ok(())
    }

    fn describe_machine(&self) -> Option<grokpipe_proto::probe::DescribeMachine> {
        Some(crate::doctor::machine::describer(self.weights.path.clone()))
    }

    fn load(
        &mut self,
        request: &LoadRequest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn Stage>, KernelError> {
        let layers = request.layers.clone();
        self.need(request).check(&layers, self.facts.memory_bytes, &self.facts.name)?;
        let weights = Arc::clone(&self.weights.source);
        let device = select_device(&self.device, self.threads, self.precision, self.prefill)?;
        device.load(&self.weights.config, weights, layers, Self::options(request), progress)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::error::Code;

    #[test]
    fn refusals_say_what_to_do() {
        let nowhere =
            explain(WorkerError::Advertise { found: "0.0.0.0:7101".into(), why: "no address of one machine" });
        assert_eq!(nowhere.code(), Code::Usage);
        assert!(nowhere.to_string().contains("--advertise"), "{nowhere}");
        let source = io::Error::from(io::ErrorKind::AddrInUse);
        let listen = explain(WorkerError::Listen { address: "127.0.0.1:7101".into(), source });
        assert!(listen.to_string().contains("127.0.0.1:7101") && listen.to_string().contains("--listen"), "{listen}");
    }

    #[test]
    fn sizes_names_and_addresses_of_flags_are_checked() {
        assert_eq!(parse_size("1KiB"), Ok(ByteSize(1024)));
        assert!(parse_size("0").is_err() && parse_size("lots").is_err());
        assert!(parse_name("w1").is_ok() && parse_name("W 1").is_err());
        assert!(parse_listen("127.0.0.1:0").is_ok() && parse_listen("7070").is_err());
    }
}

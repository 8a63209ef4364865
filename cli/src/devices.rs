//! `grokpipe devices`: what a worker of this machine may run on, and how each device is asked for.
//!
//! Also decides how the GPUs of a machine are dealt to its workers when one command starts them all.

use std::{path::Path, process::Stdio, time::Duration};

use grokpipe_kernels::{
    GpuAdapter, GpuChoice, GpuKind, Precision, available_memory_bytes, gpu_adapters, gpu_choice, select_device,
};
use serde::{Deserialize, Serialize};
use tokio::time;
use tracing::warn;

use crate::{
    claim::candidates,
    config::ByteSize,
    error::CliError,
    machine,
    text::{Table, print},
};

/// Time that another process gets to list the adapters: drivers open their devices for it.
const LISTED_WITHIN: Duration = Duration::from_secs(30);

/// Arguments of `devices`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What there is.
#[derive(Debug, Deserialize, Serialize)]
struct Devices {
    cpu: Cpu,
    gpus: Vec<Gpu>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Cpu {
    name: String,
    /// `None` where the system does not say.
    free_bytes: Option<u64>,
}

/// An adapter as `--json` has it.
#[derive(Debug, Deserialize, Serialize)]
struct Gpu {
    /// What `--device` takes.
    device: String,
    index: usize,
    name: String,
    kind: String,
    pci: Option<String>,
    driver: String,
    memory_bytes: u64,
    free_bytes: u64,
    binding_bytes: u64,
    workgroup_threads: u32,
    key: String,
}

impl From<GpuAdapter> for Gpu {
    fn from(adapter: GpuAdapter) -> Self {
        Self {
            device: adapter.device(),
            index: adapter.index,
            name: adapter.name,
            kind: adapter.kind.name().to_owned(),
            pci: adapter.pci,
            driver: adapter.driver,
            memory_bytes: adapter.memory_bytes,
            free_bytes: adapter.free_bytes,
            binding_bytes: adapter.binding_bytes,
            workgroup_threads: adapter.workgroup_threads,
            key: adapter.key,
        }
    }
}

impl From<Gpu> for GpuAdapter {
    fn from(gpu: Gpu) -> Self {
        Self {
            kind: GpuKind::of_name(&gpu.kind),
            index: gpu.index,
            name: gpu.name,
            pci: gpu.pci,
            driver: gpu.driver,
            memory_bytes: gpu.memory_bytes,
            free_bytes: gpu.free_bytes,
            binding_bytes: gpu.binding_bytes,
            workgroup_threads: gpu.workgroup_threads,
            key: gpu.key,
        }
    }
}

/// Runs `devices`.
///
/// # Errors
/// When the CPU cannot be used, or standard output not be written to.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let cpu = select_device("cpu", machine::cores() as usize, Precision::default(), Default::default())?;
    let cpu = Cpu { name: cpu.info().name.clone(), free_bytes: available_memory_bytes() };
    let devices = Devices { cpu, gpus: gpu_adapters().into_iter().map(Gpu::from).collect() };
    let text = if args.json {
        let text = serde_json::to_string(&devices);
        text.map_err(|error| CliError::failed("the devices cannot be written as JSON").because(error))? + "\n"
    } else {
        render(&devices)
    };
    print(&text)
}

fn render(devices: &Devices) -> String {
    let size = |bytes: u64| if bytes == 0 { "-".to_owned() } else { ByteSize(bytes).to_string() };
    let mut table = Table::new(&["device", "free", "memory", "kind", "pci", "largest buffer", "name", "driver"]);
    let none = || "-".to_owned();
    let free = size(devices.cpu.free_bytes.unwrap_or(0));
    let name = devices.cpu.name.clone();
    table.row(vec!["cpu".to_owned(), free, none(), "cpu".to_owned(), none(), none(), name, none()]);
    for gpu in &devices.gpus {
        table.row(vec![
            format!("gpu:{}", gpu.index),
            size(gpu.free_bytes),
            size(gpu.memory_bytes),
            gpu.kind.clone(),
            gpu.pci.clone().unwrap_or_else(none),
            size(gpu.binding_bytes),
            gpu.name.clone(),
            gpu.driver.clone(),
        ]);
    }
    table.to_string()
}

/// The adapters of this machine, as another process of this program finds them: drivers are the least trustworthy code that runs here,
/// and what they write to standard error is nobody's concern. None where that fails, which is logged.
pub(crate) async fn adapters(program: &Path) -> Vec<GpuAdapter> {
    let mut command = tokio::process::Command::new(program);
    command.args(["devices", "--json"]).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let listed = match time::timeout(LISTED_WITHIN, command.output()).await {
        Ok(Ok(output)) => serde_json::from_slice::<Devices>(&output.stdout).map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!("no answer within {} s", LISTED_WITHIN.as_secs())),
    };
    match listed {
        Ok(devices) => devices.gpus.into_iter().map(GpuAdapter::from).collect(),
        Err(error) => {
            warn!(error, "the GPUs of this machine cannot be listed; its workers choose for themselves");
            Vec::new()
        }
    }
}

/// What a worker of this machine asks for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) device: String,
    /// Whether it says how much memory it takes.
    pub(crate) names_memory: bool,
}

/// Whether a device leaves it open which adapter it is.
pub(crate) fn is_open(device: &str) -> bool {
    matches!(gpu_choice(device), Some(GpuChoice::Hardware | GpuChoice::Best))
}

/// The device of each worker: GPUs that are asked for by name are given first, the others one each, in the workers' order. When none is
/// left, workers that name their memory share with others that do; of the rest `auto` becomes the CPU, and `gpu` stays, to be refused.
pub(crate) fn deal(adapters: &[GpuAdapter], wishes: &[Wish]) -> Vec<String> {
    /// Workers of an adapter, and whether each of them names its memory.
    #[derive(Clone, Copy)]
    struct Users(usize, bool);
    let mut users = vec![Users(0, true); adapters.len()];
    let mut dealt: Vec<String> = wishes.iter().map(|wish| wish.device.clone()).collect();
    let (open, named): (Vec<usize>, Vec<usize>) = (0..wishes.len()).partition(|&at| is_open(&wishes[at].device));
    for at in named.into_iter().chain(open) {
        let wish = &wishes[at];
        let Some(choice) = gpu_choice(&wish.device) else { continue };
        let may_be: Vec<usize> = candidates(&choice, adapters).iter().map(|adapter| adapter.index).collect();
        let free = may_be.iter().copied().find(|&index| users[index].0 == 0);
        let shared = || {
            let sharing = may_be.iter().copied().filter(|&index| wish.names_memory && users[index].1);
            sharing.min_by_key(|&index| users[index].0)
        };
        match free.or_else(shared) {
            Some(index) => {
                users[index] = Users(users[index].0 + 1, users[index].1 && wish.names_memory);
                dealt[at] = adapters[index].device();
            }
            None if choice == GpuChoice::Hardware && !may_be.is_empty() => "cpu".clone_into(&mut dealt[at]),
            None => {}
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(index: usize, name: &str, kind: GpuKind) -> GpuAdapter {
        let pci = (kind != GpuKind::Software).then(|| format!("0000:0{index}:00.0"));
        GpuAdapter {
            index,
            name: name.to_owned(),
            kind,
            key: pci.clone().unwrap_or_else(|| format!("{name} {index}")),
            pci,
            driver: "driver".to_owned(),
            memory_bytes: 24 << 30,
            free_bytes: 20 << 30,
            binding_bytes: 2 << 30,
            workgroup_threads: 1024,
        }
    }

    /// Devices of workers; `+` behind one means that it names its memory.
    fn dealt(adapters: &[GpuAdapter], wishes: &[&str]) -> Vec<String> {
        let wish =
            |text: &&str| Wish { device: text.trim_end_matches('+').to_owned(), names_memory: text.ends_with('+') };
        deal(adapters, &wishes.iter().map(wish).collect::<Vec<_>>())
    }

    #[test]
    fn gpus_are_dealt_one_each_and_the_rest_computes_on_the_cpu_or_shares() {
        let hardware = GpuKind::Discrete;
        let two = [
            adapter(0, "RTX 4090", hardware),
            adapter(1, "RTX 4090", hardware),
            adapter(2, "llvmpipe", GpuKind::Software),
        ];
        let software = [adapter(0, "llvmpipe", GpuKind::Software), adapter(1, "llvmpipe", GpuKind::Software)];
        let (first, second) = ("gpu:0000:00:00.0", "gpu:0000:01:00.0");
        let cases: [(&[GpuAdapter], &[&str], &[&str]); 11] = [
            (&two, &["auto", "auto", "auto"], &[first, second, "cpu"]),
            (&two, &["auto", "gpu:0", "auto"], &[second, first, "cpu"]),
            (&two, &["auto", "gpu:01:00.0", "cpu", "auto"], &[first, second, "cpu", "cpu"]),
            (&two, &["gpu:rtx", "gpu:rtx"], &[first, second]),
            (&two, &["gpu", "gpu", "gpu"], &[first, second, "gpu"]),
            (&two, &["auto+", "auto+", "auto+", "auto+"], &[first, second, first, second]),
            (&two, &["auto+", "auto", "auto+", "auto+"], &[first, second, first, first]),
            (&two, &["gpu:9", "auto"], &["gpu:9", first]),
            (&software, &["auto", "auto"], &["auto", "auto"]),
            (&software, &["gpu", "gpu", "gpu"], &["gpu:0", "gpu:1", "gpu"]),
            (&[], &["auto", "gpu", "cpu"], &["auto", "gpu", "cpu"]),
        ];
        for (adapters, wishes, expected) in cases {
            assert_eq!(dealt(adapters, wishes), expected, "{wishes:?}");
        }
    }

    #[test]
    fn what_is_listed_is_read_back_as_it_was() {
        for kind in [GpuKind::Discrete, GpuKind::Integrated, GpuKind::Virtual, GpuKind::Other, GpuKind::Software] {
            let found = adapter(3, "A \"B\"", kind);
            let text = serde_json::to_string(&Gpu::from(found.clone())).unwrap();
            assert_eq!(GpuAdapter::from(serde_json::from_str::<Gpu>(&text).unwrap()), found);
        }
    }

    #[test]
    fn a_table_names_each_device_as_it_is_asked_for() {
        let cpu = Cpu { name: "cpu (avx2, 2 threads)".to_owned(), free_bytes: Some(8 << 30) };
        let gpus = vec![Gpu::from(adapter(0, "RTX 4090 (vulkan)", GpuKind::Discrete))];
        let text = render(&Devices { cpu, gpus });
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("cpu ") && lines[1].contains("8.0 GiB"), "{text}");
        assert!(lines[2].starts_with("gpu:0 ") && lines[2].contains("0000:00:00.0"), "{text}");
    }
}

//! Checks of this machine and of the configuration, which need no running cluster.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, TcpListener},
    process::Stdio,
    time::{Duration, SystemTime},
};

use grokpipe_kernels::{Precision, Prefill, select_device};
use grokpipe_model::Model;
use grokpipe_proto::PROTOCOL_VERSIONS;
use tokio::{process::Command, time::timeout};

use super::{check::Check, machine, verdicts};
use crate::{
    config::{ByteSize, Config, WorkerSection},
    plan::PlanView,
    tokenizer,
    up::command::quoted,
};

/// Longest that a host is waited for.
const SSH_WITHIN: Duration = Duration::from_secs(15);
const RESOLVED_WITHIN: Duration = Duration::from_secs(5);

/// An error on one line.
pub(super) fn one_line(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

/// This program and this machine.
pub(super) fn here(config: Option<&Config>) -> Vec<Check> {
    let found = machine::describe(config.map(|config| config.model.path.as_path()), true);
    let versions = match (PROTOCOL_VERSIONS.start(), PROTOCOL_VERSIONS.end()) {
        (oldest, newest) if oldest == newest => format!("protocol {newest}"),
        (oldest, newest) => format!("protocols {oldest} to {newest}"),
    };
    let mut checks = vec![Check::ok("program", format!("grokpipe {}, {versions}, {}", found.build, found.system))];
    let memory = found.memory_available_bytes.map_or_else(|| "unknown".to_owned(), |bytes| ByteSize(bytes).to_string());
    let files = found.open_files_limit.map_or_else(|| "unknown".to_owned(), |limit| limit.to_string());
    checks.push(Check::ok("machine", format!("{memory} of memory available, {files} open files allowed")));
    if let (Some(free), Some(all)) = (found.disk_free_bytes, found.disk_bytes) {
        let speed = found.disk_bytes_per_second.map_or_else(
            || {
                "its reading speed was not measured: the model is small, or the file system has no direct reads"
                    .to_owned()
            },
            |rate| format!("reads the model at {:.0} MB/s", rate / 1e6),
        );
        checks.push(Check::ok("disk", format!("{} of {} free, {speed}", ByteSize(free), ByteSize(all))));
    }
    checks.extend(verdicts::machine("this machine", &found));
    checks
}

/// A configuration that was read.
pub(super) fn settings(config: &Config) -> Vec<Check> {
    let file =
        config.file.as_ref().map_or_else(|| "no file, the defaults".to_owned(), |file| file.display().to_string());
    let mut checks = vec![Check::ok("configuration", format!("{file}; {} workers described", config.workers.len()))];
    let secret = if config.secret.is_set() { "a shared secret, readable by its owner alone" } else { "none" };
    let exposed = [("coordinator.grpc", config.coordinator.grpc), ("coordinator.http", config.coordinator.http)]
        .iter()
        .find_map(|(key, address)| config.check_exposure(key, address, false).err());
    checks.push(match exposed {
        Some(error) => Check::fail("secret file", one_line(&error)),
        None => Check::ok("secret file", secret),
    });
    checks
}

/// Whether an address can be listened on; `served` says that a cluster of ours answers there.
pub(super) fn port(key: &str, address: SocketAddr, served: bool) -> Check {
    match TcpListener::bind(address) {
        Ok(_free_again) => Check::ok(key, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && served => {
            Check::ok(key, format!("{address} is held by a running cluster"))
        }
        Err(error) => Check::fail(key, format!("{address}: {error}"))
            .advise("end the program that holds it, or choose another address"),
    }
}

/// Whether other machines find the coordinator, where there are any.
pub(super) async fn advertised(config: &Config) -> Option<Check> {
    let spread = config.workers.iter().any(|worker| worker.host.is_some());
    let Some(address) = config.coordinator.advertise.clone() else {
        let hidden =
            spread && (config.coordinator.grpc.ip().is_loopback() || config.coordinator.grpc.ip().is_unspecified());
        return hidden.then(|| {
            Check::warn(
                "advertise",
                format!("workers on other hosts are not told where {} is", config.coordinator.grpc),
            )
            .advise("set [coordinator] advertise to an address of this machine in their network")
        });
    };
    let found = match timeout(RESOLVED_WITHIN, tokio::net::lookup_host((address.host(), address.port()))).await {
        Err(_late) => return Some(Check::fail("advertise", format!("{address}: no answer of the resolver"))),
        Ok(Err(error)) => return Some(Check::fail("advertise", format!("{address}: {error}"))),
        Ok(Ok(found)) => found.map(|address| address.ip()).collect::<BTreeSet<_>>(),
    };
    let shown = found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if spread && found.iter().all(|ip| ip.is_loopback()) {
        return Some(
            Check::fail("advertise", format!("{address} is {shown}, which other machines take for themselves"))
                .advise("name an address of this machine in their network; see /etc/hosts"),
        );
    }
    // An address behind a translating router may be right.
    if !found.iter().any(|ip| TcpListener::bind((*ip, 0)).is_ok()) {
        return Some(Check::warn("advertise", format!("{address} is {shown}, which is no address of this machine")));
    }
    Some(Check::ok("advertise", format!("{address} is {shown}")))
}

/// The model, its tokenizer, and whether the described workers hold it.
pub(super) fn model(config: &Config) -> Vec<Check> {
    let path = config.model.path.display();
    let model = match Model::open(&config.model.path) {
        Ok(model) => model,
        Err(error) => {
            let advice = "set [model] path; `grokpipe inspect PATH` says more";
            return vec![Check::fail("model", format!("{path}: {}", one_line(&error))).advise(advice)];
        }
    };
    let digest: String = model.digest().chars().take(16).collect();
    let shape = model.config();
    let found = format!("{path}: {}, {} layers, digest {digest}", shape.name, shape.num_hidden_layers);
    let mut checks = vec![Check::ok("model", found)];
    checks.push(match tokenizer::of_model(&config.model, &model) {
        Ok(Some(_)) => Check::ok("tokenizer", "found"),
        Ok(None) => Check::warn("tokenizer", "none: the cluster will take token ids and refuse text"),
        Err(error) => Check::fail("tokenizer", one_line(&error)),
    });
    checks.push(match PlanView::predicted(config, None) {
        Ok(view) => {
            let needed: u64 = view.plan.stages.iter().map(|stage| stage.memory_bytes).sum();
            Check::ok("plan", format!("{} stages, {} of memory in all", view.plan.stages.len(), ByteSize(needed)))
        }
        Err(error) => Check::fail("plan", one_line(&error)).advise("see `grokpipe plan`"),
    });
    checks
}

/// The devices that workers on this machine are to use.
pub(super) fn devices(config: Option<&Config>) -> Vec<Check> {
    let local = |config: &Config| -> BTreeSet<String> {
        config.workers.iter().filter(|worker| worker.host.is_none()).map(|worker| worker.device.clone()).collect()
    };
    let mut wanted = config.map(local).unwrap_or_default();
    wanted.insert("cpu".to_owned());
    let check = |device: String| match select_device(&device, 1, Precision::Fast, Prefill::default()) {
        Ok(opened) => Check::ok(format!("device {device}"), opened.info().name.clone()),
        Err(error) => Check::fail(format!("device {device}"), one_line(&error)),
    };
    wanted.into_iter().map(check).collect()
}

/// The clock is not one that was never set.
pub(super) fn clock() -> Check {
    let years =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() / 31_557_600);
    match years {
        55.. => Check::ok("clock", "set"),
        _ => Check::warn("clock", format!("says it is {}", 1970 + years))
            .advise("set it, or let it follow a time server"),
    }
}

/// Whether a worker's host is reached, has the program, and what its clock says.
pub(super) async fn host(worker: &WorkerSection, config: &Config) -> Option<Check> {
    let host = worker.host.clone()?;
    let what = format!("host of {}", worker.name);
    let by_hand = format!("try it by hand: ssh -o BatchMode=yes {host} {} --version", worker.binary);
    let mut ssh = Command::new("ssh");
    ssh.args(["-o", "BatchMode=yes", "-T"]).args(&config.cluster.ssh_options);
    ssh.args(["-o", "ConnectTimeout=10", "--", &host]);
    ssh.arg(format!("{} --version && date +%s", quoted(std::ffi::OsStr::new(&worker.binary)).to_string_lossy()));
    ssh.stdin(Stdio::null()).kill_on_drop(true);
    let said = match timeout(SSH_WITHIN, ssh.output()).await {
        Err(_late) => {
            return Some(
                Check::fail(what, format!("{host}: no end within {} s", SSH_WITHIN.as_secs())).advise(by_hand),
            );
        }
        Ok(Err(error)) => return Some(Check::fail(what, format!("ssh: {error}")).advise("install OpenSSH's client")),
        Ok(Ok(said)) => said,
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let (out, complaints) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    Some(match said.status.code() {
        Some(0) => remote(what, &host, &out, now),
        Some(127) => Check::fail(what, format!("{host} has no program {}", worker.binary))
            .advise("install grokpipe there, or set [[worker]] binary"),
        _ => Check::fail(what, format!("{host}: {}", one_line(&complaints.trim()))).advise(by_hand),
    })
}

fn remote(what: String, host: &str, out: &str, now: f64) -> Check {
    let mut lines = out.lines();
    let version = lines.next().unwrap_or_default().trim().to_owned();
    let ours = concat!("grokpipe ", env!("CARGO_PKG_VERSION"));
    if version != ours {
        return Check::warn(what, format!("{host} has {version:?}, this is {ours}")).advise("install the same version");
    }
    // In whole seconds, and as old as the way back is long.
    let ahead = lines.next().and_then(|seconds| seconds.trim().parse::<f64>().ok()).map(|theirs| theirs - now);
    match ahead.filter(|ahead| !(-5.0..=2.0).contains(ahead)) {
        Some(ahead) => Check::warn(what, format!("{host} has {version}; its clock is {ahead:+.0} s off"))
            .advise("let both follow a time server"),
        None => Check::ok(what, format!("{host} has {version}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Status;

    #[test]
    fn a_remote_program_and_clock_are_judged() {
        let ours = concat!("grokpipe ", env!("CARGO_PKG_VERSION"));
        for (out, status) in [
            (format!("{ours}\n1000\n"), Status::Ok),
            (format!("{ours}\n"), Status::Ok),
            (format!("{ours}\n1600\n"), Status::Warn),
            ("grokpipe 0.0.1\n1000\n".to_owned(), Status::Warn),
            (String::new(), Status::Warn),
        ] {
            assert_eq!(remote("host".into(), "node", &out, 1000.5).status, status, "{out:?}");
        }
    }

    #[test]
    fn a_port_is_free_ours_or_somebody_elses() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        assert_eq!(port("coordinator.grpc", address, true).status, Status::Ok);
        let theirs = port("coordinator.grpc", address, false);
        assert!(theirs.status == Status::Fail && theirs.found.contains("in use"), "{theirs:?}");
        drop(held);
        assert_eq!(port("coordinator.grpc", address, false).status, Status::Ok);
    }
}

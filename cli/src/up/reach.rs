//! Which address each process of a cluster listens on and which one the others find it by. Pure.
//!
//! As long as everything is on this machine, everything stays on loopback. With a worker on another host, stages must reach each
//! other across hosts, so that local workers then listen on all interfaces too and are found at the coordinator's public name.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::{
    config::{Config, WorkerSection},
    error::CliError,
};

/// The addresses of one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// Where it finds the coordinator.
    pub(super) coordinator: String,
    /// Where it listens for the previous stage.
    pub(super) listen: SocketAddr,
    /// Where others find it, if not where it listens; port 0 stands for the port that it listens on.
    pub(super) advertise: Option<String>,
}

/// The addresses of a worker, when the coordinator listens at `grpc`.
///
/// # Errors
/// A usage error when a worker on another host could not reach the coordinator.
pub(super) fn of(
    worker: &WorkerSection,
    roster: &[WorkerSection],
    config: &Config,
    grpc: SocketAddr,
) -> Result<Reach, CliError> {
    let spread = roster.iter().any(is_elsewhere);
    let elsewhere = is_elsewhere(worker);
    let public = if spread { Some(public_address(config, grpc)?) } else { None };
    let coordinator = match &public {
        Some(public) if elsewhere => public.clone(),
        _ => dialled_here(grpc).to_string(),
    };
    let ip = if spread && (elsewhere || worker.host.is_none()) { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST };
    let listen = worker.listen.unwrap_or(SocketAddr::from((ip, 0)));
    let host = if elsewhere { worker.host.as_deref().map(node) } else { public.as_deref().and_then(host_of) };
    let advertise = worker
        .advertise
        .clone()
        .or_else(|| host.filter(|_| listen.ip().is_unspecified()).map(|host| format!("{host}:0")));
    Ok(Reach { coordinator, listen, advertise })
}

/// Whether a worker is on another machine.
pub(super) fn is_elsewhere(worker: &WorkerSection) -> bool {
    let is_loopback = |host: &str| {
        let node = node(host);
        let bare = node.trim_start_matches('[').trim_end_matches(']');
        node == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    };
    worker.host.as_deref().is_some_and(|host| !is_loopback(host))
}

/// `node` of `user@node`.
fn node(host: &str) -> &str {
    host.split_once('@').map_or(host, |(_user, node)| node)
}

fn host_of(address: &str) -> Option<&str> {
    address.rsplit_once(':').map(|(host, _port)| host)
}

/// An address that listens everywhere is dialled on loopback from here.
pub(super) fn dialled_here(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, address.port())),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, address.port())),
        _ => address,
    }
}

/// Where other hosts find the coordinator.
fn public_address(config: &Config, grpc: SocketAddr) -> Result<String, CliError> {
    if let Some(advertise) = &config.coordinator.advertise {
        return Ok(advertise.clone());
    }
    if !grpc.ip().is_loopback() && !grpc.ip().is_unspecified() {
        return Ok(grpc.to_string());
    }
    Err(CliError::usage(format!("workers on other hosts cannot reach coordinator.grpc = {grpc}"))
        .because("expected an address of this machine in their network, or [coordinator] advertise")
        .advise("set [coordinator] grpc = \"0.0.0.0:7070\" and advertise = \"THIS-HOST:7070\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    fn config(flags: &[(&'static str, &str)]) -> Config {
        let flags = flags.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        Layers { no_file: true, flags, ..Layers::default() }.load().unwrap()
    }

    fn on(host: Option<&str>) -> WorkerSection {
        WorkerSection { host: host.map(str::to_owned), ..WorkerSection::named("w1") }
    }

    fn reach(
        worker: &WorkerSection,
        roster: &[WorkerSection],
        flags: &[(&'static str, &str)],
    ) -> Result<Reach, CliError> {
        let config = config(flags);
        of(worker, roster, &config, config.coordinator.grpc)
    }

    #[test]
    fn everything_on_one_machine_stays_on_loopback() {
        for worker in [on(None), on(Some("me@127.0.0.1")), on(Some("localhost")), on(Some("me@[::1]"))] {
            let found = reach(&worker, std::slice::from_ref(&worker), &[("coordinator.grpc", "0.0.0.0:7070")]).unwrap();
            let expected =
                Reach { coordinator: "127.0.0.1:7070".into(), listen: "127.0.0.1:0".parse().unwrap(), advertise: None };
            assert_eq!(found, expected, "{worker:?}");
        }
    }

    #[test]
    fn with_another_host_stages_find_each_other_by_name() {
        let roster = [on(None), on(Some("me@node2"))];
        let flags = [("coordinator.grpc", "0.0.0.0:7070"), ("coordinator.advertise", "node1:7070")];
        let here = reach(&roster[0], &roster, &flags).unwrap();
        assert_eq!((here.coordinator.as_str(), here.advertise.as_deref()), ("127.0.0.1:7070", Some("node1:0")));
        let there = reach(&roster[1], &roster, &flags).unwrap();
        assert_eq!((there.coordinator.as_str(), there.advertise.as_deref()), ("node1:7070", Some("node2:0")));
        assert!(here.listen.ip().is_unspecified() && there.listen.ip().is_unspecified());
    }

    #[test]
    fn a_coordinator_that_other_hosts_cannot_reach_is_refused() {
        let roster = [on(Some("me@node2"))];
        for grpc in ["127.0.0.1:7070", "0.0.0.0:7070"] {
            let error = reach(&roster[0], &roster, &[("coordinator.grpc", grpc)]).unwrap_err();
            assert!(error.to_string().contains(grpc), "{error}");
        }
        assert!(reach(&roster[0], &roster, &[("coordinator.grpc", "10.0.0.1:7070")]).is_ok());
    }
}

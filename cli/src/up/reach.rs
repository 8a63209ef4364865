//! Which address each process of a cluster listens on and where it finds the coordinator. Pure, but for the question whether there
//! is IPv6.
//!
//! As long as everything is on this machine, everything stays on loopback. A worker on another host finds out itself where others
//! reach it: what stands in its `host` is a word for `ssh`, which may be an alias, a jump host or a name that only this machine
//! knows. Stages must then reach each other across hosts, so that local workers listen on all addresses too and are found at the
//! coordinator's public name.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use grokpipe_proto::address::{Address, is_loopback};

use crate::{
    config::{Config, WorkerSection},
    error::CliError,
    listen::{dialled_here, everywhere},
};

/// The addresses of one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// Where it finds the coordinator.
    pub(super) coordinator: Address,
    /// Where it listens for the previous stage, if it is not to choose itself.
    pub(super) listen: Option<SocketAddr>,
    /// Where others find it, if it is not to find out itself; port 0 stands for the port that it listens on.
    pub(super) advertise: Option<Address>,
}

impl Reach {
    /// What others may come to see of it.
    pub(super) fn exposed(&self) -> SocketAddr {
        let chosen = || if self.coordinator.is_loopback() { (Ipv4Addr::LOCALHOST, 0).into() } else { everywhere() };
        self.listen.unwrap_or_else(chosen)
    }
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
    let (listen, advertise) = (worker.listen, worker.advertise.clone());
    let public = public_address(config, grpc);
    if let Some(host) = &worker.host {
        let coordinator = dialled_from(host, public.as_ref(), grpc)?;
        return Ok(Reach { coordinator, listen, advertise });
    }
    let elsewhere =
        |host: &String| dialled_from(host, public.as_ref(), grpc).is_ok_and(|dialled| !dialled.is_loopback());
    let is_spread = roster.iter().filter_map(|worker| worker.host.as_ref()).any(elsewhere);
    let listen =
        listen.unwrap_or_else(|| if is_spread { everywhere() } else { SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) });
    let at_public_name =
        || public.filter(|_| is_spread && listen.ip().is_unspecified()).map(|public| public.with_port(0));
    Ok(Reach {
        coordinator: dialled_here(grpc).into(),
        listen: Some(listen),
        advertise: advertise.or_else(at_public_name),
    })
}

/// Where a worker that `ssh` starts on `host` finds the coordinator.
fn dialled_from(host: &str, public: Option<&Address>, grpc: SocketAddr) -> Result<Address, CliError> {
    match public {
        Some(public) => Ok(public.clone()),
        None if names_loopback(host) => Ok(dialled_here(grpc).into()),
        None => Err(CliError::usage(format!("workers on other hosts cannot reach coordinator.grpc = {grpc}"))
            .because("expected an address of this machine in their network, or [coordinator] advertise")
            .advise("set [coordinator] grpc = \"0.0.0.0:7070\" and advertise = \"THIS-HOST:7070\"")),
    }
}

/// Where other hosts find the coordinator, if they do.
fn public_address(config: &Config, grpc: SocketAddr) -> Option<Address> {
    let own = || Some(grpc).filter(|grpc| !is_loopback(grpc.ip()) && !grpc.ip().is_unspecified()).map(Address::from);
    config.coordinator.advertise.clone().or_else(own)
}

/// Whether `ssh` is to reach this machine itself.
fn names_loopback(host: &str) -> bool {
    let node = host.rsplit_once('@').map_or(host, |(_user, node)| node);
    let bare = node.trim_start_matches('[').trim_end_matches(']');
    node == "localhost" || bare.parse::<IpAddr>().is_ok_and(is_loopback)
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

    /// Where the worker dials, listens and is found.
    fn reach(
        worker: &WorkerSection,
        roster: &[WorkerSection],
        flags: &[(&'static str, &str)],
    ) -> Result<(String, String, Option<String>), CliError> {
        let config = config(flags);
        let found = of(worker, roster, &config, config.coordinator.grpc)?;
        let listen = found.listen.map_or("as it chooses".to_owned(), |listen| listen.to_string());
        Ok((found.coordinator.to_string(), listen, found.advertise.map(|address| address.to_string())))
    }

    #[test]
    fn everything_on_one_machine_stays_on_loopback() {
        let flags = [("coordinator.grpc", "0.0.0.0:7070")];
        let near = reach(&on(None), &[on(None), on(Some("me@127.0.0.1"))], &flags).unwrap();
        assert_eq!(near, ("127.0.0.1:7070".into(), "127.0.0.1:0".into(), None));
        for host in ["me@127.0.0.1", "localhost", "me@[::1]", "::1"] {
            let worker = on(Some(host));
            let found = reach(&worker, std::slice::from_ref(&worker), &flags).unwrap();
            assert_eq!(found, ("127.0.0.1:7070".into(), "as it chooses".into(), None), "{host}");
        }
    }

    #[test]
    fn what_ssh_is_told_is_never_taken_for_a_network_address() {
        for host in ["gpu1", "me@node2", "me@fd00::2", "me@[fd00::2]", "me@[fe80::2%eth0]", "me@127.0.0.1", "10.0.0.2"]
        {
            let roster = [on(None), on(Some(host))];
            for (grpc, advertise) in [("0.0.0.0:7070", "node1:7070"), ("[::]:7070", "[fd00::1]:7070")] {
                let flags = [("coordinator.grpc", grpc), ("coordinator.advertise", advertise)];
                let there = reach(&roster[1], &roster, &flags).unwrap();
                assert_eq!(there, (advertise.into(), "as it chooses".into(), None), "{host}");
                let (coordinator, _, found_at) = reach(&roster[0], &roster, &flags).unwrap();
                assert!(coordinator.parse::<Address>().unwrap().is_loopback(), "{coordinator}");
                assert_eq!(found_at, Some(advertise.replace("7070", "0")), "{host}");
                let listen = of(&roster[0], &roster, &config(&flags), grpc.parse().unwrap()).unwrap().listen.unwrap();
                assert!(listen.ip().is_unspecified(), "{listen}");
            }
        }
    }

    #[test]
    fn what_was_said_of_a_worker_holds() {
        let said = WorkerSection {
            listen: "10.0.0.2:7101".parse().ok(),
            advertise: "far:7101".parse().ok(),
            ..on(Some("gpu1"))
        };
        let roster = [on(None), said.clone()];
        let found = reach(&said, &roster, &[("coordinator.grpc", "10.0.0.1:7070")]).unwrap();
        assert_eq!(found, ("10.0.0.1:7070".into(), "10.0.0.2:7101".into(), Some("far:7101".into())));
        let near = WorkerSection { listen: "10.0.0.1:7102".parse().ok(), ..on(None) };
        let found = reach(&near, &roster, &[("coordinator.grpc", "10.0.0.1:7070")]).unwrap();
        assert_eq!(found, ("10.0.0.1:7070".into(), "10.0.0.1:7102".into(), None));
    }

    #[test]
    fn a_coordinator_that_other_hosts_cannot_reach_is_refused() {
        let roster = [on(Some("me@node2"))];
        for grpc in ["127.0.0.1:7070", "0.0.0.0:7070", "[::1]:7070", "[::]:7070"] {
            let error = reach(&roster[0], &roster, &[("coordinator.grpc", grpc)]).unwrap_err();
            assert!(error.to_string().contains(grpc), "{error}");
        }
        assert!(reach(&roster[0], &roster, &[("coordinator.grpc", "10.0.0.1:7070")]).is_ok());
    }

    #[test]
    fn a_worker_that_others_reach_counts_as_exposed() {
        for (flags, exposed) in [
            (vec![("coordinator.grpc", "10.0.0.1:7070")], true),
            (vec![("coordinator.grpc", "0.0.0.0:7070"), ("coordinator.advertise", "127.0.0.1:7070")], false),
        ] {
            let (worker, config) = (on(Some("gpu1")), config(&flags));
            let found = of(&worker, std::slice::from_ref(&worker), &config, config.coordinator.grpc).unwrap();
            assert_eq!(!found.exposed().ip().is_loopback(), exposed, "{flags:?}");
        }
    }
}

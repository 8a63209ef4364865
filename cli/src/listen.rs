//! Where a process listens that was not told where, and where it is dialled from its own machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};

use grokpipe_proto::address::{Address, is_loopback};

/// All addresses of this machine, with a port of the system's choice: of both families where there is IPv6, else of IPv4.
pub(crate) fn everywhere() -> SocketAddr {
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    match TcpListener::bind(both) {
        Ok(_) => both,
        Err(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
    }
}

/// Where a worker of this coordinator listens: on loopback when the coordinator is there, else everywhere, so that the address that
/// it finds on its way to the coordinator is one of those.
pub(crate) fn for_worker_of(coordinator: &Address) -> SocketAddr {
    // A name that is not known yet may become known while the worker dials; it is not taken for loopback.
    let found = (coordinator.host(), coordinator.port()).to_socket_addrs();
    let found: Vec<IpAddr> = found.map(|found| found.map(|address| address.ip()).collect()).unwrap_or_default();
    if found.is_empty() || !found.iter().copied().all(is_loopback) {
        return everywhere();
    }
    let has_ipv4 = found.iter().any(|ip| ip.to_canonical().is_ipv4());
    let ip: IpAddr = if has_ipv4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    SocketAddr::new(ip, 0)
}

/// How an address of this machine is dialled from here: one that listens everywhere, on loopback.
pub(crate) fn dialled_here(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, address.port())),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::from((Ipv6Addr::LOCALHOST, address.port())),
        _ => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_stays_on_loopback_only_when_the_coordinator_is_there() {
        for (coordinator, loopback) in [
            ("127.0.0.1:7070", true),
            ("localhost:7070", true),
            ("[::1]:7070", true),
            ("10.0.0.1:7070", false),
            ("[fd77::1]:7070", false),
            ("no-such-host.invalid:7070", false),
        ] {
            let listen = for_worker_of(&coordinator.parse().unwrap());
            assert_eq!(listen.ip().is_loopback(), loopback, "{coordinator}: {listen}");
            assert_eq!(listen.ip().is_unspecified(), !loopback, "{coordinator}: {listen}");
            assert_eq!(listen.port(), 0);
        }
    }

    #[test]
    fn what_listens_everywhere_is_dialled_on_loopback() {
        for (address, dialled) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:1", "[::1]:1"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("[fd00::1]:1", "[fd00::1]:1"),
        ] {
            assert_eq!(dialled_here(address.parse().unwrap()).to_string(), dialled);
        }
    }
}

//! What an address is as people and peers write it: `node1:7070`, `10.0.0.1:7070`, `[fd00::1]:7070`, `[fe80::1%eth0]:7070`.
//!
//! The one place where a host and a port are parted and put together. Knows nothing of how a name is resolved.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    str::FromStr,
};

/// Longest host name that DNS knows, and longer than any address.
const HOST_BYTES_MAX: usize = 253;

/// A host and a port to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

/// A text is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Nothing after the host.
    #[error("expected a host and a port, as node1:7070 or [fd00::1]:7070")]
    NoPort,
    /// The port is no number up to 65535.
    #[error("expected a port from 0 to 65535 after the host")]
    Port,
    /// IPv6 without brackets: its end cannot be told from the port.
    #[error("expected an IPv6 address in brackets, as [fd00::1]:7070")]
    Brackets,
    /// Neither a name nor an IP address.
    #[error("expected a host name or an IP address before the port, without a scheme, as node1:7070 or [fd00::1]:7070")]
    Host,
}

impl Address {
    /// An address of these parts; the host without brackets.
    ///
    /// # Errors
    /// [`AddressError::Host`].
    pub fn new(host: &str, port: u16) -> Result<Self, AddressError> {
        if is_host(host) { Ok(Self { host: host.to_owned(), port }) } else { Err(AddressError::Host) }
    }

    /// The host, an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The same host with another port.
    pub fn with_port(&self, port: u16) -> Self {
        Self { host: self.host.clone(), port }
    }

    /// The host as an IP address, if it is one; its zone is left out.
    pub fn ip(&self) -> Option<IpAddr> {
        let (address, zone) = without_zone(&self.host);
        address.parse().ok().filter(|ip: &IpAddr| zone.is_none() || ip.is_ipv6())
    }

    /// Whether the host is this machine to whoever dials it, without asking a resolver.
    pub fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost") || self.ip().is_some_and(is_loopback)
    }

    /// As the authority of a URI, where a zone means nothing.
    pub fn authority(&self) -> String {
        written(without_zone(&self.host).0, self.port)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or(AddressError::Host)?;
                if without_zone(host).0.parse::<Ipv6Addr>().is_err() {
                    return Err(AddressError::Host);
                }
                (host, rest.strip_prefix(':').ok_or(AddressError::NoPort)?)
            }
            None => {
                let (host, port) = text.rsplit_once(':').ok_or(AddressError::NoPort)?;
                if host.contains(':') && !host.contains('/') {
                    return Err(AddressError::Brackets);
                }
                (host, port)
            }
        };
        // `parse` alone would take "+1".
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|_| digits).ok_or(AddressError::Port)?;
        Self::new(host, port)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&written(&self.host, self.port))
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let host = match address {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
            _ => address.ip().to_string(),
        };
        Self { host, port: address.port() }
    }
}

/// An address to listen on: an IP address, with a zone where it needs one, or `localhost`, and a port.
pub fn socket_addr(text: &str) -> Option<SocketAddr> {
    let address: Address = text.parse().ok()?;
    if address.host.eq_ignore_ascii_case("localhost") {
        return Some(SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, address.port)));
    }
    let ip = address.ip()?;
    if without_zone(&address.host).1.is_none() {
        return Some(SocketAddr::new(ip, address.port));
    }
    // The number of a zone's interface is the system's to know. An IP address asks no name server.
    (address.host.as_str(), address.port).to_socket_addrs().ok()?.next()
}

/// Whether an address is this machine's loopback, also as IPv4 within IPv6.
pub fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// Whether an address means something on its own link only, so that no other machine could dial it as it is written here.
pub fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

fn written(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// An address and its zone: `fe80::1%eth0` is `fe80::1` and `eth0`.
fn without_zone(host: &str) -> (&str, Option<&str>) {
    host.split_once('%').map_or((host, None), |(address, zone)| (address, Some(zone)))
}

fn is_host(host: &str) -> bool {
    let (address, zone) = without_zone(host);
    if host.len() > HOST_BYTES_MAX {
        return false;
    }
    if address.parse::<Ipv6Addr>().is_ok() {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        return zone.is_none_or(|zone| !zone.is_empty() && zone.chars().all(plain));
    }
    !host.is_empty() && !host.starts_with('-') && host.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        let cases = [
            ("node-1.example:7070", "node-1.example", 7070, None),
            ("my_host:1", "my_host", 1, None),
            ("10.0.0.1:0", "10.0.0.1", 0, Some("10.0.0.1")),
            ("[::1]:7070", "::1", 7070, Some("::1")),
            ("[fd00::1]:65535", "fd00::1", 65535, Some("fd00::1")),
            ("[fe80::1%eth0]:80", "fe80::1%eth0", 80, Some("fe80::1")),
            ("[fe80::1%2]:80", "fe80::1%2", 80, Some("fe80::1")),
        ];
        for (text, host, port, ip) in cases {
            let address: Address = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((address.host(), address.port(), address.to_string().as_str()), (host, port, text));
            assert_eq!(address.ip().map(|ip| ip.to_string()).as_deref(), ip, "{text}");
        }
        assert_eq!(" node:1 ".parse::<Address>().map(|address| address.to_string()), Ok("node:1".to_owned()));
        assert_eq!("[fe80::1%eth0]:80".parse::<Address>().unwrap().authority(), "[fe80::1]:80");
    }

    #[test]
    fn what_is_no_address_says_why() {
        let cases = [
            ("", AddressError::NoPort),
            ("node", AddressError::NoPort),
            ("[fd00::1]", AddressError::NoPort),
            ("node:port", AddressError::Port),
            ("node:", AddressError::Port),
            ("node:+1", AddressError::Port),
            ("node:65536", AddressError::Port),
            ("::1", AddressError::Brackets),
            ("fd00::1", AddressError::Brackets),
            ("fd00::1:7070", AddressError::Brackets),
            ("fe80::1%eth0:7070", AddressError::Brackets),
            ("http://node:7070", AddressError::Host),
            (":7070", AddressError::Host),
            ("a b:1", AddressError::Host),
            ("-x:1", AddressError::Host),
            ("[node]:1", AddressError::Host),
            ("[10.0.0.1]:1", AddressError::Host),
            ("[fd00::1:1", AddressError::Host),
            ("[fe80::1%]:1", AddressError::Host),
            ("10.0.0.1%eth0:1", AddressError::Host),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Address>(), Err(expected), "{text:?}");
        }
        assert_eq!(format!("{}:1", "a".repeat(254)).parse::<Address>(), Err(AddressError::Host));
    }

    #[test]
    fn loopback_is_told_from_other_addresses() {
        for text in ["localhost:1", "LOCALHOST:1", "127.0.0.1:1", "127.0.1.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert!(text.parse::<Address>().unwrap().is_loopback(), "{text}");
        }
        for text in ["node:1", "10.0.0.1:1", "[fd00::1]:1", "0.0.0.0:1", "[::]:1", "localhost.example:1"] {
            assert!(!text.parse::<Address>().unwrap().is_loopback(), "{text}");
        }
    }

    #[test]
    fn an_address_to_listen_on_is_an_ip_address_with_a_port() {
        for (text, expected) in [
            ("localhost:80", Some("127.0.0.1:80")),
            ("127.0.0.1:0", Some("127.0.0.1:0")),
            ("[::]:7070", Some("[::]:7070")),
            ("[fe80::1%1]:7070", Some("[fe80::1%1]:7070")),
            ("127.0.0.1", None),
            ("node:7070", None),
            ("127.0.0.1:99999", None),
            ("[fe80::1%nowhere-at-all]:1", None),
            ("", None),
        ] {
            assert_eq!(socket_addr(text).map(|address| address.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_sockets_address_becomes_one_to_dial() {
        for text in ["10.0.0.1:80", "[fd00::1]:80", "[fe80::1%3]:80"] {
            let socket: SocketAddr = text.parse().unwrap();
            assert_eq!(Address::from(socket).to_string(), text);
        }
    }
}

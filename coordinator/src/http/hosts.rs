//! By which names this server may be called.
//!
//! A page of another site can point its own name at 127.0.0.1 and then read our answers as if they were its own (DNS rebinding).
//! Its requests still carry that name in `Host`, so only known names are answered. An address cannot be rebound; that is why a
//! server bound to all interfaces may be called by any of its addresses, but by no unlisted name.

use std::net::{IpAddr, SocketAddr};

use axum::http::uri::Authority;

/// The names and addresses by which the server may be called; ports do not matter.
#[derive(Clone, Debug)]
pub struct AllowedHosts {
    bound: IpAddr,
    names: Vec<String>,
}

impl AllowedHosts {
    /// Loopback names and addresses, and `bound`; any address when `bound` stands for all interfaces.
    pub fn bound_to(bound: SocketAddr) -> Self {
        Self { bound: bound.ip().to_canonical(), names: Vec::new() }
    }

    /// Also these names or addresses, as from the configuration.
    #[must_use]
    pub fn and(mut self, names: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.names.extend(names.into_iter().map(|name| plain(name.as_ref())));
        self
    }

    /// Whether this name or address was given to [`AllowedHosts::and`].
    pub(super) fn is_configured(&self, name: &str) -> bool {
        self.names.contains(&plain(name))
    }

    /// Whether a request with this `Host` is answered. `None` when `host` is not of the form `name[:port]`.
    pub fn allows(&self, host: &str) -> Option<bool> {
        let authority: Authority = host.parse().ok()?;
        if authority.as_str().contains('@') {
            return None;
        }
        let name = plain(authority.host());
        let known = name == "localhost" || name.ends_with(".localhost") || self.names.contains(&name);
        let by_address = || name.parse().is_ok_and(|address: IpAddr| self.allows_address(address.to_canonical()));
        Some(known || by_address())
    }

    fn allows_address(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.bound.is_unspecified() || address == self.bound
    }
}

/// Lower case, without the brackets of IPv6 and the dot of the root.
fn plain(name: &str) -> String {
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_names_are_allowed() {
        let loopback = AllowedHosts::bound_to(([127, 0, 0, 1], 8080).into());
        let one = AllowedHosts::bound_to(([192, 168, 1, 5], 8080).into()).and(["Head.Example", "[fd00::7]"]);
        let all = AllowedHosts::bound_to(([0, 0, 0, 0], 8080).into());
        // Host, then whether each of the three servers answers.
        let cases: &[(&str, Option<[bool; 3]>)] = &[
            ("localhost", Some([true, true, true])),
            ("LOCALHOST:8080", Some([true, true, true])),
            ("localhost.:1", Some([true, true, true])),
            ("grok.localhost", Some([true, true, true])),
            ("127.0.0.1:8080", Some([true, true, true])),
            ("127.9.9.9", Some([true, true, true])),
            ("[::1]:8080", Some([true, true, true])),
            ("[::ffff:127.0.0.1]", Some([true, true, true])),
            ("192.168.1.5:8080", Some([false, true, true])),
            ("192.168.1.6", Some([false, false, true])),
            ("head.example:9", Some([false, true, false])),
            ("[fd00::7]:9", Some([false, true, true])),
            ("evil.example", Some([false, false, false])),
            ("localhost.evil.example", Some([false, false, false])),
            ("127.0.0.1.evil.example", Some([false, false, false])),
            ("notlocalhost", Some([false, false, false])),
            ("", None),
            ("localhost@evil.example", None),
            ("a b", None),
            ("localhost/x", None),
        ];
        for (host, expected) in cases {
            for (index, server) in [&loopback, &one, &all].into_iter().enumerate() {
                assert_eq!(server.allows(host), expected.map(|answers| answers[index]), "{host:?} at server {index}");
            }
        }
    }
}

//! Where other stages find this worker: where it was told to say, else where it listens, else its own end of the connection to the
//! coordinator, which the system chose among its addresses.
//!
//! Pure. Decides anew for every connection: networks change, and a name may lead elsewhere tomorrow. Does not know whether the
//! others really reach that address; the coordinator has both ends of every link dialled.

use std::net::SocketAddr;

use grokpipe_proto::{
    address::{Address, is_link_local, is_loopback},
    transport::Ends,
};

use crate::WorkerError;

/// What this worker knows of its own address.
#[derive(Clone, Debug)]
pub struct OwnAddress {
    /// What it was told to say; port 0 stands for the port that it listens on.
    pub advertise: Option<Address>,
    /// Where it listens, with the port that the system chose.
    pub listening: SocketAddr,
}

impl OwnAddress {
    /// What to tell a coordinator that is reached between these ends.
    ///
    /// # Errors
    /// [`WorkerError::Advertise`] when others could not dial it.
    pub fn towards(&self, ends: Option<Ends>) -> Result<Address, WorkerError> {
        let port = self.listening.port();
        let address = match (&self.advertise, ends) {
            (Some(told), _) if told.port() == 0 => told.with_port(port),
            (Some(told), _) => told.clone(),
            (None, Some(ends)) if self.listening.ip().is_unspecified() => {
                Address::from(SocketAddr::new(ends.own.ip().to_canonical(), port))
            }
            (None, _) => Address::from(self.listening),
        };
        let refuse = |why| Err(WorkerError::Advertise { found: address.to_string(), why });
        if address.ip().is_some_and(|ip| ip.is_unspecified()) {
            return refuse("which stands for every address and can be dialled by nobody");
        }
        if address.ip().is_some_and(is_link_local) {
            return refuse("which means something on its own link only");
        }
        if address.is_loopback() && ends.is_some_and(is_elsewhere) {
            return refuse("which is loopback, while the coordinator is on another machine");
        }
        Ok(address)
    }
}

/// Whether the coordinator is on another machine: from here to here, both ends are loopback or the same address.
fn is_elsewhere(ends: Ends) -> bool {
    !is_loopback(ends.peer.ip()) && ends.peer.ip().to_canonical() != ends.own.ip().to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn towards(advertise: Option<&str>, listening: &str, ends: Option<(&str, &str)>) -> Result<String, String> {
        let ends = ends.map(|(own, peer)| Ends { own: own.parse().unwrap(), peer: peer.parse().unwrap() });
        let own = OwnAddress {
            advertise: advertise.map(|text| text.parse().unwrap()),
            listening: listening.parse().unwrap(),
        };
        own.towards(ends).map(|address| address.to_string()).map_err(|error| error.to_string())
    }

    /// From the coordinator's machine, from another one, and by IPv6.
    const HERE: Option<(&str, &str)> = Some(("127.0.0.1:900", "127.0.0.1:7070"));
    const THERE: Option<(&str, &str)> = Some(("10.0.0.2:900", "10.0.0.1:7070"));
    const SIX: Option<(&str, &str)> = Some(("[fd77::2]:900", "[fd77::1]:7070"));
    const SAME_HOST: Option<(&str, &str)> = Some(("10.0.0.1:900", "10.0.0.1:7070"));
    const MAPPED: Option<(&str, &str)> = Some(("[::ffff:10.0.0.2]:900", "[::ffff:10.0.0.1]:7070"));

    #[test]
    fn a_worker_that_listens_everywhere_says_its_end_of_the_way_to_the_coordinator() {
        for (listening, ends, expected) in [
            ("0.0.0.0:43", THERE, "10.0.0.2:43"),
            ("[::]:43", THERE, "10.0.0.2:43"),
            ("[::]:43", SIX, "[fd77::2]:43"),
            ("[::]:43", MAPPED, "10.0.0.2:43"),
            ("[::]:43", HERE, "127.0.0.1:43"),
            ("[::]:43", SAME_HOST, "10.0.0.1:43"),
        ] {
            assert_eq!(towards(None, listening, ends).as_deref(), Ok(expected), "{listening} {ends:?}");
        }
    }

    #[test]
    fn what_was_said_comes_first_and_then_where_it_listens() {
        for (advertise, listening, ends, expected) in [
            (Some("node:0"), "[::]:43", THERE, "node:43"),
            (Some("node:9"), "[::]:43", THERE, "node:9"),
            (Some("[fd00::9]:0"), "[::]:43", THERE, "[fd00::9]:43"),
            (None, "10.0.0.9:43", THERE, "10.0.0.9:43"),
            (None, "[fd00::9]:43", SIX, "[fd00::9]:43"),
            (None, "10.0.0.9:43", None, "10.0.0.9:43"),
            (Some("127.0.0.1:1"), "127.0.0.1:43", HERE, "127.0.0.1:1"),
            (None, "127.0.0.1:43", SAME_HOST, "127.0.0.1:43"),
        ] {
            assert_eq!(towards(advertise, listening, ends).as_deref(), Ok(expected), "{advertise:?} {listening}");
        }
    }

    #[test]
    fn an_address_that_nobody_else_could_dial_is_refused() {
        for (advertise, listening, ends, why) in [
            (None, "127.0.0.1:43", THERE, "loopback"),
            (None, "[::1]:43", SIX, "loopback"),
            (Some("127.0.0.1:0"), "0.0.0.0:43", THERE, "loopback"),
            (Some("localhost:0"), "0.0.0.0:43", THERE, "loopback"),
            (Some("0.0.0.0:0"), "0.0.0.0:43", THERE, "every address"),
            (None, "[::]:43", None, "every address"),
            (None, "[::]:43", Some(("[fe80::2%2]:900", "[fe80::1%2]:7070")), "own link"),
        ] {
            let refused = towards(advertise, listening, ends).expect_err(listening);
            assert!(refused.contains(why), "{advertise:?} {listening}: {refused}");
        }
    }
}

//! How many connections a port has, and who makes room when there are too many.
//!
//! A connection that has not said anything yet is *silent*. Silent connections never shut others out: where there is no room, the
//! one that has been silent longest leaves. A connection that has spoken stays. Knows nothing of sockets or protocols: the port says
//! when a connection comes, speaks and goes, and closes one whose [`Place::taken`] resolves.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// How many connections a port takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// All together.
    pub total: usize,
    /// From one address. Loopback is exempt: whatever runs on this machine shares one address.
    pub per_address: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self { total: 4096, per_address: 64 }
    }
}

/// No room: every other connection has spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// On the whole port.
    #[error("expected fewer than {0} connections, found as many")]
    Total(usize),
    /// For this address.
    #[error("expected fewer than {0} connections from this address, found as many")]
    Address(usize),
}

/// The connections of a port. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Places(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    limits: ConnectionLimits,
    next: u64,
    /// By number, so the one that has been silent longest is first.
    silent: BTreeMap<u64, (IpAddr, CancellationToken)>,
    spoken: HashMap<u64, IpAddr>,
    of_address: HashMap<IpAddr, usize>,
}

impl Places {
    /// A port without connections.
    pub fn new(limits: ConnectionLimits) -> Self {
        let (silent, spoken, of_address) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Self(Arc::new(Mutex::new(State { limits, next: 1, silent, spoken, of_address })))
    }

    /// A connection comes from `address`. May take another one's place.
    ///
    /// # Errors
    /// [`NoPlace`] when nobody can make room; the connection is to be closed.
    pub fn enter(&self, address: IpAddr) -> Result<Place, NoPlace> {
        let mut state = self.state();
        let key = counted(address);
        let ConnectionLimits { total, per_address } = state.limits;
        if !key.is_loopback() && state.of_address.get(&key).is_some_and(|count| *count >= per_address) {
            let oldest = state.silent.iter().find(|(_, (other, _))| *other == key).map(|(number, _)| *number);
            state.take(oldest.ok_or(NoPlace::Address(per_address))?);
        }
        if state.silent.len() + state.spoken.len() >= total {
            let oldest = state.silent.keys().next().copied();
            state.take(oldest.ok_or(NoPlace::Total(total))?);
        }
        let number = state.next;
        state.next += 1;
        let taken = CancellationToken::new();
        state.silent.insert(number, (key, taken.clone()));
        *state.of_address.entry(key).or_default() += 1;
        Ok(Place { number, taken, places: self.clone() })
    }

    /// Has up to `count` silent connections leave, as when there are no descriptors for new ones.
    pub fn make_room(&self, count: usize) {
        let mut state = self.state();
        let oldest: Vec<u64> = state.silent.keys().take(count).copied().collect();
        for number in oldest {
            state.take(number);
        }
    }

    /// Connections now.
    pub fn len(&self) -> usize {
        let state = self.state();
        state.silent.len() + state.spoken.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Frees a silent connection's place at once; its socket follows when its task next runs.
    fn take(&mut self, number: u64) {
        if let Some((address, taken)) = self.silent.remove(&number) {
            taken.cancel();
            self.forget(address);
        }
    }

    fn leave(&mut self, number: u64) {
        let address = self.silent.remove(&number).map(|(address, _)| address).or_else(|| self.spoken.remove(&number));
        // Absent where the place was taken: that has been counted.
        if let Some(address) = address {
            self.forget(address);
        }
    }

    fn forget(&mut self, address: IpAddr) {
        if let Some(count) = self.of_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.of_address.remove(&address);
            }
        }
    }
}

/// One connection's place; dropping it frees the place.
#[derive(Debug)]
pub struct Place {
    number: u64,
    taken: CancellationToken,
    places: Places,
}

impl Place {
    /// Which connection of the port this is, counted from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The connection has said something that makes sense, and stays.
    pub fn spoke(&self) {
        let mut state = self.places.state();
        if let Some((address, _)) = state.silent.remove(&self.number) {
            state.spoken.insert(self.number, address);
        }
    }

    /// Resolves when another connection has taken this place: this one is to be closed.
    pub fn taken(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.taken.clone().cancelled_owned()
    }

    /// Whether another connection has taken this place.
    pub fn is_taken(&self) -> bool {
        self.taken.is_cancelled()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state().leave(self.number);
    }
}

/// Who counts as one address: a host may choose freely among the 2^64 addresses of its IPv6 network.
pub(super) fn counted(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "127.0.0.1";
    const THERE: &str = "192.0.2.1";

    fn places(total: usize, per_address: usize) -> Places {
        Places::new(ConnectionLimits { total, per_address })
    }

    fn enter(places: &Places, address: &str) -> Result<Place, NoPlace> {
        places.enter(address.parse().unwrap())
    }

    #[test]
    fn the_one_that_has_been_silent_longest_makes_room() {
        let places = places(3, 64);
        let [speaks, silent, later] = [(); 3].map(|()| enter(&places, HERE).unwrap());
        speaks.spoke();
        let new = enter(&places, HERE).unwrap();
        let taken = [&speaks, &silent, &later, &new].map(Place::is_taken);
        assert_eq!(taken, [false, true, false, false]);
        assert_eq!(places.len(), 3);
        drop(silent);
        assert_eq!(places.len(), 3, "a taken place is not freed twice");
    }

    #[test]
    fn one_that_has_spoken_is_never_sent_away() {
        let places = places(2, 64);
        let both = [(); 2].map(|()| enter(&places, HERE).unwrap());
        both.iter().for_each(Place::spoke);
        assert_eq!(enter(&places, THERE).unwrap_err(), NoPlace::Total(2));
        places.make_room(10);
        assert!(both.iter().all(|place| !place.is_taken()));
        let [first, _second] = both;
        drop(first);
        assert!(enter(&places, THERE).is_ok());
    }

    #[test]
    fn one_address_has_its_share_and_loopback_is_exempt() {
        // Addresses that come in turn; how many of them hold a place in the end.
        let cases: [(&[&str], usize); 6] = [
            (&[THERE, THERE, THERE], 2),
            (&[HERE, HERE, HERE], 3),
            (&["::1", "::1", "::ffff:127.0.0.1", "::1"], 4),
            (&["2001:db8::1", "2001:db8::2", "2001:db8::3"], 2),
            (&["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"], 3),
            (&[THERE, "::ffff:192.0.2.1", THERE], 2),
        ];
        for (addresses, held) in cases {
            let places = places(100, 2);
            let kept: Vec<_> = addresses.iter().map(|address| enter(&places, address).unwrap()).collect();
            assert_eq!(places.len(), held, "{addresses:?}: silent ones make room");
            drop(kept);
            assert!(places.is_empty() && places.state().of_address.is_empty());
            let spoken = |address: &&str| enter(&places, address).inspect(Place::spoke).ok();
            let kept: Vec<_> = addresses.iter().filter_map(spoken).collect();
            assert_eq!(kept.len(), held, "{addresses:?}: those that have spoken stay, others are refused");
        }
    }

    #[test]
    fn room_is_made_for_descriptors_by_the_oldest() {
        let places = places(8, 64);
        let kept = [(); 4].map(|()| enter(&places, HERE).unwrap());
        places.make_room(3);
        assert_eq!(kept.each_ref().map(Place::is_taken), [true, true, true, false]);
    }
}

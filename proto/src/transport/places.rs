//! How many connections a port has, and who makes room when there are too many.
//!
//! A connection on which no call runs is *idle*, be it that none has begun yet or that all are done. Idle connections never shut
//! others out: where there is no room, the one that has been idle longest leaves. One with a call stays. Knows nothing of sockets or
//! protocols: the port says when a connection comes and goes, when a call begins and ends, and closes a connection whose
//! [`Place::taken`] resolves.

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

/// No room: every other connection has a call.
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
    /// Which connection is idle, by when it became so: the one that has been idle longest is first.
    idle: BTreeMap<u64, u64>,
    held: HashMap<u64, Held>,
    of_address: HashMap<IpAddr, usize>,
}

/// One connection.
#[derive(Debug)]
struct Held {
    address: IpAddr,
    taken: CancellationToken,
    calls: usize,
    /// Its key among the idle ones, while it is one.
    idle_since: u64,
}

impl Places {
    /// A port without connections.
    pub fn new(limits: ConnectionLimits) -> Self {
        let (idle, held, of_address) = (BTreeMap::new(), HashMap::new(), HashMap::new());
        Self(Arc::new(Mutex::new(State { limits, next: 1, idle, held, of_address })))
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
            let of_address = |number: &&u64| state.held.get(number).is_some_and(|held| held.address == key);
            let oldest = state.idle.values().find(of_address).copied();
            state.take(oldest.ok_or(NoPlace::Address(per_address))?);
        }
        if state.held.len() >= total {
            let oldest = state.idle.values().next().copied();
            state.take(oldest.ok_or(NoPlace::Total(total))?);
        }
        let number = state.tick();
        let taken = CancellationToken::new();
        state.idle.insert(number, number);
        state.held.insert(number, Held { address: key, taken: taken.clone(), calls: 0, idle_since: number });
        *state.of_address.entry(key).or_default() += 1;
        Ok(Place { number, taken, places: self.clone() })
    }

    /// Has up to `count` idle connections leave, as when there are no descriptors for new ones.
    pub fn make_room(&self, count: usize) {
        let mut state = self.state();
        let oldest: Vec<u64> = state.idle.values().take(count).copied().collect();
        for number in oldest {
            state.take(number);
        }
    }

    /// Connections now.
    pub fn len(&self) -> usize {
        self.state().held.len()
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
    /// The next number; each is given once.
    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Frees an idle connection's place at once; its socket follows when its task next runs.
    fn take(&mut self, number: u64) {
        if let Some(held) = self.leave(number) {
            held.taken.cancel();
        }
    }

    /// `None` where the place was taken before.
    fn leave(&mut self, number: u64) -> Option<Held> {
        let held = self.held.remove(&number)?;
        self.idle.remove(&held.idle_since);
        if let Some(count) = self.of_address.get_mut(&held.address) {
            *count -= 1;
            if *count == 0 {
                self.of_address.remove(&held.address);
            }
        }
        Some(held)
    }

    fn begin(&mut self, number: u64) {
        if let Some(held) = self.held.get_mut(&number) {
            held.calls += 1;
            self.idle.remove(&held.idle_since);
        }
    }

    fn end(&mut self, number: u64) {
        let now = self.tick();
        if let Some(held) = self.held.get_mut(&number) {
            held.calls -= 1;
            if held.calls == 0 {
                held.idle_since = now;
                self.idle.insert(now, number);
            }
        }
    }
}

/// A call on a connection, which keeps the connection's place; dropping it ends the call.
#[derive(Debug)]
pub struct Call {
    number: u64,
    places: Places,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.places.state().end(self.number);
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

    /// A call begins on this connection.
    pub fn begin(&self) -> Call {
        self.places.state().begin(self.number);
        Call { number: self.number, places: self.places.clone() }
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
    fn the_one_that_has_been_idle_longest_makes_room() {
        let places = places(3, 64);
        let [busy, idle, later] = [(); 3].map(|()| enter(&places, HERE).unwrap());
        let _call = busy.begin();
        let new = enter(&places, HERE).unwrap();
        let taken = [&busy, &idle, &later, &new].map(Place::is_taken);
        assert_eq!(taken, [false, true, false, false]);
        assert_eq!(places.len(), 3);
        drop(idle);
        assert_eq!(places.len(), 3, "a taken place is not freed twice");
    }

    #[test]
    fn a_connection_keeps_its_place_as_long_as_one_of_its_calls_runs() {
        let places = places(2, 64);
        let [first, second] = [(); 2].map(|()| enter(&places, HERE).unwrap());
        let (one, other, call) = (first.begin(), first.begin(), second.begin());
        assert_eq!(enter(&places, THERE).unwrap_err(), NoPlace::Total(2));
        places.make_room(10);
        drop(one);
        assert_eq!(enter(&places, THERE).unwrap_err(), NoPlace::Total(2));
        // Idle since later than the other one.
        drop(call);
        drop(other);
        let third = enter(&places, THERE).unwrap();
        assert_eq!([&first, &second].map(Place::is_taken), [false, true]);
        let (_again, _call) = (first.begin(), third.begin());
        // A call that ends after its connection has lost its place changes nothing.
        drop(second.begin());
        assert_eq!(enter(&places, THERE).unwrap_err(), NoPlace::Total(2));
        drop(third);
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
            assert_eq!(places.len(), held, "{addresses:?}: idle ones make room");
            drop(kept);
            assert!(places.is_empty() && places.state().of_address.is_empty());
            let busy = |address: &&str| enter(&places, address).map(|place| (place.begin(), place)).ok();
            let kept: Vec<_> = addresses.iter().filter_map(busy).collect();
            assert_eq!(kept.len(), held, "{addresses:?}: busy ones stay, others are refused");
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

//! Places that are few, and that strangers ask for too: whoever comes when all are taken is given the place of the one
//! that has been there longest, of those of whom most are there. So a flood from one address pushes out itself,
//! and nobody can keep others out by taking places and doing nothing with them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// What one holder of addresses has: an address, or an IPv6 network.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// A bounded number of places for holders of some kind: addresses, servers.
pub struct Places<K> {
    most: usize,
    taken: Mutex<Taken<K>>,
}

struct Taken<K> {
    /// In the order in which they came.
    holders: BTreeMap<u64, (K, Arc<Notify>)>,
    next: u64,
}

/// A place, until it is dropped or [`cut`](Self::cut).
pub struct Place<K> {
    number: u64,
    cut: Arc<Notify>,
    places: Arc<Places<K>>,
}

impl<K: Ord + Clone> Places<K> {
    /// So many, for all holders together.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::new(Taken { holders: BTreeMap::new(), next: 0 }) })
    }

    /// A place, and whose it was if somebody had to go.
    pub fn enter(self: &Arc<Self>, holder: K) -> (Place<K>, Option<K>) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = taken.holders.len() >= self.most;
        let gone = if full { taken.pop_oldest_of_most() } else { None };
        let (number, cut) = (taken.next, Arc::new(Notify::new()));
        taken.next += 1;
        taken.holders.insert(number, (holder, Arc::clone(&cut)));
        (Place { number, cut, places: Arc::clone(self) }, gone)
    }
}

impl<K: Ord + Clone> Taken<K> {
    fn pop_oldest_of_most(&mut self) -> Option<K> {
        let mut of: BTreeMap<&K, (usize, std::cmp::Reverse<u64>)> = BTreeMap::new();
        for (number, (holder, _)) in &self.holders {
            of.entry(holder).or_insert((0, std::cmp::Reverse(*number))).0 += 1;
        }
        let (_, oldest) = of.into_values().max()?;
        let (holder, cut) = self.holders.remove(&oldest.0)?;
        // Kept for whoever is not waiting for it yet.
        cut.notify_one();
        Some(holder)
    }
}

impl<K> Place<K> {
    /// Returns when the place is given to somebody else.
    pub async fn cut(&self) {
        self.cut.notified().await;
    }
}

impl<K> Drop for Place<K> {
    fn drop(&mut self) {
        self.places.taken.lock().unwrap_or_else(PoisonError::into_inner).holders.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[test]
    fn a_flood_pushes_out_itself() {
        let places = Places::new(4);
        let (quiet, _) = places.enter("quiet");
        let flood: Vec<_> = (0..40).map(|_| places.enter("flood")).collect();
        assert!(flood[3..].iter().all(|(_, gone)| *gone == Some("flood")));
        assert!(quiet.cut().now_or_never().is_none(), "one that was there before is left alone");
        let (late, gone) = places.enter("late");
        assert_eq!(gone, Some("flood"));
        assert!(late.cut().now_or_never().is_none());
        let cut = flood.iter().filter(|(place, _)| place.cut().now_or_never().is_some()).count();
        assert_eq!(cut, 38, "two of them have places yet");
    }

    #[test]
    fn of_one_holder_the_oldest_goes_and_a_place_comes_back() {
        let places = Places::new(2);
        let (first, _) = places.enter(7);
        let (second, _) = places.enter(7);
        drop(second);
        let (third, gone) = places.enter(7);
        assert_eq!(gone, None, "a place came back");
        let (_fourth, gone) = places.enter(7);
        assert_eq!(gone, Some(7));
        assert!(first.cut().now_or_never().is_some() && third.cut().now_or_never().is_none());
    }
}

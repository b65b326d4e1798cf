//! Places that are few, and that strangers ask for too: whoever comes when all are taken is given the place of the one
//! that has been there longest, of those of whom most are there. So a flood from one address pushes out itself,
//! and nobody can keep others out by taking places and doing nothing with them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What one holder of addresses has: an address, or an IPv6 network.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// A bounded number of places for holders of some kind: addresses, servers. What is bounded may be something else that
/// they hold, of which each has an amount: bytes.
pub struct Places<K> {
    most: usize,
    most_each: usize,
    taken: Mutex<Taken<K>>,
}

struct Taken<K> {
    /// In the order in which they came.
    entries: BTreeMap<u64, Entry<K>>,
    holders: BTreeMap<K, Holding>,
    amount: usize,
    next: u64,
}

struct Entry<K> {
    holder: K,
    amount: usize,
    cut: Arc<Notify>,
}

/// What one holder has.
#[derive(Default)]
struct Holding {
    amount: usize,
    numbers: BTreeSet<u64>,
}

/// A place, until it is dropped or [`cut`](Self::cut).
pub struct Place<K: Ord> {
    number: u64,
    cut: Arc<Notify>,
    places: Arc<Places<K>>,
}

impl<K: Ord + Clone> Places<K> {
    /// So many, for all holders together.
    pub fn new(most: usize) -> Arc<Self> {
        Self::with_most_each(most, most)
    }
    /// The same, of which one holder gets so many. If that is all, it is not refused more than that: its oldest go.
    pub fn with_most_each(most: usize, most_each: usize) -> Arc<Self> {
        let most_each = if most_each < most { most_each } else { usize::MAX };
        let taken = Taken { entries: BTreeMap::new(), holders: BTreeMap::new(), amount: 0, next: 0 };
        Arc::new(Self { most, most_each, taken: Mutex::new(taken) })
    }
    /// How many one holder gets.
    pub fn most_each(&self) -> usize {
        self.most_each
    }
    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// How many are taken.
    pub fn amount(&self) -> usize {
        self.taken().amount
    }
    /// Whether a holder has as many as it gets.
    pub fn is_full_for(&self, holder: &K) -> bool {
        self.taken().holders.get(holder).is_some_and(|holding| holding.amount >= self.most_each)
    }

    /// A place, and whose it was if somebody had to go.
    pub fn enter(self: &Arc<Self>, holder: K) -> (Place<K>, Option<K>) {
        let (place, gone) = self.take(&mut self.taken(), holder, 1, Arc::default());
        (place, gone.into_iter().next())
    }
    /// Places for a holder, and whose they were if others had to go; none if it would have more than one gets. Whoever
    /// has nothing gets what it needs, whatever that is. `cut` is told when they are given to somebody else.
    pub fn admit(
        self: &Arc<Self>,
        holder: K,
        amount: usize,
        cut: &Arc<Notify>,
    ) -> Option<(Place<K>, Vec<K>)> {
        let mut taken = self.taken();
        let held = taken.holders.get(&holder).map_or(0, |holding| holding.amount);
        (held == 0 || amount <= self.most_each.saturating_sub(held))
            .then(|| self.take(&mut taken, holder, amount, Arc::clone(cut)))
    }
    fn take(
        self: &Arc<Self>,
        taken: &mut Taken<K>,
        holder: K,
        amount: usize,
        cut: Arc<Notify>,
    ) -> (Place<K>, Vec<K>) {
        let mut gone = Vec::new();
        while taken.amount + amount > self.most
            && let Some(oldest) = taken.pop_oldest_of_most()
        {
            // Kept for whoever is not waiting for it yet.
            oldest.cut.notify_one();
            gone.push(oldest.holder);
        }
        let number = taken.next;
        taken.next += 1;
        taken.amount += amount;
        let holding = taken.holders.entry(holder.clone()).or_default();
        holding.amount += amount;
        holding.numbers.insert(number);
        taken.entries.insert(number, Entry { holder, amount, cut: Arc::clone(&cut) });
        (Place { number, cut, places: Arc::clone(self) }, gone)
    }
}

impl<K: Ord> Taken<K> {
    fn pop_oldest_of_most(&mut self) -> Option<Entry<K>> {
        let of = self.holders.values().filter_map(|holding| {
            let oldest = *holding.numbers.first()?;
            Some((holding.amount, Reverse(oldest)))
        });
        let (_, Reverse(oldest)) = of.max()?;
        self.remove(oldest)
    }
    fn remove(&mut self, number: u64) -> Option<Entry<K>> {
        let entry = self.entries.remove(&number)?;
        self.amount -= entry.amount;
        if let Some(holding) = self.holders.get_mut(&entry.holder) {
            holding.amount -= entry.amount;
            holding.numbers.remove(&number);
            if holding.numbers.is_empty() {
                self.holders.remove(&entry.holder);
            }
        }
        Some(entry)
    }
}

impl<K: Ord> Place<K> {
    /// Returns when the place is given to somebody else.
    pub async fn cut(&self) {
        self.cut.notified().await;
    }
}

impl<K: Ord> Drop for Place<K> {
    fn drop(&mut self) {
        self.places.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(self.number);
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

    #[test]
    fn of_one_holder_there_are_so_many_and_of_all_too() {
        let places = Places::with_most_each(10, 5);
        let admit = |holder, amount| {
            let cut = Arc::new(Notify::new());
            places.admit(holder, amount, &cut).map(|(place, gone)| (place, gone, cut))
        };
        let (one, gone, cut) = admit("one", 3).unwrap();
        assert!(gone.is_empty() && admit("one", 3).is_none(), "more than one holder gets");
        assert!(!places.is_full_for(&"one"));
        let (more, ..) = admit("one", 2).unwrap();
        assert!(places.is_full_for(&"one") && admit("one", 1).is_none());
        let (_other, gone, _) = admit("other", 4).unwrap();
        assert_eq!((gone, places.amount()), (vec![], 9));
        let (_third, gone, _) = admit("third", 2).unwrap();
        assert_eq!(gone, ["one"], "the oldest of whoever has most");
        assert!(cut.notified().now_or_never().is_some());
        drop((one, more));
        assert_eq!(places.amount(), 6, "what was cut is not given back twice");
        // More than there is: for one who has nothing, everything.
        let (huge, gone, _) = admit("one", 40).unwrap();
        assert_eq!((gone, places.amount()), (vec!["other", "third"], 40));
        assert!(admit("one", 1).is_none());
        drop(huge);
        assert_eq!(places.amount(), 0);
        assert!(places.taken().holders.is_empty(), "whoever is gone is forgotten");
    }
}

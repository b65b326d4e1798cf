//! What an epoch costs: seconds of one core and bytes on the network for a number of secrets, and what a
//! server needs to recover all of its shares.
//!
//! ```text
//! cargo bench -p quorum --bench refresh [-- MOST]
//! ```
//!
//! Everything that one server does is done here, by the code that servers run; the network is left out.
//! Beside each time stands the time of the same number of plain byte additions (what no refresh can do
//! without: read every share, change it, write it back), so that the ratio says more than the machine.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    missing_docs,
    reason = "a benchmark measures time"
)]

use quorum::bytes::{Hash, SecretBytes};
use quorum::codec::encode;
use quorum::ids::{AttemptId, ClusterId, Epoch, ServerId, Timestamp};
use quorum::message::{HandedOut, PeerMessage};
use quorum::recovery::{Keeper, Masked};
use quorum::refresh::{Dealing, SCALARS_FROM, Seeds};
use quorum::shares::{Helping, Renewal, ShareOp, ShareSet};
use quorum::thresholds::Thresholds;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

const ATTEMPT: AttemptId = AttemptId { epoch: Epoch(1), attempt: 1 };

struct Agreed {
    seeds: Seeds,
    dealings: BTreeMap<ServerId, Dealing>,
    /// What one server sends to all others: its own contributions to each.
    sent: usize,
    /// Seconds for dealing, and for checking what all others dealt.
    seconds: f64,
}

/// One server's part of an attempt, as the last server of the grid.
fn agree(thresholds: Thresholds, recovering: Option<ServerId>) -> Agreed {
    let cluster = ClusterId(Hash([1; 32]));
    let n = thresholds.n();
    let id = ServerId(n as u8 - 1);
    let seeds = Seeds::new(cluster, thresholds, ATTEMPT, true, recovering);
    let all: Vec<_> = (0..n as u8)
        .map(|d| (ServerId(d), seeds.draw(ServerId(d), &SecretBytes::new(&[d + 1; 32]))))
        .collect();
    let handed: Vec<_> = all.iter().map(|(d, dealing)| (*d, seeds.for_server(*d, dealing, id))).collect();
    let began = Instant::now();
    let own = seeds.draw(id, &SecretBytes::new(&[n as u8; 32]));
    black_box(seeds.root(id, &own));
    let mut sent = 0;
    for to in (0..n as u8 - 1).map(ServerId) {
        let dealing = seeds.for_server(id, &own, to);
        let message = HandedOut { attempt: ATTEMPT, dealer: id, dealing };
        sent += encode(&PeerMessage::Dealing(Box::new(message))).len();
    }
    for (dealer, dealing) in &handed {
        black_box(seeds.root(*dealer, dealing));
    }
    let seconds = began.elapsed().as_secs_f64();
    Agreed { dealings: handed.into_iter().collect(), seeds, sent, seconds }
}

fn filled(indices: Range<u64>) -> ShareSet {
    let mut set = ShareSet::new();
    for index in indices {
        // Small enough to be scalars.
        let share = Some(SecretBytes::new(&[index as u8 & 0x0f; 32]));
        set.apply(&ShareOp::Store { index, epoch: Epoch(0), share, dealt: true });
    }
    set
}

/// Adds one vector of bytes to another of the size of all shares.
fn plain(secrets: u64) -> Duration {
    let (mut shares, other) = (vec![1u8; 32 * secrets as usize], vec![2u8; 32 * secrets as usize]);
    let began = Instant::now();
    shares.iter_mut().zip(&other).for_each(|(a, b)| *a ^= b);
    black_box(&shares);
    began.elapsed()
}

fn main() {
    let most: u64 = std::env::args().filter_map(|text| text.parse().ok()).next_back().unwrap_or(1_000_000);
    println!("refresh: one server, one core");
    println!(
        "{:>3} {:>2} {:>9}  {:>9}  {:>12}  {:>12}  {:>10}  {:>12}",
        "n", "k", "secrets", "agree s", "bytes sent", "renew s", "us/secret", "/ plain xor"
    );
    for n in [4, 9, 16] {
        let thresholds = Thresholds::plan(n, None, None).expect("these are in the table");
        let agreed = agree(thresholds, None);
        let id = ServerId(n as u8 - 1);
        for secrets in [1_000, 10_000, 100_000, 1_000_000].into_iter().filter(|secrets| *secrets <= most) {
            let mut set = filled(0..secrets);
            let held: Vec<_> = agreed.dealings.iter().map(|(d, dealing)| (*d, dealing)).collect();
            let began = Instant::now();
            let terms = agreed.seeds.zero_sharing(id, &held);
            assert!(terms.is_some(), "everything was dealt");
            set.apply(&ShareOp::Renew(Renewal { to: Epoch(1), terms, recovering: None }));
            let renew = began.elapsed().as_secs_f64();
            assert_eq!((set.epoch(), set.counts().shares), (Epoch(1), secrets));
            println!(
                "{n:>3} {:>2} {secrets:>9}  {:>9.4}  {:>12}  {renew:>12.4}  {:>10.3}  {:>12.1}",
                thresholds.k(),
                agreed.seconds,
                agreed.sent,
                renew * 1e6 / secrets as f64,
                renew / plain(secrets).as_secs_f64(),
            );
        }
    }
    println!(
        "\nrecovery of all shares by one server: helpers' masks, messages, and its own decoding, one core for all"
    );
    println!(
        "{:>3} {:>2} {:>9}  {:>12}  {:>14}  {:>14}",
        "n", "k", "secrets", "decode s", "a helper's s", "bytes received"
    );
    for n in [4, 9, 16] {
        let thresholds = Thresholds::plan(n, None, None).expect("these are in the table");
        for secrets in [10_000, 100_000].into_iter().filter(|secrets| *secrets <= most) {
            let Recovered { decoding, helping, received, .. } =
                recover(thresholds, 0..secrets, &Lies::none());
            println!(
                "{n:>3} {:>2} {secrets:>9}  {:>12.3}  {:>14.3}  {received:>14}",
                thresholds.k(),
                decoding.as_secs_f64(),
                helping.as_secs_f64() / (n - 1) as f64,
            );
        }
    }
    println!(
        "\nthe same while helpers lie: in every answer, or in turn, so that no two secrets have the same liars"
    );
    println!(
        "{:>3} {:>2} {:>5} {:>6} {:>8} {:>8}  {:>9}  {:>12}  {:>14}",
        "n", "k", "liars", "lying", "of", "secrets", "recovered", "us/secret", "longest turn ms"
    );
    for (n, secrets) in [(9, 1_024), (16, 1_024), (25, 256)] {
        let thresholds = Thresholds::plan(n, None, None).expect("these are in the table");
        let f = thresholds.f();
        for (liars, in_turn, from) in
            [(f - 1, false, 0), (f - 1, true, 0), (f, false, 0), (f - 1, false, SCALARS_FROM)]
        {
            let Recovered { decoding, longest, shares, .. } =
                recover(thresholds, from..from + secrets, &Lies { liars, in_turn });
            println!(
                "{n:>3} {:>2} {liars:>5} {:>6} {:>8} {secrets:>8}  {shares:>9}  {:>12.1}  {:>14.1}",
                thresholds.k(),
                if in_turn { "turns" } else { "all" },
                if from == 0 { "bytes" } else { "scalars" },
                decoding.as_secs_f64() * 1e6 / secrets as f64,
                longest.as_secs_f64() * 1e3,
            );
        }
    }
}

/// Who lies: the first helpers, all in every answer or each in its turn.
struct Lies {
    liars: usize,
    in_turn: bool,
}

impl Lies {
    fn none() -> Self {
        Self { liars: 0, in_turn: false }
    }
    fn change(&self, from: ServerId, masked: &mut Masked) {
        let number = from.index() - 1;
        for chunk in masked.chunks.iter_mut().filter(|_| number < self.liars) {
            for (place, value) in chunk.values.iter_mut().enumerate() {
                if !self.in_turn || place % self.liars == number {
                    let mut bytes = *value.expose();
                    bytes.iter_mut().for_each(|byte| *byte ^= (number + place) as u8 | 1);
                    bytes[31] &= 0x0f;
                    *value = SecretBytes::new(&bytes);
                }
            }
        }
    }
}

struct Recovered {
    decoding: Duration,
    /// The longest that the keeper was busy without a pause.
    longest: Duration,
    helping: Duration,
    received: usize,
    shares: u64,
}

fn recover(thresholds: Thresholds, indices: Range<u64>, lies: &Lies) -> Recovered {
    let (n, r, secrets) = (thresholds.n(), ServerId(0), indices.end - indices.start);
    let seeds = Seeds::new(ClusterId(Hash([1; 32])), thresholds, ATTEMPT, true, Some(r));
    let dealings: Vec<_> = (0..n as u8)
        .map(|d| (ServerId(d), seeds.draw(ServerId(d), &SecretBytes::new(&[d + 1; 32]))))
        .collect();
    let mut sets: Vec<_> = (0..n as u8)
        .map(|i| {
            let held: Vec<_> =
                dealings.iter().map(|(d, all)| (*d, seeds.for_server(*d, all, ServerId(i)))).collect();
            let held: Vec<_> = held.iter().map(|(d, dealing)| (*d, dealing)).collect();
            let mut set = filled(indices.clone());
            // All hold the constant polynomial: a sharing as good as any here.
            let terms = seeds.zero_sharing(ServerId(i), &held).filter(|_| ServerId(i) != r);
            let masks = seeds.masks(ServerId(i), &held);
            let recovering = Some(Helping { server: r, attempt: ATTEMPT, masks });
            set.apply(&ShareOp::Renew(Renewal { to: Epoch(1), terms, recovering }));
            set
        })
        .collect();
    let mut keeper = Keeper::new(r, thresholds);
    let mut helpers: Vec<_> = (0..n as u8).map(|i| Keeper::new(ServerId(i), thresholds)).collect();
    let (mut now, mut decoding, mut helping, mut received) =
        (Timestamp(1_000_000), Duration::ZERO, Duration::ZERO, 0);
    let mut longest = Duration::ZERO;
    let mut turn = |began: Instant| {
        decoding += began.elapsed();
        longest = longest.max(began.elapsed());
    };
    while sets[0].counts().shares < secrets {
        let began = Instant::now();
        let kept = keeper.tick(now, &sets[0]);
        turn(began);
        if kept.ended.is_some() {
            break;
        }
        let mut operations: Vec<_> = kept.recovered.into_iter().collect();
        for (to, message) in kept.messages {
            let PeerMessage::AskMasked(ask) = message else { continue };
            let began = Instant::now();
            let answer = helpers[to.index()].on_ask(r, &ask, &sets[to.index()]).expect("it helps");
            helping += began.elapsed();
            received += encode(&answer).len();
            let PeerMessage::Masked(mut masked) = answer else { continue };
            lies.change(to, &mut masked);
            let began = Instant::now();
            operations.extend(keeper.on_masked(to, masked).recovered);
            turn(began);
        }
        operations.iter().for_each(|operation| sets[0].apply(operation));
        now = now.plus_ms(125);
    }
    Recovered { decoding, longest, helping, received, shares: sets[0].counts().shares }
}

//! Micro-benchmarks of the core's hot parts: `cargo bench -p quorum`.
//!
//! Each figure stands beside a baseline measured in the same run, one strict Ed25519 verification,
//! since absolute times on shared machines prove little.

#![allow(clippy::disallowed_types, clippy::disallowed_methods, reason = "a benchmark measures time")]

use quorum::answer::{RecordAnswer, Verifier};
use quorum::bytes::{Blob, Hash};
use quorum::certificate::{Certificate, Checkpoint, VoteBook};
use quorum::codec::encode;
use quorum::grid::Grid;
use quorum::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp};
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::map::Map;
use quorum::message::CheckedBatch;
use quorum::record::{Entry, KeyMaterial, Name};
use quorum::request::{Operation, SignedRequest, VerifiedRequest};
use quorum::signing::{Keyring, SigningKey, Voter};
use quorum::state::State;
use quorum::thresholds::Thresholds;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// Median time of one call in nanoseconds, over samples of about a millisecond each.
fn time<T>(mut call: impl FnMut() -> T) -> f64 {
    let begin = Instant::now();
    black_box(call());
    let once = begin.elapsed().as_nanos().max(50);
    let calls = (1_000_000 / once).clamp(1, 100_000) as u32;
    let mut samples: Vec<_> = (0..60)
        .map(|_| {
            let begin = Instant::now();
            (0..calls).for_each(|_| {
                black_box(call());
            });
            begin.elapsed().as_nanos() as f64 / f64::from(calls)
        })
        .collect();
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

struct Fixture {
    manifest: Arc<Manifest>,
    administrator: SigningKey,
    voters: Vec<Voter>,
}

fn fixture(n: usize) -> Fixture {
    let thresholds = Thresholds::plan(n, None, None).expect("n is a square");
    let grid = Grid::new(thresholds);
    let identity = |id: ServerId| SigningKey::from_seed(&[id.0 + 1; 32]);
    let administrator = SigningKey::from_seed(&[250; 32]);
    let servers = grid.servers().map(|id| ServerEntry {
        id,
        row: grid.row_of(id) as u16,
        column: grid.column_of(id) as u16,
        url: String::new(),
        peer: String::new(),
        identity: identity(id).public(),
        certificate: Blob(vec![]),
    });
    let manifest = Arc::new(Manifest {
        format: MANIFEST_FORMAT,
        epoch_seconds: 30,
        administrators_needed: 1,
        administrators: vec![administrator.public()],
        thresholds,
        servers: servers.collect(),
    });
    let mut rng = StdRng::seed_from_u64(1);
    let cluster = manifest.cluster_id();
    let voters = grid
        .servers()
        .map(|id| Voter::generate(cluster, &identity(id), id, AttemptId::default(), 0, &mut rng));
    Fixture { voters: voters.collect(), manifest, administrator }
}

impl Fixture {
    fn register(&self, i: u64) -> SignedRequest {
        let mut key = vec![1; 32];
        key[..8].copy_from_slice(&i.to_be_bytes());
        let entry = Entry {
            keys: vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(key) }],
            owner: None,
            owner_only: false,
            not_before: None,
            not_after: None,
            metadata: BTreeMap::new(),
        };
        let operation =
            Operation::Register { name: Name::new(format!("user{i:07}")).expect("a name"), entry };
        SignedRequest::sign(&self.manifest.cluster_id(), &self.administrator, i, Timestamp(50_000), operation)
    }
    fn batch(&self, from: u64, count: u64) -> CheckedBatch {
        let cluster = self.manifest.cluster_id();
        let verify = |i| self.register(i).verify(&cluster).expect("just signed");
        CheckedBatch::new(
            &cluster,
            Timestamp(1_000),
            (from..from + count).map(verify).collect::<Vec<VerifiedRequest>>(),
        )
    }
    fn certificate(&self, checkpoint: Checkpoint) -> Certificate {
        let mut book = VoteBook::default();
        for voter in &self.voters {
            let _ = book.add(voter.sign(checkpoint));
        }
        book.proof(&checkpoint, self.manifest.thresholds.q()).expect("everybody signed")
    }
}

fn main() {
    let small = fixture(9);
    let cluster = small.manifest.cluster_id();
    let request = small.register(1);
    let baseline = time(|| request.clone().verify(&cluster).is_ok());
    let report =
        |what: &str, ns: f64| println!("{what:<58} {:>10.2} µs   {:>8.3} ×", ns / 1000.0, ns / baseline);
    println!("{:<58} {:>10}      {:>8}", "", "median", "one verification");
    report("verify a request's signature (baseline)", baseline);
    report(
        "sign a vote",
        time(|| {
            small.voters[0].sign(Checkpoint {
                sequence: Sequence(1),
                root: Hash([1; 32]),
                time: Timestamp(1),
                epoch: Epoch(0),
                attempt: 0,
            })
        }),
    );

    for records in [1_000u64, 10_000, 100_000] {
        let mut state = State::genesis(Arc::clone(&small.manifest));
        (0..records / 500).for_each(|i| {
            state.execute(&small.batch(i * 500, 500));
        });
        let (checkpoint, snapshot) = state.seal();
        let certificate = Arc::new(small.certificate(checkpoint));
        let mut rng = StdRng::seed_from_u64(2);
        let names: Vec<_> = (0..1000)
            .map(|_| Name::new(format!("user{:07}", rng.random_range(0..records))).expect("a name"))
            .collect();
        let mut next = 0;
        let mut name = || {
            next = (next + 1) % names.len();
            &names[next]
        };
        let answers: Vec<_> = names
            .iter()
            .map(|name| RecordAnswer::look_up(&snapshot, &certificate, Sequence(1), name, None))
            .collect();
        let steps: usize = answers.iter().map(|answer| answer.current.proof.steps.len()).sum();
        println!("-- {records} records; a path has {:.1} steps", steps as f64 / answers.len() as f64);
        report(
            "  look up and prove a record",
            time(|| RecordAnswer::look_up(&snapshot, &certificate, Sequence(1), name(), None)),
        );
        let mut verifier = Verifier::new(Arc::clone(&small.manifest));
        let mut at = 0;
        report(
            "  check an answer under a known root",
            time(|| {
                at = (at + 1) % names.len();
                verifier.record(&answers[at], &names[at], None).is_ok()
            }),
        );
        report(
            "  encode an answer as JSON",
            time(|| serde_json::to_vec(&answers[0]).map(|bytes| bytes.len())),
        );
        let batches: Vec<_> = (0..40).map(|i| small.batch(records + i * 64, 64)).collect();
        let begin = Instant::now();
        batches.iter().for_each(|batch| drop(black_box(state.execute(batch))));
        report(
            "  execute one register (of 64 in a batch)",
            begin.elapsed().as_nanos() as f64 / (40.0 * 64.0),
        );
    }

    println!("-- certificates");
    for n in [4, 9, 16] {
        let fixture = fixture(n);
        let checkpoint = Checkpoint {
            sequence: Sequence(9),
            root: Hash([3; 32]),
            time: Timestamp(5),
            epoch: Epoch(0),
            attempt: 0,
        };
        let certificate = fixture.certificate(checkpoint);
        let mut keyring = Keyring::new(Arc::clone(&fixture.manifest));
        report(
            &format!("  check a certificate, n = {n}, nothing known ({} bytes)", encode(&certificate).len()),
            time(|| certificate.verify(&mut Keyring::new(Arc::clone(&fixture.manifest))).is_ok()),
        );
        report(
            &format!("  check a certificate, n = {n}, keys known"),
            time(|| certificate.verify(&mut keyring).is_ok()),
        );
    }

    println!("-- map and shares");
    let mut rng = StdRng::seed_from_u64(3);
    let mut map = Map::new(cluster);
    (0..100_000u32).for_each(|i| map.insert(format!("key{i}").as_bytes(), vec![0; 100]));
    map.seal();
    let of_64 = time(|| {
        for _ in 0..64 {
            map.insert(format!("key{}", rng.random_range(0..100_000u32)).as_bytes(), vec![1; 100]);
        }
        map.seal()
    });
    report("  insert into 100,000 entries (64 between seals)", of_64 / 64.0);
    let mut rng = StdRng::seed_from_u64(4);
    report("  deal 9 shares, k = 3", time(|| quorum::shamir::deal(&[7; 32], 3, 9, &mut rng)));
}

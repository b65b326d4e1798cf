//! bench: throughput and latency of the real thing, every answer verified.

use super::output::print_json;
use super::{Failure, Session, duration};
use clap::{Args, ValueEnum};
use kds_client::{Client, ClientError, LookupOptions, deadline, keys, keystore};
use quorum::record::{Entry, Name};
use quorum::signing::SigningKey;
use rand::RngExt as _;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Clients at a time: each takes memory here.
const MOST_CLIENTS: usize = 65_536;
/// Names that are registered before anything is measured.
const MOST_NAMES: u64 = 10_000_000;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Verified lookups, of names that it registers first
    Lookup,
    /// Acknowledged registers of new names
    Register,
    /// Deposits, each recovered once
    Secret,
}

#[derive(Args)]
pub(super) struct BenchArgs {
    /// What to measure
    what: What,
    /// Clients at a time, each waiting for its answer before it asks again
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Stop after so many requests
    #[arg(long)]
    requests: Option<u64>,
    /// Stop after so long, such as 10s
    #[arg(long, default_value = "10s", value_parser = duration)]
    seconds: Duration,
    /// Names that lookups choose from
    #[arg(long, default_value_t = 1_000)]
    names: u64,
}

struct Bench {
    client: Client,
    key: SigningKey,
    what: What,
    run: u64,
    names: u64,
    started: AtomicU64,
}

fn entry(byte: u64) -> Entry {
    let mut key = [7; 32];
    key[..8].copy_from_slice(&byte.to_be_bytes());
    let owner = SigningKey::from_seed(&key).public();
    Entry {
        keys: vec![keys::openssh_ed25519(&owner)],
        owner: None,
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: BTreeMap::new(),
    }
}

impl Bench {
    fn name(&self, i: u64) -> Result<Name, ClientError> {
        Name::new(format!("bench/{:08x}/{i}", self.run)).map_err(|e| ClientError::Local(e.to_string()))
    }
    async fn one(&self, i: u64) -> Result<(), ClientError> {
        match self.what {
            What::Register => self.client.register(&self.key, self.name(i)?, entry(i)).await.map(drop),
            What::Lookup => {
                let i = rand::rng().random_range(0..self.names);
                let found = self.client.lookup(&self.name(i)?, &LookupOptions::default()).await?;
                found
                    .record
                    .map(drop)
                    .ok_or_else(|| ClientError::Local("a registered name is missing".into()))
            }
            What::Secret => {
                self.client.put_secret(&self.key, &self.name(i)?, b"bench", &[], false, false).await.map(drop)
            }
        }
    }
    async fn prepare(self: &Arc<Self>) -> Result<(), Failure> {
        if !matches!(self.what, What::Lookup) {
            return Ok(());
        }
        let mut tasks = JoinSet::new();
        for worker in 0..64 {
            let bench = Arc::clone(self);
            tasks.spawn(async move {
                for i in (worker..bench.names).step_by(64) {
                    bench.client.register(&bench.key, bench.name(i)?, entry(i)).await?;
                }
                Ok::<_, ClientError>(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.map_err(Failure::other)??;
        }
        Ok(())
    }
}

pub(super) async fn bench(session: &Session, args: &BenchArgs) -> Result<(), Failure> {
    if !(1..=MOST_CLIENTS).contains(&args.clients) || !(1..=MOST_NAMES).contains(&args.names) {
        let most =
            format!("--clients and --names must be at least 1, and at most {MOST_CLIENTS} and {MOST_NAMES}");
        return Err(Failure::usage(most));
    }
    let bench = Arc::new(Bench {
        client: session.client.clone(),
        // Names are looked up by anyone; the key is needed to register them.
        key: session.key().unwrap_or_else(|_| keystore::generate()),
        what: args.what,
        run: rand::rng().random::<u32>().into(),
        names: args.names,
        started: AtomicU64::new(0),
    });
    eprintln!("preparing …");
    bench.prepare().await?;
    eprintln!("measuring {:?} with {} clients …", args.what, args.clients);
    let begin = Instant::now();
    let end = deadline::after(args.seconds);
    let most = args.requests.unwrap_or(u64::MAX);
    let mut tasks = JoinSet::new();
    for _ in 0..args.clients {
        let bench = Arc::clone(&bench);
        tasks.spawn(async move {
            let (mut latencies_us, mut errors) = (Vec::new(), Vec::new());
            while Instant::now() < end {
                let i = bench.started.fetch_add(1, Ordering::Relaxed);
                if i >= most {
                    break;
                }
                let asked = Instant::now();
                match bench.one(i).await {
                    Ok(()) => latencies_us.push(asked.elapsed().as_micros() as u64),
                    Err(error) => errors.push(error.to_string()),
                }
            }
            (latencies_us, errors)
        });
    }
    let (mut latencies_us, mut errors) = (Vec::new(), Vec::new());
    while let Some(done) = tasks.join_next().await {
        let (more, failed) = done.map_err(Failure::other)?;
        latencies_us.extend(more);
        errors.extend(failed);
    }
    let seconds = begin.elapsed().as_secs_f64();
    latencies_us.sort_unstable();
    let at = |q: f64| {
        let index = ((latencies_us.len() as f64 - 1.0) * q).max(0.0) as usize;
        latencies_us.get(index).map_or(0.0, |us| *us as f64 / 1000.0)
    };
    let per_second = latencies_us.len() as f64 / seconds;
    let t = session.client.manifest().thresholds;
    if let Some(first) = errors.first() {
        eprintln!("{} errors, the first: {first}", errors.len());
    }
    if session.json {
        print_json(&json!({
            "requests": latencies_us.len(), "errors": errors.len(), "seconds": seconds, "per_second": per_second,
            "latency_ms": { "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0) },
            "settings": { "what": format!("{:?}", args.what).to_lowercase(), "clients": args.clients, "n": t.servers, "names": args.names },
        }));
    } else {
        println!(
            "{:?}: {} in {seconds:.1} s = {per_second:.0}/s with {} clients at n = {}; ms: p50 {:.1}, p90 {:.1}, p99 {:.1}, max {:.1}; errors: {}",
            args.what,
            latencies_us.len(),
            args.clients,
            t.servers,
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0),
            errors.len()
        );
    }
    Ok(())
}

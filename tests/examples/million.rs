//! How a cluster grows: names are registered up to several sizes, and at each one it is measured what they
//! cost.
//!
//! ```text
//! cargo build --release --workspace --bins && cargo run --release -p kds-tests --example million -- [SERVERS] [NAMES...]
//! ```

use anyhow::{Context as _, ensure};
use kds_client::LookupOptions;
use kds_tests::compare::measure;
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::record::Name;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Registrations under way at once.
const WRITERS: usize = 256;

fn name(i: u64) -> Name {
    Name::new(format!("user{i:07}@example.com")).expect("a good name")
}

/// A field of /proc/PID/status, in megabytes.
fn memory_mb(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

async fn register(cluster: &Cluster, from: u64, to: u64) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU64::new(from));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let (client, key, next) = (cluster.client.clone(), cluster.administrator.clone(), Arc::clone(&next));
        tasks.spawn(async move {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= to {
                    return anyhow::Ok(());
                }
                client.register(&key, name(i), entry(i as u8 | 1, None)).await?;
                if i.is_multiple_of(100_000) {
                    eprintln!("{i} names …");
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>().context("a number"));
    let servers = arguments.next().transpose()?.unwrap_or(4) as usize;
    let mut sizes = arguments.collect::<Result<Vec<_>, _>>()?;
    if sizes.is_empty() {
        sizes = vec![10_000, 100_000, 1_000_000];
    }
    let mut cluster = Cluster::start_unlimited(servers).await?;
    let processes = |cluster: &Cluster| -> Vec<u32> {
        (0..servers).filter_map(|server| cluster.process(server)).collect()
    };
    let empty = memory_mb(processes(&cluster)[1]);
    println!(
        "| names | loaded in s | per second | memory of a server MB | bytes per name | database MB | proof: steps, bytes of JSON | lookup p50 ms, one client | lookups/s, 64 clients | restart s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let mut before = 0;
    for size in sizes {
        let begun = Instant::now();
        register(&cluster, before, size).await?;
        let load = begun.elapsed().as_secs_f64();
        let speed = (size - before) as f64 / load;
        before = size;
        cluster.level().await?;
        let client = cluster.fresh_client();
        let lookup = move |i: u64| {
            let client = client.clone();
            async move {
                let found =
                    client.lookup(&name(i.wrapping_mul(7_919) % size), &LookupOptions::default()).await?;
                ensure!(found.record.is_some(), "a name is missing");
                Ok(())
            }
        };
        let all = processes(&cluster);
        measure(64, 1.0, &all, lookup.clone()).await;
        let alone = measure(1, 3.0, &all, lookup.clone()).await;
        let many = measure(64, 3.0, &all, lookup).await;
        ensure!(alone.errors + many.errors == 0, "lookups failed");
        let link = cluster.client.link(ServerId(1)).context("no server")?.clone();
        let path = format!("/v1/records/{}", name(size / 2));
        let (_, answer) = link.send("GET", &path, vec![]).await.map_err(anyhow::Error::msg)?;
        let document: serde_json::Value = serde_json::from_slice(&answer)?;
        let proof = &document["current"]["proof"];
        let steps = proof["steps"].as_array().map_or(0, Vec::len);
        // Replies to clients are kept until they expire: they are not what names cost.
        tokio::time::sleep(std::time::Duration::from_secs(65)).await;
        let memory = memory_mb(processes(&cluster)[1]);
        let database = std::fs::metadata(cluster.server_dir(1).join("kds.db"))?.len() as f64 / 1e6;
        cluster.terminate(1)?;
        let begun = Instant::now();
        cluster.run(1)?;
        while !matches!(link.send("GET", "/readyz", vec![]).await, Ok((200, _))) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let restart = begun.elapsed().as_secs_f64();
        let restarted = memory_mb(processes(&cluster)[1]);
        println!(
            "| {size} | {load:.0} | {speed:.0} | {memory:.0}, {restarted:.0} after a restart | {:.0} | {database:.0} | {steps}, {} | {:.2} | {:.0} | {restart:.1} |",
            (restarted - empty) * 1024.0 * 1024.0 / size as f64,
            proof.to_string().len(),
            alone.p50_ms,
            many.per_second,
        );
    }
    Ok(())
}

//! Acknowledged writes side by side: the service unreplicated, at n = 4 and n = 9, and etcd.
//!
//! ```text
//! apt-get install etcd-server
//! cargo build --release --workspace && cargo run --release -p kds-tests --example compare -- [SECONDS] [ROUNDS]
//! ```
//!
//! One after the other on this machine, in rounds, so that a slow minute hits all alike: servers and load
//! generator share its cores. Durability is the same everywhere: what is acknowledged survives a power
//! failure (etcd and SQLite both flush before they answer). etcd runs as three members, TLS with client
//! certificates for clients and peers, asked over gRPC on one connection to each member, as its own client
//! does. A write of ours counts when its receipt is verified and the write is complete; both carry about 200
//! bytes of value. "Unreplicated" is the same server program alone: same API, same checks, same storage;
//! nobody to agree with.

use anyhow::{Context as _, ensure};
use kds_tests::compare::{Etcd, Measured, measure, median, put};
use kds_tests::{Cluster, entry};
use quorum::record::Name;

const CLIENTS: [usize; 4] = [1, 16, 64, 256];

async fn ours(servers: usize, seconds: f64) -> anyhow::Result<Vec<Measured>> {
    let cluster = Cluster::start_unlimited(servers).await?;
    let processes: Vec<_> = (0..servers).filter_map(|server| cluster.process(server)).collect();
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let (client, key) = (cluster.client.clone(), cluster.administrator.clone());
        let run = rand::random::<u32>();
        let operation = move |i: u64| {
            let (client, key) = (client.clone(), key.clone());
            async move {
                let mut entry = entry(1, None);
                entry.metadata.insert("value".into(), "x".repeat(150));
                let written =
                    client.register(&key, Name::new(format!("bench/{run:08x}/{i:012}"))?, entry).await?;
                ensure!(written.complete, "not complete");
                Ok(())
            }
        };
        // Warm: connections, caches, and a state that is not empty.
        measure(clients, 0.5, &processes, operation.clone()).await;
        measured.push(measure(clients, seconds, &processes, operation).await);
    }
    Ok(measured)
}

async fn etcd(seconds: f64) -> anyhow::Result<Vec<Measured>> {
    let etcd = Etcd::start().await?;
    let processes = etcd.processes();
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let connections = etcd.connections.clone();
        let operation = move |i: u64| {
            let connection = connections[i as usize % connections.len()].clone();
            async move { put(connection, format!("bench/{i:012}").as_bytes(), &[b'x'; 200]).await }
        };
        measure(clients, 0.5, &processes, operation.clone()).await;
        measured.push(measure(clients, seconds, &processes, operation).await);
    }
    Ok(measured)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let argument = |i: usize, default: f64| {
        std::env::args().nth(i).map_or(Ok(default), |text| text.parse()).context("a number")
    };
    let (seconds, rounds) = (argument(1, 5.0)?, argument(2, 3.0)? as usize);
    let only = std::env::args().nth(3);
    let names = ["unreplicated", "n = 4", "n = 9", "etcd, 3 members"];
    let mut all: Vec<Vec<Vec<Measured>>> = vec![vec![Vec::new(); CLIENTS.len()]; names.len()];
    for round in 1..=rounds {
        for (system, name) in names.iter().enumerate() {
            if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
                all[system].iter_mut().for_each(|of| of.push(Measured::default()));
                continue;
            }
            eprintln!("round {round} of {rounds}: {name} …");
            let measured = match system {
                0 => ours(1, seconds).await?,
                1 => ours(4, seconds).await?,
                2 => ours(9, seconds).await?,
                _ => etcd(seconds).await?,
            };
            for (clients, measured) in measured.into_iter().enumerate() {
                all[system][clients].push(measured);
            }
        }
    }
    println!("writes, {seconds} s each, the middle one of {rounds} rounds\n");
    println!(
        "| clients | system | per second | p50 ms | p99 ms | CPU ms per write | errors | throughput, p50, CPU ÷ etcd | p50 ÷ unreplicated |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (c, clients) in CLIENTS.iter().enumerate() {
        let of: Vec<Measured> = (0..names.len()).map(|system| median(all[system][c].clone())).collect();
        let (alone, base) = (of[0], of[3]);
        for (name, m) in names.iter().zip(&of) {
            println!(
                "| {clients} | {name} | {:.0} | {:.2} | {:.2} | {:.2} | {} | {:.2}, {:.2}, {:.2} | {:.2} |",
                m.per_second,
                m.p50_ms,
                m.p99_ms,
                m.cpu_ms_per_operation,
                m.errors,
                m.per_second / base.per_second,
                m.p50_ms / base.p50_ms,
                m.cpu_ms_per_operation / base.cpu_ms_per_operation,
                m.p50_ms / alone.p50_ms,
            );
        }
    }
    let at = |system: usize, c: usize| median(all[system][c].clone()).per_second;
    println!(
        "\nn = 9 ÷ n = 4, throughput: {:.2} with 64 clients, {:.2} with 256",
        at(2, 2) / at(1, 2),
        at(2, 3) / at(1, 3)
    );
    Ok(())
}

//! What epochs cost a cluster that is at work: lookups and registers while secrets are renewed all the time,
//! beside the same without; and what a `secret get` costs beside an ordered write.
//!
//! ```text
//! cargo run --release -p kds-tests --example epochs [-- SERVERS [SECRETS [SECONDS]]]
//! ```

use kds_client::LookupOptions;
use kds_tests::{Cluster, compare, entry};
use quorum::ServerId;
use quorum::record::Name;
use quorum::request::Operation;
use std::time::{Duration, Instant};

const CLIENTS: usize = 16;

struct Figures {
    lookups: f64,
    registers: f64,
    epochs: u64,
    get_ms: f64,
    register_ms: f64,
}

async fn figures(servers: usize, epoch: &str, secrets: usize, seconds: f64) -> anyhow::Result<Figures> {
    let cluster = Cluster::start_with(servers, &[&format!("--epoch-seconds={epoch}")]).await?;
    let (client, key) = (cluster.client.clone(), cluster.administrator.clone());
    cluster.register("known", 1).await?;
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for part in 0..CLIENTS {
        let (client, key) = (client.clone(), key.clone());
        tasks.spawn(async move {
            for i in (part..secrets).step_by(CLIENTS) {
                let name = Name::new(format!("secret-{i}"))?;
                client.put_secret(&key, &name, b"material", &[], false, true).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    eprintln!("epochs of {epoch} s: {secrets} secrets deposited in {:.0} s", began.elapsed().as_secs_f64());
    let processes: Vec<_> = (0..servers).filter_map(|server| cluster.process(server)).collect();
    let from = client.server_status(ServerId(0)).await.map_err(anyhow::Error::msg)?.epoch.0;
    let reader = client.clone();
    let lookups = compare::measure(CLIENTS, seconds, &processes, move |_| {
        let client = reader.clone();
        async move {
            let found = client.lookup(&Name::new("known")?, &LookupOptions::default()).await?;
            anyhow::ensure!(found.record.is_some(), "it is registered");
            Ok(())
        }
    });
    let lookups = lookups.await;
    let (writer, by) = (client.clone(), key.clone());
    let registers = compare::measure(CLIENTS, seconds, &processes, move |number| {
        let (client, key) = (writer.clone(), by.clone());
        async move {
            let name = Name::new(format!("n-{number}"))?;
            client.submit(&key, Operation::Register { name, entry: entry(1, None) }).await?;
            Ok(())
        }
    });
    let registers = registers.await;
    let epochs = client.server_status(ServerId(0)).await.map_err(anyhow::Error::msg)?.epoch.0 - from;
    // One after the other: what a single caller waits for.
    let (mut get_ms, mut register_ms) = (Vec::new(), Vec::new());
    for i in 0..40 {
        let began = Instant::now();
        client.get_secret(&key, &Name::new(format!("secret-{i}"))?).await?;
        get_ms.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        cluster.register(&format!("single-{i}"), 1).await?;
        register_ms.push(began.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(if i == 20 { 60_500 } else { 0 })).await;
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(Figures {
        lookups: lookups.per_second,
        registers: registers.per_second,
        epochs,
        get_ms: median(&mut get_ms),
        register_ms: median(&mut register_ms),
    })
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let numbers: Vec<usize> = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let servers = numbers.first().copied().unwrap_or(4);
    let secrets = numbers.get(1).copied().unwrap_or(2_000);
    let seconds = numbers.get(2).copied().unwrap_or(20) as f64;
    let without = figures(servers, "86400", secrets, seconds).await?;
    let with = figures(servers, "2", secrets, seconds).await?;
    println!("n = {servers}, {secrets} secrets, {} epochs in {:.0} s", with.epochs, 2.0 * seconds);
    println!("{:<22} {:>12} {:>12} {:>8}", "", "no refresh", "every 2 s", "ratio");
    for (what, without, with) in
        [("lookups/s", without.lookups, with.lookups), ("registers/s", without.registers, with.registers)]
    {
        println!("{what:<22} {without:>12.0} {with:>12.0} {:>8.2}", with / without);
    }
    println!(
        "secret get: {:.1} ms, register: {:.1} ms, ratio {:.2}",
        without.get_ms,
        without.register_ms,
        without.get_ms / without.register_ms
    );
    Ok(())
}

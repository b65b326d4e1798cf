//! How the load of reads on each server falls as the grid grows, in the number of lookups that each server
//! answers; a table, and a plot as SVG.
//!
//! ```text
//! cargo build --release --workspace --bins && cargo run --release -p kds-tests --example load -- docs/load.svg
//! ```

use anyhow::ensure;
use kds_client::LookupOptions;
use kds_tests::Cluster;
use quorum::ServerId;
use quorum::record::Name;
use std::fmt::Write as _;

const LOOKUPS: usize = 20_000;
const CLIENTS: usize = 16;

struct Load {
    servers: usize,
    /// Lookups that each server answered, as parts of all lookups.
    shares: Vec<f64>,
    /// Among them whole answers.
    full: f64,
    requests: u64,
}

fn name(i: usize) -> Name {
    Name::new(format!("name-{}", i % 100)).expect("a good name")
}

/// Sums a metric over its labels that contain a text.
fn sum(metrics: &str, metric: &str, label: &str) -> u64 {
    let lines = metrics.lines().filter(|line| line.starts_with(metric) && line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

async fn measure(servers: usize) -> anyhow::Result<Load> {
    let cluster = Cluster::start_unlimited(servers).await?;
    for i in 0..100 {
        cluster.register(name(i).as_str(), 1).await?;
    }
    cluster.level().await?;
    let read = async || {
        let mut read = Vec::new();
        for server in 0..servers {
            let link = cluster.client.link(ServerId(server as u8)).expect("it is in the manifest");
            let (_, text) = link.send("GET", "/metrics", vec![]).await.map_err(anyhow::Error::msg)?;
            let text = String::from_utf8(text)?;
            let requests = sum(&text, "kds_http_requests_total", "/v1/records/lookup");
            read.push([
                sum(&text, "kds_lookups_total", "full"),
                sum(&text, "kds_lookups_total", "brief"),
                requests,
            ]);
        }
        anyhow::Ok(read)
    };
    let before = read().await?;
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..CLIENTS {
        // Each a client of its own, as if on a machine of its own.
        let client = cluster.fresh_client();
        tasks.spawn(async move {
            for i in 0..LOOKUPS / CLIENTS {
                let found = client.lookup(&name(worker + i), &LookupOptions::default()).await?;
                ensure!(found.record.is_some(), "a name is missing");
            }
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let after = read().await?;
    let used = |kind: usize| after.iter().zip(&before).map(move |(a, b)| a[kind] - b[kind]);
    let shares = used(0).zip(used(1)).map(|(full, brief)| (full + brief) as f64 / LOOKUPS as f64).collect();
    Ok(Load {
        servers,
        shares,
        full: used(0).sum::<u64>() as f64 / (LOOKUPS * servers) as f64,
        requests: used(2).sum(),
    })
}

fn plot(loads: &[Load]) -> Result<String, std::fmt::Error> {
    let (width, height, left, bottom) = (560.0, 320.0, 60.0, 40.0);
    let x = |servers: usize| left + (servers as f64).sqrt().mul_add(110.0, -160.0);
    let y = |share: f64| height - bottom - share * (height - bottom - 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        writeln!(
            svg,
            "<path d=\"M{left} {0}H{1}\" stroke=\"#ddd\"/><text x=\"{2}\" y=\"{3}\" text-anchor=\"end\">{4} %</text>",
            y(share),
            width - 10.0,
            left - 6.0,
            y(share) + 4.0,
            share * 100.0
        )?;
    }
    let points: Vec<_> =
        loads.iter().map(|l| (l.servers, l.shares.iter().sum::<f64>() / l.servers as f64)).collect();
    let line = |of: &dyn Fn(usize, f64) -> f64| {
        let at = points.iter().map(|(n, share)| format!("{:.1},{:.1}", x(*n), y(of(*n, *share))));
        at.collect::<Vec<_>>().join(" ")
    };
    writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#888\" stroke-dasharray=\"4\"/>",
        line(&|n, _| 1.0 / (n as f64).sqrt())
    )?;
    writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#06c\" stroke-width=\"2\"/>",
        line(&|_, share| share)
    )?;
    for load in loads {
        let (least, most) = (
            load.shares.iter().copied().fold(1.0, f64::min),
            load.shares.iter().copied().fold(0.0, f64::max),
        );
        writeln!(svg, "<path d=\"M{0} {1}V{2}\" stroke=\"#06c\"/>", x(load.servers), y(least), y(most))?;
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">n = {}</text>",
            x(load.servers),
            height - bottom + 18.0,
            load.servers
        )?;
    }
    writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#06c\">lookups that one server answers, of all (bars: least and most busy server); dashed: 1/√n</text>",
        width / 2.0 + 20.0,
        14.0
    )?;
    svg.push_str("</svg>\n");
    Ok(svg)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut loads = Vec::new();
    println!(
        "| n | servers asked per lookup | lookups that one server answers, of all | least and most busy | whole answers, of all | requests per lookup |"
    );
    println!("|---|---|---|---|---|---|");
    for servers in [4, 9, 16, 25] {
        let load = measure(servers).await?;
        let mean = load.shares.iter().sum::<f64>() / servers as f64;
        println!(
            "| {servers} | {:.2} | {:.1} % | {:.1} %, {:.1} % | {:.1} % | {:.2} |",
            mean * servers as f64,
            mean * 100.0,
            load.shares.iter().copied().fold(1.0, f64::min) * 100.0,
            load.shares.iter().copied().fold(0.0, f64::max) * 100.0,
            load.full * 100.0,
            load.requests as f64 / LOOKUPS as f64,
        );
        loads.push(load);
    }
    if let Some(path) = std::env::args().nth(1) {
        std::fs::write(path, plot(&loads)?)?;
    }
    Ok(())
}

//! Looks for a seed that breaks an invariant, for as long as it is let.
//!
//! ```text
//! cargo run -p quorum --example hunt -- [MINUTES] [SCENARIO] [FIRST-SEED]
//! ```
//!
//! Every scenario of the simulation with every number of servers in turn, with new seeds each time.
//! Prints each failure with the command that replays it, and ends with status 1 if there was one.
//! With `SCENARIO:SERVERS` it stays there. The mutation check runs it on broken copies of the core; `KDS_HUNT_STOP`
//! ends it at the first failure, `KDS_HUNT_RUNS` after so many runs.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a clock says when the hunt ends, not what happens in a run"
)]

#[path = "../tests/simulation/cluster.rs"]
mod cluster;
#[path = "../tests/simulation/disk.rs"]
mod disk;
#[path = "../tests/simulation/liar.rs"]
mod liar;
#[path = "../tests/simulation/patient.rs"]
mod patient;
#[path = "../tests/simulation/readers.rs"]
mod readers;
#[path = "../tests/simulation/scenarios.rs"]
mod scenarios;
#[path = "../tests/simulation/secrets.rs"]
mod secrets;
#[path = "../tests/simulation/thief.rs"]
mod thief;

use cluster::Simulation;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let minutes: f64 = arguments.first().map_or(10.0, |text| text.parse().expect("minutes"));
    let only = arguments.get(1).filter(|text| *text != "all");
    let first: u64 = arguments.get(2).map_or(1_000_000, |text| text.parse().expect("a seed"));
    let stop_at_first = std::env::var_os("KDS_HUNT_STOP").is_some();
    let most =
        std::env::var("KDS_HUNT_RUNS").map_or(u64::MAX, |text| text.parse().expect("a number of runs"));
    let mut lairs = Vec::new();
    for (name, sizes, faults) in scenarios::ALL {
        for servers in *sizes {
            let wanted = only.is_none_or(|only| only == name || *only == format!("{name}:{servers}"));
            lairs.extend(wanted.then_some((*name, *servers, *faults)));
        }
    }
    assert!(!lairs.is_empty(), "no such scenario: {only:?}");

    let (start, mut reported) = (Instant::now(), Instant::now());
    let limit = Duration::from_secs_f64(minutes * 60.0);
    let (mut runs, mut failures, mut transfers, mut recoveries, mut equivocations) = (0u64, 0, 0, 0, 0);
    let (mut trace, mut views) = (quorum::Hash([0; 32]), 0);
    std::panic::set_hook(Box::new(|_| {}));
    for round in 0.. {
        for (place, (name, servers, faults)) in lairs.iter().enumerate() {
            // Some stand there more than once: each with seeds of its own.
            let seed = first + round + 1_000_000_000 * place as u64;
            if start.elapsed() >= limit || runs >= most {
                println!(
                    "{runs} runs, {failures} failures; {equivocations} equivocations noticed, {transfers} states transferred, {recoveries} servers recovered from forgetting, {views} views began; trace of the last run {trace}"
                );
                std::process::exit(i32::from(failures > 0));
            }
            runs += 1;
            let run = catch_unwind(AssertUnwindSafe(|| {
                let mut simulation = Simulation::new(*servers, seed, *faults);
                simulation.run();
                (
                    simulation.transfers,
                    simulation.recoveries,
                    simulation.equivocations,
                    simulation.trace_digest(),
                    simulation.view().0,
                )
            }));
            match run {
                Ok(happened) => {
                    transfers += happened.0;
                    recoveries += happened.1;
                    equivocations += happened.2;
                    trace = happened.3;
                    views += happened.4;
                }
                Err(panic) => {
                    failures += 1;
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                    println!(
                        "run {runs}: {name} with {servers} servers, seed {seed}: {}",
                        text.unwrap_or_default()
                    );
                    println!(
                        "  KDS_SIM_SEED={seed} KDS_SIM_SCENARIO={name}:{servers} cargo test -p quorum --test simulation replay -- --nocapture"
                    );
                    if stop_at_first {
                        std::process::exit(1);
                    }
                }
            }
        }
        if reported.elapsed() >= Duration::from_secs(60) {
            reported = Instant::now();
            println!("{:>4} min: {runs} runs, {failures} failures", start.elapsed().as_secs() / 60);
        }
    }
}

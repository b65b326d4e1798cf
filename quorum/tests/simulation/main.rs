//! Deterministic simulation of the replicas that the server runs.
//!
//! A seed decides everything: delays, losses, duplicates, crashes, what clients ask. After every
//! event the invariants are checked; at the end the network heals and progress is required.
//!
//! `KDS_SIM_SEED=17 cargo test -p quorum --test simulation` replays one seed and prints its event
//! log; `KDS_SIM_SEEDS=5000` runs more of them.

mod cluster;
mod disk;

use cluster::{Faults, Simulation};

fn seeds(default: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match (number("KDS_SIM_SEED"), number("KDS_SIM_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, count) => (0..count.unwrap_or(default)).collect(),
    }
}

/// Runs all seeds; says how often the liar was accused.
fn run(servers: usize, faults: Faults, default_seeds: u64) -> usize {
    let mut accused = 0;
    for seed in seeds(default_seeds) {
        let mut simulation = Simulation::new(servers, seed, faults);
        simulation.verbose = std::env::var_os("KDS_SIM_SEED").is_some();
        simulation.run();
        accused += simulation.equivocations;
    }
    accused
}

const GOOD: Faults = Faults {
    loss: 0.0,
    duplication: 0.0,
    max_delay_ms: 20,
    crashes: false,
    deaths: false,
    partitions: false,
    twins: false,
};
const LOSSY: Faults = Faults {
    loss: 0.15,
    duplication: 0.1,
    max_delay_ms: 400,
    crashes: false,
    deaths: false,
    partitions: false,
    twins: false,
};
const CRASHING: Faults = Faults {
    loss: 0.05,
    duplication: 0.05,
    max_delay_ms: 150,
    crashes: true,
    deaths: false,
    partitions: false,
    twins: false,
};

const DYING: Faults = Faults {
    loss: 0.05,
    duplication: 0.05,
    max_delay_ms: 100,
    crashes: false,
    deaths: true,
    partitions: false,
    twins: false,
};
const EVERYTHING: Faults = Faults {
    loss: 0.1,
    duplication: 0.1,
    max_delay_ms: 300,
    crashes: true,
    deaths: true,
    partitions: true,
    twins: false,
};

#[test]
fn four_replicas_on_a_good_network() {
    run(4, GOOD, 10);
}
#[test]
fn four_replicas_with_loss_duplication_and_reordering() {
    run(4, LOSSY, 40);
}
#[test]
fn four_replicas_that_crash_and_forget_what_was_not_durable() {
    run(4, CRASHING, 40);
}
#[test]
fn nine_replicas_with_loss_duplication_and_reordering() {
    run(9, LOSSY, 10);
}
#[test]
fn nine_replicas_that_crash_and_forget_what_was_not_durable() {
    run(9, CRASHING, 10);
}

#[test]
fn four_replicas_whose_primary_dies() {
    run(4, DYING, 40);
}
#[test]
fn nine_replicas_whose_first_primaries_die() {
    run(9, DYING, 10);
}
#[test]
fn four_replicas_and_everything_at_once() {
    run(4, EVERYTHING, 60);
}
#[test]
fn nine_replicas_and_everything_at_once() {
    run(9, EVERYTHING, 12);
}

const TWINS: Faults = Faults {
    loss: 0.05,
    duplication: 0.05,
    max_delay_ms: 100,
    crashes: false,
    deaths: false,
    partitions: false,
    twins: true,
};

#[test]
fn four_replicas_and_a_primary_that_says_two_things() {
    assert!(run(4, TWINS, 60) > 0, "the twins never said two things: this tests nothing");
}
#[test]
fn nine_replicas_and_a_primary_that_says_two_things() {
    assert!(run(9, TWINS, 10) > 0, "the twins never said two things: this tests nothing");
}

/// The same seed gives the same run, to the last byte sent.
#[test]
fn a_seed_reproduces_a_run() {
    let mut one = Simulation::new(4, 3, CRASHING);
    let mut two = Simulation::new(4, 3, CRASHING);
    one.run();
    two.run();
    assert_eq!(one.trace_digest(), two.trace_digest());
    let mut three = Simulation::new(4, 4, CRASHING);
    three.run();
    assert_ne!(one.trace_digest(), three.trace_digest());
}

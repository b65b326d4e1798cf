//! Deterministic simulation of the replicas that the server runs.
//!
//! A seed decides everything: delays, losses, duplicates, crashes, what clients ask. After every
//! event the invariants are checked; at the end the network heals and progress is required.
//!
//! `KDS_SIM_SEED=17 cargo test -p quorum --test simulation` replays one seed and prints its event
//! log; `KDS_SIM_SEEDS=5000` runs more of them.

mod cluster;
mod disk;
mod liar;
mod patient;
mod readers;
mod scenarios;
mod secrets;
mod thief;

use cluster::{Faults, Simulation};
use quorum::ids::View;
use scenarios::*;
use std::collections::BTreeSet;

fn seeds(default: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match (number("KDS_SIM_SEED"), number("KDS_SIM_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, count) => (0..count.unwrap_or(default)).collect(),
    }
}

/// What happened in all runs, to show that something did.
#[derive(Default)]
struct Happened {
    equivocations: usize,
    transfers: usize,
    recoveries: usize,
    repairs: usize,
    replacements: usize,
    wrong_dealings: usize,
    /// Epochs that ended early, and shares that were recovered.
    early: usize,
    recovered: usize,
    /// Lies under keys that were stolen in epochs that are over.
    old_lies: usize,
    views: Vec<View>,
    reads: usize,
    lies: usize,
    rejected: usize,
}

fn run(servers: usize, faults: Faults, default_seeds: u64) -> Happened {
    let mut happened = Happened::default();
    for seed in seeds(default_seeds) {
        let mut simulation = Simulation::new(servers, seed, faults);
        simulation.verbose = std::env::var_os("KDS_SIM_SEED").is_some();
        simulation.run();
        happened.equivocations += simulation.equivocations;
        happened.transfers += simulation.transfers;
        happened.recoveries += simulation.recoveries;
        happened.repairs += simulation.repairs;
        happened.replacements += simulation.replacements;
        happened.wrong_dealings += simulation.wrong_dealings;
        happened.early += simulation.secrets.early;
        happened.recovered += simulation.secrets.recovered;
        happened.old_lies += simulation.thief.old;
        happened.views.push(simulation.view());
        if let Some(readers) = &simulation.readers {
            happened.reads += readers.reads;
            happened.lies += readers.lies;
            happened.rejected += readers.rejected;
        }
    }
    happened
}

macro_rules! simulations {
    ($($name:ident: $servers:literal, $faults:ident, $seeds:literal;)*) => {
        $(#[test]
        fn $name() {
            run($servers, $faults, $seeds);
        })*
    };
}
simulations! {
    four_replicas_on_a_good_network: 4, GOOD, 10;
    four_replicas_with_loss_duplication_and_reordering: 4, LOSSY, 120;
    four_replicas_that_crash_and_forget_what_was_not_durable: 4, CRASHING, 120;
    four_replicas_whose_primary_dies: 4, DYING, 100;
    four_replicas_and_a_liar: 4, LYING, 500;
    four_replicas_and_everything_at_once: 4, EVERYTHING, 500;
    seven_replicas_and_liars: 7, LYING, 120;
    seven_replicas_and_everything_at_once: 7, EVERYTHING, 120;
    nine_replicas_with_loss_duplication_and_reordering: 9, LOSSY, 10;
    nine_replicas_that_crash_and_forget_what_was_not_durable: 9, CRASHING, 10;
    nine_replicas_whose_first_primaries_die: 9, DYING, 10;
    nine_replicas_and_liars: 9, LYING, 60;
    nine_replicas_and_everything_at_once: 9, EVERYTHING, 60;
    four_replicas_that_keep_secrets: 4, KEEPING, 10;
    four_replicas_that_keep_secrets_with_loss: 4, KEEPING_LOSSY, 60;
    four_replicas_that_keep_secrets_and_crash: 4, KEEPING_CRASHING, 80;
    four_replicas_that_keep_secrets_through_everything: 4, KEEPING_THROUGH_EVERYTHING, 60;
    nine_replicas_that_keep_secrets: 9, KEEPING, 4;
    nine_replicas_that_keep_secrets_and_crash: 9, KEEPING_CRASHING, 8;
    nine_replicas_that_keep_secrets_through_everything: 9, KEEPING_THROUGH_EVERYTHING, 8;
    sixteen_replicas_and_liars: 16, LYING, 6;
    sixteen_replicas_and_everything_at_once: 16, EVERYTHING, 6;
}

#[test]
fn four_replicas_and_a_primary_that_says_two_things() {
    assert!(run(4, TWINS, 200).equivocations > 0, "the twins never said two things: this tests nothing");
}
#[test]
fn nine_replicas_and_a_primary_that_says_two_things() {
    assert!(run(9, TWINS, 10).equivocations > 0, "the twins never said two things: this tests nothing");
}
/// Good service is asked for, not just some: a primary that is always late is replaced; one that is not, stays.
#[test]
fn four_replicas_and_a_primary_that_is_slow() {
    for view in run(4, SLUGGISH, 20).views {
        assert!(view > View(0), "a primary that delays everything by 1.3 s stays");
    }
    for view in run(4, GOOD, 10).views {
        assert_eq!(view, View(0), "a good primary is replaced");
    }
}
/// Who serves badly does not stay, and the one after it does: see `patient.rs`.
#[test]
fn replicas_and_a_primary_that_keeps_every_other_request() {
    run(4, KEEPING_REQUESTS, 20);
    run(9, KEEPING_REQUESTS, 4);
}
#[test]
fn replicas_and_a_primary_that_orders_no_steps_of_others() {
    run(4, KEEPING_STEPS, 10);
    run(9, KEEPING_STEPS, 2);
}
#[test]
fn replicas_and_a_primary_whose_clock_lags() {
    run(4, LAGGING_TIME, 20);
    run(9, LAGGING_TIME, 4);
}
#[test]
fn replicas_and_a_backup_that_tells_others_what_the_primary_does_not_know() {
    run(4, TELLING_BACKUPS, 10);
    run(9, TELLING_BACKUPS, 2);
}
#[test]
fn replicas_and_liars_who_keep_a_prepared_batch_to_themselves() {
    run(9, HOARDING, 6);
}
/// Batches that were prepared after a hole outlive its maker.
#[test]
fn replicas_and_a_primary_that_leaves_a_hole_and_dies() {
    run(4, HOLE, 10);
    run(9, HOLE, 4);
}
/// A new view begins although each has heard something else: what it names is fetched.
#[test]
fn replicas_and_liars_who_show_each_another_view_change() {
    run(4, EACH_ANOTHER, 10);
    run(9, EACH_ANOTHER, 6);
}
/// One view change of as many replicas as a test has time for (docs/testing.md).
#[test]
fn a_view_change_of_many_replicas() {
    let servers = std::env::var("KDS_SIM_SERVERS").map_or(100, |text| text.parse().expect("a number"));
    run(servers, HOLE, 1);
}
#[test]
fn four_replicas_of_which_one_forgets() {
    assert!(run(4, FORGETTING, 80).recoveries > 0, "no server recovered: this tests nothing");
}
/// A number in the signer's memory that an old copy of a database does not know: else the second one to be restored
/// would be told by the first that it has never voted.
#[test]
fn four_replicas_that_forget_one_after_the_other() {
    let recoveries = run(4, FORGETTING_IN_TURN, 60).recoveries;
    assert!(recoveries > 120, "{recoveries} servers recovered: this tests little");
}
/// Within seconds it votes and has its shares, although an epoch is long and nothing else happens: see `check_back`.
#[test]
fn a_restored_replica_of_a_quiet_cluster_is_back_in_seconds() {
    for (servers, seeds) in [(4, 40), (9, 8)] {
        let happened = run(servers, RESTORED, seeds);
        // A copy that is not older than the voting key is no loss.
        let (back, shares) = (happened.recoveries, happened.recovered);
        assert!(
            back > seeds as usize / 2 && shares > seeds as usize,
            "{back} came back, {shares} shares did"
        );
    }
}
/// Liars who ask for epochs get what they may and no more: see `check_epoch`.
#[test]
fn replicas_that_ask_for_epochs_make_few_more_of_them() {
    for (servers, seeds) in [(4, 10), (9, 3)] {
        let early = run(servers, ASKING, seeds).early;
        let f = (servers - 1) / 3;
        assert!(early > 0 && early <= seeds as usize * f, "{early} epochs ended early");
    }
}
#[test]
fn four_replicas_of_which_one_has_a_wrong_state() {
    assert!(run(4, CORRUPT, 30).repairs > 5, "no state was repaired: this tests nothing");
}
#[test]
fn four_replicas_of_which_one_is_replaced() {
    assert!(run(4, KEEPING_REPLACED, 20).replacements > 10, "too few were replaced: this tests nothing");
    run(4, KEEPING_REPLACED_APART, 60);
}
#[test]
fn nine_replicas_of_which_some_are_replaced() {
    assert!(run(9, KEEPING_REPLACED, 3).replacements > 3, "too few were replaced: this tests nothing");
    run(9, KEEPING_REPLACED_APART, 6);
}
#[test]
fn four_replicas_that_keep_secrets_and_a_liar() {
    assert!(run(4, KEEPING_LYING, 80).wrong_dealings > 10, "liars dealt rightly: this tests nothing");
}
#[test]
fn nine_replicas_that_keep_secrets_and_liars() {
    assert!(run(9, KEEPING_LYING, 8).wrong_dealings > 10, "liars dealt rightly: this tests nothing");
}
/// A mobile adversary keeps every voting key that she was ever near, and votes with all of them: see `thief.rs`.
#[test]
fn replicas_of_which_others_are_robbed_each_epoch() {
    for (servers, seeds) in [(4, 40), (9, 6)] {
        let happened = run(servers, KEEPING_ROBBED, seeds);
        assert!(happened.old_lies > 1_000, "{} lies under old keys: this tests nothing", happened.old_lies);
    }
}
#[test]
fn four_replicas_that_fall_far_behind() {
    assert!(run(4, LAGGING, 60).transfers > 0, "no state was transferred: this tests nothing");
}

/// Reads succeed and see every completed write while no more lie than are masked.
#[test]
fn readers_of_four_servers_of_which_one_lies() {
    assert_lied_to(run(4, READING, 30));
}
#[test]
fn readers_of_nine_servers_of_which_one_lies() {
    assert_lied_to(run(9, READING, 20));
}
#[test]
fn readers_of_sixteen_servers_of_which_one_lies() {
    assert_lied_to(run(16, READING, 3));
}
/// With more liars nothing is forged, and nothing older than allowed.
#[test]
fn readers_of_nine_servers_of_which_two_lie() {
    assert_lied_to(run(9, DECEIVED, 20));
}
#[test]
fn readers_of_sixteen_servers_of_which_five_lie() {
    assert_lied_to(run(16, DECEIVED, 3));
}
#[test]
fn readers_while_servers_crash_and_the_network_parts() {
    assert_lied_to(run(4, READING_THROUGH_IT, 30));
    assert_lied_to(run(9, READING_THROUGH_IT, 8));
}
fn assert_lied_to(happened: Happened) {
    println!("{} reads, {} lies, {} rejected", happened.reads, happened.lies, happened.rejected);
    let enough = happened.reads > 100 && happened.lies > 50 && happened.rejected > 10;
    assert!(enough, "this tests nothing: {} reads, {} lies", happened.reads, happened.lies);
}

/// What hunts found stays found.
#[test]
fn seeds_that_failed_once() {
    for (scenario, servers, seed) in [
        // A server waited through an epoch in which it had forgotten nothing, since a thief had been in it before.
        ("keeping-robbed", 4, 65_771_000_063),
        // All servers had been late with parts of a state once: then the first one was asked for ever, which was dead.
        ("everything", 4, 449),
        // All stopped at once, and one of them did not vote before it held again what nobody held any more.
        ("keeping-robbed", 4, 66_200_700_038),
        // A primary that started five times showed a proposal under a key that nobody remembered any more.
        ("lagging", 4, 39_993_000_009),
        ("everything", 4, 92),
        ("everything", 7, 43),
        ("lagging", 9, 1_000_008),
        ("lagging", 4, 1_000_022),
        ("everything", 9, 1_000_000),
        ("everything", 7, 1_000_023),
        ("lying", 16, 3_000_009),
        ("keeping-through-everything", 4, 1_000_047),
        ("keeping-through-everything", 4, 40),
        ("keeping-through-everything", 9, 61_008_000_008),
        ("keeping-forgetting", 4, 1_005_000_058),
        ("keeping-replaced-apart", 4, 1_000_000_065),
        ("keeping-replaced-apart", 9, 2_000_000_045),
        ("keeping-replaced-apart", 9, 2_000_001_162),
    ] {
        let (_, _, faults) = ALL.iter().find(|(name, ..)| *name == scenario).expect("it is in the list");
        Simulation::new(servers, seed, *faults).run();
    }
}

/// Replays what a hunt found: `KDS_SIM_SEED` with `KDS_SIM_SCENARIO`, or without them one run of each.
#[test]
fn replay() {
    let only = std::env::var("KDS_SIM_SCENARIO").ok();
    for (name, sizes, faults) in ALL {
        // Some stand there more than once, so that they are hunted more often.
        for servers in &BTreeSet::from_iter(*sizes) {
            if only.as_ref().is_none_or(|only| *only == format!("{name}:{servers}")) {
                run(**servers, *faults, 1);
            }
        }
    }
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

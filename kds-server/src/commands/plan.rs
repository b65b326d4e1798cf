//! `plan`: the numbers of a cluster, and what limits them.

use clap::Args as ClapArgs;
use quorum::Thresholds;
use serde::Serialize;

/// Print what a cluster of so many servers tolerates, or why there is none
#[derive(ClapArgs)]
pub struct Args {
    /// Servers: 4, 9, 16, 25, …
    #[arg(long)]
    servers: usize,
    /// Lying servers that a row read masks (default: the smallest that the grid supports)
    #[arg(long)]
    masked: Option<u16>,
    /// Servers that reconstruct a secret (default: the largest that works)
    #[arg(long)]
    threshold: Option<u16>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Plan {
    n: u16,
    m: u16,
    f: u16,
    q: u16,
    b: u16,
    rows: u16,
    columns: u16,
    k: u16,
    seed_sets: u64,
    servers_per_read: u16,
    servers_per_write: u16,
    threshold_limit: String,
    warnings: Vec<String>,
}

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let t = Thresholds::plan(args.servers, args.masked, args.threshold)?;
    let mut warnings = Vec::new();
    if t.secrecy_is_weaker_than_ordering() {
        warnings.push(format!(
            "secrecy holds against {} colluding servers, fewer than the {} faulty ones that ordering survives",
            t.threshold - 1,
            t.faulty
        ));
    }
    if t.recovery_can_pause_ordering() {
        warnings.push(format!("with {} servers silent and one more in recovery, ordering pauses", t.faulty));
    }
    if t.masked == 0 {
        warnings.push(format!("a row masks no liar on this grid: reads use q = {} servers", t.quorum));
    }
    let plan = Plan {
        n: t.servers,
        m: t.side,
        f: t.faulty,
        q: t.quorum,
        b: t.masked,
        rows: t.rows,
        columns: t.columns,
        k: t.threshold,
        seed_sets: t.seed_sets(),
        servers_per_read: t.servers_per_read(),
        servers_per_write: t.servers_per_write(),
        threshold_limit: t.threshold_limit().to_string(),
        warnings,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&plan)?);
        return Ok(());
    }
    println!("n = {:<4} servers in a {}×{} grid", plan.n, plan.m, plan.m);
    println!("f = {:<4} faulty servers that ordering survives, lying or silent", plan.f);
    println!("q = {:<4} servers that decide, and signatures of a certificate", plan.q);
    println!("b = {:<4} lying servers that a read of rows masks", plan.b);
    println!(
        "r×c = {}×{}: a read covers {} row(s), a complete write {} column(s)",
        plan.rows, plan.columns, plan.rows, plan.columns
    );
    println!("k = {:<4} servers that reconstruct a secret; {} learn nothing", plan.k, plan.k - 1);
    println!("    {:<4} seed sets that a refresh agrees on", plan.seed_sets);
    println!("    {:<4} servers touched by a read", plan.servers_per_read);
    println!("    {:<4} servers that must hold a complete write, at least", plan.servers_per_write);
    println!("what binds k: {}", plan.threshold_limit);
    plan.warnings.iter().for_each(|warning| println!("note: {warning}"));
    Ok(())
}

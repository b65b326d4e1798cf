//! `kds-server`: one server of a key-distribution cluster, and the tools to plan and start one.

mod at_rest;
mod commands;
mod committer;
mod config;
mod driver;
mod epoch_keys;
mod files;
mod health;
mod http;
mod logs;
mod memory;
mod peers;
mod place;
mod places;
mod seldom;
mod server;
mod share_store;
mod signer;
mod storage;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A server of the key-distribution service.
///
/// n = m² servers in an m×m grid keep names → public keys and shares of secrets, and stay right
/// while up to f of them lie. Start with `kds-server demo` (everything once, by itself) or
/// `kds-server dev` (a cluster to play with).
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    /// Logs as JSON lines
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Plan(commands::plan::Args),
    Init(commands::init::Args),
    Run(commands::run::Args),
    Guard(commands::guard::Args),
    Signer(commands::signer::Args),
    NewIdentity(commands::new_identity::Args),
    Dev(commands::dev::Args),
    Demo(commands::demo::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.log_json {
        logs::as_json();
    }
    let result = match cli.command {
        Command::Plan(args) => commands::plan::main(&args),
        Command::Init(args) => commands::init::main(&args),
        Command::Run(args) => commands::run::main(&args),
        Command::Guard(args) => commands::guard::main(&args),
        Command::Signer(args) => commands::signer::main(&args),
        Command::NewIdentity(args) => commands::new_identity::main(&args),
        Command::Dev(args) => commands::dev::main(&args),
        Command::Demo(args) => commands::demo::main(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! What this program says of itself, on standard error: as text, or as JSON lines, and then whatever it starts says it so
//! too.

use anyhow::Context as _;
use std::io::IsTerminal as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use tracing_subscriber::EnvFilter;

/// The option, for the programs that this one starts.
const OPTION: &str = "--log-json";
static JSON: AtomicBool = AtomicBool::new(false);

/// From now on as JSON lines.
pub fn as_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Has a program that is started log in the same way.
pub fn hand_on(command: &mut Command) {
    if JSON.load(Ordering::Relaxed) {
        command.arg(OPTION);
    }
}

/// Begins to log, by `RUST_LOG` if it is set.
///
/// # Errors
/// If it is set to what is no filter.
pub fn begin(usual: &str) -> anyhow::Result<()> {
    let filter = match std::env::var_os(EnvFilter::DEFAULT_ENV).filter(|filter| !filter.is_empty()) {
        None => EnvFilter::new(usual),
        Some(filter) => {
            let filter = filter.to_str().context("RUST_LOG is not text")?;
            EnvFilter::try_new(filter).with_context(|| {
                format!("RUST_LOG={filter:?} is no filter for logs\n  examples: info, warn, kds_server=debug")
            })?
        }
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if JSON.load(Ordering::Relaxed) {
        logs.json().init();
    } else {
        logs.with_ansi(std::io::stderr().is_terminal()).init();
    }
    Ok(())
}

/// A line of a program that keeps no log beside it.
pub fn say(who: &str, what: &str) {
    if JSON.load(Ordering::Relaxed) {
        let timestamp = kds_client::now();
        let line = serde_json::json!({
            "timestamp": timestamp, "level": "INFO", "fields": { "message": what }, "target": who
        });
        eprintln!("{line}");
    } else {
        eprintln!("{who}: {what}");
    }
}

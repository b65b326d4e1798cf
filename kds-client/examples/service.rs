//! A service that looks up and verifies keys: `cargo run -p kds-client --example service -- alice`,
//! with `KDS_MANIFEST` naming the cluster's manifest.

use kds_client::quorum::record::Name;
use kds_client::{Client, LookupOptions, Options, WatchEvent, keys, manifest_file};
use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::var("KDS_MANIFEST").unwrap_or("kds-dev/manifest.toml".into());
    let name = Name::new(std::env::args().nth(1).unwrap_or("alice".into()))?;

    // The manifest is all that is trusted. One client for the whole program: clones share connections,
    // checked certificates and what is in memory.
    let manifest = manifest_file::read(path.as_ref())?;
    let client = Client::new(manifest, Options { timeout: Duration::from_secs(5), ..Options::default() })?;

    // Sees every completed write; an absent record is proved absent.
    let found = client.lookup(&name, &LookupOptions::default()).await?;
    let Some(record) = found.record else {
        println!("{name} does not exist");
        return Ok(());
    };
    println!("version {}, from servers {:?}", record.version, found.access.answered);

    // On a hot path: from memory, and never older than `max_age`.
    if let Some(record) = client.lookup_cached(&name).await? {
        for key in &record.entry.keys {
            println!("{} {}", key.algorithm, keys::fingerprint(key));
        }
    }

    // Many names in few requests, each with a result of its own.
    let names = [name.clone(), Name::new("nobody")?];
    for (name, found) in names.iter().zip(client.lookup_many(&names, &LookupOptions::default()).await) {
        println!("{name}: {}", if found?.record.is_some() { "there" } else { "not there" });
    }

    // A signature under the name's current keys: refused here, since nobody made it.
    if let Err(error) = client.verify_signature(&name, b"a message", &[0; 64]).await {
        println!("refused: {error}");
    }

    // Every version from now on; this takes the current one and ends.
    let mut watch = client.watch(&name, record.version - 1);
    if let WatchEvent::Version(record) = watch.next().await? {
        println!("watching from version {}", record.version);
    }
    Ok(())
}

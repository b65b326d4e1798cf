//! Without an async runtime, and TLS by registered keys: `cargo run -p kds-client --example blocking -- alice`,
//! with `KDS_MANIFEST` naming the cluster's manifest.

use kds_client::quorum::record::Name;
use kds_client::tls::RegisteredPeers;
use kds_client::{LookupOptions, Options, blocking, manifest_file};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::var("KDS_MANIFEST").unwrap_or("kds-dev/manifest.toml".into());
    let name = Name::new(std::env::args().nth(1).unwrap_or("alice".into()))?;
    let client = blocking::Client::new(manifest_file::read(path.as_ref())?, Options::default())?;

    let found = client.lookup(&name, &LookupOptions::default())?;
    println!("version {}", found.record.map_or(0, |record| record.version));

    // rustls accepts a peer exactly if its key is one that is registered for the name that is dialled.
    let config = RegisteredPeers::blocking(client).client_config(None)?;
    println!("TLS is configured, client certificates: {}", config.client_auth_cert_resolver.has_certs());
    Ok(())
}

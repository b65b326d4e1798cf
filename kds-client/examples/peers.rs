//! Two services that know each other by registered names: `cargo run -p kds-client --example peers -- FOLDER`, with
//! `KDS_MANIFEST` naming the cluster's manifest, and in FOLDER the certificates and keys (PEM) of `db.example` and
//! `web.example`, which are registered.

use kds_client::quorum::record::Name;
use kds_client::tls::{RegisteredPeers, TlsIdentity};
use kds_client::{Client, Options, manifest_file};
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

fn identity(folder: &Path, name: &str) -> Result<TlsIdentity, Box<dyn std::error::Error>> {
    let read = |ending: &str| std::fs::read(folder.join(format!("{name}.{ending}")));
    Ok(TlsIdentity::from_pem(&read("pem")?, &read("key")?)?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::var("KDS_MANIFEST").unwrap_or("kds-dev/manifest.toml".into());
    let folder = std::env::args().nth(1).ok_or("which folder are the keys in?")?;
    let client = Client::new(manifest_file::read(path.as_ref())?, Options::default())?;
    let peers = RegisteredPeers::new(client);

    // The database lets in whoever is registered, and knows who it is.
    let acceptor = peers.acceptor(&identity(folder.as_ref(), "db.example")?)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                match acceptor.accept(tcp).await {
                    Ok(mut connection) => {
                        let greeting = format!("hello {}\n", connection.peer());
                        // Fails as soon as the caller's key is no longer registered.
                        let _ = connection.write_all(greeting.as_bytes()).await;
                        let _ = connection.shutdown().await;
                    }
                    Err(error) => eprintln!("refused: {error}"),
                }
            });
        }
    });

    // The web service talks to the one that is registered as the database, and to nobody else.
    let connector = peers.connector(Some(Arc::new(identity(folder.as_ref(), "web.example")?)));
    let tcp = TcpStream::connect(address).await?;
    let mut connection = connector.connect(&Name::new("db.example")?, tcp).await?;
    let mut greeting = String::new();
    connection.read_to_string(&mut greeting).await?;
    print!("{} says: {greeting}", connection.peer());
    Ok(())
}

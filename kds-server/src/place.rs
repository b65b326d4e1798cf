//! Whether this server has its place in the cluster: as the manifest has it, or because administrators gave
//! it the place of another one since.

use crate::config::{FROM_BACKUP, Loaded, MEMBERSHIP, REPLACEMENT};
use crate::files;
use anyhow::{Context as _, bail, ensure};
use kds_client::api::MembershipAnswer;
use kds_client::{Client, Options};
use quorum::{Manifest, Membership};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How often the others are asked whether the administrators have decided.
const INTERVAL: Duration = Duration::from_secs(1);

/// The membership as far as this server was shown it before its first state.
pub fn remembered(folder: &Path, manifest: &Arc<Manifest>) -> anyhow::Result<Arc<Membership>> {
    let (path, genesis) = (folder.join(MEMBERSHIP), Membership::genesis(Arc::clone(manifest)));
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(genesis),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let known = serde_json::from_slice::<MembershipAnswer>(&bytes).map_err(anyhow::Error::from);
    let known = known.and_then(|known| Ok(genesis.follow(known.changes)?));
    // The others show it again.
    Ok(known.unwrap_or_else(|error| {
        tracing::warn!(file = %path.display(), error = %format!("{error:#}"), "damaged: the other servers are asked");
        genesis
    }))
}

/// The membership in which this server has its place; waits for the administrators if it is to take the place
/// of another one.
pub async fn take(loaded: &Loaded, known: Arc<Membership>) -> anyhow::Result<Arc<Membership>> {
    let (id, own) = (loaded.config.server, loaded.tls.certificate());
    let has_place = |of: &Membership| of.place(id).is_some_and(|place| *place.certificate == *own);
    if has_place(&known) {
        return Ok(known);
    }
    let replaced = known.changes().iter().map(|change| &change.replacement);
    let mut earlier = replaced.filter(|replaced| replaced.server == id).map(|replaced| &replaced.certificate);
    let first = loaded.manifest.server(id).map(|entry| &entry.certificate);
    if first.into_iter().chain(&mut earlier).any(|certificate| **certificate == *own) {
        bail!(
            "server {id} was replaced by order of the administrators: the keys in this folder are of no use any more"
        );
    }
    ensure!(
        loaded.folder.join(REPLACEMENT).exists(),
        "tls.pem is not the certificate that the manifest pins for server {id}\n  {FROM_BACKUP}"
    );
    let client = Client::new(Arc::clone(&loaded.manifest), Options::default())?;
    let mut told = false;
    loop {
        match client.follow().await {
            Ok(membership) if has_place(&membership) => {
                let answer = MembershipAnswer { changes: membership.proofs().to_vec() };
                let path = loaded.folder.join(MEMBERSHIP);
                let written = serde_json::to_vec(&answer).map_err(std::io::Error::from);
                let temporary = path.with_extension("new");
                let written = written.and_then(|bytes| files::replace(&path, &temporary, &bytes));
                written.with_context(|| format!("cannot write {}", path.display()))?;
                tracing::info!(server = %id, from = %membership.since(id), "this server takes its place");
                return Ok(membership);
            }
            Ok(_) if !told => tracing::info!(
                server = %id,
                "waiting for the administrators: `kds-client admin replace-identity {}`",
                loaded.folder.join(REPLACEMENT).display()
            ),
            Err(error) if !told => tracing::warn!(%error, "the other servers cannot be asked yet"),
            _ => {}
        }
        told = true;
        tokio::time::sleep(INTERVAL).await;
    }
}

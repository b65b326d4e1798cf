//! Draws what a server needs anew with every epoch and every start, and has its signer certify it (design
//! §7).

use crate::server::Shared;
use crate::signer::SignerLink;
use anyhow::Context as _;
use quorum::certificate::Certificate;
use quorum::ids::{ClusterId, Epoch};
use quorum::ordering::{EpochKeys, Input};
use quorum::sealing::OpeningKey;
use quorum::signer::Ask;
use quorum::signing::{KeyCertificate, KeyPurpose, SigningKey, Voter};
use quorum::{PublicKey, SecretBytes};
use rand::Rng as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

/// How often the replica's wish is looked at.
const INTERVAL: Duration = Duration::from_millis(50);
/// Looks until keys that were given, and not taken, are drawn again.
const PATIENCE: u32 = 40;

fn random() -> SecretBytes {
    let mut bytes = Zeroizing::new([0; 32]);
    rand::rng().fill_bytes(&mut *bytes);
    SecretBytes::new(&bytes)
}

/// Draws a voting key and has it certified, together with other keys.
async fn voter(
    signer: &SignerLink,
    cluster: ClusterId,
    epoch: Epoch,
    evidence: Option<Certificate>,
    others: &[(KeyPurpose, PublicKey)],
) -> anyhow::Result<(Voter, Vec<KeyCertificate>)> {
    let key = SigningKey::generate(&mut rand::rng());
    let keys = [&[(KeyPurpose::Voting, key.public())], others].concat();
    let asked = keys.len();
    let mut certified = signer.certify(&Ask { keys, epoch, evidence }).await?;
    anyhow::ensure!(certified.len() == asked, "the signer certified {} of {asked} keys", certified.len());
    let voter = Voter::new(cluster, key, certified.remove(0));
    Ok((voter.context("the signer certified another key")?, certified))
}

/// The key that a server votes with from its start on: for the epoch of its last certificate.
pub async fn boot(
    signer: &SignerLink,
    cluster: ClusterId,
    last: Option<Certificate>,
) -> anyhow::Result<Voter> {
    let epoch = last.as_ref().map_or(Epoch(0), |last| last.statement.epoch);
    Ok(voter(signer, cluster, epoch, last, &[]).await?.0)
}

/// Runs until the server stops.
pub async fn run(signer: SignerLink, inputs: mpsc::Sender<Input>, shared: Arc<Shared>) {
    let (mut given, mut looks): (Option<Epoch>, u32) = (None, 0);
    loop {
        let wanted = shared.replica_status.load().wants_keys;
        looks = if wanted == given { looks + 1 } else { 0 };
        given = wanted;
        if let Some(epoch) = wanted
            && looks.is_multiple_of(PATIENCE)
        {
            match draw(&signer, &shared, epoch).await {
                Ok(keys) => {
                    if inputs.send(Input::Keys(keys)).await.is_err() {
                        return;
                    }
                }
                // It has seen no certificate of the epoch before yet, most likely: it is asked again.
                Err(error) => {
                    tracing::warn!(%epoch, error = %format!("{error:#}"), "no keys for the epoch");
                    given = None;
                    tokio::time::sleep(INTERVAL * 5).await;
                }
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn draw(signer: &SignerLink, shared: &Shared, epoch: Epoch) -> anyhow::Result<EpochKeys> {
    let (opening, entropy) = (random(), random());
    let key = OpeningKey::derive(opening.expose()).public();
    let published = shared.published.borrow().as_ref().map(|published| Arc::clone(&published.certificate));
    let evidence = published.map(Arc::unwrap_or_clone);
    let (voter, certified) =
        voter(signer, shared.cluster, epoch, evidence, &[(KeyPurpose::Sealing, key)]).await?;
    let sealing = *certified.first().context("the signer did not certify the sealing key")?;
    Ok(EpochKeys { epoch: voter.epoch(), opening, sealing, voter, entropy })
}

//! Draws what a server needs anew with every epoch, and has its identity certify it (design §7).

use crate::driver::now;
use crate::server::Shared;
use quorum::SecretBytes;
use quorum::ids::Epoch;
use quorum::ordering::{EpochKeys, Input};
use quorum::sealing::OpeningKey;
use quorum::signing::{KeyCertificate, KeyPurpose, KeyStatement, SigningKey};
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

/// Runs until the server stops.
pub async fn run(identity: SigningKey, inputs: mpsc::Sender<Input>, shared: Arc<Shared>) {
    let (mut given, mut looks): (Option<Epoch>, u32) = (None, 0);
    loop {
        let wanted = shared.replica_status.load().wants_keys;
        looks = if wanted == given { looks + 1 } else { 0 };
        if let Some(epoch) = wanted
            && looks.is_multiple_of(PATIENCE)
        {
            let (opening, entropy) = (random(), random());
            let key = OpeningKey::derive(opening.expose()).public();
            let purpose = KeyPurpose::Sealing;
            let statement = KeyStatement { server: shared.id, purpose, epoch, serial: now().0, key };
            let sealing = KeyCertificate::issue(&shared.cluster, &identity, statement);
            let keys = EpochKeys { epoch, opening, sealing, entropy };
            if inputs.send(Input::Keys(keys)).await.is_err() {
                return;
            }
        }
        given = wanted;
        tokio::time::sleep(INTERVAL).await;
    }
}

//! The keeper of a server's long-term identity: it certifies the keys of each epoch and signs nothing else
//! (design §7; PBFT-PR's co-processor).
//!
//! It runs in a process of its own, under a user of its own. Whoever takes a server over can have it certify
//! keys, and must not be able to lay in a stock of them: so it certifies keys only for the epoch that a
//! certificate of q servers shows to have begun, and for the one after it. Then a thief's keys are good for
//! the two epochs in which the server counts as corrupt anyway. Where servers have been replaced it is shown
//! that too, since then: an identity certifies keys for the epochs in which it is the server's. Its counter makes every certificate a new
//! one, and never goes back; it is durable before a certificate leaves.

use crate::bytes::PublicKey;
use crate::certificate::{Certificate, QuorumError};
use crate::ids::{Epoch, ServerId};
use crate::membership::{ChangeProof, Membership};
use crate::signing::{KeyCertificate, KeyPurpose, KeyStatement, Keyring, SigningKey};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a signer remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// Serial number of the last certificate.
    pub serial: u64,
    /// The last epoch that is shown to have begun.
    pub epoch: Epoch,
}

/// What a server wants to have certified.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// What the keys are for, and the keys.
    pub keys: Vec<(KeyPurpose, PublicKey)>,
    /// For which epoch; a signer that knows of a later one certifies for that.
    pub epoch: Epoch,
    /// Shows an epoch to have begun, if there was one since the last question.
    pub evidence: Option<Certificate>,
    /// Changes of the membership since the last question.
    pub changes: Vec<Arc<ChangeProof>>,
}

/// Keys that a server asks for at a time, at most.
const MAX_KEYS: usize = 4;

/// Why nothing is certified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refused {
    /// Not yet.
    #[error("epoch {asked} has not begun, nor has the one before: the last that was shown is {shown}")]
    TooEarly {
        /// Asked for.
        asked: Epoch,
        /// Known.
        shown: Epoch,
    },
    /// A certificate that does not hold, or changes of the membership that do not follow.
    #[error("the evidence does not hold")]
    Evidence,
    /// The identity is another server's, or was replaced.
    #[error(
        "this identity key is not server {server}'s in epoch {epoch}: was it replaced, or the folder copied from elsewhere?"
    )]
    NotIdentity {
        /// Whose keys are asked for.
        server: ServerId,
        /// Of which epoch.
        epoch: Epoch,
    },
    /// Too many keys.
    #[error("at most {MAX_KEYS} keys are certified at a time")]
    TooMany,
}
impl From<QuorumError> for Refused {
    fn from(_: QuorumError) -> Self {
        Self::Evidence
    }
}

/// See the module.
#[derive(Clone)]
pub struct Signer {
    id: ServerId,
    identity: SigningKey,
    membership: Arc<Membership>,
    counter: Counter,
}

impl Signer {
    /// With the counter that was made durable last.
    pub fn new(membership: Arc<Membership>, id: ServerId, identity: SigningKey, counter: Counter) -> Self {
        Self { id, identity, membership, counter }
    }
    /// What it remembers.
    pub fn counter(&self) -> Counter {
        self.counter
    }
    /// Certifies keys. The counter that comes with them is to be durable before they leave.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn certify(&mut self, ask: &Ask) -> Result<(Counter, Vec<KeyCertificate>), Refused> {
        if ask.keys.len() > MAX_KEYS {
            return Err(Refused::TooMany);
        }
        self.membership = self.membership.follow(ask.changes.clone()).map_err(|_| Refused::Evidence)?;
        // A change is certified in the epoch before it takes effect.
        let begun = self.membership.proofs().last().map(|proof| proof.certificate.statement.epoch);
        self.counter.epoch = self.counter.epoch.max(begun.unwrap_or_default());
        if let Some(evidence) = &ask.evidence
            && evidence.statement.epoch > self.counter.epoch
        {
            evidence.verify(&mut Keyring::of(Arc::clone(&self.membership)))?;
            self.counter.epoch = evidence.statement.epoch;
        }
        let shown = self.counter.epoch;
        if ask.epoch > shown.next() {
            return Err(Refused::TooEarly { asked: ask.epoch, shown });
        }
        // One whose server was restored from a backup, or slept: keys of an epoch that is over are of no use
        // but to forge the past.
        // Nor of one in which it was not this identity's server yet.
        let server = self.id;
        let own = self.membership.place(server).is_some_and(|place| place.identity == self.identity.public());
        let since = if own { self.membership.since(server) } else { Epoch(0) };
        let epoch = ask.epoch.max(shown).max(since);
        if !ask.keys.is_empty() && self.membership.identity(server, epoch) != Some(self.identity.public()) {
            return Err(Refused::NotIdentity { server, epoch });
        }
        let certified = ask.keys.iter().map(|(purpose, key)| {
            self.counter.serial += 1;
            let (purpose, key, serial) = (*purpose, *key, self.counter.serial);
            let statement = KeyStatement { server, purpose, epoch, serial, key };
            KeyCertificate::issue(self.membership.cluster(), &self.identity, statement)
        });
        let certified = certified.collect();
        Ok((self.counter, certified))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Hash;
    use crate::certificate::{Checkpoint, VoteBook};
    use crate::ids::{Sequence, Timestamp};
    use crate::manifest::{Manifest, tests::sample};
    use crate::signing::Voter;
    use rand::{SeedableRng, rngs::StdRng};

    /// A certificate of an epoch, by voters whose keys are certified for another one.
    fn certificate(manifest: &Manifest, identities: &[SigningKey], epoch: u64, keys_of: u64) -> Certificate {
        let statement = Checkpoint {
            sequence: Sequence(epoch * 100 + 1),
            root: Hash([epoch as u8; 32]),
            time: Timestamp(epoch),
            epoch: Epoch(epoch),
        };
        let (mut book, mut rng) = (VoteBook::default(), StdRng::seed_from_u64(epoch));
        for (i, identity) in identities.iter().enumerate() {
            let (id, of) = (ServerId(i as u8), Epoch(keys_of));
            let voter = Voter::generate(manifest.cluster_id(), identity, id, of, 1, &mut rng);
            assert!(book.add(voter.sign(statement)).unwrap());
        }
        book.proof(&statement, manifest.thresholds.q()).unwrap()
    }

    #[test]
    fn keys_are_certified_for_epochs_that_have_begun_and_the_next_one() {
        let (manifest, identities) = sample(4);
        let membership = Membership::genesis(Arc::new(manifest.clone()));
        let mut signer =
            Signer::new(Arc::clone(&membership), ServerId(2), identities[2].clone(), Counter::default());
        let ask = |epoch: u64, evidence: Option<Certificate>| Ask {
            keys: vec![(KeyPurpose::Voting, PublicKey([7; 32])), (KeyPurpose::Sealing, PublicKey([8; 32]))],
            epoch: Epoch(epoch),
            evidence,
            changes: vec![],
        };
        let mut serials = Vec::new();
        let mut certified = |signer: &mut Signer, ask: &Ask| {
            let (counter, keys) = signer.certify(ask)?;
            for key in &keys {
                key.verify(&membership).unwrap();
                serials.push(key.statement.serial);
            }
            assert_eq!(counter.serial, keys.last().unwrap().statement.serial);
            Ok::<_, Refused>(keys[0].statement.epoch)
        };
        assert_eq!(certified(&mut signer, &ask(0, None)), Ok(Epoch(0)));
        assert_eq!(certified(&mut signer, &ask(1, None)), Ok(Epoch(1)));
        let early = Err(Refused::TooEarly { asked: Epoch(2), shown: Epoch(0) });
        assert_eq!(certified(&mut signer, &ask(2, None)), early);
        // A thief of old voting keys cannot make it believe in an epoch: certificates are signed by keys
        // of their own epoch.
        let forged = certificate(&manifest, &identities, 5, 4);
        assert_eq!(certified(&mut signer, &ask(5, Some(forged))), Err(Refused::Evidence));
        let mut few = certificate(&manifest, &identities, 5, 5);
        few.votes.pop();
        assert_eq!(certified(&mut signer, &ask(5, Some(few))), Err(Refused::Evidence));
        let shown = certificate(&manifest, &identities, 5, 5);
        assert_eq!(certified(&mut signer, &ask(6, Some(shown.clone()))), Ok(Epoch(6)));
        let early = Err(Refused::TooEarly { asked: Epoch(7), shown: Epoch(5) });
        assert_eq!(certified(&mut signer, &ask(7, Some(shown))), early);
        // What is over is over, whatever the server believes; and so after a restart.
        assert_eq!(certified(&mut signer, &ask(0, None)), Ok(Epoch(5)));
        let counter = signer.certify(&Ask { keys: vec![], ..ask(5, None) }).unwrap().0;
        let mut again = Signer::new(Arc::clone(&membership), ServerId(2), identities[2].clone(), counter);
        assert_eq!(certified(&mut again, &ask(0, None)), Ok(Epoch(5)));
        assert!(serials.is_sorted_by(|a, b| a < b), "{serials:?}");
        let many = Ask { keys: vec![(KeyPurpose::Voting, PublicKey([7; 32])); 5], ..ask(5, None) };
        assert_eq!(again.certify(&many).err(), Some(Refused::TooMany));
    }
}

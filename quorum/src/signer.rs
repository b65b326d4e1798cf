//! The keeper of a server's long-term identity: it certifies the keys of each epoch and signs nothing else
//! (design §7; PBFT-PR's co-processor).
//!
//! It runs in a process of its own, under a user of its own. Whoever takes a server over can have it certify
//! keys, and must not be able to lay in a stock of them. So it certifies keys for the attempt by which an epoch
//! began, as a certificate of q servers shows it; and for an attempt at the next epoch that stands in the state
//! that such a certificate is about. Nothing is certified ahead: who leaves before an attempt begins takes
//! nothing along that counts in its epoch, and what was certified for an attempt that came to nothing never
//! counts (design §7). Where servers have been replaced it is shown that too: an identity certifies
//! keys for the epochs in which it is the server's. The first ones of a new identity, which has seen no epoch
//! yet, are certified for no attempt: they make links and ask for help, and no vote under them counts. Its
//! counter makes every certificate a new one, and never goes back; it is durable before a certificate leaves.

use crate::answer::Proved;
use crate::bytes::PublicKey;
use crate::certificate::{Certificate, QuorumError};
use crate::ids::{AttemptId, Epoch, ServerId};
use crate::map::Hasher;
use crate::membership::{ChangeProof, Membership};
use crate::signing::{KeyCertificate, KeyPurpose, KeyStatement, Keyring, SigningKey, Statement as _};
use crate::state::{Epochs, layout};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a signer remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// Serial number of the last certificate.
    pub serial: u64,
    /// Number of the last voting key that it certified (see [`Ask::number`]).
    #[serde(default)]
    pub voting: u64,
    /// The last attempt that it certified a voting key for.
    #[serde(default)]
    pub voted_in: AttemptId,
    /// The last epoch that is shown to have begun, and by which attempt.
    pub begun: AttemptId,
    /// The last attempt that was shown to be under way: after an outage of all servers nobody may be able to
    /// show it again.
    pub coming: AttemptId,
}

/// What a server wants to have certified.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// What the keys are for, and the keys.
    pub keys: Vec<(KeyPurpose, PublicKey)>,
    /// Number of the voting key, if one is among them: larger than that of any before, and in the server's database
    /// before it asks. A database that knows of a smaller one than the signer is an older copy, whatever was done with
    /// the keys since (PBFT-PR §4.3.2 has a co-processor's counter for that).
    pub number: u64,
    /// For which attempt: one that has begun, in the state that `evidence` is about; or the one by which an epoch
    /// has begun. Of an epoch that is over: a signer that knows of a later one certifies for that.
    pub attempt: AttemptId,
    /// Shows which epoch has begun, if that is not known yet.
    pub evidence: Option<Certificate>,
    /// Shows the attempt at the next epoch, in the state that `evidence` is about.
    pub coming: Option<Proved<Epochs>>,
    /// Changes of the membership since the last question.
    pub changes: Vec<Arc<ChangeProof>>,
}

/// Keys that a server asks for at a time, at most.
const MAX_KEYS: usize = 4;
/// How far numbers of voting keys may lie apart: a server counts also what its signer did not answer. Who has a
/// server for a while cannot use them up.
const MAX_SKIPPED: u64 = 1 << 32;

/// Why nothing is certified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refused {
    /// Not yet.
    #[error("epoch {asked} is not shown to have begun: the last that was is {shown}")]
    TooEarly {
        /// Asked for.
        asked: AttemptId,
        /// Known.
        shown: AttemptId,
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
    /// The signer's own disk.
    #[error("the signer cannot write down what it certifies: is there room on its disk? its log says more")]
    NotRemembered,
    /// Too many keys.
    #[error("at most {MAX_KEYS} keys are certified at a time")]
    TooMany,
    /// The number of a voting key is not a new one.
    #[error("voting key number {asked} does not follow number {last}: has somebody else asked for keys?")]
    Number {
        /// Asked for.
        asked: u64,
        /// The last one.
        last: u64,
    },
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
        let begun = self.membership.proofs().last().map(|proof| proof.certificate.statement.attempt());
        self.counter.begun = self.counter.begun.max(begun.unwrap_or_default());
        if let Some(evidence) = &ask.evidence
            && (evidence.statement.attempt() > self.counter.begun || ask.coming.is_some())
        {
            evidence.verify(&mut Keyring::of(Arc::clone(&self.membership)))?;
            self.counter.begun = self.counter.begun.max(evidence.statement.attempt());
        }
        self.counter.coming = self.counter.coming.max(self.coming(ask)?);
        let attempt = self.counts(ask)?;
        let (server, epoch) = (self.id, attempt.epoch);
        if !ask.keys.is_empty() && self.membership.identity(server, epoch) != Some(self.identity.public()) {
            return Err(Refused::NotIdentity { server, epoch });
        }
        if ask.keys.iter().any(|(purpose, _)| *purpose == KeyPurpose::Voting) {
            let (asked, last) = (ask.number, self.counter.voting);
            if asked <= last || asked - last > MAX_SKIPPED {
                return Err(Refused::Number { asked, last });
            }
            self.counter.voting = asked;
            self.counter.voted_in = self.counter.voted_in.max(attempt);
        }
        let certified = ask.keys.iter().map(|(purpose, key)| {
            self.counter.serial += 1;
            let (purpose, key, serial) = (*purpose, *key, self.counter.serial);
            let statement = KeyStatement { server, purpose, epoch, attempt: attempt.attempt, serial, key };
            KeyCertificate::issue(self.membership.cluster(), &self.identity, statement)
        });
        let certified = certified.collect();
        Ok((self.counter, certified))
    }

    /// The attempt that a certified state is shown to contain.
    fn coming(&self, ask: &Ask) -> Result<AttemptId, Refused> {
        let Some(proved) = &ask.coming else { return Ok(AttemptId::default()) };
        let evidence = ask.evidence.as_ref().ok_or(Refused::Evidence)?;
        let hasher = Hasher::new(*self.membership.cluster());
        let shown = proved.verify(&hasher, &evidence.statement.root, layout::EPOCHS);
        let epochs = shown.map_err(|_| Refused::Evidence)?;
        let attempt = epochs.and_then(|epochs| epochs.attempt.as_ref()).map(|attempt| attempt.id);
        Ok(attempt.unwrap_or_default())
    }

    /// What keys are certified for: never for an epoch that is over, since collected from q servers, one after the
    /// other, such keys would forge the past.
    fn counts(&self, ask: &Ask) -> Result<AttemptId, Refused> {
        let begun = self.counter.begun;
        // Of attempts at one epoch only the last can succeed.
        if ask.attempt == self.counter.coming && ask.attempt.epoch > begun.epoch {
            return Ok(ask.attempt);
        }
        let own =
            self.membership.place(self.id).is_some_and(|place| place.identity == self.identity.public());
        let since = if own { self.membership.since(self.id) } else { Epoch(0) };
        if since > begun.epoch && ask.attempt.epoch <= since {
            return Ok(AttemptId { epoch: since, attempt: 0 });
        }
        if ask.attempt.epoch > begun.epoch {
            return Err(Refused::TooEarly { asked: ask.attempt, shown: begun });
        }
        Ok(begun)
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
            attempt: u32::from(epoch > 0),
        };
        let (mut book, mut rng) = (VoteBook::default(), StdRng::seed_from_u64(epoch));
        for (i, identity) in identities.iter().enumerate() {
            let (id, of) = (ServerId(i as u8), AttemptId::first(Epoch(keys_of)));
            let voter = Voter::generate(manifest.cluster_id(), identity, id, of, 1, &mut rng);
            assert!(book.add(voter.sign(statement)).unwrap());
        }
        book.proof(&statement, manifest.thresholds.q()).unwrap()
    }

    /// A certificate of a state in which an attempt at the next epoch is under way, and what shows that.
    fn under_way(
        manifest: &Manifest,
        identities: &[SigningKey],
        current: AttemptId,
        next: AttemptId,
    ) -> (Certificate, Proved<Epochs>) {
        let epochs = crate::state::epochs::tests::standing(current, Some(next));
        let mut map = crate::map::Map::new(manifest.cluster_id());
        map.insert(layout::EPOCHS, crate::codec::encode(&epochs));
        let snapshot = map.seal();
        let statement = certificate(manifest, identities, current.epoch.0, current.epoch.0).statement;
        let statement = Checkpoint { root: snapshot.root(), ..statement };
        let (mut book, mut rng) = (VoteBook::default(), StdRng::seed_from_u64(9));
        for (i, identity) in identities.iter().enumerate() {
            let voter =
                Voter::generate(manifest.cluster_id(), identity, ServerId(i as u8), current, 2, &mut rng);
            assert!(book.add(voter.sign(statement)).unwrap());
        }
        let certificate = book.proof(&statement, manifest.thresholds.q()).unwrap();
        (certificate, Proved::look_up(&snapshot, layout::EPOCHS))
    }

    /// Nothing is certified ahead: an adversary who leaves before an attempt begins takes along no key for it.
    #[test]
    fn keys_are_certified_for_the_epoch_that_has_begun_and_for_an_attempt_that_has() {
        let (manifest, identities) = sample(4);
        let membership = Membership::genesis(Arc::new(manifest.clone()));
        let mut signer =
            Signer::new(Arc::clone(&membership), ServerId(2), identities[2].clone(), Counter::default());
        let number = std::cell::Cell::new(0);
        let ask = |attempt: AttemptId, evidence: Option<Certificate>| Ask {
            keys: vec![(KeyPurpose::Voting, PublicKey([7; 32])), (KeyPurpose::Sealing, PublicKey([8; 32]))],
            number: number.replace(number.get() + 1) + 1,
            attempt,
            evidence,
            coming: None,
            changes: vec![],
        };
        let first = |epoch: u64| AttemptId::first(Epoch(epoch));
        let mut serials = Vec::new();
        let mut certified = |signer: &mut Signer, ask: &Ask| {
            let (counter, keys) = signer.certify(ask)?;
            for key in &keys {
                key.verify(&membership).unwrap();
                serials.push(key.statement.serial);
            }
            assert_eq!(counter.serial, keys.last().unwrap().statement.serial);
            Ok::<_, Refused>(keys[0].statement.attempt_id())
        };
        assert_eq!(certified(&mut signer, &ask(first(0), None)), Ok(first(0)));
        let early = |asked, shown| Err(Refused::TooEarly { asked, shown });
        assert_eq!(certified(&mut signer, &ask(first(1), None)), early(first(1), first(0)));
        // An adversary with old voting keys cannot make it believe in an epoch: certificates are signed by keys
        // of their own epoch.
        let forged = certificate(&manifest, &identities, 5, 4);
        assert_eq!(certified(&mut signer, &ask(first(5), Some(forged))), Err(Refused::Evidence));
        let mut few = certificate(&manifest, &identities, 5, 5);
        few.votes.pop();
        assert_eq!(certified(&mut signer, &ask(first(5), Some(few))), Err(Refused::Evidence));
        let shown = certificate(&manifest, &identities, 5, 5);
        assert_eq!(certified(&mut signer, &ask(first(6), Some(shown.clone()))), early(first(6), first(5)));
        assert_eq!(certified(&mut signer, &ask(first(5), Some(shown.clone()))), Ok(first(5)));

        // An attempt that stands in the certified state; that one, and no other.
        let third = AttemptId { epoch: Epoch(6), attempt: 3 };
        let (state, epochs) = under_way(&manifest, &identities, first(5), third);
        let coming = |attempt, evidence: &Certificate, epochs: &Proved<Epochs>| Ask {
            coming: Some(epochs.clone()),
            ..ask(attempt, Some(evidence.clone()))
        };
        assert_eq!(certified(&mut signer, &coming(third, &state, &epochs)), Ok(third));
        let fourth = AttemptId { attempt: 4, ..third };
        assert_eq!(certified(&mut signer, &coming(fourth, &state, &epochs)), early(fourth, first(5)));
        // It is remembered; what is shown has to stand in that very state, and be certified.
        assert_eq!(certified(&mut signer, &ask(third, None)), Ok(third));
        assert_eq!(certified(&mut signer, &coming(third, &shown, &epochs)), Err(Refused::Evidence));
        let mut few = state.clone();
        few.votes.pop();
        assert_eq!(certified(&mut signer, &coming(third, &few, &epochs)), Err(Refused::Evidence));
        let mut changed = epochs.clone();
        changed.value.as_mut().unwrap().attempt.as_mut().unwrap().id = fourth;
        assert_eq!(certified(&mut signer, &coming(fourth, &state, &changed)), Err(Refused::Evidence));

        // What is over is over, whatever the server believes; and so after a restart.
        assert_eq!(certified(&mut signer, &ask(first(0), None)), Ok(first(5)));
        let counter = signer.certify(&Ask { keys: vec![], ..ask(first(5), None) }).unwrap().0;
        let mut again = Signer::new(Arc::clone(&membership), ServerId(2), identities[2].clone(), counter);
        assert_eq!(certified(&mut again, &ask(first(0), None)), Ok(first(5)));
        let (old, epochs) = under_way(&manifest, &identities, first(2), first(3));
        assert_eq!(certified(&mut again, &coming(first(3), &old, &epochs)), Ok(first(5)));
        assert!(serials.is_sorted_by(|a, b| a < b), "{serials:?}");
        let many = Ask { keys: vec![(KeyPurpose::Voting, PublicKey([7; 32])); 5], ..ask(first(5), None) };
        assert_eq!(again.certify(&many).err(), Some(Refused::TooMany));
    }

    /// A database that knows of fewer voting keys than its signer is an older copy.
    #[test]
    fn voting_keys_are_numbered_and_no_number_comes_again() {
        let (manifest, identities) = sample(4);
        let membership = Membership::genesis(Arc::new(manifest));
        let mut signer = Signer::new(membership, ServerId(2), identities[2].clone(), Counter::default());
        let mut ask = |purpose, number| {
            let (keys, attempt) = (vec![(purpose, PublicKey([7; 32]))], AttemptId::default());
            let ask = Ask { keys, number, attempt, evidence: None, coming: None, changes: vec![] };
            signer.certify(&ask).map(|(counter, _)| counter.voting)
        };
        let refused = |asked, last| Err(Refused::Number { asked, last });
        assert_eq!(ask(KeyPurpose::Voting, 0), refused(0, 0));
        assert_eq!(ask(KeyPurpose::Voting, 3), Ok(3), "a question whose answer was lost is skipped");
        assert_eq!(ask(KeyPurpose::Voting, 3), refused(3, 3));
        assert_eq!(ask(KeyPurpose::Tls, 0), Ok(3), "other keys are not counted");
        // Who has the server for a while leaves enough of them.
        assert_eq!(ask(KeyPurpose::Voting, u64::MAX), refused(u64::MAX, 3));
        assert_eq!(ask(KeyPurpose::Voting, 3 + MAX_SKIPPED), Ok(3 + MAX_SKIPPED));
    }
}

//! Evidence of misbehaviour: statements that contradict each other, signed by those who made them.
//!
//! An honest server signs one checkpoint a sequence number, and agreed time and epochs never go
//! back (design §3, §5). Whoever signed two that do not fit together is faulty, and anyone who has the
//! manifest can see it, as with two signed tree heads of one log (CT §7.3).

use crate::Hash;
use crate::answer::Proved;
use crate::certificate::{Certificate, Checkpoint, QuorumError};
use crate::ids::{AttemptId, ServerId, ServerSet};
use crate::map::{Hasher, Snapshot};
use crate::membership::{ChangeProof, Membership, MembershipError};
use crate::signing::{KeyCertificate, KeyError, Keyring, Signed, Statement as _};
use crate::state::{ServerKeys, layout};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Statements that no honest server makes both of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Evidence {
    /// Two certificates: more than f servers signed both.
    Certificates {
        /// One.
        first: Box<Certificate>,
        /// The other.
        second: Box<Certificate>,
    },
    /// One server's votes for two checkpoints.
    Votes {
        /// One.
        first: Signed<Checkpoint>,
        /// The other.
        second: Signed<Checkpoint>,
        /// Certificates of the keys that they are signed with.
        keys: Vec<KeyCertificate>,
    },
    /// One server's vote for another state than q servers certified: it lies, or its state is damaged.
    Dissent {
        /// What q servers say.
        certificate: Box<Certificate>,
        /// What one says.
        vote: Signed<Checkpoint>,
        /// Certificate of the key that it is signed with.
        key: KeyCertificate,
    },
}

/// Evidence in a file, for others to check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvidenceFile {
    /// Format of this file; 1.
    pub format: u32,
    /// The cluster whose servers it is about.
    pub cluster: Hash,
    /// What they said.
    pub evidence: Evidence,
    /// Servers that were given another identity since the manifest, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub membership: Vec<Arc<ChangeProof>>,
    /// Shows that the accused voted with the key that it had announced; needed where one server is accused by its own
    /// votes alone. Whoever has an identity that was stolen, or was replaced, certifies keys for any epoch with
    /// it, and leaves changes of the membership out as he likes; into a certified state he puts nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announced: Option<Announced>,
}

/// The key that a server had announced, in a certified state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announced {
    /// Of a state of the epoch of the evidence, which began by the same attempt.
    pub certificate: Arc<Certificate>,
    /// The accused server's keys in it.
    pub keys: Proved<ServerKeys>,
}

impl Announced {
    /// From a state of this server's own, as it has been certified.
    pub fn look_up(certificate: &Arc<Certificate>, snapshot: &Snapshot, server: ServerId) -> Self {
        let keys = Proved::look_up(snapshot, &layout::server_key(server));
        Self { certificate: Arc::clone(certificate), keys }
    }
    /// Whether a key is the one that was announced, and so the server's.
    fn check(&self, keyring: &mut Keyring, key: &KeyCertificate) -> Result<(), EvidenceError> {
        let (state, server) = (&self.certificate.statement, key.statement.server);
        let not_shown = EvidenceError::NotAnnounced(server);
        if state.attempt() != key.statement.attempt_id() {
            return Err(not_shown);
        }
        self.certificate.verify(keyring)?;
        let hasher = Hasher::new(*keyring.cluster());
        match self.keys.verify(&hasher, &state.root, &layout::server_key(server)) {
            Ok(Some(keys)) if keys.voting.statement.key == key.statement.key => Ok(()),
            _ => Err(not_shown),
        }
    }
}

/// Format that this version reads and writes.
pub const EVIDENCE_FORMAT: u32 = 1;

/// Why something is no evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// A certificate that does not hold.
    #[error("a certificate does not hold: {0}")]
    Certificate(#[from] QuorumError),
    /// A vote that does not hold.
    #[error("a vote does not hold: {0}")]
    Vote(#[from] KeyError),
    /// Both can be true.
    #[error("the statements do not contradict each other")]
    NoContradiction,
    /// Changes of the membership that do not hold.
    #[error("{0}")]
    Membership(#[from] MembershipError),
    /// Votes of two epochs: a key of an epoch that is over may be a thief's.
    #[error("the statements are of different epochs, and keys of one that is over may be a thief's")]
    OtherEpoch,
    /// The votes may be anybody's who had the server's identity.
    #[error(
        "the file does not show that server {0} had announced the key of the votes: whoever has an old identity of it can have made them"
    )]
    NotAnnounced(ServerId),
    /// Votes of two servers.
    #[error("the votes are of different servers")]
    TwoServers,
    /// More keys than two votes have.
    #[error("keys come along that no vote is signed with")]
    Surplus,
    /// A file of another format.
    #[error("evidence format {0} is not known to this version (it reads {EVIDENCE_FORMAT})")]
    Format(u32),
    /// A file of another cluster.
    #[error("the evidence is about another cluster than the manifest's")]
    OtherCluster,
}

/// Whether no correct server signs both.
pub fn contradict(one: &Checkpoint, other: &Checkpoint) -> bool {
    let (earlier, later) = if one.sequence <= other.sequence { (one, other) } else { (other, one) };
    match earlier.sequence == later.sequence {
        true => earlier != later,
        // An epoch begins by one attempt.
        false => {
            let other_attempt = earlier.epoch == later.epoch && earlier.attempt != later.attempt;
            earlier.time > later.time || earlier.epoch > later.epoch || other_attempt
        }
    }
}

impl Evidence {
    /// Who is accused by its own votes alone, and the keys that they are signed with.
    fn accused(&self) -> Option<(ServerId, &[KeyCertificate])> {
        match self {
            Self::Certificates { .. } => None,
            Self::Votes { first, keys, .. } => Some((first.server, keys)),
            Self::Dissent { vote, key, .. } => Some((vote.server, std::slice::from_ref(key))),
        }
    }
    /// By which attempt the epoch began that it is about, if it needs a state of that to be checked by others.
    pub fn attempt(&self) -> Option<AttemptId> {
        self.accused().and_then(|(_, keys)| keys.first()).map(|key| key.statement.attempt_id())
    }
    /// Who is shown to be faulty; at least one server.
    pub fn culprits(&self, keyring: &mut Keyring) -> Result<Vec<ServerId>, EvidenceError> {
        let (one, other) = match self {
            Self::Certificates { first, second } => (&first.statement, &second.statement),
            Self::Votes { first, second, .. } => (&first.body, &second.body),
            Self::Dissent { certificate, vote, .. } => (&certificate.statement, &vote.body),
        };
        if !contradict(one, other) {
            return Err(EvidenceError::NoContradiction);
        }
        // f servers' keys can be stolen in each epoch, and q never: certificates show that there were too many liars.
        if !matches!(self, Self::Certificates { .. }) && one.attempt() != other.attempt() {
            return Err(EvidenceError::OtherEpoch);
        }
        match self {
            Self::Certificates { first, second } => {
                first.verify(keyring)?;
                second.verify(keyring)?;
                let signers: ServerSet = first.signers().collect();
                // Two quorums share more than f servers (PBFT §4.1).
                Ok(second.signers().filter(|server| signers.contains(*server)).collect())
            }
            Self::Votes { first, second, keys } => {
                if first.server != second.server {
                    return Err(EvidenceError::TwoServers);
                }
                if keys.len() > 2 || keys.iter().any(|key| key.statement.server != first.server) {
                    return Err(EvidenceError::Surplus);
                }
                signed_under(keyring, first, keys)?;
                signed_under(keyring, second, keys)?;
                Ok(vec![first.server])
            }
            Self::Dissent { certificate, vote, key } => {
                certificate.verify(keyring)?;
                signed_under(keyring, vote, std::slice::from_ref(key))?;
                Ok(vec![vote.server])
            }
        }
    }
}

/// Whether a vote is its server's under one of the keys that came along, and no other that is known: whoever makes a
/// file can have others become known, in a certificate in which he puts his vote in an honest one's place.
fn signed_under(
    keyring: &mut Keyring,
    vote: &Signed<Checkpoint>,
    keys: &[KeyCertificate],
) -> Result<(), EvidenceError> {
    let keys: Vec<_> = keys.iter().filter(|key| key.statement.server == vote.server).copied().collect();
    let carried = keyring.carried(&keys)?;
    let holds = carried.iter().any(|key| keyring.verify_under(key, &vote.body, &vote.signature).is_ok());
    if holds { Ok(()) } else { Err(KeyError::BadSignature(vote.server).into()) }
}

impl EvidenceFile {
    /// Wraps evidence about servers of a cluster; with a certified state, where that is at hand.
    pub fn new(
        membership: &Membership,
        evidence: Evidence,
        state: Option<(&Arc<Certificate>, &Snapshot)>,
    ) -> Self {
        let (cluster, membership) = (membership.cluster().0, membership.proofs().to_vec());
        let accused = evidence.accused().map(|(server, _)| server);
        let announced = accused.zip(state);
        let announced = announced
            .map(|(server, (certificate, snapshot))| Announced::look_up(certificate, snapshot, server));
        Self { format: EVIDENCE_FORMAT, cluster, evidence, membership, announced }
    }
    /// Checks it offline; names who is shown to be faulty.
    pub fn culprits(&self, keyring: &mut Keyring) -> Result<Vec<ServerId>, EvidenceError> {
        if self.format != EVIDENCE_FORMAT {
            return Err(EvidenceError::Format(self.format));
        }
        if self.cluster != keyring.cluster().0 {
            return Err(EvidenceError::OtherCluster);
        }
        if let Some((server, keys)) = self.evidence.accused() {
            let announced = self.announced.as_ref().ok_or(EvidenceError::NotAnnounced(server))?;
            keys.iter().try_for_each(|key| announced.check(keyring, key))?;
        }
        self.evidence.culprits(keyring)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::VoteBook;
    use crate::certificate::tests::voters;
    use crate::ids::{Epoch, Sequence, Timestamp};
    use crate::signing::Voter;

    fn checkpoint(sequence: u64, root: u8, time: u64) -> Checkpoint {
        Checkpoint {
            sequence: Sequence(sequence),
            root: Hash([root; 32]),
            time: Timestamp(time),
            epoch: Epoch(0),
            attempt: 0,
        }
    }

    fn certificate(voters: &[Voter], statement: Checkpoint) -> Box<Certificate> {
        let mut book = VoteBook::default();
        voters.iter().for_each(|voter| assert!(book.add(voter.sign(statement)).unwrap()));
        Box::new(book.proof(&statement, voters.len()).unwrap())
    }

    #[test]
    fn what_contradicts_what() {
        let base = checkpoint(5, 1, 100);
        assert!(!contradict(&base, &base));
        assert!(contradict(&base, &checkpoint(5, 2, 100)));
        assert!(contradict(&base, &checkpoint(5, 1, 101)));
        assert!(!contradict(&base, &checkpoint(6, 2, 100)));
        assert!(contradict(&base, &checkpoint(6, 2, 99)), "agreed time went back");
        assert!(contradict(&checkpoint(6, 2, 99), &base), "in whichever order they are found");
        let by_another = Checkpoint { attempt: 2, ..checkpoint(6, 2, 101) };
        assert!(contradict(&base, &by_another), "the epoch began by another attempt");
    }

    #[test]
    fn two_certificates_name_everyone_who_signed_both() {
        let (keyring, voters) = voters(9);
        let first = certificate(&voters[..6], checkpoint(5, 1, 100));
        let second = certificate(&voters[3..], checkpoint(5, 2, 100));
        let evidence = Evidence::Certificates { first: first.clone(), second };
        let file = EvidenceFile::new(keyring.membership(), evidence, None);
        let culprits = file.culprits(&mut keyring.clone()).unwrap();
        assert_eq!(culprits, vec![ServerId(3), ServerId(4), ServerId(5)]);
        let json = serde_json::to_string(&file).unwrap();
        assert_eq!(serde_json::from_str::<EvidenceFile>(&json).unwrap(), file);

        let agreeing = certificate(&voters[3..], checkpoint(6, 2, 100));
        let none = Evidence::Certificates { first: first.clone(), second: agreeing };
        assert_eq!(none.culprits(&mut keyring.clone()), Err(EvidenceError::NoContradiction));
        let mut forged = certificate(&voters[3..], checkpoint(5, 2, 100));
        forged.statement.root = Hash([9; 32]);
        let forged = Evidence::Certificates { first, second: forged };
        assert!(matches!(forged.culprits(&mut keyring.clone()), Err(EvidenceError::Certificate(_))));

        let other = EvidenceFile { cluster: Hash([1; 32]), ..file.clone() };
        assert_eq!(other.culprits(&mut keyring.clone()), Err(EvidenceError::OtherCluster));
        let newer = EvidenceFile { format: 2, ..file };
        assert_eq!(newer.culprits(&mut keyring.clone()), Err(EvidenceError::Format(2)));
    }

    #[test]
    fn votes_name_one_server_and_only_if_it_made_them() {
        let (keyring, voters) = voters(4);
        let vote = |voter: &Voter, root| voter.sign(checkpoint(5, root, 100)).stored();
        let ((first, key), (second, _)) = (vote(&voters[2], 1), vote(&voters[2], 2));
        let evidence = Evidence::Votes { first: first.clone(), second: second.clone(), keys: vec![key] };
        assert_eq!(evidence.culprits(&mut keyring.clone()), Ok(vec![ServerId(2)]));
        let surplus = Evidence::Votes { first: first.clone(), second: second.clone(), keys: vec![key; 3] };
        assert_eq!(surplus.culprits(&mut keyring.clone()), Err(EvidenceError::Surplus));
        // A vote that is put into another's mouth.
        let mut framed = second.clone();
        framed.server = ServerId(1);
        let framed = Evidence::Votes { first: framed.clone(), second: framed, keys: vec![key] };
        assert_eq!(framed.culprits(&mut keyring.clone()), Err(EvidenceError::NoContradiction));
        let (other, other_key) = vote(&voters[1], 2);
        let mixed = Evidence::Votes { first: first.clone(), second: other, keys: vec![key, other_key] };
        assert_eq!(mixed.culprits(&mut keyring.clone()), Err(EvidenceError::TwoServers));
        let mut changed = second;
        changed.body.root = Hash([7; 32]);
        let changed = Evidence::Votes { first: first.clone(), second: changed, keys: vec![key] };
        assert!(matches!(changed.culprits(&mut keyring.clone()), Err(EvidenceError::Vote(_))));

        let certified = certificate(&voters[..3], checkpoint(5, 1, 100));
        let (vote, key) = vote(&voters[3], 2);
        let dissent = Evidence::Dissent { certificate: certified, vote, key };
        assert_eq!(dissent.culprits(&mut keyring.clone()), Ok(vec![ServerId(3)]));
    }

    /// A thief visited server 1 in epoch 5, and keeps its voting key of that epoch. Server 1 has been
    /// honest since. With the old key she signs a checkpoint that contradicts one that it signs in epoch 7: what
    /// anybody checks offline then names it, although `certify::adopt` knows that this "need not have been the server".
    #[test]
    fn a_key_of_an_epoch_that_is_over_frames_nobody() {
        use crate::ids::AttemptId;
        use rand::{SeedableRng as _, rngs::StdRng};
        let (manifest, identities) = crate::manifest::tests::sample(4);
        let (cluster, mut rng) = (manifest.cluster_id(), StdRng::seed_from_u64(1));
        let mut of = |server: u8, epoch| {
            let attempt = AttemptId::first(Epoch(epoch));
            let identity = &identities[usize::from(server)];
            Voter::generate(cluster, identity, ServerId(server), attempt, epoch, &mut rng)
        };
        let (stolen, present): (_, Vec<_>) = (of(1, 5), (0..4).map(|id| of(id, 7)).collect());
        let mut keyring = Keyring::new(Arc::new(manifest.clone()));
        let at = |sequence, root, epoch| Checkpoint {
            epoch: Epoch(epoch),
            attempt: 1,
            ..checkpoint(sequence, root, 100)
        };
        let (honest, key) = present[1].sign(at(50, 1, 7)).stored();
        let (forged, stolen_key) = stolen.sign(at(60, 2, 5)).stored();
        let keys = vec![key, stolen_key];
        let votes = Evidence::Votes { first: honest, second: forged, keys };
        let (vote, key) = stolen.sign(at(50, 2, 5)).stored();
        let dissent = Evidence::Dissent { certificate: certificate(&present[..3], at(50, 1, 7)), vote, key };
        for evidence in [votes, dissent] {
            let named = evidence.culprits(&mut keyring);
            assert!(named.is_err(), "an honest server is named: {named:?}");
        }
    }
}

//! Certificates: q signatures on what executing a batch led to (design §5).
//!
//! One concept serves three times: PBFT's stable checkpoint (§4.3), the proof in a client's hand
//! (CT's signed tree head), and the target of state transfer. The same shape with [`Commit`]
//! statements shows a server that fell behind that a batch was committed.
//!
//! [`Commit`]: crate::message::Commit

use crate::bytes::Hash;
use crate::codec::Tagged;
use crate::grid::Grid;
use crate::ids::{AttemptId, Epoch, Sequence, ServerId, ServerSet, Timestamp};
use crate::manifest::Manifest;
use crate::signing::{KeyCertificate, KeyError, Keyring, Signed, Statement, Verified, Vote};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What every replica signs after it has executed a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// The last batch executed.
    pub sequence: Sequence,
    /// Root of the authenticated map after it.
    pub root: Hash,
    /// Agreed time of the batch.
    pub time: Timestamp,
    /// Epoch of the secrets after it.
    pub epoch: Epoch,
    /// The attempt by which that epoch began.
    pub attempt: u32,
}
impl Tagged for Checkpoint {
    const TAG: &'static str = "kds.checkpoint";
}
impl Statement for Checkpoint {
    fn attempt(&self) -> AttemptId {
        AttemptId { epoch: self.epoch, attempt: self.attempt }
    }
}

/// A statement with the votes of q different servers, and the certificates of the keys that they
/// voted with, so that the manifest is all that a verifier needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuorumProof<T> {
    /// What q servers say.
    pub statement: T,
    /// Their votes.
    pub votes: Vec<Vote>,
    /// Certificates of their voting keys.
    pub keys: Vec<KeyCertificate>,
}

/// q checkpoint signatures.
pub type Certificate = QuorumProof<Checkpoint>;

/// Why q votes are not what they claim to be. Names whom to blame where the votes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuorumError {
    /// Fewer than q votes.
    #[error("{got} signers where {needed} are needed")]
    TooFew {
        /// Different signers found.
        got: usize,
        /// q.
        needed: usize,
    },
    /// More votes than q, or more keys than votes: nobody would look at them, and whoever keeps the proof keeps
    /// and passes on what a stranger put there.
    #[error("more signatures or keys than make a quorum")]
    TooMany,
    /// One signer twice.
    #[error("server {0} signed twice")]
    Repeated(ServerId),
    /// A key of a server that did not sign, or a second one.
    #[error("a key of server {0} comes along for no signature")]
    Surplus(ServerId),
    /// A key or signature that does not hold.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// The server of a key that no signature calls for: every signer has one at most, and nobody else has any.
fn surplus(keys: &[KeyCertificate], signers: &ServerSet) -> Option<ServerId> {
    let mut seen = ServerSet::default();
    let mut servers = keys.iter().map(|key| key.statement.server);
    servers.find(|server| !signers.contains(*server) || !seen.insert(*server))
}

impl<T: Statement> QuorumProof<T> {
    /// Checks everything against the manifest. Learns the voting keys that it carries, so that
    /// the next certificate costs q signature checks and no more.
    ///
    /// All votes are under keys of the one attempt that the statement names. Of that epoch's servers at most f
    /// were faulty, and the others' keys of it are gone: so what holds once holds for ever (design §7).
    pub fn verify(&self, keyring: &mut Keyring) -> Result<(), QuorumError> {
        if self.keys.len() > self.votes.len() {
            return Err(QuorumError::TooMany);
        }
        let signers = are_quorum(keyring.manifest(), &self.signers().collect::<Vec<_>>())?;
        if let Some(surplus) = surplus(&self.keys, &signers) {
            return Err(QuorumError::Surplus(surplus));
        }
        // Whoever checks this remembers the keys, and the newest of a server displace the others.
        let attempt = self.statement.attempt();
        if let Some(other) = self.keys.iter().find(|key| key.statement.attempt_id() != attempt) {
            return Err(QuorumError::Surplus(other.statement.server));
        }
        let carried = keyring.carried(&self.keys)?;
        for vote in &self.votes {
            keyring.verify_with(&carried, vote.server, &self.statement, &vote.signature)?;
        }
        Ok(())
    }
    /// Who signed, in the order of the votes.
    pub fn signers(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.votes.iter().map(|vote| vote.server)
    }
}

/// Checks that those who vote are q different servers, no fewer and no more.
pub(crate) fn are_quorum(manifest: &Manifest, voters: &[ServerId]) -> Result<ServerSet, QuorumError> {
    let thresholds = manifest.thresholds;
    if voters.len() > thresholds.q() {
        return Err(QuorumError::TooMany);
    }
    let mut signers = ServerSet::default();
    for voter in voters {
        if manifest.server(*voter).is_none() {
            return Err(KeyError::UnknownServer(*voter).into());
        }
        if !signers.insert(*voter) {
            return Err(QuorumError::Repeated(*voter));
        }
    }
    if signers.len() < thresholds.q() {
        return Err(QuorumError::TooFew { got: signers.len(), needed: thresholds.q() });
    }
    Ok(signers)
}

/// Gathers votes for statements of one kind until q servers agree on one.
#[derive(Clone, Debug)]
pub struct VoteBook<T> {
    votes: BTreeMap<ServerId, Verified<T>>,
}

impl<T> Default for VoteBook<T> {
    fn default() -> Self {
        Self { votes: BTreeMap::new() }
    }
}

impl<T: Statement + Copy + PartialEq> VoteBook<T> {
    /// Keeps a server's vote; its first one of an epoch counts, and replaces those of earlier epochs. A second,
    /// different one is returned: evidence of equivocation.
    pub fn add(&mut self, vote: Verified<T>) -> Result<bool, Box<Verified<T>>> {
        match self.votes.get(&vote.server()) {
            Some(first) if first.body() == vote.body() => Ok(false),
            Some(first) if first.body().attempt() == vote.body().attempt() => Err(Box::new(vote)),
            Some(first) if first.body().attempt() > vote.body().attempt() => Ok(false),
            _ => {
                self.votes.insert(vote.server(), vote);
                Ok(true)
            }
        }
    }
    /// Forgets votes of earlier attempts.
    pub fn keep_since(&mut self, attempt: AttemptId) {
        self.votes.retain(|_, vote| vote.body().attempt() >= attempt);
    }
    /// Who voted for what.
    pub fn votes_cast(&self) -> Vec<(ServerId, T)> {
        self.votes.values().map(|vote| (vote.server(), *vote.body())).collect()
    }
    /// How many servers voted for this statement.
    pub fn count(&self, statement: &T) -> usize {
        self.votes.values().filter(|vote| vote.body() == statement).count()
    }
    /// A server's vote.
    pub fn of(&self, server: ServerId) -> Option<&Verified<T>> {
        self.votes.get(&server)
    }
    /// The servers that voted for something else.
    pub fn dissenters(&self, statement: &T) -> impl Iterator<Item = ServerId> {
        let statement = *statement;
        self.votes.values().filter(move |vote| *vote.body() != statement).map(Verified::server)
    }
    /// The proof, once q servers voted for this statement.
    pub fn proof(&self, statement: &T, quorum: usize) -> Option<QuorumProof<T>> {
        let agreeing = self.votes.values().filter(|vote| vote.body() == statement).take(quorum);
        let (votes, keys): (Vec<_>, Vec<_>) = agreeing.map(Verified::vote).unzip();
        (votes.len() == quorum).then_some(QuorumProof { statement: *statement, votes, keys })
    }
}

/// "I have executed `sequence` and have its certificate, both durable" (design §2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// The sequence number held; every smaller one is held too.
    pub sequence: Sequence,
    /// By which the epoch began that it is said in.
    pub attempt: AttemptId,
}
impl Tagged for Held {
    const TAG: &'static str = "kds.held";
}
impl Statement for Held {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

/// Held statements that together show that everything up to `sequence` is complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Completion {
    /// Every write up to here is visible to every complete read.
    pub sequence: Sequence,
    /// One statement a server, each for `sequence` or more.
    pub held: Vec<Signed<Held>>,
    /// Certificates of the keys that they are signed with.
    pub keys: Vec<KeyCertificate>,
}

/// Why Held statements do not show completeness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompletionError {
    /// One server twice, or more than there are.
    #[error("server {0} is counted twice")]
    Repeated(ServerId),
    /// A statement for less than is claimed.
    #[error("server {0} holds less than is claimed")]
    HoldsLess(ServerId),
    /// They do not cover c columns and q servers.
    #[error("the holders do not cover enough columns or servers")]
    NotCovered,
    /// Said in another epoch than the first statement.
    #[error("server {0}'s statement is of another epoch than the others'")]
    OtherEpoch(ServerId),
    /// A key of a server that states nothing, or a second one.
    #[error("a key of server {0} comes along for no statement")]
    Surplus(ServerId),
    /// A key or signature that does not hold.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl Completion {
    /// Checks the statements, all of one epoch, and that their servers cover c full columns and number q. Says
    /// which epoch that is.
    pub fn verify(&self, keyring: &mut Keyring) -> Result<Epoch, CompletionError> {
        let mut holders = ServerSet::default();
        for held in &self.held {
            if keyring.manifest().server(held.server).is_none() {
                return Err(KeyError::UnknownServer(held.server).into());
            }
            if !holders.insert(held.server) {
                return Err(CompletionError::Repeated(held.server));
            }
            if held.body.sequence < self.sequence {
                return Err(CompletionError::HoldsLess(held.server));
            }
            if Some(held.body.attempt) != self.held.first().map(|first| first.body.attempt) {
                return Err(CompletionError::OtherEpoch(held.server));
            }
        }
        if !keyring.manifest().grid().write_is_complete(&holders) {
            return Err(CompletionError::NotCovered);
        }
        if let Some(surplus) = surplus(&self.keys, &holders) {
            return Err(CompletionError::Surplus(surplus));
        }
        let carried = keyring.carried(&self.keys)?;
        for held in &self.held {
            keyring.verify_with(&carried, held.server, &held.body, &held.signature)?;
        }
        Ok(self.held.first().map_or(Epoch(0), |first| first.body.attempt.epoch))
    }
}

/// Keeps each server's highest Held statement and finds what is complete.
#[derive(Clone, Debug)]
pub struct CompletionTracker {
    grid: Grid,
    held: BTreeMap<ServerId, Verified<Held>>,
}

impl CompletionTracker {
    /// Knows nothing yet.
    pub fn new(grid: Grid) -> Self {
        Self { grid, held: BTreeMap::new() }
    }
    /// Takes note of a statement; says whether it is newer than the server's last. Those of earlier epochs are
    /// forgotten: they do not count together with others.
    pub fn add(&mut self, held: Verified<Held>) -> bool {
        let place = |held: &Verified<Held>| (held.body().attempt, held.body().sequence);
        let latest = self.held.values().map(|held| held.body().attempt).max().unwrap_or_default();
        if held.body().attempt > latest {
            self.held.clear();
        }
        let known = self.held.get(&held.server());
        let newer = held.body().attempt >= latest && known.is_none_or(|known| place(known) < place(&held));
        if newer {
            self.held.insert(held.server(), held);
        }
        newer
    }
    /// The highest sequence number that is complete, with the statements that show it.
    pub fn completion(&self) -> Option<Completion> {
        let mut by_sequence: Vec<_> = self.held.values().collect();
        by_sequence.sort_by_key(|held| std::cmp::Reverse(held.body().sequence));
        let mut holders = ServerSet::default();
        for (count, held) in by_sequence.iter().enumerate() {
            holders.insert(held.server());
            if self.grid.write_is_complete(&holders) {
                let enough = &by_sequence[..=count];
                return Some(Completion {
                    sequence: held.body().sequence,
                    held: enough.iter().map(|held| held.signed().clone()).collect(),
                    keys: enough.iter().map(|held| *held.key()).collect(),
                });
            }
        }
        None
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::answer::{AnswerError, Verifier};
    use crate::limits::CLOCK_BOUND_MS;
    use crate::manifest::tests::sample;
    use crate::signing::{KeyPurpose, KeyStatement, Voter};
    use rand::{SeedableRng, rngs::StdRng};
    use std::sync::Arc;

    pub(crate) fn voters(n: usize) -> (Keyring, Vec<Voter>) {
        let (manifest, identities) = sample(n);
        let cluster = manifest.cluster_id();
        let mut rng = StdRng::seed_from_u64(7);
        let voters = identities
            .iter()
            .enumerate()
            .map(|(i, identity)| {
                Voter::generate(cluster, identity, ServerId(i as u8), AttemptId::default(), 0, &mut rng)
            })
            .collect();
        (Keyring::new(Arc::new(manifest)), voters)
    }

    fn checkpoint(sequence: u64) -> Checkpoint {
        let (root, time) = (Hash([3; 32]), Timestamp(5));
        Checkpoint { sequence: Sequence(sequence), root, time, epoch: Epoch(0), attempt: 0 }
    }

    fn certificate(voters: &[Voter]) -> Certificate {
        let mut book = VoteBook::default();
        for voter in voters {
            assert!(book.add(voter.sign(checkpoint(9))).unwrap());
        }
        book.proof(&checkpoint(9), voters.len()).unwrap()
    }

    #[test]
    fn q_different_servers_of_the_manifest_make_a_certificate() {
        let (keyring, voters) = voters(9);
        let good = certificate(&voters[..6]);
        assert_eq!(good.verify(&mut keyring.clone()), Ok(()));
        assert_eq!(good.signers().count(), 6);

        let short = certificate(&voters[..5]);
        assert_eq!(short.verify(&mut keyring.clone()), Err(QuorumError::TooFew { got: 5, needed: 6 }));

        let mut repeated = certificate(&voters[..5]);
        repeated.votes.push(repeated.votes[0]);
        assert_eq!(repeated.verify(&mut keyring.clone()), Err(QuorumError::Repeated(ServerId(0))));

        let mut foreign = good.clone();
        foreign.votes[5].server = ServerId(9);
        assert_eq!(
            foreign.verify(&mut keyring.clone()),
            Err(QuorumError::Key(KeyError::UnknownServer(ServerId(9))))
        );

        let one_more = certificate(&voters[..7]);
        assert_eq!(one_more.verify(&mut keyring.clone()), Err(QuorumError::TooMany));
        let mut longer = good.clone();
        longer.keys.push(longer.keys[0]);
        assert_eq!(longer.verify(&mut keyring.clone()), Err(QuorumError::TooMany));
        let mut strange = good.clone();
        strange.keys[5] = *voters[8].certificate();
        assert_eq!(strange.verify(&mut keyring.clone()), Err(QuorumError::Surplus(ServerId(8))));
        let mut twice = good.clone();
        twice.keys[5] = twice.keys[0];
        assert_eq!(twice.verify(&mut keyring.clone()), Err(QuorumError::Surplus(ServerId(0))));

        let mut changed = good.clone();
        changed.statement.root = Hash([4; 32]);
        assert!(matches!(
            changed.verify(&mut keyring.clone()),
            Err(QuorumError::Key(KeyError::BadSignature(_)))
        ));

        let mut self_made = good.clone();
        self_made.keys[0].statement.key = voters[1].key().public();
        assert_eq!(
            self_made.verify(&mut keyring.clone()),
            Err(QuorumError::Key(KeyError::NotCertified(ServerId(0))))
        );
    }

    #[test]
    fn a_sealing_key_does_not_vote() {
        let (keyring, voters) = voters(4);
        let (_, identities) = sample(4);
        let statement = KeyStatement { purpose: KeyPurpose::Sealing, ..voters[0].certificate().statement };
        let sealing = KeyCertificate::issue(keyring.cluster(), &identities[0], statement);
        assert!(keyring.clone().add(sealing).is_err());
    }

    /// A thief has q servers' keys, of epochs that are over: that makes no certificate, and shows nobody that
    /// a write is complete.
    #[test]
    fn keys_of_other_epochs_make_no_certificate_and_no_completion() {
        let (manifest, identities) = sample(9);
        let (manifest, mut rng) = (Arc::new(manifest), StdRng::seed_from_u64(2));
        let voters = |epoch: u64| -> Vec<Voter> {
            let voter = |(i, identity)| {
                let id = ServerId(i as u8);
                Voter::generate(
                    manifest.cluster_id(),
                    identity,
                    id,
                    AttemptId::first(Epoch(epoch)),
                    epoch,
                    &mut rng,
                )
            };
            identities.iter().enumerate().map(voter).collect()
        };
        let (mut stolen, mut present) = (voters, Vec::new());
        present.extend(stolen(7));
        let stolen = stolen(5);
        let at = |epoch: u64| Checkpoint { epoch: Epoch(epoch), attempt: 1, ..checkpoint(9) };
        let certified = |voters: &[Voter], statement: Checkpoint| {
            let mut book = VoteBook::default();
            voters.iter().for_each(|voter| assert!(book.add(voter.sign(statement)).unwrap()));
            book.proof(&statement, 6).unwrap()
        };
        let mut keyring = Keyring::new(Arc::clone(&manifest));
        assert_eq!(certified(&present, at(7)).verify(&mut keyring), Ok(()));
        let mut forged = certified(&stolen, at(7));
        assert_eq!(forged.verify(&mut keyring), Err(QuorumError::Surplus(ServerId(0))));
        forged.keys.clear();
        let unsigned = QuorumError::Key(KeyError::BadSignature(ServerId(0)));
        assert_eq!(forged.verify(&mut keyring), Err(unsigned));
        // The past can be checked for ever.
        assert_eq!(certified(&stolen, at(5)).verify(&mut keyring), Ok(()));

        let completion = |voters: &[Voter]| {
            let mut tracker = CompletionTracker::new(manifest.grid());
            let held = |voter: &Voter| Held { sequence: Sequence(8), attempt: voter.attempt() };
            voters.iter().for_each(|voter| assert!(tracker.add(voter.sign(held(voter)))));
            tracker.completion().unwrap()
        };
        let mut verifier = Verifier::new(Arc::clone(&manifest));
        verifier.certificate(&Arc::new(certified(&present, at(7)))).unwrap();
        let mut forged = completion(&stolen);
        verifier.completion(&forged).unwrap();
        forged.keys.clear();
        verifier.completion(&forged).unwrap();
        assert_eq!(verifier.complete(), Sequence(0));
        verifier.completion(&completion(&present)).unwrap();
        assert_eq!(verifier.complete(), Sequence(8));
        // Some of one epoch and some of another make none, though each holds by itself.
        let (mut mixed, old) = (completion(&present), completion(&stolen));
        (mixed.held[0], mixed.keys[0]) = (old.held[0].clone(), old.keys[0]);
        assert!(matches!(mixed.verify(&mut keyring), Err(CompletionError::OtherEpoch(_))));
    }

    /// A liar's old certificate is one that the client's clock refuses, to the millisecond.
    #[test]
    fn a_certificate_has_an_age() {
        let (_, voters) = voters(4);
        let certificate = certificate(&voters[..3]);
        let at = |ms: u64| Verifier::fresh(&certificate.statement, Timestamp(ms), 5_000);
        assert_eq!((at(5), at(5_005)), (Ok(()), Ok(())));
        assert_eq!(at(5_006), Err(AnswerError::TooOld { age_ms: 5_001, max_age_ms: 5_000 }));
        let mut ahead = certificate.clone();
        ahead.statement.time = Timestamp(100_000 + CLOCK_BOUND_MS + 5_000);
        assert!(Verifier::fresh(&ahead.statement, Timestamp(100_000), 5_000).is_ok());
        assert!(Verifier::fresh(&ahead.statement, Timestamp(99_999), 5_000).is_err());
        // Whoever accepts any age accepts this one too.
        assert!(Verifier::fresh(&ahead.statement, Timestamp(0), u64::MAX).is_ok());
    }

    #[test]
    fn a_second_opinion_of_one_server_is_evidence_not_a_vote() {
        let (_, voters) = voters(4);
        let mut book = VoteBook::default();
        assert!(book.add(voters[0].sign(checkpoint(1))).unwrap());
        assert!(!book.add(voters[0].sign(checkpoint(1))).unwrap());
        assert!(book.add(voters[0].sign(checkpoint(2))).is_err());
        assert_eq!(book.count(&checkpoint(2)), 0);
    }

    #[test]
    fn completion_needs_columns_and_a_quorum() {
        let (keyring, voters) = voters(9);
        let mut tracker = CompletionTracker::new(keyring.manifest().grid());
        let held = |sequence| Held { sequence: Sequence(sequence), attempt: AttemptId::default() };
        // Columns 0 and 1 hold 7, or 8; that makes six servers and two columns.
        for (server, sequence) in [(0, 7), (3, 8), (6, 7), (1, 8), (4, 9), (8, 9)] {
            tracker.add(voters[server].sign(held(sequence)));
            assert_eq!(tracker.completion(), None);
        }
        tracker.add(voters[7].sign(held(7)));
        let completion = tracker.completion().unwrap();
        assert_eq!(completion.sequence, Sequence(7));
        assert_eq!(completion.verify(&mut keyring.clone()), Ok(Epoch(0)));

        let mut claims_more = completion.clone();
        claims_more.sequence = Sequence(8);
        assert!(matches!(claims_more.verify(&mut keyring.clone()), Err(CompletionError::HoldsLess(_))));
        let mut fewer = completion.clone();
        fewer.held.retain(|held| held.server != ServerId(7));
        assert_eq!(fewer.verify(&mut keyring.clone()), Err(CompletionError::NotCovered));
        let mut twice = completion.clone();
        twice.held.push(twice.held[0].clone());
        assert!(matches!(twice.verify(&mut keyring.clone()), Err(CompletionError::Repeated(_))));
        let mut forged = completion;
        forged.held[0].body.sequence = Sequence(70);
        assert!(matches!(forged.verify(&mut keyring.clone()), Err(CompletionError::Key(_))));
    }

    /// What was certified once is believed again whatever votes come with it; what is kept has the good ones.
    #[test]
    fn nothing_stays_in_a_receipt_that_was_not_checked() {
        use crate::answer::{Proved, Receipt};
        let (manifest, _) = sample(9);
        let (_, voters) = voters(9);
        let mut verifier = Verifier::new(Arc::new(manifest.clone()));
        let good = Arc::new(certificate(&voters[..6]));
        verifier.certificate(&good).unwrap();
        let mut tracker = CompletionTracker::new(manifest.grid());
        let held = Held { sequence: Sequence(9), attempt: AttemptId::default() };
        voters.iter().for_each(|voter| assert!(tracker.add(voter.sign(held))));
        let shown = tracker.completion().unwrap();
        verifier.completion(&shown).unwrap();

        let mut dirty = Certificate::clone(&good);
        dirty.votes[0].signature = dirty.votes[1].signature;
        dirty.votes.push(dirty.votes[2]);
        let map = crate::map::Map::new(manifest.cluster_id()).seal();
        let receipt = |completion: &Completion| Receipt {
            reply: Proved::look_up(&map, b"no matter"),
            certificate: Arc::new(dirty.clone()),
            completion: Some(Arc::new(completion.clone())),
        };
        let kept = verifier.kept(receipt(&shown)).unwrap();
        assert_eq!(kept.certificate, good);
        assert_eq!(kept.completion.as_deref(), Some(&shown));
        let mut longer = shown.clone();
        longer.keys.push(longer.keys[0]);
        let surplus = Err(AnswerError::Completion(CompletionError::Surplus(longer.keys[0].statement.server)));
        assert_eq!(verifier.kept(receipt(&longer)), surplus);
        // Nothing new would follow from it, and it is checked all the same.
        let mut forged = shown;
        forged.held[0].signature = forged.held[1].signature;
        assert!(verifier.completion(&forged).is_ok());
        assert!(verifier.kept(receipt(&forged)).is_err());
    }
}

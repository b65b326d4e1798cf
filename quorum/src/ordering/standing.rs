//! Whether this replica may vote: not before it knows that it remembers its votes (design §3,
//! *estimation* in PBFT-PR §4.3.2).
//!
//! A database that was restored from a backup, or lost, is amnesia: a replica that goes on from it
//! could contradict what it signed. So at every start it asks the others what they hold of its own
//! signatures. Once q−1 of them have answered there are two cases:
//!
//! - Its database accounts for all of them: it votes. Persist-before-send makes this the normal
//!   case, also when all servers start at once, since those that do not vote yet answer too.
//! - One of its own signatures is not in its database, or the database is an older copy than its signer knows of
//!   (see [`super::Stored::begin`]): it has cast votes that it does not remember, and it may have left a view. Then it
//!   is one of the f faulty servers until nothing that it may have signed matters any more: until a certificate shows
//!   that a later epoch has begun than the last one that it may have had a voting key for. What is said in an epoch
//!   counts in no other (see `barrier`).
//!
//! The others' word alone would not do. Votes that are still under way, or were seen by servers that have lost
//! their memory since, nobody shows; so the signer counts the voting keys, and the database has the number of each
//! before it is drawn. Only a copy that was made while the present key was in use is found by the others' word alone.
//!
//! What it is shown may be an adversary's, who had one of its keys once: she makes it wait until the epoch is over
//! in which that key counts, and no longer.
//!
//! Until then it promises nothing, proposes nothing, and shows readers nothing. But it asks for that epoch, by an ordered
//! request, which has it begin early (see [`crate::state`]'s epochs): so it is back within seconds.
//!
//! A vote of an epoch that is over binds nobody. But the server may also have said to hold what it executed then
//! ([`Held`](crate::certificate::Held)), and readers count on that: it votes, and shows them nothing before it has a
//! certificate as high as the highest that the others have shown it.

use super::Replica;
use super::budget::Question;
use super::effects::{Accusation, Target, Write};
use crate::certificate::QuorumProof;
use crate::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp, View};
use crate::message::{Commit, Evidence, PeerMessage, Prepare, Slot, ViewChange, Witness};
use crate::signing::{Signed, Statement as _, Verified};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Whether a replica takes part in ordering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// It votes.
    Voting,
    /// It has just started, and asks the others whether its memory is complete.
    Estimating,
    /// It forgot votes, and waits until none of them matters.
    Recovering,
    /// Its state is not the certified one: it fetches what differs.
    Repairing,
    /// Its disk takes no writes, so nothing that it would promise leaves it. The replica does not know: whoever runs it
    /// says so.
    Stopped,
}

/// See the module.
#[derive(Clone)]
pub(super) enum Standing {
    Voting,
    Estimating(Estimation),
    /// It has forgotten votes: until a certificate shows a later epoch than this.
    Recovering(Epoch),
}

/// What a server that has lost its memory knows of what it has lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amnesia {
    /// The last epoch that it may have voted in.
    pub through: Epoch,
    /// Whether that is for certain. A signer that has lost its memory does not know: then it is as late as the
    /// others show that it is.
    pub settled: bool,
}

impl Amnesia {
    /// As the signer remembers it: the last epoch that it has certified a voting key for.
    pub fn of(voted_in: Option<Epoch>) -> Self {
        Self { through: voted_in.unwrap_or_default(), settled: voted_in.is_some() }
    }
}

/// What the others have said since the start.
#[derive(Clone)]
pub(super) struct Estimation {
    /// Answers name it, so that those to an earlier start do not count.
    boot: u64,
    /// It is known already that votes are forgotten.
    amnesia: Option<Amnesia>,
    /// The last epoch that it has had a voting key for, if its signer remembers.
    voted_in: Option<Epoch>,
    /// Views of the proposals and proofs that the database holds at each sequence number.
    memory: BTreeMap<Sequence, Memory>,
    /// Who has answered.
    answers: BTreeSet<ServerId>,
    /// The last certificate that was shown, and its epoch.
    certified: (Sequence, AttemptId),
    /// Own signatures that were shown.
    claims: Vec<Claim>,
}

/// An own signature that another server shows.
#[derive(Clone, Copy)]
struct Claim {
    attempt: AttemptId,
    /// Of a vote.
    sequence: Option<Sequence>,
    /// Whether the database accounts for it.
    remembered: bool,
}

/// What a database says about one sequence number.
#[derive(Clone, Copy, Default)]
pub(super) struct Memory {
    pub(super) accepted: Option<View>,
    pub(super) prepared: Option<View>,
}

impl Estimation {
    pub(super) fn new(
        boot: u64,
        (amnesia, voted_in): (Option<Amnesia>, Option<Epoch>),
        memory: BTreeMap<Sequence, Memory>,
    ) -> Self {
        let (answers, certified) = Default::default();
        Self { boot, amnesia, voted_in, memory, answers, certified, claims: Vec::new() }
    }
    /// Names the question to witnesses.
    pub(super) fn boot(&self) -> u64 {
        self.boot
    }
}

/// The newest votes that a replica has seen of each other one, to show them to their author.
#[derive(Clone, Default)]
pub(super) struct Witnessed(BTreeMap<ServerId, Seen>);

#[derive(Clone, Default)]
struct Seen {
    prepares: Newest<Prepare>,
    commits: Newest<Commit>,
}

/// The vote for the highest place, and that of the last view: a view can begin below what was voted for before.
#[derive(Clone)]
struct Newest<T> {
    highest: Option<Evidence<T>>,
    last: Option<Evidence<T>>,
}

impl<T> Default for Newest<T> {
    fn default() -> Self {
        Self { highest: None, last: None }
    }
}

impl<T: Clone> Newest<T> {
    fn keep(&mut self, evidence: Evidence<T>, slot: impl Fn(&T) -> Slot) {
        fn newer<T, K: Ord>(known: &Option<Evidence<T>>, said: &Evidence<T>, key: impl Fn(&T) -> K) -> bool {
            known.as_ref().is_none_or(|(known, _)| key(&known.body) < key(&said.0.body))
        }
        if newer(&self.last, &evidence, |vote| (slot(vote).attempt, slot(vote).view, slot(vote).sequence)) {
            self.last = Some(evidence.clone());
        }
        if newer(&self.highest, &evidence, |vote| (slot(vote).attempt, slot(vote).sequence, slot(vote).view))
        {
            self.highest = Some(evidence);
        }
    }
    /// One if they are the same.
    fn both(self, slot: impl Fn(&T) -> Slot) -> Vec<Evidence<T>> {
        let mut both: Vec<_> = self.highest.into_iter().chain(self.last).collect();
        both.dedup_by_key(|(vote, _)| slot(&vote.body));
        both
    }
}

/// The votes of a proof, each by itself.
fn evidence<T: Copy>(proof: &QuorumProof<T>) -> impl Iterator<Item = (ServerId, Evidence<T>)> + '_ {
    proof.votes.iter().filter_map(|vote| {
        let key = proof.keys.iter().find(|key| key.statement.server == vote.server)?;
        let signed = Signed { body: proof.statement, server: vote.server, signature: vote.signature };
        Some((vote.server, (signed, *key)))
    })
}

impl Witnessed {
    pub(super) fn prepare(&mut self, vote: &Verified<Prepare>) {
        self.0.entry(vote.server()).or_default().prepares.keep(vote.stored(), |vote| vote.0);
    }
    pub(super) fn commit(&mut self, vote: &Verified<Commit>) {
        self.0.entry(vote.server()).or_default().commits.keep(vote.stored(), |vote| vote.0);
    }
    /// From proofs in this replica's own database, which were checked before they were written.
    pub(super) fn prepared(&mut self, proof: &QuorumProof<Prepare>) {
        for (server, evidence) in evidence(proof) {
            self.0.entry(server).or_default().prepares.keep(evidence, |vote| vote.0);
        }
    }
    pub(super) fn committed(&mut self, proof: &QuorumProof<Commit>) {
        for (server, evidence) in evidence(proof) {
            self.0.entry(server).or_default().commits.keep(evidence, |vote| vote.0);
        }
    }
    fn of(&self, server: ServerId) -> Seen {
        self.0.get(&server).cloned().unwrap_or_default()
    }
}

impl Replica {
    /// Whether it may promise anything.
    pub(super) fn may_vote(&self) -> bool {
        // Under a key of another epoch nobody would count it.
        let has_key = self.voter.attempt() == self.state.attempt();
        matches!(self.standing, Standing::Voting) && !self.diverged && has_key
    }

    /// Whether it may ask for the epoch in which it votes again, and for its shares: it has a key of this epoch, and
    /// knows that it has forgotten votes under another one.
    pub(super) fn may_ask_for_help(&self) -> bool {
        let has_key = self.voter.attempt() == self.state.attempt();
        matches!(self.standing, Standing::Recovering(_)) && !self.diverged && has_key
    }

    /// Whether it votes for nothing before the next epoch begins.
    pub(super) fn waits_for_epoch(&self) -> bool {
        let Standing::Recovering(through) = self.standing else { return false };
        through >= self.state.epoch()
    }

    /// For operators.
    pub(super) fn part(&self) -> Part {
        match self.standing {
            _ if self.diverged => Part::Repairing,
            Standing::Voting => Part::Voting,
            Standing::Estimating(_) => Part::Estimating,
            Standing::Recovering(_) => Part::Recovering,
        }
    }

    /// Asks those who have not answered.
    pub(super) fn ask_witnesses(&mut self) {
        let Standing::Estimating(estimation) = &self.standing else { return };
        let boot = estimation.boot;
        for peer in self.manifest.grid().servers().filter(|peer| *peer != self.id) {
            if !estimation.answers.contains(&peer) {
                self.pending.send(Target::One(peer), PeerMessage::AskWitness(boot));
            }
        }
    }

    /// Somebody has started and wants to know what it signed before.
    pub(super) fn on_ask_witness(&mut self, now: Timestamp, from: ServerId, boot: u64) {
        let asker = (from, self.asked_under);
        if !self.budgets.allows(now, asker, Question::Witness) {
            return;
        }
        let change = self.view_change_of(from).map(|change| self.bytes_of_view_change(change.body()));
        let bytes = self.bytes_of_proof() + change.unwrap_or(0);
        self.budgets.spend(now, asker, Question::Witness, bytes);
        let Seen { prepares, commits } = self.witnessed.of(from);
        let (prepares, commits) = (prepares.both(|vote| vote.0), commits.both(|vote| vote.0));
        let view_change = self.view_change_of(from).map(|change| Arc::clone(change.evidence()));
        let certificate = self.certificate.as_ref().map(|certificate| certificate.as_ref().clone());
        let witness = Witness { boot, certificate, prepares, commits, view_change };
        self.pending.send(Target::One(from), PeerMessage::Witness(Box::new(witness)));
    }

    /// One of the others says what it holds; every signature in it holds.
    pub(super) fn on_witness(&mut self, now: Timestamp, from: ServerId, witness: Witness) {
        if let Some(certificate) = &witness.certificate {
            self.note_certified(certificate.statement.sequence);
        }
        let (id, own_executed, own_view) = (self.id, self.executed(), self.view);
        let Standing::Estimating(estimation) = &mut self.standing else { return };
        if witness.boot != estimation.boot {
            return;
        }
        // One answer of each: a server that does not vote yet says nothing that a second one could add.
        if !estimation.answers.insert(from) {
            return;
        }
        let shown = witness.certificate.as_ref().map(|certificate| certificate.statement);
        let shown = shown.map(|statement| (statement.sequence, statement.attempt()));
        estimation.certified = estimation.certified.max(shown.unwrap_or_default());

        let memory = |sequence: Sequence| estimation.memory.get(&sequence).copied().unwrap_or_default();
        let mut claims = Vec::new();
        // A vote in a view means only that this replica was in it then.
        let mut claim = |slot: Slot, known: Option<View>| {
            let remembered = slot.sequence <= own_executed || known >= Some(slot.view);
            claims.push(Claim { attempt: slot.attempt, sequence: Some(slot.sequence), remembered });
        };
        for (vote, _) in witness.prepares.iter().filter(|(vote, _)| vote.server == id) {
            claim(vote.body.0, memory(vote.body.0.sequence).accepted);
        }
        for (vote, _) in witness.commits.iter().filter(|(vote, _)| vote.server == id) {
            claim(vote.body.0, memory(vote.body.0.sequence).prepared);
        }
        if let Some((change, _)) = witness.view_change.as_deref().filter(|(change, _)| change.server == id) {
            let ViewChange { view, attempt, .. } = change.body;
            claims.push(Claim { attempt, sequence: None, remembered: view <= own_view });
        }
        estimation.claims.extend(claims);
        self.conclude(now);
    }

    /// With q−1 answers it is clear whether anything is forgotten.
    pub(super) fn conclude(&mut self, now: Timestamp) {
        let quorum = self.quorum();
        let Standing::Estimating(estimation) = &self.standing else { return };
        if estimation.answers.len() + 1 < quorum {
            return;
        }
        // Nothing that was signed in an epoch that is over counts with those who have certified a later one.
        let own = self.certificate.as_ref().map_or_else(AttemptId::default, |own| own.statement.attempt());
        let (certified, shown) = estimation.certified;
        let current = shown.max(own).max(self.state.attempt());
        let forgotten = estimation.claims.iter().filter(|claim| !claim.remembered);
        // Votes of an epoch that is over bind nobody, but what was said to be held then is to be shown now. That is a
        // promise to readers alone. With such a place nobody may be certified any more, if all stopped at once: then
        // this server's own vote is what brings it back.
        if forgotten.clone().any(|claim| claim.sequence.is_some()) {
            self.shown_from = certified;
        }
        let votes = || forgotten.clone().filter(|claim| claim.attempt >= current);
        let amnesia = estimation.amnesia.or_else(|| {
            let sequence = votes().map(|claim| claim.sequence.unwrap_or_default()).max()?;
            self.pending.accuse(Accusation::Amnesia { sequence });
            Some(Amnesia::of(estimation.voted_in))
        });
        self.standing = match amnesia {
            Some(Amnesia { through, settled }) => {
                let through = if settled { through } else { through.max(current.epoch) };
                // Written before anything else: a crash on the way does not make it forget that it forgot.
                self.pending.write(Write::Amnesia(Some(Amnesia { through, settled: true })));
                Standing::Recovering(through)
            }
            None => Standing::Voting,
        };
        match self.standing {
            Standing::Voting => self.take_part(now),
            _ => self.recovered(now),
        }
    }

    /// Nothing that was forgotten matters when such a certificate is there.
    pub(super) fn recovered(&mut self, now: Timestamp) {
        let Standing::Recovering(through) = self.standing else { return };
        if self.certificate.as_ref().is_some_and(|certificate| certificate.statement.epoch > through) {
            self.pending.write(Write::Amnesia(None));
            self.standing = Standing::Voting;
            self.take_part(now);
        }
    }

    /// Whether readers may be shown the certified state: not by a server that may have forgotten what it said, nor by
    /// one that has forgotten what it said to hold and does not hold it again (design §3).
    pub(super) fn shows_readers(&self) -> bool {
        matches!(self.standing, Standing::Voting) && self.certified() >= self.shown_from
    }

    /// From now on it votes: it says what it has, and shows it to readers.
    fn take_part(&mut self, now: Timestamp) {
        self.changing.restart_timer(now);
        if let Some(held) = self.own_held.clone() {
            self.pending.send_all(&held, PeerMessage::Held);
        }
        self.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Hash;
    use crate::certificate::tests::voters;
    use crate::certificate::{Certificate, Checkpoint};
    use crate::ordering::Stored;
    use crate::ordering::view_change::tests::replica;
    use crate::signer::Counter;

    /// A server that has voted in epoch 3 starts. Each of q−1 others tells it of a vote for place 9 of that epoch, if
    /// any: what the server thinks of itself then.
    fn after_witnesses(vote: bool, amnesia: Option<Amnesia>) -> Replica {
        let (keyring, voters) = voters(4);
        let mut replica = replica(&voters, 0, &keyring);
        let estimation = Estimation::new(5, (amnesia, Some(Epoch(3))), BTreeMap::new());
        replica.standing = Standing::Estimating(estimation);
        let (view, sequence, digest) = (View(0), Sequence(9), Hash([1; 32]));
        let slot = Slot { view, sequence, digest, attempt: AttemptId::first(Epoch(3)) };
        let vote = vote.then(|| voters[0].sign(Prepare(slot)).stored());
        let witness = Witness {
            boot: 5,
            certificate: None,
            prepares: vote.into_iter().collect(),
            commits: vec![],
            view_change: None,
        };
        for from in [1, 2] {
            assert_eq!(replica.part(), Part::Estimating, "fewer than q−1 have answered");
            replica.on_witness(Timestamp(1), ServerId(from), witness.clone());
        }
        replica
    }

    /// PBFT-PR §4.3.2: a server that cast votes that its database does not know casts none before the epoch is over
    /// in which it may have cast them, and stays so through another start.
    #[test]
    fn who_forgot_a_vote_waits_until_its_epoch_is_over() {
        assert_eq!(after_witnesses(false, None).part(), Part::Voting, "nothing is forgotten");
        // A lost or older database, which the signer tells by its number, remembers nothing whatever others show. A
        // thief makes the signer count too, and only for the epochs in which she was there: through those that are
        // over nobody waits.
        let unsettled = Amnesia { through: Epoch(3), settled: false };
        let settled = Amnesia { through: Epoch(2), settled: true };
        for (vote, amnesia, through) in [
            (true, None, 3),
            (false, Some(unsettled), 3),
            (false, Some(settled), 2),
            (true, Some(settled), 2),
        ] {
            let mut replica = after_witnesses(vote, amnesia);
            assert_eq!(replica.part(), Part::Recovering, "{vote}, {amnesia:?}");
            let (writes, _) = replica.drain().unwrap();
            let wrote = writes.writes().iter().any(|write| {
                matches!(write, Write::Amnesia(Some(Amnesia { through: Epoch(e), settled: true })) if *e == through)
            });
            assert!(wrote, "another start knows it");
            let mut reaches = |epoch| {
                let statement = Checkpoint {
                    sequence: Sequence(40),
                    root: Hash([2; 32]),
                    time: Timestamp(1),
                    epoch: Epoch(epoch),
                    attempt: 1,
                };
                let certificate = Certificate { statement, votes: vec![], keys: vec![] };
                replica.certificate = Some(Arc::new(certificate));
                replica.recovered(Timestamp(2));
                replica.part()
            };
            assert_eq!(reaches(through), Part::Recovering);
            assert_eq!(reaches(through + 1), Part::Voting);
        }
    }

    /// If all stop at once, nobody may have a certificate any more that one of them was shown: whoever said to hold what
    /// it certified votes, so that such a place is reached again, and shows readers nothing before.
    #[test]
    fn who_forgot_what_it_holds_votes_and_shows_readers_nothing_older() {
        let (keyring, voters) = voters(4);
        let certificate = |sequence| {
            let (root, time, epoch) = (Hash([2; 32]), Timestamp(1), Epoch(4));
            let statement = Checkpoint { sequence: Sequence(sequence), root, time, epoch, attempt: 1 };
            Certificate { statement, votes: vec![], keys: vec![] }
        };
        // The vote was cast in an epoch that is over.
        let slot = |sequence| {
            let attempt = AttemptId::first(Epoch(3));
            Slot { view: View(0), sequence: Sequence(sequence), digest: Hash([1; 32]), attempt }
        };
        for (executed, forgot) in [(9, false), (8, true)] {
            let mut replica = crate::ordering::view_change::tests::replica_at(executed, &voters, 0, &keyring);
            replica.standing =
                Standing::Estimating(Estimation::new(5, (None, Some(Epoch(3))), BTreeMap::new()));
            let vote = voters[0].sign(Prepare(slot(9))).stored();
            let (certificates, commits) = (Some(certificate(31)), vec![]);
            let witness = Witness {
                boot: 5,
                certificate: certificates,
                prepares: vec![vote],
                commits,
                view_change: None,
            };
            for from in [1, 2] {
                replica.on_witness(Timestamp(1), ServerId(from), witness.clone());
            }
            assert_eq!(replica.part(), Part::Voting);
            let mut shows = |sequence| {
                replica.certificate = Some(Arc::new(certificate(sequence)));
                replica.certified_snapshot = Some(replica.state.seal().1);
                replica.publish();
                let client = crate::bytes::PublicKey([7; 32]);
                replica.tell_clients([crate::request::RequestId { client, sequence: 1 }]);
                assert!(replica.may_vote());
                let released = replica.drain().map(|(writes, unsent)| unsent.release(&writes.committed()));
                released.is_some_and(|released| {
                    assert_eq!(released.published.is_some(), !released.replied.is_empty());
                    released.published.is_some()
                })
            };
            assert_eq!((shows(30), shows(31)), (!forgot, true));
        }
    }

    /// What the signer and the database say at a start.
    #[test]
    fn a_database_that_knows_of_fewer_voting_keys_than_the_signer_is_an_older_copy() {
        let signer = |voting| Counter { voting, voted_in: AttemptId::first(Epoch(7)), ..Counter::default() };
        let begin = |voting_key, voting, since| {
            let mut stored = Stored { voting_key, ..Stored::default() };
            let writes = stored.begin(&signer(voting), Epoch(since));
            assert!(matches!(writes[..], [Write::VotingKey(n), Write::Amnesia(a)]
                if n == stored.voting_key && n > voting && n > voting_key && a == stored.amnesia));
            assert_eq!(stored.voted_in, (voting > 0).then_some(Epoch(7)));
            stored.amnesia.map(|amnesia| (amnesia.through.0, amnesia.settled))
        };
        assert_eq!(begin(0, 0, 0), None, "the first start");
        assert_eq!(begin(4, 4, 0), None);
        assert_eq!(begin(5, 4, 0), None, "it was asked, and did not answer");
        assert_eq!(begin(3, 4, 0), Some((7, true)), "an older copy");
        assert_eq!(begin(0, 4, 0), Some((7, true)), "a lost database");
        assert_eq!(begin(0, 0, 5), Some((4, true)), "another one's place, of which it knows no vote");
        assert_eq!(begin(3, 3, 5), None);
        // Known without the signer, which has forgotten too, or counts this very key.
        for (voting, known) in [(0, (0, false)), (9, (7, true))] {
            let mut stored = Stored { voting_key: 9, forgot: true, ..Stored::default() };
            stored.begin(&signer(voting), Epoch(0));
            assert_eq!(stored.amnesia.map(|amnesia| (amnesia.through.0, amnesia.settled)), Some(known));
        }
        // What was found stays until it does not matter any more.
        let amnesia = Some(Amnesia { through: Epoch(2), settled: true });
        let mut stored = Stored { voting_key: 9, amnesia, ..Stored::default() };
        stored.begin(&signer(9), Epoch(0));
        assert_eq!(stored.amnesia, amnesia);
    }

    /// A vote of a later view for a lower place is forgotten as easily as any, and counts as much.
    #[test]
    fn witnesses_keep_the_vote_of_the_last_view_too() {
        let (_, voters) = voters(4);
        let slots = [(10, 0), (8, 1), (9, 0), (8, 0)];
        let slot = |(sequence, view)| {
            let (digest, attempt) = (Hash([1; 32]), AttemptId::default());
            Slot { view: View(view), sequence: Sequence(sequence), digest, attempt }
        };
        let mut witnessed = Witnessed::default();
        for vote in slots.map(slot) {
            witnessed.prepare(&voters[1].sign(Prepare(vote)));
            witnessed.commit(&voters[1].sign(Commit(vote)));
        }
        let Seen { prepares, commits } = witnessed.of(ServerId(1));
        let kept = prepares.both(|vote| vote.0).into_iter().map(|(vote, _)| vote.body.0);
        let kept_commits = commits.both(|vote| vote.0).into_iter().map(|(vote, _)| vote.body.0);
        let expected = [slot((10, 0)), slot((8, 1))];
        assert_eq!(
            (kept.collect::<Vec<_>>(), kept_commits.collect::<Vec<_>>()),
            (expected.to_vec(), expected.to_vec())
        );
        witnessed.prepare(&voters[2].sign(Prepare(slot((3, 3)))));
        assert_eq!(witnessed.of(ServerId(2)).prepares.both(|vote| vote.0).len(), 1);
    }
}

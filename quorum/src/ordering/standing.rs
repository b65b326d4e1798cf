//! Whether this replica may vote: not before it knows that it remembers its votes (design §3,
//! *estimation* in PBFT-PR §4.3.2).
//!
//! A database that was restored from a backup, or lost, is amnesia: a replica that goes on from it
//! could contradict what it signed. So at every start it asks the others what they hold of its own
//! signatures. Once q−1 of them have answered there are two cases:
//!
//! - Its database accounts for all of them: it votes. Persist-before-send makes this the normal
//!   case, also when all servers start at once, since those that do not vote yet answer too.
//! - One of its own signatures is not in its database, or it has no database at all although it
//!   has voted before. Then it is one of the f faulty servers until nothing that it may have signed
//!   matters any more. It accepted proposals at most [`PROPOSALS_AHEAD`] beyond what it had
//!   executed. Some correct server among those that answered took part in ordering that, and so had
//!   executed at most as much less. So it waits for a certificate at twice that distance beyond
//!   what the others have, by catching up or by state transfer; and it takes part in no view before
//!   one that it has been shown to have changed to.
//!
//! Until then it promises nothing, proposes nothing, and shows readers nothing.

use super::Replica;
use super::budget::Question;
use super::effects::{Accusation, Target, Write};
use crate::certificate::QuorumProof;
use crate::ids::{Sequence, ServerId, Timestamp, View};
use crate::limits::{PROPOSALS_AHEAD, WINDOW};
use crate::message::{Commit, Evidence, PeerMessage, Prepare, Slot, Witness};
use crate::signing::{Signed, Verified};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
}

/// See the module.
#[derive(Clone)]
pub(super) enum Standing {
    Voting,
    Estimating(Estimation),
    Recovering { until: Sequence },
}

/// What the others have said since the start.
#[derive(Clone)]
pub(super) struct Estimation {
    /// Answers name it, so that those to an earlier start do not count.
    boot: u64,
    /// It is known already that votes are forgotten.
    amnesia: bool,
    /// Views of the proposals and proofs that the database holds at each sequence number.
    memory: BTreeMap<Sequence, Memory>,
    /// What each server that answered has executed, as far as it proved that.
    answers: BTreeMap<ServerId, Sequence>,
    /// The highest sequence number and view of any own signature that was shown.
    shown: (Sequence, View),
}

/// What a database says about one sequence number.
#[derive(Clone, Copy, Default)]
pub(super) struct Memory {
    pub(super) accepted: Option<View>,
    pub(super) prepared: Option<View>,
}

impl Estimation {
    pub(super) fn new(boot: u64, amnesia: bool, memory: BTreeMap<Sequence, Memory>) -> Self {
        Self { boot, amnesia, memory, answers: BTreeMap::new(), shown: Default::default() }
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
        if newer(&self.last, &evidence, |vote| (slot(vote).view, slot(vote).sequence)) {
            self.last = Some(evidence.clone());
        }
        if newer(&self.highest, &evidence, |vote| (slot(vote).sequence, slot(vote).view)) {
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
        matches!(self.standing, Standing::Voting) && !self.diverged
    }

    /// For operators.
    pub(super) fn part(&self) -> Part {
        match self.standing {
            _ if self.diverged => Part::Repairing,
            Standing::Voting => Part::Voting,
            Standing::Estimating(_) => Part::Estimating,
            Standing::Recovering { .. } => Part::Recovering,
        }
    }

    /// Asks those who have not answered.
    pub(super) fn ask_witnesses(&mut self) {
        let Standing::Estimating(estimation) = &self.standing else { return };
        let boot = estimation.boot;
        for peer in self.manifest.grid().servers().filter(|peer| *peer != self.id) {
            if !estimation.answers.contains_key(&peer) {
                self.pending.send(Target::One(peer), PeerMessage::AskWitness(boot));
            }
        }
    }

    /// Somebody has started and wants to know what it signed before.
    pub(super) fn on_ask_witness(&mut self, now: Timestamp, from: ServerId, boot: u64) {
        let asker = (from, None);
        if !self.budgets.allows(now, asker, Question::Witness) {
            return;
        }
        let change = self.view_change_of(from).map(|change| self.bytes_of_view_change(change.body()));
        let bytes = self.bytes_of_proof() + change.unwrap_or(0);
        self.budgets.spend(now, asker, Question::Witness, bytes);
        let Seen { prepares, commits } = self.witnessed.of(from);
        let (prepares, commits) = (prepares.both(|vote| vote.0), commits.both(|vote| vote.0));
        let view_change = self.view_change_of(from).map(Verified::stored);
        let certificate = self.certificate.as_ref().map(|certificate| certificate.as_ref().clone());
        let executed = self.executed();
        let witness = Witness { boot, executed, certificate, prepares, commits, view_change };
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
        // More than a certificate and the window after it is not believed.
        let certified =
            witness.certificate.as_ref().map_or(0, |certificate| certificate.statement.sequence.0);
        let executed = Sequence(witness.executed.0.min(certified.saturating_add(WINDOW)));
        estimation.answers.insert(from, executed);

        let mut forgotten = Vec::new();
        let mut shown = |sequence: Sequence, view: View, remembered: bool| {
            estimation.shown.0 = estimation.shown.0.max(sequence);
            estimation.shown.1 = estimation.shown.1.max(view);
            if !remembered {
                forgotten.push(sequence);
            }
        };
        let memory = |sequence: Sequence| estimation.memory.get(&sequence).copied().unwrap_or_default();
        for (vote, _) in witness.prepares.iter().filter(|(vote, _)| vote.server == id) {
            let slot = vote.body.0;
            let known = slot.sequence <= own_executed || memory(slot.sequence).accepted >= Some(slot.view);
            // A vote in a view means only that this replica was in it then.
            shown(slot.sequence, View(0), known);
        }
        for (vote, _) in witness.commits.iter().filter(|(vote, _)| vote.server == id) {
            let slot = vote.body.0;
            let known = slot.sequence <= own_executed || memory(slot.sequence).prepared >= Some(slot.view);
            shown(slot.sequence, View(0), known);
        }
        if let Some((change, _)) = witness.view_change.as_ref().filter(|(change, _)| change.server == id) {
            shown(Sequence(0), change.body.view, change.body.view <= own_view);
        }
        if let Some(sequence) = forgotten.into_iter().max() {
            if !estimation.amnesia {
                self.pending.accuse(Accusation::Amnesia { sequence });
            }
            estimation.amnesia = true;
        }
        self.conclude(now);
    }

    /// With q−1 answers it is clear whether anything is forgotten.
    pub(super) fn conclude(&mut self, now: Timestamp) {
        let quorum = self.quorum();
        let Standing::Estimating(estimation) = &self.standing else { return };
        if estimation.answers.len() + 1 < quorum {
            return;
        }
        if !estimation.amnesia {
            self.standing = Standing::Voting;
            self.take_part(now);
            return;
        }
        let highest = estimation.answers.values().copied().max().unwrap_or_default();
        let (sequence, view) = estimation.shown;
        let until = Sequence(highest.max(sequence).0.saturating_add(2 * PROPOSALS_AHEAD));
        // Written before anything else: a crash on the way does not make it forget that it forgot.
        self.pending.write(Write::Amnesia(true));
        self.standing = Standing::Recovering { until };
        if view > self.view {
            self.leave_for(now, view);
        }
        self.recovered(now);
    }

    /// Nothing that was forgotten matters below a certificate as high as this.
    pub(super) fn recovered(&mut self, now: Timestamp) {
        if let Standing::Recovering { until } = self.standing
            && self.certified() >= until
        {
            self.pending.write(Write::Amnesia(false));
            self.standing = Standing::Voting;
            self.take_part(now);
        }
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

    /// A vote of a later view for a lower place is forgotten as easily as any, and counts as much.
    #[test]
    fn witnesses_keep_the_vote_of_the_last_view_too() {
        let (_, voters) = voters(4);
        let slots = [(10, 0), (8, 1), (9, 0), (8, 0)];
        let slot =
            |(sequence, view)| Slot { view: View(view), sequence: Sequence(sequence), digest: Hash([1; 32]) };
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

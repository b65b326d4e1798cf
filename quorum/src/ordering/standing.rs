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
//! What it is shown may be an adversary's, who had one of its keys once. So nothing grows by one claim alone: what
//! was signed in an epoch that a certificate shows to be over is void (see `barrier`); a place counts as far as
//! the others' certificates and the window after them reach; a view as far as it follows one that f+1 of
//! those that answered are in. A claim of a later view is not believed, and may be true: then it
//! waits until the epoch is over in which it was made. And two epochs later nothing that it may have forgotten
//! counts in any case.
//!
//! Until then it promises nothing, proposes nothing, and shows readers nothing.

use super::Replica;
use super::budget::Question;
use super::effects::{Accusation, Target, Write};
use crate::certificate::QuorumProof;
use crate::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp, View};
use crate::limits::{PROPOSALS_AHEAD, WINDOW};
use crate::message::{Commit, Evidence, PeerMessage, Prepare, Slot, ViewChange, Witness};
use crate::signing::{Signed, Statement as _, Verified};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    Recovering(Forgotten),
}

/// Until when something that a server has forgotten may matter.
#[derive(Clone, Copy)]
pub(super) struct Forgotten {
    /// Votes, below a certificate as high as this.
    until: Sequence,
    /// A view change, in the epoch in which it was made.
    view_change_in: Option<Epoch>,
    /// Anything, before this epoch.
    before: Epoch,
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
    /// What each server that answered has executed, as far as it proved that, and its view.
    answers: BTreeMap<ServerId, (Sequence, View)>,
    /// The last certificate that was shown, and its epoch.
    certified: (Sequence, AttemptId),
    /// Own signatures that were shown.
    claims: Vec<Claim>,
}

/// An own signature that another server shows.
#[derive(Clone, Copy)]
struct Claim {
    attempt: AttemptId,
    sequence: Sequence,
    /// Of a view change.
    view: Option<View>,
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
    pub(super) fn new(boot: u64, amnesia: bool, memory: BTreeMap<Sequence, Memory>) -> Self {
        let (answers, certified) = (BTreeMap::new(), Default::default());
        Self { boot, amnesia, memory, answers, certified, claims: Vec::new() }
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
            if !estimation.answers.contains_key(&peer) {
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
        let (executed, view) = (self.executed(), self.view);
        let witness = Witness { boot, executed, view, certificate, prepares, commits, view_change };
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
        let certified = witness.certificate.as_ref().map(|certificate| certificate.statement);
        let through = certified.map_or(0, |statement| statement.sequence.0).saturating_add(WINDOW);
        let executed = Sequence(witness.executed.0.min(through));
        // One answer of each: a server that does not vote yet says nothing that a second one could add.
        if estimation.answers.contains_key(&from) {
            return;
        }
        estimation.answers.insert(from, (executed, witness.view));
        let shown = certified.map(|statement| (statement.sequence, statement.attempt()));
        estimation.certified = estimation.certified.max(shown.unwrap_or_default());

        let memory = |sequence: Sequence| estimation.memory.get(&sequence).copied().unwrap_or_default();
        let mut claims = Vec::new();
        // A vote in a view means only that this replica was in it then.
        let mut claim = |slot: Slot, known: Option<View>| {
            let remembered = slot.sequence <= own_executed || known >= Some(slot.view);
            let Slot { attempt, sequence, .. } = slot;
            claims.push(Claim { attempt, sequence, view: None, remembered });
        };
        for (vote, _) in witness.prepares.iter().filter(|(vote, _)| vote.server == id) {
            claim(vote.body.0, memory(vote.body.0.sequence).accepted);
        }
        for (vote, _) in witness.commits.iter().filter(|(vote, _)| vote.server == id) {
            claim(vote.body.0, memory(vote.body.0.sequence).prepared);
        }
        if let Some((change, _)) = witness.view_change.as_deref().filter(|(change, _)| change.server == id) {
            let ViewChange { view, attempt, .. } = change.body;
            let (sequence, remembered) = (Sequence(0), view <= own_view);
            claims.push(Claim { attempt, sequence, view: Some(view), remembered });
        }
        estimation.claims.extend(claims);
        self.conclude(now);
    }

    /// With q−1 answers it is clear whether anything is forgotten.
    pub(super) fn conclude(&mut self, now: Timestamp) {
        let (quorum, f) = (self.quorum(), self.manifest.thresholds.f());
        let Standing::Estimating(estimation) = &self.standing else { return };
        if estimation.answers.len() + 1 < quorum {
            return;
        }
        // Nothing that was signed in an epoch that is over counts with those who have certified a later one.
        let own = self.certificate.as_ref().map_or_else(AttemptId::default, |own| own.statement.attempt());
        let (certified, shown) = estimation.certified;
        let epoch = shown.max(own).max(self.state.attempt());
        let claims = || estimation.claims.iter().filter(|claim| claim.attempt >= epoch);
        let forgotten = claims().filter(|claim| !claim.remembered).map(|claim| claim.sequence).max();
        if let Some(sequence) = forgotten.filter(|_| !estimation.amnesia) {
            self.pending.accuse(Accusation::Amnesia { sequence });
        }
        let amnesia = estimation.amnesia || forgotten.is_some();
        if !amnesia {
            // Votes of an epoch that is over bind nobody; but what was said to be held then is to be held now.
            let lost = |claim: &Claim| !claim.remembered && claim.view.is_none();
            let until = if estimation.claims.iter().any(lost) { certified } else { Sequence(0) };
            self.standing =
                Standing::Recovering(Forgotten { until, view_change_in: None, before: Epoch(u64::MAX) });
            self.recovered(now);
            return;
        }
        let highest = estimation.answers.values().map(|(executed, _)| *executed).max().unwrap_or_default();
        let bound = Sequence(highest.0.saturating_add(2 * WINDOW));
        let shown = claims().map(|claim| claim.sequence).max().unwrap_or_default().min(bound);
        let until = Sequence(highest.max(shown).0.saturating_add(2 * PROPOSALS_AHEAD));
        // Of f+1 servers one is correct: some correct server was in a view before the one that this one left for.
        let mut views: Vec<_> = estimation.answers.values().map(|(_, view)| *view).collect();
        views.sort_unstable_by(|a, b| b.cmp(a));
        let plausible = views.get(f).copied().unwrap_or_default().next();
        let changes = || claims().filter_map(|claim| Some((claim.view?, claim.attempt.epoch)));
        let view = changes().map(|(view, _)| view).filter(|view| *view <= plausible).max();
        let view_change_in = changes().filter(|(view, _)| *view > plausible).map(|(_, of)| of).max();
        // Its last votes may be of the epoch after the last that anyone has a certificate of.
        let before = claims().map(|claim| claim.attempt.epoch).chain([epoch.epoch]).max();
        let before = Epoch(before.unwrap_or_default().0.min(epoch.epoch.0 + 1).saturating_add(2));
        // Written before anything else: a crash on the way does not make it forget that it forgot.
        self.pending.write(Write::Amnesia(true));
        self.standing = Standing::Recovering(Forgotten { until, view_change_in, before });
        if let Some(view) = view.filter(|view| *view > self.view) {
            self.leave_for(now, view);
        }
        self.recovered(now);
    }

    /// Nothing that was forgotten matters below a certificate as high as this, or of an epoch as late.
    pub(super) fn recovered(&mut self, now: Timestamp) {
        let Standing::Recovering(Forgotten { until, view_change_in, before }) = self.standing else { return };
        let epoch = self.certificate.as_ref().map_or(Epoch(0), |certificate| certificate.statement.epoch);
        let votes = self.certified() >= until && view_change_in.is_none_or(|of| epoch > of);
        if votes || epoch >= before {
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
    use crate::ordering::view_change::tests::replica;

    /// A server starts from an older database than its last one. Each of q−1 others tells it of a vote at `place`, if
    /// any, and has itself executed 7 batches: what the server thinks of itself then.
    fn after_witnesses(place: Option<u64>, amnesia: bool) -> (Part, Replica) {
        let (keyring, voters) = voters(4);
        let mut replica = replica(&voters, 0, &keyring);
        replica.standing = Standing::Estimating(Estimation::new(5, amnesia, BTreeMap::new()));
        let (digest, attempt) = (Hash([1; 32]), AttemptId::default());
        let slot = |place| Slot { view: View(0), sequence: Sequence(place), digest, attempt };
        let votes = place.map(|place| voters[0].sign(Prepare(slot(place))).stored());
        let witness = Witness {
            boot: 5,
            executed: Sequence(7),
            view: View(0),
            certificate: None,
            prepares: votes.into_iter().collect(),
            commits: vec![],
            view_change: None,
        };
        for from in [1, 2] {
            assert_eq!(replica.part(), Part::Estimating, "fewer than q−1 have answered");
            replica.on_witness(Timestamp(1), ServerId(from), witness.clone());
        }
        (replica.part(), replica)
    }

    /// PBFT-PR §4.3.2: a server that learns of votes that its database does not know casts none before a
    /// certificate lies beyond all that it may have voted for.
    #[test]
    fn who_forgot_a_vote_waits_for_a_certificate_beyond_all_that_it_may_have_voted_for() {
        assert_eq!(after_witnesses(None, false).0, Part::Voting, "nothing is forgotten");
        // A lost database remembers nothing, whatever the others show.
        // And who once had its key shows it votes for places that nobody comes to.
        let bound = 7 + 2 * WINDOW;
        for (place, amnesia, beyond) in
            [(Some(9), false, 9), (None, true, 7), (Some(u64::MAX - 1), false, bound)]
        {
            let (part, replica) = after_witnesses(place, amnesia);
            assert_eq!(part, Part::Recovering, "{place:?}, {amnesia}");
            let Standing::Recovering(forgotten) = replica.standing else { unreachable!() };
            assert_eq!(forgotten.until.0, beyond + 2 * PROPOSALS_AHEAD);
        }
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

//! View change (PBFT §4.4, for general n and q): replacing a primary that does not do its work.
//!
//! 1. *Suspect*. A backup that waits too long says so. That promises nothing, so a server that was
//!    merely cut off does not leave its view alone. f+1 suspicions contain an honest one.
//! 2. *View change*. Then a replica stops taking part in its view and sends what it has prepared,
//!    with the proof: q prepare votes each, above its last certificate. It also follows f+1
//!    servers that are ahead of it.
//! 3. *New view*. The next primary takes q view changes. What they contain decides which batch is
//!    proposed again at each sequence number ([`Plan`]): the one prepared in the highest view, or
//!    an empty one. Everyone computes that from the same q view changes, so the new-view message names
//!    them by their digests, and the proposals follow as in the normal case (see `new_view`).
//!
//! Why nothing committed is lost: a batch committed at s was prepared at q servers; any q view
//! changes contain one of an honest server among them, whose proof for s is from that view or a
//! later one, and in later views only the same batch can have been prepared. A server that shows different view
//! changes to different servers is not that honest one, and what is signed by the primary's digests
//! is one of them for everyone.

use super::Replica;
use super::budget::Question;
use super::effects::{Target, Write};
use super::log::batch_bytes;
use super::new_view::{Beginning, Shown};
use crate::bytes::Hash;
use crate::certificate::Certificate;
use crate::ids::{AttemptId, Sequence, ServerId, ServerSet, Timestamp, View};
use crate::limits::{
    RETRANSMIT_MS, SUSPICION_LIFETIME_MS, VIEW_CHANGE_BYTES_PER_SECOND, VIEW_CHANGE_TIMEOUT_MAX_MS,
    VIEW_CHANGE_TIMEOUT_MS,
};
use crate::message::{CheckedBatch, CheckedViewChange, NewView, PeerMessage, Suspect, ViewChange};
use crate::signing::Verified;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a replica knows about changing its view.
#[derive(Clone)]
pub(super) struct Changing {
    /// Whether it takes part in its view; otherwise it waits for that view's new-view message.
    pub(super) active: bool,
    /// Who suspects the primary of which view, and since when.
    pub(super) suspicions: BTreeMap<ServerId, (View, Timestamp)>,
    /// The view change of the highest view of each server: its last, of which there may be many.
    pub(super) view_changes: BTreeMap<ServerId, CheckedViewChange>,
    /// When this server last said its own.
    said: Timestamp,
    /// How the current view began, to show to those who missed it; none in view 0.
    pub(super) began: Option<Beginning>,
    /// New views that lack view changes here.
    pub(super) shown: Shown,
    /// Where the current view began: everything up to here is certified.
    pub(super) low: Sequence,
    /// What has to be proposed again in the current view.
    pub(super) expected: BTreeMap<Sequence, Hash>,
    /// As primary: those of them that are not proposed yet.
    pub(super) carried: BTreeMap<Sequence, CheckedBatch>,
    /// As the next primary: batches that view changes call for and this server lacks.
    pub(super) wanted: BTreeSet<Hash>,
    fetched: BTreeMap<Hash, CheckedBatch>,
    timeout_ms: u64,
    /// When a batch was last executed, a view entered or a view change sent.
    pub(super) since: Timestamp,
    /// Somebody votes in a view after this one.
    pub(super) later_view_seen: bool,
}

impl Changing {
    pub(super) fn new() -> Self {
        Self {
            active: true,
            suspicions: BTreeMap::new(),
            view_changes: BTreeMap::new(),
            said: Timestamp(0),
            began: None,
            shown: Shown::default(),
            low: Sequence(0),
            expected: BTreeMap::new(),
            carried: BTreeMap::new(),
            wanted: BTreeSet::new(),
            fetched: BTreeMap::new(),
            timeout_ms: VIEW_CHANGE_TIMEOUT_MS,
            since: Timestamp(0),
            later_view_seen: false,
        }
    }
    /// What decides its future, for model checkers.
    pub(super) fn fingerprint(&self) -> impl serde::Serialize {
        let changes: Vec<_> = self.view_changes.values().map(CheckedViewChange::digest).collect();
        let new_view = (self.began.as_ref().map(Beginning::fingerprint), self.shown.fingerprint());
        let fetched: Vec<_> = self.fetched.keys().copied().collect();
        let suspicions: Vec<_> = self.suspicions.iter().map(|(server, since)| (*server, *since)).collect();
        let expected: Vec<_> = self.expected.iter().map(|(sequence, digest)| (*sequence, *digest)).collect();
        let wanted: Vec<_> = self.wanted.iter().copied().collect();
        let carried: Vec<_> =
            self.carried.iter().map(|(sequence, batch)| (*sequence, batch.digest())).collect();
        let timers = (self.timeout_ms, (self.since, self.said), self.active, self.later_view_seen, self.low);
        (changes, new_view, fetched, suspicions, (expected, carried), wanted, timers)
    }
    /// An epoch has begun after the batch at `began`: what was said about views before that counts no more. A
    /// view that began in the last one goes on, and calls for nothing.
    pub(super) fn enter_epoch(&mut self, attempt: AttemptId, began: Sequence) {
        self.view_changes.retain(|_, change| change.body().attempt == attempt);
        self.suspicions.clear();
        self.wanted.clear();
        self.fetched.clear();
        self.carried.clear();
        self.shown = Shown::default();
        self.low = self.low.max(began);
        // At a start the log is executed again below a view that began in this epoch.
        if self.began.as_mut().is_none_or(|beginning| beginning.enter_epoch(attempt)) {
            self.expected.clear();
        }
    }
    /// Nobody has had a chance yet.
    pub(super) fn restart_timer(&mut self, now: Timestamp) {
        self.since = now;
    }
    /// The view of each server's last view change, and its digest.
    pub(super) fn views_left(&self) -> impl Iterator<Item = (ServerId, (View, Hash))> + '_ {
        self.view_changes.iter().map(|(server, change)| (*server, (change.body().view, change.digest())))
    }
    /// The last place that the new view fixed.
    pub(super) fn last_expected(&self) -> Option<Sequence> {
        self.expected.last_key_value().map(|(last, _)| *last)
    }
    /// The batch that has to be proposed at a sequence number, if the new view fixed one.
    pub(super) fn expected(&self, sequence: Sequence) -> Option<Hash> {
        self.expected.get(&sequence).copied()
    }
}

/// What q view changes decide: PBFT §4.4's O, from min-s to max-s.
pub struct Plan<'a> {
    /// The highest certificate among them; none at the very beginning.
    pub stable: Option<&'a Certificate>,
    /// Everything up to here is decided: certified, or of the epoch before.
    pub low: Sequence,
    /// Which batch goes to each sequence number after it.
    pub slots: BTreeMap<Sequence, Hash>,
}

impl<'a> Plan<'a> {
    /// From view changes that have been checked, all of one epoch.
    pub fn of(null: Hash, view_changes: impl Iterator<Item = &'a ViewChange> + Clone) -> Self {
        let low = view_changes.clone().map(ViewChange::low).max().unwrap_or_default();
        let stable = view_changes.clone().filter_map(|change| change.stable.as_ref());
        let stable = stable.max_by_key(|certificate| certificate.statement.sequence);
        let mut best: BTreeMap<Sequence, (View, Hash)> = BTreeMap::new();
        for proof in view_changes.flat_map(|change| &change.prepared) {
            let slot = proof.statement.0;
            if slot.sequence <= low {
                continue;
            }
            let known = best.entry(slot.sequence).or_insert((slot.view, slot.digest));
            if slot.view > known.0 {
                *known = (slot.view, slot.digest);
            }
        }
        let high = best.last_key_value().map_or(low, |(sequence, _)| *sequence);
        let slots = (low.0 + 1..=high.0)
            .map(|s| (Sequence(s), best.get(&Sequence(s)).map_or(null, |(_, digest)| *digest)))
            .collect();
        Self { stable, low, slots }
    }
}

impl Replica {
    /// The empty batch that fills gaps. Its time is 0, so execution keeps the previous one.
    pub(super) fn null_batch(&self) -> CheckedBatch {
        CheckedBatch::new(&self.cluster, Timestamp(0), Vec::new())
    }

    /// Something was executed: the primary does its work.
    pub(super) fn note_progress(&mut self, now: Timestamp) {
        self.changing.since = now;
        if self.changing.active {
            self.changing.timeout_ms = VIEW_CHANGE_TIMEOUT_MS;
        }
    }

    /// At every tick: is it time to suspect, to give up on a new view, to say things again?
    pub(super) fn watch_primary(&mut self, now: Timestamp) {
        if self.changing.since == Timestamp(0) {
            // The first tick after the start: nobody has had a chance yet.
            self.changing.since = now;
            self.entered = now;
        }
        if !self.may_vote() {
            // Leaving a view is a promise too.
            return;
        }
        let waited = now.since_ms(self.changing.since);
        if !self.changing.active {
            self.fetch_wanted();
            if now.since_ms(self.changing.said) >= self.repeat_after_ms() {
                self.send_view_change(now);
            }
            // What came before this replica could vote counts now.
            self.try_new_view(now);
            if self.changing.active {
                return;
            }
            // q servers have left the views before this one, so it could begin. Those that have gone
            // further count too: they waited for this one, and will not come back to it.
            let changes = self.changing.view_changes.values();
            let enough = changes.filter(|change| change.body().view >= self.view).count() >= self.quorum();
            if enough && waited >= self.changing.timeout_ms {
                self.changing.timeout_ms = (self.changing.timeout_ms * 2).min(VIEW_CHANGE_TIMEOUT_MAX_MS);
                self.start_view_change(now, self.view.next());
            }
            return;
        }
        if self.primary() == self.id {
            return;
        }
        if self.executed() < self.certified_anywhere {
            // The others go on, or went on: who is behind catches up before it judges the primary.
            return;
        }
        if self.finds_fault(now, waited, self.changing.timeout_ms) {
            let suspect = self.voter.sign(Suspect { view: self.view, attempt: self.state.attempt() });
            self.promise(&suspect, PeerMessage::Suspect);
            self.on_suspect(now, &suspect);
        }
    }

    pub(super) fn on_suspect(&mut self, now: Timestamp, suspect: &Verified<Suspect>) {
        let view = suspect.body().view;
        if view < self.view {
            return;
        }
        self.changing.suspicions.insert(suspect.server(), (view, now));
        self.leave_if_suspected(now);
    }

    /// f+1 servers suspect the primary, or have left the view already: one of them is honest.
    fn leave_if_suspected(&mut self, now: Timestamp) {
        let recent = |when: &Timestamp| now.since_ms(*when) <= SUSPICION_LIFETIME_MS;
        let suspicions = self.changing.suspicions.iter();
        let suspecting =
            suspicions.filter(|(_, (view, when))| *view == self.view && recent(when)).map(|(id, _)| *id);
        let left = self.changing.view_changes.values().filter(|change| change.body().view > self.view);
        let against: ServerSet = suspecting.chain(left.map(CheckedViewChange::server)).collect();
        if self.changing.active && against.len() > self.manifest.thresholds.f() {
            self.start_view_change(now, self.view.next());
        }
    }

    fn view_changes_for(&self, view: View) -> impl Iterator<Item = &CheckedViewChange> {
        self.changing.view_changes.values().filter(move |change| change.body().view == view)
    }

    /// Leaves the current view for good, and says what was prepared in it.
    fn start_view_change(&mut self, now: Timestamp, view: View) {
        if !self.may_vote() {
            return;
        }
        self.leave_for(now, view);
        self.send_view_change(now);
        self.try_new_view(now);
    }

    /// Votes in no view before this one any more.
    pub(super) fn leave_for(&mut self, now: Timestamp, view: View) {
        self.view = view;
        self.changing.active = false;
        self.changing.began = None;
        self.changing.expected.clear();
        self.changing.carried.clear();
        self.changing.wanted.clear();
        self.changing.fetched.clear();
        self.changing.since = now;
        // The promise not to vote in earlier views is durable before it leaves.
        self.pending.write(Write::View { view, began: None });
    }

    /// The last view change of a server.
    pub(super) fn view_change_of(&self, server: ServerId) -> Option<&CheckedViewChange> {
        self.changing.view_changes.get(&server)
    }

    fn send_view_change(&mut self, now: Timestamp) {
        if !self.may_vote() {
            // It has left; it says so with the key of this epoch, as soon as it has one.
            return;
        }
        let in_epoch = (self.state.attempt(), self.state.began());
        let after = self.certified().max(self.state.began()).next();
        let prepared = self.log.range(after..).filter_map(|(_, entry)| entry.prepared.as_ref());
        let prepared = prepared.map(|(proof, _)| proof);
        let stable = self.certificate.as_ref().map(|certificate| certificate.as_ref().clone());
        let change = self.voter.sign(ViewChange::new(self.view, in_epoch, stable, prepared));
        self.pending.send_all(&change, PeerMessage::ViewChange);
        self.changing.view_changes.insert(self.id, CheckedViewChange::new(&self.cluster, change));
        self.changing.said = now;
    }

    /// What was said may be lost; but megabytes to hundreds of servers are not said four times a second.
    fn repeat_after_ms(&self) -> u64 {
        let said = self.view_change_of(self.id).map_or(0, |change| self.bytes_of_view_change(change.body()));
        let bytes = said.saturating_mul(self.manifest.thresholds.n()) as u64;
        RETRANSMIT_MS.max(bytes.saturating_mul(1_000) / VIEW_CHANGE_BYTES_PER_SECOND)
    }

    pub(super) fn on_view_change(&mut self, now: Timestamp, change: CheckedViewChange) {
        let (server, view) = (change.server(), change.body().view);
        let known = self.changing.view_changes.get(&server).map(|known| known.body().view);
        // Correct servers that are in an epoch agree on where it began.
        if known.is_some_and(|known| known > view) || change.body().began != self.state.began() {
            return;
        }
        if let Some(stable) = &change.body().stable {
            self.note_certified(stable.statement.sequence);
        }
        self.take_view_change(now, &change);
        self.changing.view_changes.insert(server, change);
        // f+1 servers are ahead: an honest one among them has reason to be (PBFT §4.5.2).
        let mut ahead: Vec<_> =
            self.changing.view_changes.values().map(|change| change.body().view).collect();
        ahead.retain(|view| *view > self.view);
        ahead.sort_unstable_by(|a, b| b.cmp(a));
        if let Some(view) = ahead.get(self.manifest.thresholds.f()).copied() {
            self.start_view_change(now, view);
        }
        self.leave_if_suspected(now);
        self.try_new_view(now);
    }

    /// As the primary of the view that is to begin: begins it once q view changes, and the
    /// batches that they call for, are here.
    fn try_new_view(&mut self, now: Timestamp) {
        if self.changing.active || self.primary() != self.id || !self.may_vote() {
            return;
        }
        let Some(changes) = self.choose_view_changes() else { return };
        let null = self.null_batch().digest();
        let plan = Plan::of(null, changes.iter().map(CheckedViewChange::body));
        let (executed, low) = (self.executed(), plan.low);
        let slots: Vec<_> = plan.slots.into_iter().filter(|(sequence, _)| *sequence > executed).collect();
        // Before the view begins: entering it drops what was accepted and not prepared here.
        let mut batches = BTreeMap::new();
        for (sequence, digest) in slots {
            let null = || (digest == null).then(|| self.null_batch());
            let Some(batch) = self.batch_with(&digest).or_else(null) else { return };
            batches.insert(sequence, batch);
        }
        let view_changes = changes.iter().map(|change| (change.server(), change.digest())).collect();
        let (view, attempt) = (self.view, self.state.attempt());
        let new_view = self.voter.sign(NewView { view, attempt, view_changes });
        self.send_new_view(Target::All, &new_view);
        self.enter(now, Beginning::new(new_view, changes));
        self.next_sequence = low.max(executed).next();
        self.changing.carried = batches;
        self.changing.fetched.clear();
    }

    /// q view changes to begin a view with, of those whose batches are all here. The others are asked for as
    /// long as these are too few.
    ///
    /// Any q view changes will do (see the module). Those of correct servers are among them sooner or later: their
    /// authors keep what they have prepared until it is certified, and give it to whoever asks. A proof may
    /// also be shown by liars alone, of a batch that correct servers accepted but did not prepare, and that
    /// nobody gives: no view would begin again if it had to wait for that. PBFT keeps what was accepted
    /// instead (Q sets, PBFT-PR §4.5): there proofs are no signatures, and a replica has to vouch for them.
    fn choose_view_changes(&mut self) -> Option<Vec<CheckedViewChange>> {
        let quorum = self.quorum();
        let (null, executed) = (self.null_batch().digest(), self.executed());
        let lacks = |change: &ViewChange| -> Vec<Hash> {
            let slots = change.prepared.iter().map(|proof| proof.statement.0);
            let open = slots.filter(|slot| slot.sequence > executed).map(|slot| slot.digest);
            open.filter(|digest| *digest != null && self.batch_with(digest).is_none()).collect()
        };
        let changes = self.view_changes_for(self.view).map(|change| (lacks(change.body()), change));
        let (whole, others): (Vec<_>, Vec<_>) = changes.partition(|(lacking, _)| lacking.is_empty());
        let chosen: Vec<_> = whole.into_iter().take(quorum).map(|(_, change)| change.clone()).collect();
        let wanted: BTreeSet<_> = match chosen.len() < quorum {
            true => others.into_iter().flat_map(|(lacking, _)| lacking).collect(),
            false => BTreeSet::new(),
        };
        if self.changing.wanted != wanted {
            self.changing.wanted = wanted;
            self.fetch_wanted();
        }
        (chosen.len() == quorum).then_some(chosen)
    }

    /// A batch that this server prepared, accepted or fetched.
    fn batch_with(&self, digest: &Hash) -> Option<CheckedBatch> {
        if let Some(batch) = self.changing.fetched.get(digest) {
            return Some(batch.clone());
        }
        self.wire_with(digest).map(|batch| CheckedBatch::from_own_log(&self.cluster, batch.as_ref().clone()))
    }

    fn wire_with(&self, digest: &Hash) -> Option<Arc<crate::message::Batch>> {
        let entries = self.log.range(self.certified().next()..);
        entries.into_iter().find_map(|(_, entry)| entry.wire_with(digest))
    }

    fn fetch_wanted(&mut self) {
        for digest in &self.changing.wanted {
            self.pending.send(Target::All, PeerMessage::Fetch(*digest));
        }
    }

    /// A primary to be lacks a batch that this server may have prepared.
    pub(super) fn on_fetch(&mut self, now: Timestamp, from: ServerId, digest: Hash) {
        let asker = (from, self.asked_under);
        if !self.budgets.allows(now, asker, Question::Batch) {
            return;
        }
        if let Some(batch) = self.wire_with(&digest) {
            self.budgets.spend(now, asker, Question::Batch, batch_bytes(&batch));
            self.pending.send(Target::One(from), PeerMessage::Fetched(batch));
        }
    }

    pub(super) fn on_fetched(&mut self, now: Timestamp, batch: CheckedBatch) {
        if self.changing.wanted.remove(&batch.digest()) {
            self.changing.fetched.insert(batch.digest(), batch);
            self.try_new_view(now);
        }
    }

    /// Bytes of a certificate or proof with its keys, about.
    pub(super) fn bytes_of_proof(&self) -> usize {
        256 * self.quorum()
    }
    /// Bytes of a view change, about.
    pub(super) fn bytes_of_view_change(&self, change: &ViewChange) -> usize {
        let votes: usize = change.prepared.iter().map(|proof| 128 + proof.votes.len() * 66).sum();
        self.bytes_of_proof() + votes + change.keys.len() * 128
    }
}

#[cfg(test)]
pub(super) mod tests;

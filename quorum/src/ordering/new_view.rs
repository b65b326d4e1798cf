//! How a view begins (PBFT §4.4): the new-view message, and the q view changes that it names.
//!
//! View changes are sent to all, so a new view names them by server and digest, as PBFT's does. Whoever has them
//! all begins the view; who lacks some asks whoever shows the new view, first of all its primary, and then
//! others. Nobody shows a view that has not begun for itself, so whoever is correct and shows one has what it names.
//!
//! What liars can do with that costs the view at most: view changes that differ from one receiver to the next are
//! fetched, exactly those that the primary named; a primary that names what does not exist, or gives it to nobody,
//! is left when the view does not begin. One new view is held for each peer that shows one, and view changes are
//! gathered for one of them at a time: so not more than q are held besides the last one of each server, however many
//! a liar signs. Where nothing comes for a while another new view has its turn.
//!
//! In the next epoch nothing is left of it that anybody needs: what the view called for is decided or void, and
//! f+1 servers that say so under keys of that epoch are enough to enter it (see [`Replica::is_vouched_for`]).

use super::Replica;
use super::budget::Question;
use super::effects::{Accusation, Target, Write};
use super::restore::StoredBeginning;
use super::view_change::Plan;
use crate::bytes::Hash;
use crate::ids::{AttemptId, Sequence, ServerId, Timestamp, View};
use crate::limits::TRANSFER_PATIENCE_MS;
use crate::message::{CheckedViewChange, NewView, PeerMessage};
use crate::signing::Verified;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How a view began.
#[derive(Clone)]
pub(super) struct Beginning {
    new_view: Verified<NewView>,
    /// What it names, in the epoch in which it began; after that nobody needs them.
    changes: Vec<CheckedViewChange>,
}

impl Beginning {
    pub(super) fn new(new_view: Verified<NewView>, changes: Vec<CheckedViewChange>) -> Self {
        Self { new_view, changes }
    }
    fn body(&self) -> &NewView {
        self.new_view.body()
    }
    fn stored(&self) -> StoredBeginning {
        let view_changes = self.changes.iter().map(|change| Arc::clone(change.evidence())).collect();
        StoredBeginning { new_view: self.new_view.stored(), view_changes }
    }
    /// An epoch has begun; says whether that is another one than the view began in.
    pub(super) fn enter_epoch(&mut self, attempt: AttemptId) -> bool {
        let over = self.body().attempt != attempt;
        if over {
            self.changes.clear();
        }
        over
    }
    /// Whether it says what the view calls for, which matters in the epoch in which the view began.
    pub(super) fn says_enough(&self, attempt: AttemptId) -> bool {
        self.body().attempt < attempt || !self.changes.is_empty()
    }
    pub(super) fn fingerprint(&self) -> impl serde::Serialize + use<> {
        self.new_view.signed().clone()
    }
}

/// New views that were shown, and lack view changes here.
#[derive(Clone, Default)]
pub(super) struct Shown {
    /// The last one that each peer showed.
    by: BTreeMap<ServerId, Verified<NewView>>,
    gathering: Option<Gathering>,
    /// Whose turn it was last to be gathered for, and how often it went on to another one.
    last: Option<ServerId>,
    turns: u32,
}

/// View changes for one of them.
#[derive(Clone)]
struct Gathering {
    /// Who showed it.
    from: ServerId,
    new_view: Verified<NewView>,
    have: BTreeMap<Hash, CheckedViewChange>,
    /// When it was begun, or one came.
    advanced: Timestamp,
    /// Questions so far.
    asked: u64,
}

impl Gathering {
    fn missing(&self) -> impl Iterator<Item = Hash> + '_ {
        let named = self.new_view.body().view_changes.iter().map(|(_, digest)| *digest);
        named.filter(|digest| !self.have.contains_key(digest))
    }
}

impl Shown {
    /// View changes that are asked for.
    pub(super) fn wanted(&self) -> BTreeSet<Hash> {
        self.gathering.iter().flat_map(Gathering::missing).collect()
    }
    pub(super) fn fingerprint(&self) -> impl serde::Serialize + use<> {
        let by: Vec<_> = self.by.iter().map(|(from, shown)| (*from, shown.signed().clone())).collect();
        let gathering = self.gathering.as_ref().map(|gathering| {
            let have: Vec<_> = gathering.have.keys().copied().collect();
            (gathering.from, gathering.new_view.signed().clone(), have, gathering.advanced, gathering.asked)
        });
        (by, gathering, self.last, self.turns)
    }
    /// Which one to gather for next: by turns the one that most peers show, since more correct servers than liars
    /// show one that has begun, and that of the next peer.
    fn next(&mut self) -> Option<(ServerId, Verified<NewView>)> {
        let votes = |shown: &Verified<NewView>| {
            let same = |other: &&Verified<NewView>| other.signed().signature == shown.signed().signature;
            self.by.values().filter(same).count()
        };
        let after = self.by.iter().filter(|(from, _)| Some(**from) > self.last);
        let in_turn = after.chain(&self.by).next();
        let most_shown = self.by.iter().max_by_key(|(_, shown)| votes(shown));
        let next = if self.turns.is_multiple_of(2) { in_turn } else { most_shown };
        let (from, new_view) = next.map(|(from, new_view)| (*from, new_view.clone()))?;
        self.turns = self.turns.saturating_add(1);
        Some((from, new_view))
    }
    /// How long nothing may come before it is the next one's turn: longer each time, as what comes may be large.
    fn patience_ms(&self) -> u64 {
        TRANSFER_PATIENCE_MS << (self.turns / 2).min(3)
    }
}

impl Replica {
    /// A checked new-view message, from the primary or passed on by somebody else.
    pub(super) fn on_new_view(&mut self, now: Timestamp, from: ServerId, new_view: Verified<NewView>) {
        if !self.is_vouched_for(&new_view) || !self.may_begin(new_view.body().view) {
            return;
        }
        if new_view.body().attempt < self.state.attempt() {
            return self.enter(now, Beginning::new(new_view, Vec::new()));
        }
        let own_primary = |replica: &Self, from: ServerId, shown: &Verified<NewView>| {
            shown.body().view == replica.view && from == replica.primary()
        };
        let urgent = own_primary(self, from, &new_view);
        let known = self.changing.shown.by.insert(from, new_view.clone());
        // What the primary of the view that this server waits for shows goes before what others do.
        let changed = known.is_none_or(|known| known.signed() != new_view.signed());
        let free = self.changing.shown.gathering.as_ref().is_none_or(|gathering| {
            let other = gathering.from != from && !own_primary(self, gathering.from, &gathering.new_view);
            (gathering.from == from && changed) || (urgent && other)
        });
        if free {
            self.gather(now, from, new_view);
        }
    }

    /// Whether a new-view message can be believed. It may be of an epoch that is over: then f+1 servers, of which
    /// one is correct, must say in the present one that they are in that view or a later one. That is all it
    /// takes: the first correct server to enter that view or a later one did so with view changes of q servers. Each
    /// quorum has a correct one of these, which votes in no view before that. So no batch is prepared in a view that
    /// had not begun like this; and what one called for in an epoch that is over is decided, or void. One of an epoch
    /// that has not begun here is judged when it has: its author's help comes first.
    fn is_vouched_for(&mut self, new_view: &Verified<NewView>) -> bool {
        let (current, NewView { view, attempt, .. }) = (self.state.attempt(), new_view.body());
        self.later_epoch_seen |= attempt.epoch > current.epoch;
        let vouches = |(of, known): &&(AttemptId, View)| *of == current && known >= view;
        let vouching = self.progress.views.values().filter(vouches).count();
        *attempt == current || (*attempt < current && vouching > self.manifest.thresholds.f())
    }

    /// Whether a view has not begun here yet.
    fn may_begin(&self, view: View) -> bool {
        view > self.view || (view == self.view && !self.changing.active)
    }

    /// Gathers the view changes that a new view names: of those that were sent to all, of those gathered already,
    /// and the rest from whoever showed it.
    fn gather(&mut self, now: Timestamp, from: ServerId, new_view: Verified<NewView>) {
        let gathered = self.changing.shown.gathering.take().map(|before| before.have).unwrap_or_default();
        let known = self.changing.view_changes.values().map(|change| (change.digest(), change.clone()));
        let mut known: BTreeMap<_, _> = gathered.into_iter().chain(known).collect();
        let named = &new_view.body().view_changes;
        let have = named.iter().filter_map(|(_, digest)| known.remove_entry(digest)).collect();
        self.changing.shown.last = Some(from);
        self.changing.shown.gathering = Some(Gathering { from, new_view, have, advanced: now, asked: 0 });
        if !self.try_to_begin(now) {
            self.ask_for_view_changes();
        }
    }

    /// At every tick: asks again, and goes on to another new view where this one leads to nothing.
    pub(super) fn gather_on(&mut self, now: Timestamp) {
        let (view, active) = (self.view, self.changing.active);
        let open = |new_view: &Verified<NewView>| {
            new_view.body().view > view || (new_view.body().view == view && !active)
        };
        self.changing.shown.by.retain(|_, new_view| open(new_view));
        self.changing.shown.gathering.take_if(|gathering| !open(&gathering.new_view));
        let patience_ms = self.changing.shown.patience_ms();
        let gathering = self.changing.shown.gathering.as_ref();
        if gathering.is_some_and(|gathering| now.since_ms(gathering.advanced) < patience_ms) {
            self.ask_for_view_changes();
        } else if let Some((from, new_view)) = self.changing.shown.next() {
            self.gather(now, from, new_view);
        }
    }

    /// Whoever shows a new view has what it names; every second time another one is asked, who may have it too.
    fn ask_for_view_changes(&mut self) {
        let (id, n) = (self.id, self.manifest.thresholds.n() as u64);
        let Some(gathering) = &mut self.changing.shown.gathering else { return };
        let other = (u64::from(id.0) + 1 + gathering.asked / 2 % (n - 1)) % n;
        let to = if gathering.asked.is_multiple_of(2) { gathering.from } else { ServerId(other as u8) };
        gathering.asked += 1;
        let missing = gathering.missing().collect();
        self.pending.send(Target::One(to), PeerMessage::FetchViewChanges(missing));
    }

    /// Somebody lacks view changes that a new view names.
    pub(super) fn on_fetch_view_changes(&mut self, now: Timestamp, from: ServerId, digests: &[Hash]) {
        let asker = (from, self.asked_under);
        if !self.budgets.allows(now, asker, Question::ViewChange) {
            return;
        }
        let began = self.changing.began.iter().flat_map(|began| &began.changes);
        let gathered = self.changing.shown.gathering.iter().flat_map(|gathering| gathering.have.values());
        let held = began.chain(gathered).chain(self.changing.view_changes.values());
        let held: BTreeMap<_, _> = held.map(|change| (change.digest(), change.clone())).collect();
        for change in digests.iter().filter_map(|digest| held.get(digest)) {
            if !self.budgets.allows(now, asker, Question::ViewChange) {
                return;
            }
            let bytes = self.bytes_of_view_change(change.body());
            self.budgets.spend(now, asker, Question::ViewChange, bytes);
            let message = PeerMessage::FetchedViewChange(Arc::clone(change.evidence()));
            self.pending.send(Target::One(from), message);
        }
    }

    /// A view change, from its author or fetched: it may be one that a new view lacks.
    pub(super) fn take_view_change(&mut self, now: Timestamp, change: &CheckedViewChange) {
        let Some(gathering) = &mut self.changing.shown.gathering else { return };
        if gathering.missing().any(|digest| digest == change.digest()) {
            gathering.have.insert(change.digest(), change.clone());
            gathering.advanced = now;
            self.try_to_begin(now);
        }
    }

    /// Begins the view if nothing is missing; says whether there is nothing left to ask for.
    fn try_to_begin(&mut self, now: Timestamp) -> bool {
        let whole = |gathering: &mut Gathering| gathering.missing().next().is_none();
        let Some(gathering) = self.changing.shown.gathering.take_if(whole) else { return false };
        let Gathering { from, new_view, have, .. } = gathering;
        let named = &new_view.body().view_changes;
        let changes: Vec<_> = named.iter().filter_map(|(_, digest)| have.get(digest).cloned()).collect();
        // Of this view, made in this epoch, by those whose they are said to be: or its author lies.
        if !new_view.body().is_shown_by(&changes, self.state.began()) {
            let (server, view) = (new_view.server(), new_view.body().view);
            self.pending.accuse(Accusation::BadNewView { server, view });
            self.changing.shown.by.remove(&from);
        } else if self.may_begin(new_view.body().view) {
            self.enter(now, Beginning::new(new_view, changes));
        }
        true
    }

    /// Takes part in a view from now on.
    pub(super) fn enter(&mut self, now: Timestamp, beginning: Beginning) {
        let view = beginning.body().view;
        self.pending.write(Write::View { view, began: Some(beginning.stored()) });
        self.install(beginning);
        self.changing.since = now;
        self.entered = now;
        self.publish();
    }

    /// Sets the view that a new-view message begins; also at a restart in the middle of it.
    pub(super) fn install(&mut self, mut beginning: Beginning) {
        let null = self.null_batch().digest();
        // What a view of an epoch that is over called for is decided, or void.
        let current = self.state.attempt();
        let over = beginning.body().attempt < current && beginning.enter_epoch(current);
        let plan = Plan::of(null, beginning.changes.iter().map(CheckedViewChange::body));
        let (low, slots) = (plan.low, plan.slots);
        self.note_certified(plan.stable.map_or(Sequence(0), |certificate| certificate.statement.sequence));
        self.view = beginning.body().view;
        self.changing.active = true;
        self.changing.low = if over { self.state.began() } else { low };
        self.changing.expected = slots;
        self.changing.carried.clear();
        self.changing.began = Some(beginning);
        self.changing.shown = Shown::default();
        self.changing.suspicions.clear();
        self.conduct.begin(self.now);
        self.changing.wanted.clear();
        self.changing.later_view_seen = false;
        // Votes count in their view only; what was prepared or committed stays known.
        for (_, entry) in self.log.range_mut(self.certified().next()..) {
            entry.leave_view();
        }
        self.pool.requeue();
    }

    /// How the current view began, for one that missed it.
    pub(super) fn show_new_view(&mut self, now: Timestamp, peer: ServerId, asker: super::budget::Asker) {
        let Some(new_view) = self.changing.began.as_ref().map(|began| began.new_view.clone()) else { return };
        let bytes = 128 + 48 * new_view.body().view_changes.len();
        self.budgets.spend(now, asker, Question::NewView, bytes);
        self.send_new_view(Target::One(peer), &new_view);
    }

    pub(super) fn send_new_view(&mut self, target: Target, new_view: &Verified<NewView>) {
        let (signed, key) = new_view.stored();
        self.pending.send(target, PeerMessage::NewView(Box::new(signed), key));
    }

    /// A proposal for a place that the new view has fixed: only that batch will do.
    pub(super) fn fits_plan(&mut self, sequence: Sequence, digest: Hash) -> bool {
        match self.changing.expected(sequence) {
            // Certified before the view began: who lacks it fetches it, with its proof.
            _ if sequence <= self.changing.low => false,
            Some(expected) if expected != digest => {
                let why = "the view changes that began this view call for another batch";
                let server = self.primary();
                self.pending.accuse(Accusation::BadProposal { server, sequence, why });
                false
            }
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests;

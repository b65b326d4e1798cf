//! A mobile adversary (Ostrovsky & Yung, 1991; design §7). In every epoch she is in as many servers as may be corrupt,
//! k−1 and not more than f, and then in others. From where she is she takes every voting key, and has certified
//! whatever the signer there will certify; she never loses one. With all of them, for ever after, she says what would
//! hurt most: in the servers' own names, as if she had their links too, and nested in what those say in which she is.
//!
//! Who is in a server when an attempt at the next epoch begins is in it for that epoch too. So she either leaves
//! before, or stays and chooses nobody else.

use crate::cluster::Simulation;
use quorum::answer::Proved;
use quorum::bytes::Hash;
use quorum::certificate::{Checkpoint, Held, QuorumProof};
use quorum::codec::digest;
use quorum::ids::{AttemptId, Epoch, Sequence, ServerId, View};
use quorum::message::{
    Batch, Commit, NewView, PeerMessage, PrePrepare, Prepare, Slot, Status, Suspect, ViewChange, Witness,
};
use quorum::ordering::Part;
use quorum::signer::Ask;
use quorum::signing::{KeyCertificate, KeyPurpose, Signed, SigningKey, Statement, Voter};
use quorum::state::layout;
use rand::RngExt as _;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Keys that she remembers of one server; the newest, since older ones are worth no more.
const KEPT: usize = 12;

#[derive(Default)]
pub struct Thief {
    /// Where she is, and since which epoch.
    inside: BTreeSet<ServerId>,
    since: Option<Epoch>,
    /// Whether she has to choose where to go in that epoch.
    chooses: bool,
    /// Whether she stays while the next epoch is agreed on.
    stays: bool,
    /// Where she ever was: what these seem to have said proves nothing against them.
    visited: BTreeSet<ServerId>,
    keys: BTreeMap<ServerId, Vec<Voter>>,
    /// What signers were asked to certify.
    asked: BTreeSet<(ServerId, AttemptId, AttemptId)>,
    /// What she said with keys of epochs that are over, and with others.
    pub old: usize,
    pub fresh: usize,
}

impl Thief {
    /// Whether somebody else may have spoken in a server's name.
    pub fn may_have_spoken_as(&self, server: ServerId) -> bool {
        self.visited.contains(&server)
    }

    /// Servers that she has keys of for one attempt, at most.
    fn most_of_one_attempt(&self) -> usize {
        let mut of: BTreeMap<AttemptId, BTreeSet<ServerId>> = BTreeMap::new();
        for voter in self.keys.values().flatten() {
            of.entry(voter.attempt()).or_default().insert(voter.server());
        }
        of.values().map(BTreeSet::len).max().unwrap_or_default()
    }

    fn learn(&mut self, voter: &Voter) {
        let known = self.keys.entry(voter.server()).or_default();
        if known.iter().all(|known| known.certificate() != voter.certificate()) {
            known.push(voter.clone());
            known.sort_by_key(|voter| (voter.attempt(), voter.certificate().statement.serial));
            known.drain(..known.len().saturating_sub(KEPT));
        }
    }
}

/// A statement with whatever votes she can give it.
fn proof<T: Statement + Copy>(statement: T, hands: &[Voter]) -> QuorumProof<T> {
    let votes = hands.iter().map(|voter| voter.sign(statement).vote());
    let (votes, keys) = votes.unzip();
    QuorumProof { statement, votes, keys }
}
fn signed<T: Statement + Clone>(voter: &Voter, body: T) -> Signed<T> {
    voter.sign(body).signed().clone()
}

impl Simulation {
    /// How many servers may be corrupt in one epoch, for secrets and for order.
    fn most_visited(&self) -> usize {
        let thresholds = self.manifest.thresholds;
        (thresholds.k() - 1).min(thresholds.f())
    }

    /// Nothing is certified ahead, and no key outlives its attempt: she never has more voters of one epoch than there
    /// may be liars.
    pub(crate) fn check_thief(&self) {
        let (got, most) = (self.thief.most_of_one_attempt(), self.most_visited());
        assert!(got <= most, "seed {}: she votes for {got} servers in one epoch", self.seed);
    }

    /// At a server's tick.
    pub(crate) fn thief_acts(&mut self, id: ServerId) {
        if !self.faults.mobile {
            return;
        }
        self.thief_moves();
        if self.thief.inside.contains(&id) {
            self.thief_takes_keys(id);
        }
        let visited: Vec<_> = self.thief.visited.iter().copied().collect();
        let Some(mouth) = visited.choose(&mut self.rng).copied().filter(|_| !self.thief.keys.is_empty())
        else {
            return;
        };
        if self.rng.random_bool(0.3) {
            for (from, key, message) in self.thief_lies(mouth) {
                let to: Vec<_> = self.manifest.grid().servers().filter(|to| *to != from).collect();
                let to: Vec<_> = to.into_iter().filter(|_| self.rng.random_bool(0.6)).collect();
                for to in to {
                    // Whoever dials says which key is used.
                    self.send_lies(from, vec![(to, 0, PeerMessage::Keys(key)), (to, 50, message.clone())]);
                }
            }
        }
    }

    fn thief_moves(&mut self) {
        let states = || self.servers.iter().filter_map(|server| Some(server.replica.as_ref()?.state()));
        let Some(epoch) =
            states().map(|state| state.epoch()).max().filter(|of| Some(*of) >= self.thief.since)
        else {
            return;
        };
        let under_way = states().any(|state| layout::attempt_under_way(state.map()).is_some());
        if under_way && !self.thief.stays {
            self.thief.inside.clear();
        } else if !under_way && self.thief.since != Some(epoch) {
            let stayed = self.thief.stays && !self.thief.inside.is_empty();
            self.thief.since = Some(epoch);
            self.thief.stays = self.rng.random_bool(0.4);
            if !stayed {
                self.thief.inside.clear();
            }
            self.thief.chooses = !stayed;
        }
        // Whoever is behind, or has a signer that does not know yet, has keys of the last epoch, and would count in that
        // too.
        // And a server that is being recovered counts as one of those that may be corrupt (design §2): she may have made
        // it believe that it forgot something.
        let recovers = |id: &ServerId| {
            let replica = self.servers[id.index()].replica.as_ref();
            replica.is_some_and(|replica| replica.status().part == Part::Recovering)
        };
        let recovering = self.manifest.grid().servers().filter(recovers).count();
        let most = self.most_visited().saturating_sub(recovering);
        if !under_way && self.thief.chooses && most > 0 {
            let there = |id: &ServerId| {
                let replica = self.servers[id.index()].replica.as_ref();
                let told = self.signers[id].counter().begun.epoch;
                replica.is_some_and(|replica| replica.state().epoch() == epoch && told == epoch)
            };
            // Where she was least often, so that she soon was everywhere.
            let mut servers: Vec<_> = self.manifest.grid().servers().filter(there).collect();
            servers.shuffle(&mut self.rng);
            servers.sort_by_key(|server| self.thief.keys.get(server).map_or(0, Vec::len));
            self.thief.chooses = servers.is_empty();
            self.thief.inside = servers.into_iter().take(most).collect();
            self.thief.visited.extend(self.thief.inside.iter().copied());
        }
    }

    /// Everything that is in a server's memory, and everything that its signer gives.
    fn thief_takes_keys(&mut self, id: ServerId) {
        let Some(replica) = &self.servers[id.index()].replica else { return };
        let current = replica.state().attempt();
        if Some(current.epoch) < self.thief.since {
            // It has started again, and has not caught up.
            return;
        }
        let own = self.voter(id);
        let drawn = self.drawn.get(&id).into_iter().flatten().filter(|voter| voter.attempt() >= current);
        let found: Vec<_> = drawn.cloned().chain([own]).collect();
        found.iter().for_each(|voter| self.thief.learn(voter));

        let evidence = replica.certificate().map(|certificate| certificate.as_ref().clone());
        let published = self.servers[id.index()].published.as_ref();
        let published =
            published.filter(|published| Some(published.certificate.as_ref()) == evidence.as_ref());
        let coming = published.map(|published| Proved::look_up(&published.snapshot, layout::EPOCHS));
        let (next, later) = (current.epoch.next(), current.epoch.next().next());
        let of = |epoch, attempt| AttemptId { epoch, attempt };
        let wanted = [of(next, 0), of(next, 1), of(next, 2), of(later, 0), of(later, 1)];
        for attempt in wanted.into_iter().chain(current.epoch.0.checked_sub(1).map(|e| of(Epoch(e), 1))) {
            if !self.thief.asked.insert((id, current, attempt)) {
                continue;
            }
            let key = SigningKey::generate(&mut self.rng);
            let (keys, changes) = (vec![(KeyPurpose::Voting, key.public())], vec![]);
            let (evidence, coming) = (evidence.clone(), coming.clone());
            let signer = self.signers.get_mut(&id).expect("every server has one");
            let coming = coming.filter(|_| evidence.is_some());
            let number = signer.counter().voting + 1;
            let ask = Ask { keys, number, attempt, evidence, coming, changes };
            if let Ok((_, certified)) = signer.certify(&ask)
                && let Some(voter) = Voter::new(self.cluster, key, certified[0])
            {
                self.thief.learn(&voter);
            }
        }
    }

    /// One key of every server that she was ever in: of this attempt where she has one.
    fn hands(&mut self, attempt: AttemptId) -> Vec<Voter> {
        let (thief, rng) = (&self.thief, &mut self.rng);
        let of_server = thief.keys.values().filter_map(|keys| {
            let fits: Vec<_> = keys.iter().filter(|voter| voter.attempt() == attempt).collect();
            fits.choose(rng).copied().or_else(|| keys.choose(rng)).cloned()
        });
        of_server.collect()
    }

    /// In whose name, with which key, what.
    fn thief_lies(&mut self, id: ServerId) -> Vec<(ServerId, KeyCertificate, PeerMessage)> {
        let Some(replica) = &self.servers[id.index()].replica else { return vec![] };
        let (status, current, began) = (replica.status(), replica.state().attempt(), replica.state().began());
        let any: Vec<_> = self.thief.keys.values().flatten().map(Voter::attempt).collect();
        let claimed = if self.rng.random_bool(0.5) { current } else { *any.choose(&mut self.rng).unwrap() };
        let hands = self.hands(claimed);
        let n = self.voters.len();

        // A batch that nobody asked for, of a time far ahead or close by, at the next places or beyond all bounds.
        let ahead_ms = *[1, 700, 100_000_000].choose(&mut self.rng).expect("some");
        let batch = Batch { time: self.now.plus_ms(ahead_ms), requests: vec![] };
        let view = View(status.view.0 + self.rng.random_range(0..3));
        let place = match self.rng.random_range(0..12) {
            0 => Sequence(u64::MAX - 1),
            1 => Sequence(status.executed.0 + 200),
            ahead => Sequence(status.executed.0 + 1 + ahead % 3),
        };
        let slot =
            |view| Slot { view, sequence: place, digest: digest(&self.cluster, &batch), attempt: claimed };
        let before = slot(View(view.0.saturating_sub(1)));
        let slot = slot(view);
        let shared = Arc::new(batch.clone());
        let prepared = || proof(Prepare(before), &hands);
        let change = |voter: &Voter| {
            let (view, attempt) = (view, claimed);
            voter.sign(ViewChange::new(view, (attempt, began), None, [prepared()].iter())).stored()
        };
        let by_all = |say: &dyn Fn(&Voter) -> PeerMessage| -> Vec<(ServerId, KeyCertificate, PeerMessage)> {
            hands.iter().map(|voter| (voter.server(), *voter.certificate(), say(voter))).collect()
        };
        let from_inside = |key: KeyCertificate, message| vec![(id, key, message)];
        let own = *self.voter(id).certificate();
        let lies = match self.rng.random_range(0..9) {
            0 => {
                let proposer = view.primary(n);
                let proposed = hands.iter().filter(|voter| voter.server() == proposer).map(|voter| {
                    let proposal = signed(voter, PrePrepare(slot));
                    (proposer, *voter.certificate(), PeerMessage::PrePrepare(proposal, shared.clone()))
                });
                let prepares = by_all(&|voter| PeerMessage::Prepare(signed(voter, Prepare(slot))));
                let commits = by_all(&|voter| PeerMessage::Commit(signed(voter, Commit(slot))));
                proposed.chain(prepares).chain(commits).collect()
            }
            1 => from_inside(own, PeerMessage::Committed(proof(Commit(slot), &hands), shared)),
            kind @ (2 | 3) => {
                let AttemptId { epoch, attempt } = claimed;
                let (root, time) = (Hash([id.0; 32]), self.now);
                let forged = proof(Checkpoint { sequence: place, root, time, epoch, attempt }, &hands);
                let message =
                    if kind == 2 { PeerMessage::Certificate(forged) } else { PeerMessage::Offer(forged) };
                from_inside(own, message)
            }
            4 => by_all(&|voter| PeerMessage::ViewChange(change(voter).0)),
            5 => {
                let Some(primary) = hands.iter().find(|voter| voter.server() == view.primary(n)) else {
                    return vec![];
                };
                let changes: Vec<_> = hands.iter().map(change).collect();
                let named = changes.iter().map(|(change, _)| (change.server, digest(&self.cluster, change)));
                let view_changes = named.collect();
                let new_view = signed(primary, NewView { view, attempt: claimed, view_changes });
                let new_view = PeerMessage::NewView(Box::new(new_view), *primary.certificate());
                let shown =
                    changes.into_iter().map(|change| PeerMessage::FetchedViewChange(Arc::new(change)));
                [new_view].into_iter().chain(shown).map(|message| (id, own, message)).collect()
            }
            6 => by_all(&|voter| {
                let (executed, certified, wants_state) = (Sequence(0), Sequence(0), true);
                let (changes, attempt) = (0, claimed);
                let active = true;
                let status = Status { view, active, executed, certified, wants_state, changes, attempt };
                PeerMessage::Status(signed(voter, status))
            }),
            7 => {
                let view = status.view;
                by_all(&|voter| PeerMessage::Suspect(signed(voter, Suspect { view, attempt: claimed })))
            }
            _ => {
                by_all(&|voter| PeerMessage::Held(signed(voter, Held { sequence: place, attempt: claimed })))
            }
        };
        let old = lies.iter().filter(|(_, key, _)| key.statement.attempt_id() < current).count();
        self.thief.old += old;
        self.thief.fresh += lies.len() - old;
        lies
    }

    /// What leaves a server in which she is: its proposals differ from one receiver to the other, she votes for all
    /// that is proposed, and whoever asks what it signed before is shown what it never signed (PBFT-PR §4.3.2).
    pub(crate) fn thief_changes(
        &mut self,
        from: ServerId,
        to: ServerId,
        message: &PeerMessage,
    ) -> Vec<PeerMessage> {
        if !self.thief.inside.contains(&from) {
            return vec![];
        }
        let own = self.voter(from);
        match message {
            PeerMessage::PrePrepare(proposal, batch) if self.rng.random_bool(0.3) => {
                let mut batch = batch.as_ref().clone();
                batch.time = batch.time.plus_ms(1);
                let slot = Slot { digest: digest(&self.cluster, &batch), ..proposal.body.0 };
                let proposal = signed(&own, PrePrepare(slot));
                let votes = self.hands(slot.attempt).into_iter().flat_map(|voter| {
                    let prepare = PeerMessage::Prepare(signed(&voter, Prepare(slot)));
                    let commit = PeerMessage::Commit(signed(&voter, Commit(slot)));
                    [(voter.server(), prepare), (voter.server(), commit)]
                });
                let votes: Vec<_> = votes.collect();
                for (as_server, vote) in votes {
                    if as_server != to {
                        self.send_lies(as_server, vec![(to, 30, vote)]);
                    }
                }
                vec![PeerMessage::PrePrepare(proposal, batch.into())]
            }
            PeerMessage::Witness(witness) => {
                let stolen: Vec<_> = self.thief.keys.get(&to).into_iter().flatten().cloned().collect();
                let Some(stolen) = stolen.choose(&mut self.rng) else { return vec![] };
                let slot = Slot {
                    view: View(u64::MAX / 2),
                    sequence: Sequence(u64::MAX - 1),
                    digest: Hash([7; 32]),
                    attempt: stolen.attempt(),
                };
                let (view, attempt) = (View(u64::MAX / 2), stolen.attempt());
                let change = ViewChange::new(view, (attempt, Sequence(0)), None, [].iter());
                vec![PeerMessage::Witness(Box::new(Witness {
                    prepares: vec![stolen.sign(Prepare(slot)).stored()],
                    commits: vec![stolen.sign(Commit(slot)).stored()],
                    view_change: Some(Arc::new(stolen.sign(change).stored())),
                    ..witness.as_ref().clone()
                }))]
            }
            _ => vec![],
        }
    }
}

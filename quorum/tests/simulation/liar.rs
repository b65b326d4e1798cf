//! Byzantine replicas: real ones, whose messages are dropped, delayed, changed, forged and repeated
//! on their way out, each liar with habits of its own. All liars of a cluster conspire: what one
//! knows, all know.

use quorum::bytes::{Blob, Hash, SecretBytes};
use quorum::certificate::{Certificate, Checkpoint, Held, QuorumProof};
use quorum::codec::{decode, digest, encode};
use quorum::ids::{AttemptId, ClusterId, Sequence, ServerId, Timestamp, View};
use quorum::map::PartItem;
use quorum::message::{
    Batch, Commit, Evidence, NewView, PeerMessage, PrePrepare, Prepare, Slot, Status, Suspect, ViewChange,
};
use quorum::signing::{KeyCertificate, Signed, Statement, Vote, Voter};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngExt as _};
use std::collections::BTreeMap;

/// What one liar likes to do; probabilities of doing it to one message for one receiver.
pub struct Habits {
    /// Says nothing at all from then on.
    mute_from: Option<Timestamp>,
    /// Never talks to these.
    deaf_to: Vec<ServerId>,
    /// Holds everything back for so long, in milliseconds.
    delay_ms: u64,
    /// Says something else than the protocol wants: other batches, votes, roots, times.
    twist: f64,
    /// Repeats something that a liar said or heard before.
    replay: f64,
    /// Says in view changes that nothing was prepared.
    hides: bool,
    /// Suspects whoever is primary, and wants views of its own.
    unrest: f64,
    /// As primary, leaves out what these clients' numbers, modulo 3, select.
    censors: Option<u64>,
}

impl Habits {
    fn draw(rng: &mut StdRng, n: usize, start: Timestamp) -> Self {
        let some = |rng: &mut StdRng, p: f64, most: f64| {
            if rng.random_bool(p) { rng.random_range(0.0..most) } else { 0.0 }
        };
        Self {
            mute_from: rng.random_bool(0.15).then(|| start.plus_ms(rng.random_range(0..9_000))),
            deaf_to: match rng.random_bool(0.3) {
                true => (0..n).map(|i| ServerId(i as u8)).filter(|_| rng.random_bool(0.4)).collect(),
                false => vec![],
            },
            delay_ms: if rng.random_bool(0.2) { rng.random_range(100..1_900) } else { 0 },
            twist: some(rng, 0.8, 0.6),
            replay: some(rng, 0.5, 0.3),
            hides: rng.random_bool(0.5),
            unrest: some(rng, 0.4, 0.3),
            censors: rng.random_bool(0.3).then(|| rng.random_range(0..3)),
        }
    }
}

/// What all liars know.
#[derive(Default)]
pub struct Conspiracy {
    /// Batches that were proposed at each place, to vote for any of them.
    proposed: BTreeMap<(View, Sequence), Vec<Hash>>,
    batches: BTreeMap<Hash, Batch>,
    heard: Vec<PeerMessage>,
    certificates: Vec<Certificate>,
    view_changes: BTreeMap<View, BTreeMap<ServerId, Vec<Evidence<ViewChange>>>>,
    highest_view: View,
    /// Where the epoch began.
    began: Sequence,
}

/// Messages that a conspiracy remembers.
const MEMORY: usize = 400;

impl Conspiracy {
    /// Something reached a liar, or was said by one.
    pub fn hear(&mut self, message: &PeerMessage, key: &KeyCertificate) {
        match message {
            PeerMessage::PrePrepare(proposal, batch) => {
                let slot = proposal.body.0;
                self.note(slot);
                self.batches.insert(slot.digest, batch.as_ref().clone());
            }
            PeerMessage::Prepare(Signed { body: Prepare(slot), .. })
            | PeerMessage::Commit(Signed { body: Commit(slot), .. }) => self.note(*slot),
            PeerMessage::Certificate(certificate) => self.certificates.push(certificate.clone()),
            PeerMessage::ViewChange(change) => {
                self.highest_view = self.highest_view.max(change.body.view);
                self.began = self.began.max(change.body.began);
                if let Some(stable) = &change.body.stable {
                    self.certificates.push(stable.clone());
                }
                let of =
                    self.view_changes.entry(change.body.view).or_default().entry(change.server).or_default();
                if of.len() < 3 {
                    of.push((change.clone(), *key));
                }
            }
            _ => {}
        }
        if self.heard.len() < MEMORY {
            self.heard.push(message.clone());
        } else {
            let at = self.heard.len() * (self.certificates.len() % 7) / 7;
            self.heard[at] = message.clone();
        }
        if self.certificates.len() > 50 {
            self.certificates.remove(25);
        }
    }
    fn note(&mut self, slot: Slot) {
        self.highest_view = self.highest_view.max(slot.view);
        let digests = self.proposed.entry((slot.view, slot.sequence)).or_default();
        if !digests.contains(&slot.digest) && digests.len() < 4 {
            digests.push(slot.digest);
        }
        while self.proposed.len() > 200 {
            self.proposed.pop_first();
        }
        while self.batches.len() > 200 {
            self.batches.pop_first();
        }
    }
}

/// One Byzantine replica's way out.
pub struct Liar {
    rng: StdRng,
    cluster: ClusterId,
    voter: Voter,
    n: usize,
    quorum: usize,
    habits: Habits,
}

/// A message on its way: to whom, after how many milliseconds, what.
pub type Sent = (ServerId, u64, PeerMessage);

impl Liar {
    pub fn new(
        mut rng: StdRng,
        cluster: ClusterId,
        voter: Voter,
        n: usize,
        quorum: usize,
        start: Timestamp,
    ) -> Self {
        let habits = Habits::draw(&mut rng, n, start);
        Self { rng, cluster, voter, n, quorum, habits }
    }

    /// Goes with the epochs.
    pub fn vote_with(&mut self, voter: Voter) {
        self.voter = voter;
    }

    /// Gives up every habit but being late.
    pub fn only_delay(&mut self, delay_ms: u64) {
        self.habits = Habits {
            mute_from: None,
            deaf_to: vec![],
            delay_ms,
            twist: 0.0,
            replay: 0.0,
            hides: false,
            unrest: 0.0,
            censors: None,
        };
    }

    fn others(&self) -> Vec<ServerId> {
        (0..self.n).map(|i| ServerId(i as u8)).filter(|id| *id != self.voter.server()).collect()
    }

    /// What becomes of an honest message.
    pub fn say(
        &mut self,
        now: Timestamp,
        to: &[ServerId],
        honest: &PeerMessage,
        all: &mut Conspiracy,
    ) -> Vec<Sent> {
        all.hear(honest, self.voter.certificate());
        if self.habits.mute_from.is_some_and(|from| now >= from) {
            return vec![];
        }
        let mut sent = Vec::new();
        for to in to {
            if self.habits.deaf_to.contains(to) {
                continue;
            }
            let mut message = self.usual(honest);
            if self.rng.random_bool(self.habits.twist)
                && let Some(twisted) = self.twist(&message, all)
            {
                all.hear(&twisted, self.voter.certificate());
                message = twisted;
            }
            sent.push((*to, self.habits.delay_ms, message));
            if self.rng.random_bool(self.habits.replay)
                && let Some(old) = all.heard.choose(&mut self.rng)
            {
                sent.push((*to, self.habits.delay_ms, old.clone()));
            }
        }
        sent
    }

    /// Something that no honest replica says, out of the blue.
    pub fn tick(&mut self, now: Timestamp, all: &mut Conspiracy) -> Vec<Sent> {
        if self.habits.mute_from.is_some_and(|from| now >= from) || !self.rng.random_bool(self.habits.unrest)
        {
            return vec![];
        }
        let view = View(all.highest_view.0 + self.rng.random_range(0..3));
        let message = match self.rng.random_range(0..5) {
            0 => PeerMessage::Suspect(self.sign(Suspect { view: all.highest_view, attempt: self.attempt() })),
            1 => {
                let stable = all.certificates.choose(&mut self.rng).cloned();
                let (attempt, began) = (self.attempt(), all.began);
                PeerMessage::ViewChange(self.sign(ViewChange {
                    view,
                    attempt,
                    began,
                    stable,
                    prepared: vec![],
                    keys: vec![],
                }))
            }
            2 => match self.new_view(view, all) {
                Some(message) => message,
                None => return vec![],
            },
            3 => PeerMessage::AskWitness(self.rng.next_u64()),
            _ => {
                let Some(certificate) = all.certificates.choose(&mut self.rng) else { return vec![] };
                let mut forged = certificate.clone();
                match self.rng.random_range(0..4) {
                    0 => {}
                    1 => forged.statement.root.0[0] ^= 1,
                    2 => forged.statement.sequence = Sequence(forged.statement.sequence.0 + 1),
                    _ => forged.votes.truncate(self.quorum - 1),
                }
                match self.rng.random_bool(0.5) {
                    true => PeerMessage::Certificate(forged),
                    false => PeerMessage::Offer(forged),
                }
            }
        };
        all.hear(&message, self.voter.certificate());
        let to = self.others();
        to.into_iter().filter(|_| self.rng.random_bool(0.7)).map(|to| (to, 0, message.clone())).collect()
    }

    fn attempt(&self) -> AttemptId {
        self.voter.attempt()
    }
    fn sign<T: Statement + Clone>(&self, body: T) -> Signed<T> {
        self.voter.sign(body).signed().clone()
    }

    /// A beginning of a view that it is the primary of, from any q view changes that fit; or from what nobody has
    /// said, or others than those it says.
    fn new_view(&mut self, view: View, all: &Conspiracy) -> Option<PeerMessage> {
        let known = all.view_changes.get(&view).filter(|_| view.primary(self.n) == self.voter.server())?;
        let mut view_changes: Vec<_> = known
            .iter()
            .filter_map(|(server, of)| Some((*server, digest(&self.cluster, &of.choose(&mut self.rng)?.0))))
            .collect();
        while view_changes.len() > self.quorum {
            let out = self.rng.random_range(0..view_changes.len());
            view_changes.remove(out);
        }
        let last = view_changes.len().checked_sub(1)?;
        match self.rng.random_range(0..8) {
            0 => view_changes[last].1 = Hash([7; 32]),
            1 => view_changes[last].1 = view_changes[0].1,
            2 => {
                let other = all.view_changes.values().next()?.values().next()?.choose(&mut self.rng)?;
                view_changes[last] = (other.0.server, digest(&self.cluster, &other.0));
            }
            _ => {}
        }
        let new_view = self.sign(NewView { view, attempt: self.attempt(), view_changes });
        Some(PeerMessage::NewView(Box::new(new_view), *self.voter.certificate()))
    }

    /// Lies that it tells to everyone alike.
    fn usual(&self, honest: &PeerMessage) -> PeerMessage {
        match honest {
            PeerMessage::ViewChange(change) if self.habits.hides => {
                PeerMessage::ViewChange(self.sign(ViewChange {
                    stable: None,
                    prepared: vec![],
                    keys: vec![],
                    ..change.body.clone()
                }))
            }
            PeerMessage::PrePrepare(proposal, batch) => match self.habits.censors {
                Some(hated) => {
                    let mut batch = batch.as_ref().clone();
                    batch.requests.retain(|request| request.request.sequence % 3 != hated);
                    self.propose(proposal.body.0, batch)
                }
                None => honest.clone(),
            },
            _ => honest.clone(),
        }
    }

    fn propose(&self, slot: Slot, batch: Batch) -> PeerMessage {
        let digest = quorum::codec::digest(&self.cluster, &batch);
        PeerMessage::PrePrepare(self.sign(PrePrepare(Slot { digest, ..slot })), batch.into())
    }

    /// Another batch's digest at this place, if there is one, or one of nothing.
    fn other(&mut self, slot: Slot, all: &Conspiracy) -> Slot {
        let known = all.proposed.get(&(slot.view, slot.sequence)).into_iter().flatten();
        let others: Vec<_> = known.filter(|digest| **digest != slot.digest).copied().collect();
        let mut digest = others.choose(&mut self.rng).copied().unwrap_or(Hash([9; 32]));
        if self.rng.random_bool(0.05) {
            digest.0[0] ^= 1;
        }
        Slot { digest, ..slot }
    }

    /// The same kind of message with another content.
    fn twist(&mut self, honest: &PeerMessage, all: &mut Conspiracy) -> Option<PeerMessage> {
        Some(match honest {
            PeerMessage::PrePrepare(proposal, batch) => {
                let mut batch = batch.as_ref().clone();
                match self.rng.random_range(0..6) {
                    0 => batch.time = batch.time.plus_ms(1),
                    1 => batch.time = batch.time.plus_ms(5_000),
                    2 => batch.time = Timestamp(batch.time.0.saturating_sub(2_000)),
                    3 => {
                        batch.requests.pop();
                    }
                    4 => batch.requests.reverse(),
                    _ => batch.requests.clear(),
                }
                self.propose(proposal.body.0, batch)
            }
            PeerMessage::Prepare(vote) => {
                let slot = self.other(vote.body.0, all);
                PeerMessage::Prepare(self.sign(Prepare(slot)))
            }
            PeerMessage::Commit(vote) => {
                let slot = self.other(vote.body.0, all);
                PeerMessage::Commit(self.sign(Commit(slot)))
            }
            PeerMessage::Checkpoint(vote) => {
                let mut root = vote.body.root;
                root.0[0] ^= self.rng.random_range(1..3);
                PeerMessage::Checkpoint(self.sign(Checkpoint { root, ..vote.body }))
            }
            PeerMessage::Held(held) => {
                let sequence = Sequence(held.body.sequence.0 + self.rng.random_range(1..40));
                PeerMessage::Held(self.sign(Held { sequence, ..held.body }))
            }
            PeerMessage::Status(status) => {
                let executed = Sequence(self.rng.random_range(0..=status.body.executed.0));
                let wants_state = self.rng.random_bool(0.5);
                PeerMessage::Status(self.sign(Status { executed, wants_state, ..status.body }))
            }
            PeerMessage::ViewChange(change) => {
                let mut body = change.body.clone();
                let mut proofs = proofs(&body);
                match self.rng.random_range(0..4) {
                    0 => {
                        proofs.pop();
                    }
                    1 => body.stable = all.certificates.choose(&mut self.rng).cloned(),
                    2 => body.view = View(body.view.0 + self.rng.random_range(1..4)),
                    _ => {
                        if let Some(proof) = proofs.first_mut() {
                            proof.statement.0.digest.0[0] ^= 1;
                        }
                    }
                }
                let low = body.stable.as_ref().map_or(0, |stable| stable.statement.sequence.0);
                proofs.retain(|proof| proof.statement.0.sequence.0 > low);
                PeerMessage::ViewChange(self.sign(with_proofs(body, &proofs)))
            }
            PeerMessage::NewView(new_view, _) => self.new_view(new_view.body.view, all)?,
            PeerMessage::FetchViewChanges(digests) => {
                let mut digests = digests.clone();
                digests.push(Hash([7; 32]));
                PeerMessage::FetchViewChanges(digests)
            }
            // Another one than was asked for, or one that was changed.
            PeerMessage::FetchedViewChange(_) => {
                let of_view = all.view_changes.values().nth_back(self.rng.random_range(0..2))?;
                let of = of_view.values().nth(self.rng.random_range(0..of_view.len()))?;
                let mut evidence = of.choose(&mut self.rng)?.clone();
                if self.rng.random_bool(0.5) {
                    evidence.0.body.prepared.pop();
                }
                PeerMessage::FetchedViewChange(evidence.into())
            }
            PeerMessage::Certificate(_) => {
                PeerMessage::Certificate(all.certificates.choose(&mut self.rng)?.clone())
            }
            PeerMessage::Offer(_) => PeerMessage::Offer(all.certificates.choose(&mut self.rng)?.clone()),
            PeerMessage::Committed(proof, _) => {
                let batch = all.batches.values().nth(self.rng.random_range(0..all.batches.len().max(1)))?;
                PeerMessage::Committed(proof.clone(), batch.clone().into())
            }
            PeerMessage::Fetched(_) => {
                let batch = all.batches.values().nth(self.rng.random_range(0..all.batches.len().max(1)))?;
                PeerMessage::Fetched(batch.clone().into())
            }
            PeerMessage::Witness(witness) => {
                let mut witness = witness.as_ref().clone();
                (witness.prepares, witness.commits, witness.view_change) = (vec![], vec![], None);
                PeerMessage::Witness(Box::new(witness))
            }
            PeerMessage::Parts(parts) => {
                let mut parts = parts.clone();
                if let Some(part) = parts.parts.last_mut() {
                    match part.last_mut() {
                        Some(PartItem::Leaf { value, .. }) => value.0.push(7),
                        Some(PartItem::Pruned(hash)) => hash.0[3] ^= 1,
                        _ => part.push(PartItem::Leaf { key: Blob(vec![1]), value: Blob(vec![]) }),
                    }
                }
                PeerMessage::Parts(parts)
            }
            PeerMessage::Dealing(handed) => {
                let mut handed = handed.as_ref().clone();
                match self.rng.random_range(0..3) {
                    0 => handed.dealer = *self.others().choose(&mut self.rng)?,
                    1 => handed.attempt.attempt += 1,
                    _ => {
                        let mut bytes = encode(&handed.dealing);
                        let at = self.rng.random_range(0..bytes.len());
                        bytes[at] ^= 1;
                        handed.dealing = decode(&bytes).ok()?;
                    }
                }
                PeerMessage::Dealing(Box::new(handed))
            }
            PeerMessage::Masked(masked) => {
                let mut masked = masked.clone();
                for chunk in &mut masked.chunks {
                    match self.rng.random_range(0..3) {
                        0 => chunk.filled ^= 1,
                        1 => chunk.chunk += 1,
                        _ => {
                            let wrong = SecretBytes::new(&[self.rng.random(); 32]);
                            chunk.values.iter_mut().for_each(|value| *value = wrong.clone());
                        }
                    }
                }
                PeerMessage::Masked(masked)
            }
            _ => return None,
        })
    }
}

/// What a view change shows, each proof by itself.
pub fn proofs(change: &ViewChange) -> Vec<QuorumProof<Prepare>> {
    let of = |proof: &quorum::message::Prepared| {
        let voted = proof.votes.iter().map(|vote| {
            let key = change.keys[usize::from(vote.key)];
            (Vote { server: key.statement.server, signature: vote.signature }, key)
        });
        let (votes, keys) = voted.unzip();
        QuorumProof { statement: proof.statement, votes, keys }
    };
    change.prepared.iter().map(of).collect()
}
/// The same view change with other proofs.
pub fn with_proofs(change: ViewChange, proofs: &[QuorumProof<Prepare>]) -> ViewChange {
    ViewChange::new(change.view, (change.attempt, change.began), change.stable, proofs.iter())
}

//! State transfer (PBFT §4.6, PBFT-PR §5.3): a server that fell behind the others' logs, lost its
//! disk, or holds a wrong state fetches what differs under a certificate, from several servers,
//! while they go on.
//!
//! Every replica keeps a snapshot of the first batch in every [`SNAPSHOT_INTERVAL_MS`] of agreed
//! time, so that all keep the same ones. Whoever is asked for batches that its log no longer has
//! offers the certificate of its newest snapshot. The one that is behind asks all others for parts
//! under that root; each part is checked against the hash that its parent named. When nothing is
//! missing, the state, its certificate and the new low watermark are written in one transaction, and
//! the rest follows from the others' logs. If the others have gone on too far meanwhile, it takes a
//! newer certificate and keeps what it has.

use super::budget::{Asker, Question};
use super::effects::{Accusation, Target, Write};
use super::{Boundary, Replica};
use crate::certificate::{Certificate, VoteBook};
use crate::ids::{Sequence, ServerId, ServerSet, Timestamp};
use crate::limits::{MAX_PARTS, SNAPSHOT_INTERVAL_MS, SNAPSHOTS_KEPT, TRANSFER_PATIENCE_MS, WINDOW};
use crate::map::{self, Map, PartItem, Snapshot};
use crate::message::{AskParts, Parts, PeerMessage};
use crate::sealing::ShareContext;
use crate::shares::ShareOp;
use crate::signing::Verified;
use crate::state::{Executed, State, layout};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// What this replica knows about states that it could fetch, and the one that it does fetch.
#[derive(Clone, Default)]
pub(super) struct Transferring {
    offers: Offers,
    /// Entries to build on, where they are not the executed state's: those of a damaged database.
    pub(super) base: Option<Snapshot>,
    current: Option<Transfer>,
    /// When it last executed something, or began.
    pub(super) advanced: Timestamp,
    /// The number of the last question; begins anywhere, so that answers from before do not fit.
    questions: u64,
    /// Servers that were late with their last answer, perhaps since they are down: asked only where no others can be. It
    /// goes on from one target to the next, or each would wait for them anew, and be outdated by then.
    slow: BTreeMap<ServerId, Timestamp>,
}

impl Transferring {
    pub(super) fn new(boot: u64) -> Self {
        Self { questions: boot, ..Self::default() }
    }
    /// Questions that are not answered yet.
    pub(super) fn questions(&self) -> impl Iterator<Item = (ServerId, u64)> + '_ {
        let asked = self.current.iter().flat_map(|transfer| &transfer.asked);
        asked.map(|(server, asked)| (*server, asked.question))
    }
}

/// Certified states that servers say they can give parts of: the last few of each. A certificate shows that a state is
/// true, and not that anybody else has it: so one is fetched that f+1 servers offer, of which one is correct. Correct
/// servers keep the same ones, so there is one, but for a while after a start; then each server has its turn.
#[derive(Clone, Default)]
struct Offers {
    by: BTreeMap<ServerId, VecDeque<Sequence>>,
    certificates: BTreeMap<Sequence, Certificate>,
    /// Since when there was nothing that enough servers offer.
    without: Option<Timestamp>,
    /// Whose turn was last.
    last: Option<ServerId>,
}

/// Offers of one server that are remembered.
const OFFERS_KEPT: usize = 2;
/// How long to wait for f+1 servers that offer one state.
const ALONE_AFTER_MS: u64 = 3 * TRANSFER_PATIENCE_MS;

impl Offers {
    fn add(&mut self, from: ServerId, certificate: Certificate) {
        let sequence = certificate.statement.sequence;
        let of = self.by.entry(from).or_default();
        if !of.contains(&sequence) {
            of.push_back(sequence);
            of.drain(..of.len().saturating_sub(OFFERS_KEPT));
        }
        self.certificates.entry(sequence).or_insert(certificate);
        let by = &self.by;
        self.certificates.retain(|sequence, _| by.values().any(|of| of.contains(sequence)));
    }
    /// What is not above this is of no use.
    fn forget_through(&mut self, executed: Sequence) {
        self.by.values_mut().for_each(|of| of.retain(|sequence| *sequence > executed));
        self.certificates.retain(|sequence, _| *sequence > executed);
    }
    /// The highest above `after` that so many servers offer.
    fn supported(&self, after: Sequence, needed: usize) -> Option<&Certificate> {
        let offering = |sequence: &Sequence| self.by.values().filter(|of| of.contains(sequence)).count();
        let above = self.certificates.range(after.next()..).rev();
        above.filter(|(sequence, _)| offering(sequence) >= needed).map(|(_, certificate)| certificate).next()
    }
    /// The highest that the next server offers.
    fn in_turn(&mut self, after: Sequence) -> Option<Certificate> {
        let offering = |(from, of): (&ServerId, &VecDeque<Sequence>)| {
            let highest = of.iter().filter(|sequence| **sequence > after).max();
            highest.map(|sequence| (*from, *sequence))
        };
        let following = self.by.iter().filter(|(from, _)| Some(**from) > self.last);
        let (from, sequence) = following.chain(&self.by).find_map(offering)?;
        self.last = Some(from);
        self.certificates.get(&sequence).cloned()
    }
}

#[derive(Clone)]
struct Transfer {
    certificate: Certificate,
    /// Whether f+1 servers offered it.
    supported: bool,
    sync: map::Sync,
    /// Who has been asked for what.
    asked: BTreeMap<ServerId, Asked>,
    /// Servers that do not have this state, or sent something wrong: not asked again for it.
    useless: ServerSet,
    /// When a part came in last.
    advanced: Timestamp,
    parts: u64,
}

/// A question that is not answered yet.
#[derive(Clone)]
struct Asked {
    question: u64,
    places: Vec<usize>,
    when: Timestamp,
}

/// How far a state transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferProgress {
    /// The sequence number of the state.
    pub target: Sequence,
    /// Parts received.
    pub parts: u64,
    /// Parts known to be missing; more may be found below them.
    pub missing: usize,
    /// Entries received.
    pub entries: usize,
}

impl Replica {
    /// Keeps a snapshot for others once in an interval of agreed time.
    pub(super) fn keep_snapshot(&mut self, before: Timestamp, executed: &Executed) {
        let checkpoint = executed.checkpoint;
        if before.0 / SNAPSHOT_INTERVAL_MS == checkpoint.time.0 / SNAPSHOT_INTERVAL_MS {
            return;
        }
        let votes = self.checkpoints.get(&checkpoint.sequence).cloned().unwrap_or_default();
        let boundary = Boundary { checkpoint, snapshot: executed.snapshot.clone(), votes, certificate: None };
        self.boundaries.insert(checkpoint.sequence, boundary);
        self.certify_boundary(checkpoint.sequence);
        while self.boundaries.len() > SNAPSHOTS_KEPT {
            // The last one that can be offered stays: who is needed for the next certificate may need it.
            let offered = self.offered();
            let Some(oldest) = self.boundaries.keys().find(|kept| Some(**kept) != offered).copied() else {
                break;
            };
            self.boundaries.remove(&oldest);
        }
    }

    /// Keeps the certified state for others, where there is no other one: after a start, or a transfer.
    pub(super) fn keep_certified(&mut self) {
        let (Some(certificate), Some(snapshot)) = (&self.certificate, &self.certified_snapshot) else {
            return;
        };
        let (checkpoint, snapshot) = (certificate.statement, snapshot.clone());
        let certificate = Some(certificate.as_ref().clone());
        let boundary = Boundary { checkpoint, snapshot, votes: VoteBook::default(), certificate };
        self.boundaries.insert(checkpoint.sequence, boundary);
    }

    /// The newest state that others can be offered.
    pub(super) fn offered(&self) -> Option<Sequence> {
        let certified = self.boundaries.iter().rev().find(|(_, boundary)| boundary.certificate.is_some());
        certified.map(|(sequence, _)| *sequence)
    }

    /// A vote for a snapshot's certificate, which may come after a later one is certified.
    pub(super) fn boundary_vote(&mut self, vote: &Verified<crate::certificate::Checkpoint>) {
        let sequence = vote.body().sequence;
        if let Some(boundary) = self.boundaries.get_mut(&sequence) {
            // Equivocation is noticed where votes are counted.
            let _ = boundary.votes.add(vote.clone());
            self.certify_boundary(sequence);
        }
    }

    /// The first snapshot that nobody can be offered yet.
    pub(super) fn uncertified_snapshot(&self) -> Option<Sequence> {
        let uncertified = self.boundaries.iter().find(|(_, boundary)| boundary.certificate.is_none());
        uncertified.map(|(sequence, _)| *sequence)
    }

    fn certify_boundary(&mut self, sequence: Sequence) {
        let quorum = self.quorum();
        if let Some(boundary) = self.boundaries.get_mut(&sequence)
            && boundary.certificate.is_none()
        {
            boundary.certificate = boundary.votes.proof(&boundary.checkpoint, quorum);
        }
    }

    /// Offers the newest state that this replica can give parts of.
    pub(super) fn offer_state(&mut self, to: Asker, after: Sequence) {
        if !self.budgets.allows(self.now, to, Question::Offer) {
            return;
        }
        let newest = self.offered().and_then(|offered| self.boundaries[&offered].certificate.as_ref());
        if let Some(certificate) = newest.filter(|certificate| certificate.statement.sequence > after) {
            self.pending.send(Target::One(to.0), PeerMessage::Offer(certificate.clone()));
            self.budgets.spend(self.now, to, Question::Offer, self.bytes_of_proof());
        }
    }

    pub(super) fn on_offer(&mut self, now: Timestamp, from: ServerId, certificate: Certificate) {
        let sequence = certificate.statement.sequence;
        self.note_certified(sequence);
        if sequence > self.executed() {
            self.transferring.offers.add(from, certificate);
            self.drive_transfer(now);
        }
    }

    /// What to fetch now, where that is to be something else than before, and whether f+1 servers offer it.
    fn choose_offer(&mut self, now: Timestamp) -> Option<(Certificate, bool)> {
        let impatient = |since: Timestamp| now.since_ms(since) >= TRANSFER_PATIENCE_MS;
        let (wanted, after, supported) = match &self.transferring.current {
            None => {
                let wanted = self.wants_state() || impatient(self.transferring.advanced);
                (wanted, self.executed(), false)
            }
            // Nobody gives parts of this one any more.
            Some(transfer) => {
                let statement = transfer.certificate.statement;
                (impatient(transfer.advanced), statement.sequence, transfer.supported)
            }
        };
        let needed = self.manifest.thresholds.f() + 1;
        let current = self.transferring.current.is_some();
        let offers = &mut self.transferring.offers;
        // One that enough servers have is better than one that perhaps only a liar has, be that higher or not.
        let least = if supported { after } else { self.state.sequence() };
        match offers.supported(least, needed).cloned() {
            Some(certificate) if wanted || (current && !supported) => {
                offers.without = None;
                Some((certificate, true))
            }
            Some(_) => None,
            None => {
                let since = *offers.without.get_or_insert(now);
                let alone = wanted && now.since_ms(since) >= ALONE_AFTER_MS;
                let least = if current && !supported { self.state.sequence() } else { after };
                alone.then(|| offers.in_turn(least)).flatten().map(|certificate| (certificate, false))
            }
        }
    }

    /// How far a transfer is, if there is one.
    pub(super) fn transfer_progress(&self) -> Option<TransferProgress> {
        self.transferring.current.as_ref().map(|transfer| TransferProgress {
            target: transfer.certificate.statement.sequence,
            parts: transfer.parts,
            missing: transfer.sync.missing(),
            entries: transfer.sync.fetched_entries(),
        })
    }

    /// Whether single batches are of no use: its state is wrong, or it begins with (almost) nothing.
    pub(super) fn wants_state(&self) -> bool {
        self.diverged || (!self.may_vote() && self.certified_anywhere.0 > self.executed().0 + WINDOW)
    }

    /// At every tick and answer: begins, goes on, takes a newer target, or gives up what is no
    /// longer needed.
    pub(super) fn drive_transfer(&mut self, now: Timestamp) {
        let executed = self.executed();
        self.transferring.offers.forget_through(executed);
        self.transferring.current.take_if(|transfer| transfer.certificate.statement.sequence <= executed);
        // Before another target is chosen, or nobody remembers who was late with this one.
        self.give_up_late(now);
        if let Some((offer, supported)) = self.choose_offer(now) {
            let root = offer.statement.root;
            let sync = match self.transferring.current.take() {
                Some(transfer) => transfer.sync.towards(root),
                None => {
                    let own = self.state.seal().1;
                    map::Sync::new(self.transferring.base.as_ref().unwrap_or(&own), root)
                }
            };
            self.transferring.current = Some(Transfer {
                certificate: offer,
                supported,
                sync,
                asked: BTreeMap::new(),
                useless: ServerSet::default(),
                advanced: now,
                parts: 0,
            });
        }
        self.ask_for_parts(now);
        self.finish_transfer(now);
    }

    /// Puts what nobody has answered to others.
    fn give_up_late(&mut self, now: Timestamp) {
        let Some(transfer) = &mut self.transferring.current else { return };
        let late: Vec<_> = transfer
            .asked
            .iter()
            .filter(|(_, asked)| now.since_ms(asked.when) >= TRANSFER_PATIENCE_MS)
            .map(|(server, _)| *server)
            .collect();
        for server in late {
            self.transferring.slow.insert(server, now);
            let places = transfer.asked.remove(&server).map(|asked| asked.places);
            places.into_iter().flatten().for_each(|place| transfer.sync.put_back(place));
        }
    }

    /// Asks every server that is not busy with an earlier question.
    fn ask_for_parts(&mut self, now: Timestamp) {
        let Some(transfer) = &mut self.transferring.current else { return };
        let statement = transfer.certificate.statement;
        let n = self.manifest.thresholds.n() as u64;
        // Beginning with another one each time; all of them, or the only one that has the state may be left out.
        let mut free: Vec<_> = (0..n)
            .map(|step| ServerId(((u64::from(self.id.0) + transfer.parts + step) % n) as u8))
            .filter(|peer| *peer != self.id && !transfer.useless.contains(*peer))
            .filter(|peer| !transfer.asked.contains_key(peer))
            .collect();
        let slow = &self.transferring.slow;
        let others = |peer: &ServerId| !slow.contains_key(peer) && !transfer.useless.contains(*peer);
        if self.manifest.grid().servers().filter(|peer| *peer != self.id).any(|peer| others(&peer)) {
            free.retain(|peer| !slow.contains_key(peer));
        }
        // If all were late, that one first for which it is longest ago.
        free.sort_by_key(|peer| slow.get(peer).copied());
        while !free.is_empty() && transfer.sync.unasked() > 0 {
            let peer = free.remove(0);
            let share = transfer.sync.unasked().div_ceil(free.len() + 1).min(MAX_PARTS);
            let (places, parts): (Vec<_>, Vec<_>) =
                (0..share).map_while(|_| transfer.sync.next_wanted()).unzip();
            if places.is_empty() {
                break;
            }
            self.transferring.questions = self.transferring.questions.wrapping_add(1);
            let question = self.transferring.questions;
            transfer.asked.insert(peer, Asked { question, places, when: now });
            let ask = AskParts { sequence: statement.sequence, root: statement.root, question, parts };
            self.pending.send(Target::One(peer), PeerMessage::AskParts(ask));
        }
    }

    /// Somebody fetches a state: gives what it asks for, or says which state there is.
    pub(super) fn on_ask_parts(&mut self, now: Timestamp, from: ServerId, ask: &AskParts) {
        let asker = (from, self.asked_under);
        if !self.budgets.allows(now, asker, Question::Parts) {
            return;
        }
        let kept = self.boundaries.get(&ask.sequence).filter(|kept| kept.checkpoint.root == ask.root);
        match kept {
            Some(kept) => {
                let parts = map::parts_of(&kept.snapshot, &ask.parts);
                let items = parts.iter().flatten();
                let bytes = items.map(|item| match item {
                    PartItem::Leaf { key, value } => 64 + key.len() + value.len(),
                    PartItem::Inner(_) | PartItem::Pruned(_) => 64,
                });
                self.budgets.spend(now, asker, Question::Parts, bytes.sum());
                let parts = Parts { question: ask.question, parts };
                self.pending.send(Target::One(from), PeerMessage::Parts(parts));
            }
            None => {
                let nothing = Parts { question: ask.question, parts: vec![] };
                self.pending.send(Target::One(from), PeerMessage::Parts(nothing));
                self.offer_state(asker, ask.sequence);
            }
        }
    }

    pub(super) fn on_parts(&mut self, now: Timestamp, from: ServerId, answer: Parts) {
        let Some(transfer) = &mut self.transferring.current else { return };
        // An answer that comes late is to a question that was put to somebody else since.
        let answers = |asked: &Asked| asked.question == answer.question;
        if !transfer.asked.get(&from).is_some_and(answers) {
            return;
        }
        let places = transfer.asked.remove(&from).map_or(vec![], |asked| asked.places);
        self.transferring.slow.remove(&from);
        if answer.parts.is_empty() {
            transfer.useless.insert(from);
        }
        let mut parts = answer.parts.into_iter();
        for place in places {
            match parts.next() {
                None => transfer.sync.put_back(place),
                Some(part) => match transfer.sync.take(place, part) {
                    Ok(()) => {
                        transfer.advanced = now;
                        transfer.parts += 1;
                    }
                    Err(why) => {
                        transfer.sync.put_back(place);
                        transfer.useless.insert(from);
                        self.pending.accuse(Accusation::WrongPart { server: from, why });
                    }
                },
            }
        }
        self.drive_transfer(now);
    }

    fn finish_transfer(&mut self, now: Timestamp) {
        if let Some(transfer) = self.transferring.current.take_if(|transfer| transfer.sync.missing() == 0) {
            self.install_state(now, transfer.certificate, transfer.sync.finish());
        }
    }

    /// Takes over a certified state, with everything that follows from it, in one transaction.
    fn install_state(&mut self, now: Timestamp, certificate: Certificate, map: Map) {
        let statement = certificate.statement;
        let before = self.state.seal().1;
        let unwritten = self.state.take_changes();
        let Ok(mut state) = State::restore(Arc::clone(&self.manifest), statement, map) else {
            // Correct servers vouch for the root; this program cannot read what they wrote.
            self.pending.accuse(Accusation::Unreadable { sequence: statement.sequence });
            return;
        };
        let snapshot = state.seal().1;
        // What the disk holds is `before`, less what had not been written yet.
        let mut leaves: BTreeMap<_, _> = before.changes_to(&snapshot).into_iter().collect();
        for (key, _) in unwritten {
            let value = snapshot.get(&key).cloned();
            leaves.entry(key).or_insert(value);
        }
        self.pending.write(Write::State { checkpoint: statement, leaves: leaves.into_iter().collect() });
        let certificate = Arc::new(certificate);
        self.pending.write(Write::Certified(Arc::clone(&certificate)));
        self.pending.write(Write::Trim { through: statement.sequence });

        let epoch = self.state.attempt();
        self.state = state;
        if self.state.attempt() != epoch {
            self.enter_epoch();
        }
        // If this server took part in the seal that it jumps over it has its new shares by that.
        self.resume_renewal();
        let indices = layout::secret_indices(&snapshot).collect();
        self.change_shares(ShareOp::Present { indices, epoch: statement.epoch });
        for (index, secret, sealed) in layout::sealed_shares(&snapshot) {
            let context = ShareContext::of_secret(&secret, sealed.epoch, self.id);
            self.store_share(index, &context, &sealed.shares);
        }
        self.flushed = statement.sequence;
        self.certificate = Some(certificate);
        self.certified_snapshot = Some(snapshot);
        self.note_certified(statement.sequence);
        self.own_checkpoints.clear();
        self.ahead.take_if(|ahead| ahead.statement.sequence <= statement.sequence);
        self.boundaries.clear();
        self.keep_certified();
        self.checkpoints = self.checkpoints.split_off(&statement.sequence.next());
        self.log = self.log.split_off(&statement.sequence.next());
        self.log_bytes = 0;
        self.next_sequence = self.next_sequence.max(statement.sequence.next());
        self.diverged = false;
        let Transferring { questions, slow, .. } = std::mem::take(&mut self.transferring);
        self.transferring = Transferring { advanced: now, slow, ..Transferring::new(questions) };
        let state = &self.state;
        let replied = self.pool.take_if(|id| state.reply(id).is_some());
        self.tell_clients(replied);

        self.hold(statement.sequence);
        self.update_completion();
        self.publish();
        self.recovered(now);
        self.execute_ready();
        // The rest is in the others' logs.
        self.tell_status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::tests::voters;
    use crate::ordering::view_change::tests::replica;

    /// What a late answer is about was put to another server since: taken for an answer to the newer question it
    /// would make its honest author one who sends wrong parts.
    #[test]
    fn an_answer_counts_for_its_own_question() {
        let (keyring, voters) = voters(4);
        let mut replica = replica(&voters, 0, &keyring);
        let asked = Asked { question: 6, places: vec![], when: Timestamp(1) };
        let checkpoint = crate::certificate::Checkpoint {
            sequence: Sequence(900),
            root: crate::bytes::Hash([7; 32]),
            time: Timestamp(1),
            epoch: crate::ids::Epoch(0),
            attempt: 0,
        };
        let certificate = Certificate { statement: checkpoint, votes: vec![], keys: vec![] };
        let sync = map::Sync::new(&replica.state.seal().1, checkpoint.root);
        replica.transferring.current = Some(Transfer {
            certificate,
            supported: true,
            sync,
            asked: BTreeMap::from([(ServerId(1), asked)]),
            useless: ServerSet::default(),
            advanced: Timestamp(1),
            parts: 0,
        });
        let waiting = |replica: &Replica| {
            replica.transferring.questions().filter(|(of, _)| *of == ServerId(1)).collect::<Vec<_>>()
        };
        let late = Parts { question: 5, parts: vec![vec![PartItem::Inner(0)]] };
        replica.on_parts(Timestamp(2), ServerId(1), late.clone());
        assert_eq!(waiting(&replica), [(ServerId(1), 6)], "still waits for its answer");
        replica.on_parts(Timestamp(2), ServerId(1), Parts { question: 6, ..late });
        assert_ne!(waiting(&replica), [(ServerId(1), 6)], "answered");
    }

    /// Whether a server that is far behind, on a perfect network, gets a state within two minutes. The others answer as
    /// `on_ask_parts` and `on_status` do, from a snapshot every 2.5 s; server 3 may be a liar who does nothing but offer
    /// genuine certificates, every 50 ms the newest.
    /// Or it offers one that is no snapshot's, and gives its parts, one in 0.9 s.
    fn gets_a_state(liar: bool, dribbles: bool) -> bool {
        let (keyring, voters) = voters(4);
        let cluster = *keyring.cluster();
        let mut replica = replica(&voters, 0, &keyring);
        let start = 1_000_000;
        let mut entries = Map::new(cluster);
        for leaf in 0..if dribbles { 3_000u64 } else { 40 } {
            entries
                .insert(format!("x/{leaf}").as_bytes(), vec![leaf as u8; if dribbles { 2_000 } else { 20 }]);
        }
        entries.seal();
        let state_at = |sequence: u64| {
            let mut map = entries.clone();
            map.insert(b"x/sequence", sequence.to_be_bytes().to_vec());
            map.seal()
        };
        let certificate = |sequence: u64| {
            let (root, time) = (state_at(sequence).root(), Timestamp(start + sequence * 50));
            let statement = crate::certificate::Checkpoint {
                sequence: Sequence(sequence),
                root,
                time,
                epoch: crate::ids::Epoch(0),
                attempt: 0,
            };
            Certificate { statement, votes: vec![], keys: vec![] }
        };
        // 20 batches a second; every 50th is a snapshot.
        let newest = |ms: u64| 10_000 + ms / 50;
        let kept = |ms: u64| newest(ms) / 50 * 50;
        let say = |replica: &mut Replica, ms: u64, from: u8, message: crate::message::CheckedMessage| {
            replica.handle(Timestamp(start + ms), super::super::Input::Message(ServerId(from), message));
        };
        use crate::message::CheckedMessage as Said;
        let mut dribble: Option<(u64, AskParts)> = None;
        for ms in (0..if dribbles { 15_000 } else { 120_000 }).step_by(5) {
            if let Some((_, ask)) = dribble.take_if(|(when, _)| *when <= ms) {
                let parts = map::parts_of(&state_at(ask.sequence.0), &ask.parts[..1]);
                say(&mut replica, ms, 3, Said::Parts(Parts { question: ask.question, parts }));
            }
            let offers = !dribbles || ms == 50;
            if liar && offers && ms % 50 == 0 && newest(ms) % 50 != 0 {
                say(&mut replica, ms, 3, Said::Offer(certificate(newest(ms))));
            }
            if ms % 100 == 0 {
                replica.handle(Timestamp(start + ms), super::super::Input::Tick);
            }
            let mut sent: Vec<_> = replica.drain_free();
            if let Some((writes, unsent)) = replica.drain() {
                sent.extend(unsent.release(&writes.committed()).messages);
            }
            for (to, message) in sent {
                let Target::One(to) = to else { continue };
                if liar && to == ServerId(3) {
                    if let PeerMessage::AskParts(ask) = &*message
                        && dribbles
                    {
                        dribble = Some((ms + 900, ask.clone()));
                    }
                    continue;
                }
                match &*message {
                    PeerMessage::Status(status) if status.body.executed.0 < kept(ms) => {
                        say(&mut replica, ms, to.0, Said::Offer(certificate(kept(ms))));
                    }
                    PeerMessage::AskParts(ask) => {
                        let of = ask.sequence.0;
                        let has = of % 50 == 0 && of + 300 > kept(ms) && of <= kept(ms);
                        let parts = if has { map::parts_of(&state_at(of), &ask.parts) } else { vec![] };
                        say(&mut replica, ms, to.0, Said::Parts(Parts { question: ask.question, parts }));
                        if !has && kept(ms) > of {
                            say(&mut replica, ms, to.0, Said::Offer(certificate(kept(ms))));
                        }
                    }
                    _ => {}
                }
            }
            if replica.executed() > Sequence(0) {
                return true;
            }
        }
        false
    }

    #[test]
    fn a_server_that_is_far_behind_gets_a_state() {
        assert!(gets_a_state(false, false));
        assert!(gets_a_state(false, true));
    }

    /// The newest certificate that anybody offers wins, and of it nobody has the state but by chance.
    #[test]
    fn a_liar_who_offers_the_newest_certificates_keeps_no_server_away() {
        assert!(gets_a_state(true, false), "two minutes, and nothing");
    }

    /// A target that only the liar has the state of stays as long as it gives a part now and then; when
    /// it is complete at last it is too old to go on from by the others' logs.
    #[test]
    fn a_liar_who_gives_a_state_slowly_keeps_no_server_away() {
        assert!(gets_a_state(true, true), "6 MB take the others a moment");
    }
}

//! Lost messages and servers that fell behind (PBFT §4.6, §5.2).
//!
//! A replica that makes no progress repeats its own votes and tells some others how far it is;
//! who is further sends the batches that it lacks, each with q commits, and the latest
//! certificate. Nothing of that has to be believed.

use super::Replica;
use super::budget::Question;
use super::effects::{Target, Write};
use super::log::LogEntry;
use super::pool::Waiting;
use crate::certificate::QuorumProof;
use crate::ids::{AttemptId, Sequence, ServerId, Timestamp, View};
use crate::limits::{
    CATCH_UP_BATCHES, CATCH_UP_BYTES, CHANGES_TOGETHER, FORWARD_TO_ALL_MS, RETRANSMIT_MS, WINDOW,
};
use crate::message::{CheckedBatch, Commit, PeerMessage, Slot, Status};
use crate::signing::Verified;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Slots whose votes are repeated at a time.
const REPEATED_SLOTS: usize = 16;
/// Waiting requests that are forwarded again at a time.
const REPEATED_REQUESTS: usize = 256;

/// What retransmission remembers.
#[derive(Clone, Default)]
pub(super) struct Progress {
    pub(super) last_tick: Timestamp,
    /// What was certified at the last tick.
    certified: Sequence,
    /// Whom to ask next.
    rotation: u64,
    /// The view that each server said last it takes part in, and the epoch of the key that it said so under:
    /// what a thief says in a server's name counts no longer than the server's key does.
    pub(super) views: BTreeMap<ServerId, (AttemptId, View)>,
}

impl Progress {
    /// What decides its future, for model checkers.
    pub(super) fn fingerprint(&self) -> impl serde::Serialize {
        let views: Vec<_> = self.views.iter().map(|(server, said)| (*server, *said)).collect();
        (self.last_tick, self.certified, self.rotation, views)
    }
}

impl Replica {
    /// At every tick: repeats what may have been lost.
    pub(super) fn retransmit(&mut self, now: Timestamp) {
        self.forward_again(now);
        let stalled = self.certified() == self.progress.certified;
        self.progress.certified = self.certified();
        let outstanding = self.log.last_key_value().is_some_and(|(last, _)| *last > self.certified())
            || self.executed() > self.certified()
            || self.target > self.certified()
            || self.changing.later_view_seen
            || self.later_epoch_seen
            || !self.changing.active
            || self.wants_state();
        if !stalled || !outstanding {
            return;
        }
        let primary = self.primary() == self.id && self.changing.active;
        let votes = if self.changing.active && self.may_vote() { REPEATED_SLOTS } else { 0 };
        for (_, entry) in self.log.range(self.certified().next()..).take(votes) {
            if let (true, Some((proposal, batch))) = (primary, entry.proposal()) {
                let message = PeerMessage::PrePrepare(proposal.clone(), Arc::clone(batch));
                self.pending.send(Target::All, message);
            }
            if let Some(vote) = &entry.own_prepare {
                self.pending.send_all(vote, PeerMessage::Prepare);
            }
            if let Some(vote) = &entry.own_commit {
                self.pending.send_all(vote, PeerMessage::Commit);
            }
        }
        if self.may_vote() {
            for vote in self.own_checkpoints.values().take(REPEATED_SLOTS).filter_map(|own| own.vote.as_ref())
            {
                self.pending.send_all(vote, PeerMessage::Checkpoint);
            }
        }
        self.tell_status();
    }

    /// Tells some servers how far this one is.
    pub(super) fn tell_status(&mut self) {
        // f+1 servers, others each time: one of them is correct.
        let n = self.manifest.thresholds.n() as u64;
        if n == 1 {
            return;
        }
        for step in 1..=self.manifest.thresholds.f() as u64 + 1 {
            let peer = ServerId(((u64::from(self.id.0) + self.progress.rotation % (n - 1) + step) % n) as u8);
            if peer != self.id {
                self.send_status(peer);
            }
        }
        self.progress.rotation += 1;
    }

    /// Requests of this server's own clients: to the primary again, and after a while to all, so
    /// that no single server can suppress one (design §3).
    fn forward_again(&mut self, now: Timestamp) {
        let (id, primary, active) = (self.id, self.primary(), self.changing.active);
        let untold = |waiting: &Waiting| active && primary != id && waiting.told.is_none();
        // One that left a view which the others are still in knows no primary, and its steps are worth
        // something only in this epoch.
        let alone = |waiting: &Waiting| !active && waiting.request.request().operation.is_a_servers();
        let to_all =
            |waiting: &Waiting| alone(waiting) || now.since_ms(waiting.received) >= FORWARD_TO_ALL_MS;
        let due = |waiting: &&mut Waiting| {
            let slowly = to_all(waiting) && !alone(waiting);
            let interval_ms = if slowly { FORWARD_TO_ALL_MS } else { RETRANSMIT_MS };
            let again = waiting.sent.is_none_or(|sent| now.since_ms(sent) >= interval_ms);
            waiting.own && (again || untold(waiting))
        };
        // Those that were sent longest ago first: a flood of others does not hide one for ever.
        let mut due: Vec<_> = self.pool.waiting_mut().filter(due).collect();
        due.sort_by_key(|waiting| waiting.sent);
        for waiting in due.into_iter().take(REPEATED_REQUESTS) {
            let target = match to_all(waiting) && !untold(waiting) {
                true => Target::All,
                false => Target::One(primary),
            };
            waiting.sent = Some(now);
            if primary != id {
                waiting.told.get_or_insert(now);
            }
            if target != Target::One(id) {
                self.pending.send(target, PeerMessage::Forward(Box::new(waiting.request.signed().clone())));
            }
        }
    }

    fn send_status(&mut self, peer: ServerId) {
        let active = self.changing.active;
        let (executed, certified) = (self.executed(), self.certified());
        let (wants_state, changes) = (self.wants_state(), self.membership.proofs().len() as u32);
        let (view, attempt) = (self.view, self.voter.attempt());
        let status = Status { view, active, executed, certified, wants_state, changes, attempt };
        let status = self.voter.sign(status);
        self.pending.send(Target::One(peer), PeerMessage::Status(status.signed().clone()));
    }

    /// A link came up: say where we are, and what we hold.
    pub(super) fn on_connected(&mut self, peer: ServerId) {
        self.ask_witnesses();
        if let Some(held) = self.own_held.as_ref().filter(|_| self.may_vote()) {
            self.pending.send(Target::One(peer), PeerMessage::Held(held.signed().clone()));
        }
        self.send_status(peer);
    }

    /// Somebody says how far it is: help, if this replica is further.
    pub(super) fn on_status(&mut self, now: Timestamp, status: &Verified<Status>) {
        let (peer, status) = (status.server(), *status.body());
        if status.active {
            // What an adversary says under an old key does not displace what the server says.
            let said = self.progress.views.entry(peer).or_insert((status.attempt, status.view));
            if status.attempt >= said.0 {
                *said = (status.attempt, status.view);
            }
        }
        let other = status.attempt != self.state.attempt();
        let asker = (peer, other.then_some(status.attempt.epoch));
        let behind = status.view < self.view || (status.view == self.view && !status.active);
        let tell = behind && self.changing.active && self.budgets.allows(now, asker, Question::NewView);
        if tell && self.changing.began.is_some() {
            // Together with f other servers' word it is enough if the view began long ago.
            self.send_status(peer);
            self.show_new_view(now, peer, asker);
        }
        // What else it is sent may be signed by servers that it does not know yet.
        if let Some(proofs) = self.membership.proofs().get(status.changes as usize..)
            && !proofs.is_empty()
            && self.budgets.allows(now, asker, Question::Membership)
        {
            let some: Vec<_> = proofs.iter().take(CHANGES_TOGETHER).cloned().collect();
            self.budgets.spend(now, asker, Question::Membership, some.len() * self.bytes_of_proof());
            self.pending.send(Target::One(peer), PeerMessage::Membership(some));
        }
        if status.wants_state {
            self.offer_state(asker, status.executed);
            return;
        }
        let help = status.executed < self.executed() || status.certified < self.certified();
        if !help {
            return;
        }
        if !self.budgets.may_help(now, asker, status.executed) {
            return;
        }
        let first = status.executed.next();
        let in_log = |entry: &LogEntry| entry.committed.is_some();
        if status.executed < self.executed() && !self.log.get(&first).is_some_and(in_log) {
            // The log no longer reaches back to there.
            self.offer_state(asker, status.executed);
        }
        let last = Sequence(status.executed.0.saturating_add(CATCH_UP_BATCHES));
        // First: batches count only as far as a certificate shows that there are some.
        if let Some(certificate) = self.certificate.as_ref().filter(|_| status.certified < self.certified()) {
            self.pending.send(Target::One(peer), PeerMessage::Certificate(certificate.as_ref().clone()));
        }
        let (mut bytes, mut through) = (0, status.executed);
        for (sequence, entry) in self.log.range(first..=last) {
            let Some(proof) = &entry.committed else { continue };
            bytes += entry.bytes();
            if bytes > CATCH_UP_BYTES {
                break;
            }
            if let Some(batch) = entry.wire_with(&proof.statement.0.digest) {
                let message = PeerMessage::Committed(proof.clone(), batch);
                self.pending.send(Target::One(peer), message);
                through = *sequence;
            }
        }
        // One that lacks only the certificate has used nothing until it has that.
        let through = if through == status.executed { Sequence(u64::MAX) } else { through };
        self.budgets.helped(now, asker, through, bytes + self.bytes_of_proof());
    }

    /// A batch that q servers committed to.
    pub(super) fn on_committed(&mut self, from: ServerId, proof: QuorumProof<Commit>, batch: CheckedBatch) {
        let Slot { sequence, attempt, .. } = proof.statement.0;
        let (executed, current) = (self.executed(), self.state.attempt());
        self.target = self.target.max(sequence);
        // No further beyond what q servers vouch for than ordering itself goes: so whatever is executed on commit
        // proofs is soon compared with a certificate.
        let certified = self.ahead.as_ref().map_or(Sequence(0), |ahead| ahead.statement.sequence);
        let shown = certified.max(self.certified());
        if sequence <= executed
            || sequence.0 > executed.0.saturating_add(WINDOW)
            || sequence.0 > shown.0.saturating_add(WINDOW)
        {
            return;
        }
        // In which epoch the next place lies is certain; of those after it that shows when they are executed.
        if attempt < current || (sequence == executed.next() && attempt != current) {
            return;
        }
        let entry: &mut LogEntry = self.log.entry(sequence).or_default();
        if entry.committed.as_ref().is_none_or(|known| known.statement.0.attempt < attempt) {
            let wire = Arc::new(batch.to_batch());
            let accepted_here = entry.slot().is_some_and(|slot| slot.digest == proof.statement.0.digest);
            let batch_to_write = (!accepted_here).then(|| Arc::clone(&wire));
            self.pending.write(Write::Committed { batch: batch_to_write, proof: proof.clone() });
            entry.set_batch(batch, wire);
            entry.committed = Some(proof);
        }
        self.execute_ready();
        let in_log = |entry: &LogEntry| entry.committed.is_some();
        let next = self.log.get(&self.executed().next());
        let used_up = self.executed() > executed && !next.is_some_and(in_log);
        if used_up && self.executed() < self.target {
            self.send_status(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;
    use crate::membership::tests::replaced;
    use crate::message::{CheckedMessage, Slot};
    use crate::ordering::{Identity, Input, Stored};
    use crate::signing::Voter;

    /// Whoever slept through a change could not check a word of the new server's, nor certificates with its vote.
    #[test]
    fn who_slept_through_a_change_is_shown_it() {
        let (world, _, shown) = replaced();
        let membership = Arc::clone(world.state.membership());
        let log_tail = crate::limits::LOG_TAIL_BATCHES;
        let identity = Identity { membership, voter: world.voters[0].clone(), boot: 0, log_tail };
        let mut replica = Replica::start(identity, Stored::default());
        let mut shows = |changes: u32| {
            let (executed, certified) = (Sequence(0), Sequence(0));
            let (view, attempt, wants_state) = (View(0), world.voters[1].attempt(), false);
            let status = Status { view, active: true, executed, certified, wants_state, changes, attempt };
            let status = CheckedMessage::Status(world.voters[1].sign(status));
            replica.handle(Timestamp(1_000_000), Input::Message(ServerId(1), status));
            let sent = replica.drain_free();
            let membership = sent.into_iter().find_map(|(to, message)| match &*message {
                PeerMessage::Membership(proofs) if to == Target::One(ServerId(1)) => Some(proofs.clone()),
                _ => None,
            });
            membership.unwrap_or_default()
        };
        assert_eq!(shows(0), [Arc::new(shown)]);
        assert!(shows(1).is_empty() && shows(u32::MAX).is_empty());
    }

    /// Whoever asks in a server's name under a key of an epoch that is over takes nothing from the server.
    #[test]
    fn old_keys_do_not_keep_a_server_from_being_helped() {
        let (manifest, identities) = crate::manifest::tests::sample(4);
        let cluster = manifest.cluster_id();
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(3);
        let mut voter = |id: usize, epoch| {
            Voter::generate(
                cluster,
                &identities[id],
                ServerId(id as u8),
                AttemptId::first(Epoch(epoch)),
                epoch,
                &mut rng,
            )
        };
        let (own, thief, real) = (voter(0, 5), voter(1, 3), voter(1, 5));
        let state = Some(crate::ordering::restore::tests::stored_at(cluster, own.attempt()));
        let membership = crate::Membership::genesis(Arc::new(manifest));
        let log_tail = crate::limits::LOG_TAIL_BATCHES;
        let identity = Identity { membership, voter: own.clone(), boot: 0, log_tail };
        let mut replica = Replica::start(identity, Stored { state, ..Stored::default() });
        let batch = CheckedBatch::new(&cluster, Timestamp(2), vec![]);
        let slot =
            Slot { view: View(0), sequence: Sequence(2), digest: batch.digest(), attempt: own.attempt() };
        let proof = QuorumProof { statement: Commit(slot), votes: vec![], keys: vec![] };
        let now = Timestamp(1_000_000);
        replica.handle(now, Input::Message(ServerId(2), CheckedMessage::Committed(proof, batch)));
        let mut helps = |voter: &Voter| {
            let (executed, certified) = (Sequence(1), Sequence(0));
            let (view, wants_state) = (View(0), false);
            let (changes, attempt) = (0, voter.attempt());
            let status = Status { view, active: true, executed, certified, wants_state, changes, attempt };
            let status = CheckedMessage::Status(voter.sign(status));
            replica.handle(now, Input::Message(ServerId(1), status));
            replica.drain_free().iter().any(|(_, message)| matches!(**message, PeerMessage::Committed(..)))
        };
        assert!(helps(&thief), "it may be the server, which slept");
        assert!(!helps(&thief) && helps(&real) && !helps(&real));
    }

    /// Each request has its turn, however many with lower keys wait.
    #[test]
    fn requests_are_forwarded_again_in_turn() {
        let (keyring, voters) = crate::certificate::tests::voters(4);
        let (membership, voter) = (Arc::clone(keyring.membership()), voters[2].clone());
        let log_tail = crate::limits::LOG_TAIL_BATCHES;
        let identity = Identity { membership, voter, boot: 0, log_tail };
        let mut replica = Replica::start(identity, Stored::default());
        let cluster = *keyring.cluster();
        let start = Timestamp(1_000_000);
        let total = 3 * REPEATED_REQUESTS as u64;
        for number in 0..total {
            let secret = crate::record::Name::new("x").unwrap();
            let operation = crate::request::Operation::Delete { secret };
            let key = crate::signing::SigningKey::from_seed(&[7; 32]);
            let expiry = start.plus_ms(50_000);
            let request = crate::request::SignedRequest::sign(&cluster, &key, number, expiry, operation);
            replica.handle(start, Input::Request(request.trusted(&cluster)));
        }
        replica.drain_free();
        let mut again = std::collections::BTreeSet::new();
        for step in 1..=3 {
            replica.forward_again(start.plus_ms(step * RETRANSMIT_MS));
            let sent = replica.drain_free();
            assert_eq!(sent.len(), REPEATED_REQUESTS);
            again.extend(sent.iter().filter_map(|(_, message)| match &**message {
                PeerMessage::Forward(request) => Some(request.request.sequence),
                _ => None,
            }));
        }
        assert_eq!(again.len() as u64, total);
    }

    /// `budget.rs` says that who has keys of old "takes nothing from the server itself". What is signed
    /// (`Status`) has budgets of its own, by the epoch of its key; what is not signed (`AskWitness`, `AskParts`,
    /// `Fetch`) is put to the account of the server in whose name the link is, whichever epoch's key made the link
    /// (`kds-server/src/peers.rs` admits `late` links and hands on the server's number alone). So a thief with a link
    /// key of long ago keeps a server that starts from hearing its witnesses, for ever.
    #[test]
    fn a_thief_on_an_old_link_uses_up_nothing_of_the_server() {
        let (keyring, voters) = crate::certificate::tests::voters(4);
        let mut replica = crate::ordering::view_change::tests::replica(&voters, 0, &keyring);
        let server = ServerId(1);
        let mut answered = |now: Timestamp, boot: u64, over_old_link: bool| {
            let message = CheckedMessage::AskWitness(boot);
            let input = match over_old_link {
                true => Input::OldLink(server, crate::ids::Epoch(0), message),
                false => Input::Message(server, message),
            };
            replica.handle(now, input);
            replica.drain_free().iter().any(
                |(_, message)| matches!(&**message, PeerMessage::Witness(witness) if witness.boot == boot),
            )
        };
        let (thief, own) = (1, 2);
        let mut heard = 0;
        for tick in 0..40 {
            let now = Timestamp(1_000_000 + tick * RETRANSMIT_MS);
            // Some twenty bytes each; until nothing comes any more.
            while answered(now, thief, true) {}
            heard += usize::from(answered(now, own, false));
        }
        assert_eq!(heard, 40, "the server that starts is not answered each time");
    }

    /// Certificates travel as they came. A liar puts keys into one that nobody voted with: an honest
    /// server's of attempts at the next epoch that came to nothing, which stand in the log. That server adopts it and
    /// passes it on; whoever checks it on its link has room for KEYS_PER_SERVER keys of it, newest epoch first, and
    /// forgets the one that it votes with. It is not heard any more until it makes a new link.
    #[test]
    fn keys_that_come_along_displace_none() {
        use crate::certificate::{Checkpoint, VoteBook};
        use crate::message::MessageError;
        use crate::signing::Keyring;
        let (manifest, identities) = crate::manifest::tests::sample(4);
        let cluster = manifest.cluster_id();
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(3);
        let mut voter = |id: usize, epoch, attempt, serial| {
            let attempt = AttemptId { epoch: Epoch(epoch), attempt };
            Voter::generate(cluster, &identities[id], ServerId(id as u8), attempt, serial, &mut rng)
        };
        let present: Vec<_> = (0..4).map(|id| voter(id, 5, 1, 10)).collect();
        // Server 1's keys of four attempts that failed.
        let failed: Vec<_> =
            (1..=4).map(|attempt| *voter(1, 6, attempt, 10 + u64::from(attempt)).certificate()).collect();
        let membership = crate::Membership::genesis(Arc::new(manifest));
        // Server 1, which has executed batch 2.
        let own = present[1].clone();
        let state = Some(crate::ordering::restore::tests::stored_at(cluster, own.attempt()));
        let log_tail = crate::limits::LOG_TAIL_BATCHES;
        let identity =
            Identity { membership: Arc::clone(&membership), voter: own.clone(), boot: 0, log_tail };
        let mut server = Replica::start(identity, Stored { state, ..Stored::default() });
        server.standing = crate::ordering::standing::Standing::Voting;
        let batch = CheckedBatch::new(&cluster, Timestamp(2), vec![]);
        let slot =
            Slot { view: View(0), sequence: Sequence(2), digest: batch.digest(), attempt: own.attempt() };
        let proof = QuorumProof { statement: Commit(slot), votes: vec![], keys: vec![] };
        let now = Timestamp(1_000_000);
        server.handle(now, Input::Message(ServerId(2), CheckedMessage::Committed(proof, batch)));
        let statement: Checkpoint = server.own_checkpoints[&Sequence(2)].checkpoint;
        let mut book = VoteBook::default();
        for id in [0, 2, 3] {
            assert!(book.add(present[id].sign(statement)).unwrap());
        }
        let good = book.proof(&statement, 3).unwrap();
        // Both links have carried a certificate before, so the voters' keys are known on them.
        let link = |from: usize| {
            let mut keyring = Keyring::of(Arc::clone(&membership));
            for voter in &present {
                assert!(keyring.add(*voter.certificate()).unwrap());
            }
            keyring.set_epoch(Epoch(5));
            (ServerId(from as u8), keyring)
        };
        // The liar, server 3, to server 1: a certificate with keys that nobody voted with, or with those of voters and of
        // another attempt.
        let voter_of_another = vec![failed[0]];
        for padding in [failed, voter_of_another] {
            let padded = QuorumProof { keys: padding, ..good.clone() };
            let (liar, mut keyring) = link(3);
            let checked = PeerMessage::Certificate(padded).check(liar, &mut keyring).map(drop);
            assert!(matches!(checked, Err(MessageError::Quorum(_))), "{checked:?}");
        }
        let mut book = VoteBook::default();
        for id in [0, 1, 2] {
            assert!(book.add(present[id].sign(statement)).unwrap());
        }
        let mut padded = book.proof(&statement, 3).unwrap();
        let own_key = padded.keys.iter_mut().find(|key| key.statement.server == ServerId(1)).unwrap();
        *own_key = *voter(1, 6, 1, 11).certificate();
        let (liar, mut keyring) = link(3);
        let checked = PeerMessage::Certificate(padded).check(liar, &mut keyring).map(drop);
        assert!(matches!(checked, Err(MessageError::Quorum(_))), "{checked:?}");
    }
}

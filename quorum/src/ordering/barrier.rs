//! Where an epoch begins, ordering begins anew (design §7, *Old keys count for nothing after the seal*).
//!
//! Ordering within an epoch is one run of PBFT, whose voters are the keys that were certified for the attempt by
//! which it began. It orders the places from the last batch of the epoch before to the batch that seals the next
//! one. Its votes name that attempt, and only keys of it sign them ([`crate::signing::Statement`]); nothing of
//! the run before it counts but the state that it led to. That is how reconfigured state machines treat what the
//! old configuration said about later places (Lamport, Malkhi & Zhou, "Reconfiguring a state machine", 2010).
//!
//! Why that is safe: within one run at most f of the voters are faulty, and PBFT's argument holds. What a run says
//! about places after the batch that seals the next epoch is void. No correct server acts on it: it executes a
//! batch only after all before it, and by then it knows in which epoch the place lies. So two different batches
//! at one place would need two quorums of one run. Keys of other epochs, however many an adversary collected,
//! make none.
//!
//! Why it stays live: a batch that may seal an epoch is a *barrier*. A primary proposes nothing after one before
//! it has executed it, and a backup accepts nothing after one: so correct servers lose no votes at a seal. A
//! server that has not executed the sealing batch is shown it, with q commits, by those that have. A batch may
//! seal one if, with it, q servers have said to be ready: what fewer say holds up nobody, however often they say it.

use super::Replica;
use crate::ids::{AttemptId, Sequence, ServerId};
use crate::message::{CheckedBatch, CheckedMessage, PrePrepare};
use crate::signing::Verified;
use crate::state::layout;
use std::collections::{BTreeMap, BTreeSet};

impl Replica {
    /// Whether what a peer says counts in the epoch that this replica is in. Votes of the next one are kept until it
    /// begins here. What is not said in an epoch, or is judged where it is used, passes.
    pub(super) fn counts(&mut self, message: &CheckedMessage) -> bool {
        let (said_in, early) = match message {
            CheckedMessage::PrePrepare(proposal, _) => (proposal.body().0.attempt, true),
            CheckedMessage::Prepare(vote) => (vote.body().0.attempt, true),
            CheckedMessage::Commit(vote) => (vote.body().0.attempt, true),
            CheckedMessage::Held(held) => (held.body().attempt, false),
            CheckedMessage::Suspect(suspect) => (suspect.body().attempt, false),
            CheckedMessage::ViewChange(change) => (change.body().attempt, false),
            _ => return true,
        };
        let current = self.state.attempt();
        // Its author has executed what this replica lacks.
        self.later_epoch_seen |= said_in.epoch > current.epoch;
        said_in == current || (early && said_in.epoch == current.epoch.next())
    }

    /// The last place that can be voted for: everything before it is known, and no epoch begins on the way.
    fn reach(&self) -> Sequence {
        let executed = || {
            let attempt = layout::epochs(self.state.map()).and_then(|epochs| epochs.attempt);
            attempt.map(|attempt| (attempt.id, attempt.ready.into_keys().collect()))
        };
        let mut ready: Option<BTreeMap<AttemptId, BTreeSet<ServerId>>> = None;
        let mut place = self.executed().next();
        while let Some(entry) = self.log.get(&place).filter(|entry| entry.batch.is_some()) {
            let seals = entry.ready.iter().any(|(server, attempt)| {
                // Looked up only where it matters: an attempt is large.
                let ready = ready.get_or_insert_with(|| executed().into_iter().collect());
                let of_attempt = ready.entry(*attempt).or_default();
                of_attempt.insert(*server);
                of_attempt.len() >= self.quorum()
            });
            if seals {
                break;
            }
            place = place.next();
        }
        place
    }

    /// Whether a place can be voted for.
    pub(super) fn leads_to(&self, sequence: Sequence) -> bool {
        sequence <= self.reach()
    }

    /// A proposal that came before what it follows, and can be judged now.
    pub(super) fn next_early(&mut self) -> Option<(Verified<PrePrepare>, CheckedBatch)> {
        let (current, first, reach) = (self.state.attempt(), self.executed().next(), self.reach());
        let mut entries = self.log.range_mut(first..=reach);
        entries
            .find_map(|(_, entry)| entry.early.take_if(|(proposal, _)| proposal.body().0.attempt == current))
    }

    /// The executed state is of another epoch than before: what was said about later places is void.
    pub(super) fn enter_epoch(&mut self) {
        let (attempt, first) = (self.state.attempt(), self.executed().next());
        // What is on disk about these places names its epoch too: a start forgets it in the same way.
        self.log.range_mut(first..).for_each(|(_, entry)| entry.enter_epoch(attempt));
        self.later_epoch_seen = false;
        // At a start its own proposals of this epoch are there already.
        let accepted = self.log.range(first..).rfind(|(_, entry)| entry.slot().is_some());
        self.next_sequence = accepted.map_or(first, |(last, _)| last.next());
        self.pool.requeue();
        self.changing.enter_epoch(attempt, self.state.began());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Hash;
    use crate::certificate::{QuorumProof, VoteBook};
    use crate::ids::{Epoch, Timestamp, View};
    use crate::limits::LOG_TAIL_BATCHES;
    use crate::message::{MessageError, PeerMessage, Prepare, Slot, Suspect, ViewChange};
    use crate::ordering::log::LogEntry;
    use crate::ordering::{Identity, Stored};
    use crate::request::{Operation, SignedRequest, Step};
    use crate::signing::{Keyring, Voter};
    use std::sync::Arc;

    /// A replica in epoch 5, and four servers' voters of an epoch.
    fn in_epoch_five() -> (Replica, impl FnMut(u64) -> Vec<Voter>) {
        let (manifest, identities) = crate::manifest::tests::sample(4);
        let cluster = manifest.cluster_id();
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(3);
        let mut of = move |epoch: u64| -> Vec<Voter> {
            let voters = identities.iter().enumerate().map(|(i, identity)| {
                let (id, attempt) = (ServerId(i as u8), AttemptId::first(Epoch(epoch)));
                Voter::generate(cluster, identity, id, attempt, epoch, &mut rng)
            });
            voters.collect()
        };
        let voter = of(5)[0].clone();
        let state = Some(crate::ordering::restore::tests::stored_at(cluster, voter.attempt()));
        let membership = crate::Membership::genesis(Arc::new(manifest));
        let identity = Identity { membership, voter, boot: 0, log_tail: LOG_TAIL_BATCHES };
        let replica = Replica::start(identity, Stored { state, ..Stored::default() });
        assert_eq!(replica.state.epoch(), Epoch(5));
        (replica, of)
    }

    fn slot(epoch: u64) -> Slot {
        let (view, sequence, digest) = (View(0), Sequence(40), Hash([5; 32]));
        Slot { view, sequence, digest, attempt: AttemptId::first(Epoch(epoch)) }
    }

    /// Design §7: nothing that is said in an epoch that is over counts; votes of the next one wait for it.
    #[test]
    fn what_is_said_counts_in_its_own_epoch() {
        let (mut replica, mut of) = in_epoch_five();
        for (epoch, vote_counts, suspicion_counts) in
            [(4, false, false), (5, true, true), (6, true, false), (7, false, false)]
        {
            let voter = of(epoch).remove(1);
            let vote = CheckedMessage::Prepare(voter.sign(Prepare(slot(epoch))));
            assert_eq!(replica.counts(&vote), vote_counts, "a vote of epoch {epoch}");
            let suspect = voter.sign(Suspect { view: View(0), attempt: voter.attempt() });
            let suspect = CheckedMessage::Suspect(suspect);
            assert_eq!(replica.counts(&suspect), suspicion_counts, "a suspicion of epoch {epoch}");
        }
    }

    /// Proofs of the epoch before were good once. Shown in a view change of this one they would call for a batch
    /// at a place that the seal has passed.
    #[test]
    fn a_view_change_shows_proofs_of_its_own_epoch_only() {
        let (replica, mut of) = in_epoch_five();
        let mut keyring = Keyring::of(Arc::clone(replica.membership()));
        let present = of(5);
        for voter in &present {
            keyring.add(*voter.certificate()).unwrap();
        }
        for (epoch, good) in [(4, false), (5, true)] {
            let voters = if epoch == 5 { present.clone() } else { of(epoch) };
            let mut book = VoteBook::default();
            for voter in &voters[..3] {
                book.add(voter.sign(Prepare(slot(epoch)))).unwrap();
            }
            let proof: QuorumProof<Prepare> = book.proof(&Prepare(slot(epoch)), 3).unwrap();
            assert_eq!(proof.verify(&mut keyring), Ok(()));
            let (view, began) = (View(1), Sequence(0));
            let attempt = present[1].attempt();
            let change = ViewChange::new(view, (attempt, began), None, [proof].iter());
            let change = PeerMessage::ViewChange(present[1].sign(change).signed().clone());
            let checked = change.check(ServerId(1), &mut keyring).map(drop);
            assert_eq!(checked, if good { Ok(()) } else { Err(MessageError::BadViewChange) });
        }
    }

    /// A batch that may seal an epoch is a barrier.
    #[test]
    fn nobody_votes_beyond_a_batch_that_may_seal_an_epoch() {
        let (mut replica, mut of) = in_epoch_five();
        let voters = of(5);
        let (cluster, first) = (replica.cluster, replica.executed().next());
        let mut put = |place: Sequence, ready: &[usize]| {
            let requests = ready.iter().map(|i| {
                let server = ServerId(*i as u8);
                let step = Step::Ready { server, attempt: AttemptId::first(Epoch(6)), whole: true };
                let operation = Operation::Step(step);
                SignedRequest::sign(&cluster, voters[*i].key(), 1, Timestamp(9), operation).trusted(&cluster)
            });
            let batch = CheckedBatch::new(&cluster, Timestamp(1), requests.collect());
            let wire = Arc::new(batch.to_batch());
            let mut entry = LogEntry::default();
            entry.set_batch(batch, wire);
            replica.log.insert(place, entry);
            replica.reach().0 - first.0
        };
        assert_eq!(put(first, &[]), 1, "everything before it is known");
        assert_eq!(put(first, &[1]), 1);
        // One that says it again and again is no barrier; q are.
        assert_eq!(put(first.next(), &[1, 1, 1]), 2);
        assert_eq!(put(Sequence(first.0 + 2), &[2]), 3);
        assert_eq!(put(Sequence(first.0 + 3), &[3]), 3);
        assert_eq!(put(Sequence(first.0 + 4), &[]), 3);
    }
}

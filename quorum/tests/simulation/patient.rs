//! Byzantine servers that break no rule of the protocol: they do what they must, just not well enough, and would
//! go on like that for ever. Each stands alone, on a good network, so that nobody else is to blame.

use crate::cluster::{Event, START, Simulation};
use crate::liar::{proofs, with_proofs};
use quorum::certificate::VoteBook;
use quorum::codec::decode;
use quorum::ids::{Sequence, ServerId, Timestamp, View};
use quorum::message::{CheckedMessage, PeerMessage, Prepare};
use quorum::record::Name;
use quorum::request::{Operation, RequestId, SignedRequest};
use std::collections::BTreeMap;

/// What a patient liar does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// As the first primary it orders every other request at once, and keeps the others for long.
    KeepsRequests,
    /// As the first primary it orders no step of others towards the next epoch.
    KeepsSteps,
    /// As the first primary it proposes with a clock that lags by just under what makes readers' answers too old.
    Lags,
    /// As a backup it tells requests to the other backups, and not to the primary.
    TellsBackups,
    /// f of them, the first primaries, see to it that a batch is accepted by some and prepared by nobody, begin a
    /// view without it, and then show in every view change that it was prepared, and give it to nobody.
    HoardsBatches,
    /// The first primary leaves a hole: it proposes a batch to just too few, and votes for it to nobody; for those after
    /// it there are votes enough. Then it is silent for ever.
    LeavesAHole,
    /// f of them, of whom the first primary proposes nothing any more, say to each another view change: all of them
    /// hold, and they are there first, so that a new view names some of them.
    ShowsEachAnother,
    /// f of them, the last ones, ask for their shares whenever they may, so that epochs end early.
    AsksForEpochs,
}

/// How long requests are kept: less than what would be taken for censorship.
const KEPT_MS: u64 = 18_000;
/// How far the clock lags.
const LAG_MS: u64 = 3_800;
/// How often backups are told of something.
const TOLD_EVERY_MS: u64 = 1_500;
/// Within so much time everyone is served: a gateway gives up after that.
const SERVED_MS: u64 = 8_000;
/// How long backups are told things: longer than any of their timers.
const LONG_MS: u64 = 40_000;

/// When a batch is hoarded first.
const HOARDED_AFTER_MS: u64 = 2_000;
/// When a hole is left.
const HOLE_AFTER_MS: u64 = 1_500;
/// How many batches after it are proposed.
const AFTER_HOLE: u64 = 7;
/// Who serves badly is gone by then.
const REPLACED_MS: u64 = 12_000;

/// A patient liar's memory, and what became of it.
#[derive(Default)]
pub struct Patient {
    /// When most servers had left the first view.
    replaced: Option<Timestamp>,
    /// Until when requests are kept.
    kept: BTreeMap<RequestId, Timestamp>,
    told: u64,
    /// Which batch is hoarded, and the votes for it.
    hoarded: Option<Sequence>,
    votes: VoteBook<Prepare>,
    /// Where the hole is, and where the last batch after it.
    hole: Option<(Sequence, Sequence)>,
}

impl Patience {
    /// Which server it is.
    pub fn who(self, n: usize) -> ServerId {
        match self {
            Self::TellsBackups => ServerId(n as u8 - 1),
            Self::AsksForEpochs => ServerId((n - (n - 1) / 3) as u8),
            _ => ServerId(0),
        }
    }
    /// How many do it.
    pub fn count(self, f: usize) -> usize {
        match self {
            Self::HoardsBatches | Self::ShowsEachAnother | Self::AsksForEpochs => f,
            _ => 1,
        }
    }
}

impl Simulation {
    /// The clock of a server that lags on purpose.
    pub(crate) fn lagging_clock(&self, id: ServerId, now: Timestamp) -> Timestamp {
        match self.faults.patient {
            Some(Patience::Lags) if id == ServerId(0) => Timestamp(now.0 - LAG_MS),
            _ => now,
        }
    }

    /// Whether a patient primary takes note of a message now.
    pub(crate) fn takes_note(
        &mut self,
        to: ServerId,
        from: ServerId,
        bytes: &std::sync::Arc<Vec<u8>>,
    ) -> bool {
        let Some(patience) = self.faults.patient.filter(|patience| patience.who(self.voters.len()) == to)
        else {
            return true;
        };
        let Ok(PeerMessage::Forward(request)) = decode::<PeerMessage>(bytes) else { return true };
        match patience {
            Patience::KeepsSteps => !matches!(request.request.operation, Operation::Step(_)),
            Patience::KeepsRequests => {
                let id = RequestId { client: request.request.client, sequence: request.request.sequence };
                let (now, place) = (self.now, self.patient.kept.len());
                let until = *self.patient.kept.entry(id).or_insert_with(|| match place % 2 {
                    0 => now,
                    _ => now.plus_ms(KEPT_MS),
                });
                if self.patient.kept.len() > place && until > now {
                    let event = Event::Deliver { to, from, bytes: bytes.clone() };
                    self.schedule(until.since_ms(now), event);
                }
                until <= now
            }
            Patience::Lags
            | Patience::TellsBackups
            | Patience::HoardsBatches
            | Patience::LeavesAHole
            | Patience::AsksForEpochs
            | Patience::ShowsEachAnother => true,
        }
    }

    /// The network favours those who lie in view changes: theirs are there first.
    pub(crate) fn held_back_ms(&self, message: &PeerMessage) -> u64 {
        let hoarding =
            matches!(self.faults.patient, Some(Patience::HoardsBatches | Patience::ShowsEachAnother));
        if hoarding && matches!(message, PeerMessage::ViewChange(_)) { 100 } else { 0 }
    }

    /// Those who hoard a batch let others make it out of its votes, and keep these to themselves.
    pub(crate) fn hoards(&mut self, to: ServerId, message: &CheckedMessage) -> bool {
        let CheckedMessage::Prepare(vote) = message else { return false };
        let hoarded = self.patient.hoarded == Some(vote.body().0.sequence) && vote.body().0.view == View(0);
        let hoards = hoarded && self.is_liar(to);
        if hoards {
            // The liars' own replicas do not know of it: they begin a view without.
            let _ = self.patient.votes.add(vote.clone());
        }
        hoards
    }

    /// What those who hoard a batch let out of a message.
    pub(crate) fn lets_out(
        &mut self,
        from: ServerId,
        to: ServerId,
        message: PeerMessage,
    ) -> Option<PeerMessage> {
        if self.faults.patient == Some(Patience::LeavesAHole) {
            return self.leaves_a_hole(to, message);
        }
        if self.faults.patient == Some(Patience::ShowsEachAnother) {
            return self.shows_another(from, to, message);
        }
        if self.faults.patient != Some(Patience::HoardsBatches) || self.now < START.plus_ms(HOARDED_AFTER_MS)
        {
            return Some(message);
        }
        let thresholds = self.manifest.thresholds;
        let (f, q) = (thresholds.f(), thresholds.q());
        match message {
            // One, and to as many as it takes for q prepares together with their own.
            PeerMessage::PrePrepare(ref proposal, _) => {
                let slot = proposal.body.0;
                let hoarded = *self.patient.hoarded.get_or_insert(slot.sequence);
                let this = from == ServerId(0) && slot.view == View(0) && slot.sequence == hoarded;
                if this {
                    for liar in (0..f).map(|i| ServerId(i as u8)) {
                        let _ = self.patient.votes.add(self.voter(liar).sign(Prepare(slot)));
                    }
                }
                (this && (f..q).contains(&to.index())).then_some(message)
            }
            PeerMessage::Prepare(_) | PeerMessage::Commit(_) | PeerMessage::Fetched(_) => None,
            // The votes are shown once the batch is dropped.
            PeerMessage::ViewChange(change) if change.body.view >= View(f as u64) => {
                let body = change.body;
                let low = body.stable.as_ref().map_or(Sequence(0), |stable| stable.statement.sequence);
                let slot = self.patient.votes.votes_cast().into_iter().map(|(_, said)| said).next();
                let proof = slot.and_then(|slot| self.patient.votes.proof(&slot, q));
                let mut proofs = proofs(&body);
                proofs.extend(proof.filter(|proof| proof.statement.0.sequence > low));
                proofs.sort_by_key(|proof| proof.statement.0.sequence);
                proofs.dedup_by_key(|proof| proof.statement.0.sequence);
                let body = with_proofs(body, &proofs);
                Some(PeerMessage::ViewChange(self.voter(from).sign(body).signed().clone()))
            }
            _ => Some(message),
        }
    }

    /// What a primary that leaves a hole says.
    fn leaves_a_hole(&mut self, to: ServerId, message: PeerMessage) -> Option<PeerMessage> {
        let (now, q) = (self.now, self.manifest.thresholds.q());
        if let PeerMessage::PrePrepare(proposal, _) = &message
            && now >= START.plus_ms(HOLE_AFTER_MS)
        {
            let sequence = proposal.body.0.sequence;
            let (hole, last) = self.patient.hole.unwrap_or((sequence, sequence));
            self.patient.hole = Some((hole, last.max(sequence).min(Sequence(hole.0 + AFTER_HOLE))));
        }
        let Some((hole, last)) = self.patient.hole else { return Some(message) };
        // Its own vote makes q of those that follow.
        let said = match &message {
            PeerMessage::PrePrepare(proposal, _) => {
                let sequence = proposal.body.0.sequence;
                sequence < hole || (sequence <= last && to.index() < q)
            }
            PeerMessage::Prepare(vote) => {
                let sequence = vote.body.0.sequence;
                sequence < hole || (sequence > hole && sequence <= last)
            }
            PeerMessage::Commit(vote) => vote.body.0.sequence < hole,
            _ => last < Sequence(hole.0 + AFTER_HOLE),
        };
        said.then_some(message)
    }

    /// A certificate holds in whatever order its votes stand: a view change has as many forms.
    fn shows_another(&mut self, from: ServerId, to: ServerId, message: PeerMessage) -> Option<PeerMessage> {
        match message {
            PeerMessage::PrePrepare(..) if from == ServerId(0) => {
                (self.now < START.plus_ms(HOLE_AFTER_MS)).then_some(message)
            }
            PeerMessage::ViewChange(change) => {
                let mut body = change.body;
                if let Some(stable) = &mut body.stable {
                    let votes = stable.votes.len();
                    stable.votes.rotate_left(to.index() % votes);
                }
                Some(PeerMessage::ViewChange(self.voter(from).sign(body).signed().clone()))
            }
            _ => Some(message),
        }
    }

    /// A patient backup tells the others, but for the primary, of a request that is as good as any.
    pub(crate) fn tell_backups(&mut self, id: ServerId) {
        let n = self.voters.len();
        let told = self.now.since_ms(START) / TOLD_EVERY_MS;
        if self.faults.patient.is_some() && self.view() > View(0) {
            self.patient.replaced.get_or_insert(self.now);
        }
        if self.faults.patient != Some(Patience::TellsBackups) || id != Patience::TellsBackups.who(n) {
            return;
        }
        if told == self.patient.told {
            return;
        }
        self.patient.told = told;
        let operation = Operation::Delete { secret: Name::new("nothing").expect("it is a name") };
        let expiry = self.now.plus_ms(55_000);
        let request =
            SignedRequest::sign(&self.cluster, &self.administrator, 1_000_000 + told, expiry, operation);
        let primary = self.view().primary(n);
        let others = self.manifest.grid().servers().filter(|to| *to != id && *to != primary);
        let lies: Vec<_> =
            others.map(|to| (to, 0, PeerMessage::Forward(Box::new(request.clone())))).collect();
        self.send_lies(id, lies);
    }

    /// A primary that serves badly does not stay; one that serves well does, whatever a backup does. And
    /// nobody waits long.
    pub(crate) fn check_patient(&mut self) {
        let Some(patience) = self.faults.patient else { return };
        let seed = self.seed;
        match patience {
            Patience::KeepsRequests | Patience::KeepsSteps | Patience::Lags => {
                while self.now < START.plus_ms(2 * REPLACED_MS) {
                    self.next_event();
                }
                let replaced = self.patient.replaced.map(|when| when.since_ms(START));
                let soon = replaced.is_some_and(|after_ms| after_ms < REPLACED_MS);
                assert!(soon, "seed {seed}: a primary that does this stays: {patience:?}, {replaced:?}");
            }
            // That requests are served at all is what is asked for.
            Patience::HoardsBatches => return,
            Patience::ShowsEachAnother => {
                assert_eq!(self.view(), View(1), "seed {seed}: one view change is enough");
                return;
            }
            Patience::LeavesAHole => {
                let after = self.patient.hole.map(|(hole, last)| last.0 - hole.0);
                assert!(after >= Some(2), "seed {seed}: too few batches after the hole: {after:?}");
                assert_eq!(self.view(), View(1), "seed {seed}: one view change is enough");
                return;
            }
            Patience::AsksForEpochs => {
                while self.now < START.plus_ms(LONG_MS) {
                    self.next_event();
                }
                assert_eq!(self.view(), View(0), "seed {seed}: to ask for epochs changes the view");
            }
            Patience::TellsBackups => {
                while self.now < START.plus_ms(LONG_MS) {
                    self.next_event();
                }
                assert_eq!(self.view(), View(0), "seed {seed}: one liar makes the others change the view");
            }
        }
        assert!(self.view() <= View(1), "seed {seed}: a good primary is replaced too, view {}", self.view());
        let longest = self.clients.iter().map(|client| client.waited_ms).max().unwrap_or(0);
        assert!(longest < SERVED_MS, "seed {seed}: a client waited for {longest} ms");
    }
}

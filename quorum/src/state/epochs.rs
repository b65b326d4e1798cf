//! Epochs: how the log agrees on the seeds that renew everything secret (design §7).
//!
//! | step | ordered | what it settles |
//! |---|---|---|
//! | *deal* | `Deal` | a dealer's commitment to its contributions, and its next sealing key |
//! | | | (the contributions themselves go from server to server) |
//! | *ack* | `Ack` | whose contributions a server holds |
//! | *fix* | | the set D: dealers that q servers hold the contributions of |
//! | *ready* | `Ready` | that a server holds everything of D, durably |
//! | *seal* | | q are ready, k+f of them with all their shares: the epoch has begun |
//!
//! Sealing on acks alone could strand honest servers with contributions of different dealers. And q that
//! have all contributions are not enough by themselves: a server that missed the last epoch has nothing to
//! add them to. Were it counted, the others could go on without one that is slow, and shares would be left
//! at fewer than k. Of k+f that say they are whole at least k are, and no seal is without them.
//!
//! So a cluster of which too few are whole cannot renew (for n = 4: one gone and one not whole). Then every
//! other attempt agrees only on masks for a server that recovers: it renews nothing and leaves the epoch as
//! it is, and when that server is whole the next attempt can succeed.
//!
//! A server that waits for an epoch, since it lacks shares or has forgotten votes, is not left waiting until the current
//! one has had its length: when it asks, the next one begins *early*, with masks for it. That is bounded, since a liar may
//! ask: no epoch is shorter than [`EARLY_EPOCH_MS`], and none ends early twice within [`EARLY_INTERVAL_MS`] for the same server.
//!
//! Nothing secret is in here: only commitments, public keys and who has done what.

use super::{Event, Lookup, State, layout};
use crate::Thresholds;
use crate::bytes::{Hash, PublicKey};
use crate::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp};
use crate::limits::{ATTEMPT_LACKING_MS, ATTEMPT_MS, EARLY_EPOCH_MS, EARLY_INTERVAL_MS};
use crate::membership::Membership;
use crate::record::Invalid;
use crate::request::{Done, Refusal, Request, Step};
use crate::signing::{KeyCertificate, KeyPurpose};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where the cluster stands in its epochs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Epochs {
    /// The current one.
    pub current: Epoch,
    /// Agreed time at which it began.
    pub since: Timestamp,
    /// The last batch of the one before: places after it lie in this epoch.
    pub began: Sequence,
    /// The attempt at the next one, once it is time for it.
    pub attempt: Option<Attempt>,
    /// The attempt by which the current epoch began.
    pub sealed: Option<Attempt>,
    /// The number of the last attempt at the next epoch that only let a server recover, or was given up.
    pub last_attempt: u32,
    /// Servers that asked for their shares, in order.
    pub waiting: Vec<ServerId>,
    /// The current epoch ends before it has had its length.
    pub early: bool,
    /// For whom an epoch ended early lately, and when.
    pub early_for: BTreeMap<ServerId, Timestamp>,
}

/// An attempt at the next epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    /// Which one.
    pub id: AttemptId,
    /// Agreed time at which it began.
    pub began: Timestamp,
    /// Whether shares are renewed by it; if not, a server recovers its shares of the current epoch.
    pub renews: bool,
    /// Who is to get its shares back.
    pub recovering: Option<ServerId>,
    /// What each dealer committed to.
    pub deals: BTreeMap<ServerId, Deal>,
    /// Whose contributions each server holds.
    pub acks: BTreeMap<ServerId, Vec<ServerId>>,
    /// D, once it is fixed; ascending.
    pub dealers: Option<Vec<ServerId>>,
    /// Servers that hold all of D's contributions, durably, and whether they have all their shares.
    pub ready: BTreeMap<ServerId, bool>,
}

/// A dealer's commitment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deal {
    /// See [`Seeds::root`](crate::refresh::Seeds::root).
    pub root: Hash,
    /// Its voting key of the next epoch.
    pub voting: KeyCertificate,
    /// Its sealing key of the next epoch.
    pub sealing: KeyCertificate,
}

/// Whether a server's step would change anything: only then is it ordered, so that a liar's flood of them
/// ends where it begins. The server is the one whose announced voting key signs.
pub(super) fn takes_step(
    state: &impl Lookup,
    membership: &Membership,
    request: &Request,
    step: &Step,
) -> bool {
    let server = step.server();
    let keys = layout::server_keys(state, server).filter(|keys| keys.voting.statement.key == request.client);
    let (Some(keys), Some(epochs)) = (keys, layout::epochs(state)) else { return false };
    keys.voting.statement.attempt_id() == epochs.attempt_id() && epochs.check(membership, step).is_ok()
}

impl Epochs {
    /// The attempt by which the current epoch began: keys that count in it were certified for that.
    pub fn attempt_id(&self) -> AttemptId {
        self.sealed.as_ref().map_or_else(AttemptId::default, |sealed| sealed.id)
    }

    fn attempt(&self, id: AttemptId) -> Result<&Attempt, Refusal> {
        let attempt = self.attempt.as_ref().filter(|attempt| attempt.id == id);
        attempt.ok_or(Refusal::EpochPassed { current: self.current })
    }

    /// The first of those who wait for whom the current epoch may end early.
    fn may_end_early_for(&self, now: Timestamp) -> Option<ServerId> {
        let not_lately = |server: &ServerId| {
            self.early_for.get(server).is_none_or(|last| now.since_ms(*last) >= EARLY_INTERVAL_MS)
        };
        let long_enough = now.since_ms(self.since) >= EARLY_EPOCH_MS;
        self.waiting.iter().copied().find(not_lately).filter(|_| long_enough)
    }

    /// Ends the attempt that is under way; there will be another one.
    pub(super) fn give_up(&mut self) {
        if let Some(attempt) = self.attempt.take() {
            self.last_attempt = attempt.id.attempt;
            // Whoever was to recover in it is first in the next one.
            if let Some(again) = attempt.recovering {
                self.waiting.insert(0, again);
            }
        }
    }

    /// Why a step is refused; a step that has been taken before is refused too.
    fn check(&self, membership: &Membership, step: &Step) -> Result<(), Refusal> {
        let taken = Err(Refusal::TooOften);
        match step {
            Step::Deal { server, attempt, voting, sealing, .. } => {
                let known = self.attempt(*attempt)?;
                let holds = |key: &KeyCertificate, purpose| {
                    let statement = &key.statement;
                    statement.server == *server
                        && statement.purpose == purpose
                        && statement.attempt_id() == *attempt
                        && key.verify(membership).is_ok()
                };
                if !holds(voting, KeyPurpose::Voting) || !holds(sealing, KeyPurpose::Sealing) {
                    return Err(Refusal::Invalid(Invalid::Certificate));
                }
                // A dealer's first commitment counts; after D is fixed none does.
                if known.deals.contains_key(server) || known.dealers.is_some() { taken } else { Ok(()) }
            }
            Step::Ack { server, attempt, dealers } => {
                let known = self.attempt(*attempt)?;
                let before = known.acks.get(server);
                let ascending = dealers.is_sorted_by(|a, b| a < b);
                if !ascending || !dealers.iter().all(|dealer| known.deals.contains_key(dealer)) {
                    return Err(Refusal::Invalid(Invalid::Dealers));
                }
                // What is held stays held: an ack only grows.
                let grows = before.is_none_or(|before| {
                    dealers.len() > before.len() && before.iter().all(|dealer| dealers.contains(dealer))
                });
                if known.dealers.is_none() && grows && !dealers.is_empty() { Ok(()) } else { taken }
            }
            Step::Ready { server, attempt, whole } => {
                let known = self.attempt(*attempt)?;
                // One that was not whole may have recovered meanwhile.
                let new = known.ready.get(server).is_none_or(|before| *whole && !before);
                if known.dealers.is_some() && new { Ok(()) } else { taken }
            }
            Step::Recover { server } => {
                let underway = self.attempt.as_ref().and_then(|attempt| attempt.recovering);
                let known = self.waiting.contains(server) || underway == Some(*server);
                if known { taken } else { Ok(()) }
            }
        }
    }
}

impl State {
    /// Begins an attempt when it is time for the next epoch, when a server waits for it, or when the last attempt took
    /// too long: the old shares stay valid, and nothing is lost by trying again.
    pub(super) fn advance_epochs(&mut self) {
        let mut epochs = layout::epochs(&self.map).unwrap_or_default();
        let thresholds = self.manifest.thresholds;
        let length_ms = u64::from(self.manifest.epoch_seconds) * 1_000;
        let due = epochs.early || self.time.since_ms(epochs.since) >= length_ms;
        let early_for = epochs.may_end_early_for(self.time).filter(|_| !due && epochs.attempt.is_none());
        let number = match &epochs.attempt {
            _ if epochs.since == Timestamp(0) => {
                // The first batch: the cluster's time begins.
                epochs.since = self.time;
                self.put(layout::EPOCHS.to_vec(), &epochs);
                return;
            }
            // Whoever sleeps through the epoch must be able to follow.
            _ if self.membership.unproved().is_some() => return,
            None if due || early_for.is_some() => epochs.last_attempt + 1,
            Some(attempt) if attempt.is_over(self.time, thresholds) => attempt.id.attempt + 1,
            _ => return,
        };
        epochs.give_up();
        if let Some(server) = early_for {
            epochs.early = true;
            epochs.early_for.retain(|_, last| self.time.since_ms(*last) < EARLY_INTERVAL_MS);
            epochs.early_for.insert(server, self.time);
            // Others may have asked before it and had their turn.
            epochs.waiting.retain(|waiting| *waiting != server);
            epochs.waiting.insert(0, server);
        }
        let recovering = (!epochs.waiting.is_empty()).then(|| epochs.waiting.remove(0));
        epochs.attempt = Some(Attempt {
            id: AttemptId { epoch: epochs.current.next(), attempt: number },
            began: self.time,
            renews: recovering.is_none() || number % 2 == 1,
            recovering,
            deals: BTreeMap::new(),
            acks: BTreeMap::new(),
            dealers: None,
            ready: BTreeMap::new(),
        });
        self.put(layout::EPOCHS.to_vec(), &epochs);
    }

    /// A server's step in an attempt.
    pub(super) fn step(
        &mut self,
        client: PublicKey,
        step: &Step,
        events: &mut Vec<Event>,
    ) -> Result<Done, Refusal> {
        let keys = layout::server_keys(&self.map, step.server()).ok_or(Refusal::NotAllowed)?;
        if keys.voting.statement.key != client {
            return Err(Refusal::NotAllowed);
        }
        let mut epochs = layout::epochs(&self.map).unwrap_or_default();
        epochs.check(&self.membership, step)?;
        let thresholds = self.manifest.thresholds;
        match (step, &mut epochs.attempt) {
            (Step::Deal { server, root, voting, sealing, .. }, Some(attempt)) => {
                attempt.deals.insert(*server, Deal { root: *root, voting: **voting, sealing: **sealing });
            }
            (Step::Ack { server, dealers, .. }, Some(attempt)) => {
                attempt.acks.insert(*server, dealers.clone());
                // Of k dealers at least one is honest as long as secrecy holds, and of f+1 as long as
                // ordering does; with q acks an honest server holds what each of them dealt.
                let held = |dealer: &ServerId| {
                    attempt.acks.values().filter(|acked| acked.contains(dealer)).count() >= thresholds.q()
                };
                let fixed: Vec<_> = attempt.deals.keys().copied().filter(held).collect();
                if fixed.len() >= thresholds.k().max(thresholds.f() + 1) {
                    attempt.dealers = Some(fixed);
                }
            }
            (Step::Ready { server, whole, .. }, Some(attempt)) => {
                attempt.ready.insert(*server, *whole);
                // Shares of a server that is replaced with this epoch are as good as gone.
                let stays = |server: &ServerId| !self.membership.is_replaced_with(*server, attempt.id.epoch);
                let whole = attempt.ready.iter().filter(|(server, whole)| **whole && stays(server)).count();
                let kept = whole >= thresholds.k() + thresholds.f() || !attempt.renews;
                if attempt.ready.len() >= thresholds.q() && kept {
                    let attempt = epochs.attempt.take().expect("it is the one that was matched");
                    if attempt.renews {
                        (epochs.current, epochs.since) = (attempt.id.epoch, self.time);
                        epochs.began = self.sequence;
                        (epochs.sealed, epochs.last_attempt) = (Some(attempt.clone()), 0);
                        epochs.early = false;
                        self.renew_epoch(&attempt);
                    } else {
                        epochs.last_attempt = attempt.id.attempt;
                    }
                    self.put(layout::EPOCHS.to_vec(), &epochs);
                    events.push(Event::Sealed(Box::new(attempt)));
                    return Ok(Done::Stepped);
                }
            }
            (Step::Recover { server }, _) => {
                epochs.waiting.push(*server);
                self.put(layout::EPOCHS.to_vec(), &epochs);
                self.advance_epochs();
                return Ok(Done::Stepped);
            }
            (_, None) => return Err(Refusal::EpochPassed { current: epochs.current }),
        }
        self.put(layout::EPOCHS.to_vec(), &epochs);
        Ok(Done::Stepped)
    }

    /// The epoch begins here, for everyone.
    fn renew_epoch(&mut self, attempt: &Attempt) {
        (self.attempt, self.began) = (attempt.id, self.sequence);
        for (server, deal) in &attempt.deals {
            let at = layout::server_key(*server);
            if let Some(keys) = layout::server_keys(&self.map, *server) {
                let Deal { voting, sealing, .. } = *deal;
                self.put(at, &super::ServerKeys { voting, sealing, ..keys });
            }
        }
        // The keys that open them are erased now.
        let sealed = self.map.iter_prefix(layout::SEALED_SHARES).map(|(key, _)| key.to_vec());
        for key in sealed.collect::<Vec<_>>() {
            self.delete_key(key);
        }
    }
}

impl Attempt {
    /// Whether it has taken so long that the next one begins. It does sooner where q servers are ready and too
    /// few of them whole: in the next one a server can recover.
    fn is_over(&self, now: Timestamp, thresholds: Thresholds) -> bool {
        let lacking = self.ready.len() >= thresholds.q() && self.ready.values().any(|whole| !whole);
        let patience_ms = if lacking { ATTEMPT_LACKING_MS } else { ATTEMPT_MS };
        now.since_ms(self.began) >= patience_ms * u64::from(self.id.attempt.min(6))
    }
}

#[cfg(test)]
pub(crate) mod tests;

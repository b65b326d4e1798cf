//! This server's part in agreeing on the next epoch, and in putting it in place (design §7).
//!
//! The log says how far an attempt is ([`Epochs`]); every step that this server takes follows from that
//! and from what it holds, so nothing has to be remembered but contributions and keys, which are in the
//! vault before anything that promises them is sent. While the epoch is agreed on the old shares stay
//! valid. Once it is sealed:
//!
//! - with everything that it needs, this server has its shares renewed, by one operation that is as
//!   durable as the batch that sealed the epoch;
//! - without, it goes on asking for [`DEALINGS_KEPT_MS`], and then empties its slots: what it has is worth nothing
//!   to anybody but a thief. It recovers its shares in a later epoch.
//!
//! Then contributions are erased; sealing keys of epochs that are over were erased at the seal.

use super::Replica;
use super::effects::{Accusation, Target, VaultKey, Write};
use crate::answer::Proved;
use crate::bytes::{Hash, SecretBlob, SecretBytes};
use crate::certificate::{Certificate, Checkpoint};
use crate::codec::{decode, encode_secret};
use crate::ids::{AttemptId, ClusterId, Epoch, ServerId, Timestamp};
use crate::limits::{
    ACK_DELAY_MS, DEALINGS_KEPT_AT_MOST_MS, DEALINGS_KEPT_MS, RETRANSMIT_MS, STEP_PATIENCE_MS,
};
use crate::membership::{Change, ChangeProof};
use crate::message::{HandedOut, PeerMessage, WantedDealing};
use crate::refresh::{Dealing, Seeds};
use crate::request::{Operation, SignedRequest, Step};
use crate::sealing::OpeningKey;
use crate::shares::{Helping, Renewal, ShareOp};
use crate::signing::{KeyCertificate, Statement as _, Verified, Voter};
use crate::state::{Attempt, Epochs, layout};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a server needs for an epoch, freshly drawn: the core has no randomness of its own.
#[derive(Debug)]
pub struct EpochKeys {
    /// For which attempt.
    pub attempt: AttemptId,
    /// Seed of the key that opens shares.
    pub opening: SecretBytes,
    /// What the server's identity says about that key.
    pub sealing: KeyCertificate,
    /// The key that it votes with.
    pub voter: Voter,
    /// What contributions are drawn from; used for nothing else.
    pub entropy: SecretBytes,
}

#[derive(Clone)]
struct Opening {
    key: Arc<OpeningKey>,
    sealing: KeyCertificate,
}

/// See the module.
#[derive(Clone, Default)]
pub(super) struct Renewing {
    openings: BTreeMap<Epoch, Opening>,
    /// Keys to vote with, in the current epoch and the next one.
    voters: BTreeMap<AttemptId, Voter>,
    entropy: Option<(AttemptId, SecretBytes)>,
    /// The last attempt that keys and randomness were drawn for.
    drawn: Option<AttemptId>,
    /// What dealers handed to this server, checked against their commitments; in the vault as soon as
    /// they are complete.
    dealings: BTreeMap<(AttemptId, ServerId), Dealing>,
    /// The last that each dealer handed out before its commitment was known here.
    early: BTreeMap<ServerId, (AttemptId, Dealing)>,
    /// Its own contributions until they are handed out, and what it commits to.
    own: Option<(AttemptId, Dealing, Hash)>,
    seeds: Option<Seeds>,
    /// The epoch that began last, until its contributions are erased.
    sealed: Option<Sealed>,
    /// The last attempt that led to an epoch and whose contributions are erased.
    erased: AttemptId,
    /// When each kind of step was asked for, and how much it said.
    asked_for: BTreeMap<&'static str, (Timestamp, usize)>,
    /// When something came in last, and when contributions were asked for last.
    received: Timestamp,
    fetched: Timestamp,
    /// When each peer was last given a dealer's contributions.
    given: BTreeMap<(ServerId, ServerId), Timestamp>,
    requests: u64,
    /// What is known of this server's shares.
    holding: Holding,
    /// Operations on shares since the start, and which of them was the last that may have left a gap.
    operations: u64,
    gap_since: u64,
}

/// How a server's shares are, as far as their keeper has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// The replica's operations on shares since its start that have been applied.
    pub applied: u64,
    /// Whether it has all shares that it should have.
    pub whole: bool,
    /// Whether it wants to recover some.
    pub lacks_shares: bool,
}

#[derive(Clone)]
struct Sealed {
    attempt: Attempt,
    at: Timestamp,
    /// When this server executed it, by its own clock.
    seen: Timestamp,
    seeds: Seeds,
    in_place: bool,
}

/// Whether contributions are to be erased, so long after a seal in agreed time and by a server's own clock.
fn is_over(agreed_ms: u64, own_ms: u64) -> bool {
    let both = agreed_ms >= DEALINGS_KEPT_MS && own_ms >= DEALINGS_KEPT_MS;
    both || agreed_ms >= DEALINGS_KEPT_AT_MOST_MS
}

impl Renewing {
    /// With what the vault holds.
    pub(super) fn new(boot: u64, vault: Vec<(VaultKey, SecretBlob)>) -> Self {
        let mut renewing = Self { requests: boot, ..Self::default() };
        for (key, value) in vault {
            // What does not decode is as good as lost: the server recovers.
            match key {
                VaultKey::Opening(epoch) => {
                    if let Ok((seed, sealing)) = decode::<(SecretBytes, KeyCertificate)>(value.expose()) {
                        let key = Arc::new(OpeningKey::derive(seed.expose()));
                        renewing.openings.insert(epoch, Opening { key, sealing });
                    }
                }
                VaultKey::Dealing(attempt, dealer) => {
                    if let Ok(dealing) = decode(value.expose()) {
                        renewing.dealings.insert((attempt, dealer), dealing);
                    }
                }
            }
        }
        renewing
    }
    pub(super) fn erased(&self) -> AttemptId {
        self.erased
    }
    /// The key that opens shares deposited in an epoch.
    pub(super) fn opening(&self, epoch: Epoch) -> Option<&OpeningKey> {
        self.openings.get(&epoch).map(|opening| &*opening.key)
    }
}

fn seal_vault<T: serde::Serialize>(value: &T) -> Option<SecretBlob> {
    Some(SecretBlob::new(encode_secret(value)))
}

/// The seeds of an attempt of the log.
fn seeds_of(cluster: ClusterId, thresholds: crate::Thresholds, attempt: &Attempt) -> Seeds {
    Seeds::new(cluster, thresholds, attempt.id, attempt.renews, attempt.recovering)
}

impl Replica {
    fn epochs(&self) -> Epochs {
        layout::epochs(self.state.map()).unwrap_or_default()
    }

    /// The attempt that this server needs keys and randomness for, if any: the one by which the epoch began, or
    /// one at the next that stands in the certified state, since nothing is certified for it before (design §7).
    pub(super) fn wants_keys(&self) -> Option<AttemptId> {
        let current = self.state.attempt();
        let opening = self.renewing.openings.get(&current.epoch);
        let opens = opening.is_some_and(|opening| opening.sealing.statement.attempt_id() == current);
        if !opens || self.voter.attempt() != current {
            return Some(current);
        }
        let next = layout::attempt_under_way(self.state.map())?;
        let drawn = self.renewing.drawn == Some(next);
        let certified = || self.certified_snapshot.as_ref().and_then(layout::attempt_under_way);
        (!drawn && self.may_vote() && certified() == Some(next)).then_some(next)
    }

    /// Votes with the key of the current epoch, if there is one, and casts the votes that waited for it.
    pub(super) fn take_up_voter(&mut self) {
        let current = self.state.attempt();
        self.renewing.voters = self.renewing.voters.split_off(&current);
        let Some(voter) = self.renewing.voters.remove(&current) else { return };
        // Before anything that is signed with it.
        self.pending.send(Target::All, PeerMessage::Keys(*voter.certificate()));
        self.voter = voter;
        let waiting = self.own_checkpoints.values().filter(|own| own.vote.is_none());
        let waiting: Vec<_> = waiting.map(|own| own.checkpoint).collect();
        for checkpoint in waiting {
            let vote = self.vote_for(checkpoint);
            if let Some(own) = self.own_checkpoints.get_mut(&checkpoint.sequence) {
                own.vote = vote;
            }
        }
        self.vote_where_missing();
    }

    /// Votes for a state that this replica has executed; not with a key of another epoch, which nobody
    /// would count.
    pub(super) fn vote_for(&mut self, checkpoint: Checkpoint) -> Option<Verified<Checkpoint>> {
        if self.voter.attempt() != checkpoint.attempt() {
            return None;
        }
        let vote = self.voter.sign(checkpoint);
        self.promise(&vote, PeerMessage::Checkpoint);
        self.boundary_vote(&vote);
        let _ = self.checkpoints.entry(checkpoint.sequence).or_default().add(vote.clone());
        Some(vote)
    }

    pub(super) fn on_keys(&mut self, keys: EpochKeys) {
        let EpochKeys { attempt, opening, sealing, voter, entropy } = keys;
        let epoch = attempt.epoch;
        let known = self.renewing.openings.get(&epoch).map(|known| known.sealing.statement.attempt_id());
        if self.wants_keys() != Some(attempt) {
            return;
        }
        self.renewing.voters.insert(attempt, voter);
        if known != Some(attempt) {
            // One that is known may be in the log already, and shares sealed to it.
            let value = seal_vault(&(&opening, &sealing));
            self.pending.write(Write::Vault { key: VaultKey::Opening(epoch), value });
            let key = Arc::new(OpeningKey::derive(opening.expose()));
            self.renewing.openings.insert(epoch, Opening { key, sealing });
        }
        self.renewing.entropy = Some((attempt, entropy));
        self.renewing.drawn = Some(attempt);
        self.take_up_voter();
        self.certify();
    }

    /// The keeper of the shares says how they are.
    pub(super) fn on_holding(&mut self, holding: Holding) {
        self.renewing.holding = holding;
    }

    /// Whether this server has all its shares. What was said before the last operation that may have left a
    /// gap does not count.
    fn is_whole(&self) -> bool {
        self.renewing.holding.whole && self.renewing.holding.applied >= self.renewing.gap_since
    }

    /// Has something happen to this server's shares.
    pub(super) fn change_shares(&mut self, operation: ShareOp) {
        self.renewing.operations += 1;
        let leaves_gap = match &operation {
            ShareOp::Store { share, .. } => share.is_none(),
            ShareOp::Renew(renewal) => renewal.terms.is_none(),
            ShareOp::Present { .. } => true,
            ShareOp::Erase { .. } | ShareOp::Help(..) | ShareOp::Recovered { .. } => false,
        };
        if leaves_gap {
            self.renewing.gap_since = self.renewing.operations;
        }
        self.pending.write(Write::Shares(operation));
    }

    /// Takes whatever step the log and what this server holds allow.
    pub(super) fn renew(&mut self, now: Timestamp) {
        let epochs = self.epochs();
        self.announce_keys(now);
        self.attest(now);
        match &epochs.attempt {
            Some(attempt) => self.take_part_in(now, attempt),
            None => self.renewing.seeds = None,
        }
        self.forget_attempts(&epochs);
        self.ask_for_recovery(now, &epochs);
        self.put_in_place();
        self.fetch_missing(now, &epochs);
        self.erase_dealings();
    }

    /// Asks for its shares; or, where it has forgotten votes, for the next epoch, in which they do not matter. One attempt
    /// gives both.
    fn ask_for_recovery(&mut self, now: Timestamp, epochs: &Epochs) {
        let underway = epochs.attempt.as_ref().and_then(|attempt| attempt.recovering);
        let asked = underway == Some(self.id) || epochs.waiting.contains(&self.id);
        let waits_for_epoch = self.waits_for_epoch() && epochs.attempt.is_none();
        // Nobody takes the step before the key that signs it is on record.
        let known = layout::server_keys(self.state.map(), self.id);
        let on_record = known.is_some_and(|keys| keys.voting == *self.voter.certificate());
        if (self.renewing.holding.lacks_shares || waits_for_epoch) && on_record && !asked {
            self.step(now, "recover", 0, Step::Recover { server: self.id });
        }
    }

    fn take_part_in(&mut self, now: Timestamp, attempt: &Attempt) {
        self.note_attempt(now, attempt);
        if self.renewing.seeds.as_ref().is_none_or(|seeds| seeds.attempt() != attempt.id) {
            self.renewing.seeds = Some(seeds_of(self.cluster, self.manifest.thresholds, attempt));
            self.renewing.asked_for.retain(|kind, _| *kind == "announce");
            self.renewing.received = now;
        }
        let Some(seeds) = self.renewing.seeds.clone() else { return };
        self.deal(now, attempt, &seeds);
        let early: Vec<_> =
            attempt.deals.keys().filter_map(|d| self.renewing.early.remove_entry(d)).collect();
        for (dealer, (id, dealing)) in early {
            self.keep_dealing(now, dealer, id, dealer, dealing);
        }
        let held = |dealer: &ServerId| self.holds(&seeds, *dealer);
        match &attempt.dealers {
            None => {
                let holding: Vec<_> = attempt.deals.keys().copied().filter(held).collect();
                let before = attempt.acks.get(&self.id).map_or(0, Vec::len);
                let everyone = holding.len() == self.manifest.thresholds.n();
                let waited = now.since_ms(self.renewing.received) >= ACK_DELAY_MS;
                if holding.len() > before && (everyone || waited) {
                    let size = holding.len();
                    let step = Step::Ack { server: self.id, attempt: attempt.id, dealers: holding };
                    self.step(now, "ack", size, step);
                }
            }
            Some(dealers) => {
                let (id, whole) = (self.id, self.is_whole());
                let said = attempt.ready.get(&id);
                if dealers.iter().all(held) && said.is_none_or(|before| whole && !before) {
                    let step = Step::Ready { server: id, attempt: attempt.id, whole };
                    self.step(now, "ready", usize::from(whole), step);
                }
            }
        }
    }

    /// Whether this server has all of a dealer's contributions that it may have. They are written in the
    /// same step, before anything that says so leaves.
    fn holds(&self, seeds: &Seeds, dealer: ServerId) -> bool {
        let dealing = self.renewing.dealings.get(&(seeds.attempt(), dealer));
        dealing.is_some_and(|dealing| seeds.is_complete(dealer, dealing, self.id))
    }

    /// Commits to contributions of its own; hands them out once the commitment is in the log.
    fn deal(&mut self, now: Timestamp, attempt: &Attempt, seeds: &Seeds) {
        let id = self.id;
        if let Some(deal) = attempt.deals.get(&id) {
            let dealt = self.renewing.dealings.contains_key(&(attempt.id, id));
            // Once: whoever gets nothing asks, and the vault has them.
            let own =
                self.renewing.own.take().filter(|(of, _, root)| *of == attempt.id && *root == deal.root);
            if let Some((_, own, _)) = own.filter(|_| !dealt) {
                for to in self.manifest.grid().servers().filter(|to| *to != id) {
                    let dealing = seeds.for_server(id, &own, to);
                    let handed = HandedOut { attempt: attempt.id, dealer: id, dealing };
                    self.pending.send(Target::One(to), PeerMessage::Dealing(Box::new(handed)));
                }
                self.keep_dealing(now, id, attempt.id, id, own);
            }
            return;
        }
        let opening = self.renewing.openings.get(&attempt.id.epoch);
        let opening = opening.filter(|opening| opening.sealing.statement.attempt_id() == attempt.id);
        let (Some(opening), None) = (opening, &attempt.dealers) else { return };
        let Some(voter) = self.renewing.voters.get(&attempt.id) else { return };
        let (voting, sealing) = (Box::new(*voter.certificate()), Box::new(opening.sealing));
        let root = match &self.renewing.own {
            Some((of, _, root)) if *of == attempt.id => *root,
            _ => {
                // Used once, and gone: what is drawn from it is secret for longer than it needs to be kept.
                let entropy = self.renewing.entropy.take_if(|(of, _)| *of == attempt.id);
                let Some((_, entropy)) = entropy else { return };
                let own = seeds.draw(id, &entropy);
                let Some(root) = seeds.root(id, &own) else { return };
                self.renewing.own = Some((attempt.id, own, root));
                root
            }
        };
        self.step(now, "deal", 0, Step::Deal { server: id, attempt: attempt.id, root, voting, sealing });
    }

    /// Asks for a step to be ordered, once what it promises is durable; again if nothing comes of it.
    fn step(&mut self, now: Timestamp, kind: &'static str, size: usize, step: Step) {
        self.own_request(now, kind, size, Operation::Step(step));
    }

    fn own_request(&mut self, now: Timestamp, kind: &'static str, size: usize, operation: Operation) {
        // To ask for help is no vote: whoever has forgotten votes may.
        let asks_for_help =
            matches!(operation, Operation::AnnounceKeys { .. } | Operation::Step(Step::Recover { .. }));
        let allowed = self.may_vote() || (asks_for_help && self.may_ask_for_help());
        if !allowed {
            return;
        }
        if let Some((asked, said)) = self.renewing.asked_for.get(kind)
            && *said == size
            && now.since_ms(*asked) < STEP_PATIENCE_MS
        {
            return;
        }
        self.renewing.asked_for.insert(kind, (now, size));
        self.renewing.requests = self.renewing.requests.wrapping_add(1);
        let (number, expiry) = (self.renewing.requests, now.max(self.state.time()).plus_ms(20_000));
        let signed = SignedRequest::sign(&self.cluster, self.voter.key(), number, expiry, operation);
        self.pending.request(signed.trusted(&self.cluster));
    }

    /// Has this server's keys put on record where they are not: at its first start, after it missed a
    /// deal, after it lost them.
    fn announce_keys(&mut self, now: Timestamp) {
        let Some(opening) = self.renewing.openings.get(&self.state.epoch()) else { return };
        if self.voter.attempt() != self.state.attempt() {
            return;
        }
        let (voting, sealing) = (*self.voter.certificate(), opening.sealing);
        let known = layout::server_keys(self.state.map(), self.id);
        // Agreed time 0 is before the first batch: whatever is announced then is announced too early.
        if self.state.time() != Timestamp(0)
            && known.is_none_or(|keys| keys.voting != voting || keys.sealing != sealing)
        {
            self.own_request(now, "announce", 0, Operation::AnnounceKeys { voting, sealing });
        }
    }

    /// Puts on record what shows a change of the membership, as soon as the state that has it is certified.
    fn attest(&mut self, now: Timestamp) {
        let Some(Change { number, from, .. }) = self.state.membership().unproved() else { return };
        let (number, from) = (*number, *from);
        let certified = self.certificate.as_ref().zip(self.certified_snapshot.as_ref());
        let Some((certificate, snapshot)) = certified else { return };
        let change = Proved::<Change>::look_up(snapshot, &layout::change_key(number));
        if change.value.is_some() && certificate.statement.epoch.next() == from {
            let proof = Box::new(ChangeProof { change, certificate: Certificate::clone(certificate) });
            self.own_request(now, "attest", 0, Operation::Attest { server: self.id, proof });
        }
    }

    /// A dealer's contributions, from the dealer or from another server that holds them.
    pub(super) fn on_dealing(&mut self, now: Timestamp, from: ServerId, handed: HandedOut) {
        let HandedOut { attempt, dealer, dealing } = handed;
        self.keep_dealing(now, from, attempt, dealer, dealing);
    }

    fn keep_dealing(
        &mut self,
        now: Timestamp,
        from: ServerId,
        attempt: AttemptId,
        dealer: ServerId,
        dealing: Dealing,
    ) {
        let sealed = self.renewing.sealed.as_ref().filter(|sealed| sealed.attempt.id == attempt);
        let (seeds, deal) = match (sealed, self.epochs().attempt, &self.renewing.seeds) {
            (Some(sealed), ..) => (sealed.seeds.clone(), sealed.attempt.deals.get(&dealer).copied()),
            (None, Some(current), Some(seeds)) if current.id == attempt && seeds.attempt() == attempt => {
                (seeds.clone(), current.deals.get(&dealer).copied())
            }
            _ => {
                if from == dealer && attempt.epoch == self.state.epoch().next() {
                    self.renewing.early.insert(dealer, (attempt, dealing));
                }
                return;
            }
        };
        let Some(deal) = deal else {
            if from == dealer {
                self.renewing.early.insert(dealer, (attempt, dealing));
            }
            return;
        };
        if self.holds(&seeds, dealer) {
            return;
        }
        if seeds.root(dealer, &dealing) != Some(deal.root) {
            self.pending.accuse(Accusation::WrongDealing { server: from, dealer });
            return;
        }
        // What it must not know it does not keep, whoever sent it.
        let dealing = seeds.for_server(dealer, &dealing, self.id);
        let kept = match self.renewing.dealings.remove(&(attempt, dealer)) {
            Some(mut known) => {
                known.merge(dealing);
                known
            }
            None => dealing,
        };
        if seeds.is_complete(dealer, &kept, self.id) {
            let key = VaultKey::Dealing(attempt, dealer);
            self.pending.write(Write::Vault { key, value: seal_vault(&kept) });
            self.renewing.received = now;
        }
        self.renewing.dealings.insert((attempt, dealer), kept);
    }

    /// Asks for what is missing: the dealer first, then everyone who may have it.
    fn fetch_missing(&mut self, now: Timestamp, epochs: &Epochs) {
        if now.since_ms(self.renewing.fetched) < RETRANSMIT_MS
            || now.since_ms(self.renewing.received) < RETRANSMIT_MS
        {
            return;
        }
        let mut missing = Vec::new();
        let sealed = self.renewing.sealed.as_ref().filter(|sealed| !sealed.in_place);
        if let Some(sealed) = sealed {
            let dealers = sealed.attempt.dealers.iter().flatten();
            let lacked = dealers.filter(|dealer| !self.holds(&sealed.seeds, **dealer));
            missing.extend(lacked.map(|dealer| (sealed.attempt.id, *dealer, true)));
        }
        if let (Some(attempt), Some(seeds)) = (&epochs.attempt, &self.renewing.seeds) {
            let fixed = attempt.dealers.as_ref();
            let wanted =
                attempt.deals.keys().filter(|dealer| fixed.is_none_or(|fixed| fixed.contains(dealer)));
            let lacked = wanted.filter(|dealer| !self.holds(seeds, **dealer));
            missing.extend(lacked.map(|dealer| (attempt.id, *dealer, fixed.is_some())));
        }
        if missing.is_empty() {
            return;
        }
        self.renewing.fetched = now;
        for (attempt, dealer, ask_all) in missing {
            for peer in self.manifest.grid().servers().filter(|peer| *peer != self.id) {
                if ask_all || peer == dealer {
                    let wanted = WantedDealing { attempt, dealer };
                    self.pending.send(Target::One(peer), PeerMessage::AskDealing(wanted));
                }
            }
        }
    }

    /// Gives a peer what it may know of a dealer's contributions.
    pub(super) fn on_ask_dealing(&mut self, now: Timestamp, from: ServerId, wanted: WantedDealing) {
        let WantedDealing { attempt, dealer } = wanted;
        let sealed = self.renewing.sealed.as_ref().filter(|sealed| sealed.attempt.id == attempt);
        let seeds = sealed.map(|sealed| &sealed.seeds).or(self.renewing.seeds.as_ref());
        let Some(seeds) = seeds.filter(|seeds| seeds.attempt() == attempt) else { return };
        let Some(dealing) = self.renewing.dealings.get(&(attempt, dealer)) else { return };
        let again = self
            .renewing
            .given
            .get(&(from, dealer))
            .is_some_and(|given| now.since_ms(*given) < RETRANSMIT_MS / 2);
        if !again {
            let dealing = seeds.for_server(dealer, dealing, from);
            let handed = HandedOut { attempt, dealer, dealing };
            self.renewing.given.insert((from, dealer), now);
            self.pending.send(Target::One(from), PeerMessage::Dealing(Box::new(handed)));
        }
    }

    /// The log has sealed an epoch.
    pub(super) fn on_sealed(&mut self, attempt: &Attempt) {
        // If the one before is still not in place it is too late for it.
        self.give_up_renewal();
        let seeds = seeds_of(self.cluster, self.manifest.thresholds, attempt);
        let at = self.state.time();
        let seen = self.now;
        self.renewing.sealed = Some(Sealed { attempt: attempt.clone(), at, seen, seeds, in_place: false });
        let current = self.state.epoch();
        let over: Vec<_> = self.renewing.openings.range(..current).map(|(epoch, _)| *epoch).collect();
        for epoch in over {
            self.renewing.openings.remove(&epoch);
            self.pending.write(Write::Vault { key: VaultKey::Opening(epoch), value: None });
        }
        self.take_up_voter();
        self.put_in_place();
    }

    /// After a start or a state transfer: the state says which epoch was sealed last, and by what.
    pub(super) fn resume_renewal(&mut self) {
        let epochs = self.epochs();
        self.renewing.sealed = None;
        if let Some(attempt) = epochs.sealed {
            self.on_sealed(&attempt);
            if let Some(sealed) = &mut self.renewing.sealed {
                sealed.at = epochs.since;
            }
        }
    }

    /// Has the shares renewed, as soon as everything is there.
    fn put_in_place(&mut self) {
        let Some(sealed) = self.renewing.sealed.as_mut().filter(|sealed| !sealed.in_place) else { return };
        let id = sealed.attempt.id;
        let dealings = &self.renewing.dealings;
        let dealers = sealed.attempt.dealers.iter().flatten();
        let held = dealers.map(|dealer| Some((*dealer, dealings.get(&(id, *dealer))?)));
        let Some(held) = held.collect::<Option<Vec<_>>>() else { return };
        let Some(terms) = sealed.seeds.zero_sharing(self.id, &held) else { return };
        let masks = sealed.seeds.masks(self.id, &held);
        let recovering = sealed.attempt.recovering.map(|server| Helping { server, attempt: id, masks });
        sealed.in_place = true;
        match (sealed.attempt.renews, recovering) {
            (true, recovering) => {
                let terms = Some(terms);
                self.change_shares(ShareOp::Renew(Renewal { to: id.epoch, terms, recovering }));
            }
            (false, Some(helping)) => self.change_shares(ShareOp::Help(self.state.epoch(), helping)),
            (false, None) => {}
        }
    }

    /// Empties the slots of an epoch whose seeds this server does not have.
    fn give_up_renewal(&mut self) {
        let late = self.renewing.sealed.take().filter(|sealed| !sealed.in_place && sealed.attempt.renews);
        if let Some(Sealed { attempt, .. }) = late {
            let helping = |server| Helping { server, attempt: attempt.id, masks: None };
            let (to, recovering) = (attempt.id.epoch, attempt.recovering.map(helping));
            self.change_shares(ShareOp::Renew(Renewal { to, terms: None, recovering }));
        }
    }

    /// Some time after a seal nobody is given contributions any more.
    fn erase_dealings(&mut self) {
        let (time, now) = (self.state.time(), self.now);
        let over = |sealed: &Sealed| is_over(time.since_ms(sealed.at), now.since_ms(sealed.seen));
        if let Some(sealed) = self.renewing.sealed.as_ref().filter(|sealed| over(sealed)) {
            let attempt = sealed.attempt.id;
            self.give_up_renewal();
            self.erase_dealings_of(|id| id <= attempt);
            self.renewing.erased = attempt;
        }
    }

    /// Attempts that are over need no contributions, unless they led to the last seal.
    fn forget_attempts(&mut self, epochs: &Epochs) {
        let current = epochs.attempt.as_ref().map(|attempt| attempt.id);
        let sealed = self.renewing.sealed.as_ref().map(|sealed| sealed.attempt.id);
        self.erase_dealings_of(|id| Some(id) != sealed && Some(id) < current);
        self.renewing.early.retain(|_, (id, _)| Some(*id) >= current);
        self.renewing.own.take_if(|(id, ..)| Some(*id) != current);
        self.renewing.entropy.take_if(|(attempt, _)| attempt.epoch <= epochs.current);
    }

    fn erase_dealings_of(&mut self, over: impl Fn(AttemptId) -> bool) {
        let gone: Vec<_> = self.renewing.dealings.keys().copied().filter(|(id, _)| over(*id)).collect();
        for (id, dealer) in gone {
            self.renewing.dealings.remove(&(id, dealer));
            self.renewing.given.retain(|(_, of), _| *of != dealer);
            self.pending.write(Write::Vault { key: VaultKey::Dealing(id, dealer), value: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::LEAP_MS;

    /// A primary can take agreed time forward by [`LEAP_MS`] in one batch: a server that lacks contributions at the
    /// seal is given its two seconds all the same. And a clock that was set back keeps them no longer than need be.
    #[test]
    fn no_leap_of_agreed_time_ends_the_time_for_contributions() {
        assert!(!is_over(LEAP_MS, 100) && !is_over(LEAP_MS + 500, DEALINGS_KEPT_MS - 1));
        assert!(!is_over(DEALINGS_KEPT_MS - 1, 60_000));
        assert!(is_over(DEALINGS_KEPT_MS, DEALINGS_KEPT_MS));
        assert!(is_over(DEALINGS_KEPT_AT_MOST_MS, 0));
    }
}

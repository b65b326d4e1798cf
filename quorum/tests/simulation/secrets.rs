//! Secrets in the simulated cluster: deposits, epochs that renew everything, and at the end every secret
//! put together again.

use crate::cluster::{Event, Simulation};
use crate::patient::Patience;
use quorum::answer::Proved;
use quorum::bytes::{Blob, Hash, PublicKey, SecretBytes};
use quorum::certificate::Certificate;
use quorum::ids::{AttemptId, Epoch, ServerId, Timestamp};
use quorum::limits::{DEALINGS_KEPT_AT_MOST_MS, EARLY_EPOCH_MS};
use quorum::membership::Membership;
use quorum::message::{CheckedMessage, PeerMessage};
use quorum::ordering::{EpochKeys, Holding, Input, Part, Published, Target, VaultKey, Write};
use quorum::record::Name;
use quorum::refresh::Field;
use quorum::request::{
    Deposit, Done, Hardness, Operation, Outcome, Passphrase, Refusal, Request, RequestId, SignedRequest, Step,
};
use quorum::sealing::{OpeningKey, ShareContext};
use quorum::shamir::{ServerShare, deal, reconstruct};
use quorum::signer::Ask;
use quorum::signing::{KeyCertificate, KeyPurpose, KeyStatement, SigningKey, Statement as _, Voter};
use quorum::state::{Epochs, data_key_commitment, layout};
use quorum::{oprf, scalars};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Epochs that must follow each other once everything is healed.
const EPOCHS_AFTER_HEALING: u64 = 4;

/// Epochs of this length do not end in time: only early.
pub(crate) const LONG_EPOCH_SECONDS: u32 = 30;
/// How soon after its start a server that forgot everything votes and has its shares, on a good network; and so much for
/// itself and each other one that forgot, since one at a time gets its shares.
pub(crate) const BACK_MS: u64 = 4_000;
pub(crate) const BACK_IN_TURN_MS: u64 = 7_000;

/// Every third secret.
fn behind_passphrase(which: usize) -> bool {
    which % 3 == 2
}
fn passphrase(key: &[u8; 32]) -> Passphrase {
    let key = oprf::public_half(&scalars::decode(key).unwrap());
    let hardness = Hardness { memory_kib: 64, passes: 1, lanes: 1 };
    let opener = SigningKey::from_seed(&[201; 32]).public();
    Passphrase { salt: [0; 16], hardness, key, opener, guesses: 10 }
}

#[derive(Default)]
pub struct Secrets {
    deposits: Vec<Deposited>,
    requests: BTreeMap<RequestId, usize>,
    pub healed_in: Epoch,
    /// Shares that were recovered.
    pub recovered: usize,
    /// Until when servers that were restored have to vote and to have their shares.
    pub(crate) back_by: BTreeMap<ServerId, Timestamp>,
    /// When each epoch began, in agreed time, as far as somebody published it.
    began: BTreeMap<Epoch, Timestamp>,
    /// Epochs that ended before they had had their length.
    pub early: usize,
}

struct Deposited {
    /// Of a secret behind a passphrase: the key of the function.
    data_key: [u8; 32],
    index: Option<u64>,
}

impl Simulation {
    pub(crate) fn schedule_deposits(&mut self) {
        for i in 0..self.faults.secrets {
            // A scalar, so that it can be shared in either way.
            let data_key = scalars::draw(&mut self.rng).to_bytes();
            self.secrets.deposits.push(Deposited { data_key, index: None });
            let at = self.rng.random_range(500..9_000);
            self.schedule(at, Event::Deposit(i));
        }
    }

    /// The latest epoch that any honest server has published.
    pub fn epoch(&self) -> Epoch {
        let published = self.honest().filter_map(|server| server.published.as_ref());
        published.map(|published| published.certificate.statement.epoch).max().unwrap_or_default()
    }

    pub(crate) fn deposit(&mut self, which: usize) {
        if self.secrets.deposits[which].index.is_some() {
            return;
        }
        let again = self.rng.random_range(300..1_500);
        self.schedule(again, Event::Deposit(which));
        let gateway = ServerId(self.rng.random_range(0..self.voters.len()) as u8);
        if self.is_liar(gateway) {
            return;
        }
        let server = &self.servers[gateway.index()];
        let (Some(published), Some(_)) = (&server.published, &server.replica) else { return };
        let epoch = published.certificate.statement.epoch;
        let keys: Vec<_> = (0..self.voters.len())
            .map(|i| layout::server_keys(&published.snapshot, ServerId(i as u8)))
            .map(|keys| keys.map(|keys| keys.sealing.statement).filter(|key| key.epoch == epoch))
            .collect();
        // As the client library does.
        if keys.iter().flatten().count() < self.manifest.thresholds.q() {
            return;
        }
        let (k, n) = (self.manifest.thresholds.k(), self.voters.len());
        let depositor = SigningKey::from_seed(&[200; 32]);
        let number = self.rng.random::<u64>();
        let data_key = self.secrets.deposits[which].data_key;
        let mut rng = StdRng::seed_from_u64(number);
        let mut deposit = Deposit {
            name: Name::new(format!("secret-{which}")).unwrap(),
            owner: depositor.public(),
            readers: vec![],
            passphrase: behind_passphrase(which).then(|| passphrase(&data_key)),
            replaces: None,
            epoch,
            ciphertext: Blob(vec![which as u8; 40]),
            commitment: data_key_commitment(&self.cluster, &data_key),
            shares: vec![],
        };
        let shares = match behind_passphrase(which) {
            false => deal(&data_key, k, n, &mut rng),
            true => scalars::deal(&scalars::decode(&data_key).unwrap(), k, n, &mut rng),
        };
        for (i, share) in shares.iter().enumerate() {
            let context = ShareContext::of(&deposit, ServerId(i as u8), depositor.public(), number);
            let sealed = keys[i].map(|key| context.seal(&self.cluster, &key.key, share, &mut rng).unwrap());
            deposit.shares.push(sealed.unwrap_or_default());
        }
        let expiry = self.now.plus_ms(10_000);
        let operation = Operation::Deposit(deposit);
        let request = SignedRequest::sign(&self.cluster, &depositor, number, expiry, operation);
        let request = request.verify(&self.cluster).unwrap();
        self.secrets.requests.insert(request.id(), which);
        self.step(gateway, Input::Request(request));
    }

    pub(crate) fn acknowledge_deposit(&mut self, id: ServerId, request: RequestId) {
        let Some(which) = self.secrets.requests.get(&request) else { return };
        // It may have started again since.
        let Some(published) = &self.servers[id.index()].published else { return };
        let Some(reply) = layout::reply(&published.snapshot, request) else { return };
        let deposited = &mut self.secrets.deposits[*which];
        match reply.outcome {
            Outcome::Done(Done::Deposited { index }) | Outcome::Refused(Refusal::SecretTaken { index }) => {
                deposited.index = Some(index)
            }
            // Sealed anew with the next try.
            Outcome::Refused(Refusal::EpochPassed { .. }) => {}
            other => panic!("seed {}: a deposit came to {other:?}", self.seed),
        }
    }

    /// What a step promises to hold is durable before it leaves.
    pub(crate) fn check_step(&self, id: ServerId, request: &Request) {
        let server = &self.servers[id.index()];
        // Once the attempt is over, what it promised to hold is erased.
        let epochs = server.replica.as_ref().and_then(|r| layout::epochs(r.state().map()));
        let Some(current) = epochs.and_then(|epochs| epochs.attempt) else { return };
        let holds = |attempt: AttemptId, dealer: &ServerId| {
            let held = server.disk.vault.contains_key(&VaultKey::Dealing(attempt, *dealer));
            assert!(held, "seed {}: {id} promises to hold what {dealer} dealt, and does not", self.seed);
        };
        match &request.operation {
            Operation::Step(Step::Deal { attempt, .. }) if *attempt == current.id => {
                let opens = server.disk.vault.contains_key(&VaultKey::Opening(attempt.epoch));
                assert!(opens, "seed {}: {id} announces a key that it may forget", self.seed);
            }
            Operation::Step(Step::Ack { attempt, dealers, .. }) if *attempt == current.id => {
                dealers.iter().for_each(|dealer| holds(*attempt, dealer))
            }
            Operation::Step(Step::Ready { attempt, .. }) if *attempt == current.id => {
                current.dealers.iter().flatten().for_each(|dealer| holds(*attempt, dealer));
            }
            _ => {}
        }
    }

    /// The key that a server votes with at its start: drawn for this start, for the epoch of its last
    /// certificate, or a later one that its signer knows of.
    pub(crate) fn boot_voter(
        &mut self,
        id: ServerId,
        certificate: Option<&Certificate>,
        membership: &Membership,
    ) -> Voter {
        let attempt =
            certificate.map_or_else(AttemptId::default, |certificate| certificate.statement.attempt());
        let since = AttemptId { epoch: membership.since(self.identity(id)), attempt: 0 };
        self.drawn_voter(id, attempt.max(since), (certificate.cloned(), None), vec![], membership).0
    }

    /// Has a server's signer certify a new voting key, and others.
    fn drawn_voter(
        &mut self,
        id: ServerId,
        attempt: AttemptId,
        (evidence, coming): (Option<Certificate>, Option<Proved<Epochs>>),
        more: Vec<(KeyPurpose, PublicKey)>,
        membership: &Membership,
    ) -> (Voter, Vec<KeyCertificate>) {
        let own = self.identity(id);
        let key = SigningKey::generate(&mut self.rng);
        let mut keys = vec![(KeyPurpose::Voting, key.public())];
        keys.extend(more);
        let signer = self.signers.get_mut(&own).expect("every server has one");
        // Durable before the signer is asked. (A twin shares its signer.)
        let number = self.servers[id.index()].disk.voting_key.max(signer.counter().voting) + 1;
        self.servers[id.index()].disk.apply(&Write::VotingKey(number));
        let changes = membership.proofs().to_vec();
        let certified = signer.certify(&Ask { keys, number, attempt, evidence, coming, changes });
        let (_, mut certified) =
            certified.unwrap_or_else(|e| panic!("seed {}: {id}'s signer says that {e}", self.seed));
        let voter = Voter::new(self.cluster, key, certified.remove(0)).unwrap();
        let drawn = self.drawn.entry(id).or_default();
        drawn.push(voter.clone());
        drawn.drain(..drawn.len().saturating_sub(40));
        (voter, certified)
    }

    /// The key that a node votes with now.
    pub(crate) fn voter(&self, id: ServerId) -> Voter {
        let voting = self.in_use.get(&id).and_then(|in_use| in_use.last());
        let mut drawn = self.drawn.get(&id).into_iter().flatten();
        let known = drawn.find(|voter| Some(voter.certificate()) == voting);
        known.unwrap_or(&self.voters[self.identity(id).index()]).clone()
    }

    /// The keys that a server's links begin with.
    pub(crate) fn hello(&self, from: ServerId) -> impl Iterator<Item = KeyCertificate> + use<> {
        let twin = ServerId(self.voters.len() as u8);
        let nodes = [Some(from), (self.faults.twins && from == ServerId(0)).then_some(twin)];
        let in_use = nodes.into_iter().flatten().filter_map(|node| self.in_use.get(&node)).flatten();
        in_use.copied().collect::<Vec<_>>().into_iter()
    }

    /// Shows a server's signer that an epoch has begun, as soon as a certificate does.
    fn tell_signer(&mut self, id: ServerId) {
        let Some(replica) = &self.servers[id.index()].replica else { return };
        let own = self.identity(id);
        let signer = self.signers.get_mut(&own).expect("every server has one");
        let last = replica.certificate().filter(|last| last.statement.attempt() > signer.counter().begun);
        if let Some(last) = last {
            let (attempt, evidence) = (last.statement.attempt(), Some(last.as_ref().clone()));
            let changes = replica.membership().proofs().to_vec();
            let (keys, number, coming) = (vec![], 0, None);
            let told = signer.certify(&Ask { keys, number, attempt, evidence, coming, changes });
            told.unwrap_or_else(|e| panic!("seed {}: {id}'s signer says that {e}", self.seed));
        }
    }

    /// What a server's shell does beside its replica: draws keys, keeps shares.
    pub(crate) fn keeper_ticks(&mut self, id: ServerId) {
        self.tell_signer(id);
        let Some(replica) = &self.servers[id.index()].replica else { return };
        let wanted = replica.status().wants_keys;
        // With the state that it is about, where that is published; a server that may not vote publishes none.
        let last = replica.certificate().map(|certificate| certificate.as_ref().clone());
        let published = self.servers[id.index()].published.as_ref();
        let published = published.filter(|published| Some(published.certificate.as_ref()) == last.as_ref());
        let coming = published.map(|published| Proved::look_up(&published.snapshot, layout::EPOCHS));
        let membership = Arc::clone(replica.membership());
        let shown = (last, coming);
        if let Some(attempt) = wanted.filter(|attempt| self.may_be_certified(id, *attempt, &shown)) {
            let mut draw = || {
                let mut bytes = [0; 32];
                self.rng.fill_bytes(&mut bytes);
                SecretBytes::new(&bytes)
            };
            let (opening, entropy) = (draw(), draw());
            let key = OpeningKey::derive(opening.expose()).public();
            let more = vec![(KeyPurpose::Sealing, key)];
            let (voter, certified) = self.drawn_voter(id, attempt, shown, more, &membership);
            let keys = EpochKeys { attempt: voter.attempt(), opening, sealing: certified[0], voter, entropy };
            self.step(id, Input::Keys(keys));
        }
        let server = &mut self.servers[id.index()];
        let kept = server.keeper.tick(self.now, &server.disk.shares);
        let lacks_shares = server.keeper.lacks_shares(&server.disk.shares);
        let whole = server.disk.shares.is_whole();
        let holding = Holding { applied: server.operations, whole, lacks_shares };
        self.kept(id, kept);
        self.step(id, Input::Holding(holding));
    }

    /// A server that was restored is back within seconds, also where nothing else happens (design §7).
    pub(crate) fn check_back(&mut self, id: ServerId) {
        let Some(by) = self.secrets.back_by.get(&id).copied() else { return };
        let server = &self.servers[id.index()];
        let Some(replica) = &server.replica else { return };
        let (status, shares) = (replica.status(), &server.disk.shares);
        let counts = shares.counts();
        // Whoever does not deal has no key for a moment when an epoch begins, and lacks what is deposited then.
        let lately = replica.state().map().iter_prefix(layout::SEALED_SHARES).count() as u64;
        let has_shares =
            counts.secrets <= counts.shares + counts.excused + lately && shares.epoch() == status.epoch;
        if status.part == Part::Voting && has_shares && status.executed >= status.target {
            self.secrets.back_by.remove(&id);
        }
        let (seed, part) = (self.seed, status.part);
        assert!(self.now <= by, "seed {seed}: {id} is not back in time: {part:?}, {shares:?}");
    }

    /// No epoch is shorter than it may be, whoever asks for the next one.
    pub(crate) fn check_epoch(&mut self, published: &Published) {
        let epoch = published.certificate.statement.epoch;
        if self.secrets.began.contains_key(&epoch) {
            return;
        }
        let epochs = layout::epochs(&published.snapshot).expect("there are epochs");
        self.secrets.began.insert(epoch, epochs.since);
        let before = epoch.0.checked_sub(1).and_then(|before| self.secrets.began.get(&Epoch(before)));
        // The cluster's time begins with its first batch.
        let Some(before) = before.filter(|before| before.0 > 0) else { return };
        let (lasted_ms, length_ms) =
            (epochs.since.since_ms(*before), u64::from(self.faults.epoch_seconds) * 1_000);
        self.secrets.early += usize::from(lasted_ms < length_ms);
        let least_ms = EARLY_EPOCH_MS.min(length_ms);
        assert!(lasted_ms >= least_ms, "seed {}: epoch {epoch} came after {lasted_ms} ms", self.seed);
        let most = self.voters.len();
        assert!(self.secrets.early <= most, "seed {}: {} epochs ended early", self.seed, self.secrets.early);
    }

    /// Whether a server's signer can certify keys for an attempt: not before somebody has shown it. The server
    /// waits for a certificate then.
    fn may_be_certified(
        &self,
        id: ServerId,
        attempt: AttemptId,
        (evidence, coming): &(Option<Certificate>, Option<Proved<Epochs>>),
    ) -> bool {
        let begun = evidence.as_ref().map_or(Epoch(0), |evidence| evidence.statement.epoch);
        let under_way = coming.as_ref().and_then(|shown| shown.value.as_ref()?.attempt.as_ref());
        let begun = begun.max(self.signers[&self.identity(id)].counter().begun.epoch);
        attempt.epoch <= begun || under_way.is_some_and(|under_way| under_way.id == attempt)
    }

    /// Steps that no honest server takes: it acknowledges what it does not hold, is ready without anything,
    /// commits to what it never deals, wants shares that it has.
    pub(crate) fn lie_about_epochs(&mut self, id: ServerId) {
        let Some(replica) = &self.servers[id.index()].replica else { return };
        if self.faults.patient == Some(Patience::AsksForEpochs) {
            return self.take_step(id, Step::Recover { server: self.identity(id) });
        }
        let Some(attempt) = layout::epochs(replica.state().map()).and_then(|epochs| epochs.attempt) else {
            return;
        };
        if self.faults.secrets == 0 || !self.rng.random_bool(0.3) {
            return;
        }
        let server = self.identity(id);
        let step = match self.rng.random_range(0..4) {
            0 => Step::Ack { server, attempt: attempt.id, dealers: attempt.deals.keys().copied().collect() },
            1 => Step::Ready { server, attempt: attempt.id, whole: true },
            2 => Step::Recover { server },
            _ => {
                let identity = SigningKey::from_seed(&[server.0 + 1; 32]);
                let AttemptId { epoch, attempt: number } = attempt.id;
                let (purpose, serial) = (KeyPurpose::Sealing, self.rng.random());
                let key = OpeningKey::derive(&[server.0; 32]).public();
                let statement = KeyStatement { server, purpose, epoch, attempt: number, serial, key };
                let sealing = KeyCertificate::issue(&self.cluster, &identity, statement);
                let root = Hash([self.rng.random(); 32]);
                let voting =
                    *Voter::generate(self.cluster, &identity, server, attempt.id, serial, &mut self.rng)
                        .certificate();
                Step::Deal {
                    server,
                    attempt: attempt.id,
                    root,
                    voting: Box::new(voting),
                    sealing: Box::new(sealing),
                }
            }
        };
        self.take_step(id, step);
    }

    fn take_step(&mut self, id: ServerId, step: Step) {
        let (number, expiry, voter) = (self.rng.random(), self.now.plus_ms(5_000), self.voter(id));
        let request = SignedRequest::sign(&self.cluster, voter.key(), number, expiry, Operation::Step(step));
        let forward = Arc::new(PeerMessage::Forward(Box::new(request)));
        self.send_out(id, vec![(Target::All, forward)]);
    }

    pub(crate) fn keeper_hears(&mut self, id: ServerId, from: ServerId, message: CheckedMessage) {
        let server = &mut self.servers[id.index()];
        match message {
            CheckedMessage::AskMasked(ask) => {
                let answer = server.keeper.on_ask(from, &ask, &server.disk.shares);
                let answer = answer.map(|answer| (Target::One(from), Arc::new(answer)));
                self.send_out(id, answer.into_iter().collect());
            }
            CheckedMessage::Masked(masked) => {
                let kept = server.keeper.on_masked(from, masked);
                self.kept(id, kept);
            }
            _ => unreachable!("only these are for the keeper"),
        }
    }

    fn kept(&mut self, id: ServerId, kept: quorum::recovery::Kept) {
        if let Some(recovered) = &kept.recovered {
            let before = self.servers[id.index()].disk.shares.counts().shares;
            self.servers[id.index()].disk.shares.apply(recovered);
            let after = self.servers[id.index()].disk.shares.counts().shares;
            self.secrets.recovered += (after - before) as usize;
        }
        let liars = !self.liars.is_empty();
        assert!(kept.wrong.is_empty() || liars, "seed {}: {id} accuses {:?}", self.seed, kept.wrong);
        let messages = kept.messages.into_iter().map(|(to, message)| (Target::One(to), Arc::new(message)));
        self.send_out(id, messages.collect());
    }

    /// Some k shares give the key; all do, unless liars had a server recover wrong ones.
    fn function_is_kept(&self, index: u64, key: &[u8; 32], shares: &[ServerShare]) {
        let point = |share: &ServerShare| (share.server.share_index(), *share.share);
        let points: Vec<_> = shares.iter().map(point).collect();
        let k = self.manifest.thresholds.k();
        let gives = |chosen: &[usize]| {
            let chosen: Vec<_> = chosen.iter().map(|i| (points[*i].0, &points[*i].1)).collect();
            scalars::interpolate(&chosen, 0).expose() == key
        };
        let mut subset: Vec<usize> = (0..k).collect();
        let mut right = vec![gives(&subset)];
        // The next k-subset, in lexicographic order.
        while let Some(at) = (0..k).rev().find(|&i| subset[i] < points.len() - k + i) {
            subset[at] += 1;
            (at + 1..k).for_each(|i| subset[i] = subset[i - 1] + 1);
            right.push(gives(&subset));
        }
        let (any, all) = (right.contains(&true), !right.contains(&false));
        assert!(any, "seed {}: the key of secret {index} is lost", self.seed);
        let excused = self.liars.len() >= self.manifest.thresholds.f() && !self.liars.is_empty();
        assert!(all || excused, "seed {}: wrong shares of secret {index}", self.seed);
    }

    /// Epochs go on, every server that takes part has its shares, and any k of them give every secret.
    pub(crate) fn secrets_are_kept(&self) -> bool {
        if self.faults.secrets == 0 {
            return true;
        }
        let deposited = self.secrets.deposits.iter().all(|deposited| deposited.index.is_some());
        let long = self.faults.epoch_seconds >= LONG_EPOCH_SECONDS;
        let epochs = if long { 0 } else { EPOCHS_AFTER_HEALING };
        if !deposited || self.epoch().0 < self.secrets.healed_in.0 + epochs {
            return false;
        }
        let epoch = self.epoch();
        let (mut rng, mut all_there) = (StdRng::seed_from_u64(self.seed), true);
        let thresholds = self.manifest.thresholds;
        let taking_part = |i: &usize| {
            let server = &self.servers[*i];
            let part = server.replica.as_ref().map(|replica| replica.status().part);
            !self.is_liar(ServerId(*i as u8)) && part == Some(Part::Voting)
        };
        let servers: Vec<_> = (0..self.voters.len()).filter(taking_part).collect();
        for i in &servers {
            // Nothing of an epoch that is over is left: no key, no contribution.
            let replica = self.servers[*i].replica.as_ref().expect("it takes part");
            let epochs = layout::epochs(replica.state().map()).expect("there are epochs");
            let lately = replica.state().time().since_ms(epochs.since) <= DEALINGS_KEPT_AT_MOST_MS;
            for key in self.servers[*i].disk.vault.keys() {
                let old = match key {
                    VaultKey::Opening(of) => of.0 + 1 < epochs.current.0,
                    VaultKey::Dealing(of, _) => {
                        of.epoch.0 + 1 < epochs.current.0 || (of.epoch <= epochs.current && !lately)
                    }
                };
                assert!(!old, "seed {}: server {i} keeps {key:?} in epoch {}", self.seed, epochs.current);
            }
        }
        for deposited in &self.secrets.deposits {
            let index = deposited.index.expect("all are deposited");
            let mut shares = Vec::new();
            for i in &servers {
                let set = &self.servers[*i].disk.shares;
                match set.share(index).filter(|_| set.epoch() == epoch) {
                    Some(share) => shares.push(ServerShare { server: ServerId(*i as u8), share }),
                    None => all_there = false,
                }
            }
            // One that lacks shares waits for a recovery; with liars about it may have to do without.
            if shares.len() < thresholds.k() || (!all_there && self.liars.is_empty()) {
                return false;
            }
            if Field::of(index) == Field::Scalars {
                self.function_is_kept(index, &deposited.data_key, &shares);
                continue;
            }
            let commitment = data_key_commitment(&self.cluster, &deposited.data_key);
            let (k, f) = (thresholds.k(), thresholds.f());
            let found = reconstruct(&self.cluster, &commitment, k, f, &shares, &mut rng);
            let found = found.unwrap_or_else(|e| panic!("seed {}: secret {index} is lost: {e}", self.seed));
            assert_eq!(*found.data_key, deposited.data_key);
            let right = self.liars.is_empty() || found.wrong.is_empty();
            assert!(right || self.liars.len() >= f, "seed {}: wrong shares of {:?}", self.seed, found.wrong);
            assert!(
                found.wrong.is_empty() || !self.liars.is_empty(),
                "seed {}: {:?}",
                self.seed,
                found.wrong
            );
        }
        true
    }
}

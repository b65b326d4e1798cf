//! Secrets: split, seal, deposit; release, gather, put together (design §6).

use crate::api::ProblemKind;
use crate::client::Client;
use crate::error::{ClientError, LinkError, Misbehaviour, Silence};
use crate::failure::Tally;
use crate::link::segment;
use crate::passphrase::{Lock, Locked};
use crate::random;
use crate::write::Written;
use quorum::answer::{AnswerError, PageAnswer, SecretAnswer, ShareAnswer, ShareQuestion, Shown, Verifier};
use quorum::bytes::{Blob, PublicKey, SecretBytes};
use quorum::certificate::Checkpoint;
use quorum::codec::sha256;
use quorum::ids::{Epoch, Sequence, ServerId};
use quorum::record::Name;
use quorum::request::{Deposit, Done, Operation, Reader, Refusal};
use quorum::sealing::{HandOutContext, OpeningKey, ShareContext, decrypt_material, encrypt_material};
use quorum::shamir::{ReconstructError, Reconstructed, ServerShare, deal, reconstruct};
use quorum::signing::SigningKey;
use quorum::state::{Releases, Secret, ServerKeys, data_key_commitment};
use rand::Rng as _;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

/// How often a deposit is sealed again because its epoch passed meanwhile.
const RESEALS: usize = 5;
/// How often a release is asked for again because its epoch passed meanwhile.
pub(crate) const RERELEASES: usize = 3;
/// How long a depositor waits for the last servers of a starting cluster to announce their keys.
const ANNOUNCEMENT_PATIENCE: Duration = Duration::from_secs(2);
/// How long a reader waits before a server that is behind is asked again.
const SHARE_PAUSE: Duration = Duration::from_millis(30);
/// How long a reader waits for further shares to find out whose were wrong.
const BLAME_PATIENCE: Duration = Duration::from_millis(300);
/// How long those who were asked for the ciphertext may take, once the shares are there, until all are.
const CIPHERTEXT_PATIENCE: Duration = Duration::from_millis(500);

/// A secret that is deposited.
#[derive(Debug)]
pub struct Deposited {
    /// Its index.
    pub index: u64,
    /// The ordered deposit.
    pub written: Written,
    /// Whether it was recovered once, to prove that it can be.
    pub proved: bool,
}

/// A secret that came back.
pub struct Recovered {
    /// The material.
    pub material: Zeroizing<Vec<u8>>,
    /// Its metadata.
    pub secret: Secret,
    /// Servers whose shares were used or fit.
    pub answered: Vec<ServerId>,
    /// Servers whose shares do not fit, or whose answers were nonsense.
    pub wrong: Vec<Misbehaviour>,
    /// The guess was right, and why the servers could not be told so: it counts as a wrong one until the
    /// next that is right.
    pub uncounted: Option<ClientError>,
}

impl std::fmt::Debug for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recovered({}, {} bytes)", self.secret.name, self.material.len())
    }
}

/// The epoch, and each server's key of it.
type SealingKeys = (Epoch, Vec<Option<PublicKey>>);

/// Where a server tells of a secret, and what its answer shows.
fn secret_question(
    name: &Name,
) -> (String, impl Fn(&mut Verifier, &SecretAnswer) -> Result<AboutSecret, AnswerError>) {
    let check = |verifier: &mut Verifier, answer: &SecretAnswer| {
        Ok((verifier.secret(answer, name)?, answer.certificate.statement))
    };
    (format!("/v1/secrets/{}", segment(name)), check)
}

/// The secret with this index, which was there before; or that it was replaced or deleted since, which is not that
/// there was none.
fn still_there(name: &Name, index: u64, shown: Shown<Secret>) -> Result<Secret, ClientError> {
    let changed = |deleted| ClientError::SecretChanged { name: name.clone(), deleted };
    match shown {
        Shown::There(secret) if secret.index == index => Ok(secret),
        Shown::There(_) => Err(changed(None)),
        Shown::Absent(absence) => Err(changed(Some(Box::new(absence)))),
    }
}

type AboutSecret = (Shown<(Secret, Releases)>, Checkpoint);

impl Client {
    /// Deposits material under a name, so that any k servers together can give it to its owner
    /// (the holder of `key`) and its readers, and fewer learn nothing. Unless `trust` is set, it
    /// is recovered once before success is reported.
    pub async fn put_secret(
        &self,
        key: &SigningKey,
        name: &Name,
        material: &[u8],
        readers: &[Reader],
        replace: bool,
        trust: bool,
    ) -> Result<Deposited, ClientError> {
        let deposited = self.deposit(key, name, material, readers, None, replace).await?;
        if trust {
            return Ok(deposited);
        }
        let back = self.get_secret(key, name).await?;
        self.same(&back, deposited.index, material)?;
        Ok(Deposited { proved: true, ..deposited })
    }

    /// What comes back of a deposit must be what was deposited.
    pub(crate) fn same(&self, back: &Recovered, index: u64, material: &[u8]) -> Result<(), ClientError> {
        match *back.material == material {
            _ if back.secret.index != index => {
                Err(ClientError::SecretChanged { name: back.secret.name.clone(), deleted: None })
            }
            true => Ok(()),
            false => Err(ClientError::Secret("what came back is not what was deposited".into())),
        }
    }

    /// Seals and deposits, again if the epoch passes meanwhile.
    pub(crate) async fn deposit(
        &self,
        key: &SigningKey,
        name: &Name,
        material: &[u8],
        readers: &[Reader],
        lock: Option<&Lock>,
        replace: bool,
    ) -> Result<Deposited, ClientError> {
        let replaces = match replace {
            true => self.secret(name).await?.map(|(secret, _)| secret.index),
            false => None,
        };
        let mut attempt = 0;
        let mut since = Sequence(0);
        loop {
            let keys = self.sealing_keys(since).await?;
            let (sequence, deposit) =
                self.seal_deposit(key, name, material, readers, lock, replaces, keys)?;
            let request = self.sign(key, sequence, Operation::Deposit(deposit));
            match self.submit_signed(&request).await {
                Ok(written) => match written.done {
                    Done::Deposited { index } => return Ok(Deposited { index, written, proved: false }),
                    _ => return Err(ClientError::Secret("the receipt is of another operation".into())),
                },
                // The epoch ended between sealing and execution: seal to the new keys.
                Err(ClientError::Refused(refused))
                    if matches!(refused.refusal(), Refusal::EpochPassed { .. }) && attempt < RESEALS =>
                {
                    attempt += 1;
                    since = refused.at().sequence;
                }
                Err(error) => return Err(error),
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what a deposit is made of")]
    fn seal_deposit(
        &self,
        key: &SigningKey,
        name: &Name,
        material: &[u8],
        readers: &[Reader],
        lock: Option<&Lock>,
        replaces: Option<u64>,
        (epoch, sealing): SealingKeys,
    ) -> Result<(u64, Deposit), ClientError> {
        let cluster = self.inner.manifest.cluster_id();
        let thresholds = self.inner.manifest.thresholds;
        let mut rng = random::system();
        let (data_key, shares, passphrase) = match lock.map(|lock| lock.turn(self)) {
            Some(Locked { data_key, shares, passphrase }) => (data_key, shares, Some(passphrase)),
            None => {
                let data_key = random::secret();
                let shares = deal(&data_key, thresholds.k(), thresholds.n(), &mut rng);
                (data_key, shares, None)
            }
        };
        let failed = |e: quorum::sealing::SealError| ClientError::Secret(e.to_string());
        let mut deposit = Deposit {
            name: name.clone(),
            owner: key.public(),
            readers: readers.to_vec(),
            passphrase,
            replaces,
            epoch,
            ciphertext: encrypt_material(&cluster, name, &data_key, material).map_err(failed)?,
            commitment: data_key_commitment(&cluster, &data_key),
            shares: vec![],
        };
        let sequence = rng.next_u64();
        for (server, share) in self.inner.manifest.grid().servers().zip(&shares) {
            let sealed = match sealing.get(server.index()).copied().flatten() {
                // A server without a key has announced none: it recovers a share in a later epoch.
                None => Blob(vec![]),
                Some(to) => ShareContext::of(&deposit, server, key.public(), sequence)
                    .seal(&cluster, &to, share, &mut rng)
                    .map_err(failed)?,
            };
            deposit.shares.push(sealed);
        }
        Ok((sequence, deposit))
    }

    /// The servers' current sealing keys, from a certified answer no older than `max_age` and no older than a state
    /// that is known to have others. Waits a
    /// little for all of them, since a server without a key gets no share, and longer for q: with
    /// fewer a deposit could be lost when f servers fail.
    async fn sealing_keys(&self, since: Sequence) -> Result<SealingKeys, ClientError> {
        let deadline = self.deadline();
        let patience = deadline.min(Instant::now() + ANNOUNCEMENT_PATIENCE);
        loop {
            let (epoch, keys) = self.announced_keys(since).await?;
            let (have, need) = (keys.iter().flatten().count(), self.inner.manifest.thresholds.q());
            if have == keys.len() || (have >= need && Instant::now() >= patience) {
                return Ok((epoch, keys));
            }
            if Instant::now() >= deadline {
                let needed = format!("only {have} servers have announced a sealing key, {need} are needed");
                return Err(self.in_vain(&needed));
            }
            // A cluster that has just started announces them within a second or two.
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn announced_keys(&self, since: Sequence) -> Result<SealingKeys, ClientError> {
        let check = |verifier: &mut Verifier, answer: &PageAnswer| {
            let (keys, statement) = (verifier.server_keys(answer)?, answer.certificate.statement);
            Ok(((statement.epoch, keys), statement))
        };
        let (epoch, announced) = self.good_since("/v1/servers", since, check).await?;
        let key_of = |server: ServerId| {
            let of = |keys: &&ServerKeys| keys.sealing.statement.server == server;
            let keys = announced.iter().find(of)?;
            (keys.sealing.statement.epoch == epoch).then_some(keys.sealing.statement.key)
        };
        Ok((epoch, self.inner.manifest.grid().servers().map(key_of).collect()))
    }

    /// A secret's metadata and the record of its releases; none if its absence was proved. With the guarantees of a
    /// read of q servers.
    pub async fn secret(&self, name: &Name) -> Result<Option<(Secret, Releases)>, ClientError> {
        Ok(self.shown_secret(name).await?.there())
    }
    /// The same, with the absence if that was proved.
    pub async fn shown_secret(&self, name: &Name) -> Result<Shown<(Secret, Releases)>, ClientError> {
        let (path, check) = secret_question(name);
        self.current_good(&path, check).await
    }

    /// Recovers a secret: an ordered release, then k right shares, whatever the others are.
    ///
    /// A release is good for one epoch. If that passes before k shares are there it is asked for again.
    pub async fn get_secret(&self, key: &SigningKey, name: &Name) -> Result<Recovered, ClientError> {
        for _ in 0..RERELEASES {
            if let Some(recovered) = self.release_and_gather(key, name).await? {
                return Ok(recovered);
            }
        }
        Err(ClientError::Secret("epochs pass faster than shares can be gathered".into()))
    }

    /// None if the epoch passed meanwhile.
    async fn release_and_gather(
        &self,
        key: &SigningKey,
        name: &Name,
    ) -> Result<Option<Recovered>, ClientError> {
        let seed = random::secret();
        let ephemeral = OpeningKey::derive(&seed);
        let operation = Operation::Release { secret: name.clone(), ephemeral: ephemeral.public() };
        let written = self.submit(key, operation).await?;
        let Done::Released { index, release, epoch } = written.done else {
            return Err(ClientError::Secret("the receipt is of another operation".into()));
        };
        let secret = self.secret_at(name, index, written.sequence).await?;
        let gathering = Gathering { client: self, secret: &secret, release, epoch, ephemeral: &ephemeral };
        let Some((data_key, ciphertext, answered, wrong)) = gathering.run().await? else { return Ok(None) };
        let cluster = self.inner.manifest.cluster_id();
        let material = decrypt_material(&cluster, name, &data_key, &ciphertext).map_err(|_| {
            ClientError::Secret("the ciphertext does not open: its depositor dealt it wrong".into())
        })?;
        Ok(Some(Recovered { material, secret, answered, wrong, uncounted: None }))
    }

    /// Metadata of the secret with this index, which was there at that sequence number: what is shown of a later
    /// state tells whether it was replaced or deleted since.
    pub(crate) async fn secret_at(
        &self,
        name: &Name,
        index: u64,
        since: Sequence,
    ) -> Result<Secret, ClientError> {
        let (path, check) = secret_question(name);
        still_there(name, index, self.good_since(&path, since, check).await?.map(|(secret, _)| secret))
    }

    /// Deletes a secret, as its owner.
    pub async fn delete_secret(&self, key: &SigningKey, name: &Name) -> Result<Written, ClientError> {
        self.submit(key, Operation::Delete { secret: name.clone() }).await
    }
}

/// Collecting shares, or results, of one release.
pub(crate) struct Gathering<'a> {
    pub(crate) client: &'a Client,
    pub(crate) secret: &'a Secret,
    pub(crate) release: u64,
    pub(crate) epoch: Epoch,
    pub(crate) ephemeral: &'a OpeningKey,
}

/// What servers answer to a release, one after the other.
pub(crate) struct Answers<'a> {
    gathering: &'a Gathering<'a>,
    tasks: JoinSet<(ServerId, Result<ShareAnswer, LinkError>)>,
    deadline: Instant,
    /// Servers that say that the epoch has passed.
    gone_on: usize,
    silent: Vec<Silence>,
    pub(crate) wrong: Vec<Misbehaviour>,
    /// The ciphertext, from whoever sent it first: a server that has lost its share has it too.
    pub(crate) ciphertext: Option<Blob>,
}

impl Answers<'_> {
    /// The next answer: what is sealed to the reader. An inner none is an answer that holds no share; an outer one
    /// the end.
    pub(crate) async fn next(&mut self) -> Option<Option<(ServerId, Blob)>> {
        self.next_until(self.deadline).await
    }
    async fn next_until(&mut self, until: Instant) -> Option<Option<(ServerId, Blob)>> {
        let next = tokio::time::timeout_at(until.min(self.deadline), self.tasks.join_next()).await;
        let Ok(Some(Ok((server, answer)))) = next else { return None };
        if matches!(&answer, Err(LinkError::Problem(problem)) if problem.kind == ProblemKind::EpochPassed.uri())
        {
            self.gone_on += 1;
            return Some(None);
        }
        if let Err(error @ (LinkError::Silent(_) | LinkError::Unreached(_) | LinkError::AsksToWait { .. })) =
            &answer
        {
            self.silent.push(Silence { server, why: error.to_string() });
            return Some(None);
        }
        let checked = answer.map_err(|e| e.to_string());
        Some(match checked.and_then(|answer| self.gathering.check(server, answer)) {
            Ok((sealed, text)) => {
                self.ciphertext = self.ciphertext.take().or(text);
                if sealed.is_none() {
                    self.silent.push(Silence { server, why: "it holds no share".into() });
                }
                sealed.map(|sealed| (server, sealed))
            }
            Err(why) => {
                self.blame(server, why);
                None
            }
        })
    }
    /// Whether more servers than can lie say that the epoch has passed: one of them is right.
    pub(crate) fn epoch_passed(&self, faulty: usize) -> bool {
        self.gone_on > faulty
    }
    /// Whether any server says so.
    pub(crate) fn any_epoch_passed(&self) -> bool {
        self.gone_on > 0
    }
    pub(crate) fn blame(&mut self, server: ServerId, why: impl Into<String>) {
        self.wrong.push(Misbehaviour { server, why: why.into() });
    }
    pub(crate) fn too_few(self, needed: String, answered: Vec<ServerId>) -> ClientError {
        let tally = Tally { answered, silent: self.silent, rejected: self.wrong, ..Tally::default() };
        self.gathering.client.too_few(needed, tally)
    }
}

type Gathered = (SecretBytes, Blob, Vec<ServerId>, Vec<Misbehaviour>);

impl Gathering<'_> {
    /// Asks every server for what the release allows, and so many of them for the ciphertext, which is public
    /// and large, too.
    pub(crate) fn ask_all(&self, ciphertexts: usize) -> Answers<'_> {
        let mut answers = Answers {
            gathering: self,
            tasks: JoinSet::new(),
            deadline: self.client.deadline(),
            gone_on: 0,
            silent: Vec::new(),
            wrong: Vec::new(),
            ciphertext: None,
        };
        self.ask(&mut answers, ciphertexts);
        answers
    }
    fn ask(&self, answers: &mut Answers<'_>, ciphertexts: usize) {
        let deadline = answers.deadline;
        for (i, server) in self.client.shuffled().into_iter().enumerate() {
            let link = self.client.inner.links[server.index()].clone();
            let question = ShareQuestion {
                secret: self.secret.name.clone(),
                release: self.release,
                with_ciphertext: i < ciphertexts,
            };
            answers.tasks.spawn(async move {
                // A server that is behind answers "not yet" until it has executed the release.
                loop {
                    let wait = match link.post::<_, ShareAnswer>("/v1/shares", &question, deadline).await {
                        Err(LinkError::Problem(problem)) if problem.status == 404 => SHARE_PAUSE,
                        Err(LinkError::AsksToWait { wait, .. }) => wait,
                        answer => return (server, answer),
                    };
                    if tokio::time::timeout_at(deadline, sleep(wait)).await.is_err() {
                        return (server, Err(LinkError::Silent("no answer in time".into())));
                    }
                }
            });
        }
    }

    pub(crate) fn context(&self, server: ServerId) -> HandOutContext {
        HandOutContext { epoch: self.epoch, server, index: self.secret.index, release: self.release }
    }

    /// None if so many servers are in the next epoch that k shares of this one will not come.
    async fn run(&self) -> Result<Option<Gathered>, ClientError> {
        let manifest = &self.client.inner.manifest;
        let (cluster, k, f) = (manifest.cluster_id(), manifest.thresholds.k(), manifest.thresholds.f());
        let mut answers = self.ask_all(f + 1);
        let mut shares: Vec<ServerShare> = Vec::new();
        let mut data_key: Option<Reconstructed> = None;
        let (mut until, mut asked_again) = (answers.deadline, false);
        loop {
            let Some(next) = answers.next_until(until).await else {
                // Those who were asked for the ciphertext are slow, or liars: everybody has it.
                if asked_again || data_key.is_none() || answers.ciphertext.is_some() {
                    break;
                }
                (until, asked_again) = (answers.deadline, true);
                self.ask(&mut answers, manifest.servers.len());
                continue;
            };
            if data_key.is_none() && answers.epoch_passed(f) {
                return Ok(None);
            }
            if let Some((server, sealed)) = next
                && shares.iter().all(|known| known.server != server)
            {
                match self.context(server).open(&cluster, self.ephemeral, &sealed) {
                    Ok(share) => shares.push(ServerShare { server, share }),
                    Err(_) => answers.blame(server, "its share does not open"),
                }
            }
            let settled = data_key.as_ref().is_some_and(|found| !found.undecided);
            if !settled && shares.len() >= k {
                match reconstruct(&cluster, &self.secret.commitment, k, f, &shares, &mut rand::rng()) {
                    Ok(found) => data_key = Some(found),
                    Err(ReconstructError::TooFew { .. } | ReconstructError::NoneFits { .. }) => {}
                }
            }
            match (&data_key, &answers.ciphertext) {
                (Some(found), Some(_)) if !found.undecided => break,
                // Somebody lies: a few more shares tell who, if they come soon.
                (Some(_), Some(_)) => until = until.min(Instant::now() + BLAME_PATIENCE),
                (Some(_), None) if !asked_again => until = until.min(Instant::now() + CIPHERTEXT_PATIENCE),
                _ => {}
            }
        }
        let ciphertext = answers.ciphertext.take();
        if answers.any_epoch_passed() && (data_key.is_none() || ciphertext.is_none()) {
            // What is missing was asked of servers that are in the next epoch already.
            return Ok(None);
        }
        let answered: Vec<_> = shares.iter().map(|share| share.server).collect();
        match (data_key, ciphertext) {
            (Some(found), Some(text)) => {
                for server in &found.wrong {
                    answers.blame(*server, "its share does not fit the key that was committed to");
                }
                let answered = answered.into_iter().filter(|server| !found.wrong.contains(server)).collect();
                Ok(Some((found.data_key, text, answered, answers.wrong)))
            }
            (None, _) if answered.len() >= k => {
                let why = "the shares that came do not give the key that was committed to";
                Err(ClientError::Secret(why.into()))
            }
            (Some(_), None) => Err(ClientError::Secret("no server gave the ciphertext".into())),
            (None, _) => Err(answers.too_few(format!("{k} shares"), answered)),
        }
    }

    /// Is it about this release, is its ciphertext the one deposited?
    fn check(&self, server: ServerId, answer: ShareAnswer) -> Result<(Option<Blob>, Option<Blob>), String> {
        if answer.server != server
            || answer.index != self.secret.index
            || answer.release.release != self.release
        {
            return Err("its share is of something else".into());
        }
        match answer.ciphertext {
            Some(text) if sha256(&text) != self.secret.ciphertext_hash => {
                Err("its ciphertext is not the one that was deposited".into())
            }
            text => Ok((answer.share, text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorum::Hash;
    use quorum::record::Change;
    use quorum::request::RequestId;

    #[test]
    fn what_was_replaced_or_deleted_meanwhile_is_not_called_absent() {
        let name = Name::new("s").unwrap();
        let secret = |index| Secret {
            name: name.clone(),
            index,
            owner: PublicKey([1; 32]),
            readers: vec![],
            passphrase: None,
            ciphertext_bytes: 1,
            ciphertext_hash: Hash([0; 32]),
            commitment: Hash([0; 32]),
            depositor: RequestId { client: PublicKey([1; 32]), sequence: 1 },
            deposited: Change { sequence: Sequence(1), time: quorum::Timestamp(1) },
            account: None,
            space: 0,
        };
        assert!(still_there(&name, 7, Shown::There(secret(7))).is_ok());
        let replaced = still_there(&name, 7, Shown::There(secret(9))).unwrap_err();
        assert!(matches!(replaced, ClientError::SecretChanged { deleted: None, .. }), "{replaced}");
        let absence = crate::fixtures::absence(&name, crate::now());
        let deleted = still_there(&name, 7, Shown::Absent(absence)).unwrap_err();
        assert!(deleted.to_string().contains("was deleted meanwhile"), "{deleted}");
        assert_eq!(deleted.exit_status(), crate::ExitStatus::Conflict);
    }
}

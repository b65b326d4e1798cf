//! Draws what a server needs anew with every epoch and every start, and has its signer certify it (design
//! §7).

use crate::server::Shared;
use crate::share_store::ToCommitter;
use crate::signer::SignerLink;
use anyhow::Context as _;
use kds_certs::LinkKey;
use kds_client::api::TroubleKind;
use kds_client::random;
use quorum::PublicKey;
use quorum::answer::Proved;
use quorum::certificate::Certificate;
use quorum::ids::{AttemptId, ServerId};
use quorum::membership::Membership;
use quorum::ordering::{EpochKeys, Input};
use quorum::sealing::OpeningKey;
use quorum::signer::{Ask, Counter, Refused};
use quorum::signing::{KeyCertificate, KeyPurpose, SigningKey, Statement as _, Voter};
use quorum::state::{Epochs, layout};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// How often the replica's wish is looked at.
const INTERVAL: Duration = Duration::from_millis(50);
/// Looks until keys that were given, and not taken, are drawn again.
const PATIENCE: u32 = 40;
/// How often the signer is asked whether it is there.
const PROBE: Duration = Duration::from_secs(2);

/// Numbers voting keys: each number is in the database before the signer is asked for its key.
pub struct Numbers {
    /// The last one.
    pub last: u64,
    /// Owns the database.
    pub committer: mpsc::Sender<ToCommitter>,
}

impl Numbers {
    async fn next(&mut self) -> anyhow::Result<u64> {
        let (done, durable) = oneshot::channel();
        let number = self.last + 1;
        let asked = self.committer.send(ToCommitter::VotingKey { number, done }).await;
        asked.ok().context("the database is closed")?;
        durable.await.context("the database does not take the number of a voting key")?;
        self.last = number;
        Ok(number)
    }
}

/// Draws a voting key and has it certified, together with other keys.
async fn voter(
    signer: &SignerLink,
    membership: &Membership,
    (attempt, number): (AttemptId, u64),
    (evidence, coming): Shown,
    others: &[(KeyPurpose, PublicKey)],
) -> anyhow::Result<(Voter, Vec<KeyCertificate>)> {
    let key = SigningKey::generate(&mut random::system());
    let keys = [&[(KeyPurpose::Voting, key.public())], others].concat();
    let asked = keys.len();
    let ask = Ask { keys, number, attempt, evidence, coming, changes: vec![] };
    let (_, mut certified) = signer.certify(ask, membership).await?;
    anyhow::ensure!(certified.len() == asked, "the signer certified {} of {asked} keys", certified.len());
    let voter = Voter::new(*membership.cluster(), key, certified.remove(0));
    Ok((voter.context("the signer certified another key")?, certified))
}

/// Whether a server's signer answers, and has its identity, before anything is touched on the disk; and what it
/// remembers.
pub async fn probe(signer: &SignerLink, id: ServerId, membership: &Membership) -> anyhow::Result<Counter> {
    let attempt = AttemptId { epoch: membership.since(id), attempt: 0 };
    let keys = vec![(KeyPurpose::Tls, LinkKey::draw()?.public())];
    let ask = Ask { keys, attempt, ..Ask::default() };
    Ok(signer.certify(ask, membership).await?.0)
}

/// The keys that a server votes and speaks to others with from its start on: for the epoch of its last
/// certificate, or the first one of its identity.
pub async fn boot(
    signer: &SignerLink,
    id: ServerId,
    membership: &Arc<Membership>,
    (last, number): (Option<Certificate>, u64),
) -> anyhow::Result<(Voter, LinkTls)> {
    let since = AttemptId { epoch: membership.since(id), attempt: 0 };
    let attempt = last.as_ref().map_or_else(AttemptId::default, |last| last.statement.attempt()).max(since);
    let key = LinkKey::draw()?;
    let others = [(KeyPurpose::Tls, key.public())];
    let (voter, certified) = voter(signer, membership, (attempt, number), (last, None), &others).await?;
    let links = LinkTls::new(membership, key, certified.first())?;
    Ok((voter, links))
}

/// What tells a link from those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkEra {
    /// The attempt that this server's key is certified for.
    pub attempt: AttemptId,
    /// The last attempt whose contributions were erased before the link was made: its session tells nothing of them.
    pub erased: AttemptId,
}

/// What links between servers are made with, in one epoch.
pub struct LinkTls {
    /// What the key is certified for.
    pub attempt: AttemptId,
    /// Whose keys are accepted.
    membership: Arc<Membership>,
    /// For links that others make.
    pub server: Arc<rustls::ServerConfig>,
    /// For links to others.
    pub clients: BTreeMap<ServerId, Arc<rustls::ClientConfig>>,
}

impl LinkTls {
    fn new(
        membership: &Arc<Membership>,
        key: LinkKey,
        certified: Option<&KeyCertificate>,
    ) -> anyhow::Result<Self> {
        let certified = certified.context("the signer did not certify the TLS key")?;
        let identity = key.certified(certified)?;
        let client = |id| anyhow::Ok((id, Arc::new(kds_certs::peer_client(membership, &identity, id)?)));
        Ok(Self {
            attempt: certified.statement.attempt_id(),
            server: Arc::new(kds_certs::peer_server(membership, &identity)?),
            membership: Arc::clone(membership),
            clients: membership.manifest().grid().servers().map(client).collect::<Result<_, _>>()?,
        })
    }
}

/// Has all links made anew when contributions are erased: a session that carried them is a key to whoever recorded it,
/// and its buffers may still have them in clear.
fn renew_sessions(shared: &Shared) {
    let erased = shared.replica_status.load().erased;
    shared.link_era.send_if_modified(|era| std::mem::replace(&mut era.erased, erased) != erased);
}

/// Renews what links are made with, if an attempt at an epoch has begun since, or a server was replaced. With the
/// attempt and not with the epoch: what was in this server's memory before tells nothing of what goes over these links,
/// and the attempt's contributions go over no others (design §7, *Fresh channels*).
async fn renew_links(signer: &SignerLink, shared: &Shared) -> anyhow::Result<()> {
    let (evidence, coming) = shown(shared);
    let under_way =
        shared.published.borrow().as_ref().and_then(|state| layout::attempt_under_way(&state.snapshot));
    let attempt = (*shared.epoch.borrow()).max(under_way.unwrap_or_default());
    let (links, membership) = (shared.links.load(), shared.membership.load_full());
    if links.attempt < attempt || !Arc::ptr_eq(&links.membership, &membership) {
        let key = LinkKey::draw()?;
        let keys = vec![(KeyPurpose::Tls, key.public())];
        let ask = Ask { keys, number: 0, attempt, evidence, coming, changes: vec![] };
        let (_, certified) = signer.certify(ask, &membership).await?;
        let links = LinkTls::new(&membership, key, certified.first())?;
        let renewed = links.attempt;
        shared.links.store(Arc::new(links));
        shared.link_era.send_modify(|era| era.attempt = renewed);
    }
    Ok(())
}

/// What shows to the signer which epoch it is, and which attempt is under way in the state that that is about.
type Shown = (Option<Certificate>, Option<Proved<Epochs>>);

/// The last certificate; with its state, unless that is not published: a server that may not vote publishes none.
fn shown(shared: &Shared) -> Shown {
    let last = shared.certificate.load_full();
    let published = shared.published.borrow().clone();
    let published = published.filter(|published| {
        last.as_ref().is_none_or(|last| published.certificate.statement.attempt() >= last.statement.attempt())
    });
    match published {
        Some(published) => {
            let coming = Proved::look_up(&published.snapshot, layout::EPOCHS);
            (Some(published.certificate.as_ref().clone()), Some(coming))
        }
        None => (last.map(Arc::unwrap_or_clone), None),
    }
}

/// Shows the signer that an epoch has begun, as soon as a certificate shows it: until then it certifies keys of the last
/// one, for a thief too, and the server counts in both (design §7).
async fn tell(signer: &SignerLink, shared: &Shared, told: &mut AttemptId) -> anyhow::Result<()> {
    let Some(last) = shared.certificate.load_full() else { return Ok(()) };
    let attempt = last.statement.attempt();
    if attempt > *told {
        let evidence = Some(Arc::unwrap_or_clone(last));
        let ask = Ask { attempt, evidence, ..Ask::default() };
        signer.certify(ask, &shared.membership.load_full()).await?;
        *told = attempt;
    }
    Ok(())
}

/// Runs until the server stops; an error if its signer was its own child, and has ended.
pub async fn run(
    signer: SignerLink,
    mut numbers: Numbers,
    inputs: mpsc::Sender<Input>,
    shared: Arc<Shared>,
) -> anyhow::Result<()> {
    let mut probed = Instant::now();
    let (mut given, mut looks): (Option<AttemptId>, u32) = (None, 0);
    let (mut without, mut told) = (None, AttemptId::default());
    loop {
        if probed.elapsed() >= PROBE {
            // Else nobody would know before the next epoch.
            let answers = signer.answers().await.context("this server has no signer")?;
            shared.health.set(TroubleKind::Signer, !answers);
            probed = Instant::now();
        }
        let epoch = *shared.epoch.borrow();
        if let Err(error) = tell(&signer, &shared, &mut told).await {
            tracing::debug!(%epoch, error = %format!("{error:#}"), "the signer is not shown the epoch yet");
        }
        renew_sessions(&shared);
        if let Err(error) = renew_links(&signer, &shared).await {
            // Its signer has seen no certificate of the epoch before yet, most likely: it is asked again.
            if without.replace(epoch) != Some(epoch) {
                tracing::warn!(%epoch, error = %format!("{error:#}"), "no TLS key for the epoch so far");
            }
            tokio::time::sleep(INTERVAL * 5).await;
        }
        let wanted = shared.replica_status.load().wants_keys;
        looks = if wanted == given { looks + 1 } else { 0 };
        given = wanted;
        if let Some(epoch) = wanted
            && looks.is_multiple_of(PATIENCE)
        {
            match draw(&signer, &mut numbers, &shared, epoch).await {
                Ok(keys) => {
                    if inputs.send(Input::Keys(keys)).await.is_err() {
                        return Ok(());
                    }
                }
                Err(error) => {
                    if without.replace(epoch) != Some(epoch) {
                        tracing::warn!(%epoch, error = %format!("{error:#}"), "no keys for the epoch so far");
                    }
                    given = None;
                    tokio::time::sleep(INTERVAL * 5).await;
                }
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn draw(
    signer: &SignerLink,
    numbers: &mut Numbers,
    shared: &Shared,
    attempt: AttemptId,
) -> anyhow::Result<EpochKeys> {
    let (opening, entropy) = (random::secret(), random::secret());
    let key = OpeningKey::derive(opening.expose()).public();
    let others = [(KeyPurpose::Sealing, key)];
    let membership = shared.membership.load_full();
    let asked = (attempt, numbers.next().await?);
    let drawn = voter(signer, &membership, asked, shown(shared), &others).await;
    if let Some(Refused::Number { last, .. }) = drawn.as_ref().err().and_then(|error| error.downcast_ref()) {
        // Somebody else has asked, who was in this server.
        numbers.last = numbers.last.max(*last);
    }
    let (voter, certified) = drawn?;
    let sealing = *certified.first().context("the signer did not certify the sealing key")?;
    Ok(EpochKeys { attempt: voter.attempt(), opening, sealing, voter, entropy })
}

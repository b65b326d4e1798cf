//! Durable first, then out: one task commits the replica's writes and releases its messages.
//!
//! It takes whatever is waiting into one transaction (group commit). Nothing leaves before its transaction is durable. On
//! a full disk it waits until there is room. Any other error may pass: the transaction is tried again, all of it is
//! written anew then, and this server says that it waits. What does not pass in time, or is damage, ends the process: the
//! next start finds out what is on the disk (docs/decisions/0035).

use crate::peers::Peers;
use crate::seldom;
use crate::server::Shared;
use crate::share_store::ToCommitter;
use crate::storage::{Failure, Storage};
use anyhow::{Context as _, bail};
use kds_client::api::TroubleKind;
use quorum::evidence::Evidence;
use quorum::ordering::{Accusation, Durable, Input, Released, Unsent, Write, WriteBatch};
use quorum::request::VerifiedRequest;
use quorum::shares::ShareOp;
use quorum::signing::Statement as _;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Write batches that one transaction takes at most.
const GROUP: usize = 64;
/// Shortest time between two files with evidence.
const EVIDENCE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a transaction that fails is tried again, and the pauses, which double.
const PATIENCE: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Operations on shares, as they become durable. Not bounded: the keeper may be waiting for this task, and
/// ordering bounds how many there are.
type Operations = mpsc::UnboundedSender<(u64, ShareOp)>;

/// Runs until the replica's side is dropped and the keeper of the shares has ended; gives the storage back to be closed.
/// An error if the database cannot be written any more. `first` is durable already.
pub async fn run(
    mut storage: Storage,
    first: Option<(Unsent, Durable)>,
    mut effects: mpsc::Receiver<(WriteBatch, Unsent)>,
    (mut asked, keeper): (mpsc::Receiver<ToCommitter>, Operations),
    inputs: mpsc::Sender<Input>,
    peers: Peers,
    shared: Arc<Shared>,
) -> anyhow::Result<Storage> {
    let mut group = Vec::with_capacity(GROUP);
    let mut complaints = Complaints::default();
    if let Some((unsent, durable)) = first {
        hand_back(release(vec![unsent], &durable, &peers, &shared, &mut complaints), &inputs);
    }
    // None when the replica has ended: then the keeper is told, and finishes what it has begun.
    let mut keeper = Some(keeper);
    loop {
        let Some(operations) = &keeper else {
            let Some(asked) = asked.recv().await else { break };
            serve_keeper(&mut storage, asked, None, &shared).await?;
            continue;
        };
        tokio::select! {
            taken = effects.recv_many(&mut group, GROUP) => if taken == 0 {
                keeper = None;
                continue;
            },
            Some(asked) = asked.recv() => {
                serve_keeper(&mut storage, asked, Some(operations), &shared).await?;
                continue;
            }
        }
        let (batches, unsent): (Vec<_>, Vec<_>) = group.drain(..).unzip();
        for (number, operation) in commit(&mut storage, &batches, &shared).await? {
            let _ = operations.send((number, operation));
        }
        // All of them are durable: the last one's proof covers the earlier ones' messages.
        let Some(durable) = batches.into_iter().map(WriteBatch::committed).last() else { continue };
        hand_back(release(unsent, &durable, &peers, &shared, &mut complaints), &inputs);
    }
    Ok(storage)
}

/// Gives the replica its own requests. Not waited for: the driver may be waiting for this task.
fn hand_back(requests: Vec<VerifiedRequest>, inputs: &mpsc::Sender<Input>) {
    if !requests.is_empty() {
        let inputs = inputs.clone();
        tokio::spawn(async move {
            for request in requests {
                let _ = inputs.send(Input::Request(request)).await;
            }
        });
    }
}

/// What the keeper of the shares and the task that draws keys want of the database. If the disk is full they ask again: for
/// a rotation and a key in a moment, for a recovered share by recovering it again.
async fn serve_keeper(
    storage: &mut Storage,
    asked: ToCommitter,
    keeper: Option<&Operations>,
    shared: &Shared,
) -> anyhow::Result<()> {
    let (write, done) = match asked {
        ToCommitter::Rotate { applied, done } => match patiently(storage, Work::Rotate(applied), shared)
            .await?
        {
            Some(_) => {
                let _ = done.send(());
                return Ok(());
            }
            None => {
                if let Some(unsaid) = seldom::now("not erased", None) {
                    tracing::error!(unsaid, "the disk is full: the last epoch's secrets are not erased yet");
                }
                return Ok(());
            }
        },
        ToCommitter::Log { operation } => (Write::Shares(operation), None),
        ToCommitter::VotingKey { number, done } => (Write::VotingKey(number), Some(done)),
    };
    if let Some(operations) = patiently(storage, Work::Commit(&[&write]), shared).await? {
        done.map(|done| done.send(()));
        for (number, operation) in operations {
            keeper.map(|keeper| keeper.send((number, operation)));
        }
    }
    Ok(())
}

async fn commit(
    storage: &mut Storage,
    batches: &[WriteBatch],
    shared: &Shared,
) -> anyhow::Result<Vec<(u64, ShareOp)>> {
    let writes: Vec<&Write> = batches.iter().flat_map(|batch| batch.writes()).collect();
    loop {
        let done = patiently(storage, Work::Commit(&writes), shared).await?;
        shared.health.set(TroubleKind::DiskFull, done.is_none());
        if let Some(operations) = done {
            return Ok(operations);
        }
        if let Some(unsaid) = seldom::now("disk full", None) {
            tracing::error!(unsaid, "the disk is full: this server orders nothing until there is room");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Something to be done in one transaction.
#[derive(Clone, Copy)]
enum Work<'a> {
    Commit(&'a [&'a Write]),
    Rotate(u64),
}

/// Has it done, and tries again what fails in passing. None if the disk is full.
async fn patiently(
    storage: &mut Storage,
    work: Work<'_>,
    shared: &Shared,
) -> anyhow::Result<Option<Vec<(u64, ShareOp)>>> {
    let (mut since, mut pause) = (None, FIRST_PAUSE);
    loop {
        let done = match work {
            Work::Commit(writes) => storage.commit(writes).await,
            Work::Rotate(applied) => storage.rotate(applied).await.map(|()| vec![]),
        };
        let error = match done {
            Err(error) if Failure::of(&error) != Failure::Full => error,
            done => {
                if since.is_some() {
                    tracing::info!("the database can be written again");
                    shared.health.set(TroubleKind::Storage, false);
                }
                return Ok(done.ok());
            }
        };
        let began: Instant = *since.get_or_insert_with(Instant::now);
        if Failure::of(&error) == Failure::Damaged {
            let what = "the database is damaged: this process ends. Its next start moves it aside, and recovers from the others";
            return Err(error).context(what);
        }
        if began.elapsed() >= PATIENCE {
            let seconds = PATIENCE.as_secs();
            bail!(
                "the database could not be written for {seconds} s: {error}\n  repair the disk, and start the server again"
            );
        }
        if pause == FIRST_PAUSE {
            tracing::error!(%error, "the database cannot be written: this server stops voting, and tries again");
            shared.health.set(TroubleKind::Storage, true);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Logs who misbehaved, but not as often as a liar likes.
#[derive(Default)]
struct Complaints {
    last_kept: Option<Instant>,
    /// Evidence of an epoch of which no certified state is published here yet: a state has to show who the
    /// accused was.
    early: Vec<Evidence>,
}

/// Pieces of evidence that wait for a state.
const MOST_EARLY: usize = 4;

/// What kind of misbehaviour: they are said seldom each.
fn kind(accusation: &Accusation) -> &'static str {
    match accusation {
        Accusation::Equivocation { phase, .. } => phase,
        Accusation::BadProposal { .. } => "bad proposal",
        Accusation::BadNewView { .. } => "bad new view",
        Accusation::WrongState { .. } => "wrong state",
        Accusation::WrongPart { .. } => "wrong part",
        Accusation::WrongDealing { .. } => "wrong dealing",
        Accusation::Amnesia { .. } => "amnesia",
        Accusation::Damaged(_) => "damaged",
        Accusation::Unreadable { .. } => "unreadable",
        Accusation::Diverged { .. } => "diverged",
    }
}

impl Complaints {
    fn log(accusation: &Accusation) {
        metrics::counter!("kds_accusations_total").increment(1);
        if let Some(unsaid) = seldom::now(kind(accusation), accusation.accused()) {
            tracing::warn!(%accusation, unsaid, "misbehaviour");
        }
    }
    /// Keeps evidence in a file, for others to check.
    fn keep(&mut self, evidence: Evidence, shared: &Shared) {
        if self.last_kept.is_some_and(|last| last.elapsed() < EVIDENCE_INTERVAL) {
            return;
        }
        let published = shared.published.borrow().clone();
        let of = evidence.attempt().unwrap_or_default();
        if published.as_ref().is_none_or(|published| published.certificate.statement.attempt() < of) {
            if self.early.len() < MOST_EARLY {
                self.early.push(evidence);
            }
            return;
        }
        self.last_kept = Some(Instant::now());
        let state = published.as_ref().map(|published| (&published.certificate, &published.snapshot));
        if let Some(path) =
            kds_client::evidence_file::keep(&shared.evidence, &shared.membership.load(), evidence, state)
        {
            tracing::warn!(file = %path.display(), "evidence of misbehaviour kept: `kds-client verify` checks it");
        }
    }
}

fn release(
    unsent: Vec<Unsent>,
    durable: &Durable,
    peers: &Peers,
    shared: &Shared,
    complaints: &mut Complaints,
) -> Vec<VerifiedRequest> {
    let mut own = Vec::new();
    for released in unsent.into_iter().map(|unsent| unsent.release(durable)) {
        let Released { messages, published, replied, requests, refused, accusations, evidence } = released;
        own.extend(requests);
        accusations.iter().for_each(Complaints::log);
        let early = std::mem::take(&mut complaints.early);
        early.into_iter().chain(evidence).for_each(|evidence| complaints.keep(evidence, shared));
        for (target, message) in messages {
            peers.send(target, &message);
        }
        // The state first: whoever is woken finds its reply in it.
        if let Some(published) = published {
            crate::http::warn_of_space(&published);
            shared.published.send_replace(Some(Arc::new(published)));
        }
        shared.waiters.wake(replied, refused);
    }
    own
}

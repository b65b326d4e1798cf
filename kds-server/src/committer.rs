//! Durable first, then out: one task commits the replica's writes and releases its messages.
//!
//! It takes whatever is waiting into one transaction (group commit). When the disk is full it
//! tries again; on any other error nothing leaves this server any more, since nobody can say what
//! is on the disk: it stops voting and says so, and goes on answering reads.

use crate::peers::Peers;
use crate::seldom;
use crate::server::Shared;
use crate::share_store::ToCommitter;
use crate::storage::Storage;
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
/// SQLite's primary result code for a full disk.
const SQLITE_FULL: &str = "13";

/// Operations on shares, as they become durable. Not bounded: the keeper may be waiting for this task, and
/// ordering bounds how many there are.
type Operations = mpsc::UnboundedSender<(u64, ShareOp)>;

/// Runs until the replica's side is dropped; gives the storage back to be closed.
pub async fn run(
    mut storage: Storage,
    mut effects: mpsc::Receiver<(WriteBatch, Unsent)>,
    (mut asked, keeper): (mpsc::Receiver<ToCommitter>, Operations),
    inputs: mpsc::Sender<Input>,
    peers: Peers,
    shared: Arc<Shared>,
) -> Storage {
    let mut group = Vec::with_capacity(GROUP);
    let mut complaints = Complaints::default();
    loop {
        tokio::select! {
            taken = effects.recv_many(&mut group, GROUP) => if taken == 0 { break },
            Some(asked) = asked.recv() => {
                if !serve_keeper(&mut storage, asked, &keeper, &shared).await {
                    break;
                }
                continue;
            }
        }
        let (batches, unsent): (Vec<_>, Vec<_>) = group.drain(..).unzip();
        let Some(operations) = commit(&mut storage, &batches, &shared).await else { break };
        for (number, operation) in operations {
            let _ = keeper.send((number, operation));
        }
        // All of them are durable: the last one's proof covers the earlier ones' messages.
        let Some(durable) = batches.into_iter().map(WriteBatch::committed).last() else { continue };
        let requests = release(unsent, &durable, &peers, &shared, &mut complaints);
        if !requests.is_empty() {
            // Not waited for here: the driver may be waiting for this task.
            let inputs = inputs.clone();
            tokio::spawn(async move {
                for request in requests {
                    let _ = inputs.send(Input::Request(request)).await;
                }
            });
        }
    }
    storage
}

/// What the keeper of the shares and the task that draws keys want of the database; false if it cannot be written any
/// more.
async fn serve_keeper(
    storage: &mut Storage,
    asked: ToCommitter,
    keeper: &Operations,
    shared: &Shared,
) -> bool {
    let done = match asked {
        ToCommitter::Rotate { applied, done } => storage.rotate(applied).await.map(|()| {
            let _ = done.send(());
        }),
        ToCommitter::Log { operation } => match storage.log_operation(&operation).await {
            Ok(number) => {
                let _ = keeper.send((number, operation));
                Ok(())
            }
            Err(error) => Err(error),
        },
        ToCommitter::VotingKey { number, done } => {
            storage.commit(&[&Write::VotingKey(number)]).await.map(|_| {
                let _ = done.send(());
            })
        }
    };
    match done {
        Ok(()) => true,
        // It is tried again: a rotation and a key in a moment, a recovered share by recovering it again.
        Err(error) if is_full(&error) => {
            if let Some(unsaid) = seldom::now("not erased", None) {
                tracing::error!(%error, unsaid, "the disk is full: the last epoch's secrets are not erased yet");
            }
            true
        }
        Err(error) => {
            tracing::error!(%error, "the database cannot be written: this server stops voting; repair the disk and restart it");
            shared.health.set(TroubleKind::Storage, true);
            false
        }
    }
}

fn is_full(error: &sqlx::Error) -> bool {
    if let sqlx::Error::Encode(error) = error {
        // A key that could not be written.
        let error = error.downcast_ref::<std::io::Error>();
        return error.is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull);
    }
    error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == SQLITE_FULL)
}

async fn commit(
    storage: &mut Storage,
    batches: &[WriteBatch],
    shared: &Shared,
) -> Option<Vec<(u64, ShareOp)>> {
    let writes: Vec<&Write> = batches.iter().flat_map(|batch| batch.writes()).collect();
    loop {
        match storage.commit(&writes).await {
            Ok(operations) => {
                shared.health.set(TroubleKind::DiskFull, false);
                return Some(operations);
            }
            Err(error) => {
                if is_full(&error) {
                    if let Some(unsaid) = seldom::now("disk full", None) {
                        tracing::error!(%error, unsaid, "the disk is full: this server orders nothing until there is room");
                    }
                    shared.health.set(TroubleKind::DiskFull, true);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                } else {
                    tracing::error!(%error, "the database cannot be written: this server stops voting; repair the disk and restart it");
                    shared.health.set(TroubleKind::Storage, true);
                    return None;
                }
            }
        }
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

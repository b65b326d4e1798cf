//! The one owner of the replica: inputs in, effects out.

use crate::peers::{FromPeers, Peers};
use crate::server::Shared;
use kds_client::api::TroubleKind;
use quorum::ids::Timestamp;
use quorum::ordering::{Input, Part, Replica, ReplicaStatus, Unsent, WriteBatch};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

/// Inputs handled before their effects go out together.
const TOGETHER: usize = 128;

/// The clock that the replica is given.
pub fn now() -> Timestamp {
    kds_client::now()
}

/// Tells operators when this server begins or ceases to vote, and how far a state transfer is.
fn report(before: &ReplicaStatus, now: &ReplicaStatus) {
    if before.part != now.part {
        match now.part {
            Part::Voting => tracing::info!(executed = %now.executed, "this server votes"),
            Part::Estimating => tracing::info!("asking the others what this server signed before"),
            Part::Recovering => {
                tracing::warn!(certified = %now.target, "recovering: votes were forgotten, and the state is fetched")
            }
            Part::Repairing => tracing::error!("repairing: the state is not the certified one"),
            Part::Stopped => {}
        }
    }
    match (&before.transfer, &now.transfer) {
        (None, Some(transfer)) => {
            tracing::info!(state = %transfer.target, "fetching a state from the others")
        }
        (Some(before), Some(transfer)) if before.parts / 256 != transfer.parts / 256 => {
            tracing::info!(state = %transfer.target, entries = transfer.entries, missing_parts = transfer.missing, "fetching")
        }
        (Some(before), None) => {
            tracing::info!(state = %before.target, executed = %now.executed, "the state is complete")
        }
        _ => {}
    }
}

/// Runs until the inputs end, or until what it hands out is no longer taken. What peers say waits apart from what
/// clients ask, and of each peer so much at a time.
pub async fn run(
    mut replica: Replica,
    (mut inputs, mut from_peers): (mpsc::Receiver<Input>, mpsc::Receiver<FromPeers>),
    effects: mpsc::Sender<(WriteBatch, Unsent)>,
    peers: Peers,
    shared: Arc<Shared>,
) {
    let mut tick = interval(Duration::from_millis(Replica::tick_interval_ms()));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut batch, mut heard) = (Vec::with_capacity(TOGETHER), Vec::with_capacity(TOGETHER));
    loop {
        tokio::select! {
            taken = from_peers.recv_many(&mut heard, TOGETHER) => {
                if taken == 0 {
                    return;
                }
                for (input, _place) in heard.drain(..) {
                    replica.handle(now(), input);
                }
            }
            taken = inputs.recv_many(&mut batch, TOGETHER) => {
                if taken == 0 {
                    return;
                }
                for input in batch.drain(..) {
                    replica.handle(now(), input);
                }
            }
            _ = tick.tick() => replica.handle(now(), Input::Tick),
        }
        // Before its questions leave: answers may be back at once.
        shared.wants.store(Arc::new(replica.wants()));
        for (target, message) in replica.drain_free() {
            peers.send(target, &message);
        }
        if let Some(ready) = replica.drain()
            && effects.send(ready).await.is_err()
        {
            return;
        }
        let status = replica.status();
        report(&shared.replica_status.load(), &status);
        if status.part == Part::Voting {
            shared.health.set(TroubleKind::LostDatabase, false);
        }
        shared.epoch.send_if_modified(|known| std::mem::replace(known, status.attempt) != status.attempt);
        if !Arc::ptr_eq(&shared.membership.load(), replica.membership()) {
            shared.membership.store(Arc::clone(replica.membership()));
        }
        shared.certificate.store(replica.certificate().cloned());
        if !shared.voting.load().contains(&status.voting) {
            let before = shared.voting.load_full();
            let kept = before.iter().rev().take(2).rev().copied();
            shared.voting.store(Arc::new(kept.chain([status.voting]).collect()));
        }
        shared.replica_status.store(Arc::new(status));
    }
}

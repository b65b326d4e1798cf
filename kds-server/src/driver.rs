//! The one owner of the replica: inputs in, effects out.

use crate::server::Shared;
use quorum::ids::Timestamp;
use quorum::ordering::{Input, Replica, Unsent, WriteBatch};
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

/// Runs until the inputs end, or until what it hands out is no longer taken.
pub async fn run(
    mut replica: Replica,
    mut inputs: mpsc::Receiver<Input>,
    effects: mpsc::Sender<(WriteBatch, Unsent)>,
    shared: Arc<Shared>,
) {
    let mut tick = interval(Duration::from_millis(Replica::tick_interval_ms()));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut batch = Vec::with_capacity(TOGETHER);
    loop {
        tokio::select! {
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
        if let Some(ready) = replica.drain()
            && effects.send(ready).await.is_err()
        {
            return;
        }
        shared.replica_status.store(Arc::new(replica.status()));
    }
}

//! Writers that keep a cluster busy.

use crate::{Cluster, entry};
use quorum::record::Name;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Writers that register names until told to stop; they give back what was acknowledged.
pub struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<Vec<Name>>>,
}

impl Load {
    /// Starts so many writers; their names begin with `label`.
    pub fn start(cluster: &Cluster, label: &str, writers: u8) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = (0..writers).map(|writer| {
            let (client, key, stop) =
                (cluster.client.clone(), cluster.administrator.clone(), Arc::clone(&stop));
            let label = label.to_owned();
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for i in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let name = Name::new(format!("{label}/{writer}/{i}")).expect("a good name");
                    // Without a receipt nothing was promised.
                    if client.register(&key, name.clone(), entry(writer + 1, None)).await.is_ok() {
                        acknowledged.push(name);
                    }
                }
                acknowledged
            })
        });
        let writers = writers.collect();
        Self { stop, writers }
    }
    /// Stops the writers; gives what was acknowledged.
    pub async fn finish(self) -> Vec<Name> {
        self.stop.store(true, Ordering::Relaxed);
        let mut acknowledged = Vec::new();
        for writer in self.writers {
            acknowledged.extend(writer.await.expect("writers do not panic"));
        }
        acknowledged
    }
}

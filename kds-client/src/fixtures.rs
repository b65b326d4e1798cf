//! A cluster that exists in memory only, for unit tests: what it certifies, a client believes.

use quorum::answer::{Absence, Proved, RecordAnswer, Shown, Verifier};
use quorum::certificate::{Checkpoint, VoteBook};
use quorum::grid::Grid;
use quorum::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp};
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::map::Map;
use quorum::record::Name;
use quorum::signing::{SigningKey, Voter};
use quorum::state::layout;
use quorum::{Blob, Thresholds};
use std::sync::Arc;

fn manifest(identities: &[SigningKey]) -> Manifest {
    let thresholds = Thresholds::plan(identities.len(), None, None).unwrap();
    let grid = Grid::new(thresholds);
    let own = kds_certs::generate("server", &["localhost".into()], 2_026).unwrap();
    let entry = |(id, identity): (ServerId, &SigningKey)| ServerEntry {
        id,
        row: grid.row_of(id) as u16,
        column: grid.column_of(id) as u16,
        url: format!("https://127.0.0.1:{}", 7_000 + 2 * id.index()),
        peer: format!("127.0.0.1:{}", 7_001 + 2 * id.index()),
        identity: identity.public(),
        certificate: Blob(own.certificate.clone()),
    };
    Manifest {
        format: MANIFEST_FORMAT,
        epoch_seconds: 30,
        administrators_needed: 1,
        administrators: vec![SigningKey::from_seed(&[200; 32]).public()],
        thresholds,
        servers: grid.servers().zip(identities).map(entry).collect(),
    }
}

fn identities() -> Vec<SigningKey> {
    (1..=4).map(|seed| SigningKey::from_seed(&[seed; 32])).collect()
}

/// A cluster of four servers that nobody can reach.
pub(crate) fn cluster() -> Arc<Manifest> {
    Arc::new(manifest(&identities()))
}

/// The absence of a name from an empty state that was certified then.
pub(crate) fn absence(name: &Name, time: Timestamp) -> Absence {
    let (identities, manifest) = (identities(), cluster());
    let (cluster, mut rng) = (manifest.cluster_id(), rand::rng());
    let snapshot = Map::new(cluster).seal();
    let statement =
        Checkpoint { sequence: Sequence(1), root: snapshot.root(), time, epoch: Epoch(0), attempt: 0 };
    let mut votes = VoteBook::default();
    for (server, identity) in manifest.grid().servers().zip(&identities) {
        let voter = Voter::generate(cluster, identity, server, AttemptId::default(), 0, &mut rng);
        assert!(votes.add(voter.sign(statement)).unwrap());
    }
    let answer = RecordAnswer {
        current: Proved::look_up(&snapshot, &layout::name_key(name)),
        earlier: None,
        certificate: Arc::new(votes.proof(&statement, manifest.thresholds.q()).unwrap()),
        complete: Sequence(0),
    };
    match Verifier::new(manifest).record(&answer, name, None).unwrap() {
        Shown::Absent(absence) => absence,
        Shown::There(_) => unreachable!("the state is empty"),
    }
}

//! Clients against four puppets: servers that speak real HTTPS, whose keys the test holds, so that it has certified what it
//! likes, and has one of them say what it likes.

mod chain;
mod one_liar;

use kds_client::keystore::{self, SecretKind};
use kds_tests::Cluster;
use quorum::certificate::{Certificate, Checkpoint, VoteBook};
use quorum::ids::{AttemptId, ServerId};
use quorum::record::Name;
use quorum::signing::Voter;
use std::sync::Arc;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// The voting keys of a cluster's servers, which are never started.
fn voters(cluster: &Cluster) -> Vec<Voter> {
    let id = cluster.manifest.cluster_id();
    let voter = |i: u8| {
        let path = cluster.server_dir(usize::from(i)).join("identity.key");
        let identity = keystore::read_signing_key(&path, SecretKind::IdentityKey, None).unwrap();
        Voter::generate(id, &identity, ServerId(i), AttemptId::default(), 0, &mut rand::rng())
    };
    (0..4).map(voter).collect()
}

fn certify(voters: &[Voter], statement: Checkpoint) -> Arc<Certificate> {
    let mut book = VoteBook::default();
    voters.iter().for_each(|voter| assert!(book.add(voter.sign(statement)).unwrap()));
    Arc::new(book.proof(&statement, 3).unwrap())
}

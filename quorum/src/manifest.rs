//! The cluster manifest: what a client trusts. Its digest is the cluster id.

use crate::bytes::{Blob, PublicKey};
use crate::codec::{Tagged, digest};
use crate::grid::Grid;
use crate::ids::{ClusterId, ServerId};
use crate::signing::is_sound_key;
use crate::thresholds::Thresholds;
use crate::{Hash, limits};
use serde::{Deserialize, Serialize};

/// Public description of a cluster at its start (genesis).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of this file.
    pub format: u32,
    /// Length of an epoch in seconds of agreed time.
    pub epoch_seconds: u32,
    /// Administrators that must agree to change administrators or identities (M of N).
    pub administrators_needed: u16,
    /// Keys that may register names from the start.
    pub administrators: Vec<PublicKey>,
    /// n, f, q, b, r×c, k.
    pub thresholds: Thresholds,
    /// One entry for each server, in order of id.
    pub servers: Vec<ServerEntry>,
}

/// One server of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerEntry {
    /// Its place in the grid, row-major from 0.
    pub id: ServerId,
    /// Row, from 0.
    pub row: u16,
    /// Column, from 0.
    pub column: u16,
    /// Where clients reach it: `https://host:port`.
    pub url: String,
    /// Where servers reach it: `host:port`.
    pub peer: String,
    /// Long-term key; certifies the keys that the server uses.
    pub identity: PublicKey,
    /// DER of the TLS certificate that clients and servers pin.
    pub certificate: Blob,
}

impl Tagged for Manifest {
    const TAG: &'static str = "kds.manifest";
}

/// Format that this version reads and writes. It also stands for that of the state and of what servers say
/// to each other: a cluster of another one is made anew.
pub const MANIFEST_FORMAT: u32 = 5;

/// Why a manifest cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Written by another version.
    #[error("manifest format {0} is not known to this version (it reads {MANIFEST_FORMAT})")]
    Format(u32),
    /// Not what `plan` would give: a quorum that is too small would break safety.
    #[error("the thresholds contradict each other")]
    Thresholds,
    /// Wrong number or order of servers, or a wrong place in the grid.
    #[error("server entries do not fill the grid in order (at entry {0})")]
    Servers(usize),
    /// Two servers share an identity, or it is of small order.
    #[error("the identity key of server {0} is unsound or used twice")]
    Identity(ServerId),
    /// None, too many needed, or a weak key.
    #[error("the administrators are unsound: need at least one, {0} of them must agree")]
    Administrators(u16),
    /// Zero or more than a day.
    #[error("an epoch of {0} seconds is out of range (1 to 86400)")]
    Epoch(u32),
}

impl Manifest {
    /// Checks what a liar or a typing error could have broken.
    pub fn validate(&self) -> Result<(), ManifestError> {
        self.validate_terms()?;
        if self.servers.len() != self.thresholds.n() {
            return Err(ManifestError::Servers(self.servers.len()));
        }
        let grid = self.grid();
        for (index, entry) in self.servers.iter().enumerate() {
            let in_place = entry.id.index() == index
                && usize::from(entry.row) == grid.row_of(entry.id)
                && usize::from(entry.column) == grid.column_of(entry.id);
            if !in_place {
                return Err(ManifestError::Servers(index));
            }
            let twice = self.servers[..index].iter().any(|other| other.identity == entry.identity);
            if twice || !is_sound_key(&entry.identity) {
                return Err(ManifestError::Identity(entry.id));
            }
        }
        Ok(())
    }
    /// Checks everything that is no server's: before there are any.
    pub fn validate_terms(&self) -> Result<(), ManifestError> {
        if self.format != MANIFEST_FORMAT {
            return Err(ManifestError::Format(self.format));
        }
        if self.thresholds.n() > limits::MAX_SERVERS || !self.thresholds.is_consistent() {
            return Err(ManifestError::Thresholds);
        }
        let needed = usize::from(self.administrators_needed);
        if !(1..=self.administrators.len()).contains(&needed) || !self.administrators.iter().all(is_sound_key)
        {
            return Err(ManifestError::Administrators(self.administrators_needed));
        }
        if !(1..=86_400).contains(&self.epoch_seconds) {
            return Err(ManifestError::Epoch(self.epoch_seconds));
        }
        Ok(())
    }
    /// Digest of everything above. The manifest's own hash is bound to no cluster.
    pub fn cluster_id(&self) -> ClusterId {
        ClusterId(digest(&ClusterId(Hash([0; 32])), self))
    }
    /// The entry of a server.
    pub fn server(&self, server: ServerId) -> Option<&ServerEntry> {
        self.servers.get(server.index())
    }
    /// The grid with its completion rules.
    pub fn grid(&self) -> Grid {
        Grid::new(self.thresholds)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::signing::SigningKey;

    /// A manifest of `n` servers with the identity keys of seeds 1…n, and administrator seed 0.
    pub(crate) fn sample(n: usize) -> (Manifest, Vec<SigningKey>) {
        let identities: Vec<_> = (0..n).map(|i| SigningKey::from_seed(&[i as u8 + 1; 32])).collect();
        let thresholds = Thresholds::plan(n, None, None).unwrap();
        let grid = Grid::new(thresholds);
        let servers = identities
            .iter()
            .enumerate()
            .map(|(i, identity)| ServerEntry {
                id: ServerId(i as u8),
                row: grid.row_of(ServerId(i as u8)) as u16,
                column: grid.column_of(ServerId(i as u8)) as u16,
                url: format!("https://127.0.0.1:{}", 7000 + 2 * i),
                peer: format!("127.0.0.1:{}", 7001 + 2 * i),
                identity: identity.public(),
                certificate: Blob(vec![i as u8]),
            })
            .collect();
        let manifest = Manifest {
            format: MANIFEST_FORMAT,
            epoch_seconds: 30,
            administrators_needed: 1,
            administrators: vec![SigningKey::from_seed(&[200; 32]).public()],
            thresholds,
            servers,
        };
        (manifest, identities)
    }

    #[test]
    fn every_field_changes_the_cluster_id() {
        let (manifest, _) = sample(4);
        assert_eq!(manifest.validate(), Ok(()));
        let mut other = manifest.clone();
        other.servers[3].url.push('x');
        assert_ne!(manifest.cluster_id(), other.cluster_id());
        let mut other = manifest.clone();
        other.epoch_seconds = 31;
        assert_ne!(manifest.cluster_id(), other.cluster_id());
    }

    #[test]
    fn a_weakened_manifest_is_refused() {
        let (manifest, _) = sample(9);
        let refused = |change: &dyn Fn(&mut Manifest)| {
            let mut other = manifest.clone();
            change(&mut other);
            other.validate().unwrap_err()
        };
        assert_eq!(refused(&|m| m.thresholds.quorum = 5), ManifestError::Thresholds);
        assert_eq!(
            refused(&|m| m.servers[1].identity = m.servers[0].identity),
            ManifestError::Identity(ServerId(1))
        );
        assert_eq!(refused(&|m| m.servers.swap(0, 1)), ManifestError::Servers(0));
        assert_eq!(refused(&|m| m.administrators.clear()), ManifestError::Administrators(1));
        assert_eq!(refused(&|m| m.administrators[0] = PublicKey([0; 32])), ManifestError::Administrators(1));
        assert_eq!(refused(&|m| m.epoch_seconds = 0), ManifestError::Epoch(0));
    }
}

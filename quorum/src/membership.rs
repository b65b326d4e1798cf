//! Who the servers are: the manifest, and the places that administrators gave to others since (design §4).
//!
//! A server whose identity key may be in strange hands gets another one: a [`Change`], decided by M of the
//! N administrators, ordered like any write, and in force from the next epoch on. Whose a key is, is then a
//! question about an epoch ([`Membership::identity`]): what was signed before stays good, and the old
//! identity certifies nothing for an epoch from the change on.
//!
//! Whoever has the manifest follows later changes along a chain. Each [`ChangeProof`] shows that one stands
//! in the state that q servers certified, in the epoch before it takes effect, under keys of the membership
//! before it. The log has it too, and no epoch begins while a change lacks it: so every change that is in
//! force can be proved to those who slept.

use crate::answer::Proved;
use crate::bytes::{Blob, PublicKey};
use crate::certificate::{Certificate, QuorumError};
use crate::ids::{ClusterId, Epoch, ServerId};
use crate::limits::MAX_CHANGES;
use crate::manifest::{Manifest, ServerEntry};
use crate::map::Hasher;
use crate::signing::{Keyring, is_sound_key};
use crate::state::layout;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What takes a server's place: the same server for the grid, and another one for everybody else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replacement {
    /// Whose place.
    pub server: ServerId,
    /// Where clients reach it: `https://host:port`.
    pub url: String,
    /// Where servers reach it: `host:port`.
    pub peer: String,
    /// The new long-term key.
    pub identity: PublicKey,
    /// DER of the TLS certificate that clients pin.
    pub certificate: Blob,
}

/// A replacement that administrators have decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// 0 for the cluster's first.
    pub number: u32,
    /// The first epoch whose keys the new identity certifies.
    pub from: Epoch,
    /// What changes.
    pub replacement: Replacement,
}

/// A change, and what shows it to those who know all before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeProof {
    /// The change, with its path in the certified state.
    pub change: Proved<Change>,
    /// q signatures on the root, made in the epoch before the change takes effect.
    pub certificate: Certificate,
}

/// Why a change is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// One is left out, or there are too many.
    #[error("the changes of the membership are not in order: after {known} comes the next one")]
    Order {
        /// How many are known.
        known: usize,
    },
    /// A change that no correct cluster makes.
    #[error("change {0} of the membership is malformed")]
    Malformed(u32),
    /// Certified in another epoch than the one before it takes effect.
    #[error("change {0} of the membership is certified in another epoch than the one before it")]
    Epoch(u32),
    /// The certificate does not hold.
    #[error("a change of the membership is not certified: {0}")]
    Certificate(#[from] QuorumError),
    /// It is not in the certified state.
    #[error("change {0} of the membership is not in the certified state")]
    NotThere(u32),
}

/// Who the servers are, in every epoch so far. A value: changes make another one.
#[derive(Clone, Debug)]
pub struct Membership {
    manifest: Arc<Manifest>,
    cluster: ClusterId,
    changes: Vec<Change>,
    /// Of the first changes; of all that are in force.
    proofs: Vec<Arc<ChangeProof>>,
}

impl Membership {
    /// As the manifest has it.
    pub fn genesis(manifest: Arc<Manifest>) -> Arc<Self> {
        let cluster = manifest.cluster_id();
        Arc::new(Self { manifest, cluster, changes: Vec::new(), proofs: Vec::new() })
    }
    /// The manifest.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }
    /// Its digest.
    pub fn cluster(&self) -> &ClusterId {
        &self.cluster
    }
    /// All changes, in order.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
    /// What shows them; the last one may still lack it.
    pub fn proofs(&self) -> &[Arc<ChangeProof>] {
        &self.proofs
    }
    /// The change that is decided and not shown to others yet.
    pub fn unproved(&self) -> Option<&Change> {
        self.changes.get(self.proofs.len())
    }
    fn changes_of(&self, server: ServerId) -> impl DoubleEndedIterator<Item = &Change> {
        self.changes.iter().filter(move |change| change.replacement.server == server)
    }
    /// The identity that certifies a server's keys of an epoch.
    pub fn identity(&self, server: ServerId, epoch: Epoch) -> Option<PublicKey> {
        let entry = self.manifest.server(server)?;
        let change = self.changes_of(server).rev().find(|change| change.from <= epoch);
        Some(change.map_or(entry.identity, |change| change.replacement.identity))
    }
    /// Whether a server's keys of an epoch are of an identity that is no longer its own.
    pub fn is_replaced(&self, server: ServerId, of: Epoch, current: Epoch) -> bool {
        self.changes_of(server).any(|change| of < change.from && change.from <= current)
    }
    /// The first epoch of a server's identity, in force or about to be.
    pub fn since(&self, server: ServerId) -> Epoch {
        self.changes_of(server).next_back().map_or(Epoch(0), |change| change.from)
    }
    /// Whether a server gets another identity with this epoch.
    pub fn is_replaced_with(&self, server: ServerId, epoch: Epoch) -> bool {
        self.changes_of(server).any(|change| change.from == epoch)
    }
    /// Where a server is, and how it is told: as the last change says, whether in force or about to be.
    pub fn place(&self, server: ServerId) -> Option<ServerEntry> {
        let mut entry = self.manifest.server(server)?.clone();
        if let Some(Change { replacement, .. }) = self.changes_of(server).next_back() {
            let Replacement { url, peer, identity, certificate, .. } = replacement.clone();
            (entry.url, entry.peer, entry.identity, entry.certificate) = (url, peer, identity, certificate);
        }
        Some(entry)
    }
    /// Whether a replacement is one that this membership can have: of a server that there is, by an identity
    /// that nobody has or had.
    pub fn can_have(&self, replacement: &Replacement) -> bool {
        let used = self.manifest.servers.iter().map(|entry| &entry.identity);
        let mut used = used.chain(self.changes.iter().map(|change| &change.replacement.identity));
        self.manifest.server(replacement.server).is_some()
            && self.changes.len() < MAX_CHANGES
            && replacement.is_plausible()
            && !used.any(|used| *used == replacement.identity)
    }
    /// With one more change, which nothing shows to others yet.
    pub(crate) fn with_change(&self, change: Change) -> Arc<Self> {
        let mut changed = self.clone();
        changed.changes.push(change);
        Arc::new(changed)
    }
    /// With what shows the first change that lacked it.
    pub(crate) fn with_proof(&self, proof: ChangeProof) -> Arc<Self> {
        let mut proved = self.clone();
        proved.proofs.push(Arc::new(proof));
        Arc::new(proved)
    }
    /// Checks what is to show a change; only `number` changes are known before it.
    pub(crate) fn check(&self, number: usize, proof: &ChangeProof) -> Result<Change, MembershipError> {
        let (manifest, changes) = (Arc::clone(&self.manifest), self.changes[..number].to_vec());
        let before = Self { manifest, cluster: self.cluster, changes, proofs: Vec::new() };
        let order = MembershipError::Order { known: number };
        let change = proof.change.value.as_ref().filter(|change| change.number as usize == number);
        let change = change.ok_or(order)?;
        if !before.can_have(&change.replacement) {
            return Err(MembershipError::Malformed(change.number));
        }
        // Keys of the epoch in which it takes effect may be the new identity's; and a certificate of an
        // earlier one would show what was not decided then.
        if proof.certificate.statement.epoch.next() != change.from {
            return Err(MembershipError::Epoch(change.number));
        }
        proof.certificate.verify(&mut Keyring::of(Arc::new(before)))?;
        let (root, key) = (&proof.certificate.statement.root, layout::change_key(change.number));
        match proof.change.verify(&Hasher::new(self.cluster), root, &key) {
            Ok(Some(shown)) => Ok(shown.clone()),
            _ => Err(MembershipError::NotThere(change.number)),
        }
    }
    /// This one, or the other if that has more.
    pub fn or_newer(self: &Arc<Self>, other: &Arc<Self>) -> Arc<Self> {
        let known = |of: &Self| (of.proofs.len(), of.changes.len());
        Arc::clone(if known(other) > known(self) { other } else { self })
    }
    /// Follows changes that are not known yet; those that are known already are passed over.
    ///
    /// # Errors
    /// At the first change that does not hold.
    pub fn follow(
        self: &Arc<Self>,
        proofs: impl IntoIterator<Item = Arc<ChangeProof>>,
    ) -> Result<Arc<Self>, MembershipError> {
        let mut followed = Arc::clone(self);
        for proof in proofs {
            let number = proof.change.value.as_ref().map_or(usize::MAX, |change| change.number as usize);
            let known = followed.proofs.len();
            if number < known {
                // Shown in another way, it has to hold all the same.
                if *proof != *followed.proofs[number]
                    && followed.check(number, &proof)? != followed.changes[number]
                {
                    return Err(MembershipError::NotThere(number as u32));
                }
                continue;
            }
            let change = followed.check(known, &proof)?;
            let mut next = Self::clone(&followed);
            next.changes.truncate(known);
            next.changes.push(change);
            next.proofs.push(proof);
            followed = Arc::new(next);
        }
        Ok(followed)
    }
}

impl Replacement {
    /// Whether its parts could be a server's.
    fn is_plausible(&self) -> bool {
        use crate::limits::{MAX_ADDRESS_BYTES, MAX_CERTIFICATE_BYTES};
        is_sound_key(&self.identity)
            && self
                .url
                .strip_prefix("https://")
                .is_some_and(|address| is_address(address.trim_end_matches('/')))
            && is_address(&self.peer)
            && self.url.len().max(self.peer.len()) <= MAX_ADDRESS_BYTES
            && (1..=MAX_CERTIFICATE_BYTES).contains(&self.certificate.len())
    }
}

/// Host and port.
fn is_address(address: &str) -> bool {
    let plain =
        |host: &str| !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    address.rsplit_once(':').is_some_and(|(host, port)| plain(host) && port.parse::<u16>().is_ok())
}

#[cfg(test)]
pub(crate) mod tests;

//! What survives a crash: the writes that were committed, and nothing else.

use quorum::bytes::SecretBlob;
use quorum::certificate::Certificate;
use quorum::certificate::{Checkpoint, QuorumProof};
use quorum::ids::{ClusterId, Sequence};
use quorum::map::Map;
use quorum::message::{Batch, Commit, PrePrepare, Prepare};
use quorum::ordering::{Amnesia, Stored, StoredSlot, StoredState, StoredView, VaultKey, Write};
use quorum::shares::ShareSet;
use quorum::signing::Signed;
use std::collections::BTreeMap;

#[derive(Clone, Default)]
pub struct Slot {
    pub accepted: Option<(Signed<PrePrepare>, Batch)>,
    pub prepared: Option<(QuorumProof<Prepare>, Option<Batch>)>,
    pub committed: Option<(QuorumProof<Commit>, Option<Batch>)>,
}

#[derive(Clone, Default)]
pub struct Disk {
    pub slots: BTreeMap<Sequence, Slot>,
    pub state: Option<Checkpoint>,
    pub leaves: BTreeMap<Vec<u8>, Vec<u8>>,
    pub certificate: Option<Certificate>,
    pub view: Option<StoredView>,
    pub shares: ShareSet,
    pub vault: BTreeMap<VaultKey, SecretBlob>,
    pub amnesia: Option<Amnesia>,
    pub voting_key: u64,
}

impl Disk {
    pub fn apply(&mut self, write: &Write) {
        match write {
            Write::Accepted { pre_prepare, batch } => {
                let slot = self.slots.entry(pre_prepare.body.0.sequence).or_default();
                if let (Some((_, kept @ None)), Some((_, accepted))) = (&mut slot.prepared, &slot.accepted) {
                    *kept = Some(accepted.clone());
                }
                slot.accepted = Some((pre_prepare.clone(), batch.as_ref().clone()));
            }
            Write::Prepared { sequence, proof } => {
                self.slots.entry(*sequence).or_default().prepared = Some((proof.clone(), None));
            }
            Write::Committed { batch, proof } => {
                let slot = self.slots.entry(proof.statement.0.sequence).or_default();
                let batch = batch.as_ref().map(|batch| batch.as_ref().clone());
                slot.committed = Some((proof.clone(), batch));
            }
            Write::View { view, began } => self.view = Some(StoredView { view: *view, began: began.clone() }),
            Write::Certified(certificate) => self.certificate = Some(certificate.as_ref().clone()),
            Write::State { checkpoint, leaves } => {
                self.state = Some(*checkpoint);
                for (key, value) in leaves {
                    match value {
                        Some(value) => self.leaves.insert(key.clone(), value.to_vec()),
                        None => self.leaves.remove(key),
                    };
                }
            }
            Write::Shares(operation) => self.shares.apply(operation),
            Write::Vault { key, value } => {
                match value {
                    Some(value) => self.vault.insert(*key, value.clone()),
                    None => self.vault.remove(key),
                };
            }
            Write::Amnesia(amnesia) => self.amnesia = *amnesia,
            Write::VotingKey(number) => self.voting_key = *number,
            Write::Reset => {
                self.slots.clear();
                self.leaves.clear();
                (self.state, self.certificate) = (None, None);
            }
            Write::Trim { through } => self.slots = self.slots.split_off(&through.next()),
        }
    }

    /// Changes an entry, and the digest of all of them to fit; says whether there was one.
    pub fn corrupt(&mut self, cluster: ClusterId) -> bool {
        let Some(state) = &mut self.state else { return false };
        let Some((_, value)) = self.leaves.iter_mut().find(|(key, _)| key.starts_with(b"n/")) else {
            return false;
        };
        let last = value.len() - 1;
        value[last] ^= 1;
        let entries = self.leaves.iter().map(|(key, value)| (key.clone(), value.clone()));
        state.root = Map::from_entries(cluster, entries).seal().root();
        self.certificate = None;
        true
    }

    pub fn stored(&self) -> Stored {
        let state = self.state.map(|checkpoint| StoredState {
            checkpoint,
            leaves: self.leaves.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        });
        let slots = self.slots.iter().map(|(sequence, slot)| StoredSlot {
            sequence: *sequence,
            accepted: slot.accepted.clone(),
            prepared: slot.prepared.clone(),
            committed: slot.committed.clone(),
        });
        let view = self.view.clone();
        Stored {
            state,
            slots: slots.collect(),
            certificate: self.certificate.clone(),
            view,
            amnesia: self.amnesia,
            voting_key: self.voting_key,
            voted_in: None,
            forgot: false,
            shares_damaged: false,
            vault: self.vault.iter().map(|(key, value)| (*key, value.clone())).collect(),
            damaged: false,
        }
    }
}

//! View changes and new views (PBFT §4.4).
//!
//! A view change shows up to a window of prepared batches, each with the votes of q servers. So that the largest
//! fits into a frame, the certificates of the keys stand in one table, each once; and a new view names its q view
//! changes by server and digest, as PBFT's does. Who lacks one fetches it from whoever shows the new view.

use super::{Evidence, MessageError, Prepare};
use crate::bytes::{Hash, SignatureBytes};
use crate::certificate::{Certificate, QuorumError, QuorumProof, are_quorum};
use crate::codec::{Tagged, digest};
use crate::ids::{AttemptId, ClusterId, Sequence, ServerId, View};
use crate::limits::{KEYS_SHOWN, WINDOW};
use crate::signing::{KeyCertificate, Keyring, Signed, Statement, Verified, Vote};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// "I take part in no view before this one, and this is what I have prepared" (PBFT §4.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewChange {
    /// The view that is to begin.
    pub view: View,
    /// By which the epoch began that its author is in.
    pub attempt: AttemptId,
    /// Where that epoch began: everything up to here is decided for its author.
    pub began: Sequence,
    /// The sender's last certificate; none before the first. Its keys may be of an earlier epoch.
    pub stable: Option<Certificate>,
    /// For each sequence number after both at which the sender prepared a batch in this epoch: the votes of the
    /// highest view in which it did.
    pub prepared: Vec<Prepared>,
    /// Certificates of the keys that made these votes, each once, in ascending order.
    pub keys: Vec<KeyCertificate>,
}
impl Tagged for ViewChange {
    const TAG: &'static str = "kds.view-change";
}
impl Statement for ViewChange {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

/// q votes for a batch, under keys that stand in the table of the view change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// What q servers voted for.
    pub statement: Prepare,
    /// Their votes.
    pub votes: Vec<KeyedVote>,
}

/// A vote whose key stands elsewhere. Whose key it is, is whose vote it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyedVote {
    /// Which key of the table.
    pub key: u16,
    /// The signature.
    pub signature: SignatureBytes,
}

impl ViewChange {
    /// From the proofs of what is prepared, in ascending order of their places.
    pub fn new<'a>(
        view: View,
        (attempt, began): (AttemptId, Sequence),
        stable: Option<Certificate>,
        proofs: impl Iterator<Item = &'a QuorumProof<Prepare>> + Clone,
    ) -> Self {
        let mut keys: Vec<_> = proofs.clone().flat_map(|proof| &proof.keys).copied().collect();
        keys.sort_unstable();
        keys.dedup();
        // The table is shorter than 2^16: there are at most so many servers, with so many keys each.
        let place = |key: &KeyCertificate| keys.binary_search(key).ok()?.try_into().ok();
        let prepared = proofs.map(|proof| {
            let pairs = proof.keys.iter().zip(&proof.votes);
            let vote =
                |(key, vote): (_, &Vote)| Some(KeyedVote { key: place(key)?, signature: vote.signature });
            Prepared { statement: proof.statement, votes: pairs.filter_map(vote).collect() }
        });
        let prepared = prepared.collect();
        Self { view, attempt, began, stable, prepared, keys }
    }
    /// Everything up to here is decided.
    pub fn low(&self) -> Sequence {
        self.stable.as_ref().map_or(self.began, |stable| stable.statement.sequence.max(self.began))
    }
    /// Checks every certificate and proof in it. What is nested in it is as fresh as it is itself: proofs are of
    /// its own epoch, and its certificate of no later one.
    pub(super) fn check(&self, keyring: &mut Keyring) -> Result<(), MessageError> {
        self.is_well_formed(keyring)?;
        if let Some(stable) = &self.stable {
            stable.verify(keyring)?;
        }
        let keys = keyring.carried(&self.keys)?;
        for Prepared { statement, votes } in &self.prepared {
            for vote in votes {
                keyring.verify_under(&keys[usize::from(vote.key)], statement, &vote.signature)?;
            }
        }
        Ok(())
    }
    /// What can be seen without a signature.
    fn is_well_formed(&self, keyring: &Keyring) -> Result<(), MessageError> {
        if self.stable.as_ref().is_some_and(|stable| stable.statement.attempt() > self.attempt) {
            return Err(MessageError::BadViewChange);
        }
        let ordered = self.keys.is_sorted_by(|one, next| one < next);
        let server = |key: &KeyCertificate| key.statement.server;
        let few = self.keys.chunk_by(|one, next| server(one) == server(next));
        let few = few.into_iter().all(|of_one| of_one.len() <= KEYS_SHOWN);
        let current = self.keys.iter().all(|key| key.statement.attempt_id() == self.attempt);
        if !ordered || !few || !current {
            return Err(MessageError::BadViewChange);
        }
        let low = self.low().0;
        let mut previous = low;
        for Prepared { statement: Prepare(slot), votes } in &self.prepared {
            // In order, each place once, between the watermarks, from an earlier view.
            let placed = slot.sequence.0 > previous && slot.sequence.0 <= low.saturating_add(WINDOW);
            if !placed || slot.view >= self.view || slot.attempt != self.attempt {
                return Err(MessageError::BadViewChange);
            }
            previous = slot.sequence.0;
            let signers = votes.iter().map(|vote| self.keys.get(usize::from(vote.key)).map(server));
            let signers = signers.collect::<Option<Vec<_>>>().ok_or(MessageError::BadViewChange)?;
            are_quorum(keyring.manifest(), &signers).map_err(MessageError::Quorum)?;
        }
        Ok(())
    }
}

/// A signed view change: what a new view names by its digest.
impl Tagged for Signed<ViewChange> {
    const TAG: &'static str = "kds.signed-view-change";
}

/// A view change of which everything holds, with the digest by which a new view names it.
#[derive(Clone, Debug)]
pub struct CheckedViewChange {
    evidence: Arc<Evidence<ViewChange>>,
    digest: Hash,
}

impl CheckedViewChange {
    /// From one whose signature has been checked, and what it says.
    pub fn new(cluster: &ClusterId, change: Verified<ViewChange>) -> Self {
        Self::from_own_log(cluster, Arc::new(change.into_stored()))
    }
    /// From this server's own database: it was checked before it was written. The digest shows whether it came
    /// back undamaged.
    pub(crate) fn from_own_log(cluster: &ClusterId, evidence: Arc<Evidence<ViewChange>>) -> Self {
        Self { digest: digest(cluster, &evidence.0), evidence }
    }
    /// What is said.
    pub fn body(&self) -> &ViewChange {
        &self.evidence.0.body
    }
    /// Who says it.
    pub fn server(&self) -> ServerId {
        self.evidence.0.server
    }
    /// What a new view names it by.
    pub fn digest(&self) -> Hash {
        self.digest
    }
    /// With the certificate of its key, to write to disk or to pass on.
    pub fn evidence(&self) -> &Arc<Evidence<ViewChange>> {
        &self.evidence
    }
}

/// q view changes: the view begins, with what they call for (PBFT §4.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewView {
    /// The view that begins.
    pub view: View,
    /// By which the epoch began in which it does.
    pub attempt: AttemptId,
    /// View changes of q servers, all made in that epoch, by the digests of what they signed.
    pub view_changes: Vec<(ServerId, Hash)>,
}
impl Tagged for NewView {
    const TAG: &'static str = "kds.new-view";
}
impl Statement for NewView {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

impl NewView {
    /// Checks that it names q different servers. What they say is checked as it comes.
    pub(super) fn check(&self, keyring: &Keyring) -> Result<(), MessageError> {
        let servers: Vec<_> = self.view_changes.iter().map(|(server, _)| *server).collect();
        are_quorum(keyring.manifest(), &servers).map_err(|_: QuorumError| MessageError::BadNewView).map(drop)
    }
    /// Whether these are the view changes that it names, in that order, and all of this view and of an epoch that
    /// began there. One of a server does not stand for another's.
    pub fn is_shown_by(&self, changes: &[CheckedViewChange], epoch_began: Sequence) -> bool {
        let fits = |((server, digest), change): (&(ServerId, Hash), &CheckedViewChange)| {
            let ViewChange { view, attempt, began, .. } = *change.body();
            let named = (*server, *digest) == (change.server(), change.digest());
            named && (view, attempt, began) == (self.view, self.attempt, epoch_began)
        };
        changes.len() == self.view_changes.len() && self.view_changes.iter().zip(changes).all(fits)
    }
}

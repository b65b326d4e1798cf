//! Writes: what can be asked for, and what comes of it; [`crate::submit`] has it executed.

use crate::client::Client;
use crate::error::ClientError;
use quorum::PublicKey;
use quorum::answer::{PageAnswer, Receipt, SpaceAnswer, Verifier};
use quorum::ids::Sequence;
use quorum::record::{Entry, Name};
use quorum::request::{Decision, Done, Operation};
use quorum::signing::SigningKey;
use quorum::state::{Account, Owner, Pending, Space};

/// An executed write: made of a proof that it was.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Written {
    /// What it did.
    pub done: Done,
    /// The batch that it was part of.
    pub sequence: Sequence,
    /// Whether it is visible to every complete read: servers that hold it cover c columns and
    /// number q. If not, it is committed and durable at q servers, and reads of q servers see it.
    pub complete: bool,
    /// The proof of its execution.
    pub receipt: Box<Receipt>,
}

impl Client {
    /// Registers a name, as an administrator.
    pub async fn register(&self, key: &SigningKey, name: Name, entry: Entry) -> Result<Written, ClientError> {
        self.submit(key, Operation::Register { name, entry }).await
    }
    /// Asks for a decision of the administrators, as one of them: it is made when enough of them have.
    pub async fn decide(&self, key: &SigningKey, decision: Decision) -> Result<Written, ClientError> {
        self.submit(key, Operation::Decide(decision)).await
    }
    /// The administrators, in the order of their keys.
    pub async fn administrators(&self) -> Result<Vec<PublicKey>, ClientError> {
        self.current_good("/v1/administrators", |verifier: &mut Verifier, answer: &PageAnswer| {
            Ok((verifier.administrators(answer)?, answer.certificate.statement))
        })
        .await
    }
    /// What some administrators ask for, and not yet enough of them.
    pub async fn decisions(&self) -> Result<Vec<Pending>, ClientError> {
        self.current_good("/v1/decisions", |verifier: &mut Verifier, answer: &PageAnswer| {
            Ok((verifier.decisions(answer)?, answer.certificate.statement))
        })
        .await
    }
    /// What the state takes and may take, and what of it is the key's and its quota, if it owns names.
    pub async fn space(&self, key: &PublicKey) -> Result<(Space, Option<(Owner, Account)>), ClientError> {
        let hex: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
        self.current_good(&format!("/v1/space/{hex}"), |verifier: &mut Verifier, answer: &SpaceAnswer| {
            Ok((verifier.space(answer, key)?, answer.certificate.statement))
        })
        .await
    }
    /// Says whether others may make this key, which owns a name, the owner of secrets and names.
    pub async fn refuse_gifts(&self, key: &SigningKey, refuse: bool) -> Result<Written, ClientError> {
        self.submit(key, Operation::RefuseGifts { refuse }).await
    }
    /// Replaces version `from_version` of a name.
    pub async fn rotate(
        &self,
        key: &SigningKey,
        name: Name,
        from_version: u64,
        entry: Entry,
    ) -> Result<Written, ClientError> {
        self.submit(key, Operation::Rotate { name, from_version, entry }).await
    }
    /// Withdraws version `from_version` of a name.
    pub async fn revoke(
        &self,
        key: &SigningKey,
        name: Name,
        from_version: u64,
        reason: String,
    ) -> Result<Written, ClientError> {
        self.submit(key, Operation::Revoke { name, from_version, reason }).await
    }
}

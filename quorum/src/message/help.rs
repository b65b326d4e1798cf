//! What a server that started, or fell behind, asks for and is told.

use super::{Commit, MessageError, Prepare, ViewChange};
use crate::bytes::Hash;
use crate::certificate::Certificate;
use crate::codec::Tagged;
use crate::ids::{AttemptId, Sequence, ServerId, View};
#[cfg(doc)]
use crate::limits::MAX_PARTS;
use crate::map::{PartItem, WantedPart};
use crate::refresh::Dealing;
use crate::signing::{KeyCertificate, KeyError, Keyring, Signed, Statement};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its view.
    pub view: View,
    /// Whether that view has begun for it.
    pub active: bool,
    /// The last batch it executed.
    pub executed: Sequence,
    /// The last batch it has a certificate for.
    pub certified: Sequence,
    /// Its state is wrong: batches are of no use to it.
    pub wants_state: bool,
    /// Changes of the membership that it knows.
    pub changes: u32,
    /// By which the epoch began whose key it has: an old one if it slept.
    pub attempt: AttemptId,
}
impl Tagged for Status {
    const TAG: &'static str = "kds.status";
}
impl Statement for Status {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

/// A signed statement with the certificate of its key, for somebody who may not know the key.
pub type Evidence<T> = (Signed<T>, KeyCertificate);

/// What a server holds of another one's newest signatures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Witness {
    /// The question that this answers.
    pub boot: u64,
    /// Its last certificate.
    pub certificate: Option<Certificate>,
    /// The asker's prepare votes for the highest sequence number, and of the last view; at most two.
    pub prepares: Vec<Evidence<Prepare>>,
    /// The same of its commit votes.
    pub commits: Vec<Evidence<Commit>>,
    /// The asker's last view change.
    pub view_change: Option<Arc<Evidence<ViewChange>>>,
}

impl Witness {
    pub(super) fn check(&self, keyring: &mut Keyring) -> Result<(), MessageError> {
        fn holds<'a, T: Statement + 'a>(
            evidence: impl IntoIterator<Item = &'a Evidence<T>>,
            keyring: &mut Keyring,
        ) -> Result<(), MessageError> {
            for (signed, key) in evidence {
                if keyring.manifest().server(signed.server).is_none() {
                    return Err(KeyError::UnknownServer(signed.server).into());
                }
                // It may be long ago: the asker judges that.
                let carried = keyring.carried(&[*key])?;
                keyring.verify_with(&carried, signed.server, &signed.body, &signed.signature)?;
            }
            Ok(())
        }
        if let Some(certificate) = &self.certificate {
            certificate.verify(keyring)?;
        }
        if self.prepares.len() > 2 || self.commits.len() > 2 {
            return Err(MessageError::TooManyVotes);
        }
        holds(&self.prepares, keyring)?;
        holds(&self.commits, keyring)?;
        // What it says about others does not matter here, only that its author left a view.
        holds(self.view_change.as_deref(), keyring)
    }
}

/// A question for parts of the state under a certified root.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AskParts {
    /// Of which batch's state.
    pub sequence: Sequence,
    /// Its root.
    pub root: Hash,
    /// Names the question in its answer.
    pub question: u64,
    /// Which parts; at most [`MAX_PARTS`].
    pub parts: Vec<WantedPart>,
}

/// Parts of a state, in the order of the question; not all of them if they are large, and none if the
/// sender does not have that state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// The question that this answers.
    pub question: u64,
    /// The parts.
    pub parts: Vec<Vec<PartItem>>,
}

/// A dealer's contributions, as far as their receiver may know them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandedOut {
    /// To which attempt.
    pub attempt: AttemptId,
    /// Whose.
    pub dealer: ServerId,
    /// The contributions. The dealer's commitment in the log shows whether they are right.
    pub dealing: Dealing,
}

/// A question for a dealer's contributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedDealing {
    /// To which attempt.
    pub attempt: AttemptId,
    /// Whose.
    pub dealer: ServerId,
}

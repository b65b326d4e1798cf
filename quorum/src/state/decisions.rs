//! What M of the N administrators decide together: who they are, who takes a server's place (design §4), and how much
//! the state may take.
//!
//! Each of them asks for the same decision; it is made when M who are administrators at that moment have.
//! What is asked for stays on record until then, or for [`DECISION_MS`] after the first.

use super::{State, layout};
use crate::bytes::PublicKey;
use crate::codec::{Tagged, digest};
use crate::ids::Timestamp;
use crate::limits::{DECISION_MS, MAX_ADMINISTRATORS, MAX_DECISIONS};
use crate::record::Invalid;
use crate::request::{Decision, Done, Refusal};
use crate::signing::is_sound_key;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

impl Tagged for Decision {
    const TAG: &'static str = "kds.decision";
}

/// A decision that is not made yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pending {
    /// What is asked for.
    pub decision: Decision,
    /// Who asked for it; who is no administrator any more does not count.
    pub approvals: BTreeSet<PublicKey>,
    /// When it was asked for first.
    pub since: Timestamp,
}

impl State {
    /// An administrator asks for a decision.
    pub(super) fn decide(&mut self, client: PublicKey, decision: &Decision) -> Result<Done, Refusal> {
        if !self.is_administrator(&client) {
            return Err(Refusal::NotAllowed);
        }
        self.may_be_decided(decision)?;
        self.forget_old_decisions();
        let at = layout::decision_key(&digest(&self.cluster, decision));
        let known: Option<Pending> = self.load(&at);
        if known.is_none() && self.map.iter_prefix(layout::DECISIONS).count() >= MAX_DECISIONS {
            return Err(Refusal::TooOften);
        }
        let mut pending = known.unwrap_or_else(|| Pending {
            decision: decision.clone(),
            approvals: BTreeSet::new(),
            since: self.time,
        });
        pending.approvals.insert(client);
        pending.approvals.retain(|key| layout::is_administrator(&self.map, key));
        let (approvals, needed) = (pending.approvals.len() as u16, self.manifest.administrators_needed);
        if approvals < needed {
            self.put(at, &pending);
            return Ok(Done::Approved { approvals, needed });
        }
        if self.map.get(&at).is_some() {
            self.delete_key(at);
        }
        match decision {
            Decision::AddAdministrator { key } => self.put(layout::administrator(key), &()),
            Decision::RemoveAdministrator { key } => self.delete_key(layout::administrator(key)),
            Decision::ReplaceIdentity { replacement } => self.replace(replacement),
            Decision::SetQuota { quota } => self.set_quota(quota),
        }
        Ok(Done::Decided)
    }

    /// Whether a decision would change anything, and leave a cluster that can decide on.
    fn may_be_decided(&self, decision: &Decision) -> Result<(), Refusal> {
        let count = self.map.iter_prefix(layout::ADMINISTRATORS).count();
        match decision {
            Decision::AddAdministrator { key } if self.is_administrator(key) => Err(Refusal::AlreadySo),
            Decision::AddAdministrator { key } if !is_sound_key(key) || count >= MAX_ADMINISTRATORS => {
                Err(Refusal::Invalid(Invalid::Administrator))
            }
            Decision::RemoveAdministrator { key } if !self.is_administrator(key) => Err(Refusal::AlreadySo),
            Decision::RemoveAdministrator { .. }
                if count <= usize::from(self.manifest.administrators_needed) =>
            {
                Err(Refusal::Invalid(Invalid::Administrator))
            }
            Decision::ReplaceIdentity { replacement } => self.may_be_replaced(replacement),
            Decision::SetQuota { quota } => self.may_be_set(quota),
            _ => Ok(()),
        }
    }

    fn forget_old_decisions(&mut self) {
        let pending = self.map.iter_prefix(layout::DECISIONS);
        let old = pending.filter(|(_, value)| {
            crate::codec::decode::<Pending>(value)
                .is_ok_and(|pending| self.time.since_ms(pending.since) >= DECISION_MS)
        });
        for key in old.map(|(key, _)| key.to_vec()).collect::<Vec<_>>() {
            self.delete_key(key);
        }
    }
}

//! What servers say about themselves: their current voting and sealing keys (design §7).

use super::{Lookup, State, layout};
use crate::bytes::PublicKey;
use crate::ids::Timestamp;
use crate::limits::ANNOUNCE_INTERVAL_MS;
use crate::membership::Membership;
use crate::record::Invalid;
use crate::request::{Done, Operation, Refusal, Request};
use crate::signing::{KeyCertificate, KeyPurpose};
use serde::{Deserialize, Serialize};

/// The keys that a server announced last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerKeys {
    /// Signs votes.
    pub voting: KeyCertificate,
    /// Clients seal shares to it.
    pub sealing: KeyCertificate,
    /// Agreed time of the announcement.
    pub announced: Timestamp,
}

/// Whether this is a server's announcement of the key that signed it, with certificates of the
/// server's identity key: then it may be ordered although the key is not known yet. A server gets
/// one through in an interval, since it can certify as many keys as it likes; and its first of an epoch, which may end
/// early.
pub(super) fn announces_itself(
    state: &impl Lookup,
    membership: &Membership,
    now: Timestamp,
    request: &Request,
) -> bool {
    let Operation::AnnounceKeys { voting, sealing } = &request.operation else { return false };
    // Whoever missed its beginning has to be heard in an epoch, however short it is.
    let epoch_ms = u64::from(membership.manifest().epoch_seconds) * 1_000;
    let interval_ms = ANNOUNCE_INTERVAL_MS.min(epoch_ms / 4);
    // Those of another epoch would be refused, and are ordered for nobody: not for a thief, and not for a liar.
    let current = layout::epochs(state).unwrap_or_default().attempt_id();
    let due = layout::server_keys(state, voting.statement.server).is_none_or(|known| {
        known.voting.statement.attempt_id() != current || now.since_ms(known.announced) >= interval_ms
    });
    due && voting.statement.attempt_id() == current
        && certified(membership, &request.client, voting, sealing).is_some()
}

fn certified(
    membership: &Membership,
    client: &PublicKey,
    voting: &KeyCertificate,
    sealing: &KeyCertificate,
) -> Option<()> {
    let fits = voting.statement.key == *client
        && voting.statement.purpose == KeyPurpose::Voting
        && sealing.statement.purpose == KeyPurpose::Sealing
        && voting.statement.server == sealing.statement.server;
    (fits && voting.verify(membership).is_ok() && sealing.verify(membership).is_ok()).then_some(())
}

impl State {
    pub(super) fn announce(
        &mut self,
        client: PublicKey,
        voting: &KeyCertificate,
        sealing: &KeyCertificate,
    ) -> Result<Done, Refusal> {
        certified(&self.membership, &client, voting, sealing)
            .ok_or(Refusal::Invalid(Invalid::Certificate))?;
        // That of the voting key is looked at before it is ordered.
        if sealing.statement.attempt_id() != self.attempt {
            return Err(Refusal::EpochPassed { current: self.epoch() });
        }
        let server = voting.statement.server;
        let announced = self.time;
        self.put(layout::server_key(server), &ServerKeys { voting: *voting, sealing: *sealing, announced });
        Ok(Done::Announced)
    }
}

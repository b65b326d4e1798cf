//! Servers that are given another identity: how the log decides it, and comes to show it to those who were
//! not there (design §4, [`membership`](crate::membership)).
//!
//! A change that is decided is in force from the next epoch on, and that does not begin before a server has
//! put on record what shows the change: a certificate of this epoch. An attempt at the next epoch that is
//! under way ends, since in it the server that is replaced may have dealt.

use super::{Lookup, State, layout};
use crate::ids::ServerId;
use crate::membership::{Change, ChangeProof, Membership, Replacement};
use crate::record::Invalid;
use crate::request::{Done, Refusal, Request};

/// Whether a server shows a change that nothing shows yet. The server is the one whose announced voting key
/// signs.
pub(super) fn attests(
    state: &impl Lookup,
    membership: &Membership,
    request: &Request,
    server: ServerId,
    proof: &ChangeProof,
) -> bool {
    let keys = layout::server_keys(state, server).filter(|keys| keys.voting.statement.key == request.client);
    let attempt = layout::epochs(state).unwrap_or_default().attempt_id();
    keys.is_some_and(|keys| keys.voting.statement.attempt_id() == attempt) && shows(membership, proof)
}

/// Whether it is for the change that nothing shows yet, and holds.
fn shows(membership: &Membership, proof: &ChangeProof) -> bool {
    membership.unproved().is_some_and(|wanted| {
        membership.check(membership.proofs().len(), proof).is_ok_and(|change| change == *wanted)
    })
}

impl State {
    /// Whether a replacement can be decided now.
    pub(super) fn may_be_replaced(&self, replacement: &Replacement) -> Result<(), Refusal> {
        let last = self.membership.changes().last();
        let place = self.membership.place(replacement.server);
        if place.is_some_and(|place| place.identity == replacement.identity) {
            return Err(Refusal::AlreadySo);
        }
        // One in an epoch: the shares of the one before must be on their way back.
        if last.is_some_and(|last| last.from > self.epoch()) {
            return Err(Refusal::TooOften);
        }
        match self.membership.can_have(replacement) {
            true => Ok(()),
            false => Err(Refusal::Invalid(Invalid::Replacement)),
        }
    }

    pub(super) fn replace(&mut self, replacement: &Replacement) {
        let number = self.membership.changes().len() as u32;
        let change = Change { number, from: self.epoch().next(), replacement: replacement.clone() };
        self.put(layout::change_key(number), &change);
        self.membership = self.membership.with_change(change);
        let mut epochs = layout::epochs(&self.map).unwrap_or_default();
        epochs.give_up();
        self.put(layout::EPOCHS.to_vec(), &epochs);
    }

    /// A server puts on record what shows a change; that it does was looked at when the request was admitted.
    pub(super) fn attest(&mut self, proof: &ChangeProof) -> Done {
        self.put(layout::change_proof_key(self.membership.proofs().len() as u32), proof);
        self.membership = self.membership.with_proof(proof.clone());
        Done::Attested
    }
}

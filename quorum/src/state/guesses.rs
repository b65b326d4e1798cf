//! Secrets behind a passphrase: guesses are counted in the log before any answer leaves (design §6), so no
//! partition, retry or restart grants one more.
//!
//! A guess is ordered with its blinded element, and servers evaluate no other. Who guessed right can sign
//! with the opener, a key that follows from passphrase and evaluation; that sets the count back to the
//! guesses which came after hers. It names its guess: an adversary who holds the message back while he
//! guesses gains nothing by it.

use super::{Lookup, State, layout, secrets};
use crate::bytes::{Element, PublicKey};
use crate::oprf;
use crate::record::{Invalid, Name};
use crate::request::{Done, Refusal, RequestId};
use crate::state::Secret;

impl Secret {
    /// Whether a key may try a passphrase: everyone if the depositor named no readers, since she who lost
    /// every device has none that anyone knows; otherwise the owner and those.
    pub fn may_be_guessed_by(&self, state: &impl Lookup, client: &PublicKey) -> bool {
        self.readers.is_empty() || secrets::may_read(state, self, client)
    }
}

/// Guesses that are left for a secret, if this key may have one.
pub(super) fn guesses_left(
    state: &impl Lookup,
    name: &Name,
    client: &PublicKey,
) -> Result<(Secret, u32), Refusal> {
    let secret = layout::secret(state, name).ok_or(Refusal::NoSuchSecret)?;
    let passphrase = secret.passphrase.as_ref().ok_or(Refusal::NoPassphrase)?;
    if !secret.may_be_guessed_by(state, client) {
        return Err(Refusal::NotAllowed);
    }
    let guessed = layout::releases(state, secret.index).map_or(0, |releases| releases.guessed);
    let left = passphrase.guesses.saturating_sub(guessed);
    if left == 0 { Err(Refusal::NoGuessesLeft) } else { Ok((secret, left)) }
}

impl State {
    pub(super) fn guess(
        &mut self,
        to: RequestId,
        release: u64,
        name: &Name,
        ephemeral: PublicKey,
        blinded: Element,
    ) -> Result<Done, Refusal> {
        let (secret, left) = guesses_left(&self.map, name, &to.client)?;
        if !oprf::is_sound(&blinded) {
            return Err(Refusal::Invalid(Invalid::Element));
        }
        let index = secret.index;
        self.record_release(index, to, release, ephemeral, Some(blinded))?;
        Ok(Done::Guessed { index, release, epoch: self.epoch(), left: left - 1 })
    }

    pub(super) fn unlocked(&mut self, client: PublicKey, name: &Name, release: u64) -> Result<Done, Refusal> {
        let secret = layout::secret(&self.map, name).ok_or(Refusal::NoSuchSecret)?;
        let passphrase = secret.passphrase.as_ref().ok_or(Refusal::NoPassphrase)?;
        let mut releases = layout::releases(&self.map, secret.index).unwrap_or_default();
        let known = releases.last.iter().any(|known| known.release == release);
        if passphrase.opener != client || !known {
            return Err(Refusal::NotAllowed);
        }
        let since = releases.last.iter().filter(|later| later.release > release).count();
        // A message that comes late never takes back what an earlier one gave.
        releases.guessed = releases.guessed.min(since as u32);
        self.put(layout::releases_key(secret.index), &releases);
        Ok(Done::Unlocked)
    }
}

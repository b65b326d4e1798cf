//! Shares at rest: each encrypted under the server's storage key, bound to its secret and epoch.

use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use rand::Rng as _;
use zeroize::Zeroizing;

/// Seals and opens shares for the database.
#[derive(Clone)]
pub struct ShareBox(ChaCha20Poly1305);

impl ShareBox {
    /// Under a storage key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(ChaCha20Poly1305::new(key.into()))
    }
    /// What goes into the database: nonce and ciphertext.
    pub fn seal(&self, index: u64, epoch: u64, share: &[u8; 32]) -> Vec<u8> {
        let mut sealed = vec![0; 12];
        rand::rng().fill_bytes(&mut sealed);
        let nonce: [u8; 12] = sealed[..12].try_into().expect("twelve bytes were drawn");
        let aad = context(index, epoch);
        let ciphertext = self.0.encrypt(&nonce.into(), Payload { msg: share, aad: &aad });
        sealed.extend(ciphertext.expect("32 bytes can be encrypted"));
        sealed
    }
    /// What comes out of it; none if it was damaged or moved.
    pub fn open(&self, index: u64, epoch: u64, sealed: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
        let (nonce, ciphertext) = sealed.split_first_chunk::<12>()?;
        let aad = context(index, epoch);
        let share = self.0.decrypt(&(*nonce).into(), Payload { msg: ciphertext, aad: &aad }).ok()?;
        let share = Zeroizing::new(share);
        share.as_slice().try_into().map(Zeroizing::new).ok()
    }
}

fn context(index: u64, epoch: u64) -> Vec<u8> {
    quorum::codec::encode(&("kds.share-at-rest.1", index, epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_share_opens_only_where_it_belongs() {
        let shares = ShareBox::new(&[1; 32]);
        let sealed = shares.seal(7, 2, &[9; 32]);
        assert!(!sealed.windows(8).any(|window| window == [9; 8]));
        assert_eq!(shares.open(7, 2, &sealed).map(|share| *share), Some([9; 32]));
        assert!(shares.open(8, 2, &sealed).is_none());
        assert!(shares.open(7, 3, &sealed).is_none());
        assert!(ShareBox::new(&[2; 32]).open(7, 2, &sealed).is_none());
        assert!(shares.open(7, 2, &sealed[..10]).is_none());
    }
}

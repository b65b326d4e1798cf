//! What is secret on the disk: shares, contributions, keys that open deposits.
//!
//! Everything is encrypted under a storage key that is drawn anew with every epoch. The storage keys are
//! files, each wrapped under `storage.key`, which the operator's passphrase protects where one is set.
//! After an epoch what is still needed is encrypted under the new key, and the old key's file is
//! overwritten and removed: from then on nothing that was written before opens any more, wherever
//! on the disk it still stands. (What an SSD may keep of that small file is in docs/security.md.)

use crate::files::{erase, sync_folder};
use anyhow::Context as _;
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use rand::Rng as _;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use zeroize::Zeroizing;

/// Names of the storage keys' files begin with this; their number follows.
const KEY_FILE: &str = "storage-key-";

/// Bytes of such a file: nonce, key, tag.
const WRAPPED_BYTES: usize = 12 + 32 + 16;

/// The storage keys of one server: the current one, and those whose last uses are being encrypted anew.
pub struct StorageKeys {
    folder: PathBuf,
    wrapping: ChaCha20Poly1305,
    keys: Mutex<BTreeMap<u64, ChaCha20Poly1305>>,
}

fn encrypt(cipher: &ChaCha20Poly1305, context: &[u8], plaintext: &[u8]) -> Vec<u8> {
    let mut nonce = [0; 12];
    rand::rng().fill_bytes(&mut nonce);
    let payload = Payload { msg: plaintext, aad: context };
    let ciphertext = cipher.encrypt(&nonce.into(), payload).expect("less than 256 GiB can be encrypted");
    [&nonce[..], &ciphertext].concat()
}

fn decrypt(cipher: &ChaCha20Poly1305, context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, ciphertext) = sealed.split_first_chunk::<12>()?;
    let payload = Payload { msg: ciphertext, aad: context };
    cipher.decrypt(&(*nonce).into(), payload).ok().map(Zeroizing::new)
}

impl StorageKeys {
    /// Reads the keys of a server's folder; draws the first one.
    pub fn open(folder: &Path, wrapping: &[u8; 32]) -> anyhow::Result<Self> {
        let wrapping = ChaCha20Poly1305::new(wrapping.into());
        let mut keys = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(number) = name.strip_prefix(KEY_FILE).and_then(|rest| rest.parse::<u64>().ok()) else {
                continue;
            };
            let wrapped = std::fs::read(&path)?;
            let key = decrypt(&wrapping, &key_context(number), &wrapped);
            match key.as_ref().and_then(|key| <&[u8; 32]>::try_from(key.as_slice()).ok()) {
                Some(key) => drop(keys.insert(number, ChaCha20Poly1305::new(key.into()))),
                // Its writing or its erasure was cut short: nothing needs it.
                None if wrapped.len() != WRAPPED_BYTES || wrapped.starts_with(&[0; 12]) => erase(&path)?,
                // Erased by mistake it could not be had back.
                None => anyhow::bail!(
                    "{} does not open with this server's storage.key\n  \
                     is storage.key another server's, or an old one? Then bring the right one back, from a backup if \
                     need be. If this file is damaged, remove it: the server recovers its shares from the others",
                    path.display()
                ),
            }
        }
        let keys = Self { folder: folder.to_path_buf(), wrapping, keys: Mutex::new(keys) };
        if keys.lock().is_empty() {
            keys.advance()?;
        }
        Ok(keys)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, ChaCha20Poly1305>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{KEY_FILE}{number}"))
    }

    /// Draws the next key, which is used from now on; says which one it is.
    pub fn advance(&self) -> anyhow::Result<u64> {
        let number = self.lock().last_key_value().map_or(1, |(number, _)| number + 1);
        let mut key = Zeroizing::new([0; 32]);
        rand::rng().fill_bytes(&mut *key);
        let wrapped = encrypt(&self.wrapping, &key_context(number), &*key);
        let path = self.path(number);
        // One whose writing failed half-way is nobody's, and must not stand in the way for ever.
        erase(&path)?;
        let written = kds_client::keystore::write_private(&path, &wrapped);
        written.map_err(anyhow::Error::from).and_then(|()| Ok(sync_folder(&self.folder)?))?;
        self.lock().insert(number, ChaCha20Poly1305::new((&*key).into()));
        Ok(number)
    }

    /// Erases the keys before this one: what is still encrypted under them is lost.
    pub fn erase_before(&self, number: u64) -> anyhow::Result<()> {
        let mut keys = self.lock();
        while let Some(first) = keys.first_entry().filter(|first| *first.key() < number) {
            let path = self.path(*first.key());
            // It is remembered until it is erased: what failed is tried again.
            erase(&path).with_context(|| format!("cannot erase {}", path.display()))?;
            first.remove();
        }
        Ok(())
    }

    /// Encrypts under the current key.
    pub fn seal(&self, context: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let keys = self.lock();
        let (number, key) = keys.last_key_value().expect("there is a key from the start");
        let mut sealed = number.to_be_bytes().to_vec();
        sealed.extend(encrypt(key, context, plaintext));
        sealed
    }

    /// Decrypts; none if it was damaged or moved, or its key is gone.
    pub fn unseal(&self, context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (number, sealed) = sealed.split_first_chunk::<8>()?;
        let keys = self.lock();
        decrypt(keys.get(&u64::from_be_bytes(*number))?, context, sealed)
    }
}

fn key_context(number: u64) -> Vec<u8> {
    quorum::codec::encode(&("kds.storage-key.1", number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_before_a_key_was_erased_opens_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let keys = StorageKeys::open(dir.path(), &[7; 32]).unwrap();
        let old = keys.seal(b"here", b"a share");
        assert_eq!(&**keys.unseal(b"here", &old).unwrap(), b"a share");
        assert!(keys.unseal(b"there", &old).is_none());
        assert!(keys.unseal(b"here", &old[..20]).is_none());

        let number = keys.advance().unwrap();
        let new = keys.seal(b"here", b"a share");
        // Both open until the old key is erased, also after a restart.
        let again = StorageKeys::open(dir.path(), &[7; 32]).unwrap();
        assert!(again.unseal(b"here", &old).is_some() && again.unseal(b"here", &new).is_some());
        keys.erase_before(number).unwrap();
        for keys in [&keys, &StorageKeys::open(dir.path(), &[7; 32]).unwrap()] {
            assert!(keys.unseal(b"here", &old).is_none());
            assert!(keys.unseal(b"here", &new).is_some());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// A step that failed once, on a full disk or without a file descriptor, is done when it is tried again.
    #[test]
    fn erasure_that_failed_is_done_later() {
        let dir = tempfile::tempdir().unwrap();
        let keys = StorageKeys::open(dir.path(), &[7; 32]).unwrap();
        let old = keys.seal(b"", b"a share");
        // Half of the next key's file is there, as a full disk leaves it.
        std::fs::write(dir.path().join("storage-key-2"), [5; 20]).unwrap();
        let number = keys.advance().unwrap();
        // The old file cannot be opened for writing: a folder stands in its place.
        let (file, aside) = (dir.path().join("storage-key-1"), dir.path().join("aside"));
        std::fs::rename(&file, &aside).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(keys.erase_before(number).is_err());
        assert!(keys.unseal(b"", &old).is_some(), "it knows what is left to erase");
        std::fs::remove_dir(&file).unwrap();
        std::fs::rename(&aside, &file).unwrap();
        keys.erase_before(number).unwrap();
        assert!(keys.unseal(b"", &old).is_none() && !file.exists());
    }

    #[test]
    fn what_was_cut_short_is_removed_and_a_foreign_key_removes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let sealed = StorageKeys::open(dir.path(), &[7; 32]).unwrap().seal(b"", b"x");
        // Another server's storage.key, or an old one: refused, and nothing is lost by it.
        let refused = StorageKeys::open(dir.path(), &[8; 32]).err().unwrap();
        assert!(refused.to_string().contains("is storage.key another server's"), "{refused}");
        assert!(StorageKeys::open(dir.path(), &[7; 32]).unwrap().unseal(b"", &sealed).is_some());

        std::fs::write(dir.path().join("storage-key-2"), [5; 20]).unwrap();
        std::fs::write(dir.path().join("storage-key-3"), [0; WRAPPED_BYTES]).unwrap();
        assert!(StorageKeys::open(dir.path(), &[7; 32]).unwrap().unseal(b"", &sealed).is_some());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

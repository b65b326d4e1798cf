//! What is secret on the disk: shares, contributions, keys that open deposits.
//!
//! Everything is encrypted under a storage key that is drawn anew with every epoch. The storage keys are
//! files, each wrapped under `storage.key`, which the operator's passphrase protects where one is set.
//! After an epoch what is still needed is encrypted under the new key, and the old key's file is
//! overwritten and removed: from then on nothing that was written before opens any more, wherever
//! on the disk it still stands. (What an SSD may keep of that small file is in docs/security.md.)
//!
//! Contributions to an attempt at an epoch must be gone soon after that has begun, and rows that are deleted stay on
//! the disk for a while: they are encrypted under a key of that attempt, which is destroyed when they are deleted.

use crate::files::{erase, sync_folder};
use anyhow::Context as _;
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use kds_client::keystore::{KeystoreError, write_private};
use quorum::ids::{AttemptId, Epoch};
use rand::Rng as _;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use zeroize::Zeroizing;

/// Names of the storage keys' files begin with this; their number follows.
const KEY_FILE: &str = "storage-key-";
/// The same for keys of attempts: epoch and number of the attempt follow.
const ATTEMPT_KEY_FILE: &str = "attempt-key-";

/// Bytes of such a file: nonce, key, tag.
const WRAPPED_BYTES: usize = 12 + 32 + 16;

/// The storage keys of one server: the current one, and those whose last uses are being encrypted anew.
pub struct StorageKeys {
    folder: PathBuf,
    wrapping: ChaCha20Poly1305,
    keys: Mutex<BTreeMap<u64, Key>>,
    /// Of attempts whose contributions are kept.
    attempts: Mutex<BTreeMap<AttemptId, Key>>,
    /// Attempts that are over: their keys are forgotten, and their files are to be erased.
    condemned: Mutex<BTreeSet<AttemptId>>,
}

/// One place on the heap, zeroized with it.
type Key = Box<ChaCha20Poly1305>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (mut keys, mut attempts, mut unreadable) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let number = name.strip_prefix(KEY_FILE).and_then(|rest| rest.parse::<u64>().ok());
            let attempt = name.strip_prefix(ATTEMPT_KEY_FILE).and_then(attempt_of);
            let context = match (number, attempt) {
                (Some(number), _) => key_context(number),
                (None, Some(attempt)) => attempt_context(attempt),
                (None, None) => continue,
            };
            let wrapped = std::fs::read(&path)?;
            let key = decrypt(&wrapping, &context, &wrapped);
            match key.as_ref().and_then(|key| <&[u8; 32]>::try_from(key.as_slice()).ok()) {
                Some(key) => {
                    let key = Box::new(ChaCha20Poly1305::new(key.into()));
                    match (number, attempt) {
                        (Some(number), _) => drop(keys.insert(number, key)),
                        (None, attempt) => attempts.extend(attempt.map(|attempt| (attempt, key))),
                    }
                }
                // Its writing or its erasure was cut short: nothing needs it.
                None if wrapped.len() != WRAPPED_BYTES || wrapped.starts_with(&[0; 12]) => erase(&path)?,
                // Contributions can be had from the others. Not now: perhaps storage.key is the wrong one.
                None if number.is_none() => unreadable.push(path),
                // Erased by mistake it could not be had back.
                None => anyhow::bail!(
                    "{} does not open with this server's storage.key\n  \
                     is storage.key another server's, or an old one? Then bring the right one back, from a backup if \
                     need be. If this file is damaged, remove it: the server recovers its shares from the others",
                    path.display()
                ),
            }
        }
        for path in unreadable {
            erase(&path)?;
        }
        let (keys, attempts) = (Mutex::new(keys), Mutex::new(attempts));
        let keys =
            Self { folder: folder.to_path_buf(), wrapping, keys, attempts, condemned: Mutex::default() };
        if lock(&keys.keys).is_empty() {
            keys.advance()?;
        }
        Ok(keys)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{KEY_FILE}{number}"))
    }
    fn attempt_path(&self, AttemptId { epoch, attempt }: AttemptId) -> PathBuf {
        self.folder.join(format!("{ATTEMPT_KEY_FILE}{}-{attempt}", epoch.0))
    }
    /// Draws a key and writes it, wrapped, into a file of its own.
    fn draw(&self, context: &[u8], path: &Path) -> std::io::Result<Key> {
        let key = kds_client::random::secret();
        let wrapped = encrypt(&self.wrapping, context, key.expose());
        // One whose writing failed half-way is nobody's, and must not stand in the way for ever.
        erase(path)?;
        write_private(path, &wrapped).map_err(|error| match error {
            KeystoreError::Io { ref why, .. } => std::io::Error::new(why.kind(), error),
            other => std::io::Error::other(other),
        })?;
        sync_folder(&self.folder)?;
        Ok(Box::new(ChaCha20Poly1305::new(key.expose().into())))
    }

    /// Draws the next key, which is used from now on; says which one it is.
    pub fn advance(&self) -> anyhow::Result<u64> {
        let number = lock(&self.keys).last_key_value().map_or(1, |(number, _)| number + 1);
        let key = self.draw(&key_context(number), &self.path(number))?;
        lock(&self.keys).insert(number, key);
        Ok(number)
    }

    /// Encrypts what is to be gone with an attempt; draws its key with the first piece.
    pub fn seal_for(&self, attempt: AttemptId, context: &[u8], plaintext: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut attempts = lock(&self.attempts);
        let key = match attempts.entry(attempt) {
            Entry::Occupied(key) => key.into_mut(),
            Entry::Vacant(none) => {
                let key = self.draw(&attempt_context(attempt), &self.attempt_path(attempt))?;
                // The file is this key's from now on; what was condemned is erased with the first step of drawing it.
                lock(&self.condemned).remove(&attempt);
                none.insert(key)
            }
        };
        Ok(encrypt(key, context, plaintext))
    }
    /// Decrypts that; none if it was damaged or moved, or the attempt is over.
    pub fn unseal_of(&self, attempt: AttemptId, context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        decrypt(lock(&self.attempts).get(&attempt)?, context, sealed)
    }
    /// Destroys the keys of attempts that are over: at once in memory, on the disk with [`Self::erase_condemned`].
    pub fn condemn(&self, over: impl Fn(AttemptId) -> bool) {
        let mut attempts = lock(&self.attempts);
        let gone = attempts.extract_if(.., |attempt, _| over(*attempt)).map(|(attempt, _)| attempt);
        lock(&self.condemned).extend(gone);
    }
    /// Whether files of keys are to be erased.
    pub fn any_condemned(&self) -> bool {
        !lock(&self.condemned).is_empty()
    }
    /// Erases them. What fails is remembered, to be tried again.
    pub fn erase_condemned(&self) -> anyhow::Result<()> {
        loop {
            // Held on to, so that nobody draws a key under this name meanwhile.
            let _attempts = lock(&self.attempts);
            let Some(attempt) = lock(&self.condemned).first().copied() else { return Ok(()) };
            let path = self.attempt_path(attempt);
            erase(&path).with_context(|| format!("cannot erase {}", path.display()))?;
            lock(&self.condemned).remove(&attempt);
        }
    }

    /// Erases the keys before this one: what is still encrypted under them is lost.
    pub fn erase_before(&self, number: u64) -> anyhow::Result<()> {
        let mut keys = lock(&self.keys);
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
        let keys = lock(&self.keys);
        let (number, key) = keys.last_key_value().expect("there is a key from the start");
        let mut sealed = number.to_be_bytes().to_vec();
        sealed.extend(encrypt(key, context, plaintext));
        sealed
    }

    /// Decrypts; none if it was damaged or moved, or its key is gone.
    pub fn unseal(&self, context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (number, sealed) = sealed.split_first_chunk::<8>()?;
        let keys = lock(&self.keys);
        decrypt(keys.get(&u64::from_be_bytes(*number))?, context, sealed)
    }
}

fn key_context(number: u64) -> Vec<u8> {
    quorum::codec::encode(&("kds.storage-key.1", number))
}
fn attempt_context(attempt: AttemptId) -> Vec<u8> {
    quorum::codec::encode(&("kds.attempt-key.1", attempt))
}
/// What a file's name says after its beginning.
fn attempt_of(name: &str) -> Option<AttemptId> {
    let (epoch, attempt) = name.split_once('-')?;
    Some(AttemptId { epoch: Epoch(epoch.parse().ok()?), attempt: attempt.parse().ok()? })
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

    /// Contributions are gone with their attempt, whatever pages of the database still hold; what is of another attempt
    /// stays.
    #[test]
    fn what_belongs_to_an_attempt_is_gone_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let attempt = |attempt| AttemptId { epoch: Epoch(5), attempt };
        let keys = StorageKeys::open(dir.path(), &[7; 32]).unwrap();
        let (first, second) = (
            keys.seal_for(attempt(1), b"here", b"one").unwrap(),
            keys.seal_for(attempt(2), b"here", b"two").unwrap(),
        );
        let keys = StorageKeys::open(dir.path(), &[7; 32]).unwrap();
        assert_eq!(&**keys.unseal_of(attempt(1), b"here", &first).unwrap(), b"one");
        assert!(keys.unseal_of(attempt(1), b"there", &first).is_none());
        assert!(keys.unseal_of(attempt(2), b"here", &first).is_none());
        keys.condemn(|of| of == attempt(1));
        assert!(keys.unseal_of(attempt(1), b"here", &first).is_none(), "at once");
        // The file cannot be erased yet: a folder stands in its place.
        let (file, aside) = (dir.path().join("attempt-key-5-1"), dir.path().join("aside"));
        std::fs::rename(&file, &aside).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(keys.erase_condemned().is_err() && keys.any_condemned());
        std::fs::remove_dir(&file).unwrap();
        std::fs::rename(&aside, &file).unwrap();
        keys.erase_condemned().unwrap();
        assert!(!file.exists() && !keys.any_condemned());
        for keys in [&keys, &StorageKeys::open(dir.path(), &[7; 32]).unwrap()] {
            assert!(keys.unseal_of(attempt(1), b"here", &first).is_none());
            assert_eq!(&**keys.unseal_of(attempt(2), b"here", &second).unwrap(), b"two");
        }
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
        // What it opens the others have too.
        std::fs::write(dir.path().join("attempt-key-5-1"), [5; WRAPPED_BYTES]).unwrap();
        assert!(StorageKeys::open(dir.path(), &[7; 32]).unwrap().unseal(b"", &sealed).is_some());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

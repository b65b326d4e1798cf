//! A thief who reads out a whole server: its files, with the keys that open them, and its memory.

use anyhow::Context as _;
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use kds_certs::{LinkKey, TlsIdentity};
use kds_client::keystore::{self, SecretKind};
use quorum::codec::{decode, encode};
use quorum::ids::{AttemptId, ClusterId, Epoch, ServerId};
use quorum::manifest::Manifest;
use quorum::refresh::SCALARS_FROM;
use quorum::shares::{ShareOp, ShareSet};
use quorum::signing::{KeyCertificate, KeyPurpose, KeyStatement};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Row as _};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

/// What was found in one server's folder.
#[derive(Default)]
pub struct Loot {
    /// Shares of every state that the files lead to, by secret and epoch.
    pub shares: BTreeMap<(u64, Epoch), [u8; 32]>,
    /// The epoch of the newest one.
    pub epoch: Epoch,
    /// Storage keys that opened.
    pub keys: usize,
    /// Pieces of the vault that opened.
    pub vault: usize,
}

fn decrypt(key: &[u8; 32], context: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, ciphertext) = sealed.split_first_chunk::<12>()?;
    let payload = Payload { msg: ciphertext, aad: context };
    ChaCha20Poly1305::new(key.into()).decrypt(&(*nonce).into(), payload).ok()
}

/// What a server shows on its links, for whoever has its identity key: as if its signer had certified a key for an
/// attempt.
pub fn link_identity(
    cluster: &Path,
    manifest: &Manifest,
    server: ServerId,
    of: AttemptId,
) -> anyhow::Result<TlsIdentity> {
    let path = cluster.join(format!("server-{server}")).join("identity.key");
    let identity = keystore::read_signing_key(&path, SecretKind::IdentityKey, None)?;
    let key = LinkKey::draw()?;
    let AttemptId { epoch, attempt } = of;
    let (purpose, serial) = (KeyPurpose::Tls, u64::MAX);
    let statement = KeyStatement { server, purpose, epoch, attempt, serial, key: key.public() };
    Ok(key.certified(&KeyCertificate::issue(&manifest.cluster_id(), &identity, statement))?)
}

/// Opens everything in a copy of a server's folder, as the server itself would, and more: every share file
/// and every row, of whatever epoch.
pub async fn read_out(folder: &Path, cluster: &ClusterId, id: ServerId) -> anyhow::Result<Loot> {
    let wrapping = keystore::read(&folder.join("storage.key"), SecretKind::StorageKey, None)?;
    let wrapping: [u8; 32] = wrapping.as_slice().try_into()?;
    let (mut keys, mut share_files) = (BTreeMap::new(), Vec::new());
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if let Some(number) = name.strip_prefix("storage-key-") {
            let number: u64 = number.parse()?;
            let context = encode(&("kds.storage-key.1", number));
            if let Some(key) = decrypt(&wrapping, &context, &std::fs::read(&path)?) {
                keys.insert(number, <[u8; 32]>::try_from(key.as_slice())?);
            }
        }
        if name.starts_with("shares") {
            share_files.push(path);
        }
    }
    let unseal = |context: &[u8], sealed: &[u8]| -> Option<Vec<u8>> {
        let (number, sealed) = sealed.split_first_chunk::<8>()?;
        decrypt(keys.get(&u64::from_be_bytes(*number))?, context, sealed)
    };
    let mut loot = Loot { keys: keys.len(), ..Loot::default() };
    let mut states = vec![ShareSet::new()];
    for path in share_files {
        let opened = unseal(&encode(&("kds.shares-at-rest.1", cluster, id)), &std::fs::read(&path)?);
        states.extend(opened.and_then(|bytes| decode::<ShareSet>(&bytes).ok()));
    }
    let database = folder.join("kds.db");
    let mut connection = SqliteConnectOptions::new().filename(&database).connect().await?;
    let rows = sqlx::query("SELECT number, operation FROM share_log ORDER BY number");
    let mut log: Vec<ShareOp> = Vec::new();
    for row in rows.fetch_all(&mut connection).await? {
        let (number, operation): (i64, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
        let context = encode(&("kds.share-log-at-rest.1", number as u64));
        log.extend(unseal(&context, &operation).and_then(|bytes| decode(&bytes).ok()));
    }
    for row in sqlx::query("SELECT key, value FROM vault").fetch_all(&mut connection).await? {
        let (key, value): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
        loot.vault += usize::from(unseal(&encode(&("kds.vault-at-rest.1", key)), &value).is_some());
    }
    for mut state in states {
        loot.note(&state);
        for operation in &log {
            state.apply(operation);
            loot.note(&state);
        }
    }
    Ok(loot)
}

impl Loot {
    fn note(&mut self, state: &ShareSet) {
        for index in (0..64).chain(SCALARS_FROM..SCALARS_FROM + 8) {
            if let Some(share) = state.share(index) {
                self.shares.insert((index, state.epoch()), *share.expose());
            }
        }
        self.epoch = self.epoch.max(state.epoch());
    }
}

/// Copies a folder's files as they are at this moment.
pub fn copy(folder: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // A file that is gone in the meantime was not there to be copied.
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let _ = std::fs::copy(entry.path(), to.join(entry.file_name()));
        }
    }
    Ok(())
}

/// Everything that a process has written to its memory.
pub fn memory(process: u32) -> anyhow::Result<Vec<u8>> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps"))?;
    let mut memory = File::open(format!("/proc/{process}/mem")).context("reading memory needs root")?;
    let mut all = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(mode)) = (fields.next(), fields.next()) else { continue };
        let Some((from, to)) = range.split_once('-') else { continue };
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        if !mode.starts_with("rw") || to - from > 1 << 30 || line.contains("[v") {
            continue;
        }
        let mut part = vec![0; (to - from) as usize];
        memory.seek(SeekFrom::Start(from))?;
        if memory.read_exact(&mut part).is_ok() {
            all.extend(part);
        }
    }
    Ok(all)
}

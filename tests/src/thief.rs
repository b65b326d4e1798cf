//! A thief who reads out a whole server: its files, with the keys that open them, and its memory.

use anyhow::Context as _;
use aws_lc_rs::hmac;
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use kds_certs::{LinkKey, TlsIdentity};
use kds_client::keystore::{self, SecretKind};
use quorum::codec::{decode, encode};
use quorum::ids::{AttemptId, ClusterId, Epoch, ServerId};
use quorum::manifest::Manifest;
use quorum::ordering::VaultKey;
use quorum::refresh::{Dealing, SCALARS_FROM, Terms};
use quorum::shares::{ShareOp, ShareSet};
use quorum::signing::{KeyCertificate, KeyPurpose, KeyStatement};
use serde::Deserialize;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Row as _};
use std::collections::{BTreeMap, BTreeSet};
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
    /// The keys that what is on the disk is encrypted under, with their files' names.
    pub storage_keys: BTreeMap<String, [u8; 32]>,
    /// Seeds of the keys that open deposits.
    pub openings: BTreeMap<Epoch, [u8; 32]>,
    /// What dealers have handed to this server.
    pub dealings: BTreeMap<(AttemptId, ServerId), Dealing>,
    /// The same as it stands in the database, with what it is bound to.
    pub sealed_dealings: Vec<(Vec<u8>, Vec<u8>)>,
}

/// As [`Dealing`] is encoded: what of it is secret.
#[derive(Deserialize)]
enum Part {
    Value([u8; 32]),
    #[expect(dead_code, reason = "only in the encoding")]
    Hash([u8; 32]),
}

/// The contributions in a dealing.
pub fn contributions(dealing: &Dealing) -> Vec<[u8; 32]> {
    let parts: Vec<Part> = decode(&encode(dealing)).expect("dealings are lists of parts");
    let value = |part| match part {
        Part::Value(value) => Some(value),
        Part::Hash(_) => None,
    };
    parts.into_iter().filter_map(value).collect()
}

/// The seeds in what is added to shares.
pub fn seeds(terms: &Terms) -> Vec<[u8; 32]> {
    let terms: Vec<((u8, i64), [u8; 32])> =
        decode(&encode(terms)).expect("terms have a coefficient and a seed");
    terms.into_iter().map(|(_, seed)| seed).collect()
}

/// Secret bytes that are looked for.
#[derive(Default)]
pub struct Wanted {
    /// Whether some secret begins with these two bytes, so that most of a memory is passed over quickly.
    beginnings: Vec<bool>,
    secrets: BTreeMap<[u8; 8], Vec<(Vec<u8>, String)>>,
}

impl Wanted {
    /// Looks for this too, under this name. At least 16 bytes.
    pub fn add(&mut self, secret: &[u8], name: impl Into<String>) {
        self.beginnings.resize(1 << 16, false);
        let (first, _) = secret.split_first_chunk::<8>().expect("secrets are not that short");
        self.beginnings[usize::from(u16::from_le_bytes([first[0], first[1]]))] = true;
        let begin_alike = self.secrets.entry(*first).or_default();
        if begin_alike.iter().all(|(known, _)| known != secret) {
            begin_alike.push((secret.to_vec(), name.into()));
        }
    }
    /// How many.
    pub fn len(&self) -> usize {
        self.secrets.values().map(Vec::len).sum()
    }
    /// Whether nothing is looked for.
    pub fn is_empty(&self) -> bool {
        self.secrets.is_empty()
    }
    /// Names of those that are there.
    pub fn found_in(&self, bytes: &[u8]) -> BTreeSet<&str> {
        let mut found = BTreeSet::new();
        for at in 0..bytes.len().saturating_sub(15) {
            if !self
                .beginnings
                .get(usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])))
                .unwrap_or(&false)
            {
                continue;
            }
            let begins: [u8; 8] = bytes[at..at + 8].try_into().expect("eight bytes");
            for (secret, name) in self.secrets.get(&begins).into_iter().flatten() {
                if bytes[at..].starts_with(secret) {
                    found.insert(name.as_str());
                }
            }
        }
        found
    }
}

/// Secrets of links, as a server that is started with `SSLKEYLOGFILE` writes them down, and the keys that records are
/// encrypted with (RFC 8446 §7.3).
pub fn link_secrets(key_log: &Path) -> Vec<(String, Vec<u8>)> {
    let text = std::fs::read_to_string(key_log).unwrap_or_default();
    let mut secrets = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ');
        let (Some(label), Some(random), Some(secret)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let digits = secret.as_bytes().chunks(2);
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let Some(secret) = digits.map(byte).collect::<Option<Vec<u8>>>() else { continue };
        if label.contains("TRAFFIC_SECRET") {
            let algorithm = if secret.len() == 32 { hmac::HMAC_SHA256 } else { hmac::HMAC_SHA384 };
            let key = hmac::sign(&hmac::Key::new(algorithm, &secret), b"\x00\x20\x09tls13 key\x00\x01");
            secrets.push((format!("key of {label} {}", &random[..8]), key.as_ref()[..32].to_vec()));
        }
        secrets.push((format!("{label} {}", &random[..8]), secret));
    }
    secrets
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
    let (mut attempt_keys, mut storage_keys) = (BTreeMap::new(), BTreeMap::new());
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if let Some(number) = name.strip_prefix("storage-key-") {
            let number: u64 = number.parse()?;
            let context = encode(&("kds.storage-key.1", number));
            if let Some(key) = decrypt(&wrapping, &context, &std::fs::read(&path)?) {
                keys.insert(number, <[u8; 32]>::try_from(key.as_slice())?);
                storage_keys.insert(name.clone(), keys[&number]);
            }
        }
        if let Some((epoch, attempt)) = name.strip_prefix("attempt-key-").and_then(|of| of.split_once('-')) {
            let attempt = AttemptId { epoch: Epoch(epoch.parse()?), attempt: attempt.parse()? };
            let context = encode(&("kds.attempt-key.1", attempt));
            if let Some(key) = decrypt(&wrapping, &context, &std::fs::read(&path)?) {
                attempt_keys.insert(attempt, <[u8; 32]>::try_from(key.as_slice())?);
                storage_keys.insert(name.clone(), attempt_keys[&attempt]);
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
    let mut loot = Loot { keys: keys.len(), storage_keys, ..Loot::default() };
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
        let context = encode(&("kds.vault-at-rest.1", &key));
        let of: VaultKey = decode(&key)?;
        let opened = match &of {
            VaultKey::Dealing(attempt, _) => {
                let opened = attempt_keys.get(attempt).and_then(|key| decrypt(key, &context, &value));
                loot.sealed_dealings.push((context, value));
                opened
            }
            VaultKey::Opening(_) => unseal(&context, &value),
        };
        loot.vault += usize::from(opened.is_some());
        match (of, opened) {
            (VaultKey::Dealing(attempt, dealer), Some(opened)) => {
                loot.dealings.insert((attempt, dealer), decode(&opened)?);
            }
            (VaultKey::Opening(epoch), Some(opened)) => {
                let (seed, _): ([u8; 32], KeyCertificate) = decode(&opened)?;
                loot.openings.insert(epoch, seed);
            }
            (_, None) => {}
        }
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
    /// Whether one of its keys opens something that stood in a database, whatever key it belongs to.
    pub fn opens(&self, (context, sealed): &(Vec<u8>, Vec<u8>)) -> bool {
        let bare = |key| decrypt(key, context, sealed).is_some();
        let numbered = |key| sealed.get(8..).is_some_and(|sealed| decrypt(key, context, sealed).is_some());
        self.storage_keys.values().any(|key| bare(key) || numbered(key))
    }
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

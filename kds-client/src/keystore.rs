//! Private files: keys at rest, readable by their owner only, and encrypted under a passphrase
//! where one is set (Argon2id, ChaCha20-Poly1305).

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use quorum::limits::{MAX_STRETCH_KIB, MAX_STRETCH_PASSES};
use quorum::request::Hardness;
use quorum::signing::SigningKey;
use quorum::{Blob, PublicKey, SecretBytes};
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::path::Path;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// What a private file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecretKind {
    /// A client's or administrator's signing key.
    SigningKey,
    /// A server's identity key.
    IdentityKey,
    /// What a server's storage keys are wrapped under.
    StorageKey,
    /// A server's TLS key (PEM).
    TlsKey,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretFile {
    kind: SecretKind,
    /// The public half, where there is one.
    public: Option<PublicKey>,
    secret: Option<Blob>,
    sealed: Option<Sealed>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    salt: Blob,
    nonce: Blob,
    ciphertext: Blob,
}

/// What is wrong with a private file.
#[derive(Debug, thiserror::Error)]
pub enum KeystoreError {
    /// Reading or writing.
    #[error("cannot {doing} {path}: {why}")]
    Io {
        /// Read or write.
        doing: &'static str,
        /// The file.
        path: String,
        /// Why.
        why: std::io::Error,
    },
    /// Others may read it.
    #[error("{path} can be read by others (mode {mode:o})\n  run: chmod 600 {path}")]
    LooseMode {
        /// The file.
        path: String,
        /// Its mode.
        mode: u32,
    },
    /// Its contents.
    #[error("{path} is not a private file of the kind that is wanted here ({kind:?}): {why}")]
    Contents {
        /// The file.
        path: String,
        /// What was wanted.
        kind: SecretKind,
        /// Why.
        why: String,
    },
    /// No passphrase for an encrypted file.
    #[error("{path} is encrypted\n  set KDS_PASSPHRASE, or use --passphrase on a terminal")]
    NeedsPassphrase {
        /// The file.
        path: String,
    },
    /// The wrong passphrase, or a damaged file.
    #[error("{path} does not open with this passphrase")]
    WrongPassphrase {
        /// The file.
        path: String,
    },
}

/// A passphrase, zeroized when dropped and never printed.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// From KDS_PASSPHRASE, if it is set and not empty; otherwise from systemd's credential of the name
    /// `kds-passphrase` (systemd.exec(5), LoadCredentialEncrypted=), if the service has one.
    pub fn from_environment() -> Option<Self> {
        Self::from_variable("KDS_PASSPHRASE").or_else(|| {
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY")?;
            let bytes = Zeroizing::new(std::fs::read(Path::new(&folder).join("kds-passphrase")).ok()?);
            let text = str::from_utf8(&bytes).ok()?.trim_end_matches(['\r', '\n']);
            (!text.is_empty()).then(|| Self(Zeroizing::new(text.to_owned())))
        })
    }
    /// Asks on the terminal.
    pub fn ask(prompt: &str) -> std::io::Result<Self> {
        rpassword::prompt_password(prompt).map(|text| Self(Zeroizing::new(text)))
    }
    /// From a variable of the environment, if it is set and not empty.
    pub fn from_variable(name: &str) -> Option<Self> {
        std::env::var(name).ok().filter(|text| !text.is_empty()).map(|text| Self(Zeroizing::new(text)))
    }
    /// The text, for a process that is to open the same files.
    pub fn expose(&self) -> &str {
        &self.0
    }
    /// Whether it is the same as another one.
    pub fn is(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// From text, for tests.
    pub fn new(text: &str) -> Self {
        Self(Zeroizing::new(text.to_owned()))
    }
}
impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// Argon2id with RFC 9106's second recommended choice (64 MiB, 3 passes), one lane.
pub(crate) const HARDNESS: Hardness = Hardness { memory_kib: 64 * 1024, passes: 3, lanes: 1 };

/// Stretches a passphrase; none if that would take more than anyone may ask of this machine.
pub(crate) fn stretch(passphrase: &Passphrase, salt: &[u8], hardness: Hardness) -> Option<SecretBytes> {
    let Hardness { memory_kib, passes, lanes } = hardness;
    if memory_kib > MAX_STRETCH_KIB || passes > MAX_STRETCH_PASSES {
        return None;
    }
    let params = Params::new(memory_kib, passes, lanes, Some(32)).ok()?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let mut done = Ok(());
    let key = SecretBytes::fill(|key| {
        done = argon2.hash_password_into(passphrase.0.as_bytes(), salt, key);
    });
    done.ok().map(|()| key)
}

fn derive(passphrase: &Passphrase, sealed: &Sealed) -> Option<SecretBytes> {
    let Sealed { memory_kib, passes, lanes, .. } = *sealed;
    stretch(passphrase, &sealed.salt, Hardness { memory_kib, passes, lanes })
}

fn context(kind: SecretKind, public: Option<&PublicKey>) -> Vec<u8> {
    quorum::codec::encode(&("kds.keystore.1", kind, public))
}

/// Writes a private file with mode 0600; never over an existing one.
pub fn write(
    path: &Path,
    kind: SecretKind,
    public: Option<PublicKey>,
    secret: &[u8],
    passphrase: Option<&Passphrase>,
) -> Result<(), KeystoreError> {
    let mut file = SecretFile { kind, public, secret: None, sealed: None };
    match passphrase {
        None => file.secret = Some(Blob(secret.to_vec())),
        Some(passphrase) => {
            let (mut salt, mut nonce) = ([0; 16], [0; 12]);
            rand::rng().fill_bytes(&mut salt);
            rand::rng().fill_bytes(&mut nonce);
            let Hardness { memory_kib, passes, lanes } = HARDNESS;
            let mut sealed = Sealed {
                memory_kib,
                passes,
                lanes,
                salt: Blob(salt.to_vec()),
                nonce: Blob(nonce.to_vec()),
                ciphertext: Blob(vec![]),
            };
            let damaged = || KeystoreError::WrongPassphrase { path: path.display().to_string() };
            let key = derive(passphrase, &sealed).ok_or_else(damaged)?;
            let aad = context(kind, public.as_ref());
            let payload = Payload { msg: secret, aad: &aad };
            let cipher = ChaCha20Poly1305::new((&*key).into());
            sealed.ciphertext = Blob(cipher.encrypt(&nonce.into(), payload).map_err(|_| damaged())?);
            file.sealed = Some(sealed);
        }
    }
    let text = Zeroizing::new(toml::to_string(&file).unwrap_or_default());
    let text = Zeroizing::new(format!("# Private: keep it secret.\n{}", *text));
    write_private(path, text.as_bytes())
}

/// Writes a file that only its owner can read; never over an existing one.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), KeystoreError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let failed = |why| KeystoreError::Io { doing: "write", path: path.display().to_string(), why };
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)
}

/// Reads a private file.
pub fn read(
    path: &Path,
    kind: SecretKind,
    passphrase: Option<&Passphrase>,
) -> Result<Zeroizing<Vec<u8>>, KeystoreError> {
    read_both(path, kind, passphrase).map(|(_, secret)| secret)
}

/// With the public half, where there is one.
fn read_both(
    path: &Path,
    kind: SecretKind,
    passphrase: Option<&Passphrase>,
) -> Result<(Option<PublicKey>, Zeroizing<Vec<u8>>), KeystoreError> {
    use std::os::unix::fs::PermissionsExt as _;
    let name = path.display().to_string();
    let failed = |why| KeystoreError::Io { doing: "read", path: name.clone(), why };
    let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeystoreError::LooseMode { path: name, mode });
    }
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(failed)?);
    let wrong = |why: &str| KeystoreError::Contents { path: name.clone(), kind, why: why.to_owned() };
    let file: SecretFile = toml::from_str(&text).map_err(|_| wrong("it cannot be read"))?;
    if file.kind != kind {
        return Err(wrong(&format!("it holds a {:?}", file.kind)));
    }
    let secret = match (file.secret, file.sealed) {
        (Some(secret), None) => Zeroizing::new(secret.0),
        (None, Some(sealed)) => {
            let passphrase =
                passphrase.ok_or_else(|| KeystoreError::NeedsPassphrase { path: name.clone() })?;
            let closed = || KeystoreError::WrongPassphrase { path: name.clone() };
            let key = derive(passphrase, &sealed).ok_or_else(closed)?;
            let nonce: [u8; 12] = sealed.nonce.0.as_slice().try_into().map_err(|_| closed())?;
            let aad = context(kind, file.public.as_ref());
            let payload = Payload { msg: &sealed.ciphertext, aad: &aad };
            let opened = ChaCha20Poly1305::new((&*key).into()).decrypt(&nonce.into(), payload);
            opened.map(Zeroizing::new).map_err(|_| closed())?
        }
        _ => return Err(wrong("it holds no secret, or two")),
    };
    Ok((file.public, secret))
}

/// Writes a signing key.
pub fn write_signing_key(
    path: &Path,
    kind: SecretKind,
    key: &SigningKey,
    passphrase: Option<&Passphrase>,
) -> Result<(), KeystoreError> {
    write(path, kind, Some(key.public()), &*key.seed(), passphrase)
}

/// Reads a signing key.
pub fn read_signing_key(
    path: &Path,
    kind: SecretKind,
    passphrase: Option<&Passphrase>,
) -> Result<SigningKey, KeystoreError> {
    let (public, secret) = read_both(path, kind, passphrase)?;
    let wrong =
        |why: &str| KeystoreError::Contents { path: path.display().to_string(), kind, why: why.to_owned() };
    let seed = <[u8; 32]>::try_from(secret.as_slice()).map(Zeroizing::new);
    let key = SigningKey::from_seed(&*seed.map_err(|_| wrong("its key has the wrong size"))?);
    match public {
        Some(public) if public != key.public() => Err(wrong("it is damaged: its two halves are no pair")),
        _ => Ok(key),
    }
}

/// A new signing key from the operating system's randomness.
pub fn generate() -> SigningKey {
    SigningKey::generate(&mut crate::random::system())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_and_say_what_is_wrong_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, closed) = (dir.path().join("plain"), dir.path().join("closed"));
        let key = generate();
        let passphrase = Passphrase::new("correct horse");
        write_signing_key(&plain, SecretKind::SigningKey, &key, None).unwrap();
        write_signing_key(&closed, SecretKind::SigningKey, &key, Some(&passphrase)).unwrap();
        assert_eq!(read_signing_key(&plain, SecretKind::SigningKey, None).unwrap().public(), key.public());
        let opened = read_signing_key(&closed, SecretKind::SigningKey, Some(&passphrase)).unwrap();
        assert_eq!(opened.public(), key.public());
        assert!(!std::fs::read_to_string(&closed).unwrap().contains(&Blob(key.seed().to_vec()).to_base64()));

        let refused = |path: &Path, kind, passphrase: Option<&Passphrase>| {
            read_signing_key(path, kind, passphrase).unwrap_err()
        };
        assert!(matches!(
            refused(&closed, SecretKind::SigningKey, None),
            KeystoreError::NeedsPassphrase { .. }
        ));
        let other = Passphrase::new("wrong");
        let wrong = refused(&closed, SecretKind::SigningKey, Some(&other));
        assert!(matches!(wrong, KeystoreError::WrongPassphrase { .. }));
        assert!(matches!(refused(&plain, SecretKind::IdentityKey, None), KeystoreError::Contents { .. }));
        assert!(write_signing_key(&plain, SecretKind::SigningKey, &key, None).is_err(), "never overwritten");
        let (mixed, other) = (dir.path().join("mixed"), Some(generate().public()));
        write(&mixed, SecretKind::SigningKey, other, &*key.seed(), None).unwrap();
        assert!(refused(&mixed, SecretKind::SigningKey, None).to_string().contains("no pair"));
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(refused(&plain, SecretKind::SigningKey, None), KeystoreError::LooseMode { .. }));
    }
}

//! Public keys in files: OpenSSH, PEM (SPKI or X.509), age recipients, and `keygen`'s own.
//!
//! Every format is parsed by its field's crate. The bytes kept are canonical: what OpenSSH puts
//! on the wire, DER, or the 32 bytes of a raw key; so fingerprints are those of `ssh-keygen -l`.

use crate::error::words;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use quorum::record::KeyMaterial;
use quorum::{Blob, PublicKey};
use x509_parser::prelude::FromDer as _;

/// Why a text is not a public key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFormatError {
    /// None of the formats.
    #[error(
        "not a public key: expected OpenSSH, PEM (public key or certificate), an age recipient, or a keygen .pub file"
    )]
    Unknown,
    /// A private key!
    #[error("this is a PRIVATE key; it was not used, and must not be given to anyone: name the public one")]
    Private,
    /// One of the formats, but broken.
    #[error("a broken {format} key: {why}")]
    Broken {
        /// Which format.
        format: &'static str,
        /// What its parser says.
        why: String,
    },
    /// The record's key has no form in the format asked for.
    #[error("a key of type {algorithm} has no {format} form")]
    NoSuchForm {
        /// The key's algorithm.
        algorithm: String,
        /// The format asked for.
        format: &'static str,
    },
}

fn broken(format: &'static str) -> impl Fn(String) -> KeyFormatError {
    move |why| KeyFormatError::Broken { format, why }
}

/// Prefix of `keygen`'s public files.
pub const KEYGEN_PREFIX: &str = "kds-ed25519";

/// The line of a `keygen` public file.
pub fn keygen_line(key: &PublicKey) -> String {
    format!("{KEYGEN_PREFIX} {key}\n")
}

/// Reads one public key from a file's contents.
pub fn parse(bytes: &[u8]) -> Result<KeyMaterial, KeyFormatError> {
    let text = std::str::from_utf8(bytes).map_err(|_| KeyFormatError::Unknown)?.trim();
    let material = if text.contains("-----BEGIN") {
        parse_pem(text)?
    } else if text.starts_with("AGE-SECRET-KEY-") {
        return Err(KeyFormatError::Private);
    } else if text.starts_with("age1") {
        let wrong = broken("age");
        let (hrp, data) = bech32::decode(text).map_err(|e| wrong(e.to_string()))?;
        if hrp.as_str() != "age" || data.len() != 32 {
            return Err(wrong("not a recipient of 32 bytes".into()));
        }
        KeyMaterial { algorithm: "age-x25519".into(), key: Blob(data) }
    } else if let Some(rest) = text.strip_prefix(KEYGEN_PREFIX) {
        let field = rest.split_whitespace().next().unwrap_or_default();
        let key =
            PublicKey::from_base64(field).ok_or_else(|| broken("keygen")("not base64 of 32 bytes".into()))?;
        KeyMaterial { algorithm: "ed25519".into(), key: Blob(key.0.to_vec()) }
    } else {
        parse_openssh(text)?
    };
    check(&material)?;
    Ok(material)
}

fn parse_openssh(text: &str) -> Result<KeyMaterial, KeyFormatError> {
    let first = text.split_whitespace().next().unwrap_or_default();
    if !["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| first.starts_with(prefix)) {
        return Err(KeyFormatError::Unknown);
    }
    let wrong = broken("OpenSSH");
    if text.lines().count() > 1 {
        return Err(wrong("more than one line; name one key a file".into()));
    }
    let key = ssh_key::PublicKey::from_openssh(text).map_err(|e| wrong(e.to_string()))?;
    let blob = key.to_bytes().map_err(|e| wrong(e.to_string()))?;
    Ok(KeyMaterial { algorithm: key.algorithm().to_string(), key: Blob(blob) })
}

fn parse_pem(text: &str) -> Result<KeyMaterial, KeyFormatError> {
    if text.contains("PRIVATE KEY-----") {
        return Err(KeyFormatError::Private);
    }
    let wrong = broken("PEM");
    let blocks = pem::parse_many(text).map_err(|e| wrong(e.to_string()))?;
    let [block] = blocks.as_slice() else {
        return Err(wrong(format!("{} blocks; name one key a file", blocks.len())));
    };
    let algorithm = match block.tag() {
        "CERTIFICATE" => "x509",
        "PUBLIC KEY" => "spki",
        other => return Err(wrong(format!("neither PUBLIC KEY nor CERTIFICATE but {}", words(other)))),
    };
    Ok(KeyMaterial { algorithm: algorithm.into(), key: Blob(block.contents().to_vec()) })
}

/// Parses key material in full: what the state machine deliberately leaves to the edges.
pub fn check(material: &KeyMaterial) -> Result<(), KeyFormatError> {
    let trailing =
        |rest: &[u8]| if rest.is_empty() { Ok(()) } else { Err("bytes follow the key".to_owned()) };
    match material.algorithm.as_str() {
        "x509" => x509_parser::certificate::X509Certificate::from_der(&material.key)
            .map_err(|e| e.to_string())
            .and_then(|(rest, _)| trailing(rest))
            .map_err(broken("X.509")),
        "spki" => x509_parser::x509::SubjectPublicKeyInfo::from_der(&material.key)
            .map_err(|e| e.to_string())
            .and_then(|(rest, _)| trailing(rest))
            .map_err(broken("SPKI")),
        "age-x25519" | "ed25519" => {
            let sound = <[u8; 32]>::try_from(&*material.key).is_ok_and(|key| {
                key != [0; 32]
                    && (material.algorithm != "ed25519" || quorum::signing::is_sound_key(&PublicKey(key)))
            });
            if sound { Ok(()) } else { Err(broken("raw")("not a sound key of 32 bytes".into())) }
        }
        algorithm => {
            let wrong = broken("OpenSSH");
            let key = ssh_key::PublicKey::from_bytes(&material.key).map_err(|e| wrong(e.to_string()))?;
            if key.algorithm().as_str() != algorithm {
                return Err(wrong(format!("it says {algorithm} and is {}", key.algorithm())));
            }
            let canonical = key.to_bytes().map_err(|e| wrong(e.to_string()))?;
            if canonical == material.key.0 { Ok(()) } else { Err(wrong("not in canonical form".into())) }
        }
    }
}

/// As `ssh-keygen -l` shows it: `SHA256:` and unpadded base64.
pub fn fingerprint(material: &KeyMaterial) -> String {
    format!("SHA256:{}", STANDARD_NO_PAD.encode(quorum::codec::sha256(&material.key).0))
}

/// A raw Ed25519 key as OpenSSH writes it.
pub fn openssh_ed25519(key: &PublicKey) -> KeyMaterial {
    let data = ssh_key::public::KeyData::Ed25519(ssh_key::public::Ed25519PublicKey(key.0));
    let blob = ssh_key::PublicKey::from(data).to_bytes().unwrap_or_default();
    KeyMaterial { algorithm: "ssh-ed25519".into(), key: Blob(blob) }
}

/// An OpenSSH line.
pub fn to_openssh(material: &KeyMaterial, comment: &str) -> Result<String, KeyFormatError> {
    match material.algorithm.as_str() {
        "x509" | "spki" | "age-x25519" | "ed25519" => Err(no_form(material, "ssh")),
        algorithm => Ok(format!("{algorithm} {} {comment}\n", STANDARD.encode(&*material.key))),
    }
}

/// A PEM block.
pub fn to_pem(material: &KeyMaterial) -> Result<String, KeyFormatError> {
    let tag = match material.algorithm.as_str() {
        "x509" => "CERTIFICATE",
        "spki" => "PUBLIC KEY",
        _ => return Err(no_form(material, "pem")),
    };
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    Ok(pem::encode_config(&pem::Pem::new(tag, material.key.0.clone()), config))
}

/// An age recipient.
pub fn to_age(material: &KeyMaterial) -> Result<String, KeyFormatError> {
    if material.algorithm != "age-x25519" {
        return Err(no_form(material, "age"));
    }
    let hrp = bech32::Hrp::parse_unchecked("age");
    let text = bech32::encode::<bech32::Bech32>(hrp, &material.key);
    text.map(|text| text + "\n").map_err(|e| broken("age")(e.to_string()))
}

fn no_form(material: &KeyMaterial, format: &'static str) -> KeyFormatError {
    KeyFormatError::NoSuchForm { algorithm: material.algorithm.clone(), format }
}

/// The Ed25519 key in a file, for owners and readers: `keygen`'s or OpenSSH's.
pub fn signing_public_key(material: &KeyMaterial) -> Result<PublicKey, KeyFormatError> {
    let wrong = broken("Ed25519");
    match material.algorithm.as_str() {
        "ed25519" => {
            <[u8; 32]>::try_from(&*material.key).map(PublicKey).map_err(|_| wrong("not 32 bytes".into()))
        }
        "ssh-ed25519" => {
            let key = ssh_key::PublicKey::from_bytes(&material.key).map_err(|e| wrong(e.to_string()))?;
            let key = key.key_data().ed25519().map(|key| PublicKey(key.0));
            key.ok_or_else(|| wrong("not an Ed25519 key".into()))
        }
        other => Err(wrong(format!("an owner or reader signs with Ed25519, not {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_recipient_comes_back() {
        let recipient = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";
        let material = parse(recipient.as_bytes()).unwrap();
        assert_eq!(to_age(&material).unwrap().trim(), recipient);
        assert!(parse(&recipient.as_bytes()[..50]).is_err());
    }

    #[test]
    fn private_keys_are_refused_loudly() {
        for text in
            ["-----BEGIN OPENSSH PRIVATE KEY-----\nx", "-----BEGIN PRIVATE KEY-----", "AGE-SECRET-KEY-1X"]
        {
            assert_eq!(parse(text.as_bytes()), Err(KeyFormatError::Private));
        }
    }

    #[test]
    fn broken_keys_say_what_is_broken() {
        for text in ["", "hello", "\u{e4}", "ssh-ed25519 AAAA", "ssh-rsa", "kds-ed25519 AAAA", "age1xyz"] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.to_string().len() > 10, "{text:?}: {error}");
        }
        let weak = format!("kds-ed25519 {}", PublicKey([0; 32]));
        assert!(parse(weak.as_bytes()).is_err());
        assert!(parse(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----").is_err());
    }

    #[test]
    fn fingerprints_are_those_of_ssh_keygen() {
        // From `ssh-keygen -lf` over this key.
        let line =
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl github.com";
        let material = parse(line.as_bytes()).unwrap();
        assert_eq!(fingerprint(&material), "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU");
        assert_eq!(to_openssh(&material, "github.com").unwrap().trim(), line);
        assert!(signing_public_key(&material).is_ok());
    }
}

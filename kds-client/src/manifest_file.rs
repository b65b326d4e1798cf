//! `manifest.toml`: the manifest with its cluster id in front, so that people can compare it.

use quorum::manifest::Manifest;
use quorum::{ClusterId, Hash};
use std::path::Path;
use std::sync::Arc;

/// What is wrong with a manifest file.
#[derive(Debug, thiserror::Error)]
pub enum ManifestFileError {
    /// Reading it.
    #[error(
        "cannot read the manifest {path}: {why}\n  name it with --manifest or KDS_MANIFEST; `kds-server dev` makes one in kds-dev/"
    )]
    Read {
        /// The file.
        path: String,
        /// Why.
        why: std::io::Error,
    },
    /// Its contents.
    #[error("the manifest {path} cannot be used: {why}")]
    Contents {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
}

/// Reads and checks a manifest.
pub fn read(path: &Path) -> Result<Arc<Manifest>, ManifestFileError> {
    let name = path.display().to_string();
    let text =
        std::fs::read_to_string(path).map_err(|why| ManifestFileError::Read { path: name.clone(), why })?;
    parse(&text).map(Arc::new).map_err(|why| ManifestFileError::Contents { path: name, why })
}

fn parse(text: &str) -> Result<Manifest, String> {
    let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
    let stated = match table.remove("cluster") {
        Some(toml::Value::String(id)) => {
            Hash::from_base64(&id).ok_or("its cluster id is not base64 of 32 bytes")?
        }
        _ => return Err("it states no cluster id".into()),
    };
    let manifest: Manifest = table.try_into().map_err(|e: toml::de::Error| e.to_string())?;
    manifest.validate().map_err(|e| e.to_string())?;
    let actual = manifest.cluster_id();
    if actual != ClusterId(stated) {
        return Err(format!("it states cluster id {stated}, but its contents have {actual}: it was changed"));
    }
    Ok(manifest)
}

/// The file's text.
pub fn to_text(manifest: &Manifest) -> Result<String, String> {
    let body = toml::to_string(manifest).map_err(|e| e.to_string())?;
    Ok(format!(
        "# Public description of a key-distribution cluster: what its clients trust.\n\
         # The cluster id is the digest of everything below.\ncluster = \"{}\"\n{body}",
        manifest.cluster_id()
    ))
}

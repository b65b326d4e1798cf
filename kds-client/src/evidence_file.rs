//! Evidence of misbehaviour, kept in files that anyone with the manifest can check.

use quorum::evidence::{Evidence, EvidenceFile};
use quorum::ids::ServerId;
use quorum::membership::Membership;
use quorum::signing::Keyring;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files that one folder takes at most: a liar does not fill a disk with its lies.
const MOST_FILES: usize = 256;

/// Writes evidence to a new file in `folder`, which is made if there is none; says where. Nothing is
/// written if the folder is full, or holds as much about the same servers and sequence number already.
pub fn keep(folder: &Path, membership: &Arc<Membership>, evidence: Evidence) -> Option<PathBuf> {
    let file = EvidenceFile::new(membership, evidence);
    let culprits = file.culprits(&mut Keyring::of(Arc::clone(membership))).ok()?;
    write(folder, &file, &culprits).ok().flatten()
}

fn write(folder: &Path, file: &EvidenceFile, culprits: &[ServerId]) -> std::io::Result<Option<PathBuf>> {
    std::fs::create_dir_all(folder)?;
    let servers: Vec<_> = culprits.iter().map(ToString::to_string).collect();
    let sequence = match &file.evidence {
        Evidence::Certificates { second, .. } => second.statement.sequence,
        Evidence::Votes { second, .. } => second.body.sequence,
        Evidence::Dissent { vote, .. } => vote.body.sequence,
    };
    let path = folder.join(format!("servers-{}-at-{sequence}.json", servers.join("-")));
    if path.exists() || std::fs::read_dir(folder)?.count() >= MOST_FILES {
        return Ok(None);
    }
    // Whole or not at all.
    let mut draft = tempfile_in(folder)?;
    draft.1.write_all(&serde_json::to_vec_pretty(file)?)?;
    draft.1.sync_all()?;
    std::fs::rename(draft.0, &path)?;
    Ok(Some(path))
}

fn tempfile_in(folder: &Path) -> std::io::Result<(PathBuf, std::fs::File)> {
    let path = folder.join(format!(".draft-{}-{}", std::process::id(), rand::random::<u32>()));
    let file = std::fs::File::create_new(&path)?;
    Ok((path, file))
}

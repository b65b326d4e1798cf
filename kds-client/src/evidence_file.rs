//! Evidence of misbehaviour, kept in files that anyone with the manifest can check.

use quorum::certificate::Certificate;
use quorum::codec::sha256;
use quorum::evidence::{Evidence, EvidenceFile};
use quorum::ids::{Sequence, ServerId};
use quorum::map::Snapshot;
use quorum::membership::Membership;
use quorum::signing::Keyring;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files that one folder takes at most: a liar does not fill a disk with its lies.
const MOST_FILES: usize = 256;
/// Servers that a file's name lists.
const MOST_LISTED: usize = 32;

/// Writes evidence to a new file in `folder`, which is made if there is none; says where. Nothing is
/// written if the folder is full, or holds as much about the same servers and sequence number already. Of what is
/// one server's own votes a certified state has to show who that server was.
pub fn keep(
    folder: &Path,
    membership: &Arc<Membership>,
    evidence: Evidence,
    state: Option<(&Arc<Certificate>, &Snapshot)>,
) -> Option<PathBuf> {
    let file = EvidenceFile::new(membership, evidence, state);
    let culprits = file.culprits(&mut Keyring::of(Arc::clone(membership))).ok()?;
    write(folder, &file, &culprits).ok().flatten()
}

fn write(folder: &Path, file: &EvidenceFile, culprits: &[ServerId]) -> std::io::Result<Option<PathBuf>> {
    std::fs::create_dir_all(folder)?;
    let sequence = match &file.evidence {
        Evidence::Certificates { second, .. } => second.statement.sequence,
        Evidence::Votes { second, .. } => second.body.sequence,
        Evidence::Dissent { vote, .. } => vote.body.sequence,
    };
    let path = folder.join(file_name(culprits, sequence));
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

/// Says who and where, in at most 255 bytes, which is what file systems take: all servers by number, or where
/// they are too many the first of them, how many more there are, and a digest that tells them from others.
fn file_name(culprits: &[ServerId], sequence: Sequence) -> String {
    let listed = |some: &[ServerId]| some.iter().map(ToString::to_string).collect::<Vec<_>>().join("-");
    let (first, more) = culprits.split_at(culprits.len().min(MOST_LISTED));
    let mut name = format!("servers-{}", listed(first));
    if !more.is_empty() {
        let digest = sha256(listed(culprits).as_bytes()).0;
        name += &format!("-and-{}-more-", more.len());
        digest[..8].iter().for_each(|byte| name += &format!("{byte:02x}"));
    }
    name + &format!("-at-{sequence}.json")
}

fn tempfile_in(folder: &Path) -> std::io::Result<(PathBuf, std::fs::File)> {
    let path = folder.join(format!(".draft-{}-{}", std::process::id(), rand::random::<u32>()));
    let file = std::fs::File::create_new(&path)?;
    Ok((path, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_a_name_that_file_systems_take() {
        let servers = |n: u8| (0..n).map(ServerId).collect::<Vec<_>>();
        assert_eq!(file_name(&servers(3), Sequence(7)), "servers-0-1-2-at-7.json");
        let folder = tempfile::tempdir().unwrap();
        for n in 1..=225 {
            let name = file_name(&servers(n), Sequence(u64::MAX));
            assert!(name.len() <= 255, "{n} servers: {} bytes", name.len());
            std::fs::write(folder.path().join(&name), "").unwrap();
            // Others beyond those that are listed are other servers.
            let mut others = servers(n);
            others[usize::from(n) - 1] = ServerId(n);
            assert_ne!(name, file_name(&others, Sequence(u64::MAX)));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 225);
    }
}

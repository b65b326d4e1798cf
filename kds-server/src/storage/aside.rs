//! What is left of a damaged database, for whoever looks into it.
//!
//! Nothing in it opens any more when its server has started again: what is secret there is encrypted under storage keys,
//! and a start draws a new one and erases those before it (docs/decisions/0035).

use crate::config::{DATABASE, LOST_DATABASE};
use crate::files;
use anyhow::Context as _;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Names of such files begin with this; the time follows.
const PREFIX: &str = "kds.db.damaged-";
/// How many are kept.
const KEPT: usize = 2;
/// What belongs to a database file beside it. The file itself is last: whatever is still there without the others is an
/// older copy, and found to be one.
const PARTS: [&str; 3] = ["-wal", "-shm", ""];

fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes the database out of the way, for an empty one in its place, and remembers until that says so itself that it
/// was lost.
pub fn keep(folder: &Path) -> anyhow::Result<PathBuf> {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.3fZ");
    let kept = folder.join(format!("{PREFIX}{time}"));
    let move_all = || {
        File::create(folder.join(LOST_DATABASE))?.sync_all()?;
        files::sync_folder(folder)?;
        for part in PARTS {
            let (from, to) = (with(&folder.join(DATABASE), part), with(&kept, part));
            match std::fs::rename(from, to) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        for old in all(folder)?.iter().rev().skip(KEPT) {
            PARTS.iter().try_for_each(|part| remove_if_there(&with(old, part)))?;
        }
        files::sync_folder(folder)
    };
    move_all()
        .with_context(|| format!("cannot move the damaged database out of the way, to {}", kept.display()))?;
    Ok(kept)
}

/// What is kept, oldest first.
pub fn all(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut kept = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(PREFIX) && !name.ends_with("-wal") && !name.ends_with("-shm") {
            kept.push(path);
        }
    }
    kept.sort();
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_two_are_kept_whole_and_the_loss_is_remembered_first() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..4 {
            std::fs::write(dir.path().join("kds.db"), [round]).unwrap();
            std::fs::write(dir.path().join("kds.db-wal"), [round, round]).unwrap();
            let kept = keep(dir.path()).unwrap();
            assert_eq!(std::fs::read(&kept).unwrap(), [round]);
            assert_eq!(std::fs::read(with(&kept, "-wal")).unwrap(), [round, round]);
            assert!(!dir.path().join("kds.db").exists() && !dir.path().join("kds.db-wal").exists());
            assert!(dir.path().join(LOST_DATABASE).exists());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let kept = all(dir.path()).unwrap();
        let contents: Vec<_> = kept.iter().map(|path| std::fs::read(path).unwrap()).collect();
        assert_eq!(contents, [[2], [3]]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5, "two files of each, and the note");
    }
}

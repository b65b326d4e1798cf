//! How many transactions the database has had, in a file beside it.
//!
//! SQLite passes over a damaged write-ahead log from the damage on, without a word, and a database file that is put back
//! looks like any other. The number is in the database, in the same transaction as everything else, and then here,
//! before anything that was written leaves: a database with a smaller one has lost what it promised.
//!
//! It is not synced: after a power failure it may lag behind the database, which is. Then it says nothing.

use quorum::codec::sha256;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The number, and the beginning of its digest.
const BYTES: usize = 16;

fn encoded(number: u64) -> [u8; BYTES] {
    let number = number.to_be_bytes();
    let digest = sha256(&number);
    std::array::from_fn(|i| if i < 8 { number[i] } else { digest.0[i - 8] })
}

/// The open file.
pub struct Count(File);

impl Count {
    /// Opens or makes it; with the number in it, if there is one.
    pub fn open(path: &Path) -> std::io::Result<(Self, Option<u64>)> {
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).clone();
        let file = options.open(path)?;
        let (mut bytes, length) = ([0; BYTES], file.metadata()?.len());
        let known = length == BYTES as u64 && file.read_exact_at(&mut bytes, 0).is_ok();
        // A longer one would never be right again.
        file.set_len(BYTES as u64)?;
        let number = u64::from_be_bytes(*bytes.first_chunk().expect("of 16"));
        Ok((Self(file), Some(number).filter(|number| known && encoded(*number) == bytes)))
    }
    /// Writes the number down.
    pub fn set(&self, number: u64) -> std::io::Result<()> {
        self.0.write_all_at(&encoded(number), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_comes_back_and_a_damaged_one_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kds.count");
        let (count, number) = Count::open(&path).unwrap();
        assert_eq!(number, None);
        for number in [1, 2, u64::MAX, 7] {
            count.set(number).unwrap();
            assert_eq!(Count::open(&path).unwrap().1, Some(number));
        }
        let whole = std::fs::read(&path).unwrap();
        for i in 0..BYTES {
            let mut flipped = whole.clone();
            flipped[i] ^= 4;
            for damaged in [flipped, whole[..i].to_vec(), vec![0; BYTES], [&whole[..], b"more"].concat()] {
                std::fs::write(&path, damaged).unwrap();
                let (count, number) = Count::open(&path).unwrap();
                assert_eq!(number, None);
                count.set(9).unwrap();
                assert_eq!(Count::open(&path).unwrap().1, Some(9));
            }
        }
    }
}

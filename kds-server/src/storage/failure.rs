//! What an error of the database means for what stands in it.
//!
//! Only what the engine itself calls damage is damage. Whatever may pass (a lock, a disk that is full or does not answer,
//! memory or file descriptors that are used up, a permission) must never cost a server its database.

use std::fmt::Display;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The file is no sound database: what stood in it is lost.
    Damaged,
    /// The disk is full.
    Full,
    /// It may be over in a moment.
    Passing,
    /// Somebody has to look at it.
    Refused,
}

/// SQLite's primary result codes; extended ones have more in their upper bytes.
mod code {
    pub const BUSY: i32 = 5;
    pub const LOCKED: i32 = 6;
    pub const NO_MEMORY: i32 = 7;
    pub const IO: i32 = 10;
    pub const CORRUPT: i32 = 11;
    pub const FULL: i32 = 13;
    pub const PROTOCOL: i32 = 15;
    pub const NOT_A_DATABASE: i32 = 26;
}

impl Failure {
    fn of_code(code: i32) -> Self {
        match code & 0xff {
            code::CORRUPT | code::NOT_A_DATABASE => Self::Damaged,
            code::FULL => Self::Full,
            code::BUSY | code::LOCKED | code::NO_MEMORY | code::IO | code::PROTOCOL => Self::Passing,
            _ => Self::Refused,
        }
    }
    /// Of an error of the engine.
    pub fn of(error: &sqlx::Error) -> Self {
        if let sqlx::Error::ColumnDecode { .. } = error {
            // A value that is not of its column's type was not written so.
            return Self::Damaged;
        }
        if let sqlx::Error::Encode(error) = error {
            // The key that it was to be encrypted under could not be written.
            let error = error.downcast_ref::<std::io::Error>();
            return match error.map(std::io::Error::kind) {
                Some(std::io::ErrorKind::StorageFull) => Self::Full,
                Some(_) => Self::Passing,
                None => Self::Refused,
            };
        }
        let code = error.as_database_error().and_then(|error| error.code());
        code.and_then(|code| code.parse().ok()).map_or(Self::Refused, Self::of_code)
    }
    /// Of an error that one of the engine, or of its check, is behind.
    pub fn behind(error: &anyhow::Error) -> Self {
        let engine = error.chain().find_map(|error| error.downcast_ref::<sqlx::Error>()).map(Self::of);
        let check =
            || error.chain().find_map(|error| error.downcast_ref::<Unsound>()).map(|found| found.failure);
        engine.or_else(check).unwrap_or(Self::Refused)
    }
}

/// What the engine's check of the whole file found.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("its check says: {first}")]
pub struct Unsound {
    failure: Failure,
    first: String,
}

/// Judges the lines of `PRAGMA quick_check`. It says also in a line, and not as an error, that a page could not be read
/// just now: that is no damage.
pub fn judge<S: AsRef<str> + Display>(lines: &[S]) -> Result<(), Unsound> {
    let unread = |line: &&S| match line.as_ref().split_once("error code=") {
        Some((_, code)) => {
            code.trim().parse().map_or(true, |code| Failure::of_code(code) != Failure::Damaged)
        }
        None => line.as_ref().contains("failed to get page"),
    };
    match (lines, lines.iter().find(unread)) {
        ([only], _) if only.as_ref() == "ok" => Ok(()),
        (_, Some(unread)) => Err(Unsound { failure: Failure::Passing, first: unread.to_string() }),
        (lines, None) => {
            let first = lines.first().map_or("nothing".into(), ToString::to_string);
            Err(Unsound { failure: Failure::Damaged, first })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_engine_calls_damage_is_damage() {
        for (code, meaning) in [
            (11, Failure::Damaged),
            (11 | 2 << 8, Failure::Damaged),
            (26, Failure::Damaged),
            (13, Failure::Full),
            (5, Failure::Passing),
            (5 | 1 << 8, Failure::Passing),
            (7, Failure::Passing),
            (10 | 4 << 8, Failure::Passing),
            // The file system calls itself damaged: it may be repaired.
            (10 | 33 << 8, Failure::Passing),
            (3, Failure::Refused),
            (8, Failure::Refused),
            (14, Failure::Refused),
            (19, Failure::Refused),
            (1, Failure::Refused),
        ] {
            assert_eq!(Failure::of_code(code), meaning, "{code}");
        }
        let other = anyhow::anyhow!("the database belongs to another server");
        assert_eq!(Failure::behind(&other), Failure::Refused);
        let found = judge(&["Page 3: never used"]).unwrap_err();
        assert_eq!(Failure::behind(&anyhow::Error::from(found).context("cannot open it")), Failure::Damaged);
    }

    #[test]
    fn a_page_that_could_not_be_read_is_no_damage() {
        let failure = |lines: &[&str]| judge(lines).map_err(|found| found.failure);
        assert_eq!(failure(&["ok"]), Ok(()));
        assert_eq!(failure(&[]), Err(Failure::Damaged));
        assert_eq!(failure(&["Tree 4 page 9: btreeInitPage() returns error code 11"]), Err(Failure::Damaged));
        let unread = "Tree 4 page 9: unable to get the page. error code=266";
        assert_eq!(failure(&[unread]), Err(Failure::Passing));
        assert_eq!(failure(&["Page 12: never used", unread]), Err(Failure::Passing));
        assert_eq!(failure(&["Tree 4 page 9: unable to get the page. error code=11"]), Err(Failure::Damaged));
        assert_eq!(failure(&["Freelist: failed to get page 7"]), Err(Failure::Passing));
    }
}

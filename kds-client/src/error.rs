//! What can go wrong for a client, and the exit status that scripts see.

use crate::api::ProblemKind;
use crate::outcome::Ticket;
use quorum::answer::{Absence, AnswerError, Refused, SaidAlike};
use quorum::ids::{ServerId, Timestamp};
pub use quorum::read::{Misbehaviour, Silence};
use quorum::record::Name;
use quorum::request::{Refusal, SignedRequest};

/// Exit statuses of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Done.
    Done = 0,
    /// Anything not below.
    Other = 1,
    /// Wrong usage.
    Usage = 2,
    /// Not found: its absence was proved.
    NotFound = 3,
    /// What came back could not be verified.
    Unverified = 4,
    /// Not enough servers answered in time.
    Unavailable = 5,
    /// Not allowed, or invalid.
    Refused = 6,
    /// The name exists, or another change came first.
    Conflict = 7,
    /// No key that may be used: revoked, expired, or not valid yet.
    NoUsableKey = 8,
}

fn listed<T: ToString>(items: &[T]) -> String {
    let texts: Vec<_> = items.iter().map(ToString::to_string).collect();
    if texts.is_empty() { "none".into() } else { texts.join(", ") }
}

/// Why an operation failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// Not found: only a proof makes this.
    #[error("{}; its absence is proved by a certificate of the cluster", .0.of())]
    NotFound(Box<Absence>),
    /// Answers came, and they cannot be trusted.
    #[error("no answer could be verified\n  {}\n  check that the manifest is this cluster's and that this machine's clock is right", .rejected.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Unverified {
        /// What was wrong with each.
        rejected: Vec<Misbehaviour>,
    },
    /// Too few answers.
    #[error(
        "not enough servers answered in time: {needed}; answered: {}; silent: {}{}{}\n  check that the servers run (`kds-client status`), or give them more --timeout",
        listed(.answered), listed(.silent),
        .waits.iter().map(|server| format!("; {server}")).collect::<String>(),
        if .rejected.is_empty() { String::new() } else { format!("; rejected: {}", listed(.rejected)) }
    )]
    Unavailable {
        /// What would have been enough.
        needed: String,
        /// Servers whose answers were good.
        answered: Vec<ServerId>,
        /// Servers that did not answer, and why.
        silent: Vec<Silence>,
        /// Servers that asked to wait, and why: there was no time left.
        waits: Vec<AsksToWait>,
        /// Servers whose answers were not.
        rejected: Vec<Misbehaviour>,
    },
    /// Answers came and are too old or too young, since this machine's clock is not right.
    #[error(
        "this machine's clock is {} ms {}: {} servers agree on another time, and what they answer seems {} by it\n  \
         set the clock of this machine",
        .off_ms.unsigned_abs(),
        if *.off_ms > 0 { "ahead" } else { "behind" },
        .servers,
        if *.off_ms > 0 { "too old" } else { "to come from the future" }
    )]
    Clock {
        /// How far this machine's clock is ahead, in milliseconds; negative if it is behind.
        off_ms: i64,
        /// Servers that say so.
        servers: usize,
    },
    /// The record is certified but not proved to be visible to every reader.
    #[error(
        "the last change is committed but not yet visible to all row reads: too few servers hold it\n  \
         more than the masked number of servers are silent; `--consistency quorum` reads it now"
    )]
    NotComplete,
    /// A key that is not to be relied on now, or a signature that does not hold.
    #[error("{0}")]
    Unusable(String),
    /// Executed and refused, with proof.
    #[error("refused: {}", .0.refusal())]
    Refused(Box<Refused>),
    /// Refused before ordering, by f+1 servers for the same reason.
    #[error(
        "refused by {} servers: {}{}", .said.servers().len(), .said.reason().title(),
        .detail.as_ref().map_or(String::new(), |detail| format!(": {detail}"))
    )]
    RefusedByServers {
        /// The reason, and who gives it.
        said: Box<SaidAlike<ProblemKind>>,
        /// More words of f+1 servers, if they use the same.
        detail: Option<String>,
    },
    /// Every server refuses, and no f+1 of them for the same reason: what any of them says may be a lie.
    #[error(
        "the servers do not agree on why they refuse\n  {}",
        .said.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ")
    )]
    Disagree {
        /// Who said what.
        said: Vec<Misbehaviour>,
    },
    /// The secret is no longer the one that this was about.
    #[error(
        "the secret {name} was {} meanwhile: another change came first",
        if .deleted.is_some() { "deleted" } else { "replaced" }
    )]
    SecretChanged {
        /// Its name.
        name: Name,
        /// The proof that there is none now, if there is none.
        deleted: Option<Box<Absence>>,
    },
    /// There is nothing to guess.
    #[error("{}", Refusal::NoPassphrase)]
    NoPassphrase,
    /// No proof of what came of a write: it may execute yet, or has.
    #[error(
        "{why}\n  it is not known whether the request was executed, and it may still be until {}\n  \
         `kds-client outcome {}` tells what came of it; do it again only if that says that it never was executed",
        .request.request.expiry, .ticket
    )]
    OutcomeUnknown {
        /// The request, for [`Client::retry`](crate::Client::retry).
        request: Box<SignedRequest>,
        /// Its name, to ask what came of it.
        ticket: Box<Ticket>,
        /// Why there is no proof.
        why: Box<ClientError>,
    },
    /// It expired before it was executed, which is proved.
    #[error("the request expired at {expiry} and was never executed, nor will it be: it can be done again")]
    NotExecuted {
        /// Its expiry.
        expiry: Timestamp,
        /// That a state after it has no reply.
        absence: Box<Absence>,
    },
    /// It expired, and its reply would no longer be kept.
    #[error(
        "the request expired at {expiry}, and what came of it is no longer kept: look up whether it was executed"
    )]
    Forgotten {
        /// Its expiry.
        expiry: Timestamp,
    },
    /// The stored reply is of another request: a number was used twice.
    #[error("another request was executed under the same number; nothing of this one was done: try again")]
    NumberReused,
    /// Secret.
    #[error("{0}")]
    Secret(String),
    /// k servers evaluated the guess, provably, and it is not the passphrase.
    #[error(
        "this is not the passphrase; {}",
        match .left {
            0 => "no guesses are left: nobody can open this secret any more".into(),
            1 => "1 more guess is left".into(),
            left => format!("{left} more guesses are left"),
        }
    )]
    WrongPassphrase {
        /// Guesses that are left.
        left: u32,
    },
    /// The client's own side.
    #[error("{0}")]
    Local(String),
}

impl ClientError {
    /// What scripts see.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            Self::NotFound(_) => ExitStatus::NotFound,
            Self::Unverified { .. } | Self::Clock { .. } | Self::Unusable(_) => ExitStatus::Unverified,
            Self::Unavailable { .. }
            | Self::NotComplete
            | Self::OutcomeUnknown { .. }
            | Self::NotExecuted { .. }
            | Self::Forgotten { .. } => ExitStatus::Unavailable,
            Self::Refused(refused) if refused.absence().is_some() => ExitStatus::NotFound,
            Self::Refused(refused) => match refused.refusal() {
                Refusal::NameTaken { .. }
                | Refusal::VersionConflict { .. }
                | Refusal::Revoked
                | Refusal::SecretTaken { .. }
                | Refusal::AlreadySo
                | Refusal::EpochPassed { .. } => ExitStatus::Conflict,
                Refusal::NotAllowed
                | Refusal::NoSuchName
                | Refusal::NoSuchSecret
                | Refusal::Invalid(_)
                | Refusal::TooOften
                | Refusal::NoPassphrase
                | Refusal::OnlyByPassphrase
                | Refusal::NoGuessesLeft
                | Refusal::OverQuota { .. }
                | Refusal::NoSpace { .. }
                | Refusal::OwnsNoName
                | Refusal::GiftRefused => ExitStatus::Refused,
            },
            // That nothing is there, or that something else is, is shown by a proof or not at all.
            Self::RefusedByServers { .. } => ExitStatus::Refused,
            Self::WrongPassphrase { .. } | Self::NoPassphrase => ExitStatus::Refused,
            Self::NumberReused | Self::SecretChanged { .. } => ExitStatus::Conflict,
            Self::Secret(_) | Self::Disagree { .. } => ExitStatus::Unverified,
            Self::Local(_) => ExitStatus::Other,
        }
    }
}

/// A server that has too much to do, or is not ready: no lie, and no silence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsksToWait {
    /// Which server.
    pub server: ServerId,
    /// What it says.
    pub why: String,
}

impl std::fmt::Display for AsksToWait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "server {} asks to wait: {}", self.server, self.why)
    }
}

/// Characters of what a server says that are shown to people.
const MOST_WORDS: usize = 300;

/// What a single server's answer led to.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// It did not answer, or not in time; it may have heard the question.
    Silent(String),
    /// There was no connection to it: it cannot have heard the question.
    Unreached(String),
    /// It says when to come back: it has too much to do, or is not ready.
    AsksToWait {
        /// For how long, within bounds.
        wait: std::time::Duration,
        /// What it says.
        why: String,
    },
    /// It said no.
    Problem(Box<crate::api::Problem>),
    /// It said something that no correct server says.
    Nonsense(String),
}

impl LinkError {
    /// Nothing came within a time.
    pub(crate) fn late(waited: std::time::Duration) -> Self {
        Self::Silent(format!("no answer within {waited:.1?}"))
    }
}

impl From<Absence> for ClientError {
    fn from(absence: Absence) -> Self {
        Self::NotFound(Box::new(absence))
    }
}

impl From<Refused> for ClientError {
    fn from(refused: Refused) -> Self {
        Self::Refused(Box::new(refused))
    }
}

impl From<AnswerError> for LinkError {
    fn from(error: AnswerError) -> Self {
        Self::Nonsense(error.to_string())
    }
}

/// Whether a character makes a terminal do something else than show it, or show others in another order.
pub fn steers(c: char) -> bool {
    let order =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}');
    // And what is not to be seen, or ends a line in some programs.
    c.is_control()
        || order
        || matches!(c, '\u{200b}'..='\u{200d}' | '\u{2028}' | '\u{2029}' | '\u{2060}' | '\u{feff}')
}

/// What others say (a server, a file, the owner of a name), as it is shown to people: short, and nothing that steers a
/// terminal.
pub fn words(said: &str) -> String {
    let mut words: String =
        said.chars().take(MOST_WORDS).map(|c| if steers(c) { '\u{fffd}' } else { c }).collect();
    if said.chars().nth(MOST_WORDS).is_some() {
        words.push('…');
    }
    words
}

impl std::fmt::Display for LinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent(why) | Self::Unreached(why) | Self::Nonsense(why) => f.write_str(&words(why)),
            Self::AsksToWait { why, .. } => write!(f, "it asks to wait: {}", words(why)),
            Self::Problem(problem) => {
                let said = format!("status {}: {}: {}", problem.status, problem.title, problem.detail);
                f.write_str(&words(&said))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorum::answer::Refusals;

    #[test]
    fn what_others_say_steers_no_terminal() {
        let said = format!("a\u{1b}]0;owned\u{7}\u{202e}\n\r\u{9b}2J{}", "x".repeat(100_000));
        for error in [
            LinkError::Silent(said.clone()),
            LinkError::Unreached(said.clone()),
            LinkError::Nonsense(said.clone()),
            LinkError::AsksToWait { wait: std::time::Duration::ZERO, why: said.clone() },
        ] {
            let shown = error.to_string();
            assert!(!shown.contains(steers) && shown.chars().count() < MOST_WORDS + 30, "{shown}");
        }
        assert_eq!(words("Grüße, 東京"), "Grüße, 東京");
    }

    #[test]
    fn only_a_proof_says_that_something_does_not_exist() {
        let manifest = crate::fixtures::cluster();
        let said = |reason: ProblemKind| {
            let mut refusals = Refusals::new(&manifest.thresholds);
            assert!(refusals.add(ServerId(0), reason).is_none());
            let said = Box::new(refusals.add(ServerId(3), reason).unwrap());
            ClientError::RefusedByServers { said, detail: None }.exit_status()
        };
        assert_eq!(said(ProblemKind::NotFound), ExitStatus::Refused);
        assert_eq!(said(ProblemKind::NotAllowed), ExitStatus::Refused);
        let absence = crate::fixtures::absence(&Name::new("alice").unwrap(), crate::now());
        assert_eq!(ClientError::from(absence).exit_status(), ExitStatus::NotFound);
    }
}

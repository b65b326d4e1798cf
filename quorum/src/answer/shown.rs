//! What was shown: values that nothing but a check makes (design §5).
//!
//! That something does not exist, that a request was executed, that it was refused: whoever is told so acts on it,
//! and a server's word for it is worth nothing. So each is a type of its own with private fields. The
//! [`Verifier`](super::Verifier) makes them from proofs that hold, and [`Refusals`] from what f+1 servers say
//! alike, of which one at least is correct (PBFT §4.1).

use super::Receipt;
use crate::certificate::Checkpoint;
use crate::ids::{Sequence, ServerId, ServerSet};
use crate::record::Name;
use crate::request::{Done, Outcome, Refusal, Reply, RequestId};
use crate::thresholds::Thresholds;
use std::collections::BTreeMap;
use std::fmt;

/// What is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A name's record.
    Name(Name),
    /// A version of one.
    Version(Name, u64),
    /// A secret.
    Secret(Name),
    /// The stored reply of a request.
    Reply(RequestId),
    /// What a request was about, when it was executed.
    Subject(Refusal),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "the name {name} does not exist"),
            Self::Version(name, version) => write!(f, "version {version} of {name} does not exist"),
            Self::Secret(name) => write!(f, "the secret {name} does not exist"),
            Self::Reply(_) => f.write_str("the request was not executed"),
            Self::Subject(refusal) => write!(f, "{refusal}"),
        }
    }
}

/// Something does not exist in a state that q servers certified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absence {
    of: Missing,
    at: Checkpoint,
}

impl Absence {
    pub(super) fn new(of: Missing, at: Checkpoint) -> Self {
        Self { of, at }
    }
    /// What does not exist.
    pub fn of(&self) -> &Missing {
        &self.of
    }
    /// The state that has it not.
    pub fn at(&self) -> &Checkpoint {
        &self.at
    }
}

/// What a proof shows of something: it, or that it does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown<T> {
    /// It exists.
    There(T),
    /// It does not.
    Absent(Absence),
}

impl<T> Shown<T> {
    /// It, if it exists.
    pub fn there(self) -> Option<T> {
        match self {
            Self::There(it) => Some(it),
            Self::Absent(_) => None,
        }
    }
    /// It, or the absence as an error.
    pub fn found(self) -> Result<T, Absence> {
        match self {
            Self::There(it) => Ok(it),
            Self::Absent(absence) => Err(absence),
        }
    }
    /// The same without taking it.
    pub fn as_ref(&self) -> Shown<&T> {
        match self {
            Self::There(it) => Shown::There(it),
            Self::Absent(absence) => Shown::Absent(absence.clone()),
        }
    }
    /// Something else about it, if it exists.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Shown<U> {
        match self {
            Self::There(it) => Shown::There(change(it)),
            Self::Absent(absence) => Shown::Absent(absence),
        }
    }
}

/// A request that was executed, whatever came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    reply: Reply,
    receipt: Receipt,
    complete: bool,
}

impl Executed {
    pub(super) fn new(reply: Reply, receipt: Receipt, complete: bool) -> Self {
        Self { reply, receipt, complete }
    }
    /// The stored reply.
    pub fn reply(&self) -> &Reply {
        &self.reply
    }
    /// The batch that it was part of.
    pub fn sequence(&self) -> Sequence {
        self.reply.sequence
    }
    /// Whether that is shown to be visible to every complete read.
    pub fn is_complete(&self) -> bool {
        self.complete
    }
    /// The proof, to keep.
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }
    /// What it did, or why it did nothing.
    pub fn outcome(&self) -> Result<&Done, Refused> {
        match &self.reply.outcome {
            Outcome::Done(done) => Ok(done),
            Outcome::Refused(refusal) => {
                Err(Refused { refusal: refusal.clone(), at: self.receipt.certificate.statement })
            }
        }
    }
}

/// A request that was executed and did nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    refusal: Refusal,
    at: Checkpoint,
}

impl Refused {
    /// Why.
    pub fn refusal(&self) -> &Refusal {
        &self.refusal
    }
    /// The state that has the reply.
    pub fn at(&self) -> &Checkpoint {
        &self.at
    }
    /// What did not exist, if it was refused for that.
    pub fn absence(&self) -> Option<Absence> {
        match self.refusal {
            Refusal::NoSuchName | Refusal::NoSuchSecret => {
                Some(Absence::new(Missing::Subject(self.refusal.clone()), self.at))
            }
            _ => None,
        }
    }
}

/// Refusals by servers' words alone, each server's first.
#[derive(Clone, Debug)]
pub struct Refusals<R> {
    needed: usize,
    said: BTreeMap<ServerId, R>,
}

impl<R: Clone + PartialEq> Refusals<R> {
    /// None so far.
    pub fn new(thresholds: &Thresholds) -> Self {
        Self { needed: thresholds.f() + 1, said: BTreeMap::new() }
    }
    /// A server says so. What f+1 servers say alike at least one correct server says.
    pub fn add(&mut self, server: ServerId, reason: R) -> Option<SaidAlike<R>> {
        let reason = self.said.entry(server).or_insert(reason).clone();
        let alike = self.said.iter().filter(|(_, said)| **said == reason);
        let servers: ServerSet = alike.map(|(server, _)| *server).collect();
        (servers.len() >= self.needed).then(|| SaidAlike { reason, servers: servers.iter().collect() })
    }
    /// What f+1 servers say alike, among what may be said.
    pub fn alike(&self, may: impl Fn(&R) -> bool) -> Option<&R> {
        let times = |reason: &R| self.said.values().filter(|said| *said == reason).count();
        self.said.values().find(|reason| may(reason) && times(reason) >= self.needed)
    }
    /// Who said what.
    pub fn said(&self) -> &BTreeMap<ServerId, R> {
        &self.said
    }
}

/// What f+1 servers at least say alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaidAlike<R> {
    reason: R,
    servers: Vec<ServerId>,
}

impl<R> SaidAlike<R> {
    /// What they say.
    pub fn reason(&self) -> &R {
        &self.reason
    }
    /// Who.
    pub fn servers(&self) -> &[ServerId] {
        &self.servers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_liar_among_f_plus_one_refusals_decides_nothing() {
        let thresholds = Thresholds::plan(9, None, None).unwrap();
        let mut refusals = Refusals::new(&thresholds);
        assert_eq!(refusals.add(ServerId(0), "not found"), None);
        assert_eq!(refusals.add(ServerId(1), "not allowed"), None);
        // A server has one voice, and its first word counts.
        assert_eq!(refusals.add(ServerId(0), "not allowed"), None);
        assert_eq!(refusals.add(ServerId(2), "not allowed"), None);
        assert_eq!(refusals.add(ServerId(2), "not found"), None);
        let alike = refusals.add(ServerId(5), "not allowed").unwrap();
        assert_eq!((alike.reason(), alike.servers()), (&"not allowed", &[1, 2, 5].map(ServerId)[..]));
        assert_eq!(refusals.said()[&ServerId(0)], "not found");
    }
}

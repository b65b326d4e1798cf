//! What came of a request whose answer did not come.
//!
//! Replies stay in the replicated client table until their request has expired, and a little longer. So a
//! certified state either has the reply; or it is from before the expiry, and the request may still execute; or
//! it is from the time after that, and shows that the request did not execute and never will.

use crate::client::Client;
use crate::error::ClientError;
use crate::write::Written;
use bech32::{Bech32m, Hrp};
use quorum::answer::{Absence, AnswerError, Executed, Receipt, Shown, Verifier};
use quorum::codec::digest;
use quorum::ids::{ClusterId, Timestamp};
use quorum::limits::REPLY_KEPT_MS;
use quorum::request::{RequestId, SignedRequest};
use quorum::{Hash, PublicKey};
use std::fmt::{self, Write as _};
use std::str::FromStr;

/// What stands before the number in a ticket's text.
const PREFIX: Hrp = Hrp::parse_unchecked("kdsreq");

/// Names a request, to ask what came of it. Its text is one word with a checksum. Secret from nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Whose request, and its number.
    pub id: RequestId,
    /// Until when it may execute, in agreed time.
    pub expiry: Timestamp,
    /// The beginning of the id of the cluster that it is for.
    pub cluster: [u8; 8],
    /// The beginning of its digest: another request may have been executed under its number.
    pub request: [u8; 8],
}

/// The first bytes of a hash.
fn beginning(hash: &Hash) -> [u8; 8] {
    let mut first = [0; 8];
    first.copy_from_slice(&hash.0[..8]);
    first
}

impl Ticket {
    /// Of a request to a cluster.
    pub fn of(cluster: &ClusterId, request: &SignedRequest) -> Self {
        let request = &request.request;
        Self {
            id: RequestId { client: request.client, sequence: request.sequence },
            expiry: request.expiry,
            cluster: beginning(&cluster.0),
            request: beginning(&digest(cluster, request)),
        }
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sequence, expiry) = (self.id.sequence.to_be_bytes(), self.expiry.0.to_be_bytes());
        let bytes = [&self.id.client.0[..], &sequence, &expiry, &self.cluster, &self.request].concat();
        f.write_str(&bech32::encode::<Bech32m>(PREFIX, &bytes).map_err(|_| fmt::Error)?)
    }
}

/// A text that is no ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not the name of a request: that is one word that begins with {PREFIX}1, as a write says it that is not answered"
)]
pub struct NoTicket;

impl FromStr for Ticket {
    type Err = NoTicket;
    fn from_str(text: &str) -> Result<Self, NoTicket> {
        let checked =
            bech32::primitives::decode::CheckedHrpstring::new::<Bech32m>(text).map_err(|_| NoTicket)?;
        let bytes: Vec<u8> = checked.byte_iter().collect();
        if checked.hrp() != PREFIX {
            return Err(NoTicket);
        }
        let (client, rest) = bytes.split_first_chunk().ok_or(NoTicket)?;
        let (sequence, rest) = rest.split_first_chunk().ok_or(NoTicket)?;
        let (expiry, rest) = rest.split_first_chunk().ok_or(NoTicket)?;
        let (cluster, rest) = rest.split_first_chunk().ok_or(NoTicket)?;
        let request = rest.try_into().map_err(|_| NoTicket)?;
        let id = RequestId { client: PublicKey(*client), sequence: u64::from_be_bytes(*sequence) };
        Ok(Self { id, expiry: Timestamp(u64::from_be_bytes(*expiry)), cluster: *cluster, request })
    }
}

/// What came of a request.
#[derive(Clone, Debug)]
pub enum WhatCame {
    /// It was executed, with this outcome; proved.
    Executed(Box<Executed>),
    /// Not yet executed in a state that has everything that was complete when this was asked. It may still be,
    /// until it expires.
    Pending,
    /// It was not executed, and never will be; proved.
    NeverExecuted(Box<Absence>),
    /// It expired so long ago that its reply would no longer be kept.
    Forgotten,
}

impl Client {
    /// Asks what came of a request, without sending it again. Whoever made the ticket says until when it may
    /// execute: that it never will is proved of a request with that expiry.
    ///
    /// # Errors
    /// As [`Client::lookup`]; if the request is one to another cluster, or another one was executed under its number.
    pub async fn outcome(&self, ticket: &Ticket) -> Result<WhatCame, ClientError> {
        if ticket.cluster != beginning(&self.inner.manifest.cluster_id().0) {
            let why = "the request is one to another cluster than the manifest's: name its manifest with --manifest";
            return Err(ClientError::Local(why.into()));
        }
        let client = self.begun();
        let mut path = "/v1/requests/".to_owned();
        ticket.id.client.0.iter().for_each(|byte| {
            let _ = write!(path, "{byte:02x}");
        });
        let _ = write!(path, "/{}", ticket.id.sequence);
        // A server alone could answer from a state that is a few seconds old.
        let current = client.current_state().await?.statement.sequence;
        let check = |verifier: &mut Verifier, answer: &Receipt| {
            let (got, time) = (answer.certificate.statement.sequence, answer.certificate.statement.time);
            Ok(match verifier.executed(answer.clone(), ticket.id)? {
                Shown::There(executed) => WhatCame::Executed(Box::new(executed)),
                Shown::Absent(_) if got < current => return Err(AnswerError::Behind { got, current }),
                Shown::Absent(_) if time <= ticket.expiry => WhatCame::Pending,
                Shown::Absent(absence) if time <= ticket.expiry.plus_ms(REPLY_KEPT_MS) => {
                    WhatCame::NeverExecuted(Box::new(absence))
                }
                Shown::Absent(_) => WhatCame::Forgotten,
            })
        };
        match client.first_good(&path, check).await? {
            WhatCame::Executed(executed) if beginning(&executed.reply().request) != ticket.request => {
                Err(ClientError::NumberReused)
            }
            came => Ok(came),
        }
    }

    /// Goes on with a request whose outcome is not known: asks what came of it, and sends the same request again
    /// while it may still execute. It executes once at most, however often this is done.
    ///
    /// # Errors
    /// As [`Client::submit`]; [`ClientError::NotExecuted`] if it expired, and only then it is right to sign the
    /// operation anew; [`ClientError::Forgotten`] if nobody knows any more.
    pub async fn retry(&self, request: &SignedRequest) -> Result<Written, ClientError> {
        let client = self.begun();
        let expiry = request.request.expiry;
        match client.outcome(&Ticket::of(&self.inner.manifest.cluster_id(), request)).await? {
            WhatCame::Executed(executed) => client.written(request, *executed),
            WhatCame::Pending => client.submit_signed(request).await,
            WhatCame::NeverExecuted(absence) => Err(ClientError::NotExecuted { expiry, absence }),
            WhatCame::Forgotten => Err(ClientError::Forgotten { expiry }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_one_word_and_comes_back_from_it() {
        let id = RequestId { client: PublicKey([7; 32]), sequence: u64::MAX - 3 };
        let ticket = Ticket { id, expiry: Timestamp(1_800_000_000_123), cluster: [5; 8], request: [6; 8] };
        let text = ticket.to_string();
        assert!(text.starts_with("kdsreq1") && text.chars().all(|c| c.is_ascii_alphanumeric()), "{text}");
        assert_eq!(text.parse(), Ok(ticket));
        for place in 0..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[place] = if wrong[place] == b'q' { b'p' } else { b'q' };
            let wrong = String::from_utf8(wrong).unwrap();
            assert_eq!(wrong.parse::<Ticket>(), Err(NoTicket), "{wrong}");
        }
        for wrong in ["", "kdsreq1", "age1qqqq", &text[..text.len() - 1], &format!("{text}q")] {
            assert_eq!(wrong.parse::<Ticket>(), Err(NoTicket), "{wrong}");
        }
    }
}

//! Writes: a signed request to one server, on to further ones if it stays silent or refuses, and
//! a receipt that is checked.

use crate::api::{Problem, ProblemKind};
use crate::client::Client;
use crate::deadline::after;
use crate::error::{ClientError, ExitStatus, LinkError};
use crate::failure::{Tally, is_about_time};
use quorum::PublicKey;
use quorum::answer::{PageAnswer, Receipt, Verifier};
use quorum::codec::digest;
use quorum::ids::Sequence;
use quorum::record::{Entry, Name};
use quorum::request::{Decision, Done, Operation, Outcome, RequestId, SignedRequest};
use quorum::signing::SigningKey;
use quorum::state::Pending;
use rand::Rng as _;
use std::time::Duration;
use tokio::time::Instant;

/// How long a request may wait to be executed.
const LIFETIME_MS: u64 = 30_000;
/// How long one server is given before the request goes to another one too.
const PATIENCE: Duration = Duration::from_secs(4);

/// An executed write.
#[derive(Clone, Debug)]
pub struct Written {
    /// What it did.
    pub done: Done,
    /// The batch that it was part of.
    pub sequence: Sequence,
    /// Whether it is visible to every complete read: servers that hold it cover c columns and
    /// number q. If not, it is committed and durable at q servers, and reads of q servers see it.
    pub complete: bool,
    /// The proof of its execution.
    pub receipt: Box<Receipt>,
}

impl Client {
    /// Registers a name, as an administrator.
    pub async fn register(&self, key: &SigningKey, name: Name, entry: Entry) -> Result<Written, ClientError> {
        self.submit(key, Operation::Register { name, entry }).await
    }
    /// Asks for a decision of the administrators, as one of them: it is made when enough of them have.
    pub async fn decide(&self, key: &SigningKey, decision: Decision) -> Result<Written, ClientError> {
        self.submit(key, Operation::Decide(decision)).await
    }
    /// The administrators, in the order of their keys.
    pub async fn administrators(&self) -> Result<Vec<PublicKey>, ClientError> {
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        self.first_good("/v1/administrators", |verifier: &mut Verifier, answer: &PageAnswer| {
            let administrators = verifier.administrators(answer)?;
            Verifier::fresh(&answer.certificate, crate::now(), max_age_ms)?;
            Ok(administrators)
        })
        .await
    }
    /// What some administrators ask for, and not yet enough of them.
    pub async fn decisions(&self) -> Result<Vec<Pending>, ClientError> {
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        self.first_good("/v1/decisions", |verifier: &mut Verifier, answer: &PageAnswer| {
            let decisions = verifier.decisions(answer)?;
            Verifier::fresh(&answer.certificate, crate::now(), max_age_ms)?;
            Ok(decisions)
        })
        .await
    }
    /// Replaces version `from_version` of a name.
    pub async fn rotate(
        &self,
        key: &SigningKey,
        name: Name,
        from_version: u64,
        entry: Entry,
    ) -> Result<Written, ClientError> {
        self.submit(key, Operation::Rotate { name, from_version, entry }).await
    }
    /// Withdraws version `from_version` of a name.
    pub async fn revoke(
        &self,
        key: &SigningKey,
        name: Name,
        from_version: u64,
        reason: String,
    ) -> Result<Written, ClientError> {
        self.submit(key, Operation::Revoke { name, from_version, reason }).await
    }
    /// Signs an operation and has it executed, once.
    pub async fn submit(&self, key: &SigningKey, operation: Operation) -> Result<Written, ClientError> {
        let request = self.sign(key, rand::rng().next_u64(), operation);
        self.submit_signed(&request).await
    }
    /// Signs an operation under a number that must not have been used before.
    pub fn sign(&self, key: &SigningKey, sequence: u64, operation: Operation) -> SignedRequest {
        let expiry = crate::now().plus_ms(LIFETIME_MS);
        SignedRequest::sign(&self.inner.manifest.cluster_id(), key, sequence, expiry, operation)
    }

    /// Has a signed request executed. The same request can be given to several servers: it
    /// executes once (PBFT §4.1).
    pub async fn submit_signed(&self, request: &SignedRequest) -> Result<Written, ClientError> {
        let deadline = self.deadline();
        let (mut tally, mut refusals) = (Tally::default(), Vec::<Problem>::new());
        let enough_refusals = self.inner.manifest.thresholds.f() + 1;
        for server in self.preferred() {
            let until = deadline.min(after(PATIENCE));
            let link = &self.inner.links[server.index()];
            let answer = tokio::time::timeout_at(until, link.post("/v1/requests", request)).await;
            let receipt = match answer.unwrap_or_else(|_| Err(LinkError::late(PATIENCE))) {
                Ok(receipt) => receipt,
                Err(LinkError::Problem(problem)) => match *problem {
                    Problem { receipt: Some(receipt), .. } => *receipt,
                    problem => {
                        // A server's word alone: f+1 of them include a correct one.
                        if problem.status == ProblemKind::NotReady.status() {
                            tally.failed(server, &LinkError::Problem(Box::new(problem)));
                        } else {
                            refusals.push(problem);
                        }
                        if refusals.len() >= enough_refusals {
                            return Err(self.refused(&refusals).await);
                        }
                        continue;
                    }
                },
                Err(error) => {
                    tally.failed(server, &error);
                    if Instant::now() >= deadline {
                        break;
                    }
                    continue;
                }
            };
            match self.check_receipt(request, receipt) {
                Ok(result) => return result,
                Err(error) => tally.wrong(server, &error),
            }
        }
        if !refusals.is_empty() && tally.silent.is_empty() && tally.rejected.is_empty() {
            return Err(self.refused(&refusals).await);
        }
        tally.odd_times |= refusals.iter().any(is_about_time);
        Err(self.failure("one server with a receipt", tally).await)
    }

    /// f+1 servers refused before ordering: perhaps because of this machine's clock.
    async fn refused(&self, problems: &[Problem]) -> ClientError {
        let clock = match problems.iter().any(is_about_time) {
            true => self.odd_clock().await,
            false => None,
        };
        clock.unwrap_or_else(|| refused(problems))
    }

    /// Outer error: the receipt proves nothing. Inner: what it proves.
    fn check_receipt(
        &self,
        request: &SignedRequest,
        receipt: Receipt,
    ) -> Result<Result<Written, ClientError>, quorum::answer::AnswerError> {
        let id = RequestId { client: request.request.client, sequence: request.request.sequence };
        let (receipt, reply, complete) = self.with_verifier(|verifier| {
            let reply = verifier.receipt(&receipt, id)?.clone();
            let receipt = verifier.to_keep(receipt)?;
            let complete = verifier.complete() >= reply.sequence;
            Ok::<_, quorum::answer::AnswerError>((receipt, reply, complete))
        })?;
        if reply.request != digest(&self.inner.manifest.cluster_id(), &request.request) {
            return Ok(Err(ClientError::NumberReused));
        }
        let sequence = reply.sequence;
        if let (Outcome::Done(Done::Record { version }), Some(name)) =
            (&reply.outcome, request.request.operation.name())
        {
            // Who has written a version is not shown an older one, from memory least of all.
            self.remember(name, *version);
        }
        Ok(match reply.outcome {
            Outcome::Done(done) => Ok(Written { done, sequence, complete, receipt: Box::new(receipt) }),
            Outcome::Refused(refusal) => Err(ClientError::Refused(refusal)),
        })
    }
}

/// f+1 servers refused before ordering.
fn refused(problems: &[Problem]) -> ClientError {
    let first = &problems[0];
    let status = match ProblemKind::from_uri(&first.kind) {
        Some(ProblemKind::Conflict | ProblemKind::EpochPassed) => ExitStatus::Conflict,
        Some(ProblemKind::NotFound) => ExitStatus::NotFound,
        Some(ProblemKind::NotReady) => ExitStatus::Unavailable,
        _ => ExitStatus::Refused,
    };
    let detail = format!("{}: {}", first.title, first.detail);
    ClientError::RefusedByServers { servers: problems.len(), detail, status }
}

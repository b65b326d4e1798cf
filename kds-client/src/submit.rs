//! Having a signed request executed: by one server, by further ones too if it stays silent or refuses, and with a
//! receipt that is checked.
//!
//! All of them get the same bytes under the same number, so however often it is sent it executes once at most
//! (PBFT §4.1). Whatever a server answers that is no receipt, it may have passed the request on: once one has
//! heard it, and nothing is proved, it is not known what came of it, and that is what is said.

use crate::api::{Problem, ProblemKind};
use crate::client::Client;
use crate::error::{ClientError, LinkError, Misbehaviour, Silence, words};
use crate::failure::Tally;
use crate::outcome::Ticket;
use crate::write::Written;
use quorum::answer::{AnswerError, Executed, Receipt, Refusals, SaidAlike, Shown};
use quorum::codec::digest;
use quorum::ids::ServerId;
use quorum::request::{Done, Operation, RequestId, SignedRequest};
use quorum::signing::SigningKey;
use rand::Rng as _;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

/// How long a request may wait to be executed, in milliseconds.
const LIFETIME_MS: u64 = 30_000;

impl Client {
    /// Signs an operation and has it executed, once.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it was executed and did nothing, with proof; [`ClientError::OutcomeUnknown`] if
    /// it may still execute: that has the request, for [`Client::retry`].
    pub async fn submit(&self, key: &SigningKey, operation: Operation) -> Result<Written, ClientError> {
        let request = self.sign(key, rand::rng().next_u64(), operation);
        self.submit_signed(&request).await
    }
    /// Signs an operation under a number that must not have been used before.
    pub fn sign(&self, key: &SigningKey, sequence: u64, operation: Operation) -> SignedRequest {
        let expiry = crate::now().plus_ms(LIFETIME_MS);
        SignedRequest::sign(&self.inner.manifest.cluster_id(), key, sequence, expiry, operation)
    }

    /// Has a signed request executed. The same request can be given to several servers, and again: it executes
    /// once at most.
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub async fn submit_signed(&self, request: &SignedRequest) -> Result<Written, ClientError> {
        Submission::new(self, request).run().await
    }

    /// What an executed request did, or that it did nothing.
    pub(crate) fn written(
        &self,
        request: &SignedRequest,
        executed: Executed,
    ) -> Result<Written, ClientError> {
        let (reply, sequence) = (executed.reply(), executed.sequence());
        if reply.request != digest(&self.inner.manifest.cluster_id(), &request.request) {
            return Err(ClientError::NumberReused);
        }
        self.inner.seen.state(sequence);
        let outcome = executed.outcome().cloned();
        match (&outcome, request.request.operation.name()) {
            // Who has written a version is not shown an older one, from memory least of all.
            (Ok(Done::Record { version }), Some(name)) => self.inner.seen.version(name, *version, sequence),
            // A refusal tells of the state in which it was made, too.
            (Err(_), Some(name)) => self.inner.seen.since(name, sequence),
            _ => {}
        }
        let done = outcome?;
        let complete = executed.is_complete();
        Ok(Written { done, sequence, complete, receipt: Box::new(executed.receipt().clone()) })
    }
}

/// A server that has the request.
struct Asked {
    server: ServerId,
    since: Instant,
    /// It was noted that it takes long.
    late: bool,
}

type Answer = (ServerId, Result<Receipt, LinkError>);

/// What ends a submission: nothing that one server could make up.
enum End {
    Executed(Box<Executed>),
    Refused(SaidAlike<ProblemKind>),
}

/// Why a server refuses a request before ordering, if this is a reason that a correct one can have. What is found
/// out by executing it comes with a receipt, and a server's own troubles say nothing about the request.
fn refusal(problem: &Problem) -> Option<ProblemKind> {
    match ProblemKind::from_uri(&problem.kind)? {
        reason @ (ProblemKind::Malformed
        | ProblemKind::Invalid
        | ProblemKind::Expiry
        | ProblemKind::BadSignature
        | ProblemKind::NotAllowed
        | ProblemKind::NotFound
        | ProblemKind::TooLarge) => Some(reason),
        ProblemKind::NoRoute
        | ProblemKind::Method
        | ProblemKind::Conflict
        | ProblemKind::EpochPassed
        | ProblemKind::TooMany
        | ProblemKind::OverQuota
        | ProblemKind::NoSpace
        | ProblemKind::Internal
        | ProblemKind::NotReady => None,
    }
}

/// A request that is on its way to be executed.
struct Submission<'a> {
    client: &'a Client,
    request: Arc<SignedRequest>,
    deadline: Instant,
    /// Servers that have not been asked, best first.
    order: VecDeque<ServerId>,
    /// Who asked to wait, and until when.
    waiting: Vec<(Instant, ServerId)>,
    asked: Vec<Asked>,
    /// Ends with this: nothing goes on behind a caller's back.
    answers: JoinSet<Answer>,
    /// When the next server gets the request too.
    next_at: Instant,
    /// A server may have heard it and not have refused it.
    heard: bool,
    tally: Tally,
    /// Servers' words alone: f+1 that give the same reason include a correct one.
    refusals: Refusals<ProblemKind>,
    /// The same with all their words.
    details: Refusals<(ProblemKind, String)>,
}

impl<'a> Submission<'a> {
    fn new(client: &'a Client, request: &SignedRequest) -> Self {
        let thresholds = &client.inner.manifest.thresholds;
        Self {
            client,
            request: Arc::new(request.clone()),
            deadline: client.deadline(),
            order: client.preferred().into(),
            waiting: Vec::new(),
            asked: Vec::new(),
            answers: JoinSet::new(),
            next_at: Instant::now(),
            heard: false,
            tally: Tally::default(),
            refusals: Refusals::new(thresholds),
            details: Refusals::new(thresholds),
        }
    }

    async fn run(mut self) -> Result<Written, ClientError> {
        loop {
            let now = Instant::now();
            if now >= self.end() {
                break;
            }
            if now >= self.next_at
                && let Some(server) = self.next_server(now)
            {
                self.ask(server, now);
            }
            if self.answers.is_empty() && self.order.is_empty() && self.waiting.is_empty() {
                break;
            }
            let wake_at = self.wake_at();
            tokio::select! {
                Some(done) = self.answers.join_next() => {
                    if let Ok((server, answer)) = done
                        && let Some(end) = self.take(server, answer)
                    {
                        return match end {
                            End::Executed(executed) => self.client.written(&self.request, *executed),
                            End::Refused(said) => Err(self.refused(said).await),
                        };
                    }
                }
                () = sleep_until(wake_at) => {}
            }
        }
        Err(self.in_vain().await)
    }

    /// When to stop: some time is left to find out whose clock is wrong, where that may be it.
    fn end(&self) -> Instant {
        let odd = self.refusals.said().values().any(|reason| *reason == ProblemKind::Expiry);
        self.client.end(self.deadline, odd || self.tally.odd_times)
    }
    /// Whose turn it is: who was not asked yet, or asked to wait until now.
    fn next_server(&mut self, now: Instant) -> Option<ServerId> {
        if let Some(server) = self.order.pop_front() {
            return Some(server);
        }
        let place = self.waiting.iter().position(|(when, _)| *when <= now)?;
        Some(self.waiting.swap_remove(place).1)
    }
    fn wake_at(&self) -> Instant {
        let next = match self.order.is_empty() {
            true => self.waiting.iter().map(|(when, _)| *when).min().map(|when| when.max(self.next_at)),
            false => Some(self.next_at),
        };
        let end = self.end();
        next.unwrap_or(end).min(end)
    }
    fn ask(&mut self, server: ServerId, now: Instant) {
        // Another one is asked since these take long: reads ask them last, too, for a while.
        let patience = self.client.inner.pace.patience_with_writes();
        for asked in self.asked.iter_mut().filter(|asked| !asked.late && now - asked.since >= patience) {
            asked.late = true;
            self.client.inner.pace.avoid(asked.server);
        }
        self.next_at = now + patience;
        self.asked.push(Asked { server, since: now, late: false });
        let (link, request) = (self.client.inner.links[server.index()].clone(), Arc::clone(&self.request));
        let until = self.deadline;
        self.answers.spawn(async move { (server, link.post("/v1/requests", &*request, until).await) });
    }
    /// What a server's answer leads to: the end, or another server.
    fn take(&mut self, server: ServerId, answer: Result<Receipt, LinkError>) -> Option<End> {
        let now = Instant::now();
        if let Some(place) = self.asked.iter().position(|asked| asked.server == server) {
            let asked = self.asked.swap_remove(place);
            if answer.is_ok() {
                self.client.inner.pace.ordered(now - asked.since);
            }
        }
        self.next_at = now;
        let receipt = match answer {
            Ok(receipt) => receipt,
            Err(LinkError::Problem(problem)) if problem.receipt.is_some() => *problem.receipt?,
            Err(error) => {
                if let LinkError::Problem(problem) = &error
                    && let Some(reason) = refusal(problem)
                {
                    self.tally.waits_no_more(server);
                    self.details.add(server, (reason, words(&problem.detail)));
                    let said = self.refusals.add(server, reason)?;
                    return self.is_final(&said).then_some(End::Refused(said));
                }
                self.heard |= !matches!(error, LinkError::Unreached(_));
                if let LinkError::AsksToWait { wait, .. } = &error {
                    self.waiting.push((now + *wait, server));
                }
                self.tally.failed(server, &error);
                return None;
            }
        };
        let executed = self.client.with_verifier(|verifier| {
            let request = &self.request.request;
            let id = RequestId { client: request.client, sequence: request.sequence };
            let executed = verifier.executed(receipt, id)?;
            executed.there().ok_or(AnswerError::OtherQuestion)
        });
        match executed {
            Ok(executed) => return Some(End::Executed(Box::new(executed))),
            Err(error) => {
                self.heard = true;
                self.tally.wrong(server, &error);
            }
        }
        None
    }

    /// Whether nothing is to be expected of the others. What a request is refused for in one state may be allowed in
    /// the next, and a liar who refuses it may have passed it on: there q servers have to refuse it, without whose
    /// correct ones nothing is ordered.
    fn is_final(&self, said: &SaidAlike<ProblemKind>) -> bool {
        let by_state = matches!(said.reason(), ProblemKind::NotAllowed | ProblemKind::NotFound);
        !by_state || said.servers().len() >= self.client.inner.manifest.thresholds.q()
    }

    /// f+1 servers refused it before ordering, for the same reason: perhaps because of this machine's clock.
    async fn refused(&self, said: SaidAlike<ProblemKind>) -> ClientError {
        let reason = *said.reason();
        if let (ProblemKind::NotFound, Operation::Guess { secret, .. }) =
            (reason, &self.request.request.operation)
            && let Ok(Shown::Absent(absence)) = self.client.shown_secret(secret).await
        {
            // What they say can be proved.
            return absence.into();
        }
        let clock = match reason {
            ProblemKind::Expiry => timeout_at(self.deadline, self.client.odd_clock()).await.ok().flatten(),
            _ => None,
        };
        let refused = clock.unwrap_or_else(|| {
            let detail = self.details.alike(|(kind, _)| *kind == reason).map(|(_, words)| words.clone());
            ClientError::RefusedByServers { said: Box::new(said), detail }
        });
        // That it is too late now does not say that it did not execute before.
        match (self.heard || !self.asked.is_empty()) && reason == ProblemKind::Expiry {
            true => self.unknown(refused),
            false => refused,
        }
    }
    async fn in_vain(mut self) -> ClientError {
        let said: Vec<_> = self.refusals.said().iter().map(|(server, reason)| (*server, *reason)).collect();
        let mut said = said.into_iter();
        if let Some(said) = said.find_map(|(server, reason)| self.refusals.add(server, reason)) {
            let refused = self.refused(said).await;
            return self.unknown(refused);
        }
        let heard = self.heard || !self.asked.is_empty() || !self.refusals.said().is_empty();
        let mut tally = std::mem::take(&mut self.tally);
        tally.odd_times |= self.refusals.said().values().any(|reason| *reason == ProblemKind::Expiry);
        for asked in &self.asked {
            tally.failed(asked.server, &LinkError::late(asked.since.elapsed()));
        }
        let refusals = self.details.said().iter().map(|(server, (reason, words))| Misbehaviour {
            server: *server,
            why: format!("it refuses: {}: {words}", reason.title()),
        });
        let refusals: Vec<_> = refusals.collect();
        let why = if !refusals.is_empty() && tally.silent.is_empty() && tally.waits.is_empty() {
            ClientError::Disagree { said: [refusals, tally.rejected].concat() }
        } else {
            tally
                .silent
                .extend(refusals.into_iter().map(|said| Silence { server: said.server, why: said.why }));
            self.client.failure("one server with a receipt", tally).await
        };
        if heard { self.unknown(why) } else { why }
    }
    fn unknown(&self, why: ClientError) -> ClientError {
        let request = Box::new((*self.request).clone());
        let ticket = Box::new(Ticket::of(&self.client.inner.manifest.cluster_id(), &request));
        ClientError::OutcomeUnknown { request, ticket, why: Box::new(why) }
    }
}

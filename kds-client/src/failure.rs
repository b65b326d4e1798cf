//! Why an operation failed: what each server did, and whether it is this machine's clock that is wrong.

use crate::api::{Problem, ProblemKind, ServerStatus};
use crate::client::Client;
use crate::deadline::millis;
use crate::error::{ClientError, LinkError, Misbehaviour, Silence};
use quorum::answer::AnswerError;
use quorum::ids::ServerId;
use quorum::limits::CLOCK_BOUND_MS;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long servers may take to tell the time.
const TELL_TIME: Duration = Duration::from_secs(1);
/// A clock that is further off than this is odd, however old answers may be.
const ODD: Duration = Duration::from_secs(60);

/// What came of asking servers.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) answered: Vec<ServerId>,
    pub(crate) silent: Vec<Silence>,
    pub(crate) rejected: Vec<Misbehaviour>,
    /// Whether anything looks as if this machine's clock were wrong.
    pub(crate) odd_times: bool,
}

impl Tally {
    /// No answer, or none that a correct server gives. A refusal that proves nothing is as good as silence.
    pub(crate) fn failed(&mut self, server: ServerId, error: &LinkError) {
        let why = error.to_string();
        match error {
            LinkError::Nonsense(_) => self.rejected.push(Misbehaviour { server, why }),
            LinkError::Problem(problem) => {
                self.odd_times |= is_about_time(problem);
                self.silent.push(Silence { server, why });
            }
            LinkError::Silent(_) => self.silent.push(Silence { server, why }),
        }
    }
    /// An answer that does not hold.
    pub(crate) fn wrong(&mut self, server: ServerId, error: &AnswerError) {
        self.odd_times |= matches!(error, AnswerError::TooOld { .. } | AnswerError::FromTheFuture { .. });
        self.rejected.push(Misbehaviour { server, why: error.to_string() });
    }
}

/// Whether a server says that a request's expiry is not within its time.
pub(crate) fn is_about_time(problem: &Problem) -> bool {
    ProblemKind::from_uri(&problem.kind) == Some(ProblemKind::Expiry)
}

impl Client {
    /// Nothing came of it: because of this machine's clock, because answers were bad, or because there
    /// were too few.
    pub(crate) async fn failure(&self, needed: &str, tally: Tally) -> ClientError {
        let Tally { answered, silent, rejected, odd_times } = tally;
        if (odd_times || (!silent.is_empty() && self.certificates_seem_over()))
            && let Some(clock) = self.odd_clock().await
        {
            return clock;
        }
        if !rejected.is_empty() && silent.is_empty() && answered.is_empty() {
            return ClientError::Unverified { rejected };
        }
        ClientError::Unavailable { needed: needed.to_owned(), answered, silent, rejected }
    }

    /// Whether any server's certificate has ended by this machine's clock, so that there is no connection.
    fn certificates_seem_over(&self) -> bool {
        let (membership, now) = (self.membership(), crate::now().0 / 1_000);
        self.inner.manifest.grid().servers().filter_map(|server| membership.place(server)).any(|place| {
            kds_certs::not_after(&place.certificate).is_ok_and(|end| u64::try_from(end).unwrap_or(0) < now)
        })
    }

    /// Whether it is this machine's clock that makes answers seem too old or too young: f+1 servers,
    /// and so a correct one, tell another time. They are asked even if their certificates seem to have
    /// ended: they are pinned, and it may be the clock that says so.
    pub(crate) async fn odd_clock(&self) -> Option<ClientError> {
        // Less is nothing that a reader notices, and more is odd whatever he accepts.
        let tolerated = millis(self.inner.options.max_age.min(ODD)).max(2 * CLOCK_BOUND_MS);
        let mut tasks = JoinSet::new();
        for server in self.inner.manifest.grid().servers() {
            let wire = self.wire_at_any_date(server);
            tasks.spawn(async move {
                let wire = wire?;
                let asked = wire.ask::<ServerStatus>("/v1/status");
                let status = tokio::time::timeout(TELL_TIME, asked).await.ok()?.ok()?;
                let (here, there) = (crate::now(), status.time?);
                Some((here.since_ms(there), there.since_ms(here)))
            });
        }
        let (mut ahead, mut behind) = (Vec::new(), Vec::new());
        while let Some(told) = tasks.join_next().await {
            if let Ok(Some((by, too_little))) = told {
                ahead.extend((by > tolerated).then_some(by));
                behind.extend((too_little > tolerated).then_some(too_little));
            }
        }
        let needed = self.inner.manifest.thresholds.f() + 1;
        for (mut off, sign) in [(ahead, 1), (behind, -1)] {
            if off.len() >= needed {
                off.sort_unstable();
                let off_ms = i64::try_from(off[off.len() / 2]).unwrap_or(i64::MAX);
                return Some(ClientError::Clock { off_ms: sign * off_ms, servers: off.len() });
            }
        }
        None
    }
}

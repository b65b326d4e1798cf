//! Why an operation failed: what each server did, and whether it is this machine's clock that is wrong.

use crate::api::{Problem, ProblemKind, ServerStatus};
use crate::client::Client;
use crate::deadline::millis;
use crate::error::{AsksToWait, ClientError, LinkError, Misbehaviour, Silence};
use quorum::answer::AnswerError;
use quorum::ids::ServerId;
use quorum::limits::CLOCK_BOUND_MS;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long servers may take to tell the time.
const TELL_TIME: Duration = Duration::from_secs(1);
/// A clock that is further off than this is odd, however old answers may be.
const ODD: Duration = Duration::from_secs(60);

/// What came of asking servers.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) answered: Vec<ServerId>,
    pub(crate) silent: Vec<Silence>,
    pub(crate) waits: Vec<AsksToWait>,
    pub(crate) rejected: Vec<Misbehaviour>,
    /// Whether anything looks as if this machine's clock were wrong.
    pub(crate) odd_times: bool,
}

impl Tally {
    /// It asks to wait no more: it said something else.
    pub(crate) fn waits_no_more(&mut self, server: ServerId) {
        self.waits.retain(|waits| waits.server != server);
    }
    /// No answer, or none that a correct server gives. A refusal that proves nothing is as good as silence.
    pub(crate) fn failed(&mut self, server: ServerId, error: &LinkError) {
        self.waits_no_more(server);
        let why = error.to_string();
        match error {
            LinkError::Nonsense(_) => self.rejected.push(Misbehaviour { server, why }),
            LinkError::Problem(problem) => {
                self.odd_times |= is_about_time(problem);
                self.silent.push(Silence { server, why });
            }
            LinkError::Silent(_) | LinkError::Unreached(_) => self.silent.push(Silence { server, why }),
            LinkError::AsksToWait { why, .. } => self.waits.push(AsksToWait { server, why: why.clone() }),
        }
    }
    /// An answer that does not hold.
    pub(crate) fn wrong(&mut self, server: ServerId, error: &AnswerError) {
        self.waits_no_more(server);
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
        let Tally { answered, silent, waits, rejected, odd_times } = &tally;
        if (*odd_times || (!silent.is_empty() && self.certificates_seem_over()))
            && let Some(clock) = self.odd_clock().await
        {
            return clock;
        }
        if !rejected.is_empty() && silent.is_empty() && waits.is_empty() && answered.is_empty() {
            return ClientError::Unverified { rejected: tally.rejected };
        }
        self.too_few(needed.to_owned(), tally)
    }
    /// There were too few good answers. Servers that asked to wait are no silent ones.
    pub(crate) fn too_few(&self, needed: String, tally: Tally) -> ClientError {
        let Tally { answered, silent, mut waits, rejected, .. } = tally;
        let mut others = Vec::new();
        for silence in silent {
            // Some other call may have been told so while this one waited.
            match self.inner.pace.waits(silence.server) {
                Some(why) => waits.push(AsksToWait { server: silence.server, why }),
                None => others.push(silence),
            }
        }
        ClientError::Unavailable { needed, answered, silent: others, waits, rejected }
    }

    /// Whether any server's certificate has ended by this machine's clock, so that there is no connection.
    fn certificates_seem_over(&self) -> bool {
        let (membership, now) = (self.membership(), crate::now().0 / 1_000);
        self.inner.manifest.grid().servers().filter_map(|server| membership.place(server)).any(|place| {
            kds_certs::not_after(&place.certificate).is_ok_and(|end| u64::try_from(end).unwrap_or(0) < now)
        })
    }

    /// How much of an operation's time is for finding out whose clock is wrong, where that may be it.
    pub(crate) fn time_for_times(&self) -> Duration {
        TELL_TIME.min(self.timeout() / 4)
    }

    /// When an operation that has to be done by a deadline stops asking; sooner where times look odd.
    pub(crate) fn end(&self, deadline: Instant, odd_times: bool) -> Instant {
        match odd_times {
            true => deadline.checked_sub(self.time_for_times()).unwrap_or(deadline),
            false => deadline,
        }
    }

    /// Whether it is this machine's clock that makes answers seem too old or too young: f+1 servers,
    /// and so a correct one, tell another time. They are asked even if their certificates seem to have
    /// ended: they are pinned, and it may be the clock that says so.
    pub(crate) async fn odd_clock(&self) -> Option<ClientError> {
        // Less is nothing that a reader notices, and more is odd whatever he accepts.
        let tolerated = millis(self.inner.options.max_age.min(ODD)).max(2 * CLOCK_BOUND_MS);
        let mut tasks = JoinSet::new();
        let patience = self.time_for_times();
        for server in self.inner.manifest.grid().servers() {
            let wire = self.wire_at_any_date(server);
            tasks.spawn(async move {
                let wire = wire?;
                let asked = wire.ask::<ServerStatus>("/v1/status");
                let status = tokio::time::timeout(patience, asked).await.ok()?.ok()?;
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

//! `POST /v1/requests`: a signed request in, its receipt out.

use super::problem::ApiError;
use super::{App, AppState, Body, json};
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::response::Response;
use kds_client::api::ProblemKind;
use kds_client::keys;
use quorum::PublicKey;
use quorum::answer::{Proved, Receipt};
use quorum::ids::Timestamp;
use quorum::limits::MAX_CLIENT_ENTRIES;
use quorum::ordering::{Input, Published};
use quorum::request::{Operation, Outcome, Refusal, Reply, Request, RequestId, SignedRequest};
use quorum::state::{NotAdmitted, admit, layout};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{Instant, timeout, timeout_at};

/// How long a request may take to be ordered and certified before its client is told to try
/// elsewhere. It may still execute: the client's retry gets the stored reply.
const ORDERING_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a request of an unknown key waits for the key to become known.
const ADMISSION_TIMEOUT: Duration = Duration::from_millis(150);
/// For how long nothing is ordered before that is what clients are told: idle primaries order an empty batch a second.
const STANDS_STILL_MS: u64 = 6_000;
/// How long a receipt waits to be complete.
const COMPLETION_TIMEOUT: Duration = Duration::from_millis(400);

pub(super) async fn submit(
    State(app): AppState,
    Body(signed): Body<SignedRequest>,
) -> Result<Response, ApiError> {
    let cluster = app.shared.cluster;
    let request = signed.verify(&cluster).map_err(|_| {
        ApiError::new(
            ProblemKind::BadSignature,
            "the signature does not verify for this cluster: is the manifest the right one?",
        )
    })?;
    check_keys(request.request())?;
    let id = request.id();
    admitted(&app, request.request(), id).await?;
    let mut waiting = app.shared.waiters.wait(id);
    if let Err(refused) = app.inputs.try_send(Input::Request(request)) {
        if matches!(refused, TrySendError::Closed(_)) {
            return Err(ApiError::new(
                ProblemKind::NotReady,
                "this server has stopped ordering: try another one",
            ));
        }
        return Err(ApiError::new(
            ProblemKind::TooMany,
            "this server has too much to do: try again, or another one",
        ));
    }
    let outcome = timeout(ORDERING_TIMEOUT, waiting.outcome()).await;
    match outcome {
        Ok(Some(Ok(()))) => respond(receipt(&app, id).await?),
        Ok(Some(Err(why))) => Err(ApiError::new(ProblemKind::TooMany, why.to_string())),
        Ok(None) => Err(ApiError::new(ProblemKind::NotReady, "this server is stopping: try another one")),
        Err(_) => {
            let why = stands_still(app.published()?.certificate.statement.time).unwrap_or_else(|| {
                format!(
                    "not ordered in time; at most {MAX_CLIENT_ENTRIES} requests of one key are remembered at once"
                )
            });
            Err(ApiError::new(ProblemKind::NotReady, why))
        }
    }
}

/// Refuses what could not execute. A key that became known a moment ago may not be here yet, so an
/// unknown one gets a little time.
async fn admitted(app: &App, request: &Request, id: RequestId) -> Result<(), ApiError> {
    let mut watching = app.shared.published.subscribe();
    let deadline = Instant::now() + ADMISSION_TIMEOUT;
    loop {
        watching.mark_unchanged();
        let published = app.published()?;
        if layout::reply(&published.snapshot, id).is_some() {
            return Ok(());
        }
        let now = published.certificate.statement.time;
        match admit(&published.snapshot, &app.shared.membership.load(), now, request) {
            Ok(()) => return Ok(()),
            Err(NotAdmitted::UnknownKey)
                if matches!(timeout_at(deadline, watching.changed()).await, Ok(Ok(()))) => {}
            Err(why) => return Err(not_admitted(why)),
        }
    }
}

/// The certified reply, with the statements that make it complete if they come in time.
async fn receipt(app: &App, id: RequestId) -> Result<(Receipt, Reply), ApiError> {
    let gone =
        || ApiError::new(ProblemKind::NotReady, "the reply is no longer kept: its request has expired");
    let mut watching = app.shared.published.subscribe();
    let deadline = Instant::now() + COMPLETION_TIMEOUT;
    loop {
        let published = watching.borrow_and_update().clone();
        let published = published.ok_or_else(gone)?;
        let reply = layout::reply(&published.snapshot, id).ok_or_else(gone)?;
        let complete = published.completion.as_ref().is_some_and(|known| known.sequence >= reply.sequence);
        if complete || !matches!(timeout_at(deadline, watching.changed()).await, Ok(Ok(()))) {
            return Ok((make(&published, id, complete), reply));
        }
    }
}

/// What came of a request: its certified reply, or that the state has none.
pub(super) async fn outcome(State(app): AppState, NumberPath(id): NumberPath) -> Result<Response, ApiError> {
    let published = app.published()?;
    let executed = layout::reply(&published.snapshot, id).map(|reply| reply.sequence);
    let known = published.completion.as_ref().map(|completion| completion.sequence);
    Ok(json(&make(
        &published,
        id,
        executed.is_some_and(|executed| known.is_some_and(|known| known >= executed)),
    )))
}

/// A request's client, as hexadecimal, and its number, in the path.
pub(super) struct NumberPath(RequestId);

impl FromRequestParts<App> for NumberPath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &App) -> Result<Self, ApiError> {
        let path = Path::<(String, u64)>::from_request_parts(parts, state).await;
        let (client, sequence) =
            path.map_err(|error| ApiError::new(ProblemKind::Malformed, error.body_text()))?.0;
        Ok(Self(RequestId { client: key_of_hex(&client)?, sequence }))
    }
}

/// A key in a path.
pub(super) fn key_of_hex(text: &str) -> Result<PublicKey, ApiError> {
    parse_hex(text).ok_or_else(|| {
        ApiError::new(ProblemKind::Malformed, "a key is 64 hexadecimal digits in lower case here")
    })
}

fn parse_hex(text: &str) -> Option<PublicKey> {
    let digit = |byte: &u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let digits = text.as_bytes().iter().map(digit).collect::<Option<Vec<u8>>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
    bytes.try_into().ok().filter(|_| rest.is_empty()).map(PublicKey)
}

fn make(published: &Arc<Published>, id: RequestId, complete: bool) -> Receipt {
    Receipt {
        reply: Proved::look_up(&published.snapshot, &layout::reply_key(id)),
        certificate: Arc::clone(&published.certificate),
        completion: published.completion.clone().filter(|_| complete),
    }
}

fn respond((receipt, reply): (Receipt, Reply)) -> Result<Response, ApiError> {
    let refusal = match reply.outcome {
        Outcome::Done(_) => return Ok(json(&receipt)),
        Outcome::Refused(refusal) => refusal,
    };
    let kind = match refusal {
        Refusal::NameTaken { .. }
        | Refusal::VersionConflict { .. }
        | Refusal::SecretTaken { .. }
        | Refusal::AlreadySo
        | Refusal::Revoked => ProblemKind::Conflict,
        Refusal::NoPassphrase | Refusal::OnlyByPassphrase | Refusal::NoGuessesLeft => ProblemKind::NotAllowed,
        Refusal::EpochPassed { .. } => ProblemKind::EpochPassed,
        Refusal::NoSuchName | Refusal::NoSuchSecret => ProblemKind::NotFound,
        Refusal::NotAllowed | Refusal::OwnsNoName | Refusal::GiftRefused => ProblemKind::NotAllowed,
        Refusal::OverQuota { .. } => ProblemKind::OverQuota,
        Refusal::NoSpace { .. } => ProblemKind::NoSpace,
        Refusal::Invalid(_) => ProblemKind::Invalid,
        Refusal::TooOften => ProblemKind::TooMany,
    };
    Err(ApiError::new(kind, refusal.to_string()).with_receipt(receipt))
}

/// That the cluster makes no progress, since when and why, if it has made none for long.
fn stands_still(agreed: Timestamp) -> Option<String> {
    let seconds = crate::driver::now().since_ms(agreed) / 1_000;
    (seconds * 1_000 > STANDS_STILL_MS).then(|| {
        format!(
            "the cluster has ordered nothing since {agreed}, {seconds} s ago, as far as this server knows: fewer than \
             q servers take part or reach each other (`kds-client status`)"
        )
    })
}

fn not_admitted(why: NotAdmitted) -> ApiError {
    // A client's clock may be right, and the cluster's have stopped.
    if let NotAdmitted::ExpiryTooFar { now, .. } = why
        && let Some(why) = stands_still(now)
    {
        return ApiError::new(ProblemKind::NotReady, why);
    }
    let kind = match why {
        NotAdmitted::Expired { .. } | NotAdmitted::ExpiryTooFar { .. } => ProblemKind::Expiry,
        NotAdmitted::Guess(Refusal::NoSuchSecret) => ProblemKind::NotFound,
        NotAdmitted::UnknownKey | NotAdmitted::Guess(_) => ProblemKind::NotAllowed,
    };
    ApiError::new(kind, why.to_string())
}

/// Full parsing of keys, which the state machine leaves to the edges.
fn check_keys(request: &Request) -> Result<(), ApiError> {
    let (Operation::Register { entry, .. } | Operation::Rotate { entry, .. }) = &request.operation else {
        return Ok(());
    };
    let check =
        |key| keys::check(key).map_err(|error| ApiError::new(ProblemKind::Invalid, error.to_string()));
    // An unknown algorithm is refused in order, with a receipt.
    let known = |algorithm: &str| quorum::record::ALGORITHMS.iter().any(|(name, ..)| *name == algorithm);
    entry.keys.iter().filter(|key| known(&key.algorithm)).try_for_each(check)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse as _;

    /// A client's clock is right, and nothing is ordered for a minute: that is no mistake of hers.
    #[test]
    fn who_asks_a_cluster_that_stands_still_is_told_that() {
        let now = crate::driver::now();
        let refused = |agreed_ms_ago: u64| {
            let agreed = Timestamp(now.0 - agreed_ms_ago);
            let far = NotAdmitted::ExpiryTooFar { expiry: now.plus_ms(30_000), now: agreed };
            not_admitted(far).into_response().status().as_u16()
        };
        assert_eq!(refused(1_000), ProblemKind::Expiry.status());
        assert_eq!(refused(40_000), ProblemKind::NotReady.status());
        assert!(stands_still(Timestamp(now.0 - 40_000)).unwrap().contains("has ordered nothing since"));
    }
}

//! `POST /v1/requests`: a signed request in, its receipt out.

use super::problem::ApiError;
use super::{App, AppState, Body, json};
use axum::extract::State;
use axum::response::Response;
use kds_client::api::ProblemKind;
use kds_client::keys;
use quorum::answer::{Proved, Receipt};
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
    let waiter = app.shared.waiters.wait(id);
    if let Err(refused) = app.inputs.try_send(Input::Request(request)) {
        app.shared.waiters.forget(id);
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
    let outcome = timeout(ORDERING_TIMEOUT, waiter).await;
    app.shared.waiters.forget(id);
    match outcome {
        Ok(Ok(Ok(()))) => respond(receipt(&app, id).await?),
        Ok(Ok(Err(why))) => Err(ApiError::new(ProblemKind::TooMany, why.to_string())),
        Ok(Err(_)) => Err(ApiError::new(ProblemKind::NotReady, "this server is stopping: try another one")),
        Err(_) => Err(ApiError::new(
            ProblemKind::NotReady,
            format!(
                "not ordered in time; at most {MAX_CLIENT_ENTRIES} requests of one key are remembered at once"
            ),
        )),
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
        Refusal::NotAllowed => ProblemKind::NotAllowed,
        Refusal::Invalid(_) => ProblemKind::Invalid,
        Refusal::TooOften => ProblemKind::TooMany,
    };
    Err(ApiError::new(kind, refusal.to_string()).with_receipt(receipt))
}

fn not_admitted(why: NotAdmitted) -> ApiError {
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

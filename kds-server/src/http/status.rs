//! For operators: how this server is doing. Nothing here is proved.

use super::problem::ApiError;
use super::{AppState, Params, json, space};
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use kds_client::api::{MembershipAnswer, ProblemKind, ServerStatus, TransferStatus, TroubleKind};
use quorum::ids::Timestamp;
use quorum::limits::CHANGES_TOGETHER;
use quorum::ordering::Part;
use quorum::state::layout;
use serde::Deserialize;
use std::sync::atomic::Ordering;

/// A certificate older than this is not being renewed: the cluster makes no progress.
const STALE_MS: u64 = 5_000;

pub(super) async fn manifest(State(app): AppState) -> Response {
    json(app.shared.manifest.as_ref())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct From {
    from: Option<u32>,
}

/// Changes of the membership, each with what shows it.
pub(super) async fn membership(State(app): AppState, Params(asked): Params<From>) -> Response {
    let membership = app.shared.membership.load();
    let changes = membership.proofs().iter().skip(asked.from.unwrap_or(0) as usize).take(CHANGES_TOGETHER);
    json(&MembershipAnswer { changes: changes.cloned().collect() })
}

pub(super) async fn status(State(app): AppState) -> Result<Response, ApiError> {
    let shared = &app.shared;
    let replica = **shared.replica_status.load();
    let counts = shared.shares.counts();
    // Shares of an epoch that is over are none.
    let shares = if shared.shares.epoch() == replica.epoch { counts.shares } else { 0 };
    let published = shared.published.borrow().clone();
    let epochs = published.as_ref().and_then(|published| layout::epochs(&published.snapshot));
    let grid = shared.manifest.grid();
    let space = published.as_deref().map(space::status);
    let complete = published.and_then(|published| published.completion.clone());
    Ok(json(&ServerStatus {
        id: shared.id,
        row: grid.row_of(shared.id) as u16,
        column: grid.column_of(shared.id) as u16,
        view: replica.view,
        sequence: replica.executed,
        certified: replica.certified,
        complete: complete.map_or_else(Default::default, |completion| completion.sequence),
        epoch: replica.epoch,
        last_refresh_seconds: epochs
            .filter(|epochs| epochs.since != Timestamp(0))
            .map(|epochs| crate::driver::now().since_ms(epochs.since) as f64 / 1_000.0),
        secrets: counts.secrets,
        shares,
        recovering: shared.part() != Part::Voting
            || replica.target > replica.certified
            || shares < counts.secrets,
        part: shared.part(),
        troubles: shared.health.troubles(),
        space,
        transfer: replica.transfer.map(|transfer| TransferStatus {
            target: transfer.target,
            entries: transfer.entries as u64,
            missing_parts: transfer.missing as u64,
        }),
        peers_connected: shared.peers_connected.load(Ordering::Relaxed) as u16,
        time: Some(crate::driver::now()),
        started: Some(shared.started),
        version: env!("CARGO_PKG_VERSION").into(),
    }))
}

fn why_it_does_not_vote(part: Part) -> &'static str {
    match part {
        Part::Voting => "it votes",
        Part::Estimating => "this server has just started and asks the others what it signed before",
        Part::Recovering => {
            "this server forgot what it signed (a lost disk or an old backup): it fetches the state, and votes again once nothing that it forgot matters"
        }
        Part::Stopped => "this server's disk takes no writes",
        Part::Repairing => "this server's state is not the certified one: it fetches what differs",
    }
}

/// What this server answers, for programs that write clients.
pub(super) const OPENAPI: &str = include_str!("openapi.json");

pub(super) async fn openapi() -> Response {
    ([("content-type", "application/json")], OPENAPI).into_response()
}

pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Ready: nothing is wrong, and the certified state is fresh.
pub(super) async fn readyz(State(app): AppState) -> Result<&'static str, ApiError> {
    if let Some(worst) = app.shared.health.troubles().first() {
        let seconds = crate::driver::now().since_ms(worst.since) / 1_000;
        let why = format!("{}, for {seconds} s", worst.kind.what());
        return Err(ApiError::new(ProblemKind::NotReady, why));
    }
    match app.shared.part() {
        Part::Voting => {}
        part => return Err(ApiError::new(ProblemKind::NotReady, why_it_does_not_vote(part))),
    }
    let age_ms = crate::driver::now().since_ms(app.published()?.certificate.statement.time);
    if age_ms > STALE_MS {
        let why = format!("the last certificate is {age_ms} ms old");
        return Err(ApiError::new(ProblemKind::NotReady, why));
    }
    Ok("ready\n")
}

pub(super) async fn metrics(State(app): AppState) -> Response {
    let replica = **app.shared.replica_status.load();
    metrics::gauge!("kds_view").set(replica.view.0 as f64);
    metrics::gauge!("kds_sequence_executed").set(replica.executed.0 as f64);
    metrics::gauge!("kds_sequence_certified").set(replica.certified.0 as f64);
    metrics::gauge!("kds_votes").set(f64::from(u8::from(app.shared.part() == Part::Voting)));
    for kind in [
        TroubleKind::Storage,
        TroubleKind::DiskFull,
        TroubleKind::Signer,
        TroubleKind::NotErased,
        TroubleKind::LostDatabase,
    ] {
        let troubles = app.shared.health.troubles();
        let since = troubles.iter().find(|trouble| trouble.kind == kind).map(|trouble| trouble.since);
        let seconds = since.map_or(0.0, |since| crate::driver::now().since_ms(since) as f64 / 1_000.0);
        metrics::gauge!("kds_trouble_seconds", "kind" => format!("{kind:?}")).set(seconds);
    }
    if let Some(space) = app.shared.published.borrow().as_deref().map(space::status) {
        metrics::gauge!("kds_space_used_bytes").set(space.used as f64);
        metrics::gauge!("kds_space_quota_bytes").set(space.quota as f64);
        let level = space.alarm.map_or(0, |alarm| alarm as u8 + 1);
        metrics::gauge!("kds_space_alarm").set(f64::from(level));
    }
    let missing = replica.transfer.map_or(0, |transfer| transfer.missing);
    metrics::gauge!("kds_transfer_missing_parts").set(missing as f64);
    metrics::gauge!("kds_epoch").set(replica.epoch.0 as f64);
    metrics::gauge!("kds_requests_waiting").set(replica.pending_requests as f64);
    metrics::gauge!("kds_log_entries").set(replica.log_entries as f64);
    metrics::gauge!("kds_log_bytes").set(replica.log_bytes as f64);
    metrics::gauge!("kds_peers_connected").set(app.shared.peers_connected.load(Ordering::Relaxed) as f64);
    app.guests.measure();
    match &app.metrics {
        Some(handle) => ([("content-type", "text/plain; version=0.0.4")], handle.render()).into_response(),
        None => ApiError::new(ProblemKind::NotReady, "another server of this process has the metrics")
            .into_response(),
    }
}

//! `GET /v1/records/{name}/watch`: the record now, and again after every change, as server-sent
//! events.

use super::problem::ApiError;
use super::{AppState, NamePath};
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use kds_client::api::{ProblemKind, WatchMessage};
use quorum::answer::RecordAnswer;
use quorum::ids::Sequence;
use quorum::state::layout;
use std::time::Duration;

/// Watches at a time: a third of all connections.
pub(super) const MAX_WATCHES: usize = 256;
/// How often a stream says that it is alive.
const BEAT: Duration = Duration::from_secs(2);

pub(super) async fn watch(State(app): AppState, NamePath(name): NamePath) -> Result<Response, ApiError> {
    let place = std::sync::Arc::clone(&app.watches).try_acquire_owned().map_err(|_| {
        ApiError::new(ProblemKind::TooMany, format!("{MAX_WATCHES} watches are open: try another server"))
    })?;
    app.published()?;
    let published = app.shared.published.subscribe();
    // Not known to the client, yet.
    let begin = (published, app.stop.clone(), None::<u64>, place);
    let events = stream::unfold(begin, move |(mut published, mut stop, mut told, place)| {
        let name = name.clone();
        async move {
            loop {
                let current = published.borrow_and_update().clone();
                if let Some(current) = current {
                    let version = layout::record(&current.snapshot, &name).map_or(0, |record| record.version);
                    if told != Some(version) {
                        told = Some(version);
                        let complete = current.completion.as_ref().map_or(Sequence(0), |c| c.sequence);
                        let (snapshot, certificate) = (&current.snapshot, &current.certificate);
                        let answer = RecordAnswer::look_up(snapshot, certificate, complete, &name, None);
                        let event = Event::default().json_data(WatchMessage { answer });
                        return Some((event, (published, stop, told, place)));
                    }
                }
                tokio::select! {
                    changed = published.changed() => changed.ok()?,
                    _ = stop.wait_for(|stop| *stop) => return None,
                }
            }
        }
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(BEAT)).into_response())
}

//! `GET /v1/records/{name}/watch`: the record now, and again after every change, as server-sent
//! events.

use super::guests::Caller;
use super::problem::ApiError;
use super::{AppState, NamePath};
use crate::places::Place;
use axum::Extension;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use kds_client::api::WatchMessage;
use quorum::answer::RecordAnswer;
use quorum::ids::Sequence;
use quorum::ordering::Published;
use quorum::record::Name;
use quorum::state::layout;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch as watch_channel;

/// How often a stream says that it is alive.
const BEAT: Duration = Duration::from_secs(2);

pub(super) async fn watch(
    State(app): AppState,
    Extension(caller): Extension<Caller>,
    NamePath(name): NamePath,
) -> Result<Response, ApiError> {
    let place = caller.watch()?;
    app.published()?;
    let (published, stop) = (app.shared.published.subscribe(), app.stop.clone());
    // Not known to the client, yet.
    let watched = Watched { caller, name, published, stop, told: None, unread: None, _place: place };
    let events = stream::unfold(watched, |mut watched| async move {
        let event = watched.next().await?;
        Some((Ok::<_, Infallible>(event), watched))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(BEAT)).into_response())
}

struct Watched {
    caller: Caller,
    name: Name,
    published: watch_channel::Receiver<Option<Arc<Published>>>,
    stop: watch_channel::Receiver<bool>,
    /// The version that was told last.
    told: Option<u64>,
    /// The place of the last event: who asks for the next has read it.
    unread: Option<Place<IpAddr>>,
    _place: Place<IpAddr>,
}

impl Watched {
    /// The next event; none at the end, which is also where somebody does not read.
    async fn next(&mut self) -> Option<Event> {
        self.unread = None;
        loop {
            let current = self.published.borrow_and_update().clone();
            if let Some(current) = current {
                let version =
                    layout::record(&current.snapshot, &self.name).map_or(0, |record| record.version);
                if self.told != Some(version) {
                    self.told = Some(version);
                    let complete = current.completion.as_ref().map_or(Sequence(0), |c| c.sequence);
                    let (snapshot, certificate) = (&current.snapshot, &current.certificate);
                    let answer = RecordAnswer::look_up(snapshot, certificate, complete, &self.name, None);
                    let json = serde_json::to_string(&WatchMessage { answer }).ok()?;
                    self.unread = self.caller.unread(json.len()).ok()?;
                    return Some(Event::default().data(json));
                }
            }
            tokio::select! {
                changed = self.published.changed() => changed.ok()?,
                _ = self.stop.wait_for(|stop| *stop) => return None,
            }
        }
    }
}

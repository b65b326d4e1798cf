//! What the state takes and may take: the certified count of it, and the alarm.

use super::problem::ApiError;
use super::requests::key_of_hex;
use super::{App, AppState, json};
use crate::seldom;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::response::Response;
use kds_client::api::{ProblemKind, SpaceStatus};
use quorum::PublicKey;
use quorum::answer::SpaceAnswer;
use quorum::ordering::Published;
use quorum::state::layout;

/// A key, as hexadecimal, in the path.
pub(super) struct KeyPath(PublicKey);

impl FromRequestParts<App> for KeyPath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &App) -> Result<Self, ApiError> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        let text = text.map_err(|error| ApiError::new(ProblemKind::Malformed, error.body_text()))?.0;
        Ok(Self(key_of_hex(&text)?))
    }
}

pub(super) async fn space(State(app): AppState, KeyPath(key): KeyPath) -> Result<Response, ApiError> {
    let published = app.published()?;
    Ok(json(&SpaceAnswer::look_up(&published.snapshot, &published.certificate, &key)))
}

/// What a state takes and may take.
pub(crate) fn status(published: &Published) -> SpaceStatus {
    let space = layout::space(&published.snapshot);
    SpaceStatus { used: space.used, quota: space.total, each: space.each, alarm: space.alarm() }
}

/// Says so in the log, once a minute, while there is little space.
pub fn warn(published: &Published) {
    if let Some(warning) = status(published).warning()
        && let Some(unsaid) = seldom::now("space", None)
    {
        tracing::warn!(unsaid, "{warning}");
    }
}

//! Secrets' metadata, and this server's share for a reader whose release is on record.

use super::problem::ApiError;
use super::records::ListParams;
use super::{App, AppState, Body, NamePath, Params, json};
use axum::extract::State;
use axum::response::Response;
use kds_client::api::ProblemKind;
use quorum::answer::{Proved, SecretAnswer, ShareAnswer, ShareQuestion};
use quorum::oprf;
use quorum::sealing::HandOutContext;
use quorum::state::{Release, Releases, Secret, layout};
use quorum::{Blob, SecretBytes};
use std::sync::Arc;

pub(super) async fn list(
    State(app): AppState,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    Ok(json(&params.page(&*app.published()?, layout::SECRETS)))
}

pub(super) async fn metadata(State(app): AppState, NamePath(name): NamePath) -> Result<Response, ApiError> {
    let published = app.published()?;
    let secret = Proved::<Secret>::look_up(&published.snapshot, &layout::secret_key(&name));
    let releases = secret
        .value
        .as_ref()
        .map(|secret| Proved::<Releases>::look_up(&published.snapshot, &layout::releases_key(secret.index)));
    Ok(json(&SecretAnswer { secret, releases, certificate: Arc::clone(&published.certificate) }))
}

/// The release is what authorises: it was ordered, names the reader, and fixes the key that the
/// share is sealed to. So whoever asks gets nothing that only that reader can open (design §6).
pub(super) async fn share(
    State(app): AppState,
    Body(question): Body<ShareQuestion>,
) -> Result<Response, ApiError> {
    let published = app.published()?;
    let not_yet = || {
        ApiError::new(
            ProblemKind::NotFound,
            "this server knows of no such release: it may be behind, or the release too old",
        )
    };
    let secret = layout::secret(&published.snapshot, &question.secret).ok_or_else(not_yet)?;
    let releases = layout::releases(&published.snapshot, secret.index).ok_or_else(not_yet)?;
    let release = releases.last.into_iter().find(|release| release.release == question.release);
    let release = release.ok_or_else(not_yet)?;
    let passed = || {
        let why = "the release was for an epoch that has passed: ask again";
        ApiError::new(ProblemKind::EpochPassed, why)
    };
    if release.epoch != published.certificate.statement.epoch {
        return Err(passed());
    }
    // Checked again at hand-out: she may have been removed since.
    let allowed = match release.blinded {
        None => secret.may_be_read_by(&published.snapshot, &release.to.client),
        Some(_) => secret.may_be_guessed_by(&published.snapshot, &release.to.client),
    };
    if !allowed {
        return Err(ApiError::new(ProblemKind::NotAllowed, "this key is no longer a reader of the secret"));
    }
    if app.shared.shares.epoch() < release.epoch {
        // Its shares of the epoch that has just begun are not in place yet.
        return Err(not_yet());
    }
    let context = HandOutContext {
        epoch: release.epoch,
        server: app.shared.id,
        index: secret.index,
        release: release.release,
    };
    let share = app.shared.shares.share(secret.index, release.epoch);
    if share.is_none() && app.shared.shares.epoch() > release.epoch {
        // The next epoch has begun, and its first certificate is on its way.
        return Err(passed());
    }
    let sealed = share
        .map(|share| seal(&app, &context, &secret, &release, &share))
        .transpose()
        .map_err(|why| ApiError::new(ProblemKind::Invalid, why))?;
    let ciphertext = match question.with_ciphertext {
        true => layout::ciphertext(&published.snapshot, secret.index),
        false => None,
    };
    let server = app.shared.id;
    Ok(json(&ShareAnswer { server, release, index: secret.index, share: sealed, ciphertext }))
}

/// What a server gives for a release: its share; or, of a secret behind a passphrase, what its share makes of
/// the element that was ordered. Such a share never leaves.
fn seal(
    app: &App,
    context: &HandOutContext,
    secret: &Secret,
    release: &Release,
    share: &SecretBytes,
) -> Result<Blob, String> {
    let (cluster, to, mut rng) = (&app.shared.cluster, &release.ephemeral, kds_client::random::system());
    let sealed = match (&secret.passphrase, &release.blinded) {
        (None, None) => context.seal(cluster, to, share.expose(), &mut rng),
        (Some(_), Some(blinded)) => {
            let result = oprf::evaluate(share.expose(), blinded, &mut rng).map_err(|e| e.to_string())?;
            context.seal_evaluation(cluster, to, &result, &mut rng)
        }
        _ => return Err("the release is of another kind than the secret".into()),
    };
    sealed.map_err(|error| error.to_string())
}

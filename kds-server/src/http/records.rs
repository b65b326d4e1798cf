//! Reads of records: straight from the certified snapshot, without the replica.

use super::guests::Caller;
use super::problem::ApiError;
use super::rate::NAMES_PER_REQUEST;
use super::{App, AppState, Body, NamePath, Params, json};
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use kds_client::api::{BriefAnswer, BulkQuestion, HistoryAnswer, KnownState, ProblemKind};
use metrics::Counter;
use quorum::answer::{ADMINISTRATORS_PAGE, DECISIONS_PAGE, PageAnswer, RecordAnswer, SERVERS_PAGE};
use quorum::ids::Sequence;
use quorum::limits::{MAX_LOOKUP_NAMES, MAX_PAGE, MAX_PAGE_BYTES};
use quorum::map::Page;
use quorum::ordering::Published;
use quorum::record::Name;
use quorum::state::layout;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::sync::{Arc, OnceLock};

fn complete(published: &Published) -> Sequence {
    published.completion.as_ref().map_or(Sequence(0), |completion| completion.sequence)
}

/// A [`RecordAnswer`] whose parts are JSON already.
#[derive(Serialize)]
struct EncodedAnswer<'a> {
    current: &'a RawValue,
    earlier: Option<&'a RawValue>,
    certificate: &'a RawValue,
    complete: Sequence,
}

/// A [`kds_client::api::BulkAnswer`] whose parts are JSON already.
#[derive(Serialize)]
struct EncodedBulkAnswer<'a> {
    records: Vec<Arc<RawValue>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    versions: Vec<u64>,
    certified: Sequence,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<&'a RawValue>,
    complete: Sequence,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LookupParams {
    version: Option<u64>,
    #[serde(default)]
    brief: bool,
}

pub(super) async fn lookup(
    State(app): AppState,
    NamePath(name): NamePath,
    Params(params): Params<LookupParams>,
) -> Result<Response, ApiError> {
    let published = app.published()?;
    looked_up(usize::from(!params.brief), usize::from(params.brief));
    if params.brief {
        let version = layout::record(&published.snapshot, &name).map_or(0, |record| record.version);
        let certified = published.certificate.statement.sequence;
        return Ok(json(&BriefAnswer { version, certified }));
    }
    if params.version.is_none() && published.snapshot.get(&layout::name_key(&name)).is_some() {
        let encoded = app.encoded(&published)?;
        let current = encoded.record(&published, &name).map_err(|error| ApiError::internal(&error.into()))?;
        return Ok(json(&EncodedAnswer {
            current: &current,
            earlier: None,
            certificate: encoded.certificate(),
            complete: complete(&published),
        }));
    }
    let (snapshot, certificate) = (&published.snapshot, &published.certificate);
    let answer = RecordAnswer::look_up(snapshot, certificate, complete(&published), &name, params.version);
    let found = match &answer.earlier {
        None => answer.current.value.is_some(),
        Some(earlier) => earlier.value.is_some(),
    };
    if found {
        return Ok(json(&answer));
    }
    let what = params.version.map_or(String::new(), |version| format!("version {version} of "));
    let detail = format!("{what}{name} does not exist; the proof is attached");
    Err(ApiError::new(ProblemKind::NotFound, detail).with_answer(answer))
}

/// The name that is spelt like the route of [`bulk`].
pub(super) async fn lookup_of_lookup(
    state: AppState,
    params: Params<LookupParams>,
) -> Result<Response, ApiError> {
    let name = Name::new("lookup").map_err(|error| ApiError::internal(&error.into()))?;
    lookup(state, NamePath(name), params).await
}

pub(super) async fn bulk(
    State(app): AppState,
    caller: Option<Extension<Caller>>,
    Body(question): Body<BulkQuestion>,
) -> Result<Response, ApiError> {
    if question.names.len() + question.brief.len() > MAX_LOOKUP_NAMES {
        return Err(ApiError::new(
            ProblemKind::TooLarge,
            format!("at most {MAX_LOOKUP_NAMES} names at once"),
        ));
    }
    if let Some(Extension(caller)) = caller {
        // The request itself was one, for which it may have a few.
        let names = question.names.len() + question.brief.len();
        caller.charge((names / NAMES_PER_REQUEST) as u32)?;
    }
    let published = app.published()?;
    let snapshot = &published.snapshot;
    let keys: Vec<_> = question.names.iter().map(layout::name_key).collect();
    let bytes: usize = keys.iter().filter_map(|key| snapshot.get(key)).map(|value| value.len()).sum();
    if bytes > MAX_PAGE_BYTES {
        let detail =
            format!("these records have {bytes} bytes together, and {MAX_PAGE_BYTES} are answered at once");
        return Err(ApiError::new(ProblemKind::TooLarge, detail));
    }
    let encoded = app.encoded(&published)?;
    let records = question.names.iter().map(|name| encoded.record(&published, name));
    let records = records.collect::<Result<_, _>>().map_err(|error| ApiError::internal(&error.into()))?;
    looked_up(question.names.len(), question.brief.len());
    let version = |name| layout::record(snapshot, name).map_or(0, |record| record.version);
    let certified = published.certificate.statement.sequence;
    Ok(json(&EncodedBulkAnswer {
        records,
        versions: question.brief.iter().map(version).collect(),
        certified,
        certificate: (question.known != Some(KnownState::of(&published.certificate)))
            .then(|| encoded.certificate()),
        complete: complete(&published),
    }))
}

/// Counts names that were answered for, wholly and briefly: the load that reads put on this server.
fn looked_up(full: usize, brief: usize) {
    static COUNTERS: OnceLock<[Counter; 2]> = OnceLock::new();
    let [fully, briefly] = COUNTERS.get_or_init(|| {
        ["full", "brief"].map(|answer| metrics::counter!("kds_lookups_total", "answer" => answer))
    });
    fully.increment(full as u64);
    briefly.increment(brief as u64);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParams {
    #[serde(default)]
    prefix: String,
    /// Names before this one are not listed.
    from: Option<String>,
    /// Names up to and including this one are not listed.
    after: Option<String>,
    limit: Option<usize>,
}

impl ListParams {
    pub(super) fn page(self, published: &Published, space: &[u8]) -> PageAnswer {
        let prefix = [space, self.prefix.as_bytes()].concat();
        let from = match (self.after, self.from) {
            // No name contains a zero byte: this is the next possible one.
            (Some(after), _) => [space, after.as_bytes(), b"\0"].concat(),
            (None, Some(from)) => [space, from.as_bytes()].concat(),
            (None, None) => prefix.clone(),
        };
        let limit = self.limit.unwrap_or(100).clamp(1, MAX_PAGE);
        page(published, &from.max(prefix.clone()), &layout::prefix_end(&prefix), limit)
    }
}

fn page(published: &Published, from: &[u8], to: &[u8], limit: usize) -> PageAnswer {
    let range = published.snapshot.prove_range(&Page::new(from, to, limit));
    PageAnswer { range, certificate: Arc::clone(&published.certificate) }
}

pub(super) async fn list(
    State(app): AppState,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    Ok(json(&params.page(&*app.published()?, layout::NAMES)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HistoryParams {
    /// Versions before this one are not listed.
    from: Option<u64>,
}

pub(super) async fn history(
    State(app): AppState,
    NamePath(name): NamePath,
    Params(params): Params<HistoryParams>,
) -> Result<Response, ApiError> {
    let published = app.published()?;
    let prefix = layout::history_prefix(&name);
    let current =
        RecordAnswer::look_up(&published.snapshot, &published.certificate, complete(&published), &name, None);
    let from = layout::history_key(&name, params.from.unwrap_or(0));
    let earlier = page(&published, &from, &layout::prefix_end(&prefix), MAX_PAGE);
    Ok(json(&HistoryAnswer { current, earlier }))
}

/// All entries that begin with a prefix, of which there are at most so many.
fn all(app: &App, (prefix, most): (&[u8], usize)) -> Result<Response, ApiError> {
    Ok(json(&page(&*app.published()?, prefix, &layout::prefix_end(prefix), most)))
}

pub(super) async fn servers(State(app): AppState) -> Result<Response, ApiError> {
    all(&app, SERVERS_PAGE)
}

pub(super) async fn administrators(State(app): AppState) -> Result<Response, ApiError> {
    all(&app, ADMINISTRATORS_PAGE)
}

pub(super) async fn decisions(State(app): AppState) -> Result<Response, ApiError> {
    all(&app, DECISIONS_PAGE)
}

pub(super) async fn completion(State(app): AppState) -> Result<Response, ApiError> {
    let published = app.published()?;
    match &published.completion {
        Some(completion) => Ok(json(completion.as_ref())),
        None => Err(ApiError::new(ProblemKind::NotReady, "nothing is known to be complete yet")),
    }
}

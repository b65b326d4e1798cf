//! HTTPS for clients: the routes, and a server loop with limits on everything.

mod door;
mod encoded;
mod guests;
mod limits;
mod paced;
mod pieces;
mod problem;
mod rate;
mod records;
mod requests;
mod secrets;
mod space;
mod status;
mod watch;

pub use door::listen;
pub use limits::{Configured, Limits};

use crate::server::Shared;
use arc_swap::ArcSwapOption;
use axum::Router;
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use door::Door;
use encoded::Encoded;
use guests::{Caller, Guests};
use http_body_util::BodyExt as _;
use kds_client::api::{CHANGES_HEADER, ProblemKind};
use pieces::{Pieces, UNCOUNTED_BYTES};
use problem::ApiError;
use quorum::limits::MAX_REQUEST_BYTES;
use quorum::ordering::{Input, Published};
use quorum::record::Name;
use rate::WRITE_COST;
use serde::de::DeserializeOwned;
pub use space::warn as warn_of_space;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch as watch_channel};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tower_http::catch_panic::CatchPanicLayer;

/// How long a request may take in all, its body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// How many times the size of the largest body is read before an answer says that it is too large.
const DRAINED: usize = 16;

/// What the handlers use. Cloned for every request, so it is one pointer.
#[derive(Clone)]
pub struct App(Arc<Inside>);

impl std::ops::Deref for App {
    type Target = Inside;
    fn deref(&self) -> &Inside {
        &self.0
    }
}

/// See [`App`].
pub struct Inside {
    shared: Arc<Shared>,
    inputs: mpsc::Sender<Input>,
    metrics: Option<metrics_exporter_prometheus::PrometheusHandle>,
    /// Parts of answers about the newest certified state as JSON.
    encoded: ArcSwapOption<Encoded>,
    /// Who is at the port for clients.
    guests: Arc<Guests>,
    /// Says when this server stops.
    stop: watch_channel::Receiver<bool>,
}

impl App {
    /// The certified state; an error while there is none.
    fn published(&self) -> Result<Arc<Published>, ApiError> {
        let published = self.shared.published.borrow().clone();
        published.ok_or_else(|| {
            ApiError::new(ProblemKind::NotReady, "this server has no certified state yet: try another one")
        })
    }
    /// What is encoded already of the answers about a state.
    fn encoded(&self, published: &Published) -> Result<Arc<Encoded>, ApiError> {
        if let Some(known) = &*self.encoded.load()
            && known.is_of(published)
        {
            return Ok(Arc::clone(known));
        }
        let encoded = Arc::new(Encoded::new(published).map_err(|error| ApiError::internal(&error.into()))?);
        self.encoded.store(Some(Arc::clone(&encoded)));
        Ok(encoded)
    }
}

impl App {
    /// Made once in a process.
    pub fn new(
        shared: Arc<Shared>,
        inputs: mpsc::Sender<Input>,
        stop: watch_channel::Receiver<bool>,
        limits: &Limits,
    ) -> Self {
        // Fails only if there is a recorder already: another server in this process, in tests.
        let metrics = metrics_exporter_prometheus::PrometheusBuilder::new().install_recorder().ok();
        let (encoded, guests) = (ArcSwapOption::empty(), Guests::new(limits));
        Self(Arc::new(Inside { shared, inputs, metrics, encoded, guests, stop }))
    }
    /// Answers clients, and whoever asks at the port for health and metrics if there is one, until told to stop.
    pub async fn serve(self, clients: TcpListener, tls: rustls::ServerConfig, health: Option<TcpListener>) {
        let stop = self.stop.clone();
        let door = Door {
            router: self.layered(routes()),
            guests: Arc::clone(&self.guests),
            tls: Some(TlsAcceptor::from(Arc::new(tls))),
        };
        let aside =
            Door { router: self.layered(health_routes()), guests: Guests::at_the_health_port(), tls: None };
        let health = async {
            if let Some(listener) = health {
                aside.open(listener, stop.clone()).await;
            }
        };
        tokio::join!(door.open(clients, stop.clone()), health);
    }
    fn layered(&self, routes: Router<Self>) -> Router {
        routes
            .fallback(|| async { ApiError::new(ProblemKind::NoRoute, "see the README for the routes") })
            .method_not_allowed_fallback(|| async {
                ApiError::new(ProblemKind::Method, "this route has other methods")
            })
            .layer(middleware::from_fn_with_state(Arc::clone(&self.shared), limit))
            .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
                tracing::error!("a handler panicked: please report this");
                ApiError::new(ProblemKind::Internal, "a defect of this server: try another one")
                    .into_response()
            }))
            .with_state(self.clone())
    }
}

/// All routes.
fn routes() -> Router<App> {
    Router::new()
        .route("/v1/requests", post(requests::submit))
        .route("/v1/requests/{client}/{sequence}", get(requests::outcome))
        .route("/v1/records", get(records::list))
        // The name `lookup` is one like any other.
        .route("/v1/records/lookup", post(records::bulk).get(records::lookup_of_lookup))
        .route("/v1/records/{name}", get(records::lookup))
        .route("/v1/records/{name}/history", get(records::history))
        .route("/v1/records/{name}/watch", get(watch::watch))
        .route("/v1/servers", get(records::servers))
        .route("/v1/administrators", get(records::administrators))
        .route("/v1/decisions", get(records::decisions))
        .route("/v1/space/{key}", get(space::space))
        .route("/v1/completion", get(records::completion))
        .route("/v1/secrets", get(secrets::list))
        .route("/v1/secrets/{name}", get(secrets::metadata))
        .route("/v1/shares", post(secrets::share))
        .route("/v1/manifest", get(status::manifest))
        .route("/v1/membership", get(status::membership))
        .route("/v1/status", get(status::status))
        .route("/v1/openapi.json", get(status::openapi))
        .merge(health_routes())
}

/// Those that load balancers and Prometheus ask.
fn health_routes() -> Router<App> {
    Router::new()
        .route("/healthz", get(status::healthz))
        .route("/readyz", get(status::readyz))
        .route("/metrics", get(status::metrics))
}

/// Whether an answer on this route may be long.
fn is_long(route: &str) -> bool {
    matches!(
        route,
        "/v1/records" | "/v1/records/lookup" | "/v1/records/{name}/history" | "/v1/secrets" | "/v1/decisions"
    )
}

/// What a caller may ask for now: an error instead of an answer if it is not this.
fn permit(caller: &Caller, method: &Method, route: &str) -> Result<(), ApiError> {
    caller.has_a_place()?;
    caller.charge(if method == Method::POST && route == "/v1/requests" { WRITE_COST } else { 1 })?;
    if is_long(route) { caller.reads() } else { Ok(()) }
}

async fn limit(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let route = path.as_ref().map_or("none", MatchedPath::as_str);
    // How a server is doing is told to whoever asks, most of all when it is busy.
    let free = matches!(route, "/healthz" | "/readyz" | "/metrics" | "/v1/status");
    let caller = request.extensions().get::<Caller>().cloned().filter(|_| !free);
    let method = request.method().clone();
    if let Some(caller) = &caller
        && let Err(error) = permit(caller, &method, route)
    {
        count(route, ProblemKind::TooMany.status());
        // Its client is listening when it has said everything.
        let _ = timeout(REQUEST_TIMEOUT, received(request, 0)).await;
        return error.into_response();
    }
    let mut response = match timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::new(ProblemKind::NotReady, "the request took too long").into_response(),
    };
    if let Some(caller) = &caller {
        response = caller.answer(response).unwrap_or_else(ApiError::into_response);
    }
    count(route, response.status().as_u16());
    let changes = shared.membership.load().proofs().len();
    if changes > 0 {
        response.headers_mut().insert(CHANGES_HEADER, changes.into());
    }
    if method == Method::HEAD {
        // Heads alone are not held back until they are read: one for each connection.
        response.headers_mut().insert("connection", HeaderValue::from_static("close"));
    }
    response
}

/// Counts answers by route and status. Counters are looked up in the registry once each.
fn count(route: &str, status: u16) {
    static COUNTERS: RwLock<Vec<(String, u16, metrics::Counter)>> = RwLock::new(Vec::new());
    let known = COUNTERS.read().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., counter)) = known.iter().find(|(path, code, _)| *code == status && path == route) {
        return counter.increment(1);
    }
    drop(known);
    let counter = metrics::counter!("kds_http_requests_total", "route" => route.to_owned(), "status" => status.to_string());
    counter.increment(1);
    // Bounded: there are as many as routes and statuses.
    COUNTERS.write().unwrap_or_else(PoisonError::into_inner).push((route.to_owned(), status, counter));
}

/// Reads a body to its end, unless it is far too large: an answer to a client that is still sending is lost with the
/// connection. What is long counts as unread while it is on its way.
async fn received(request: Request, most: usize) -> Result<Vec<u8>, ApiError> {
    let caller = request.extensions().get::<Caller>().cloned();
    let mut body = request.into_body();
    let (mut bytes, mut received, mut place) = (Vec::new(), 0usize, Ok(None));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::new(ProblemKind::Malformed, "the body broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        received += data.len();
        if let (true, Ok(None), Some(caller)) = (received > UNCOUNTED_BYTES, &place, &caller) {
            place = caller.unread(most);
        }
        match received {
            _ if received <= most && place.is_ok() => bytes.extend_from_slice(&data),
            _ if received <= MAX_REQUEST_BYTES * DRAINED => bytes = Vec::new(),
            _ => break,
        }
    }
    place?;
    match received <= most {
        true => Ok(bytes),
        false => Err(ApiError::new(ProblemKind::TooLarge, format!("a body has at most {most} bytes"))),
    }
}

/// A JSON body, read with a limit and parsed strictly.
struct Body<T>(T);

impl<T: DeserializeOwned> axum::extract::FromRequest<App> for Body<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, _: &App) -> Result<Self, ApiError> {
        let bytes = received(request, MAX_REQUEST_BYTES).await?;
        let parsed = serde_json::from_slice(&bytes)
            .map_err(|error| ApiError::new(ProblemKind::Malformed, error.to_string()))?;
        Ok(Self(parsed))
    }
}

/// A name in the path.
struct NamePath(Name);

impl FromRequestParts<App> for NamePath {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &App) -> Result<Self, ApiError> {
        let text = axum::extract::Path::<String>::from_request_parts(parts, state).await;
        let text = text.map_err(|error| ApiError::new(ProblemKind::Malformed, error.body_text()))?.0;
        Ok(Self(Name::new(text).map_err(|error| ApiError::new(ProblemKind::Malformed, error.to_string()))?))
    }
}

/// A query string, parsed strictly.
struct Params<T>(T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Params<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &App) -> Result<Self, ApiError> {
        let parsed = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        Ok(Self(parsed.map_err(|error| ApiError::new(ProblemKind::Malformed, error.body_text()))?.0))
    }
}

type AppState = State<App>;

/// 200 with JSON.
fn json<T: serde::Serialize>(value: &T) -> Response {
    json_with(StatusCode::OK, "application/json", value)
}

fn json_with<T: serde::Serialize>(status: StatusCode, content_type: &'static str, value: &T) -> Response {
    let mut pieces = Pieces::new();
    match serde_json::to_writer(&mut pieces, value) {
        Ok(()) => (status, [("content-type", content_type)], pieces.into_body()).into_response(),
        Err(error) => {
            tracing::error!(%error, "an answer does not encode");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// The description names the routes that there are, no more and no fewer.
    #[test]
    fn every_route_is_described() {
        let mut routed = BTreeSet::new();
        for line in include_str!("mod.rs").lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
            let (path, rest) = line.split_once("\", ").expect("a route on one line");
            let method = rest.split('(').next().expect("a method");
            routed.insert((path.to_owned(), method.to_owned()));
        }
        let document: serde_json::Value = serde_json::from_str(super::status::OPENAPI).unwrap();
        let mut described = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys() {
                described.insert((path.clone(), method.clone()));
            }
        }
        assert!(routed.len() > 15);
        assert_eq!(routed, described);
    }
}

//! HTTPS for clients: the routes, and a server loop with limits on everything.

mod encoded;
mod problem;
mod rate;
mod records;
mod requests;
mod secrets;
mod space;
mod status;
mod watch;

use crate::server::Shared;
use arc_swap::ArcSwapOption;
use axum::Router;
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use encoded::Encoded;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use kds_client::api::{CHANGES_HEADER, ProblemKind};
use problem::ApiError;
use quorum::ordering::{Input, Published};
use quorum::record::Name;
use rate::{Caller, RateLimits, WRITE_COST};
use serde::de::DeserializeOwned;
pub use space::warn as warn_of_space;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch as watch_channel};
use tokio::time::{Instant, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tower::util::MapRequest;
use tower_http::catch_panic::CatchPanicLayer;

/// Connections at a time: below the 1,024 file descriptors that a process commonly gets, with room
/// for peers and the database.
const MAX_CONNECTIONS: usize = 768;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take for a request's head, and stay idle between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request may take in all, its body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// How many times the size of the largest body is read before an answer says that it is too large.
const DRAINED: usize = 16;
/// How long a client may leave what was sent to it unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// What an answer with its proof and certificate has, about: its buffer need not grow.
const TYPICAL_ANSWER_BYTES: usize = 6 * 1024;
/// How often allowances that are whole again are forgotten.
const TIDY_INTERVAL: Duration = Duration::from_secs(5);
/// Bytes of a request's head.
const MAX_HEADER_BYTES: usize = 16 * 1024;

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
    /// Places for watches.
    watches: Arc<Semaphore>,
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

/// All routes.
pub fn router(
    shared: Arc<Shared>,
    inputs: mpsc::Sender<Input>,
    stop: watch_channel::Receiver<bool>,
    requests_per_second: u32,
) -> Site {
    let watches = Arc::new(Semaphore::new(watch::MAX_WATCHES));
    // Fails only if there is a recorder already: another server in this process, in tests.
    let metrics = metrics_exporter_prometheus::PrometheusBuilder::new().install_recorder().ok();
    let limits = Arc::new(RateLimits::new(requests_per_second));
    let encoded = ArcSwapOption::empty();
    let inside = Inside { shared, inputs, metrics, encoded, watches, stop };
    let router = Router::new()
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
        .route("/healthz", get(status::healthz))
        .route("/readyz", get(status::readyz))
        .route("/metrics", get(status::metrics))
        .fallback(|| async { ApiError::new(ProblemKind::NoRoute, "see the README for the routes") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(ProblemKind::Method, "this route has other methods")
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&inside.shared), limit_time))
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            tracing::error!("a handler panicked: please report this");
            ApiError::new(ProblemKind::Internal, "a defect of this server: try another one").into_response()
        }))
        .with_state(App(Arc::new(inside)));
    Site { router, limits }
}

/// The routes, and what clients may ask of them.
pub struct Site {
    router: Router,
    limits: Arc<RateLimits>,
}

async fn limit_time(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let name = path.as_ref().map_or("none", MatchedPath::as_str);
    let cost = if request.method() == Method::POST && name == "/v1/requests" { WRITE_COST } else { 1 };
    // How a server is doing is told to whoever asks, most of all when it is busy.
    let free = matches!(name, "/healthz" | "/readyz" | "/metrics" | "/v1/status");
    if let Some(caller) = request.extensions().get::<Caller>().filter(|_| !free)
        && let Err(error) = caller.charge(cost)
    {
        count(name, ProblemKind::TooMany.status());
        return error.into_response();
    }
    let mut response = match timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::new(ProblemKind::NotReady, "the request took too long").into_response(),
    };
    count(path.as_ref().map_or("none", MatchedPath::as_str), response.status().as_u16());
    let changes = shared.membership.load().proofs().len();
    if changes > 0 {
        response.headers_mut().insert(CHANGES_HEADER, changes.into());
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

/// A JSON body, read with a limit and parsed strictly.
struct Body<T>(T);

impl<T: DeserializeOwned> axum::extract::FromRequest<App> for Body<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, _: &App) -> Result<Self, ApiError> {
        let limit = quorum::limits::MAX_REQUEST_BYTES;
        let mut body = request.into_body();
        let (mut bytes, mut received) = (Vec::new(), 0usize);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| ApiError::new(ProblemKind::Malformed, "the body broke off"))?;
            let Ok(data) = frame.into_data() else { continue };
            received += data.len();
            match received {
                _ if received <= limit => bytes.extend_from_slice(&data),
                // An answer to a client that is still sending is lost with the connection: what is
                // too large is read to its end, unless it is far too large.
                _ if received <= limit * DRAINED => bytes = Vec::new(),
                _ => break,
            }
        }
        if received > limit {
            return Err(ApiError::new(ProblemKind::TooLarge, format!("a body has at most {limit} bytes")));
        }
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

/// Accepts clients until told to stop, then lets requests under way finish.
pub async fn serve(
    listener: TcpListener,
    tls: rustls::ServerConfig,
    site: Site,
    mut stop: watch_channel::Receiver<bool>,
) {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = Arc::new(GracefulShutdown::new());
    let Site { router, limits } = site;
    let mut tidied = Instant::now();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let Some((tcp, peer, place)) = accepted else { continue };
        if tidied.elapsed() > TIDY_INTERVAL {
            tidied = Instant::now();
            limits.tidy();
        }
        let Some(connection) = limits.connect(peer) else { continue };
        let caller = connection.caller();
        let app = MapRequest::new(router.clone(), move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(caller.clone());
            request
        });
        let (acceptor, watcher) = (acceptor.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _places = (place, connection);
            let _ = tcp.set_nodelay(true);
            // Whoever does not read what it asked for is let go.
            let mut tcp = TimeoutStream::new(tcp);
            tcp.set_write_timeout(Some(WRITE_TIMEOUT));
            let Ok(Ok(stream)) = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(Box::pin(tcp))).await else {
                return;
            };
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(MAX_HEADER_BYTES);
            let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
            // Whatever ends a connection is its client's affair.
            let _ = watcher.watch(connection).await;
        });
    }
    drop(listener);
    if let Ok(graceful) = Arc::try_unwrap(graceful) {
        graceful.shutdown().await;
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(tokio::net::TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((tcp, peer)) => Some((tcp, peer, place)),
        Err(error) => {
            tracing::warn!(%error, "cannot accept a client");
            tokio::time::sleep(Duration::from_millis(200)).await;
            None
        }
    }
}

/// 200 with JSON.
fn json<T: serde::Serialize>(value: &T) -> Response {
    json_with(StatusCode::OK, "application/json", value)
}

fn json_with<T: serde::Serialize>(status: StatusCode, content_type: &'static str, value: &T) -> Response {
    let mut body = Vec::with_capacity(TYPICAL_ANSWER_BYTES);
    match serde_json::to_writer(&mut body, value) {
        Ok(()) => (status, [("content-type", content_type)], body).into_response(),
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

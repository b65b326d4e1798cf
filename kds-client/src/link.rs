//! Pooled HTTPS connections to one server, pinned to the certificate that the membership has for it.

use crate::api::{CHANGES_HEADER, Problem};
use crate::error::LinkError;
use crate::trust::Trust;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kds_certs::CertsError;
use quorum::manifest::{Manifest, ServerEntry};
use quorum::{ServerId, limits};
use rustls::ClientConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of an answer that a client reads: a page of large records with its proof fits.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// Bytes of an event: the largest record with its proof fits.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;
/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server may take to show changes of the membership.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(3);

/// One server, as a client reaches it.
#[derive(Clone)]
pub struct Link {
    server: ServerId,
    trust: Arc<Trust>,
}

/// Connections to a server at the place where it is.
#[derive(Clone)]
pub(crate) struct Wire {
    base: Arc<str>,
    http: HyperClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Wire {
    /// Connects when it is used.
    pub(crate) fn to(entry: &ServerEntry) -> Result<Self, String> {
        Self::by(entry, kds_certs::https_client(&entry.certificate))
    }
    /// The same even if the server's certificate has ended by this machine's clock.
    pub(crate) fn at_any_date(entry: &ServerEntry) -> Result<Self, String> {
        Self::by(entry, kds_certs::https_client_at_any_date(&entry.certificate))
    }
    fn by(entry: &ServerEntry, tls: Result<ClientConfig, CertsError>) -> Result<Self, String> {
        let tls = tls.map_err(|e| e.to_string())?;
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_only()
            .enable_http1()
            .wrap_connector(connector);
        let http = HyperClient::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { base: entry.url.trim_end_matches('/').into(), http })
    }
    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, LinkError> {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| LinkError::Silent(e.to_string()))
    }
    /// Whether this is the same place.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.base, &other.base)
    }
    /// The answer with its body, and how many changes of the membership the server knows.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes, usize), Failed> {
        let request = self.request(method, path, body)?;
        let answer = self.http.request(request).await.map_err(|error| {
            let connecting = error.is_connect();
            let what = if connecting { "no connection" } else { "the connection broke" };
            Failed { connecting, why: LinkError::Silent(format!("{what}: {}", describe(&error))) }
        })?;
        let (status, changes) = (answer.status(), changes(answer.headers()));
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body =
            body.map_err(|e| LinkError::Silent(format!("its answer broke off or is too large: {e}")))?;
        Ok((status, body.to_bytes(), changes))
    }
    /// A document, from a server that may leave us waiting.
    pub(crate) async fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, LinkError> {
        let asked = tokio::time::timeout(FOLLOW_TIMEOUT, self.ask(path)).await;
        asked.unwrap_or_else(|_| Err(LinkError::late(FOLLOW_TIMEOUT)))
    }
    /// A document, from a server that the caller does not wait for for ever.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<T, LinkError> {
        let asked = self.exchange(Method::GET, path, Bytes::new()).await;
        let (status, body, _) = asked.map_err(|failed| failed.why)?;
        read(status, &body)
    }
}

/// No answer.
struct Failed {
    /// There was no connection to begin with: the request did not leave.
    connecting: bool,
    why: LinkError,
}
impl From<LinkError> for Failed {
    fn from(why: LinkError) -> Self {
        Self { connecting: false, why }
    }
}

fn changes(headers: &HeaderMap) -> usize {
    let said = headers.get(CHANGES_HEADER).and_then(|value| value.to_str().ok());
    said.and_then(|value| value.parse().ok()).unwrap_or(0)
}

fn read<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, LinkError> {
    if status.is_success() {
        return serde_json::from_slice(body)
            .map_err(|e| LinkError::Nonsense(format!("its answer cannot be read: {e}")));
    }
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Err(LinkError::Problem(Box::new(problem))),
        Err(_) => {
            Err(LinkError::Nonsense(format!("it answered with status {status} and no problem document")))
        }
    }
}

impl Link {
    /// A link to a server of the manifest, for tools that look at one server alone.
    pub fn new(manifest: &Arc<Manifest>, server: ServerId) -> Result<Self, String> {
        Ok(Self::of(&Trust::new(manifest)?, server))
    }
    pub(crate) fn of(trust: &Arc<Trust>, server: ServerId) -> Self {
        Self { server, trust: Arc::clone(trust) }
    }
    fn wire(&self) -> Result<Wire, LinkError> {
        self.trust.wire(self.server).ok_or_else(|| LinkError::Silent("there is no such server".into()))
    }
    /// Which server.
    pub fn server(&self) -> ServerId {
        self.server
    }
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, LinkError> {
        self.call(Method::GET, path, Bytes::new()).await
    }
    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, LinkError> {
        let body = serde_json::to_vec(body).map_err(|e| LinkError::Nonsense(e.to_string()))?;
        self.call(Method::POST, path, body.into()).await
    }
    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, LinkError> {
        let (status, body) = self.raw(method, path, body).await?;
        read(status, &body)
    }
    /// A stream of server-sent events.
    pub(crate) async fn events(&self, path: &str) -> Result<Events, LinkError> {
        let wire = self.wire()?;
        let answer = wire.http.request(wire.request(Method::GET, path, Bytes::new())?).await;
        let answer = answer.map_err(|e| LinkError::Silent(describe(&e)))?;
        self.trust.follow(self.server, changes(answer.headers())).await;
        match answer.status() {
            StatusCode::OK => {
                Ok(Events { body: answer.into_body(), buffer: Vec::new(), heard: Instant::now() })
            }
            status => Err(LinkError::Nonsense(format!("it answered with status {status}"))),
        }
    }
    /// Sends bytes and gives back status and body; for tools and tests.
    pub async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), String> {
        let method = method.parse().map_err(|_| "no such method".to_owned())?;
        let answer = self.raw(method, path, body.into()).await.map_err(|e| e.to_string())?;
        Ok((answer.0.as_u16(), answer.1.to_vec()))
    }
    async fn raw(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), LinkError> {
        let wire = self.wire()?;
        let mut answer = wire.exchange(method.clone(), path, body.clone()).await;
        if answer.as_ref().is_err_and(|failed| failed.connecting)
            && let Some(elsewhere) = self.trust.look_for(self.server, &wire).await
        {
            answer = elsewhere.exchange(method, path, body).await;
        }
        let (status, body, changes) = answer.map_err(|failed| failed.why)?;
        // Before anybody looks at what the answer is signed with.
        self.trust.follow(self.server, changes).await;
        Ok((status, body))
    }
}

/// Server-sent events as they come in.
pub(crate) struct Events {
    body: hyper::body::Incoming,
    buffer: Vec<u8>,
    heard: Instant,
}

impl Events {
    /// How long nothing came, not even a comment that says that the server is there.
    pub(crate) fn silence(&self) -> Duration {
        self.heard.elapsed()
    }
    /// The next message. Cancel-safe.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        loop {
            // An event ends with an empty line; ours have one line of data.
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data:") {
                    return serde_json::from_slice(data)
                        .map_err(|e| LinkError::Nonsense(format!("its event cannot be read: {e}")));
                }
            }
            let frame =
                self.body.frame().await.ok_or_else(|| LinkError::Silent("the stream ended".into()))?;
            let frame = frame.map_err(|e| LinkError::Silent(describe(&e)))?;
            self.heard = Instant::now();
            self.buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if self.buffer.len() > MAX_EVENT_BYTES {
                return Err(LinkError::Nonsense("its event is too large".into()));
            }
        }
    }
}

/// The innermost cause ("connection refused"), and whether it is TLS's.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let (mut text, mut tls) = (error.to_string(), false);
    let mut cause = error.source();
    while let Some(error) = cause {
        text = error.to_string();
        tls |= is_tls(error);
        cause = error.source();
    }
    if tls { format!("TLS: {text}") } else { text }
}

/// Whether an error is TLS's, or wraps one of TLS's.
fn is_tls(error: &(dyn std::error::Error + 'static)) -> bool {
    let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    error.is::<rustls::Error>() || inner.is_some_and(|inner| is_tls(inner))
}

/// A name as one segment of a path.
pub(crate) fn segment(name: &quorum::record::Name) -> String {
    debug_assert!(name.as_str().len() <= limits::MAX_NAME_BYTES);
    name.as_str().replace('/', "%2F").replace('+', "%2B")
}

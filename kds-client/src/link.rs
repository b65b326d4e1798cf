//! Pooled HTTPS connections to one server, pinned to the certificate that the membership has for it.

use crate::api::{BulkAnswer, BulkQuestion, CHANGES_HEADER, Problem};
use crate::bounds::{Answer, bulk, or_problem};
use crate::error::LinkError;
use crate::pace::Pace;
use crate::trust::Trust;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request, StatusCode, Uri};
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
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Bytes of an answer that tools read, whatever it is.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// Bytes of an event: the largest record with its proof fits.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of comments on a stream of events, which show that the server is there.
const SIGNS_OF_LIFE_BYTES_PER_SECOND: usize = 1_024;
/// How long a connection attempt may take, and then the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server may take to show changes of the membership.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a tool waits for what it sends itself.
const TOOL_TIMEOUT: Duration = Duration::from_secs(30);
/// What a server that asks to wait means if it does not say for how long, and at least and at most.
const USUAL_WAIT: Duration = Duration::from_secs(1);
const LEAST_WAIT: Duration = Duration::from_millis(50);
const MOST_WAIT: Duration = Duration::from_secs(30);

/// One server, as a client reaches it.
#[derive(Clone)]
pub struct Link {
    server: ServerId,
    trust: Arc<Trust>,
    pace: Arc<Pace>,
}

type Unboxed = dyn std::error::Error + Send + Sync;

/// A connector that gives up where the handshake never ends either: a server that accepts connections and says
/// nothing holds none for longer.
#[derive(Clone)]
struct InTime<C>(C);

impl<C> tower::Service<Uri> for InTime<C>
where
    C: tower::Service<Uri, Error = Box<Unboxed>>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = Box<Unboxed>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }
    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = timeout(2 * CONNECT_TIMEOUT, self.0.call(uri));
        Box::pin(
            async move { connecting.await.unwrap_or_else(|_| Err("the handshake takes too long".into())) },
        )
    }
}

/// An answer, whatever it says.
struct Answered {
    status: StatusCode,
    body: Bytes,
    /// Changes of the membership that the server knows.
    changes: usize,
    /// When to come back, if it says so.
    retry_after: Option<Duration>,
}

/// Connections to a server at the place where it is.
#[derive(Clone)]
pub(crate) struct Wire {
    base: Arc<str>,
    http: HyperClient<InTime<HttpsConnector<HttpConnector>>, Full<Bytes>>,
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
            .build(InTime(connector));
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
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        most: usize,
    ) -> Result<Answered, Failed> {
        let request = self.request(method, path, body)?;
        let answer = self.http.request(request).await.map_err(|error| match error.is_connect() {
            true => {
                let why = LinkError::Unreached(format!("no connection: {}", describe(&error)));
                Failed { connecting: true, why }
            }
            false => LinkError::Silent(format!("the connection broke: {}", describe(&error))).into(),
        })?;
        let (status, changes) = (answer.status(), changes(answer.headers()));
        let retry_after = retry_after(answer.headers());
        // In one piece: a chunk of one byte takes thirty times as much if it is kept as it came.
        let (mut incoming, mut body) = (answer.into_body(), Vec::new());
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(|error| LinkError::Silent(format!("its answer broke off: {error}")))?;
            let data = frame.data_ref().map_or(&[][..], |data| data);
            if body.len() + data.len() > most {
                return Err(LinkError::Nonsense(format!("its answer has more than {most} bytes")).into());
            }
            body.extend_from_slice(data);
        }
        Ok(Answered { status, body: body.into(), changes, retry_after })
    }
    /// A document, from a server that may leave us waiting.
    pub(crate) async fn json<T: Answer>(&self, path: &str) -> Result<T, LinkError> {
        let asked = timeout(FOLLOW_TIMEOUT, self.ask(path)).await;
        asked.unwrap_or_else(|_| Err(LinkError::late(FOLLOW_TIMEOUT)))
    }
    /// A document, from a server that the caller does not wait for for ever.
    pub(crate) async fn ask<T: Answer>(&self, path: &str) -> Result<T, LinkError> {
        let asked = self.exchange(Method::GET, path, Bytes::new(), or_problem(T::MOST_BYTES)).await;
        read(&asked.map_err(|failed| failed.why)?)
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

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(hyper::header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn read<T: DeserializeOwned>(answered: &Answered) -> Result<T, LinkError> {
    let Answered { status, body, .. } = answered;
    if status.is_success() {
        return serde_json::from_slice(body)
            .map_err(|e| LinkError::Nonsense(format!("its answer cannot be read: {e}")));
    }
    let problem = serde_json::from_slice::<Problem>(body).ok();
    // What is proved is an answer, whatever its status.
    let proves = problem.as_ref().is_some_and(|p| p.receipt.is_some() || p.answer.is_some());
    if matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) && !proves {
        let wait = answered.retry_after.unwrap_or(USUAL_WAIT).clamp(LEAST_WAIT, MOST_WAIT);
        let said = |problem| LinkError::Problem(Box::new(problem)).to_string();
        let why = problem.map_or_else(|| format!("status {status}"), said);
        return Err(LinkError::AsksToWait { wait, why });
    }
    match problem {
        Some(problem) => Err(LinkError::Problem(Box::new(problem))),
        None => Err(LinkError::Nonsense(format!("it answered with status {status} and no problem document"))),
    }
}

impl Link {
    /// A link to a server of the manifest, for tools that look at one server alone.
    pub fn new(manifest: &Arc<Manifest>, server: ServerId) -> Result<Self, String> {
        let pace = Arc::new(Pace::new(USUAL_WAIT, manifest.servers.len()));
        Ok(Self::of(&Trust::new(manifest)?, &pace, server))
    }
    pub(crate) fn of(trust: &Arc<Trust>, pace: &Arc<Pace>, server: ServerId) -> Self {
        Self { server, trust: Arc::clone(trust), pace: Arc::clone(pace) }
    }
    fn wire(&self) -> Result<Wire, LinkError> {
        self.trust.wire(self.server).ok_or_else(|| LinkError::Silent("there is no such server".into()))
    }
    /// Which server.
    pub fn server(&self) -> ServerId {
        self.server
    }
    /// A document. Nothing is asked without an end: no answer until then is none.
    pub(crate) async fn get<T: Answer>(&self, path: &str, until: Instant) -> Result<T, LinkError> {
        self.call(Method::GET, path, Bytes::new(), until, T::MOST_BYTES).await
    }
    /// The same, of a question that does not fit into a path.
    pub(crate) async fn post<B: Serialize, T: Answer>(
        &self,
        path: &str,
        body: &B,
        until: Instant,
    ) -> Result<T, LinkError> {
        let body = serde_json::to_vec(body).map_err(|e| LinkError::Nonsense(e.to_string()))?;
        self.call(Method::POST, path, body.into(), until, T::MOST_BYTES).await
    }
    /// Asks about names.
    pub(crate) async fn bulk(
        &self,
        question: &BulkQuestion,
        until: Instant,
    ) -> Result<BulkAnswer, LinkError> {
        let body = serde_json::to_vec(question).map_err(|e| LinkError::Nonsense(e.to_string()))?;
        let most = bulk(question.names.len(), question.brief.len());
        self.call(Method::POST, "/v1/records/lookup", body.into(), until, most).await
    }
    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        until: Instant,
        most: usize,
    ) -> Result<T, LinkError> {
        let answer = read(&self.raw(method, path, body, until, or_problem(most)).await?);
        if let Err(LinkError::AsksToWait { wait, why }) = &answer {
            self.pace.asked_to_wait(self.server, *wait, why);
        }
        answer
    }
    /// A stream of server-sent events.
    pub(crate) async fn events(&self, path: &str) -> Result<Events, LinkError> {
        let wire = self.wire()?;
        let answer = wire.http.request(wire.request(Method::GET, path, Bytes::new())?).await;
        let answer = answer.map_err(|e| LinkError::Silent(describe(&e)))?;
        self.trust.follow(self.server, changes(answer.headers())).await;
        let (status, retry_after) = (answer.status(), retry_after(answer.headers()));
        if status == StatusCode::OK {
            return Ok(Events::new(answer.into_body()));
        }
        let refused = read::<()>(&Answered { status, body: Bytes::new(), changes: 0, retry_after });
        if let Err(LinkError::AsksToWait { wait, why }) = &refused {
            self.pace.asked_to_wait(self.server, *wait, why);
        }
        Err(refused.err().unwrap_or_else(|| LinkError::Nonsense(format!("it answered with status {status}"))))
    }
    /// Sends bytes and gives back status and body; for tools and tests.
    pub async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), String> {
        let method = method.parse().map_err(|_| "no such method".to_owned())?;
        let until = Instant::now() + TOOL_TIMEOUT;
        let answer =
            self.raw(method, path, body.into(), until, MAX_ANSWER_BYTES).await.map_err(|e| e.to_string())?;
        Ok((answer.status.as_u16(), answer.body.to_vec()))
    }
    async fn raw(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        until: Instant,
        most: usize,
    ) -> Result<Answered, LinkError> {
        let began = Instant::now();
        match timeout_at(until, self.exchange(method, path, body, most)).await {
            Ok(answer) => {
                if answer.is_err() {
                    self.pace.avoid(self.server);
                }
                answer
            }
            Err(_) => {
                // Whoever had no time left herself says nothing about the server.
                if began.elapsed() >= self.pace.patience_with_writes() {
                    self.pace.avoid(self.server);
                }
                Err(LinkError::late(began.elapsed()))
            }
        }
    }
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        most: usize,
    ) -> Result<Answered, LinkError> {
        let wire = self.wire()?;
        let mut answer = wire.exchange(method.clone(), path, body.clone(), most).await;
        if answer.as_ref().is_err_and(|failed| failed.connecting)
            && let Some(elsewhere) = self.trust.look_for(self.server, &wire).await
        {
            answer = elsewhere.exchange(method, path, body, most).await;
        }
        let answer = answer.map_err(|failed| failed.why)?;
        self.pace.answered(self.server);
        // Before anybody looks at what the answer is signed with.
        self.trust.follow(self.server, answer.changes).await;
        Ok(answer)
    }
}

/// Server-sent events as they come in.
pub(crate) struct Events {
    body: hyper::body::Incoming,
    lines: Lines,
    heard: Instant,
    /// Bytes of lines without data since the last event, and when that was.
    idle: (usize, Instant),
}

impl Events {
    fn new(body: hyper::body::Incoming) -> Self {
        let now = Instant::now();
        Self { body, lines: Lines::default(), heard: now, idle: (0, now) }
    }
    /// How long nothing came, not even a comment that says that the server is there.
    pub(crate) fn silence(&self) -> Duration {
        self.heard.elapsed()
    }
    /// The next message. Cancel-safe.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        loop {
            // An event ends with an empty line; ours have one line of data.
            while let Some(line) = self.lines.next() {
                self.idle.0 += line.len() + 1;
                if let Some(data) = line.strip_prefix(b"data:") {
                    self.idle = (0, self.heard);
                    return serde_json::from_slice(data)
                        .map_err(|e| LinkError::Nonsense(format!("its event cannot be read: {e}")));
                }
            }
            let frame =
                self.body.frame().await.ok_or_else(|| LinkError::Silent("the stream ended".into()))?;
            let frame = frame.map_err(|e| LinkError::Silent(describe(&e)))?;
            self.heard = Instant::now();
            let data = frame.data_ref().map_or(&[][..], |data| data);
            self.lines.add(data);
            // Signs of life weigh little: whoever sends more has nothing to tell.
            let signs = (16 + self.idle.1.elapsed().as_secs() as usize) * SIGNS_OF_LIFE_BYTES_PER_SECOND;
            if self.lines.buffer.len() > MAX_EVENT_BYTES || self.idle.0 > signs {
                return Err(LinkError::Nonsense("its event is too large".into()));
            }
        }
    }
}

/// Bytes cut into lines. Each byte is looked at once and moved once, however many lines there are and in however
/// small pieces they come.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    /// Up to where lines were given.
    given: usize,
    /// Up to where there is no end of a further one.
    searched: usize,
}

impl Lines {
    fn add(&mut self, bytes: &[u8]) {
        // All lines were given: what is left is the beginning of one.
        self.buffer.drain(..self.given);
        self.searched -= self.given;
        self.given = 0;
        self.buffer.extend_from_slice(bytes);
    }
    /// The next whole line.
    fn next(&mut self) -> Option<&[u8]> {
        let end = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end.map(|end| self.searched + end) else {
            self.searched = self.buffer.len();
            return None;
        };
        let line = self.given..end;
        (self.given, self.searched) = (end + 1, end + 1);
        Some(&self.buffer[line])
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ProblemKind;

    fn answer(kind: ProblemKind, retry_after: Option<u64>) -> Answered {
        let (status, title) = (kind.status(), kind.title().to_owned());
        let detail = "x\u{1b}[2J".to_owned();
        let problem = Problem { kind: kind.uri().into(), title, status, detail, receipt: None, answer: None };
        Answered {
            status: StatusCode::from_u16(status).unwrap(),
            body: serde_json::to_vec(&problem).unwrap().into(),
            changes: 0,
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    #[test]
    fn empty_lines_and_single_bytes_cost_what_they_weigh() {
        let mut lines = Lines::default();
        lines.add(b":\n\nda");
        for line in [Some(&b":"[..]), Some(&b""[..]), None] {
            assert_eq!(lines.next(), line);
        }
        lines.add(b"ta:1\n");
        assert_eq!(lines.next(), Some(&b"data:1"[..]));
        // Ten times as much as an event may have takes no second; a search or a move for each would take hours.
        let began = std::time::Instant::now();
        for _ in 0..10 {
            lines.add(&vec![b'\n'; MAX_EVENT_BYTES]);
            while lines.next().is_some() {}
        }
        for _ in 0..MAX_EVENT_BYTES {
            lines.add(b"x");
            assert!(lines.next().is_none());
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }

    #[test]
    fn a_limit_is_neither_silence_nor_a_refusal() {
        for (kind, told, waits) in [
            (ProblemKind::TooMany, Some(3), Duration::from_secs(3)),
            (ProblemKind::NotReady, Some(2), Duration::from_secs(2)),
            (ProblemKind::TooMany, None, USUAL_WAIT),
            // A liar's word: it is asked again all the same, and not all the time.
            (ProblemKind::TooMany, Some(u64::MAX), MOST_WAIT),
            (ProblemKind::TooMany, Some(0), LEAST_WAIT),
        ] {
            match read::<()>(&answer(kind, told)) {
                Err(LinkError::AsksToWait { wait, why }) => {
                    assert_eq!(wait, waits, "{told:?}");
                    assert!(why.contains(kind.title()) && !why.contains('\u{1b}'), "{why:?}");
                }
                other => panic!("{other:?}"),
            }
        }
        let page =
            Answered { body: Bytes::from("<html>busy</html>"), ..answer(ProblemKind::TooMany, Some(1)) };
        assert!(matches!(read::<()>(&page), Err(LinkError::AsksToWait { .. })));
        let refused = read::<()>(&answer(ProblemKind::NotAllowed, Some(3)));
        assert!(matches!(refused, Err(LinkError::Problem(problem)) if problem.status == 403));
    }
}

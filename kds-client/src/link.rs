//! A pooled HTTPS connection to one server, pinned to its certificate in the manifest.

use crate::api::Problem;
use crate::error::LinkError;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use quorum::manifest::Manifest;
use quorum::{ServerId, limits};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Bytes of an answer that a client reads: a page of large records with its proof fits.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// One server, as a client reaches it.
#[derive(Clone)]
pub struct Link {
    server: ServerId,
    base: String,
    http: HyperClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Link {
    /// A link to a server of the manifest; connects when it is used.
    pub fn new(manifest: &Manifest, server: ServerId) -> Result<Self, String> {
        let entry = manifest.server(server).ok_or("no such server")?;
        let tls = kds_certs::https_client(manifest, server).map_err(|e| e.to_string())?;
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
        Ok(Self { server, base: entry.url.trim_end_matches('/').to_owned(), http })
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
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|e| LinkError::Nonsense(format!("its answer cannot be read: {e}")));
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(LinkError::Problem(Box::new(problem))),
            Err(_) => {
                Err(LinkError::Nonsense(format!("it answered with status {status} and no problem document")))
            }
        }
    }
    /// Sends bytes and gives back status and body; for tools and tests.
    pub async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), String> {
        let method = method.parse().map_err(|_| "no such method".to_owned())?;
        let answer = self.raw(method, path, body.into()).await.map_err(|e| e.to_string())?;
        Ok((answer.0.as_u16(), answer.1.to_vec()))
    }
    async fn raw(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), LinkError> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| LinkError::Silent(e.to_string()))?;
        let answer = self.http.request(request).await.map_err(|e| LinkError::Silent(describe(&e)))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body =
            body.map_err(|e| LinkError::Silent(format!("its answer broke off or is too large: {e}")))?;
        Ok((status, body.to_bytes()))
    }
}

/// The whole chain of causes in one line: "connection refused" is at its end.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

/// A name as one segment of a path.
pub(crate) fn segment(name: &quorum::record::Name) -> String {
    debug_assert!(name.as_str().len() <= limits::MAX_NAME_BYTES);
    name.as_str().replace('/', "%2F").replace('+', "%2B")
}

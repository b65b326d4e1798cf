//! A server that lies, over real HTTPS, under a real server's certificate and at its address.
//!
//! It passes requests on to an honest server and changes the answers.

use anyhow::Context as _;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kds_certs::TlsIdentity;
use kds_client::Link;
use kds_client::keystore::{self, SecretKind};
use quorum::ServerId;
use quorum::manifest::Manifest;
use serde_json::Value;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// What a liar does with an honest answer: path and query, then status and document.
pub type Lie = dyn Fn(&str, &mut u16, &mut Value) + Send + Sync;

/// A running liar; it stops when dropped.
pub struct Liar(JoinHandle<()>);

impl Drop for Liar {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Liar {
    /// Takes the place of `server`, whose process must be down, and answers as `honest` does,
    /// except for the lie.
    pub async fn start(
        manifest: &Arc<Manifest>,
        server: ServerId,
        folder: &Path,
        honest: ServerId,
        lie: Arc<Lie>,
    ) -> anyhow::Result<Self> {
        let key = keystore::read(&folder.join("tls.key"), SecretKind::TlsKey, None)?;
        let identity = TlsIdentity::from_pem(&std::fs::read(folder.join("tls.pem"))?, &key)?;
        let acceptor = TlsAcceptor::from(Arc::new(kds_certs::https_server(&identity)?));
        let address = manifest.server(server).context("no such server")?.url.replace("https://", "");
        let listener = bind(&address).await?;
        let link = Link::new(manifest, honest).map_err(anyhow::Error::msg)?;
        Ok(Self(tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, link, lie) = (acceptor.clone(), link.clone(), Arc::clone(&lie));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(tcp).await else { return };
                    let service = service_fn(move |request| answer(request, link.clone(), Arc::clone(&lie)));
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        })))
    }
}

/// The killed server's port may be in use for a moment.
async fn bind(address: &str) -> anyhow::Result<TcpListener> {
    for _ in 0..100 {
        if let Ok(listener) = TcpListener::bind(address).await {
            return Ok(listener);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    TcpListener::bind(address).await.context("the liar's port stays in use")
}

async fn answer(
    request: Request<Incoming>,
    link: Link,
    lie: Arc<Lie>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let method = request.method().to_string();
    let path = request.uri().path_and_query().map_or_else(String::new, ToString::to_string);
    let body = request.into_body().collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    let (mut status, bytes) = link.send(&method, &path, body).await.unwrap_or((503, vec![]));
    let mut document = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    lie(&path, &mut status, &mut document);
    let mut response = Response::new(Full::new(Bytes::from(document.to_string())));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
    Ok(response)
}

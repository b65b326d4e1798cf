//! A server that lies, over real HTTPS, under a real server's certificate and at its address.
//!
//! It passes requests on to an honest server and changes the answers, or says whatever it likes.

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kds_certs::TlsIdentity;
use kds_client::Link;
use kds_client::keystore::{self, SecretKind};
use quorum::ServerId;
use quorum::manifest::Manifest;
use serde_json::Value;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// What a liar does with an honest answer: path and query, then status and document.
pub type Lie = dyn Fn(&str, &mut u16, &mut Value) + Send + Sync;

/// What a client asks.
#[derive(Clone, Debug)]
pub struct Question {
    /// GET or POST.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Question {
    /// What the server behind `link` answers to it: status and document.
    pub async fn put_to(&self, link: &Link) -> (u16, Value) {
        let answer = link.send(&self.method, &self.path, self.body.clone()).await;
        let (status, bytes) = answer.unwrap_or((503, vec![]));
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }
}

/// What a server says: status, headers, and a body that comes in pieces.
pub struct Speech {
    /// The status.
    pub status: u16,
    /// Headers beside the usual ones.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: Pieces,
}

impl Speech {
    /// A document.
    pub fn document(status: u16, document: &Value) -> Self {
        Self::bytes(status, document.to_string())
    }
    /// Any bytes.
    pub fn bytes(status: u16, bytes: impl Into<Bytes>) -> Self {
        let (sender, body) = Pieces::new();
        let _ = sender.try_send(bytes.into());
        Self { status, headers: vec![], body }
    }
}

/// A body whose pieces somebody sends; it ends when nobody does any more.
pub struct Pieces(mpsc::Receiver<Bytes>);

impl Pieces {
    /// Who sends them, and the body.
    pub fn new() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, receiver) = mpsc::channel(4);
        (sender, Self(receiver))
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

/// What a mouth is about to say.
pub type Answering = Pin<Box<dyn Future<Output = Option<Speech>> + Send>>;

/// Says something to a question; none breaks the connection off.
pub type Mouth = dyn Fn(Question) -> Answering + Send + Sync;

/// A running liar; it stops when dropped.
pub struct Liar(JoinHandle<()>);

impl Drop for Liar {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Liar {
    /// Takes the place of `server`, whose process must be down or hidden, and answers as `honest` does,
    /// except for the lie.
    pub async fn start(
        manifest: &Arc<Manifest>,
        server: ServerId,
        folder: &Path,
        honest: ServerId,
        lie: Arc<Lie>,
    ) -> anyhow::Result<Self> {
        let link = Link::new(manifest, honest).map_err(anyhow::Error::msg)?;
        let mouth = move |question: Question| -> Answering {
            let (link, lie) = (link.clone(), Arc::clone(&lie));
            Box::pin(async move {
                let (mut status, mut document) = question.put_to(&link).await;
                lie(&question.path, &mut status, &mut document);
                Some(Speech::document(status, &document))
            })
        };
        Self::speaking(manifest, server, folder, Arc::new(mouth)).await
    }
    /// Takes the place of `server`, and says what the mouth says.
    pub async fn speaking(
        manifest: &Arc<Manifest>,
        server: ServerId,
        folder: &Path,
        mouth: Arc<Mouth>,
    ) -> anyhow::Result<Self> {
        let key = keystore::read(&folder.join("tls.key"), SecretKind::TlsKey, None)?;
        let identity = TlsIdentity::from_pem(&std::fs::read(folder.join("tls.pem"))?, &key)?;
        let acceptor = TlsAcceptor::from(Arc::new(kds_certs::https_server(&identity)?));
        let address = manifest.server(server).context("no such server")?.url.replace("https://", "");
        let listener = bind(&address).await?;
        Ok(Self(tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, mouth) = (acceptor.clone(), Arc::clone(&mouth));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(tcp).await else { return };
                    let service = service_fn(move |request| answer(request, Arc::clone(&mouth)));
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

async fn answer(request: Request<Incoming>, mouth: Arc<Mouth>) -> io::Result<Response<Pieces>> {
    let method = request.method().to_string();
    let path = request.uri().path_and_query().map_or_else(String::new, ToString::to_string);
    let body = request.into_body().collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    let said = mouth(Question { method, path, body }).await;
    let Speech { status, headers, body } = said.ok_or(io::ErrorKind::ConnectionAborted)?;
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    response.body(body).map_err(io::Error::other)
}

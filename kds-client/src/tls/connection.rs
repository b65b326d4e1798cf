//! Connections to peers that are registered, and that end when they no longer are.

use super::standing::{Known, Standing, Until};
use super::verifier::Dialled;
use super::{RegisteredPeers, TlsIdentity, admits, own_name, unusable};
use crate::error::ClientError;
use kds_certs::KeyExchange;
use quorum::record::Name;
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// How long a peer may take for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Lets registered callers in.
#[derive(Clone)]
pub struct Acceptor {
    peers: RegisteredPeers,
    tls: TlsAcceptor,
}

impl Acceptor {
    pub(super) fn new(peers: RegisteredPeers, tls: ServerConfig) -> Self {
        Self { peers, tls: TlsAcceptor::from(Arc::new(tls)) }
    }
    /// Does the handshake, and looks up who calls before a byte is read or written. Takes at most ten seconds and
    /// the client's timeout. To be awaited in a task of its own, since callers may take their time.
    ///
    /// # Errors
    /// If the caller is not registered, or that is not known, or does not get through the handshake.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> Result<Connection<server::TlsStream<S>>, ClientError> {
        let stream = in_time(self.tls.accept(stream)).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.map(|shown| shown.to_vec()).unwrap_or_default();
        let name = own_name(&certificate)
            .ok_or_else(|| ClientError::Unusable("the caller's certificate carries no name".into()))?;
        self.peers.guard(stream, &name, &certificate).await
    }
}

/// Connects to registered services.
#[derive(Clone)]
pub struct Connector {
    peers: RegisteredPeers,
    own: Option<Arc<TlsIdentity>>,
}

impl Connector {
    pub(super) fn new(peers: RegisteredPeers, own: Option<Arc<TlsIdentity>>) -> Self {
        Self { peers, own }
    }
    /// Looks the name up, and does the handshake with whoever is at the other end of `stream`. Takes at most the
    /// client's timeout and ten seconds.
    ///
    /// # Errors
    /// If the other end is not the one that is registered under this name, or that is not known, or does not get
    /// through the handshake; and if this is no host's name.
    pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        name: &Name,
        stream: S,
    ) -> Result<Connection<client::TlsStream<S>>, ClientError> {
        let host = ServerName::try_from(name.as_str().to_owned())
            .map_err(|_| ClientError::Unusable(format!("{name} is not the name of a host")))?;
        let sighting = self.peers.sighting(name).await?;
        let provider = kds_certs::provider(KeyExchange::HybridPreferred);
        let verifier = Arc::new(Dialled { name: name.clone(), sighting: sighting.clone(), provider });
        let tls = kds_certs::client_config(KeyExchange::HybridPreferred, verifier, self.own.as_deref());
        let connector = TlsConnector::from(Arc::new(tls.map_err(unusable)?));
        let stream = in_time(connector.connect(host, stream)).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.map(|shown| shown.to_vec()).unwrap_or_default();
        self.peers.hold(stream, name, &certificate, sighting)
    }
}

async fn in_time<T>(handshake: impl Future<Output = io::Result<T>>) -> Result<T, ClientError> {
    match timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(ClientError::Unusable(format!("the handshake with the peer failed: {error}"))),
        Err(_) => Err(ClientError::Unusable(format!("no handshake within {HANDSHAKE_TIMEOUT:?}"))),
    }
}

/// Whether a connection is still good, for those who read and write.
struct State {
    inside: Mutex<Inside>,
    ended: watch::Sender<Option<String>>,
}

struct Inside {
    /// What was proved is good until then.
    until: Until,
    /// Who waits to read, and who waits to write: perhaps two tasks.
    waiting: [Option<Waker>; 2],
}

const READS: usize = 0;
const WRITES: usize = 1;

impl State {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn end(&self, why: String) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(why);
            }
            first
        });
        let waiting = std::mem::take(&mut self.inside().waiting);
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
    /// Nothing passes once the connection has ended, or what is known is too old.
    fn passes(&self, who: usize, context: &Context<'_>) -> io::Result<()> {
        let mut inside = self.inside();
        if inside.until.left().is_zero() {
            drop(inside);
            self.end("that the peer's key is registered was not confirmed in time".into());
        } else if self.ended.borrow().is_none() {
            if !inside.waiting[who].as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                inside.waiting[who] = Some(context.waker().clone());
            }
            return Ok(());
        }
        let why = self.ended.borrow().clone().unwrap_or_default();
        Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
    }
}

/// A connection to a peer whose key is registered. It is checked again twice in `max_age`; when the key is no longer
/// registered, or that cannot be confirmed in time, reading and writing fail with
/// [`io::ErrorKind::PermissionDenied`] and the reason, at once, whoever waits.
///
/// It wraps whatever the handshake was made with; over `tokio_rustls` streams it is what
/// [`Acceptor`] and [`Connector`] give.
pub struct Connection<T> {
    stream: T,
    peer: Name,
    state: Arc<State>,
    task: AbortHandle,
    _standing: Arc<Standing>,
}

impl<T> Drop for Connection<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<T> std::fmt::Debug for Connection<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection to {}", self.peer)
    }
}

impl<T> Connection<T> {
    pub(super) fn new(stream: T, standing: Arc<Standing>, peer: &Name, certificate: &[u8]) -> Self {
        let known = standing.subscribe();
        let until = known.borrow().sighting.until;
        let inside = Mutex::new(Inside { until, waiting: [None, None] });
        let state = Arc::new(State { inside, ended: watch::channel(None).0 });
        let task = tokio::spawn(keep(Arc::clone(&state), known, peer.clone(), certificate.to_vec()));
        Self { stream, peer: peer.clone(), state, task: task.abort_handle(), _standing: standing }
    }
    /// The name that the peer is registered under: proved by its key.
    pub fn peer(&self) -> &Name {
        &self.peer
    }
    /// What is wrapped.
    pub fn get_ref(&self) -> &T {
        &self.stream
    }
    /// Waits until the peer is no longer one to talk to, and says why: for those who hold connections that nobody
    /// reads from. The future does not borrow the connection.
    pub fn ended(&self) -> impl Future<Output = String> + Send + use<T> {
        let mut ended = self.state.ended.subscribe();
        async move {
            match ended.wait_for(Option::is_some).await {
                Ok(why) => why.clone().unwrap_or_default(),
                Err(_) => "the connection was dropped".into(),
            }
        }
    }
}

/// Holds a connection against what becomes known of its peer.
async fn keep(state: Arc<State>, mut known: watch::Receiver<Known>, peer: Name, certificate: Vec<u8>) {
    loop {
        let (sighting, failure) = {
            let known = known.borrow_and_update();
            (known.sighting.clone(), known.failure.clone())
        };
        if let Err(error) = admits(sighting.record.as_deref(), &peer, &certificate) {
            return state.end(error.to_string());
        }
        let left = sighting.until.left();
        if left.is_zero() {
            let why = failure.map_or_else(String::new, |error| format!(": {error}"));
            return state.end(format!("that {peer}'s key is registered was not confirmed in time{why}"));
        }
        state.inside().until = sighting.until;
        tokio::select! {
            changed = known.changed() => if changed.is_err() {
                return state.end("nobody looks the peer up any more".into());
            },
            () = sleep(left) => {}
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Connection<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.state.passes(READS, context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Connection<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.state.passes(WRITES, context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state.passes(WRITES, context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }
    /// Saying goodbye is always allowed.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

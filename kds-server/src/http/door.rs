//! Ports for clients: who is let in, and how long one may take for what.
//!
//! A handshake under way takes one of a few places, and a connection one of many. One that is too many for its address
//! is told so in words that its client understands, and ends; it costs no more than the handshake's place.

use super::guests::{self, Caller, Guests};
use super::paced::Paced;
use crate::places::{Place, network};
use crate::seldom;
use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, watch as watch_channel};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower::util::MapRequest;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take for a request's head, and stay idle between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection lasts that is one of too many.
const SURPLUS_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a request's head.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Bytes that the system keeps of what a client did not read, before the rest stays here and is counted.
const SEND_BUFFER_BYTES: u32 = 256 * 1024;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1_024;
/// How often allowances that are whole again are forgotten.
const TIDY_INTERVAL: Duration = Duration::from_secs(5);

/// A port for clients.
pub(super) struct Door {
    pub(super) router: Router,
    pub(super) guests: Arc<Guests>,
    /// Without, whoever comes is spoken to in plain text.
    pub(super) tls: Option<TlsAcceptor>,
}

/// Listens at an address, and has the system keep little of what is not read.
///
/// # Errors
/// If the address cannot be had.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Connections that are accepted inherit it.
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Door {
    /// Accepts clients until told to stop, then lets requests under way finish.
    pub(super) async fn open(self, listener: TcpListener, mut stop: watch_channel::Receiver<bool>) {
        let (door, graceful) = (Arc::new(self), GracefulShutdown::new());
        let mut tidied = Instant::now();
        loop {
            let accepted = tokio::select! {
                accepted = accept(&listener) => accepted,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            let Some((tcp, peer)) = accepted else { continue };
            if tidied.elapsed() > TIDY_INTERVAL {
                tidied = Instant::now();
                door.guests.tidy();
            }
            let (door, watcher) = (Arc::clone(&door), graceful.watcher());
            tokio::spawn(async move { door.meet(tcp, network(peer.ip()), watcher).await });
        }
        drop(listener);
        graceful.shutdown().await;
    }

    async fn meet(&self, tcp: TcpStream, address: IpAddr, watcher: Watcher) {
        let _ = tcp.set_nodelay(true);
        let (place, gone) = self.guests.handshakes.enter(address);
        if gone.is_some() {
            guests::HANDSHAKE_CUT.note(gone);
        }
        // Whoever does not read what it asked for is let go.
        let stream = Paced::new(tcp, || guests::READER_SLOW.note(None));
        let Some(tls) = &self.tls else { return self.admit(stream, place, address, watcher).await };
        let shaken = tokio::select! {
            shaken = timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)) => shaken,
            () = place.cut() => return,
        };
        match shaken {
            Ok(Ok(stream)) => self.admit(stream, place, address, watcher).await,
            Ok(Err(error)) => tracing::debug!(%address, %error, "a client's handshake failed"),
            Err(_) => guests::HANDSHAKE_SLOW.note(Some(address)),
        }
    }

    /// Gives a place among the connections for the one among the handshakes.
    async fn admit(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        handshake: Place<IpAddr>,
        address: IpAddr,
        watcher: Watcher,
    ) {
        let cut = Arc::new(Notify::new());
        let admitted = self.guests.connections.admit(address, 1, &cut);
        let is_surplus = admitted.is_none();
        let place = match admitted {
            Some((place, gone)) => {
                drop(handshake);
                gone.into_iter().for_each(|gone| guests::CONNECTION_CUT.note(Some(gone)));
                place
            }
            None => {
                guests::CONNECTION_REFUSED.note(Some(address));
                handshake
            }
        };
        let caller = Caller::new(&self.guests, address, &cut, is_surplus);
        let app = MapRequest::new(self.router.clone(), move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(caller.clone());
            request
        });
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEADER_BYTES)
            .keep_alive(!is_surplus);
        let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
        let too_long = async { if is_surplus { sleep(SURPLUS_TIMEOUT).await } else { pending().await } };
        tokio::select! {
            // Whatever ends a connection is its client's affair.
            _ = watcher.watch(connection) => {}
            () = place.cut() => {}
            () = too_long => {}
        }
    }
}

async fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            // Out of file descriptors, mostly: others may close theirs.
            if let Some(unsaid) = seldom::now("cannot accept a client", None) {
                tracing::warn!(%error, unsaid, "cannot accept a client");
            }
            sleep(Duration::from_millis(200)).await;
            None
        }
    }
}

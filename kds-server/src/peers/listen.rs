//! Links that other servers dial, and what comes over them.
//!
//! Anyone can reach the port. A handshake under way takes one of a few places, and whoever comes when they are taken
//! pushes out the oldest of the address that has most ([`Places`]): so handshakes that never end keep out nobody. Servers
//! come from addresses that this one has reached them at, and have places of their own.

use super::{HANDSHAKE_TIMEOUT, concerns_secrets, is_old, key_of, read_frame};
use crate::places::Places;
use crate::seldom;
use crate::server::Shared;
use crate::share_store::ToKeeper;
use anyhow::Context as _;
use quorum::Hash;
use quorum::codec::{decode, sha256};
use quorum::ids::{AttemptId, ServerId, View};
use quorum::message::{CheckedMessage, PeerMessage};
use quorum::ordering::Input;
use quorum::signing::Keyring;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, BufReader};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;

/// Handshakes under way at a time: with strangers, and as many with addresses of servers.
const HANDSHAKES: usize = 64;
/// Links that one peer may have to this server: the current one, and those that it replaces.
const LINKS_PER_PEER: usize = 4;
/// Messages of one peer that wait for the replica. The others' come in turn.
const WAITING_PER_PEER: usize = 64;
/// A healthy peer says something every second.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a link may be used after contributions were erased that may have come over it. A peer makes another one
/// when it erases its own.
const OUTLIVED: Duration = Duration::from_secs(10);
/// Shortest time between two messages with much evidence from one peer.
const HEAVY_INTERVAL: Duration = Duration::from_millis(100);

/// A peer's message, and its place among those of that peer that wait.
pub type FromPeers = (Input, OwnedSemaphorePermit);

/// Where what other servers say goes.
#[derive(Clone)]
pub struct Hears {
    /// To the replica.
    pub inputs: mpsc::Sender<FromPeers>,
    /// To the keeper of the shares.
    pub questions: mpsc::Sender<ToKeeper>,
}

/// Accepts links from the servers of the manifest, until it is dropped.
pub async fn listen(listener: TcpListener, shared: Arc<Shared>, hears: Hears) {
    let servers = || shared.manifest.servers.iter();
    let (strangers, neighbours) = (Places::new(HANDSHAKES), Places::new(HANDSHAKES));
    // Whoever shows an old key takes no place from the server itself.
    let places = || -> Vec<_> { servers().map(|_| Places::new(LINKS_PER_PEER)).collect() };
    let (links, late_links) = (Arc::new(places()), Arc::new(places()));
    let waiting = servers().map(|_| Arc::new(Semaphore::new(WAITING_PER_PEER)));
    let waiting: Arc<Vec<_>> = Arc::new(waiting.collect());
    loop {
        let (tcp, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: others may close theirs.
                if let Some(unsaid) = seldom::now("cannot accept a peer", None) {
                    tracing::warn!(%error, unsaid, "cannot accept a peer");
                }
                sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let network = crate::places::network(address.ip());
        let doors = if shared.is_neighbour(network) { &neighbours } else { &strangers };
        let (place, gone) = doors.enter(network);
        if let Some(gone) = gone
            && let Some(unsaid) = seldom::now("too many handshakes", None)
        {
            tracing::warn!(address = %gone, unsaid, "too many handshakes at a time with peers: cut off one that had not ended");
        }
        let acceptor = TlsAcceptor::from(Arc::clone(&shared.links.load().server));
        let (shared, hears) = (Arc::clone(&shared), hears.clone());
        let (links, late_links, waiting) =
            (Arc::clone(&links), Arc::clone(&late_links), Arc::clone(&waiting));
        tokio::spawn(async move {
            let _ = tcp.set_nodelay(true);
            let shaken = tokio::select! {
                shaken = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)) => shaken,
                () = place.cut() => return,
            };
            let refused = match shaken {
                Ok(Ok(stream)) => Ok(stream),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("the handshake takes too long".into()),
            };
            let stream = match refused {
                Ok(stream) => stream,
                Err(error) => {
                    if let Some(unsaid) = seldom::now("refused a peer connection", None) {
                        tracing::warn!(%address, %error, unsaid, "refused a peer connection");
                    }
                    return;
                }
            };
            let Some(key) = key_of(&shared, stream.get_ref().1) else {
                if let Some(unsaid) = seldom::now("replaced", None) {
                    tracing::warn!(%address, unsaid, "refused a link from a server that was replaced");
                }
                return;
            };
            let peer = key.server;
            drop(place);
            let late = is_old(key.attempt_id(), *shared.epoch.borrow());
            let places = if late { &late_links } else { &links };
            let (link, _) = places[peer.index()].enter(());
            let of = key.attempt_id();
            let receiving = receive(stream, peer, (of, late), &shared, &hears, &waiting[peer.index()]);
            let ended = tokio::select! {
                ended = receiving => ended,
                () = outlived(&shared) => Err(anyhow::anyhow!("contributions that came over it are erased")),
                () = link.cut() => Err(anyhow::anyhow!("it has made too many newer ones")),
            };
            if let Err(error) = ended
                && let Some(unsaid) = seldom::now("link from peer closed", peer)
            {
                tracing::info!(%peer, error = %format!("{error:#}"), unsaid, "link from peer closed");
            }
        });
    }
}

/// Returns when a link that is made now is older than what may be remembered of it.
async fn outlived(shared: &Shared) {
    let mut era = shared.link_era.subscribe();
    let erased = era.borrow_and_update().erased;
    if era.wait_for(|era| era.erased != erased).await.is_ok() {
        sleep(OUTLIVED).await;
    }
}

async fn receive(
    stream: impl AsyncRead + Unpin,
    peer: ServerId,
    (of, late): (AttemptId, bool),
    shared: &Shared,
    hears: &Hears,
    waiting: &Arc<Semaphore>,
) -> anyhow::Result<()> {
    let mut reader = BufReader::with_capacity(64 * 1024, stream);
    let mut keyring = Keyring::of(shared.membership.load_full());
    let mut heavy = Heavy::default();
    let mut begun = View(0);
    loop {
        let frame = timeout(SILENCE_TIMEOUT, read_frame(&mut reader)).await.context("it is silent")??;
        let message: PeerMessage = decode(&frame)?;
        let current = *shared.epoch.borrow();
        keyring.set_epoch(current.epoch);
        keyring.follow(&shared.membership.load());
        if is_old(of, current) && !late {
            anyhow::bail!("the key that it was made with is old by now");
        }
        if concerns_secrets(&message).is_some_and(|about| !of.may_hear(about)) {
            // Unsigned, and perhaps not from whom it seems to be.
            continue;
        }
        if !shared.wants.load().needs(peer, begun, &message) {
            continue;
        }
        match &message {
            PeerMessage::ViewChange(_) | PeerMessage::NewView(..) if !heavy.admit(&frame).await => continue,
            // Thousands of hashes; it may come again because it was asked for again.
            PeerMessage::Dealing(_) => heavy.wait().await,
            _ => {}
        }
        match message.check(peer, &mut keyring) {
            // Whoever asks about shares faster than they can be looked up is asked to ask again.
            Ok(CheckedMessage::AskMasked(ask)) => drop(hears.questions.try_send(ToKeeper::Ask(peer, ask))),
            Ok(CheckedMessage::Masked(masked)) => {
                drop(hears.questions.try_send(ToKeeper::Masked(peer, masked)))
            }
            Ok(message) => {
                if let CheckedMessage::NewView(new_view) = &message
                    && shared.wants.load().begins(new_view.body())
                {
                    begun = begun.max(new_view.body().view);
                }
                let place = Arc::clone(waiting).acquire_owned().await?;
                let input = match of.epoch < current.epoch {
                    true => Input::OldLink(peer, of.epoch, message),
                    false => Input::Message(peer, message),
                };
                if hears.inputs.send((input, place)).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) if error.is_late() => {
                tracing::debug!(%peer, %error, "a message of an epoch that is over")
            }
            Err(error) => {
                metrics::counter!("kds_peer_messages_refused_total", "peer" => peer.to_string()).increment(1);
                if let Some(unsaid) = seldom::now("refused a message", peer) {
                    tracing::warn!(%peer, %error, unsaid, "refused a message");
                }
            }
        }
    }
}

/// Keeps messages that carry much evidence from costing much: a view change of a large cluster can hold
/// thousands of signatures, and a liar sends as many as it likes.
#[derive(Default)]
struct Heavy {
    /// Digest of the last one. Correct servers repeat theirs until the view begins.
    last: Option<Hash>,
    next: Option<Instant>,
}

impl Heavy {
    /// Whether to check a message: not if it is the last one again; and one after the other slowly, which
    /// holds up nobody but its sender.
    async fn admit(&mut self, frame: &[u8]) -> bool {
        let digest = Some(sha256(frame));
        if self.last == digest {
            return false;
        }
        self.wait().await;
        self.last = digest;
        true
    }
    async fn wait(&mut self) {
        if let Some(next) = self.next {
            tokio::time::sleep_until(next).await;
        }
        self.next = Some(Instant::now() + HEAVY_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn evidence_is_checked_once_and_slowly() {
        let mut heavy = Heavy::default();
        let begin = Instant::now();
        assert!(heavy.admit(b"one").await);
        assert!(!heavy.admit(b"one").await);
        for i in 0..3u8 {
            assert!(heavy.admit(&[i]).await);
        }
        assert!(begin.elapsed() >= 3 * HEAVY_INTERVAL);
    }
}

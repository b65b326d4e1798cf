//! Links between servers: mutual TLS 1.3 with keys that the servers' identities have certified for an
//! epoch, length-prefixed frames.
//!
//! A link is made anew in every epoch. What is secret is sent only to a server whose key is of this epoch: an
//! adversary's may be older, and so is that of a server that slept, which is helped to catch up first.
//!
//! Each server dials every other one and sends over that link; what it receives comes over the
//! links that the others dialled. Queues are bounded: to a peer that reads nothing messages are
//! dropped, and the protocol repeats what matters. Signatures are checked here, in the task of the
//! link that they came over, off the replica's thread.

use crate::server::Shared;
use crate::share_store::ToKeeper;
use anyhow::Context as _;
use quorum::Hash;
use quorum::codec::{decode, encode, encode_secret, sha256};
use quorum::ids::{AttemptId, ServerId, View};
use quorum::limits::MAX_FRAME_BYTES;
use quorum::message::{CheckedMessage, PeerMessage};
use quorum::ordering::{Input, Target};
use quorum::signing::{KeyStatement, Keyring};
use rustls::pki_types::ServerName;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, BufWriter};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use zeroize::Zeroizing;

/// Frames that wait for one peer.
const QUEUE: usize = 2_048;
/// Bytes that wait for one peer.
const QUEUE_BYTES: usize = 32 * 1024 * 1024;
/// Frames written before a flush.
const FRAMES_TOGETHER: usize = 64;
/// Handshakes under way at a time.
const HANDSHAKES: usize = 64;
/// Links that one peer may have to this server: the current one, and those that it replaces.
const LINKS_PER_PEER: usize = 4;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// A healthy peer says something every second.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest time between two messages with much evidence from one peer.
const HEAVY_INTERVAL: Duration = Duration::from_millis(100);
/// When a link to a server whose key is old is made anew.
const STALE_RETRY: Duration = Duration::from_secs(2);
/// The same where the key was good a moment ago: the other side is about to have another one.
const RECENT_RETRY: Duration = Duration::from_millis(200);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(1);

/// Zeroized when it is sent or dropped: it may hold contributions to seeds.
#[derive(Clone)]
struct Frame {
    bytes: Arc<Zeroizing<Vec<u8>>>,
    /// Only for one who is certainly the server that it is for.
    secret: bool,
}

/// Where messages to other servers go.
#[derive(Clone)]
pub struct Peers {
    queues: Arc<BTreeMap<ServerId, Queue>>,
}

/// Frames on their way to one peer, bounded in number and in bytes.
struct Queue {
    frames: mpsc::Sender<Frame>,
    bytes: Arc<AtomicUsize>,
}

impl Peers {
    /// Queues a message; drops it where the queue is full.
    pub fn send(&self, target: Target, message: &PeerMessage) {
        let secret = matches!(message, PeerMessage::Dealing(_) | PeerMessage::Masked(_));
        let bytes = match secret {
            true => encode_secret(message),
            false => Zeroizing::new(encode(message)),
        };
        let frame = Frame { bytes: Arc::new(bytes), secret };
        if frame.bytes.len() > MAX_FRAME_BYTES {
            tracing::error!(bytes = frame.bytes.len(), "a message of our own exceeds the frame limit");
            return;
        }
        match target {
            Target::One(peer) => self.queue(peer, frame),
            Target::All => self.queues.keys().for_each(|peer| self.queue(*peer, frame.clone())),
        }
    }
    fn queue(&self, peer: ServerId, frame: Frame) {
        let Some(queue) = self.queues.get(&peer) else { return };
        let bytes = frame.bytes.len();
        let room = queue.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES;
        if !room || queue.frames.try_send(frame).is_err() {
            queue.bytes.fetch_sub(bytes, Ordering::Relaxed);
            metrics::counter!("kds_peer_frames_dropped_total", "peer" => peer.to_string()).increment(1);
        }
    }
}

/// Starts a link to every other server.
pub fn dial_all(inputs: &mpsc::Sender<Input>, shared: &Arc<Shared>) -> Peers {
    let mut queues = BTreeMap::new();
    for peer in shared.manifest.grid().servers().filter(|peer| *peer != shared.id) {
        let (queue, frames) = mpsc::channel(QUEUE);
        let bytes = Arc::new(AtomicUsize::new(0));
        queues.insert(peer, Queue { frames: queue, bytes: Arc::clone(&bytes) });
        let dialler =
            Dialler { peer, inputs: inputs.clone(), shared: Arc::clone(shared), queued_bytes: bytes };
        tokio::spawn(dialler.run(frames));
    }
    Peers { queues: Arc::new(queues) }
}

/// Why a link is given up.
enum Ended<S> {
    /// The server stops.
    Stopped,
    /// An epoch has begun: session keys are renewed.
    Epoch(S),
}

struct Dialler {
    peer: ServerId,
    inputs: mpsc::Sender<Input>,
    shared: Arc<Shared>,
    queued_bytes: Arc<AtomicUsize>,
}

impl Dialler {
    async fn run(self, mut frames: mpsc::Receiver<Frame>) {
        let mut wait = RETRY_FIRST;
        loop {
            match self.connect().await {
                Ok((stream, of)) => {
                    tracing::info!(peer = %self.peer, "link up");
                    wait = RETRY_FIRST;
                    self.shared.peers_connected.fetch_add(1, Ordering::Relaxed);
                    // What queued while the link was down is stale: the protocol says it again.
                    while let Ok(frame) = frames.try_recv() {
                        self.taken(&frame);
                    }
                    let _ = self.inputs.send(Input::Connected(self.peer)).await;
                    let ended = async {
                        let (mut stream, mut of) = (stream, of);
                        // Each epoch has a handshake of its own (design §7). The next link is up before
                        // the last one is closed, so that nothing is lost.
                        while let Ended::Epoch(mut last) = self.forward(stream, of, &mut frames).await? {
                            (stream, of) = self.connect().await?;
                            let _ = timeout(WRITE_TIMEOUT, last.shutdown()).await;
                        }
                        anyhow::Ok(())
                    };
                    let ended = ended.await;
                    self.shared.peers_connected.fetch_sub(1, Ordering::Relaxed);
                    match ended {
                        Ok(()) => return,
                        Err(error) => tracing::info!(peer = %self.peer, %error, "link down"),
                    }
                }
                Err(error) => {
                    tracing::debug!(peer = %self.peer, error = %format!("{error:#}"), "cannot connect")
                }
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = self.discard(&mut frames) => return,
            }
            wait = (wait * 2).min(RETRY_MOST);
        }
    }

    /// Waits until the server stops; drops what is queued meanwhile.
    async fn discard(&self, frames: &mut mpsc::Receiver<Frame>) {
        while let Some(frame) = frames.recv().await {
            self.taken(&frame);
        }
    }
    fn taken(&self, frame: &Frame) {
        self.queued_bytes.fetch_sub(frame.bytes.len(), Ordering::Relaxed);
    }

    /// A link, and what the key of the other side is certified for.
    async fn connect(&self) -> anyhow::Result<(impl AsyncRead + AsyncWrite + Unpin + use<>, AttemptId)> {
        let config = self.shared.links.load().clients.get(&self.peer).cloned();
        let connector = TlsConnector::from(config.context("no such server")?);
        let address = self.shared.membership.load().place(self.peer).context("no such server")?.peer;
        let connecting = async {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
            let stream = connector.connect(name, tcp).await?;
            let key = key_of(&self.shared, stream.get_ref().1).context("it shows no certificate")?;
            anyhow::Ok((stream, key.attempt_id()))
        };
        timeout(HANDSHAKE_TIMEOUT, connecting).await.context("the handshake takes too long")?
    }

    /// Whether the one at the other end, with a key of this epoch, is certainly the server.
    fn may_hear_secrets(&self, of: AttemptId) -> bool {
        self.shared.membership.load().may_hear_secrets(self.peer, of, *self.shared.epoch.borrow())
    }

    /// Sends until the link fails (an error) or the server stops.
    async fn forward<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        of: AttemptId,
        frames: &mut mpsc::Receiver<Frame>,
    ) -> anyhow::Result<Ended<S>> {
        // As soon as this server has a link key of the new epoch, not before.
        let mut own = self.shared.link_epoch.subscribe();
        let current = *self.shared.epoch.borrow();
        let patience = if is_old(of, current) { STALE_RETRY } else { RECENT_RETRY };
        let (stale, retry) = (of < current, Instant::now() + patience);
        let (mut reader, writer) = tokio::io::split(stream);
        let mut writer = BufWriter::with_capacity(64 * 1024, writer);
        // What is on its way may be signed with the last key; a new one is announced before it is used.
        for key in self.shared.voting.load_full().iter() {
            write_frame(&mut writer, &encode(&PeerMessage::Keys(*key))).await?;
        }
        timeout(WRITE_TIMEOUT, writer.flush()).await??;
        let mut together = Vec::with_capacity(FRAMES_TOGETHER);
        let mut nothing = [0; 1];
        loop {
            tokio::select! {
                taken = frames.recv_many(&mut together, FRAMES_TOGETHER) => {
                    if taken == 0 {
                        return Ok(Ended::Stopped);
                    }
                    for frame in together.drain(..) {
                        self.taken(&frame);
                        if !frame.secret || self.may_hear_secrets(of) {
                            write_frame(&mut writer, &frame.bytes).await?;
                        }
                    }
                    timeout(WRITE_TIMEOUT, writer.flush()).await.context("it reads nothing")??;
                }
                // The other side sends nothing on this link: any answer means that it is over.
                _ = reader.read(&mut nothing) => anyhow::bail!("closed by the peer"),
                // It may have a new key meanwhile.
                () = sleep_until(retry), if stale => return Ok(Ended::Epoch(reader.unsplit(writer.into_inner()))),
                Ok(()) = own.changed() => return Ok(Ended::Epoch(reader.unsplit(writer.into_inner()))),
            }
        }
    }
}

/// Whose key the other side of a link has shown, and of which epoch. None if its identity is no longer that
/// server's.
fn key_of(shared: &Shared, tls: &rustls::CommonState) -> Option<KeyStatement> {
    let certificate = tls.peer_certificates().and_then(|chain| chain.first())?;
    let membership = shared.membership.load();
    let key = kds_certs::certified_key(&membership, certificate)?.statement;
    (!membership.is_replaced(key.server, key.epoch, shared.epoch.borrow().epoch)).then_some(key)
}

/// Whether a key may be in the hands of somebody who read its server out some epochs ago.
fn is_old(of: AttemptId, current: AttemptId) -> bool {
    of.epoch.next() < current.epoch
}

async fn write_frame(writer: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> anyhow::Result<()> {
    let write = async {
        writer.write_u32(frame.len() as u32).await?;
        writer.write_all(frame).await
    };
    Ok(timeout(WRITE_TIMEOUT, write).await.context("it reads nothing")??)
}

/// Where what other servers say goes.
#[derive(Clone)]
pub struct Hears {
    /// To the replica.
    pub inputs: mpsc::Sender<Input>,
    /// To the keeper of the shares.
    pub questions: mpsc::Sender<ToKeeper>,
}

/// Accepts links from the servers of the manifest, until it is dropped.
pub async fn listen(listener: TcpListener, shared: Arc<Shared>, hears: Hears) {
    let manifest = Arc::clone(&shared.manifest);
    // Strangers get no further than the handshake, and those are bounded by themselves, so that
    // they take no place from a server.
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let places =
        || -> Vec<_> { manifest.servers.iter().map(|_| Arc::new(Semaphore::new(LINKS_PER_PEER))).collect() };
    // Whoever shows an old key takes no place from the server itself.
    let (links, late_links) = (Arc::new(places()), Arc::new(places()));
    let strangers = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok(handshake) = Arc::clone(&handshakes).acquire_owned().await else { return };
        let (tcp, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: others may close theirs.
                tracing::warn!(%error, "cannot accept a peer");
                sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(Arc::clone(&shared.links.load().server));
        let (shared, hears) = (Arc::clone(&shared), hears.clone());
        let (strangers, links, late_links) =
            (Arc::clone(&strangers), Arc::clone(&links), Arc::clone(&late_links));
        tokio::spawn(async move {
            let _ = tcp.set_nodelay(true);
            let stream = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    // Said often enough to be seen, not so often as to fill the disk.
                    if strangers.fetch_add(1, Ordering::Relaxed).is_multiple_of(100) {
                        tracing::warn!(%address, %error, "refused a peer connection (every 100th is logged)");
                    }
                    return;
                }
                Err(_) => return,
            };
            let Some(key) = key_of(&shared, stream.get_ref().1) else {
                tracing::warn!(%address, "refused a link from a server that was replaced");
                return;
            };
            let peer = key.server;
            drop(handshake);
            let late = is_old(key.attempt_id(), *shared.epoch.borrow());
            let places = if late { &late_links } else { &links };
            let Ok(_link) = Arc::clone(&places[peer.index()]).try_acquire_owned() else {
                tracing::warn!(%peer, "refused one more link");
                return;
            };
            if let Err(error) = receive(stream, peer, (key.attempt_id(), late), shared, hears).await {
                tracing::info!(%peer, error = %format!("{error:#}"), "link from peer closed");
            }
        });
    }
}

async fn receive(
    stream: impl AsyncRead + Unpin,
    peer: ServerId,
    (of, late): (AttemptId, bool),
    shared: Arc<Shared>,
    hears: Hears,
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
        let certain = shared.membership.load().may_hear_secrets(peer, of, current);
        if !certain && concerns_secrets(&message) {
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
                if hears.inputs.send(Input::Message(peer, message)).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) if error.is_late() => {
                tracing::debug!(%peer, %error, "a message of an epoch that is over")
            }
            Err(error) => {
                metrics::counter!("kds_peer_messages_refused_total", "peer" => peer.to_string()).increment(1);
                tracing::warn!(%peer, %error, "refused a message");
            }
        }
    }
}

/// Whether a message is about shares: those are believed for the link that they come over.
fn concerns_secrets(message: &PeerMessage) -> bool {
    matches!(
        message,
        PeerMessage::Dealing(_)
            | PeerMessage::AskDealing(_)
            | PeerMessage::Masked(_)
            | PeerMessage::AskMasked(_)
    )
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

async fn read_frame(reader: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    let length = reader.read_u32().await? as usize;
    anyhow::ensure!(length <= MAX_FRAME_BYTES, "it announces a frame of {length} bytes");
    // Memory grows with what arrives, not with what is announced.
    let mut frame = Zeroizing::new(Vec::with_capacity(length.min(64 * 1024)));
    reader.take(length as u64).read_to_end(&mut frame).await?;
    anyhow::ensure!(frame.len() == length, "it ends in the middle of a frame");
    Ok(frame)
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

    #[tokio::test]
    async fn oversized_and_broken_frames_are_refused_without_memory() {
        let announced = u32::MAX.to_be_bytes();
        assert!(read_frame(&mut announced.as_slice()).await.is_err());
        let half = [&8u32.to_be_bytes()[..], b"half"].concat();
        assert!(read_frame(&mut half.as_slice()).await.is_err());
        let whole = [&4u32.to_be_bytes()[..], b"full"].concat();
        assert_eq!(**read_frame(&mut whole.as_slice()).await.unwrap(), *b"full");
    }
}

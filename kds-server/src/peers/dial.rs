//! Links that this server dials, and what it sends over them.

use super::{Frame, HANDSHAKE_TIMEOUT, WRITE_TIMEOUT, is_old, key_of, write_frame};
use crate::epoch_keys::LinkEra;
use crate::seldom;
use crate::server::Shared;
use anyhow::Context as _;
use quorum::codec::encode;
use quorum::ids::{AttemptId, ServerId};
use quorum::message::PeerMessage;
use quorum::ordering::Input;
use rustls::pki_types::ServerName;
use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufWriter};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Frames written before a flush.
const FRAMES_TOGETHER: usize = 64;
/// Secret frames that wait for a link that may carry them: at the beginning of an attempt all links are made anew.
const HELD: usize = 32;
/// When a link to a server whose key is old is made anew.
const STALE_RETRY: Duration = Duration::from_secs(2);
/// The same where the key was good a moment ago: the other side is about to have another one.
const RECENT_RETRY: Duration = Duration::from_millis(200);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(1);
/// A link that was up for so long was of use: one that ends sooner is no better than none.
const LASTING: Duration = Duration::from_secs(5);

/// A link to a server, and the attempt that its key is certified for.
struct Link {
    stream: TlsStream<TcpStream>,
    of: AttemptId,
    era: LinkEra,
}

/// Why a link is not used any more.
enum Ended {
    /// The server stops.
    Stopped,
    /// There is a newer one.
    Renewed(Box<Link>),
}

/// Sends to one server.
pub(super) struct Dialler {
    pub(super) peer: ServerId,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) shared: Arc<Shared>,
    pub(super) queued_bytes: Arc<AtomicUsize>,
}

impl Dialler {
    pub(super) async fn run(self, mut frames: mpsc::Receiver<Frame>) {
        let mut wait = RETRY_FIRST;
        loop {
            match self.connect().await {
                Ok(link) => {
                    let since = Instant::now();
                    if let Some(unsaid) = seldom::now("link up", self.peer) {
                        tracing::info!(peer = %self.peer, unsaid, "link up");
                    }
                    self.shared.peers_connected.fetch_add(1, Ordering::Relaxed);
                    // What queued while the link was down is stale: the protocol says it again.
                    while let Ok(frame) = frames.try_recv() {
                        self.taken(&frame);
                    }
                    let _ = self.inputs.send(Input::Connected(self.peer)).await;
                    let ended = self.keep_up(link, &mut frames).await;
                    self.shared.peers_connected.fetch_sub(1, Ordering::Relaxed);
                    match ended {
                        Ok(()) => return,
                        Err(error) => {
                            if let Some(unsaid) = seldom::now("link down", self.peer) {
                                tracing::info!(peer = %self.peer, %error, unsaid, "link down");
                            }
                        }
                    }
                    // A handshake alone shows no good will.
                    if since.elapsed() >= LASTING {
                        wait = RETRY_FIRST;
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

    async fn connect(&self) -> anyhow::Result<Link> {
        let erased = self.shared.link_era.borrow().erased;
        let links = self.shared.links.load_full();
        let era = LinkEra { attempt: links.attempt, erased };
        let config = links.clients.get(&self.peer).cloned();
        let connector = TlsConnector::from(config.context("no such server")?);
        let address = self.shared.membership.load().place(self.peer).context("no such server")?.peer;
        let connecting = async {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            let at = tcp.peer_addr()?.ip();
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
            let stream = connector.connect(name, tcp).await?;
            let key = key_of(&self.shared, stream.get_ref().1).context("it shows no certificate")?;
            self.shared.note_neighbour(self.peer, at);
            anyhow::Ok(Link { stream, of: key.attempt_id(), era })
        };
        timeout(HANDSHAKE_TIMEOUT, connecting).await.context("the handshake takes too long")?
    }

    /// Sends until the link fails (an error) or the server stops. There is a handshake when an attempt at an epoch begins,
    /// and when its contributions are erased (design §7); a link is used until the next one is up, so that nothing is
    /// lost.
    async fn keep_up(&self, mut link: Link, frames: &mut mpsc::Receiver<Frame>) -> anyhow::Result<()> {
        let mut held = VecDeque::new();
        while let Ended::Renewed(next) = self.forward(&mut link, frames, &mut held).await? {
            let mut last = std::mem::replace(&mut link, *next);
            let _ = timeout(WRITE_TIMEOUT, last.stream.shutdown()).await;
        }
        Ok(())
    }

    /// The next link, as soon as there is reason for one: this server has another key, or has erased what went over this
    /// link, or the other side's key is older than that.
    async fn renewed(&self, of: AttemptId, made_in: LinkEra) -> Link {
        let mut own = self.shared.link_era.subscribe();
        own.mark_unchanged();
        if made_in != *own.borrow() {
            // It changed while the link was made.
            own.mark_changed();
        }
        let patience = if is_old(of, *self.shared.epoch.borrow()) { STALE_RETRY } else { RECENT_RETRY };
        loop {
            let stale = of < own.borrow().attempt;
            let changed = tokio::select! {
                Ok(()) = own.changed() => true,
                () = sleep(patience), if stale => false,
                else => std::future::pending().await,
            };
            match self.connect().await {
                Ok(next) if changed || next.of > of => return next,
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(peer = %self.peer, error = %format!("{error:#}"), "cannot connect");
                    own.mark_changed();
                    sleep(patience).await;
                }
            }
        }
    }

    async fn forward(
        &self,
        link: &mut Link,
        frames: &mut mpsc::Receiver<Frame>,
        held: &mut VecDeque<Frame>,
    ) -> anyhow::Result<Ended> {
        let of = link.of;
        let mut next = pin!(self.renewed(of, link.era));
        let (mut reader, writer) = tokio::io::split(&mut link.stream);
        let mut writer = BufWriter::with_capacity(64 * 1024, writer);
        // What is on its way may be signed with the last key; a new one is announced before it is used.
        for key in self.shared.voting.load_full().iter() {
            write_frame(&mut writer, &encode(&PeerMessage::Keys(*key))).await?;
        }
        self.forget(held);
        let waited: Vec<_> = held.drain(..).collect();
        for frame in waited {
            self.write(&mut writer, of, frame, held).await?;
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
                    self.forget(held);
                    for frame in together.drain(..) {
                        self.taken(&frame);
                        self.write(&mut writer, of, frame, held).await?;
                    }
                    timeout(WRITE_TIMEOUT, writer.flush()).await.context("it reads nothing")??;
                }
                // The other side sends nothing on this link: any answer means that it is over.
                _ = reader.read(&mut nothing) => anyhow::bail!("closed by the peer"),
                next = &mut next => return Ok(Ended::Renewed(Box::new(next))),
            }
        }
    }

    /// Contributions to an epoch that has begun are about to be erased; whoever lacks some asks for them.
    fn forget(&self, held: &mut VecDeque<Frame>) {
        let current = *self.shared.epoch.borrow();
        held.retain(|frame| frame.secret > Some(current));
    }

    /// Writes a frame, or keeps it for a link that may carry it.
    async fn write(
        &self,
        writer: &mut (impl AsyncWrite + Unpin),
        of: AttemptId,
        frame: Frame,
        held: &mut VecDeque<Frame>,
    ) -> anyhow::Result<()> {
        if frame.secret.is_none_or(|about| of.may_hear(about)) {
            return write_frame(writer, &frame.bytes).await;
        }
        held.push_back(frame);
        if held.len() > HELD {
            held.pop_front();
        }
        Ok(())
    }
}

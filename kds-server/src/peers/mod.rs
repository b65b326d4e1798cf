//! Links between servers: mutual TLS 1.3 with keys that the servers' identities have certified for an
//! attempt at an epoch, length-prefixed frames.
//!
//! A link is made anew with every attempt at an epoch, under keys that were drawn when it had begun (design §7, *Fresh
//! channels*). What is secret goes only over a link whose keys are of the attempt that it belongs to, or of a later
//! one: an adversary may have older keys, and so has a server that slept, which is helped to catch up first.
//!
//! Each server dials every other one and sends over that link ([`dial`]); what it receives comes over the
//! links that the others dialled ([`mod@listen`]). Queues are bounded: to a peer that reads nothing messages are
//! dropped, and the protocol repeats what matters. Signatures are checked here, in the task of the
//! link that they came over, off the replica's thread.

mod dial;
mod listen;

use crate::server::Shared;
use anyhow::Context as _;
use dial::Dialler;
pub use listen::{FromPeers, Hears, listen};
use quorum::codec::{encode, encode_secret};
use quorum::ids::{AttemptId, ServerId};
use quorum::limits::MAX_FRAME_BYTES;
use quorum::message::PeerMessage;
use quorum::ordering::{Input, Target};
use quorum::signing::KeyStatement;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use zeroize::Zeroizing;

/// Frames that wait for one peer.
const QUEUE: usize = 2_048;
/// Bytes that wait for one peer.
const QUEUE_BYTES: usize = 32 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Zeroized when it is sent or dropped: it may hold contributions to seeds.
#[derive(Clone)]
struct Frame {
    bytes: Arc<Zeroizing<Vec<u8>>>,
    /// Of which attempt, if it is secret: only for one who is certainly the server that it is for.
    secret: Option<AttemptId>,
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
        let secret = match message {
            PeerMessage::Dealing(_) | PeerMessage::Masked(_) => concerns_secrets(message),
            _ => None,
        };
        let bytes = match secret {
            Some(_) => encode_secret(message),
            None => Zeroizing::new(encode(message)),
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

/// Which attempt a message about shares belongs to: those are believed for the link that they come over.
fn concerns_secrets(message: &PeerMessage) -> Option<AttemptId> {
    match message {
        PeerMessage::Dealing(handed) => Some(handed.attempt),
        PeerMessage::AskDealing(wanted) => Some(wanted.attempt),
        PeerMessage::Masked(masked) => Some(masked.attempt),
        PeerMessage::AskMasked(ask) => Some(ask.attempt),
        _ => None,
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
    async fn oversized_and_broken_frames_are_refused_without_memory() {
        let announced = u32::MAX.to_be_bytes();
        assert!(read_frame(&mut announced.as_slice()).await.is_err());
        let half = [&8u32.to_be_bytes()[..], b"half"].concat();
        assert!(read_frame(&mut half.as_slice()).await.is_err());
        let whole = [&4u32.to_be_bytes()[..], b"full"].concat();
        assert_eq!(**read_frame(&mut whole.as_slice()).await.unwrap(), *b"full");
    }
}

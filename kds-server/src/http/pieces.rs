//! Answers as they go out: encoded in pieces, none of which is large and each of which is freed when it has been read;
//! and counted while they wait for their reader.

use crate::places::Place;
use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use memmap2::MmapMut;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::{io, iter};

/// What an answer with its proof and certificate has, about: its buffer need not grow.
const TYPICAL_BYTES: usize = 6 * 1024;
/// What is in one buffer of the heap at most.
const FIRST_BYTES: usize = 16 * 1024;
/// Further pieces have pages of their own: those go back to the system when the piece has been read, where buffers of the
/// heap would stay below whatever was allocated after them.
const MAPPED_BYTES: usize = 256 * 1024;
/// What each connection may leave unread without its being counted.
pub(super) const UNCOUNTED_BYTES: usize = 64 * 1024;

/// What was written, in pieces.
pub(super) struct Pieces {
    first: Vec<u8>,
    full: VecDeque<Mapped>,
    last: Option<Mapped>,
}

struct Mapped {
    pages: MmapMut,
    length: usize,
}

impl Mapped {
    fn new() -> io::Result<Self> {
        Ok(Self { pages: MmapMut::map_anon(MAPPED_BYTES)?, length: 0 })
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.pages[..self.length]
    }
}

impl Pieces {
    pub(super) fn new() -> Self {
        Self { first: Vec::with_capacity(TYPICAL_BYTES), full: VecDeque::new(), last: None }
    }
    pub(super) fn into_body(self) -> Body {
        let Self { first, mut full, last } = self;
        full.extend(last);
        if full.is_empty() {
            return first.into();
        }
        let mapped = full.into_iter().map(Bytes::from_owner);
        let pieces: VecDeque<_> = iter::once(first.into()).chain(mapped).collect();
        let left = pieces.iter().map(|piece| piece.len() as u64).sum();
        Body::new(Outgoing { pieces, left })
    }
}

impl io::Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.last.is_none() && self.first.len() < FIRST_BYTES {
            let taken = bytes.len().min(FIRST_BYTES - self.first.len());
            self.first.extend_from_slice(&bytes[..taken]);
            return Ok(taken);
        }
        let last = match &mut self.last {
            Some(last) if last.length < MAPPED_BYTES => last,
            last => {
                self.full.extend(last.take());
                last.insert(Mapped::new()?)
            }
        };
        let taken = bytes.len().min(MAPPED_BYTES - last.length);
        last.pages[last.length..last.length + taken].copy_from_slice(&bytes[..taken]);
        last.length += taken;
        Ok(taken)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Outgoing {
    pieces: VecDeque<Bytes>,
    left: u64,
}

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.pop_front();
        self.left -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }
    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }
    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// An answer that has a place among what was not read yet, until it has been.
pub(super) struct Counted {
    pub(super) body: Body,
    pub(super) _place: Place<IpAddr>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;
    use std::io::Write as _;

    #[tokio::test]
    async fn what_is_written_comes_out_in_pieces_of_which_none_is_large() {
        for length in [0, 5, FIRST_BYTES, FIRST_BYTES + 1, FIRST_BYTES + MAPPED_BYTES, 3 * MAPPED_BYTES + 17]
        {
            let text: Vec<_> = (0..length).map(|i| (i % 251) as u8).collect();
            let mut pieces = Pieces::new();
            for part in text.chunks(1_000) {
                pieces.write_all(part).unwrap();
            }
            let mut body = pieces.into_body();
            assert_eq!(body.size_hint().exact(), Some(length as u64));
            let mut read = Vec::new();
            while let Some(frame) = body.frame().await {
                let piece = frame.unwrap().into_data().unwrap();
                assert!((1..=MAPPED_BYTES).contains(&piece.len()));
                read.extend_from_slice(&piece);
                assert_eq!(body.size_hint().exact(), Some((length - read.len()) as u64));
            }
            assert_eq!(read, text);
        }
    }
}

//! Answers as they go out: encoded in pieces, none of which is large and each of which is freed when it has been read;
//! and counted while they wait for their reader.

use crate::places::Place;
use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

/// What an answer with its proof and certificate has, about: its buffer need not grow.
const TYPICAL_BYTES: usize = 6 * 1024;
/// What a piece has at most, and what each connection may leave unread without its being counted.
pub(super) const PIECE_BYTES: usize = 64 * 1024;

/// What was written, in pieces.
pub(super) struct Pieces {
    full: VecDeque<Bytes>,
    last: Vec<u8>,
}

impl Pieces {
    pub(super) fn new() -> Self {
        Self { full: VecDeque::new(), last: Vec::with_capacity(TYPICAL_BYTES) }
    }
    pub(super) fn into_body(mut self) -> Body {
        if self.full.is_empty() {
            return self.last.into();
        }
        self.full.push_back(self.last.into());
        let left = self.full.iter().map(|piece| piece.len() as u64).sum();
        Body::new(Outgoing { pieces: self.full, left })
    }
}

impl io::Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.last.len() >= PIECE_BYTES {
            let full = std::mem::replace(&mut self.last, Vec::with_capacity(PIECE_BYTES));
            self.full.push_back(full.into());
        }
        let taken = bytes.len().min(PIECE_BYTES - self.last.len());
        self.last.extend_from_slice(&bytes[..taken]);
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
        for length in [0, 5, PIECE_BYTES, PIECE_BYTES + 1, 10 * PIECE_BYTES + 17] {
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
                assert!(piece.len() <= PIECE_BYTES);
                read.extend_from_slice(&piece);
                assert_eq!(body.size_hint().exact(), Some((length - read.len()) as u64));
            }
            assert_eq!(read, text);
        }
    }
}

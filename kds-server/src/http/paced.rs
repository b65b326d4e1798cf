//! A connection whose other end has to read what it asked for. Time in which it takes nothing is limited, and is earned
//! back by taking enough: so neither silence nor a byte now and then holds a connection and its answer for long.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// How long all that a client did not read may wait for it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes that earn a second of it back.
const BYTES_PER_SECOND: u32 = 32 * 1024;

/// See the module.
pub(super) struct Paced<T> {
    inner: T,
    left: Duration,
    /// Nothing more was taken since then, and how much of it is borne.
    blocked: Option<(Instant, Pin<Box<Sleep>>)>,
    when_slow: fn(),
}

impl<T> Paced<T> {
    /// `when_slow` is called before this ends with an error for that.
    pub(super) fn new(inner: T, when_slow: fn()) -> Self {
        Self { inner, left: PATIENCE, blocked: None, when_slow }
    }
    fn slow<O>(&self) -> Poll<io::Result<O>> {
        (self.when_slow)();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the other end reads too slowly")))
    }
    fn written(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Pending => {
                let now = Instant::now();
                let left = self.left;
                let (_, until) = self.blocked.get_or_insert_with(|| (now, Box::pin(sleep_until(now + left))));
                match until.as_mut().poll(context) {
                    Poll::Ready(()) => self.slow(),
                    Poll::Pending => Poll::Pending,
                }
            }
            Poll::Ready(Ok(bytes)) => {
                if let Some((since, _)) = self.blocked.take() {
                    self.left = self.left.saturating_sub(since.elapsed());
                }
                let earned = Duration::from_secs(bytes as u64) / BYTES_PER_SECOND;
                self.left = (self.left + earned).min(PATIENCE);
                Poll::Ready(Ok(bytes))
            }
            error => error,
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Paced<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, buffer);
        self.written(context, written)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, buffers);
        self.written(context, written)
    }
    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Paced<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    /// Writes to one who reads so many bytes at a time with so long a pause, and has a hundredth of the usual patience;
    /// gives after how long it was cut, if it was.
    async fn reads(bytes: usize, pause: Duration) -> Option<Duration> {
        let (near, mut far) = duplex(1_024);
        let began = Instant::now();
        let mut paced = Paced::new(near, || {});
        paced.left = Duration::from_millis(200);
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; bytes];
            while let Ok(1..) = far.read(&mut buffer).await {
                tokio::time::sleep(pause).await;
            }
        });
        let text = vec![0; 64 * 1_024];
        let written = tokio::time::timeout(Duration::from_secs(5), paced.write_all(&text)).await;
        reading.abort();
        written.is_ok_and(|written| written.is_err()).then(|| began.elapsed())
    }

    #[tokio::test]
    async fn who_reads_a_byte_now_and_then_is_cut_and_who_reads_on_is_not() {
        let (nothing, little, enough) = tokio::join!(
            reads(1, Duration::from_secs(60)),
            reads(1, Duration::from_millis(20)),
            reads(4_096, Duration::from_millis(2)),
        );
        for cut in [nothing, little] {
            let cut = cut.expect("cut");
            assert!(cut >= Duration::from_millis(200) && cut < Duration::from_secs(5), "{cut:?}");
        }
        assert_eq!(enough, None);
    }
}

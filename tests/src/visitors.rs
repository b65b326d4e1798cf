//! Visitors of a server's port from addresses of one's choice: this machine has all of 127.0.0.0/8.

use crate::Cluster;
use anyhow::Context as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Bytes that a visitor's kernel takes for it, about: few, so that what it does not read stays with the server.
const RECEIVE_BUFFER_BYTES: u32 = 4 * 1024;

/// The n-th address that no honest client of a test has.
pub fn address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 0, 1, 1).to_bits() + n as u32)
}

/// One server's port for clients.
#[derive(Clone)]
pub struct Port {
    at: SocketAddr,
    tls: TlsConnector,
}

impl Port {
    /// Where a server of a cluster answers clients.
    pub fn of(cluster: &Cluster, server: usize) -> anyhow::Result<Self> {
        let entry = &cluster.manifest.servers[server];
        let at = entry.url.strip_prefix("https://").context("an URL")?.parse()?;
        let tls = TlsConnector::from(Arc::new(kds_certs::https_client(&entry.certificate)?));
        Ok(Self { at, tls })
    }
    /// A connection that says nothing.
    pub async fn connect(&self, from: Ipv4Addr) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        socket.bind((from, 0).into())?;
        socket.connect(self.at).await
    }
    /// One that has shaken hands.
    pub async fn enter(&self, from: Ipv4Addr) -> std::io::Result<TlsStream<TcpStream>> {
        let name = "localhost".try_into().map_err(std::io::Error::other)?;
        self.tls.connect(name, self.connect(from).await?).await
    }
    /// One that asks for something and has not read the answer.
    pub async fn ask(&self, from: Ipv4Addr, path: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let mut stream = self.enter(from).await?;
        say(&mut stream, &get(path)).await?;
        Ok(stream)
    }
}

/// A request for a path.
pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

/// Sends text.
pub async fn say(stream: &mut (impl AsyncWrite + Unpin), text: &str) -> std::io::Result<()> {
    stream.write_all(text.as_bytes()).await?;
    stream.flush().await
}

/// Reads an answer's head; gives its status and all of it.
pub async fn head(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u16, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| std::io::Error::other(head.clone()))?, head))
}

/// Reads an answer whose length it tells; gives its status, its head and its body.
pub async fn answer(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u16, String, String)> {
    let (status, head) = head(stream).await?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.ok_or_else(|| std::io::Error::other(head.clone()))?];
    stream.read_exact(&mut body).await?;
    Ok((status, head, String::from_utf8_lossy(&body).into_owned()))
}

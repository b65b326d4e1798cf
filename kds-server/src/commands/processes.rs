//! The servers of a development cluster, each as its own process.

use crate::logs;
use anyhow::{Context as _, bail};
use kds_client::Client;
use quorum::ServerId;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Server processes; stopped when dropped.
pub struct Processes {
    dir: PathBuf,
    children: Vec<Option<Child>>,
}

impl Processes {
    /// Starts every server of a folder that `init` wrote.
    pub fn start(dir: &Path, n: usize) -> anyhow::Result<Self> {
        let mut processes = Self { dir: dir.to_path_buf(), children: (0..n).map(|_| None).collect() };
        for i in 0..n {
            processes.start_one(i)?;
        }
        Ok(processes)
    }
    /// Starts one server: its log and process id stand in its folder.
    pub fn start_one(&mut self, i: usize) -> anyhow::Result<()> {
        let folder = self.dir.join(format!("server-{i}"));
        let log = File::options().create(true).append(true).open(folder.join("server.log"))?;
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut command = Command::new(program);
        logs::hand_on(&mut command);
        let child = command
            .arg("run")
            .arg("--config")
            .arg(folder.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start server {i}"))?;
        fs::write(folder.join("server.pid"), format!("{}\n", child.id()))?;
        self.children[i] = Some(child);
        Ok(())
    }
    /// kill −9.
    pub fn kill(&mut self, i: usize) -> anyhow::Result<()> {
        if let Some(mut child) = self.children[i].take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
    /// Waits until every running server answers and has a fresh certificate.
    pub async fn ready(&mut self, client: &Client, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        for i in 0..self.children.len() {
            while self.children[i].is_some() && !is_ready(client, i).await {
                let exited = match &mut self.children[i] {
                    Some(child) => child.try_wait()?,
                    None => None,
                };
                if let Some(status) = exited {
                    bail!("server {i} ended with {status}; its last words:\n{}", self.last_words(i));
                }
                if Instant::now() >= deadline {
                    bail!(
                        "server {i} is not ready after {patience:?}; its last words:\n{}",
                        self.last_words(i)
                    );
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }
    fn last_words(&self, i: usize) -> String {
        let log = fs::read_to_string(self.dir.join(format!("server-{i}/server.log"))).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
    /// Asks all to stop, waits, and kills what does not.
    pub fn stop(&mut self) {
        for child in self.children.iter().flatten() {
            // SIGTERM without unsafe code or another crate.
            let _ = Command::new("kill").arg(child.id().to_string()).stderr(Stdio::null()).status();
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        for child in self.children.iter_mut() {
            let Some(mut running) = child.take() else { continue };
            while Instant::now() < deadline && matches!(running.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = running.kill();
            let _ = running.wait();
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn is_ready(client: &Client, i: usize) -> bool {
    let Some(link) = client.link(ServerId(i as u8)) else { return false };
    matches!(link.send("GET", "/readyz", vec![]).await, Ok((200, _)))
}

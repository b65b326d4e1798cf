//! Talks to the signer: the process that has this server's identity key, so that this one has not.
//!
//! Over a Unix socket, one question and one answer at a time, each a length and postcard. Where the
//! configuration names no socket the server starts a signer of its own, as its child: that keeps the key out
//! of this process's memory. To keep it from this process's user too, run `kds-server signer` under another
//! one (docs/operations.md).

use crate::config::{FROM_BACKUP, IDENTITY_KEY, SIGNER_STATE};
use crate::{files, logs, seldom};
use anyhow::{Context as _, bail, ensure};
use kds_client::keystore::{self, Passphrase, SecretKind};
use kds_client::manifest_file;
use quorum::ServerId;
use quorum::codec::{decode, encode, sha256};
use quorum::limits::CHANGES_TOGETHER;
use quorum::manifest::Manifest;
use quorum::membership::Membership;
use quorum::signer::{Ask, Counter, Refused, Signer};
use quorum::signing::KeyCertificate;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

/// A question with its evidence, or an answer: certificates of up to 225 servers.
const MAX_FRAME: usize = 256 * 1024;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);
/// Times that a server tries to reach its signer, at its start and later, and how long it waits in between.
const TRIES: u32 = 20;
const RETRY: Duration = Duration::from_millis(250);

type Answer = Result<(Counter, Vec<KeyCertificate>), Refused>;

async fn write_frame(stream: &mut UnixStream, bytes: &[u8]) -> anyhow::Result<()> {
    stream.write_u32(bytes.len() as u32).await?;
    Ok(stream.write_all(bytes).await?)
}
async fn read_frame(stream: &mut UnixStream) -> anyhow::Result<Vec<u8>> {
    let length = stream.read_u32().await? as usize;
    ensure!(length <= MAX_FRAME, "a frame of {length} bytes");
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// A server's side.
pub struct SignerLink {
    socket: PathBuf,
    child: Option<Mutex<Child>>,
    /// Changes of the membership that the signer was shown.
    told: AtomicUsize,
}

impl SignerLink {
    /// To a signer that somebody else runs.
    pub fn to(socket: PathBuf) -> Self {
        Self { socket, child: None, told: AtomicUsize::new(0) }
    }
    /// Starts one, which ends with this process.
    pub async fn start(
        manifest: &Path,
        id: ServerId,
        folder: &Path,
        passphrase: Option<&Passphrase>,
    ) -> anyhow::Result<Self> {
        let socket = folder.join("signer.sock");
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut command = Command::new(program);
        logs::hand_on(command.as_std_mut());
        command.args(["signer", "--until-closed", "--server", &id.to_string(), "--manifest"]).arg(manifest);
        command.arg("--folder").arg(folder).arg("--socket").arg(&socket);
        if let Some(passphrase) = passphrase {
            command.env("KDS_PASSPHRASE", passphrase.expose());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("cannot start the signer")?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut said).await?;
        }
        if said.trim() != "ready" {
            bail!("this server's signer did not start: it says why above");
        }
        Ok(Self { socket, child: Some(Mutex::new(child)), told: AtomicUsize::new(0) })
    }

    /// Has keys certified, after showing the signer what it lacks of the membership; says what it remembers now.
    pub async fn certify(
        &self,
        ask: Ask,
        membership: &Membership,
    ) -> anyhow::Result<(Counter, Vec<KeyCertificate>)> {
        let told = self.told.load(Ordering::Relaxed);
        match self.certify_after(told, ask.clone(), membership).await? {
            // It was started again since, and has forgotten.
            Err(Refused::Evidence | Refused::NotIdentity { .. }) if told > 0 => {
                self.certify_after(0, ask, membership).await?.context("the signer refuses")
            }
            answer => answer.context("the signer refuses"),
        }
    }

    async fn certify_after(&self, told: usize, ask: Ask, membership: &Membership) -> anyhow::Result<Answer> {
        let mut untold = membership.proofs().get(told..).unwrap_or_default();
        while untold.len() > CHANGES_TOGETHER {
            let (some, others) = untold.split_at(CHANGES_TOGETHER);
            if let Err(refused) = self.exchange(&Ask { changes: some.to_vec(), ..Ask::default() }).await? {
                return Ok(Err(refused));
            }
            untold = others;
        }
        let answer = self.exchange(&Ask { changes: untold.to_vec(), ..ask }).await?;
        if answer.is_ok() {
            self.told.store(membership.proofs().len(), Ordering::Relaxed);
        }
        Ok(answer)
    }

    /// Whether it answers at all; an error if it was this server's own child, and has ended.
    pub async fn answers(&self) -> anyhow::Result<bool> {
        self.child_lives().await?;
        Ok(timeout(PATIENCE, self.ask(&Ask::default())).await.is_ok_and(|answer| answer.is_ok()))
    }
    async fn child_lives(&self) -> anyhow::Result<()> {
        if let Some(child) = &self.child
            && let Some(status) = child.lock().await.try_wait()?
        {
            bail!("this server's signer ended ({status}): start the server again");
        }
        Ok(())
    }

    async fn exchange(&self, ask: &Ask) -> anyhow::Result<Answer> {
        let mut tries = 0;
        loop {
            tries += 1;
            match timeout(PATIENCE, self.ask(ask)).await.map_err(anyhow::Error::from).flatten() {
                Ok(answer) => return Ok(answer),
                Err(error) if tries >= TRIES => {
                    return Err(error.context(format!(
                        "the signer does not answer at {}\n  start it with `kds-server signer`, under a user of its own",
                        self.socket.display()
                    )));
                }
                Err(_) => sleep(RETRY).await,
            }
            self.child_lives().await?;
        }
    }

    async fn ask(&self, ask: &Ask) -> anyhow::Result<Answer> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        write_frame(&mut stream, &encode(ask)).await?;
        Ok(decode(&read_frame(&mut stream).await?)?)
    }
}

/// The signer's side: what it keeps, and where.
pub struct Keeper {
    signer: Signer,
    state: PathBuf,
    /// Whose processes may ask.
    users: Vec<u32>,
    _lock: File,
}

impl Keeper {
    /// Reads the identity key and the counter.
    pub async fn open(
        manifest: &Path,
        id: ServerId,
        folder: &Path,
        users: Vec<u32>,
        passphrase: Option<&Passphrase>,
    ) -> anyhow::Result<Self> {
        let manifest: Arc<Manifest> = manifest_file::read(manifest)?;
        manifest.server(id).with_context(|| format!("server {id} is not in the manifest"))?;
        let path = folder.join(IDENTITY_KEY);
        let identity = keystore::read_signing_key(&path, SecretKind::IdentityKey, passphrase);
        let identity = identity.with_context(|| format!("no identity\n  {FROM_BACKUP}"))?;
        let lock = lock(&folder.join("signer.lock")).await?;
        let state = folder.join(SIGNER_STATE);
        let counter = match std::fs::read(&state) {
            Ok(bytes) => remembered(&bytes).with_context(|| {
                format!(
                    "{} is damaged\n  if this server's database is the one that it used last, move the file away: \
                     the signer counts on from the clock. If that is lost too, move kds.db* away with it",
                    state.display()
                )
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Serial numbers are drawn far more slowly than milliseconds pass, so none comes again.
                Counter { serial: crate::driver::now().0, ..Counter::default() }
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", state.display())),
        };
        let signer = Signer::new(Membership::genesis(manifest), id, identity, counter);
        Ok(Self { signer, state, users, _lock: lock })
    }

    /// Answers until the listener fails.
    pub async fn serve(mut self, listener: UnixListener) -> anyhow::Result<()> {
        loop {
            let (mut stream, _) = listener.accept().await?;
            let user = stream.peer_cred()?.uid();
            if !self.users.contains(&user) {
                if let Some(unsaid) = seldom::now("another user", None) {
                    tracing::warn!(
                        user,
                        unsaid,
                        "refused to answer a process of another user; see --allow-uid"
                    );
                }
                continue;
            }
            match timeout(PATIENCE, self.answer(&mut stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = %format!("{error:#}"), "a question was not answered")
                }
                Err(_) => tracing::warn!("a question took too long"),
            }
        }
    }

    async fn answer(&mut self, stream: &mut UnixStream) -> anyhow::Result<()> {
        let ask: Ask = decode(&read_frame(stream).await?)?;
        let before = self.signer.counter();
        let mut answer: Answer = self.signer.certify(&ask);
        // What it was shown is remembered whatever it answers.
        if self.signer.counter() != before
            && let Err(error) = self.remember(&self.signer.counter())
        {
            tracing::error!(error = %format!("{error:#}"), "nothing is certified that is not remembered");
            answer = Err(Refused::NotRemembered);
        }
        if let Err(refused) = &answer {
            tracing::info!(%refused, epoch = %ask.attempt, "refused to certify keys");
        }
        write_frame(stream, &encode(&answer)).await
    }

    /// Makes the counter durable, before anything that it counts leaves.
    fn remember(&self, counter: &Counter) -> anyhow::Result<()> {
        let temporary = self.state.with_extension("new");
        let written = files::replace(&self.state, &temporary, &to_remember(counter)?);
        written.with_context(|| format!("cannot write {}", self.state.display()))
    }
}

/// The counter as it stands in its file, with a digest: one that went back would be believed.
fn to_remember(counter: &Counter) -> anyhow::Result<Vec<u8>> {
    let mut value = serde_json::to_value(counter)?;
    let digest = sha256(value.to_string().as_bytes());
    value["digest"] = digest.to_string().into();
    Ok(value.to_string().into_bytes())
}
fn remembered(bytes: &[u8]) -> anyhow::Result<Counter> {
    let mut value: serde_json::Map<_, _> = serde_json::from_slice(bytes)?;
    value.remove("digest");
    let counter = serde_json::from_value(value.into())?;
    ensure!(to_remember(&counter)? == bytes, "its digest is another one");
    Ok(counter)
}

/// Listens at a path, in place of a signer that has ended.
pub fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("cannot replace {}", socket.display()));
    }
    let listener = UnixListener::bind(socket).with_context(|| {
        format!("cannot listen at {} (a socket's path has at most 107 bytes)", socket.display())
    })?;
    // Who may ask is decided by who asks, not by the file's mode.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// One signer for an identity: two would count by themselves. The one before may still be ending.
async fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    for _ in 0..TRIES {
        if file.try_lock().is_ok() {
            return Ok(file);
        }
        sleep(RETRY).await;
    }
    bail!("another signer has this identity already (it holds {})", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_comes_back_and_no_damaged_one_is_believed() {
        let counter = Counter { serial: 1_700_000_000_123, voting: 17, ..Counter::default() };
        let bytes = to_remember(&counter).unwrap();
        assert_eq!(remembered(&bytes).unwrap(), counter);
        for i in 0..bytes.len() {
            assert!(remembered(&bytes[..i]).is_err(), "cut at {i}");
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[i] ^= 1 << bit;
                assert!(remembered(&flipped).is_err(), "byte {i}, bit {bit}");
            }
        }
    }
}

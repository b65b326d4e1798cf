//! `demo`: everything once, on a fresh cluster in a temporary folder.

use super::dev::picture;
use super::init::NewCluster;
use super::processes::Processes;
use anyhow::{Context as _, ensure};
use clap::Args as ClapArgs;
use kds_client::keystore::{self, SecretKind};
use kds_client::{Client, ExitStatus, LookupOptions, Options, keys, manifest_file};
use quorum::Thresholds;
use quorum::record::{Entry, KeyMaterial, Name};
use quorum::request::Reader;
use quorum::signing::SigningKey;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// Show the main job once: register, look up, deposit, lose servers, do it all again
#[derive(ClapArgs)]
pub struct Args {
    /// Servers: 4, 9, 16, …
    #[arg(long, default_value_t = 9)]
    servers: usize,
}

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(demo(args))
}

struct Demo {
    client: Client,
    administrator: SigningKey,
    started: Instant,
}

async fn demo(args: &Args) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let dir = folder.path();
    let thresholds = Thresholds::plan(args.servers, None, None)?;
    println!("A cluster of {} servers, each its own process, in {}\n", thresholds.servers, dir.display());
    let hosts = &[IpAddr::V4(Ipv4Addr::LOCALHOST)];
    NewCluster {
        thresholds,
        dir,
        base_port: None,
        hosts,
        epoch_seconds: 30,
        administrators: vec![],
        administrators_needed: 1,
    }
    .write()?;
    let manifest = manifest_file::read(&dir.join("manifest.toml"))?;
    let client = Client::new(manifest.clone(), Options::default())?;
    let administrator = keystore::read_signing_key(
        &dir.join("admin.key"),
        SecretKind::SigningKey,
        keystore::Passphrase::from_environment().as_ref(),
    )?;
    let demo = Demo { client: client.clone(), administrator, started: Instant::now() };
    let mut processes = Processes::start(dir, thresholds.n())?;
    processes.ready(&client, Duration::from_secs(60)).await?;
    println!("{}", picture(&manifest));
    demo.say("all servers answer");

    demo.everything("first").await?;

    // Servers of the last column, never the primary: rows of others stay whole for reads, and the
    // other columns for writes. As many as may fail at once.
    let side = usize::from(thresholds.side);
    let victims: Vec<usize> = (0..thresholds.n())
        .rev()
        .filter(|i| i % side == side - 1)
        .take(thresholds.f().min(side - 1))
        .collect();
    for victim in &victims {
        processes.kill(*victim)?;
    }
    println!(
        "\nkill -9 of server(s) {victims:?}: {} of {} are left\n",
        thresholds.n() - victims.len(),
        thresholds.n()
    );

    demo.check("first").await?;
    demo.everything("second").await?;

    println!("\nthey start again and fetch what they missed\n");
    for victim in &victims {
        processes.start_one(*victim)?;
    }
    processes.ready(&client, Duration::from_secs(60)).await?;
    demo.say("all servers answer");
    demo.check("first").await?;
    demo.check("second").await?;

    let primary = client
        .server_status(quorum::ServerId(1))
        .await
        .map_err(anyhow::Error::msg)?
        .view
        .primary(thresholds.n());
    processes.kill(primary.index())?;
    println!("\nkill -9 of the primary, server {primary}: the others agree on another one\n");
    demo.everything("third").await?;

    processes.stop();
    println!("\nDone. Now try it yourself: kds-server dev");
    Ok(())
}

fn entry(keys: Vec<KeyMaterial>, owner: Option<&SigningKey>) -> Entry {
    Entry {
        keys,
        owner: owner.map(SigningKey::public),
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: BTreeMap::new(),
    }
}

impl Demo {
    fn say(&self, text: &str) {
        println!("{:7.3} s  {text}", self.started.elapsed().as_secs_f64());
    }

    /// Registers real keys, looks them up, rotates, revokes, deposits a secret and recovers it.
    async fn everything(&self, round: &str) -> anyhow::Result<()> {
        let owner = keystore::generate();
        let ssh = keys::openssh_ed25519(&keystore::generate().public());
        let year = i32::from(jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).year());
        let certificate = kds_certs::generate("demo service", &["service.example".into()], year)?;
        let x509 = keys::parse(certificate.certificate_pem.as_bytes())?;
        for (who, key, owner) in [("alice", &ssh, Some(&owner)), ("service", &x509, None)] {
            let name = Name::new(format!("{who}@{round}"))?;
            let written = self
                .client
                .register(&self.administrator, name.clone(), entry(vec![key.clone()], owner))
                .await?;
            let seen = if written.complete { "complete on the grid" } else { "committed" };
            self.say(&format!("registered {name} ({}, {}): {seen}", key.algorithm, keys::fingerprint(key)));
            let found = self.client.lookup(&name, &LookupOptions::default()).await?;
            let record = found.record.context("a registered name is found")?;
            ensure!(record.entry.keys == [key.clone()], "the key came back changed");
            self.say(&format!(
                "looked it up: {:?} answered, {} signatures",
                ids(&found.access.answered),
                found.answer.certificate.votes.len()
            ));
        }

        let alice = Name::new(format!("alice@{round}"))?;
        let new_key = keys::openssh_ed25519(&keystore::generate().public());
        self.client.rotate(&owner, alice.clone(), 1, entry(vec![new_key.clone()], Some(&owner))).await?;
        let found = self.client.lookup(&alice, &LookupOptions::default()).await?;
        ensure!(found.record.is_some_and(|record| record.version == 2 && record.entry.keys == [new_key]));
        self.say(&format!("{alice} rotated her own key: version 2"));

        let stranger = keystore::generate();
        let refused = self.client.rotate(&stranger, alice.clone(), 2, entry(vec![ssh], None)).await;
        ensure!(refused.is_err_and(|error| error.exit_status() == ExitStatus::Refused));
        self.say("a stranger's attempt to replace it was refused");

        let absent =
            self.client.lookup(&Name::new(format!("nobody@{round}"))?, &LookupOptions::default()).await?;
        ensure!(absent.record.is_none());
        self.say("a name that does not exist: its absence was proved");

        let secret = Name::new(format!("secret@{round}"))?;
        let reader = Reader::Name(alice);
        self.client.put_secret(&self.administrator, &secret, SECRET, &[reader], false, false).await?;
        let t = self.client.manifest().thresholds;
        self.say(&format!(
            "deposited a secret: any {} servers give it back, {} learn nothing",
            t.threshold,
            t.threshold - 1
        ));
        let back = self.client.get_secret(&owner, &secret).await?;
        ensure!(*back.material == SECRET, "the secret came back changed");
        self.say(&format!("its reader recovered it with shares of {:?}", ids(&back.answered)));
        Ok(())
    }

    /// What a round left is all there.
    async fn check(&self, round: &str) -> anyhow::Result<()> {
        let alice = Name::new(format!("alice@{round}"))?;
        let found = self.client.lookup(&alice, &LookupOptions::default()).await?;
        ensure!(found.record.is_some_and(|record| record.version == 2), "{alice} is lost");
        let secret = Name::new(format!("secret@{round}"))?;
        let back = self.client.get_secret(&self.administrator, &secret).await?;
        ensure!(*back.material == SECRET, "{secret} is lost");
        self.say(&format!("{alice} and {secret} are still there"));
        Ok(())
    }
}

const SECRET: &[u8] = b"the combination is 1-2-3-4-5";

fn ids(servers: &[quorum::ServerId]) -> Vec<u8> {
    servers.iter().map(|server| server.0).collect()
}

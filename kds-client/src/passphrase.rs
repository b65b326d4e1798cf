//! Secrets behind a passphrase: for a person who has lost every device, and with them every key.
//!
//! The passphrase is stretched (Argon2id) and blinded; an ordered guess has k servers evaluate it (see
//! [`quorum::oprf`]); what comes out is the data key. Fewer than k servers cannot even try passphrases,
//! and the log counts those that clients try.

use crate::client::Client;
use crate::error::{ClientError, Misbehaviour};
use crate::keystore::{HARDNESS, Passphrase, stretch};
use crate::random;
use crate::secrets::{Deposited, Gathering, RERELEASES, Recovered};
use quorum::bytes::{Blob, SecretBytes};
use quorum::ids::ServerId;
use quorum::oprf::{self, Blinded, Combined, OprfError, PassphraseKeys};
use quorum::record::Name;
use quorum::request::{self, Done, Hardness, Operation, Reader};
use quorum::scalars;
use quorum::sealing::{OpeningKey, decrypt_material};
use quorum::signing::SigningKey;
use quorum::state::Secret;
use rand::Rng as _;

/// Guesses in a row that a deposit allows if nothing else is said.
pub const DEFAULT_GUESSES: u32 = 10;

/// What locks a deposit: a passphrase, stretched.
pub(crate) struct Lock {
    stretched: SecretBytes,
    salt: [u8; 16],
    guesses: u32,
}

/// A deposit's keys and what it says about them.
pub(crate) struct Locked {
    pub(crate) data_key: SecretBytes,
    pub(crate) shares: Vec<SecretBytes>,
    pub(crate) passphrase: request::Passphrase,
}

impl Lock {
    async fn new(passphrase: &Passphrase, guesses: u32) -> Result<Self, ClientError> {
        let mut salt = [0; 16];
        rand::rng().fill_bytes(&mut salt);
        let stretched = stretched(passphrase, salt, HARDNESS).await?;
        Ok(Self { stretched, salt, guesses })
    }
    /// Draws a key of the function, and shares it.
    pub(crate) fn turn(&self, client: &Client) -> Locked {
        let (manifest, mut rng) = (&client.inner.manifest, random::system());
        let key = scalars::draw(&mut rng);
        let keys =
            PassphraseKeys::derive(&manifest.cluster_id(), &oprf::output(&key, self.stretched.expose()));
        let shares = scalars::deal(&key, manifest.thresholds.k(), manifest.thresholds.n(), &mut rng);
        let passphrase = request::Passphrase {
            salt: self.salt,
            hardness: HARDNESS,
            key: oprf::public_half(&key),
            opener: keys.opener.public(),
            guesses: self.guesses,
        };
        Locked { data_key: keys.data_key, shares, passphrase }
    }
}

/// Stretches on a thread of its own: it takes a good part of a second.
async fn stretched(
    passphrase: &Passphrase,
    salt: [u8; 16],
    hardness: Hardness,
) -> Result<SecretBytes, ClientError> {
    let passphrase = passphrase.clone();
    let stretched = tokio::task::spawn_blocking(move || stretch(&passphrase, &salt, hardness)).await;
    stretched.ok().flatten().ok_or_else(|| {
        let why = "this passphrase cannot be stretched as its depositor wanted: too much memory or work";
        ClientError::Secret(why.into())
    })
}

impl Client {
    /// Deposits material behind a passphrase, with which anyone may get it back, in `guesses` tries in a row
    /// at most; if `readers` are named, only they and the holder of `key` may try. Not even she gets it
    /// without the passphrase. Unless `trust` is set, it is recovered once before success is reported.
    ///
    /// # Errors
    /// As [`Client::put_secret`].
    #[expect(clippy::too_many_arguments, reason = "as put_secret, and what the passphrase needs")]
    pub async fn put_secret_behind(
        &self,
        key: &SigningKey,
        name: &Name,
        material: &[u8],
        readers: &[Reader],
        (passphrase, guesses): (&Passphrase, u32),
        replace: bool,
        trust: bool,
    ) -> Result<Deposited, ClientError> {
        let lock = Lock::new(passphrase, guesses).await?;
        let deposited = self.deposit(key, name, material, readers, Some(&lock), replace).await?;
        if trust {
            return Ok(deposited);
        }
        // As it was deposited just now: some servers may not have it yet.
        let index = deposited.index;
        let secret = self.secret_at(name, index, deposited.written.sequence).await?;
        let back = self.open(key, secret, passphrase).await?;
        self.same(&back, index, material)?;
        Ok(Deposited { proved: true, ..deposited })
    }

    /// Recovers a secret with its passphrase, by one guess. A `key` is needed only where the depositor named
    /// those who may try.
    ///
    /// # Errors
    /// [`ClientError::WrongPassphrase`] if servers that cannot have lied say so.
    pub async fn get_secret_behind(
        &self,
        key: Option<&SigningKey>,
        name: &Name,
        passphrase: &Passphrase,
    ) -> Result<Recovered, ClientError> {
        let fresh = random::secret();
        let fresh = SigningKey::from_seed(&fresh);
        let (secret, _) = self.shown_secret(name).await?.found()?;
        self.open(key.unwrap_or(&fresh), secret, passphrase).await
    }

    /// Guesses, and again if the epoch passes meanwhile.
    async fn open(
        &self,
        key: &SigningKey,
        secret: Secret,
        passphrase: &Passphrase,
    ) -> Result<Recovered, ClientError> {
        let terms = secret.passphrase.as_ref().ok_or(ClientError::NoPassphrase)?;
        let stretched = stretched(passphrase, terms.salt, terms.hardness).await?;
        for _ in 0..RERELEASES {
            if let Some(recovered) = self.guess(key, &secret, terms, &stretched).await? {
                return Ok(recovered);
            }
        }
        Err(ClientError::Secret("epochs pass faster than results can be gathered".into()))
    }

    /// None if the epoch passed meanwhile.
    async fn guess(
        &self,
        key: &SigningKey,
        secret: &Secret,
        terms: &request::Passphrase,
        stretched: &[u8; 32],
    ) -> Result<Option<Recovered>, ClientError> {
        let seed = random::secret();
        let ephemeral = OpeningKey::derive(&seed);
        let asked = Blinded::new(stretched, &mut random::system());
        let operation = Operation::Guess {
            secret: secret.name.clone(),
            ephemeral: ephemeral.public(),
            blinded: asked.element,
        };
        let written = self.submit(key, operation).await?;
        let Done::Guessed { index, release, epoch, left } = written.done else {
            return Err(ClientError::Secret("the receipt is of another operation".into()));
        };
        if index != secret.index {
            return Err(ClientError::SecretChanged { name: secret.name.clone(), deleted: None });
        }
        let gathering = Gathering { client: self, secret, release, epoch, ephemeral: &ephemeral };
        let Some((combined, ciphertext, answered, mut wrong)) = gathering.evaluations(&asked, terms).await?
        else {
            return Ok(None);
        };
        let cluster = self.inner.manifest.cluster_id();
        let keys = PassphraseKeys::derive(&cluster, &combined.output);
        if !keys.are_of(&terms.opener) {
            return Err(ClientError::WrongPassphrase { left });
        }
        let blamed = combined.wrong.iter().map(|server| Misbehaviour {
            server: *server,
            why: "its result is not of its share of the key".into(),
        });
        wrong.extend(blamed);
        let material = decrypt_material(&cluster, &secret.name, &keys.data_key, &ciphertext);
        let material = material.map_err(|_| {
            ClientError::Secret("the ciphertext does not open: its depositor dealt it wrong".into())
        })?;
        // Otherwise this guess counts as a wrong one.
        let operation = Operation::Unlocked { secret: secret.name.clone(), release };
        let uncounted = self.submit(&keys.opener, operation).await.err();
        Ok(Some(Recovered { material, secret: secret.clone(), answered, wrong, uncounted }))
    }
}

type Evaluated = (Combined, Blob, Vec<ServerId>, Vec<Misbehaviour>);

impl Gathering<'_> {
    /// None if so many servers are in the next epoch that k results of this one will not come.
    async fn evaluations(
        &self,
        asked: &Blinded,
        terms: &request::Passphrase,
    ) -> Result<Option<Evaluated>, ClientError> {
        let manifest = &self.client.inner.manifest;
        let (cluster, k, f) = (manifest.cluster_id(), manifest.thresholds.k(), manifest.thresholds.f());
        // Every server: a guess is not to be lost because two of them are in the next epoch already.
        let mut answers = self.ask_all(manifest.thresholds.n());
        let (mut results, mut combined) = (Vec::new(), None);
        while let Some(next) = answers.next().await {
            if answers.epoch_passed(f) {
                return Ok(None);
            }
            let Some((server, sealed)) = next else { continue };
            match self.context(server).open_evaluation(&cluster, self.ephemeral, &sealed) {
                Ok(result) => results.push((server, result)),
                Err(_) => answers.blame(server, "its result does not open"),
            }
            if combined.is_none() && results.len() >= k {
                match asked.combine(&terms.key, k, f, &results, &mut rand::rng()) {
                    Ok(found) => combined = Some(found),
                    Err(OprfError::TooFew { .. } | OprfError::NoneFits { .. }) => {}
                    Err(error @ OprfError::Element) => return Err(ClientError::Secret(error.to_string())),
                }
            }
            if combined.is_some() && answers.ciphertext.is_some() {
                break;
            }
        }
        if answers.any_epoch_passed() && combined.is_none() {
            return Ok(None);
        }
        let answered: Vec<_> = results.iter().map(|(server, _)| *server).collect();
        match (combined, answers.ciphertext.take()) {
            (Some(combined), Some(text)) => {
                let answered = answered.into_iter().filter(|server| !combined.wrong.contains(server));
                let answered = answered.collect();
                Ok(Some((combined, text, answered, answers.wrong)))
            }
            (None, _) if answered.len() >= k => {
                let why = "the results that came are not of the key that was deposited";
                Err(ClientError::Secret(why.into()))
            }
            (Some(_), None) => Err(ClientError::Secret("no server gave the ciphertext".into())),
            (None, _) => Err(answers.too_few(format!("{k} results"), answered)),
        }
    }
}

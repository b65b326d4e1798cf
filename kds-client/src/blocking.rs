//! The client for programs without an async runtime.
//!
//! `examples/blocking.rs`, which the tests run:
//!
//! ```no_run
#![doc = include_str!("../examples/blocking.rs")]
//! ```

use crate::error::ClientError;
use crate::lookup::{Lookup, LookupOptions};
use crate::{Client as AsyncClient, Options};
use quorum::manifest::Manifest;
use quorum::record::{KeyMaterial, Name, Record};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::runtime::Runtime;

/// A client whose calls return when they are done. It has a thread of its own, so it works inside
/// async programs too, where a call blocks its task's thread. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    client: AsyncClient,
    runtime: Arc<Own>,
}

/// The thread and its runtime; given up without waiting, since that is not allowed everywhere.
struct Own(Option<Runtime>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Client {
    /// Trusts the manifest. Connects when it is used.
    ///
    /// # Errors
    /// If the manifest is not sound, or no thread can be started.
    pub fn new(manifest: Arc<Manifest>, options: Options) -> Result<Self, ClientError> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("kds-client").enable_all().build();
        let runtime = runtime.map_err(|e| ClientError::Local(format!("cannot start a thread: {e}")))?;
        Ok(Self { client: AsyncClient::new(manifest, options)?, runtime: Arc::new(Own(Some(runtime))) })
    }
    fn wait<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ClientError>> + Send + 'static,
    ) -> Result<T, ClientError> {
        let (done, result) = mpsc::sync_channel(1);
        let Some(runtime) = &self.runtime.0 else {
            return Err(ClientError::Local("the client is stopping".into()));
        };
        runtime.spawn(async move {
            let _ = done.send(work.await);
        });
        result.recv().unwrap_or_else(|_| Err(ClientError::Local("the call was broken off".into())))
    }
    /// The async client that does the work; to be used within this one's calls only.
    pub(crate) fn inner(&self) -> &AsyncClient {
        &self.client
    }
    /// See [`AsyncClient::lookup`].
    ///
    /// # Errors
    /// As there.
    pub fn lookup(&self, name: &Name, options: &LookupOptions) -> Result<Lookup, ClientError> {
        let (client, name, options) = (self.client.clone(), name.clone(), options.clone());
        self.wait(async move { client.lookup(&name, &options).await })
    }
    /// See [`AsyncClient::lookup_cached`].
    ///
    /// # Errors
    /// As there.
    pub fn lookup_cached(&self, name: &Name) -> Result<Option<Arc<Record>>, ClientError> {
        if let Some(shown) = self.client.cached(name) {
            return Ok(shown.there());
        }
        let (client, name) = (self.client.clone(), name.clone());
        self.wait(async move { client.lookup_cached(&name).await })
    }
    /// The same, within a time.
    pub(crate) fn lookup_cached_within(
        &self,
        name: &Name,
        most: Duration,
    ) -> Result<Option<Arc<Record>>, ClientError> {
        let (client, name) = (self.client.clone(), name.clone());
        self.wait(async move {
            let looked = tokio::time::timeout(most, client.lookup_cached(&name)).await;
            looked.unwrap_or_else(|_| {
                Err(ClientError::Local(format!("{name} could not be looked up within {most:?}")))
            })
        })
    }
    /// See [`AsyncClient::lookup_many`].
    ///
    /// # Errors
    /// As there; each name has a result of its own.
    pub fn lookup_many(
        &self,
        names: &[Name],
        options: &LookupOptions,
    ) -> Result<Vec<Result<Lookup, ClientError>>, ClientError> {
        let (client, names, options) = (self.client.clone(), names.to_vec(), options.clone());
        self.wait(async move { Ok(client.lookup_many(&names, &options).await) })
    }
    /// See [`AsyncClient::verify_signature`].
    ///
    /// # Errors
    /// As there.
    pub fn verify_signature(
        &self,
        name: &Name,
        message: &[u8],
        signature: &[u8],
    ) -> Result<KeyMaterial, ClientError> {
        let client = self.client.clone();
        let (name, message, signature) = (name.clone(), message.to_vec(), signature.to_vec());
        self.wait(async move { client.verify_signature(&name, &message, &signature).await })
    }
    /// See [`AsyncClient::list`].
    ///
    /// # Errors
    /// As there.
    pub fn list(&self, prefix: &str) -> Result<Vec<Record>, ClientError> {
        let (client, prefix) = (self.client.clone(), prefix.to_owned());
        self.wait(async move { client.list(&prefix).await })
    }
    /// See [`AsyncClient::history`].
    ///
    /// # Errors
    /// As there.
    pub fn history(&self, name: &Name) -> Result<Vec<Record>, ClientError> {
        let (client, name) = (self.client.clone(), name.clone());
        self.wait(async move { client.history(&name).await })
    }
}

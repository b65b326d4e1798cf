//! Listings and histories: pages that prove that nothing is left out.

use crate::api::HistoryAnswer;
use crate::client::Client;
use crate::error::ClientError;
use crate::link::segment;
use quorum::answer::{AnswerError, PageAnswer, Verifier};
use quorum::record::{Name, Record};
use quorum::state::{Secret, layout};

/// Entries that a client asks for at a time.
const PAGE: usize = 500;

impl Client {
    /// All records whose name begins with `prefix`, in order. Each page is complete under its
    /// certificate; pages may come from different ones, so a name that is registered meanwhile may
    /// or may not be listed.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Record>, ClientError> {
        self.pages(layout::NAMES, prefix, "records").await
    }
    /// All secrets' metadata, in order of names.
    pub async fn list_secrets(&self, prefix: &str) -> Result<Vec<Secret>, ClientError> {
        self.pages(layout::SECRETS, prefix, "secrets").await
    }

    async fn pages<T: serde::de::DeserializeOwned>(
        &self,
        space: &[u8],
        prefix: &str,
        route: &str,
    ) -> Result<Vec<T>, ClientError> {
        // The prefix has a name's characters, or nothing begins with it.
        if !prefix.is_empty() {
            Name::new(prefix).map_err(|e| ClientError::Local(e.to_string()))?;
        }
        let end = layout::prefix_end(&[space, prefix.as_bytes()].concat());
        let mut from = [space, prefix.as_bytes()].concat();
        let mut all = Vec::new();
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        loop {
            let start = String::from_utf8_lossy(&from[space.len()..]).replace('/', "%2F").replace('+', "%2B");
            let prefix = prefix.replace('/', "%2F").replace('+', "%2B");
            let path = format!("/v1/{route}?prefix={prefix}&from={start}&limit={PAGE}");
            let check = |verifier: &mut Verifier, answer: &PageAnswer| {
                let page = verifier.page::<T>(answer, &from, &end)?;
                Verifier::fresh(&answer.certificate, crate::now(), max_age_ms)?;
                Ok(page)
            };
            let (entries, until) = self.first_good(&path, check).await?;
            let progressed = !entries.is_empty();
            all.extend(entries);
            match until {
                Some(next) if progressed && next > from => from = next,
                Some(_) => return Err(ClientError::Local("a page of the listing was empty".into())),
                None => return Ok(all),
            }
        }
    }

    /// All versions of a name, oldest first. Complete: versions are numbered without gaps.
    pub async fn history(&self, name: &Name) -> Result<Vec<Record>, ClientError> {
        let end = layout::prefix_end(&layout::history_prefix(name));
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        let mut versions: Vec<Record> = Vec::new();
        loop {
            let next = versions.last().map_or(1, |record| record.version + 1);
            let from = layout::history_key(name, next);
            let path = format!("/v1/records/{}/history?from={next}", segment(name));
            let check = |verifier: &mut Verifier, answer: &HistoryAnswer| {
                let current = verifier.record(&answer.current, name, None)?;
                let (mut page, until) = verifier.page::<Record>(&answer.earlier, &from, &end)?;
                Verifier::fresh(&answer.current.certificate, crate::now(), max_age_ms)?;
                Verifier::fresh(&answer.earlier.certificate, crate::now(), max_age_ms)?;
                let more = until.is_some();
                // The current version follows the last of the earlier ones.
                page.extend(current.filter(|_| !more));
                let gapless = page.iter().zip(next..).all(|(record, version)| record.version == version);
                if gapless { Ok((page, more)) } else { Err(AnswerError::OtherQuestion) }
            };
            let (page, more) = self.first_good(&path, check).await?;
            let progressed = !page.is_empty();
            versions.extend(page);
            match versions.last() {
                None => return Err(ClientError::NotFound { what: format!("the name {name}") }),
                Some(last) if !more || !progressed => {
                    self.remember(name, last.version);
                    return Ok(versions);
                }
                Some(_) => {}
            }
        }
    }
}

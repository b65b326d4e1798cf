//! Listings and histories: pages that prove that nothing is left out.

use crate::api::HistoryAnswer;
use crate::client::Client;
use crate::error::ClientError;
use crate::link::segment;
use crate::lookup::LookupOptions;
use quorum::answer::{AnswerError, PageAnswer, Verifier};
use quorum::ids::Timestamp;
use quorum::record::{Name, Record};
use quorum::state::{Secret, layout};

/// Entries that a client asks for at a time.
const PAGE: usize = 500;

impl Client {
    /// All records whose name begins with `prefix`, in order, with the guarantees of a row lookup: every name
    /// whose registration was complete when this began is listed, while at most b servers lie; nothing is
    /// forged, and nothing that a page's certificate covers is left out, while at most f do. Pages may come
    /// from different states, so a name that is registered meanwhile may or may not be listed.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Record>, ClientError> {
        let (records, certified) = self.pages::<Record>(layout::NAMES, prefix, "records").await?;
        records.iter().for_each(|record| self.inner.seen.record(record, certified));
        Ok(records)
    }
    /// All secrets' metadata, in order of names.
    pub async fn list_secrets(&self, prefix: &str) -> Result<Vec<Secret>, ClientError> {
        Ok(self.pages(layout::SECRETS, prefix, "secrets").await?.0)
    }

    /// The entries, and when the oldest page of them was certified.
    async fn pages<T: serde::de::DeserializeOwned>(
        &self,
        space: &[u8],
        prefix: &str,
        route: &str,
    ) -> Result<(Vec<T>, Timestamp), ClientError> {
        // The prefix has a name's characters, or nothing begins with it.
        if !prefix.is_empty() {
            Name::new(prefix).map_err(|e| ClientError::Local(e.to_string()))?;
        }
        let end = layout::prefix_end(&[space, prefix.as_bytes()].concat());
        let mut from = [space, prefix.as_bytes()].concat();
        let mut all = Vec::new();
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        // A server alone could answer from a state that is a few seconds old.
        let current = self.current_state().await?.statement.sequence;
        let mut newest = current;
        let mut certified = Timestamp(u64::MAX);
        loop {
            let start = String::from_utf8_lossy(&from[space.len()..]).replace('/', "%2F").replace('+', "%2B");
            let prefix = prefix.replace('/', "%2F").replace('+', "%2B");
            let path = format!("/v1/{route}?prefix={prefix}&from={start}&limit={PAGE}");
            let check = |verifier: &mut Verifier, answer: &PageAnswer| {
                let page = verifier.page::<T>(answer, &from, &end)?;
                Verifier::fresh(&answer.certificate, crate::now(), max_age_ms)?;
                let got = answer.certificate.statement.sequence;
                if got < current {
                    return Err(AnswerError::Behind { got, current });
                }
                Ok((page, got, answer.certificate.statement.time))
            };
            let ((entries, until), sequence, time) = self.first_good(&path, check).await?;
            (newest, certified) = (newest.max(sequence), certified.min(time));
            let progressed = !entries.is_empty();
            all.extend(entries);
            match until {
                Some(next) if progressed && next > from => from = next,
                Some(_) => return Err(ClientError::Local("a page of the listing was empty".into())),
                // What one reader lists every later one sees.
                None if self.complete_through(newest).await => return Ok((all, certified)),
                None => return Err(ClientError::NotComplete),
            }
        }
    }

    /// All versions of a name, oldest first, with the guarantees of a row lookup; without gaps, since
    /// versions are numbered.
    pub async fn history(&self, name: &Name) -> Result<Vec<Record>, ClientError> {
        let found = self.lookup(name, &LookupOptions::default()).await?;
        let Some(newest) = found.record else {
            return Err(ClientError::NotFound { what: format!("the name {name}") });
        };
        self.history_from(name, 1, newest.version).await
    }

    /// The versions of a name from `first` on, at least up to `newest`, which is known to be there.
    pub(crate) async fn history_from(
        &self,
        name: &Name,
        first: u64,
        newest: u64,
    ) -> Result<Vec<Record>, ClientError> {
        let end = layout::prefix_end(&layout::history_prefix(name));
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        let mut versions: Vec<Record> = Vec::new();
        loop {
            let next = versions.last().map_or(first, |record| record.version + 1);
            let from = layout::history_key(name, next);
            let path = format!("/v1/records/{}/history?from={next}", segment(name));
            let check = |verifier: &mut Verifier, answer: &HistoryAnswer| {
                let current = verifier.record(&answer.current, name, None)?;
                let (mut page, until) = verifier.page::<Record>(&answer.earlier, &from, &end)?;
                Verifier::fresh(&answer.current.certificate, crate::now(), max_age_ms)?;
                Verifier::fresh(&answer.earlier.certificate, crate::now(), max_age_ms)?;
                let more = until.is_some();
                let got = current.as_ref().map_or(0, |record| record.version);
                if got < newest {
                    return Err(AnswerError::Backwards { got, seen: newest });
                }
                // The current version follows the last of the earlier ones.
                page.extend(current.filter(|current| !more && current.version >= next));
                let gapless = page.iter().zip(next..).all(|(record, version)| record.version == version);
                let certified = answer.current.certificate.statement.time;
                if gapless { Ok((page, more, certified)) } else { Err(AnswerError::OtherQuestion) }
            };
            let (page, more, certified) = self.first_good(&path, check).await?;
            let progressed = !page.is_empty();
            versions.extend(page);
            match versions.last() {
                None => return Err(ClientError::NotFound { what: format!("the name {name}") }),
                Some(last) if !more || !progressed => {
                    self.inner.seen.record(last, certified);
                    return Ok(versions);
                }
                Some(_) => {}
            }
        }
    }
}

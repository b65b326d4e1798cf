//! Listings and histories: pages that prove that nothing is left out.

use crate::api::HistoryAnswer;
use crate::client::Client;
use crate::error::ClientError;
use crate::link::segment;
use crate::lookup::{LookupOptions, shown};
use quorum::answer::{AnswerError, PageAnswer, Verifier};
use quorum::ids::Timestamp;
use quorum::limits::MAX_PAGE;
use quorum::map::Page;
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
        let key_of = |record: &Record| layout::name_key(&record.name);
        let (records, certified) = self.pages(layout::NAMES, prefix, "records", key_of).await?;
        records.iter().for_each(|record| self.inner.seen.record(record, certified));
        Ok(records)
    }
    /// All secrets' metadata, in order of names.
    pub async fn list_secrets(&self, prefix: &str) -> Result<Vec<Secret>, ClientError> {
        let key_of = |secret: &Secret| layout::secret_key(&secret.name);
        Ok(self.pages(layout::SECRETS, prefix, "secrets", key_of).await?.0)
    }

    /// The entries, and when the oldest page of them was certified.
    async fn pages<T: serde::de::DeserializeOwned>(
        &self,
        space: &[u8],
        prefix: &str,
        route: &str,
        key_of: impl Fn(&T) -> Vec<u8>,
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
                let page = verifier.page(answer, &Page::new(&from, &end, PAGE), &key_of)?;
                Verifier::fresh(&answer.certificate.statement, crate::now(), max_age_ms)?;
                let got = answer.certificate.statement.sequence;
                if got < current {
                    return Err(AnswerError::Behind { got, current });
                }
                Ok((page, got, answer.certificate.statement.time))
            };
            let ((entries, until), sequence, time) = self.first_good(&path, check).await?;
            (newest, certified) = (newest.max(sequence), certified.min(time));
            all.extend(entries);
            match until {
                // A page that goes on is full: there is an end.
                Some(next) => from = next,
                // What one reader lists every later one sees.
                None if self.complete_through(newest).await => {
                    self.inner.seen.state(newest);
                    return Ok((all, certified));
                }
                None => return Err(ClientError::NotComplete),
            }
        }
    }

    /// All versions of a name, oldest first, with the guarantees of a row lookup; without gaps, since
    /// versions are numbered.
    pub async fn history(&self, name: &Name) -> Result<Vec<Record>, ClientError> {
        let found = self.lookup(name, &LookupOptions::default()).await?;
        let newest = shown(found)?.found()?;
        self.history_from(name, 1, newest.version).await
    }

    /// The versions of a name from `first` to `newest`, which is known to be there and to be complete. There may
    /// be further ones by now; they are not told, since not every reader sees them yet.
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
            if next > newest {
                return Ok(versions);
            }
            let from = layout::history_key(name, next);
            let path = format!("/v1/records/{}/history?from={next}", segment(name));
            let check = |verifier: &mut Verifier, answer: &HistoryAnswer| {
                let current = verifier.record(&answer.current, name, None)?.there();
                let key_of = |record: &Record| layout::history_key(&record.name, record.version);
                let page = Page::new(&from, &end, MAX_PAGE);
                let (mut page, until) = verifier.page(&answer.earlier, &page, key_of)?;
                // Of one state, or a version could lie between them.
                if answer.current.certificate.statement != answer.earlier.certificate.statement {
                    return Err(AnswerError::OtherQuestion);
                }
                Verifier::fresh(&answer.current.certificate.statement, crate::now(), max_age_ms)?;
                Verifier::fresh(&answer.earlier.certificate.statement, crate::now(), max_age_ms)?;
                let got = current.as_ref().map_or(0, |record| record.version);
                if got < newest {
                    return Err(AnswerError::Backwards { got, seen: newest });
                }
                // The current version follows the last of the earlier ones.
                page.extend(current.filter(|current| until.is_none() && current.version >= next));
                let gapless = page.iter().zip(next..).all(|(record, version)| record.version == version);
                let certified = answer.current.certificate.statement.time;
                // Who makes no progress is passed over.
                if gapless && !page.is_empty() {
                    Ok((page, certified))
                } else {
                    Err(AnswerError::OtherQuestion)
                }
            };
            let (page, certified) = self.first_good(&path, check).await?;
            versions.extend(page.into_iter().filter(|record| record.version <= newest));
            if let Some(last) = versions.last() {
                self.inner.seen.record(last, certified);
            }
        }
    }
}

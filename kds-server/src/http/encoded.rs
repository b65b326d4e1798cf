//! Parts of answers as JSON, kept for as long as they are true: until the next certificate.
//!
//! The certificate is most of an answer and the same in all of them; names that many ask for are asked
//! for many times under one certificate.

use quorum::answer::Proved;
use quorum::certificate::Certificate;
use quorum::ordering::Published;
use quorum::record::{Name, Record};
use quorum::state::layout;
use serde_json::value::{RawValue, to_raw_value};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Names whose records are kept as JSON, a few megabytes: what is asked for most comes early.
const MOST_RECORDS: usize = 4_096;
/// Records that are larger than this are encoded anew each time.
const MOST_BYTES: usize = 8 * 1024;

/// See the module.
pub(super) struct Encoded {
    of: Arc<Certificate>,
    certificate: Box<RawValue>,
    records: Mutex<HashMap<Name, Arc<RawValue>>>,
}

impl Encoded {
    pub(super) fn new(published: &Published) -> serde_json::Result<Self> {
        let of = Arc::clone(&published.certificate);
        let certificate = to_raw_value(&of)?;
        Ok(Self { of, certificate, records: Mutex::default() })
    }
    /// Whether this is about that state.
    pub(super) fn is_of(&self, published: &Published) -> bool {
        Arc::ptr_eq(&self.of, &published.certificate)
    }
    /// The state's certificate.
    pub(super) fn certificate(&self) -> &RawValue {
        &self.certificate
    }
    /// A name's record, or that there is none, with its proof: a `Proved<Record>`.
    pub(super) fn record(&self, published: &Published, name: &Name) -> serde_json::Result<Arc<RawValue>> {
        debug_assert!(self.is_of(published));
        let records = || self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = records().get(name) {
            return Ok(Arc::clone(known));
        }
        let proved = Proved::<Record>::look_up(&published.snapshot, &layout::name_key(name));
        let json: Arc<RawValue> = to_raw_value(&proved)?.into();
        let mut records = records();
        if records.len() < MOST_RECORDS && json.get().len() <= MOST_BYTES {
            records.insert(name.clone(), Arc::clone(&json));
        }
        Ok(json)
    }
}

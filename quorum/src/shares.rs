//! A server's shares in one epoch, and how they get into the next (design §7).
//!
//! A [`ShareSet`] changes only by [`ShareOp`]s, which the replica orders among its writes. An operation
//! that comes again, after a crash, changes nothing: each names its epoch, and what is older than the set
//! is over.

use crate::bytes::SecretBytes;
use crate::ids::{AttemptId, Epoch, ServerId};
use crate::refresh::{CHUNK, CHUNK_BYTES, Scratch, Terms};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use zeroize::{Zeroize as _, Zeroizing};

/// Something that happens to a server's shares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ShareOp {
    /// A deposit: this server's share, or an empty slot if the deposit held none that opens.
    Store {
        /// Index of the secret.
        index: u64,
        /// Epoch of the share.
        epoch: Epoch,
        /// The share.
        share: Option<SecretBytes>,
        /// The deposit held something for this server. If that did not open its depositor is to blame, and
        /// nobody waits until the share is recovered.
        dealt: bool,
    },
    /// The secret is gone.
    Erase {
        /// Its index.
        index: u64,
    },
    /// An epoch has begun.
    Renew(Renewal),
    /// A server may recover its shares of this epoch.
    Help(Epoch, Helping),
    /// The secrets that there are after a state transfer: a slot for each, and no others.
    Present {
        /// Indices of the secrets, ascending.
        indices: Vec<u64>,
        /// The epoch of the state: shares of earlier ones are worth nothing any more.
        epoch: Epoch,
    },
    /// What was recovered from the other servers.
    Recovered {
        /// The epoch that the shares belong to.
        epoch: Epoch,
        /// Index and share.
        shares: Vec<(u64, SecretBytes)>,
        /// Secrets of which nobody can expect this server to have a share.
        excused: Vec<u64>,
    },
}

/// How shares get from one epoch into the next.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Renewal {
    /// The epoch that has begun.
    pub to: Epoch,
    /// What is added to each share; none if this server was not ready in time: its slots are empty now.
    pub terms: Option<Terms>,
    /// Who recovers its shares in this epoch.
    pub recovering: Option<Helping>,
}

/// A server that recovers its shares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Helping {
    /// Who.
    pub server: ServerId,
    /// By which attempt.
    pub attempt: AttemptId,
    /// The masks under which this server gives it its own shares, unless it is that server itself or lacks
    /// a contribution to them.
    pub masks: Option<Terms>,
}

/// The shares of secrets CHUNK·c…CHUNK·c+CHUNK−1.
#[derive(Clone, Serialize, Deserialize)]
struct Chunk {
    /// Which of the secrets there are.
    slots: u128,
    /// Of which of them this server has its share.
    filled: u128,
    /// Of which of the others nobody expects it to: their depositors dealt something that is no secret.
    excused: u128,
    /// The shares, at CHUNK places; zero where there is none.
    #[serde(with = "packed")]
    values: Box<[u8; CHUNK_BYTES]>,
}

const _: () = assert!(CHUNK == u128::BITS as usize);

impl Chunk {
    fn new() -> Self {
        Self { slots: 0, filled: 0, excused: 0, values: Box::new([0; CHUNK_BYTES]) }
    }
    fn value(&self, place: usize) -> &[u8; 32] {
        (&self.values[32 * place..32 * place + 32]).try_into().expect("32 bytes")
    }
    fn put(&mut self, place: usize, share: Option<&[u8; 32]>) {
        self.slots |= 1 << place;
        // A share that is there stays: an operation that comes again may not know it any more.
        if let Some(share) = share {
            self.filled |= 1 << place;
            self.excused &= !(1 << place);
            self.values[32 * place..32 * place + 32].copy_from_slice(share);
        }
    }
    fn excuse(&mut self, places: u128) {
        self.excused |= places & self.slots & !self.filled;
    }
    fn erase(&mut self, places: u128) {
        self.slots &= !places;
        self.excused &= !places;
        self.empty(places);
    }
    fn empty(&mut self, places: u128) {
        self.filled &= !places;
        for place in (0..CHUNK).filter(|place| places & (1 << place) != 0) {
            self.values[32 * place..32 * place + 32].zeroize();
        }
    }
    fn add(&mut self, number: u64, terms: &Terms, scratch: &mut Scratch) {
        if self.filled != 0 {
            terms.add_to(number, &mut self.values, scratch);
            self.empty(!self.filled);
        }
    }
}
impl Drop for Chunk {
    fn drop(&mut self) {
        self.values.zeroize();
    }
}

/// The values as one string of bytes.
mod packed {
    use super::CHUNK_BYTES;
    use serde::{Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(values: &[u8; CHUNK_BYTES], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(values)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Box<[u8; CHUNK_BYTES]>, D::Error> {
        struct Values;
        impl de::Visitor<'_> for Values {
            type Value = Box<[u8; CHUNK_BYTES]>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{CHUNK_BYTES} bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                let mut values = Box::new([0; CHUNK_BYTES]);
                if bytes.len() != CHUNK_BYTES {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                values.copy_from_slice(bytes);
                Ok(values)
            }
        }
        deserializer.deserialize_bytes(Values)
    }
}

/// A chunk and the place in it.
fn place_of(index: u64) -> (u64, usize) {
    (index / CHUNK as u64, (index % CHUNK as u64) as usize)
}

/// How many shares a server has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareCounts {
    /// Secrets for which there is a slot.
    pub secrets: u64,
    /// Slots that hold a share of the current epoch.
    pub shares: u64,
    /// Slots that hold none since their deposits were wrong.
    pub excused: u64,
}

/// A helper's shares of one chunk under the mask that only their receiver can take off.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MaskedChunk {
    /// Which one.
    pub chunk: u64,
    /// For which of its places there is a value.
    pub filled: u128,
    /// In which of the others nobody can expect one.
    pub excused: u128,
    /// Their values, in order.
    pub values: Vec<SecretBytes>,
}

/// All shares of one server.
#[derive(Clone, Serialize, Deserialize)]
pub struct ShareSet {
    epoch: Epoch,
    chunks: BTreeMap<u64, Chunk>,
    /// Deposits of the next epoch that came before this server had its shares of it.
    ahead: BTreeMap<u64, Chunk>,
    /// Who recovers in this epoch, and the masks for it.
    recovering: Option<Helping>,
}

impl ShareSet {
    /// No shares.
    pub fn new() -> Self {
        Self { epoch: Epoch(0), chunks: BTreeMap::new(), ahead: BTreeMap::new(), recovering: None }
    }
    /// The epoch of the shares.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
    /// Who recovers its shares in this epoch, and by which attempt.
    pub fn recovering(&self) -> Option<(ServerId, AttemptId)> {
        self.recovering.as_ref().map(|helping| (helping.server, helping.attempt))
    }
    /// This server's share of a secret, in the epoch of the set.
    pub fn share(&self, index: u64) -> Option<SecretBytes> {
        let (chunk, place) = place_of(index);
        let chunk = self.chunks.get(&chunk)?;
        (chunk.filled & (1 << place) != 0).then(|| SecretBytes::new(chunk.value(place)))
    }
    /// How many there are.
    pub fn counts(&self) -> ShareCounts {
        let mut counts = ShareCounts::default();
        for chunk in self.chunks.values().chain(self.ahead.values()) {
            counts.secrets += u64::from(chunk.slots.count_ones());
            counts.shares += u64::from(chunk.filled.count_ones());
            counts.excused += u64::from(chunk.excused.count_ones());
        }
        counts
    }
    /// Whether this server has all shares that anyone can expect it to have. Only then may an epoch be sealed on its
    /// word.
    pub fn is_whole(&self) -> bool {
        let counts = self.counts();
        counts.shares + counts.excused == counts.secrets
    }
    /// Whether a slot lacks its share without excuse.
    pub fn lacks(&self, index: u64) -> bool {
        let (number, place) = place_of(index);
        let chunk = self.chunks.get(&number);
        chunk.is_some_and(|chunk| chunk.slots & !chunk.filled & !chunk.excused & (1 << place) != 0)
    }
    /// How many chunks they fill.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }
    /// Chunks with slots that lack their share, and which.
    pub fn gaps(&self) -> impl Iterator<Item = (u64, u128)> + '_ {
        let gaps = self.chunks.iter().map(|(number, chunk)| (*number, chunk.slots & !chunk.filled));
        gaps.filter(|(_, gaps)| *gaps != 0)
    }

    /// Applies an operation.
    pub fn apply(&mut self, operation: &ShareOp) {
        match operation {
            ShareOp::Store { index, epoch, share, dealt } => {
                let (number, place) = place_of(*index);
                let chunks = match *epoch {
                    epoch if epoch == self.epoch => &mut self.chunks,
                    epoch if epoch == self.epoch.next() => &mut self.ahead,
                    _ => return,
                };
                let share = share.as_ref().map(SecretBytes::expose);
                let chunk = chunks.entry(number).or_insert_with(Chunk::new);
                chunk.put(place, share);
                chunk.excuse(u128::from(*dealt && share.is_none()) << place);
            }
            ShareOp::Erase { index } => {
                let (number, place) = place_of(*index);
                for chunks in [&mut self.chunks, &mut self.ahead] {
                    if let Some(chunk) = chunks.get_mut(&number) {
                        chunk.erase(1 << place);
                        if chunk.slots == 0 {
                            chunks.remove(&number);
                        }
                    }
                }
            }
            ShareOp::Renew(renewal) if renewal.to > self.epoch => self.renew(renewal),
            ShareOp::Renew(_) => {}
            ShareOp::Help(epoch, helping) if *epoch == self.epoch => self.recovering = Some(helping.clone()),
            ShareOp::Help(..) => {}
            ShareOp::Present { indices, epoch } => self.set_present(indices, *epoch),
            ShareOp::Recovered { epoch, shares, excused } if *epoch == self.epoch => {
                for (index, share) in shares {
                    let (number, place) = place_of(*index);
                    if let Some(chunk) = self.chunks.get_mut(&number)
                        && chunk.slots & !chunk.filled & (1 << place) != 0
                    {
                        chunk.put(place, Some(share.expose()));
                    }
                }
                for index in excused {
                    let (number, place) = place_of(*index);
                    if let Some(chunk) = self.chunks.get_mut(&number) {
                        chunk.excuse(1 << place);
                    }
                }
            }
            ShareOp::Recovered { .. } => {}
        }
    }

    fn renew(&mut self, renewal: &Renewal) {
        let terms = renewal.terms.as_ref().filter(|_| renewal.to == self.epoch.next());
        let mut scratch = Scratch::default();
        for (number, chunk) in &mut self.chunks {
            match terms {
                Some(terms) => chunk.add(*number, terms, &mut scratch),
                None => chunk.empty(u128::MAX),
            }
        }
        let ahead = std::mem::take(&mut self.ahead);
        for (number, early) in ahead {
            let chunk = self.chunks.entry(number).or_insert_with(Chunk::new);
            for place in (0..CHUNK).filter(|place| early.slots & (1 << place) != 0) {
                let filled = early.filled & (1 << place) != 0 && renewal.to == self.epoch.next();
                chunk.put(place, filled.then(|| early.value(place)));
            }
            chunk.excuse(early.excused);
        }
        self.epoch = renewal.to;
        self.recovering = renewal.recovering.clone();
    }

    fn set_present(&mut self, indices: &[u64], epoch: Epoch) {
        if epoch < self.epoch {
            return;
        }
        if epoch > self.epoch {
            self.renew(&Renewal { to: epoch, terms: None, recovering: None });
        }
        let mut present: BTreeMap<u64, u128> = BTreeMap::new();
        for index in indices {
            let (number, place) = place_of(*index);
            *present.entry(number).or_default() |= 1 << place;
        }
        let known: BTreeSet<u64> = self.chunks.keys().chain(present.keys()).copied().collect();
        for number in known {
            let slots = present.get(&number).copied().unwrap_or_default();
            let chunk = self.chunks.entry(number).or_insert_with(Chunk::new);
            chunk.erase(!slots);
            chunk.slots = slots;
            if slots == 0 {
                self.chunks.remove(&number);
            }
        }
    }

    /// This server's shares of some chunks for the one that recovers in this epoch, each under its mask.
    /// None if that is somebody else, or this server cannot help.
    pub fn masked(&self, server: ServerId, attempt: AttemptId, chunks: &[u64]) -> Option<Vec<MaskedChunk>> {
        let helping = self.recovering.as_ref()?;
        let masks =
            helping.masks.as_ref().filter(|_| helping.server == server && helping.attempt == attempt)?;
        let mut scratch = Scratch::default();
        let mut values = Zeroizing::new([0; CHUNK_BYTES]);
        let masked = chunks.iter().map(|number| {
            let Some(chunk) = self.chunks.get(number) else {
                return MaskedChunk { chunk: *number, filled: 0, excused: 0, values: vec![] };
            };
            values.copy_from_slice(&*chunk.values);
            masks.add_to(*number, &mut values, &mut scratch);
            let (places, _) = values.as_chunks::<32>();
            let filled = places.iter().enumerate().filter(|(place, _)| chunk.filled & (1 << place) != 0);
            let mut values = Vec::with_capacity(CHUNK);
            values.extend(filled.map(|(_, value)| SecretBytes::new(value)));
            MaskedChunk { chunk: *number, filled: chunk.filled, excused: chunk.excused, values }
        });
        Some(masked.collect())
    }
}

impl Default for ShareSet {
    fn default() -> Self {
        Self::new()
    }
}
impl std::fmt::Debug for ShareSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ShareSet(epoch {}, {:?})", self.epoch, self.counts())
    }
}

#[cfg(test)]
mod tests;

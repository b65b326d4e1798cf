//! What ordering votes are about (PBFT §4.2), and the suspicion that promises nothing.

use crate::bytes::Hash;
use crate::codec::Tagged;
use crate::ids::{AttemptId, Sequence, View};
use crate::signing::Statement;
use serde::{Deserialize, Serialize};

/// What ordering votes are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slot {
    /// In which view.
    pub view: View,
    /// At which place in the order.
    pub sequence: Sequence,
    /// Which batch.
    pub digest: Hash,
    /// By which the epoch began that the place lies in. Votes of other epochs for the same place are void.
    pub attempt: AttemptId,
}

macro_rules! phase {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub Slot);
        impl Tagged for $name {
            const TAG: &'static str = $tag;
        }
        impl Statement for $name {
            fn attempt(&self) -> AttemptId {
                self.0.attempt
            }
        }
    };
}
phase!(
    /// The primary's proposal (PBFT §4.2).
    PrePrepare, "kds.pre-prepare"
);
phase!(
    /// A backup's agreement (PBFT §4.2).
    Prepare, "kds.prepare"
);
phase!(
    /// The promise to execute (PBFT §4.2).
    Commit, "kds.commit"
);

/// "The primary of this view does not do its work." Promises nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspect {
    /// The view whose primary is suspected.
    pub view: View,
    /// By which the epoch began that its author is in.
    pub attempt: AttemptId,
}
impl Tagged for Suspect {
    const TAG: &'static str = "kds.suspect";
}
impl Statement for Suspect {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

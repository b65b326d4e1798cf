//! What is wrong with this server, as far as it knows: one place, which status, readiness and metrics tell alike.

use kds_client::api::{Trouble, TroubleKind};
use quorum::ids::Timestamp;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// See the module.
#[derive(Default)]
pub struct Health(Mutex<BTreeMap<TroubleKind, Timestamp>>);

impl Health {
    /// Takes note of whether something is wrong; since when, if it goes on.
    pub fn set(&self, kind: TroubleKind, is_wrong: bool) {
        let mut troubles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if is_wrong {
            troubles.entry(kind).or_insert_with(crate::driver::now);
        } else {
            troubles.remove(&kind);
        }
    }
    /// What is wrong, worst first.
    pub fn troubles(&self) -> Vec<Trouble> {
        let troubles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.iter().map(|(kind, since)| Trouble { kind: *kind, since: *since }).collect()
    }
    /// Whether anything that it would promise can leave: nothing does that is not durable.
    pub fn can_write(&self) -> bool {
        let troubles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        !troubles.keys().any(|kind| matches!(kind, TroubleKind::Storage | TroubleKind::DiskFull))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn troubles_are_told_since_they_began_until_they_end() {
        let health = Health::default();
        assert!(health.troubles().is_empty() && health.can_write());
        health.set(TroubleKind::NotErased, true);
        let since = health.troubles()[0].since;
        std::thread::sleep(std::time::Duration::from_millis(3));
        health.set(TroubleKind::NotErased, true);
        assert!(health.can_write());
        health.set(TroubleKind::Storage, true);
        assert!(!health.can_write());
        let told: Vec<_> = health.troubles().iter().map(|trouble| trouble.kind).collect();
        assert_eq!(told, [TroubleKind::Storage, TroubleKind::NotErased]);
        assert_eq!(health.troubles()[1].since, since);
        health.set(TroubleKind::Storage, false);
        health.set(TroubleKind::NotErased, false);
        assert!(health.troubles().is_empty());
    }
}

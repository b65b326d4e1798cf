//! What can go wrong, in the combinations that are run.

use crate::cluster::Faults;
use crate::patient::Patience;
use crate::readers::Liars;
use quorum::limits::LOG_TAIL_BATCHES;

pub const GOOD: Faults = Faults {
    loss: 0.0,
    duplication: 0.0,
    max_delay_ms: 20,
    crashes: false,
    deaths: false,
    partitions: false,
    twins: false,
    liars: false,
    sluggish_ms: 0,
    patient: None,
    mobile: false,
    forgetful: false,
    in_turn: false,
    replaced: false,
    corrupt: false,
    skew_ms: 0,
    log_tail: LOG_TAIL_BATCHES,
    requests: 24,
    readers: None,
    secrets: 0,
    epoch_seconds: 30,
};
pub const LOSSY: Faults = Faults { loss: 0.15, duplication: 0.1, max_delay_ms: 400, skew_ms: 300, ..GOOD };
pub const CRASHING: Faults =
    Faults { loss: 0.05, duplication: 0.05, max_delay_ms: 150, crashes: true, ..GOOD };
pub const DYING: Faults = Faults { loss: 0.05, duplication: 0.05, max_delay_ms: 100, deaths: true, ..GOOD };
pub const TWINS: Faults = Faults { loss: 0.05, duplication: 0.05, max_delay_ms: 100, twins: true, ..GOOD };
pub const LYING: Faults = Faults { max_delay_ms: 60, liars: true, skew_ms: 300, ..GOOD };
/// Just under the timeout.
pub const SLUGGISH: Faults = Faults { sluggish_ms: 1_300, requests: 60, ..GOOD };
/// Good and bad by turns.
pub const KEEPING_REQUESTS: Faults = Faults { patient: Some(Patience::KeepsRequests), requests: 80, ..GOOD };
/// No step towards the next epoch is ordered while it matters.
pub const KEEPING_STEPS: Faults =
    Faults { patient: Some(Patience::KeepsSteps), secrets: 4, epoch_seconds: 2, ..GOOD };
/// Time almost stands still.
pub const LAGGING_TIME: Faults = Faults { patient: Some(Patience::Lags), skew_ms: 300, ..GOOD };
/// Somebody tries to make others suspect the primary.
pub const TELLING_BACKUPS: Faults = Faults { patient: Some(Patience::TellsBackups), requests: 40, ..GOOD };
/// A batch that nobody has who would give it.
pub const HOARDING: Faults = Faults { patient: Some(Patience::HoardsBatches), ..GOOD };
/// A primary that leaves a hole, with prepared batches after it, and dies.
pub const HOLE: Faults = Faults { patient: Some(Patience::LeavesAHole), requests: 30, ..GOOD };
/// View changes that differ from one receiver to the next.
pub const EACH_ANOTHER: Faults = Faults { patient: Some(Patience::ShowsEachAnother), ..GOOD };
/// On a good network, so that a server that forgot must not contradict one word of what it said.
pub const FORGETTING: Faults = Faults { forgetful: true, requests: 200, epoch_seconds: 3, ..GOOD };
/// Nobody lies, and every server is restored from an old copy once: the next one when the last one votes again. What
/// each forgot reached few, and those few forget it next.
pub const FORGETTING_IN_TURN: Faults = Faults {
    forgetful: true,
    in_turn: true,
    loss: 0.05,
    max_delay_ms: 300,
    requests: 200,
    epoch_seconds: 1,
    ..GOOD
};
/// A server finds that its state is not the certified one.
pub const CORRUPT: Faults = Faults { corrupt: true, requests: 60, ..GOOD };
/// Partitions under which the rest goes on, and short logs: who was cut off needs state transfer.
pub const LAGGING: Faults =
    Faults { partitions: true, crashes: true, log_tail: 4, requests: 100, max_delay_ms: 40, ..GOOD };
/// No more servers lie to readers than an access masks.
pub const READING: Faults = Faults { readers: Some(Liars::Masked), max_delay_ms: 150, ..GOOD };
/// f servers lie to readers.
pub const DECEIVED: Faults = Faults { readers: Some(Liars::Most), skew_ms: 300, max_delay_ms: 100, ..GOOD };
/// While servers crash and the network parts.
pub const READING_THROUGH_IT: Faults = Faults {
    loss: 0.05,
    crashes: true,
    partitions: true,
    max_delay_ms: 100,
    readers: Some(Liars::Masked),
    ..GOOD
};
pub const EVERYTHING: Faults = Faults {
    loss: 0.1,
    duplication: 0.1,
    max_delay_ms: 300,
    crashes: true,
    deaths: true,
    partitions: true,
    liars: true,
    forgetful: true,
    skew_ms: 300,
    log_tail: 8,
    ..GOOD
};

/// Secrets are deposited while epochs follow each other, two seconds each.
pub const KEEPING: Faults = Faults { secrets: 12, epoch_seconds: 2, requests: 6, ..GOOD };
pub const KEEPING_LOSSY: Faults =
    Faults { loss: 0.1, duplication: 0.1, max_delay_ms: 200, skew_ms: 300, ..KEEPING };
pub const KEEPING_CRASHING: Faults =
    Faults { loss: 0.03, max_delay_ms: 80, crashes: true, partitions: true, ..KEEPING };
/// Servers deal wrong, partial or nothing, acknowledge what they do not hold, help wrongly.
pub const KEEPING_LYING: Faults = Faults { liars: true, max_delay_ms: 40, ..KEEPING };
/// Servers lose their disks, or sleep so long that they need another state: they recover their shares.
pub const KEEPING_FORGETTING: Faults =
    Faults { forgetful: true, partitions: true, log_tail: 8, max_delay_ms: 40, ..KEEPING };
pub const KEEPING_THROUGH_EVERYTHING: Faults =
    Faults { secrets: 12, epoch_seconds: 2, requests: 6, loss: 0.05, max_delay_ms: 100, ..EVERYTHING };

/// Whoever was in a server keeps its keys; servers crash, so that they ask what they signed.
pub const KEEPING_ROBBED: Faults =
    Faults { mobile: true, crashes: true, max_delay_ms: 40, secrets: 4, epoch_seconds: 2, ..GOOD };

/// A server is restored from an old copy, or has lost its disk, while nothing else happens: it asks for the next epoch, which
/// would not begin otherwise.
pub const RESTORED: Faults = Faults { forgetful: true, secrets: 6, epoch_seconds: 30, ..GOOD };
/// f servers ask for epochs as often as they may.
pub const ASKING: Faults =
    Faults { patient: Some(Patience::AsksForEpochs), secrets: 6, epoch_seconds: 30, ..GOOD };

/// Servers' places are given to other identities.
pub const KEEPING_REPLACED: Faults = Faults { replaced: true, max_delay_ms: 40, ..KEEPING };
/// While others sleep so long that they learn of it later.
pub const KEEPING_REPLACED_APART: Faults =
    Faults { replaced: true, loss: 0.03, partitions: true, log_tail: 8, max_delay_ms: 60, ..KEEPING };

/// All of them, with the numbers of servers that they are hunted with.
pub const ALL: &[(&str, &[usize], Faults)] = &[
    ("lossy", &[4, 9], LOSSY),
    ("crashing", &[4, 9], CRASHING),
    ("dying", &[4, 9], DYING),
    ("twins", &[4, 7, 9], TWINS),
    ("lying", &[4, 4, 7, 9, 16], LYING),
    ("sluggish", &[4, 9], SLUGGISH),
    ("keeping-requests", &[4, 9], KEEPING_REQUESTS),
    ("keeping-steps", &[4, 9], KEEPING_STEPS),
    ("lagging-time", &[4, 9], LAGGING_TIME),
    ("telling-backups", &[4, 9], TELLING_BACKUPS),
    ("hoarding", &[9, 16], HOARDING),
    ("hole", &[4, 9, 16], HOLE),
    ("each-another", &[4, 9, 16], EACH_ANOTHER),
    ("forgetting", &[4, 9], FORGETTING),
    ("forgetting-in-turn", &[4, 4, 9], FORGETTING_IN_TURN),
    ("corrupt", &[4, 9], CORRUPT),
    ("lagging", &[4, 9], LAGGING),
    ("reading", &[4, 9, 9, 16], READING),
    ("deceived", &[4, 9, 16], DECEIVED),
    ("reading-through-it", &[4, 9], READING_THROUGH_IT),
    ("keeping", &[4, 9], KEEPING),
    ("keeping-lossy", &[4, 9], KEEPING_LOSSY),
    ("keeping-crashing", &[4, 4, 9], KEEPING_CRASHING),
    ("keeping-lying", &[4, 4, 9], KEEPING_LYING),
    ("keeping-forgetting", &[4, 4, 9], KEEPING_FORGETTING),
    ("keeping-through-everything", &[4, 9], KEEPING_THROUGH_EVERYTHING),
    ("keeping-robbed", &[4, 4, 9], KEEPING_ROBBED),
    ("restored", &[4, 9], RESTORED),
    ("asking", &[4, 9], ASKING),
    ("keeping-replaced", &[4, 9], KEEPING_REPLACED),
    ("keeping-replaced-apart", &[4, 4, 9], KEEPING_REPLACED_APART),
    ("everything", &[4, 4, 4, 7, 7, 9, 16], EVERYTHING),
];

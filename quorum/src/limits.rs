//! Every bound in one place. A server refuses what exceeds them before it stores it.

/// Servers in the largest grid: 15², because Shamir shares over GF(256) have indices 1..=255.
pub const MAX_SERVERS: usize = 225;
/// Bytes of a name (design §4).
pub const MAX_NAME_BYTES: usize = 255;
/// Keys that one record may hold.
pub const MAX_KEYS_PER_RECORD: usize = 16;
/// Bytes of one public key or certificate.
pub const MAX_KEY_BYTES: usize = 16 * 1024;
/// Bytes of an algorithm's name.
pub const MAX_ALGORITHM_BYTES: usize = 64;
/// Metadata entries of one record.
pub const MAX_METADATA_ENTRIES: usize = 32;
/// Bytes of one metadata key.
pub const MAX_METADATA_KEY_BYTES: usize = 64;
/// Bytes of one metadata value.
pub const MAX_METADATA_VALUE_BYTES: usize = 1024;
/// Bytes of a revocation's reason.
pub const MAX_REASON_BYTES: usize = 1024;
/// Readers of one secret.
pub const MAX_READERS: usize = 64;
/// Bytes of a secret's ciphertext; all sealed shares fit beside it in one request.
pub const MAX_CIPHERTEXT_BYTES: usize = 64 * 1024;
/// Bytes of one sealed share (32 bytes of share, encapsulated key, tag, and room for a hybrid).
pub const MAX_SEALED_SHARE_BYTES: usize = 2 * 1024;
/// Releases of one secret that stay readable; older ones survive as a hash chain (design §6).
pub const RELEASES_KEPT: usize = 64;
/// Administrators, at most.
pub const MAX_ADMINISTRATORS: usize = 64;
/// Decisions that some administrators ask for at the same time, at most.
pub const MAX_DECISIONS: usize = 64;
/// Replacements of servers in a cluster's life, at most: everyone follows all of them.
pub const MAX_CHANGES: usize = 1_024;
/// Changes that are shown in one message or answer, at most.
pub const CHANGES_TOGETHER: usize = 8;
/// Bytes of a server's address, at most.
pub const MAX_ADDRESS_BYTES: usize = 512;
/// Bytes of a server's TLS certificate, at most.
pub const MAX_CERTIFICATE_BYTES: usize = 8 * 1_024;
/// How long administrators have to agree on a decision, in agreed time: a week.
pub const DECISION_MS: u64 = 7 * 24 * 3_600 * 1_000;
/// Guesses at a passphrase in a row, at most. Fewer than the releases that stay readable, so that a right
/// guess can be found among them.
pub const MAX_GUESSES: u32 = 32;
/// Memory that stretching a passphrase may take.
pub const MAX_STRETCH_KIB: u32 = 1024 * 1024;
/// Passes that stretching a passphrase may take.
pub const MAX_STRETCH_PASSES: u32 = 64;
/// Releases of one secret by one key in one minute of agreed time.
pub const RELEASES_PER_MINUTE: usize = 30;

/// What one owner's requests may leave in the state, in bytes, unless administrators decide otherwise.
pub const OWNER_QUOTA_BYTES: u64 = 8 << 20;
/// What all requests may leave in the state, in bytes, unless administrators decide otherwise: as much as etcd's.
pub const TOTAL_QUOTA_BYTES: u64 = 2 << 30;
/// From here on owners make the state grow no more, in percent of the quota of all. The rest is for administrators.
pub const OWNERS_PERCENT: u64 = 95;
/// From here on there is an alarm, in percent of the quota of all.
pub const LOW_SPACE_PERCENT: u64 = 80;
/// What an entry of the state costs beside its key and value, about: nodes of the map, and a row on the disk.
pub const ENTRY_BYTES: u64 = 384;

/// Bytes of an HTTP request body, and of one encoded request.
pub const MAX_REQUEST_BYTES: usize = 256 * 1024;
/// Requests in one batch.
pub const MAX_BATCH_REQUESTS: usize = 512;
/// Bytes of the requests in one batch; one request of the largest size always fits.
pub const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// Bytes of one frame between servers.
pub const MAX_FRAME_BYTES: usize = 4 * 1024 * 1024;
/// How far beyond the agreed time a request's expiry may lie, in milliseconds.
pub const MAX_REQUEST_LIFETIME_MS: u64 = 60_000;
/// How long after its expiry the reply to a request is kept, in milliseconds of agreed time: in a state of that
/// time its absence shows that the request never executed.
pub const REPLY_KEPT_MS: u64 = 10_000;
/// Requests of one client that the client table remembers at once.
pub const MAX_CLIENT_ENTRIES: usize = 3 << 16;
/// Requests of all clients that the client table remembers at once: 15,000 a second, for longer than any is kept.
pub const MAX_REPLIES: usize = 1 << 20;
/// Requests of one client that wait to be ordered.
pub const MAX_PENDING_PER_CLIENT: usize = 1024;
/// Requests of all clients that wait to be ordered.
pub const MAX_PENDING: usize = 16 * 1024;
/// Bytes of the requests of one client that wait to be ordered.
pub const MAX_PENDING_BYTES_PER_CLIENT: usize = 16 * 1024 * 1024;
/// Bytes of the requests of all clients that wait to be ordered.
pub const MAX_PENDING_BYTES: usize = 128 * 1024 * 1024;

/// Sequence numbers between the low and the high watermark (PBFT §4.2's L).
pub const WINDOW: u64 = 256;
/// Batches that the primary keeps in flight at most.
pub const PIPELINE: u64 = 8;
/// How long the primary lets requests gather while a batch is in flight, in milliseconds: a round of
/// agreement costs the same for one request as for hundreds. Where the network is slow this keeps the
/// pipeline full; where it is fast the next batch goes as soon as the last one is executed.
pub const GATHER_MS: u64 = 50;
/// Batches beyond the last executed one that a backup accepts proposals for: what a lying primary
/// can make it store, at a megabyte each.
pub const PROPOSALS_AHEAD: u64 = 32;
/// Executed batches that stay in memory and on disk for servers that fell behind.
pub const LOG_TAIL_BATCHES: u64 = 4096;
/// Bytes of executed batches that stay in memory and on disk for servers that fell behind.
pub const LOG_TAIL_BYTES: usize = 64 * 1024 * 1024;
/// Executed batches sent in answer to one status message of a server that fell behind.
pub const CATCH_UP_BATCHES: u64 = 64;
/// Bytes of the batches in such an answer, about; the first always goes.
pub const CATCH_UP_BYTES: usize = MAX_FRAME_BYTES;
/// Bytes of answers that one peer gets to one kind of question at once. Honest servers that fell far behind
/// use it up; what they need beyond it they get at [`ANSWER_BYTES_PER_SECOND`] from each of the others.
pub const ANSWER_BURST_BYTES: i64 = 16 * 1024 * 1024;
/// See [`ANSWER_BURST_BYTES`].
pub const ANSWER_BYTES_PER_SECOND: u64 = 8 * 1024 * 1024;
/// Keys of epochs that are over under which a server may ask at a time: a server that slept has one.
pub const OLD_KEYS_ANSWERED: usize = 3;
/// Executed batches after which changed parts of the state are written to the database.
pub const FLUSH_BATCHES: u64 = 16;
/// How often a snapshot is kept for servers that fetch state, in milliseconds of agreed time, and how
/// many: a transfer has about 15 s before its target is forgotten and it goes on to a newer one.
pub const SNAPSHOT_INTERVAL_MS: u64 = 2_500;
/// Snapshots kept for servers that fetch state.
pub const SNAPSHOTS_KEPT: usize = 6;
/// Levels of the map in one part of the state, for a server that has something like it.
pub const PART_LEVELS: usize = 4;
/// Bytes of the parts in one message, about.
pub const PART_BYTES: usize = 256 * 1024;
/// Parts asked for in one message.
pub const MAX_PARTS: usize = 64;
/// How long a server may make no progress by single batches before it fetches a state, and how long
/// it waits for parts before it asks another server, in milliseconds.
pub const TRANSFER_PATIENCE_MS: u64 = 1_000;
/// Voting keys of one server that are accepted at a time: the current one and its predecessor.
pub const KEYS_PER_SERVER: usize = 4;
/// Voting keys of one server under which its votes for uncertified batches count, in one epoch: a new one comes
/// with each of its starts. So the largest view change has an end (see `message::sizes`).
pub const KEYS_SHOWN: usize = 32;
/// How often a view change that nobody answers is said again: at so many bytes a second to all together.
pub const VIEW_CHANGE_BYTES_PER_SECOND: u64 = 64 * 1024 * 1024;

/// How far a first proposal's time may lie from a backup's clock (design §3's δ), in milliseconds.
pub const CLOCK_BOUND_MS: u64 = 1_000;
/// How long a backup waits for its primary before it suspects it, in milliseconds; doubles with
/// every view change that leads to nothing, and is back once batches are executed again.
pub const VIEW_CHANGE_TIMEOUT_MS: u64 = 2_000;
/// Where doubling ends, in milliseconds.
pub const VIEW_CHANGE_TIMEOUT_MAX_MS: u64 = 60_000;
/// How long one request may wait while others are executed, in milliseconds: longer than a full
/// queue takes, so that load is not mistaken for censorship. A new primary gets half of it.
pub const CENSORSHIP_TIMEOUT_MS: u64 = 20_000;
/// How long a primary may keep a request that it could propose, beyond twice what agreeing on a
/// batch takes, in milliseconds. Otherwise one that delays everything to just under the timeout would stay.
pub const SLUGGISH_MS: u64 = 400;
/// More than this is not granted for agreement, in milliseconds: the primary can make it take long.
pub const AGREEMENT_MAX_MS: u64 = 1_000;
/// Seconds in which a primary was late, of the last [`JUDGED_SECONDS`], that make it suspected.
pub const BAD_SECONDS: usize = 5;
/// Seconds in which a primary's clock lagged, of the last [`JUDGED_SECONDS`], that make it suspected.
pub const LAGGING_SECONDS: usize = 3;
/// How many seconds a primary is judged by.
pub const JUDGED_SECONDS: u64 = 8;
/// How long a primary may go on to pass over a request that it was told of, in milliseconds: long enough for it
/// to be told twice more.
pub const PASSED_OVER_MS: u64 = 2_000;
/// How far a proposal's time may lie before its arrival, in milliseconds: clocks may differ by the bound, and it
/// was on its way. With that, a beat and a round of agreement readers' answers are fresh enough.
pub const LAG_MS: u64 = CLOCK_BOUND_MS + 500;
/// How often the limits that a primary is judged by may double where every primary seems slow.
pub const LENIENCE_MAX: u32 = 3;
/// How long a primary has to be good for them to come back by one, in milliseconds.
pub const LENIENT_FOR_MS: u64 = 10_000;
/// How long a suspicion counts, in milliseconds; it is said again while it lasts.
pub const SUSPICION_LIFETIME_MS: u64 = 2_000;
/// How often an idle primary orders an empty batch, in milliseconds.
pub const HEARTBEAT_MS: u64 = 1_000;
/// How long a replica waits for progress before it repeats what it sent, in milliseconds.
pub const RETRANSMIT_MS: u64 = 250;
/// How long a server waits before it sends a client's request to all servers, in milliseconds.
pub const FORWARD_TO_ALL_MS: u64 = 1_000;
/// Shortest agreed time between two key announcements of one server in one epoch, in milliseconds; a quarter of an epoch
/// if that is less. A server that starts again has to be heard before it can ask for anything.
pub const ANNOUNCE_INTERVAL_MS: u64 = 2_500;

/// How long an epoch lasts at least that ends early because a server waits for the next one, in milliseconds of agreed
/// time: nobody has contributions to it any more when the next attempt begins, whatever the primary's clock does.
pub const EARLY_EPOCH_MS: u64 = 5_000;
const _: () = assert!(EARLY_EPOCH_MS >= LEAP_MS + DEALINGS_KEPT_MS);
/// How often an epoch ends early for one and the same server, in milliseconds of agreed time: so f liars make at most
/// f more epochs in that time.
pub const EARLY_INTERVAL_MS: u64 = 10 * 60 * 1_000;
/// How long an attempt at a new epoch may take before it is begun anew, in milliseconds of agreed time;
/// each further attempt gets so much more, up to six times.
pub const ATTEMPT_MS: u64 = 10_000;
/// The same where enough servers are ready and too few of them have all their shares.
pub const ATTEMPT_LACKING_MS: u64 = 4_500;
/// How far one batch can take agreed time forward before the primary's clock is found to be odd: from as late as is
/// not noticed to as early as is accepted. What servers are given time for takes 2 s, and may begin right before.
pub const LEAP_MS: u64 = LAG_MS + CLOCK_BOUND_MS;
const _: () = assert!(ATTEMPT_LACKING_MS >= LEAP_MS + 2_000 && ATTEMPT_MS >= LEAP_MS + 2_000);
const _: () = assert!(DEALINGS_KEPT_AT_MOST_MS >= LEAP_MS + DEALINGS_KEPT_MS);
/// How long a server answers fetches of contributions after an epoch was sealed, and how long one that
/// was not ready may still fetch them, in milliseconds of agreed time and by its own clock (design §7): agreed time
/// alone leaps as the primary likes.
pub const DEALINGS_KEPT_MS: u64 = 2_000;
/// The same in agreed time alone: a server's own clock may have been set back meanwhile.
pub const DEALINGS_KEPT_AT_MOST_MS: u64 = 10_000;
/// How long a server waits for further dealings before it says which ones it holds, in milliseconds.
pub const ACK_DELAY_MS: u64 = 300;
/// How long a server waits for its own request of a refresh to execute before it makes it again, in
/// milliseconds.
pub const STEP_PATIENCE_MS: u64 = 2_000;
/// Chunks of shares that are recovered at a time.
pub const RECOVERY_CHUNKS: usize = 64;
/// Decodings of one slot, or of all slots of a chunk at once, before whoever recovers does something else in between.
pub const RECOVERY_TURN: usize = 64;
/// How long a server that recovers waits for the last answers when it has enough, in milliseconds.
pub const RECOVERY_WAIT_MS: u64 = 500;
/// Slots that could not be filled are asked for again after 1, 2, 4, … epochs, up to 2 to this power.
pub const RECOVERY_BACKOFF: u32 = 6;
/// How long a server waits for enough answers that agree before it gives up some shares in this epoch, in
/// milliseconds.
pub const RECOVERY_PATIENCE_MS: u64 = 3_000;

/// Records that one page of a listing may hold.
pub const MAX_PAGE: usize = 1_000;
/// Bytes of the entries that one page may hold; one entry always fits.
pub const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Names that one bulk lookup may ask for.
pub const MAX_LOOKUP_NAMES: usize = 256;
/// Nodes on one path of the authenticated map that a verifier follows: a bit position is
/// strictly larger at every step, and keys are shorter than this many 9-bit symbols.
pub const MAX_MAP_KEY_BYTES: usize = 600;

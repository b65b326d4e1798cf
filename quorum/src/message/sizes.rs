//! The largest message of each kind that a correct server sends, for the largest grid: all of them fit into a frame.

use super::*;
use crate::answer::Proved;
use crate::bytes::{Blob, PublicKey, SecretBytes, SignatureBytes};
use crate::codec::{decode, encode};
use crate::ids::{AttemptId, ClusterId, Epoch, Sequence, Timestamp, View};
use crate::limits::{
    KEYS_SHOWN, MAX_ADDRESS_BYTES, MAX_BATCH_BYTES, MAX_CERTIFICATE_BYTES, MAX_FRAME_BYTES,
    MAX_MAP_KEY_BYTES, MAX_REQUEST_BYTES, MAX_SERVERS, PART_BYTES, WINDOW,
};
use crate::map::{PartItem, Proof, Step, Terminal};
use crate::membership::{Change, Replacement};
use crate::record::Name;
use crate::request::{Operation, SignedRequest};
use crate::shares::MaskedChunk;
use crate::signing::{KeyPurpose, KeyStatement, SigningKey, Vote};
use crate::thresholds::{MAX_SEED_SETS, Thresholds};

const SIGNATURE: SignatureBytes = SignatureBytes([0xff; 64]);
const HASH: Hash = Hash([0xff; 32]);
const CLUSTER: ClusterId = ClusterId(HASH);
const ATTEMPT: AttemptId = AttemptId { epoch: Epoch(u64::MAX), attempt: u32::MAX };
const SEQUENCE: Sequence = Sequence(u64::MAX);
const VIEW: View = View(u64::MAX);
const SERVER: ServerId = ServerId(MAX_SERVERS as u8 - 1);

fn q() -> usize {
    Thresholds::plan(MAX_SERVERS, None, None).unwrap().q()
}
fn slot() -> Slot {
    Slot { view: VIEW, sequence: SEQUENCE, digest: HASH, attempt: ATTEMPT }
}
fn key(server: usize, serial: usize) -> KeyCertificate {
    let statement = KeyStatement {
        server: ServerId(server as u8),
        purpose: KeyPurpose::Voting,
        epoch: ATTEMPT.epoch,
        attempt: ATTEMPT.attempt,
        serial: u64::MAX - serial as u64,
        key: PublicKey(HASH.0),
    };
    KeyCertificate { statement, signature: SIGNATURE }
}
fn signed<T>(body: T) -> Signed<T> {
    Signed { body, server: SERVER, signature: SIGNATURE }
}
fn proof<T>(statement: T, serial: usize) -> QuorumProof<T> {
    let servers = 0..q();
    let votes = servers.clone().map(|i| Vote { server: ServerId(i as u8), signature: SIGNATURE });
    QuorumProof { statement, votes: votes.collect(), keys: servers.map(|i| key(i, serial)).collect() }
}
fn certificate() -> Certificate {
    let AttemptId { epoch, attempt } = ATTEMPT;
    proof(Checkpoint { sequence: SEQUENCE, root: HASH, time: Timestamp::MAX, epoch, attempt }, 0)
}

/// A window of prepared batches, each under other keys of the same servers, as far as these count.
fn view_change() -> ViewChange {
    let proofs: Vec<_> =
        (0..WINDOW as usize).map(|i| proof(Prepare(slot()), i.min(KEYS_SHOWN - 1))).collect();
    let mut change = ViewChange::new(VIEW, (ATTEMPT, SEQUENCE), Some(certificate()), proofs.iter());
    assert_eq!(change.keys.len(), q() * KEYS_SHOWN);
    // Other servers' votes may be in other proofs.
    let others = (q()..MAX_SERVERS).flat_map(|server| (0..KEYS_SHOWN).map(move |serial| key(server, serial)));
    change.keys.extend(others);
    let last = change.keys.len() as u16 - 1;
    change.prepared.iter_mut().flat_map(|proof| &mut proof.votes).for_each(|vote| vote.key = last);
    change
}

/// As large as a batch may be: one request, whatever is in it.
fn batch() -> Arc<Batch> {
    let of = |length: usize| {
        let (name, reason) = (Name::new("x").unwrap(), "x".repeat(length));
        let operation = Operation::Revoke { name, from_version: u64::MAX, reason };
        let key = SigningKey::from_seed(&[1; 32]);
        let request = SignedRequest::sign(&CLUSTER, &key, u64::MAX, Timestamp::MAX, operation);
        Batch { time: Timestamp::MAX, requests: vec![request] }
    };
    let around = crate::codec::signing_bytes(&CLUSTER, &of(MAX_BATCH_BYTES)).len() - MAX_BATCH_BYTES;
    let largest = of(MAX_BATCH_BYTES - around);
    let larger = of(MAX_BATCH_BYTES - around + 1);
    assert!(CheckedBatch::check(&CLUSTER, largest.clone()).is_ok());
    assert_eq!(CheckedBatch::check(&CLUSTER, larger).err(), Some(BatchError::TooLarge));
    Arc::new(largest)
}

fn change_proof() -> Arc<ChangeProof> {
    let text = "x".repeat(MAX_ADDRESS_BYTES);
    let replacement = Replacement {
        server: SERVER,
        url: text.clone(),
        peer: text,
        identity: PublicKey(HASH.0),
        certificate: Blob(vec![1; MAX_CERTIFICATE_BYTES]),
    };
    let change = Change { number: u32::MAX, from: ATTEMPT.epoch, replacement };
    // Its key is short: no path to it has more steps than that has bits.
    let steps = vec![Step { bit: u16::MAX, sibling: HASH }; 9 * 16];
    let terminal = Terminal::Leaf { key: Blob(vec![1; MAX_MAP_KEY_BYTES]), value_hash: HASH };
    let change = Proved { value: Some(change), proof: Proof { steps, terminal } };
    Arc::new(ChangeProof { change, certificate: certificate() })
}

/// Parts that leave a little room, and then one more entry.
fn parts() -> Parts {
    // No entry is larger than the request that made it.
    let leaf = |bytes| PartItem::Leaf { key: Blob(vec![1; MAX_MAP_KEY_BYTES]), value: Blob(vec![1; bytes]) };
    let mut parts = vec![vec![PartItem::Pruned(HASH)]; MAX_PARTS - 2];
    parts.extend([vec![leaf(PART_BYTES)], vec![leaf(MAX_REQUEST_BYTES)]]);
    Parts { question: u64::MAX, parts }
}

/// One of each kind.
fn largest(kind: usize) -> PeerMessage {
    let time = Timestamp::MAX;
    let checkpoint = certificate().statement;
    let status = Status {
        view: VIEW,
        active: true,
        executed: SEQUENCE,
        certified: SEQUENCE,
        wants_state: true,
        changes: u32::MAX,
        attempt: ATTEMPT,
    };
    let view_changes = (0..q()).map(|i| (ServerId(i as u8), HASH)).collect();
    let new_view = NewView { view: VIEW, attempt: ATTEMPT, view_changes };
    let evidence = || Arc::new((signed(view_change()), key(0, 0)));
    let kinds: [&dyn Fn() -> PeerMessage; KINDS] = [
        &|| PeerMessage::Keys(key(0, 0)),
        &|| {
            let (name, reason) = (Name::new("x").unwrap(), "x".repeat(MAX_REQUEST_BYTES));
            let operation = Operation::Revoke { name, from_version: u64::MAX, reason };
            let key = SigningKey::from_seed(&[1; 32]);
            PeerMessage::Forward(SignedRequest::sign(&CLUSTER, &key, u64::MAX, time, operation).into())
        },
        &|| PeerMessage::PrePrepare(signed(PrePrepare(slot())), batch()),
        &|| PeerMessage::Prepare(signed(Prepare(slot()))),
        &|| PeerMessage::Commit(signed(Commit(slot()))),
        &|| PeerMessage::Checkpoint(signed(checkpoint)),
        &|| PeerMessage::Certificate(certificate()),
        &|| PeerMessage::Held(signed(Held { sequence: SEQUENCE, attempt: ATTEMPT })),
        &|| PeerMessage::Status(signed(status)),
        &|| PeerMessage::Committed(proof(Commit(slot()), 0), batch()),
        &|| PeerMessage::Suspect(signed(Suspect { view: VIEW, attempt: ATTEMPT })),
        &|| PeerMessage::ViewChange(signed(view_change())),
        &|| PeerMessage::NewView(signed(new_view.clone()).into(), key(0, 0)),
        &|| PeerMessage::FetchViewChanges(vec![HASH; MAX_SERVERS]),
        &|| PeerMessage::FetchedViewChange(evidence()),
        &|| PeerMessage::Fetch(HASH),
        &|| PeerMessage::Fetched(batch()),
        &|| PeerMessage::AskWitness(u64::MAX),
        &|| PeerMessage::Membership(vec![change_proof(); CHANGES_TOGETHER]),
        &|| {
            PeerMessage::Witness(Box::new(Witness {
                boot: u64::MAX,
                certificate: Some(certificate()),
                prepares: vec![(signed(Prepare(slot())), key(0, 0)); 2],
                commits: vec![(signed(Commit(slot())), key(0, 0)); 2],
                view_change: Some(evidence()),
            }))
        },
        &|| PeerMessage::Offer(certificate()),
        &|| {
            let path = encode(&(u16::MAX, Blob(vec![1; 9 * MAX_MAP_KEY_BYTES / 8 + 1])));
            let wanted = decode(&[&path[..], &[1]].concat()).unwrap();
            let parts = vec![wanted; MAX_PARTS];
            PeerMessage::AskParts(AskParts { sequence: SEQUENCE, root: HASH, question: u64::MAX, parts })
        },
        &|| PeerMessage::Parts(parts()),
        &|| {
            let hashes = vec![(1u8, HASH); 2 * MAX_SEED_SETS as usize];
            let handed = HandedOut {
                attempt: ATTEMPT,
                dealer: SERVER,
                dealing: decode(&encode(&hashes)).expect("it is what dealings look like"),
            };
            PeerMessage::Dealing(Box::new(handed))
        },
        &|| PeerMessage::AskDealing(WantedDealing { attempt: ATTEMPT, dealer: SERVER }),
        &|| {
            let chunks = vec![u64::MAX; RECOVERY_CHUNKS];
            PeerMessage::AskMasked(AskMasked { attempt: ATTEMPT, chunks })
        },
        &|| {
            let values = vec![SecretBytes::new(&[1; 32]); crate::refresh::CHUNK];
            let chunk = MaskedChunk { chunk: u64::MAX, filled: u128::MAX, excused: 0, values };
            PeerMessage::Masked(Masked { attempt: ATTEMPT, chunks: vec![chunk; RECOVERY_CHUNKS] })
        },
    ];
    kinds[kind]()
}

/// Where a kind stands in the table above: a new one is missed here.
fn place(message: &PeerMessage) -> usize {
    match message {
        PeerMessage::Keys(_) => 0,
        PeerMessage::Forward(_) => 1,
        PeerMessage::PrePrepare(..) => 2,
        PeerMessage::Prepare(_) => 3,
        PeerMessage::Commit(_) => 4,
        PeerMessage::Checkpoint(_) => 5,
        PeerMessage::Certificate(_) => 6,
        PeerMessage::Held(_) => 7,
        PeerMessage::Status(_) => 8,
        PeerMessage::Committed(..) => 9,
        PeerMessage::Suspect(_) => 10,
        PeerMessage::ViewChange(_) => 11,
        PeerMessage::NewView(..) => 12,
        PeerMessage::FetchViewChanges(_) => 13,
        PeerMessage::FetchedViewChange(_) => 14,
        PeerMessage::Fetch(_) => 15,
        PeerMessage::Fetched(_) => 16,
        PeerMessage::AskWitness(_) => 17,
        PeerMessage::Membership(_) => 18,
        PeerMessage::Witness(_) => 19,
        PeerMessage::Offer(_) => 20,
        PeerMessage::AskParts(_) => 21,
        PeerMessage::Parts(_) => 22,
        PeerMessage::Dealing(_) => 23,
        PeerMessage::AskDealing(_) => 24,
        PeerMessage::AskMasked(_) => 25,
        PeerMessage::Masked(_) => 26,
    }
}
const KINDS: usize = 27;

/// Whatever a correct server may have to say can be said, in every grid that `plan` accepts.
#[test]
fn every_message_fits_into_a_frame() {
    for kind in 0..KINDS {
        let message = largest(kind);
        assert_eq!(place(&message), kind);
        let bytes = encode(&message).len();
        let shown = format!("{message:.0?}");
        let name = shown.split(['(', ' ']).next().unwrap_or_default();
        println!("{name:<20} {bytes:>9}");
        assert!(bytes <= MAX_FRAME_BYTES, "{name}: {bytes} bytes");
    }
}

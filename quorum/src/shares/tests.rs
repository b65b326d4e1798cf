use super::*;
use crate::bytes::Hash;
use crate::ids::AttemptId;
use crate::ids::ClusterId;
use crate::refresh::Seeds;
use crate::thresholds::Thresholds;

fn store(index: u64, epoch: u64, share: Option<u8>) -> ShareOp {
    let share = share.map(|byte| SecretBytes::new(&[byte; 32]));
    ShareOp::Store { index, epoch: Epoch(epoch), share, dealt: false }
}
fn renewal(to: u64, ready: bool) -> ShareOp {
    let attempt = AttemptId { epoch: Epoch(to), attempt: 1 };
    let thresholds = Thresholds::plan(4, None, None).unwrap();
    let seeds = Seeds::new(ClusterId(Hash([1; 32])), thresholds, attempt, true, None);
    let dealing = seeds.draw(ServerId(0), &SecretBytes::new(&[to as u8; 32]));
    let terms = seeds.zero_sharing(ServerId(2), &[(ServerId(0), &dealing)]);
    ShareOp::Renew(Renewal { to: Epoch(to), terms: terms.filter(|_| ready), recovering: None })
}
fn set(operations: &[ShareOp]) -> ShareSet {
    let mut set = ShareSet::new();
    operations.iter().for_each(|operation| set.apply(operation));
    set
}
fn share(set: &ShareSet, index: u64) -> Option<[u8; 32]> {
    set.share(index).map(|share| *share.expose())
}

#[test]
fn a_share_is_of_one_epoch_only() {
    let ready = set(&[store(0, 0, Some(1)), store(300, 0, None), renewal(1, true)]);
    assert_eq!(
        (ready.epoch(), ready.counts()),
        (Epoch(1), ShareCounts { secrets: 2, shares: 1, excused: 0 })
    );
    assert_ne!(share(&ready, 0), Some([1; 32]));
    // Not ready in time: what it has is worth nothing, and must not be left to be stolen.
    let late = set(&[store(0, 0, Some(1)), renewal(1, false)]);
    assert_eq!((share(&late, 0), late.counts()), (None, ShareCounts { secrets: 1, shares: 0, excused: 0 }));
    // Nor is it of use to jump over an epoch.
    let jumped = set(&[store(0, 0, Some(1)), renewal(2, true)]);
    assert_eq!((jumped.epoch(), share(&jumped, 0)), (Epoch(2), None));
    assert_eq!(late.gaps().collect::<Vec<_>>(), [(0, 1)]);
}

#[test]
fn deposits_of_the_next_epoch_may_come_before_this_servers_shares_of_it() {
    let both = set(&[store(0, 0, Some(1)), store(1, 1, Some(9)), renewal(1, true)]);
    assert_eq!(share(&both, 1), Some([9; 32]));
    assert_ne!(share(&both, 0), Some([1; 32]));
    assert_eq!(both.counts(), ShareCounts { secrets: 2, shares: 2, excused: 0 });
    let late = set(&[store(0, 0, Some(1)), store(1, 1, Some(9)), renewal(1, false)]);
    assert_eq!((share(&late, 0), share(&late, 1)), (None, Some([9; 32])));
}

/// After a crash operations come again, some of them poorer than they were: keys that opened a deposit and
/// seeds that renewed an epoch are erased by then.
#[test]
fn operations_that_come_again_change_nothing() {
    let operations = [
        store(0, 0, Some(1)),
        store(1, 0, Some(2)),
        renewal(1, true),
        store(2, 1, Some(3)),
        ShareOp::Erase { index: 1 },
        ShareOp::Recovered {
            epoch: Epoch(1),
            shares: vec![(2, SecretBytes::new(&[8; 32]))],
            excused: vec![],
        },
    ];
    let once = set(&operations);
    for from in 0..operations.len() {
        let mut again = once.clone();
        for operation in &operations[from..] {
            let poorer = match operation {
                ShareOp::Store { index, epoch, .. } => store(*index, epoch.0, None),
                ShareOp::Renew(renewal) => {
                    ShareOp::Renew(Renewal { to: renewal.to, terms: None, recovering: None })
                }
                other => other.clone(),
            };
            again.apply(&poorer);
        }
        assert_eq!(again.counts(), once.counts());
        for index in 0..3 {
            assert_eq!(share(&again, index), share(&once, index), "from {from}, secret {index}");
        }
    }
    assert_eq!(share(&once, 2), Some([3; 32]), "an intact share is never thrown away");
}

#[test]
fn a_state_transfer_keeps_what_is_of_its_epoch_and_nothing_else() {
    let present = |epoch| ShareOp::Present { indices: vec![0, 2, 200], epoch: Epoch(epoch) };
    let same = set(&[store(0, 0, Some(1)), store(1, 0, Some(2)), present(0)]);
    assert_eq!((share(&same, 0), share(&same, 1)), (Some([1; 32]), None));
    assert_eq!(same.counts(), ShareCounts { secrets: 3, shares: 1, excused: 0 });
    let later = set(&[store(0, 0, Some(1)), present(3)]);
    assert_eq!(
        (later.epoch(), later.counts()),
        (Epoch(3), ShareCounts { secrets: 3, shares: 0, excused: 0 })
    );
    let earlier = set(&[present(3), store(2, 3, Some(5)), present(1)]);
    assert_eq!((earlier.epoch(), share(&earlier, 2)), (Epoch(3), Some([5; 32])));
    // It fills what is missing, and only that.
    let mut filled = earlier;
    let all = (0..3).map(|index| (index, SecretBytes::new(&[7; 32]))).collect();
    filled.apply(&ShareOp::Recovered { epoch: Epoch(3), shares: all, excused: vec![] });
    assert_eq!(
        (share(&filled, 0), share(&filled, 1), share(&filled, 2)),
        (Some([7; 32]), None, Some([5; 32]))
    );
}

#[test]
fn sets_come_back_from_their_encoding() {
    let before = set(&[store(0, 0, Some(1)), store(500, 0, Some(2)), store(7, 1, Some(3))]);
    let mut after: ShareSet = crate::codec::decode(&crate::codec::encode(&before)).unwrap();
    after.apply(&renewal(1, true));
    let mut expected = before;
    expected.apply(&renewal(1, true));
    for index in [0, 7, 500] {
        assert!(share(&after, index).is_some());
        assert_eq!(share(&after, index), share(&expected, index));
    }
    assert_eq!(format!("{after:?}"), "ShareSet(epoch 1, ShareCounts { secrets: 3, shares: 3, excused: 0 })");
}

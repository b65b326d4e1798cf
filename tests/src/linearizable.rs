//! Is a history linearizable (Herlihy & Wing 1990)? Names are independent of each other, so each is
//! checked by itself, with the search of Wing & Gong and the memory of Lowe ("Testing for
//! linearizability", 2017).

use std::collections::BTreeSet;

/// What a name stands for: its version and a number that tells its contents from all others.
pub type Value = Option<(u64, u64)>;

/// What a client asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Register the name with these contents.
    Register(u64),
    /// Replace a version.
    Rotate {
        /// The version to replace.
        from: u64,
        /// The new contents.
        contents: u64,
    },
    /// Look the name up.
    Lookup,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A write that was acknowledged.
    Done,
    /// A write that was refused: the name was taken, or had another version.
    Refused,
    /// What a lookup found.
    Found(Value),
    /// No answer: a write may have happened, at any time since, or never.
    Unknown,
}

/// One call, from when it was made to when its answer came, on one clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// When it was called.
    pub called: u64,
    /// When it returned; meaningless where the outcome is unknown.
    pub returned: u64,
    /// What was asked.
    pub call: Call,
    /// What came of it.
    pub outcome: Outcome,
}

impl Operation {
    fn deadline(&self) -> u64 {
        if self.outcome == Outcome::Unknown { u64::MAX } else { self.returned }
    }
    /// The state after it, if it could have had this outcome in `state`.
    fn apply(&self, state: Value) -> Option<Value> {
        let (fits, after) = match self.call {
            Call::Register(contents) => (state.is_none(), Some((1, contents))),
            Call::Rotate { from, contents } => {
                (state.is_some_and(|(version, _)| version == from), Some((from + 1, contents)))
            }
            Call::Lookup => return (self.outcome == Outcome::Found(state)).then_some(state),
        };
        match self.outcome {
            Outcome::Done => fits.then_some(after),
            Outcome::Refused => (!fits).then_some(state),
            // Without effect it is as good as never.
            Outcome::Unknown => fits.then_some(after),
            Outcome::Found(_) => None,
        }
    }
}

/// Checks the history of one name; if it cannot be explained, gives the calls that can be put in order
/// at most, in that order.
pub fn check(history: &[Operation]) -> Result<(), Vec<Operation>> {
    let lookups_without_answer =
        |operation: &&Operation| operation.call == Call::Lookup && operation.outcome == Outcome::Unknown;
    let mut operations: Vec<_> =
        history.iter().filter(|operation| !lookups_without_answer(operation)).copied().collect();
    operations.sort_by_key(|operation| operation.called);
    let must: usize = operations.iter().filter(|operation| operation.outcome != Outcome::Unknown).count();

    let mut seen = BTreeSet::new();
    let mut best = Vec::new();
    // Each frame: what is in order so far, the state, and the next candidate to try.
    let mut order: Vec<usize> = Vec::new();
    let mut states: Vec<Value> = vec![None];
    let mut next = vec![0];
    let mut done = vec![false; operations.len()];
    loop {
        let known = order.iter().filter(|i| operations[**i].outcome != Outcome::Unknown).count();
        if known == must {
            return Ok(());
        }
        if order.len() > best.len() {
            best = order.clone();
        }
        // Whoever is next was called before every other open call returned.
        let limit = (0..operations.len()).filter(|i| !done[*i]).map(|i| operations[i].deadline()).min();
        let limit = limit.unwrap_or(u64::MAX);
        let state = *states.last().expect("there is always the first state");
        let from = *next.last().expect("one for each state");
        let mut found = None;
        // What changes nothing and fits now goes first, and need not be tried anywhere else: whatever
        // order there is, it may as well stand here.
        let open = (0..operations.len()).take_while(|i| operations[*i].called <= limit);
        let idle = open.into_iter().find(|i| !done[*i] && operations[*i].apply(state) == Some(state));
        if let Some(i) = idle.filter(|_| from == 0) {
            done[i] = true;
            order.push(i);
            states.push(state);
            *next.last_mut().expect("one for each state") = operations.len();
            next.push(0);
            continue;
        }
        for i in (from..operations.len()).take_while(|i| operations[*i].called <= limit) {
            let Some(after) = (!done[i]).then(|| operations[i].apply(state)).flatten() else { continue };
            done[i] = true;
            if seen.insert((done.clone(), after)) {
                found = Some((i, after));
                break;
            }
            done[i] = false;
        }
        if let Some((i, after)) = found {
            *next.last_mut().expect("one for each state") = i + 1;
            order.push(i);
            states.push(after);
            next.push(0);
        } else {
            states.pop();
            next.pop();
            match order.pop() {
                Some(i) => done[i] = false,
                None => return Err(best.into_iter().map(|i| operations[i]).collect()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(called: u64, returned: u64, call: Call, outcome: Outcome) -> Operation {
        Operation { called, returned, call, outcome }
    }
    fn lookup(called: u64, returned: u64, value: Value) -> Operation {
        op(called, returned, Call::Lookup, Outcome::Found(value))
    }
    const REGISTER: Call = Call::Register(7);
    const ROTATE: Call = Call::Rotate { from: 1, contents: 8 };

    #[test]
    fn histories_that_can_be_put_in_order_pass() {
        assert_eq!(check(&[]), Ok(()));
        // A lookup during a register may see it or not.
        for seen in [None, Some((1, 7))] {
            assert_eq!(check(&[op(0, 10, REGISTER, Outcome::Done), lookup(1, 2, seen)]), Ok(()));
        }
        // Of two rotations at once one wins.
        let other = Call::Rotate { from: 1, contents: 9 };
        let history = [
            op(0, 1, REGISTER, Outcome::Done),
            op(2, 9, ROTATE, Outcome::Refused),
            op(3, 8, other, Outcome::Done),
            lookup(10, 11, Some((2, 9))),
        ];
        assert_eq!(check(&history), Ok(()));
        // What had no answer may happen much later, or never.
        let unknown = op(2, 3, ROTATE, Outcome::Unknown);
        let before = [op(0, 1, REGISTER, Outcome::Done), unknown, lookup(4, 5, Some((1, 7)))];
        assert_eq!(check(&before), Ok(()));
        assert_eq!(check(&[&before[..], &[lookup(6, 7, Some((2, 8)))]].concat()), Ok(()));
    }

    #[test]
    fn histories_that_cannot_are_found_out() {
        let registered = op(0, 1, REGISTER, Outcome::Done);
        let rotated = op(2, 3, ROTATE, Outcome::Done);
        for wrong in [
            // A stale read, a lost write, a value from nowhere.
            vec![registered, rotated, lookup(4, 5, Some((1, 7)))],
            vec![registered, lookup(2, 3, None)],
            vec![registered, lookup(2, 3, Some((1, 99)))],
            // A read that goes back behind another read, although both overlap the write.
            vec![
                registered,
                op(2, 9, ROTATE, Outcome::Done),
                lookup(3, 4, Some((2, 8))),
                lookup(5, 6, Some((1, 7))),
            ],
            // Two acknowledged registers; two acknowledged rotations of one version.
            vec![registered, op(2, 3, Call::Register(8), Outcome::Done)],
            vec![registered, rotated, op(2, 3, Call::Rotate { from: 1, contents: 9 }, Outcome::Done)],
            // A refusal without a reason.
            vec![registered, op(2, 3, ROTATE, Outcome::Refused)],
            // Seen before it was called.
            vec![lookup(0, 1, Some((1, 7))), op(2, 3, REGISTER, Outcome::Done)],
            // What had no answer happened, and then had not.
            vec![
                registered,
                op(2, 3, ROTATE, Outcome::Unknown),
                lookup(4, 5, Some((2, 8))),
                lookup(6, 7, Some((1, 7))),
            ],
        ] {
            assert!(check(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn long_histories_are_checked_in_reasonable_time() {
        // 400 calls, eight at a time.
        let mut history = vec![op(0, 0, REGISTER, Outcome::Done)];
        for version in 1..50 {
            let at = version * 100;
            for client in 0..8 {
                let call = Call::Rotate { from: version, contents: at + client };
                let outcome = if client == 3 { Outcome::Done } else { Outcome::Refused };
                history.push(op(at + client, at + 90, call, outcome));
            }
        }
        assert_eq!(check(&history), Ok(()));
        history.push(lookup(6_000, 6_001, Some((49, 4_803))));
        assert!(check(&history).is_err());
    }
}

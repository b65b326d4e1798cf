//! What a peer's questions may cost: for each peer and each kind of question so many bytes of answers, which grow
//! back with time. A question is small and its answer large, and a liar asks as often as it likes.
//!
//! A correct server asks again when it got no answer, or has used what it got; so whoever has to wait here is
//! answered at one of its next questions.
//!
//! What is said under keys of epochs that are over, which a thief may have, has budgets of its own: it takes
//! nothing from the server itself (design §7).

use crate::ids::{Epoch, Sequence, ServerId, Timestamp};
use crate::limits::{ANSWER_BURST_BYTES, ANSWER_BYTES_PER_SECOND, OLD_KEYS_ANSWERED, RETRANSMIT_MS};
use std::collections::BTreeMap;

/// Kinds of questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Question {
    /// Batches and certificates, for one that says how far it is.
    Help,
    /// How the view began.
    NewView,
    /// View changes that a new view names.
    ViewChange,
    /// Changes of the membership.
    Membership,
    /// Which state can be fetched.
    Offer,
    /// Parts of a state.
    Parts,
    /// A batch that a new view needs.
    Batch,
    /// What the peer signed before.
    Witness,
}

/// Who asks: a server under the key of this epoch, or whoever has one of an earlier epoch.
pub(super) type Asker = (ServerId, Option<Epoch>);

/// What one asker may still get; less than nothing after a large answer.
#[derive(Clone, Copy)]
struct Account {
    left: i64,
    when: Timestamp,
}

/// See the module.
#[derive(Clone, Default)]
pub(super) struct Budgets {
    accounts: BTreeMap<(Asker, Question), Account>,
    /// When each asker was last helped, and up to where.
    helped: BTreeMap<Asker, (Timestamp, Sequence)>,
}

impl Account {
    fn now(self, now: Timestamp) -> i64 {
        let back = now.since_ms(self.when).saturating_mul(ANSWER_BYTES_PER_SECOND) / 1_000;
        self.left.saturating_add_unsigned(back).min(ANSWER_BURST_BYTES)
    }
}

impl Budgets {
    /// Whether a question is answered now.
    pub(super) fn allows(&self, now: Timestamp, asker: Asker, question: Question) -> bool {
        let old = |(other, _): &&(Asker, Question)| other.0 == asker.0 && other.1.is_some();
        match self.accounts.get(&(asker, question)) {
            Some(account) => account.now(now) > 0,
            // Those that nobody used lately are forgotten; a thief with many keys gets no more than a few.
            None => {
                let live = |key: &&(Asker, Question)| self.accounts[*key].now(now) < ANSWER_BURST_BYTES;
                let askers = self.accounts.keys().filter(old).filter(live).filter(|key| key.1 == question);
                asker.1.is_none() || askers.count() < OLD_KEYS_ANSWERED
            }
        }
    }

    /// An answer of about so many bytes goes out.
    pub(super) fn spend(&mut self, now: Timestamp, asker: Asker, question: Question, bytes: usize) {
        self.accounts.retain(|_, account| account.now(now) < ANSWER_BURST_BYTES);
        let account = self.accounts.entry((asker, question));
        let account = account.or_insert(Account { left: ANSWER_BURST_BYTES, when: now });
        *account = Account { left: account.now(now).saturating_sub_unsigned(bytes as u64), when: now };
    }

    /// Whether to help one that has executed so much: once an interval, or as soon as it used all that it got.
    pub(super) fn may_help(&self, now: Timestamp, asker: Asker, executed: Sequence) -> bool {
        let again = |(when, through): &(Timestamp, Sequence)| {
            now.since_ms(*when) >= RETRANSMIT_MS || executed >= *through
        };
        self.helped.get(&asker).is_none_or(again) && self.allows(now, asker, Question::Help)
    }

    /// It was sent batches up to `through`.
    pub(super) fn helped(&mut self, now: Timestamp, asker: Asker, through: Sequence, bytes: usize) {
        self.helped.retain(|_, (when, _)| now.since_ms(*when) < RETRANSMIT_MS);
        self.helped.insert(asker, (now, through));
        self.spend(now, asker, Question::Help, bytes);
    }

    /// What decides its future, for model checkers.
    pub(super) fn fingerprint(&self) -> impl serde::Serialize + use<> {
        let helped: Vec<_> = self.helped.iter().map(|(asker, when)| (*asker, *when)).collect();
        let accounts = self.accounts.iter();
        let accounts = accounts
            .map(|((asker, question), account)| (*asker, *question as u8, account.left, account.when));
        (helped, accounts.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000);
    const ONE: Asker = (ServerId(1), None);

    /// Bytes of answers that `questions` questions a millisecond get in `ms`, each of `bytes`.
    fn got(asker: Asker, budgets: &mut Budgets, from: Timestamp, ms: u64, bytes: usize) -> u64 {
        let mut got = 0;
        for now in (0..ms).map(|ms| from.plus_ms(ms)) {
            for _ in 0..4 {
                if budgets.allows(now, asker, Question::Parts) {
                    budgets.spend(now, asker, Question::Parts, bytes);
                    got += bytes as u64;
                }
            }
        }
        got
    }

    #[test]
    fn answers_are_bounded_for_each_peer_and_kind_of_question() {
        let mut budgets = Budgets::default();
        let (burst, second) = (ANSWER_BURST_BYTES as u64, ANSWER_BYTES_PER_SECOND);
        let first = got(ONE, &mut budgets, NOW, 1_000, 100_000);
        assert!((burst..=burst + second + 200_000).contains(&first), "{first}");
        let next = got(ONE, &mut budgets, NOW.plus_ms(1_000), 1_000, 100_000);
        assert!((second - 200_000..=second + 200_000).contains(&next), "{next}");
        // Others, and other questions, are answered as ever.
        let later = NOW.plus_ms(2_000);
        assert!(budgets.allows(later, (ServerId(2), None), Question::Parts));
        assert!(budgets.allows(later, ONE, Question::Batch));
        // A clock that goes back gives nothing.
        assert!(!budgets.allows(NOW, ONE, Question::Parts));
    }

    #[test]
    fn who_has_old_keys_takes_nothing_from_the_server() {
        let mut budgets = Budgets::default();
        for epoch in 0..9 {
            let thief = (ServerId(1), Some(Epoch(epoch)));
            let got = got(thief, &mut budgets, NOW, 10, 1_000_000);
            budgets.helped(NOW, thief, Sequence(u64::MAX), 0);
            assert_eq!(got > 0, epoch < OLD_KEYS_ANSWERED as u64, "{epoch}");
        }
        assert!(budgets.allows(NOW, ONE, Question::Parts));
        assert!(budgets.may_help(NOW, ONE, Sequence(1)));
        assert!(budgets.allows(NOW, (ServerId(2), Some(Epoch(0))), Question::Parts));
    }

    #[test]
    fn help_comes_again_when_it_was_used_or_after_a_while() {
        let mut budgets = Budgets::default();
        budgets.helped(NOW, ONE, Sequence(64), 1_000);
        assert!(!budgets.may_help(NOW, ONE, Sequence(63)), "claiming one more each time gets nothing");
        assert!(budgets.may_help(NOW, ONE, Sequence(64)));
        assert!(budgets.may_help(NOW.plus_ms(RETRANSMIT_MS), ONE, Sequence(0)));
    }
}

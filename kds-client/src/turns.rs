//! Whom to ask next, where one server after the other is asked: each once, and those that ask to wait again when
//! they said. A server that is a moment behind is asked again too, a few times: that is no lie, and what lies like it
//! costs no more.

use crate::client::Client;
use crate::deadline::after;
use crate::error::LinkError;
use crate::failure::Tally;
use quorum::answer::AnswerError;
use quorum::ids::ServerId;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How often a server may be behind before it is asked no more.
const PATIENCE_WITH_THE_PAST: u32 = 5;
/// How long to wait before it is asked again at first; then longer each time.
const PAUSE: Duration = Duration::from_millis(30);

/// How long one server is waited for at least, where any will do.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asking servers in turn, until the operation's time is over.
pub(crate) struct Turns<'a> {
    client: &'a Client,
    deadline: Instant,
    order: VecDeque<ServerId>,
    /// Who asked to wait, and until when.
    waiting: Vec<(Instant, ServerId)>,
    /// How often each was behind.
    behind: BTreeMap<ServerId, u32>,
    /// What came of it.
    pub(crate) tally: Tally,
}

impl<'a> Turns<'a> {
    pub(crate) fn new(client: &'a Client) -> Self {
        let (deadline, order) = (client.deadline(), client.preferred().into());
        Self { client, deadline, order, waiting: vec![], behind: BTreeMap::new(), tally: Tally::default() }
    }
    /// When to stop asking: some time is left to find out whose clock is wrong, where that may be it.
    fn end(&self) -> Instant {
        self.client.end(self.deadline, self.tally.odd_times)
    }
    /// The next server, and until when to wait for it; none if nobody is left, or no time.
    pub(crate) async fn next(&mut self) -> Option<(ServerId, Instant)> {
        let end = self.end();
        let server = match self.order.pop_front() {
            Some(server) => server,
            None => {
                let place = (0..self.waiting.len()).min_by_key(|place| self.waiting[*place].0)?;
                let (when, server) = self.waiting[place];
                sleep_until(when.min(end)).await;
                if when <= end {
                    self.waiting.swap_remove(place);
                }
                server
            }
        };
        let now = Instant::now();
        let patience = self.client.inner.options.hedge.max(PATIENCE);
        (now < end).then(|| (server, end.min(now + patience)))
    }
    /// No answer, or none that a correct server gives.
    pub(crate) fn failed(&mut self, server: ServerId, error: &LinkError) {
        if let LinkError::AsksToWait { wait, .. } = error {
            self.waiting.push((after(*wait), server));
        }
        self.tally.failed(server, error);
    }
    /// An answer that is not good.
    pub(crate) fn wrong(&mut self, server: ServerId, error: &AnswerError) {
        if matches!(error, AnswerError::Behind { .. } | AnswerError::Backwards { .. }) {
            let times = self.behind.entry(server).or_default();
            *times += 1;
            if *times <= PATIENCE_WITH_THE_PAST {
                self.waiting.push((after(PAUSE * 2_u32.pow(*times - 1)), server));
                return;
            }
        }
        self.tally.wrong(server, error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Options;
    use quorum::ids::Sequence;

    #[tokio::test]
    async fn who_is_behind_is_asked_again_a_few_times_and_a_liar_once() {
        let client = Client::new(crate::fixtures::cluster(), Options::default()).unwrap();
        let behind = AnswerError::Behind { got: Sequence(3), current: Sequence(4) };
        for (error, times) in [(behind, PATIENCE_WITH_THE_PAST + 1), (AnswerError::OtherValue, 1)] {
            let (mut turns, mut count) = (Turns::new(&client), BTreeMap::<ServerId, u32>::new());
            while let Some((server, _)) = turns.next().await {
                *count.entry(server).or_default() += 1;
                turns.wrong(server, &error);
            }
            assert_eq!(count.into_values().collect::<Vec<_>>(), [times; 4], "{error}");
            assert_eq!(turns.tally.rejected.len(), 4);
        }
    }
}

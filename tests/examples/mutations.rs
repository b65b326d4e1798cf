//! Breaks rules on purpose, one at a time, and looks for what notices that. The table; `tests/src/mutants` does it.
//!
//! ```text
//! cargo run --example mutations [-- [--anew] [PART-OF-A-NAME...]]
//! ```
//!
//! What notices each is written to `tests/mutations.md`, to be tried first the next time; `--anew` does without. Ends with
//! status 1 if anything survives, does not build, or no longer finds the code that it changes.
//!
//! A row of the table is
//!
//! ```text
//! "what is broken", "who is to notice", "file":
//!     "text that stands there once" => "what it becomes";
//! ```
//!
//! `file` is a path below `quorum/src`, or, where it begins with the folder of another crate, a path in the workspace
//! (`kds-client/src/cache.rs`). What is broken inside a function costs one test; a constant, a `const fn` or what returns
//! `impl Trait` costs a build. Who is to notice:
//!
//! | | |
//! |---|---|
//! | `unit` | the unit tests of the crate that the file is part of |
//! | `unit:kds-client` | the unit tests of that package, which may be another one (`quorum`, `kds-certs`, `kds-client`, `kds-server`) |
//! | `tests:lying_server` | the end-to-end tests in `tests/tests/lying_server.rs`, with real servers: they take longest |
//! | anything else | the hunt in that scenario (`everything`, `everything:4`, `all`), and if it does not, the unit tests |

use kds_tests::mutants::Mutation;

macro_rules! mutations {
    ($($name:literal, $scenario:literal, $file:literal: $find:literal => $replace:literal;)*) => {
        &[$(Mutation { name: $name, scenario: $scenario, file: $file, find: $find, replace: $replace },)*]
    };
}

const MUTATIONS: &[Mutation] = mutations! {
    "commit after q-1 prepares", "all", "ordering/agree.rs":
        "entry.prepared_now(quorum)" => "entry.prepared_now(quorum - 1)";
    "execute after q-1 commits", "all", "ordering/agree.rs":
        "entry.committed_now(quorum)" => "entry.committed_now(quorum - 1)";
    "certify after q-1 checkpoint votes", "all", "ordering/certify.rs":
        "book.proof(&own.checkpoint, quorum)" => "book.proof(&own.checkpoint, quorum - 1)";
    "keep votes in a receipt that were not checked", "unit", "answer.rs":
        "receipt.certificate = self.certificate(&receipt.certificate)?;" => "self.certificate(&receipt.certificate)?;";
    "keep statements of completeness that were not checked", "unit", "answer.rs":
        "completion.verify(&mut self.keyring)?;\n            self.completion(completion)?;" => "self.completion(completion)?;";
    "believe a certificate of f+1", "unit", "certificate.rs":
        "if signers.len() < thresholds.q() {" => "if signers.len() < thresholds.f() + 1 {";
    "count a server's second, different vote", "unit", "certificate.rs":
        "== vote.body().attempt() => Err(Box::new(vote))," => "== vote.body().attempt() => { self.votes.insert(vote.server(), vote); Ok(true) }";
    "vote while a view change is under way", "everything", "ordering/agree.rs":
        "view == self.view && self.changing.active" => "view == self.view";
    "do not persist what is accepted", "all", "ordering/propose.rs":
        "self.pending.write(Write::Accepted { pre_prepare: proposal.clone(), batch: Arc::clone(&wire) });" => "";
    "do not persist what is prepared", "all", "ordering/agree.rs":
        "self.pending.write(Write::Prepared { sequence, proof });" => "let _ = proof;";
    "do not persist what is committed", "all", "ordering/agree.rs":
        "self.pending.write_along(Write::Committed { batch: None, proof: proof.clone() });" => "";
    "do not persist the view before leaving it", "dying", "ordering/view_change.rs":
        "self.pending.write(Write::View { view, began: None });" => "";
    "do not put votes back at a restart", "everything:7", "ordering/restore.rs":
        "entry.pre_prepare = Some(pre_prepare);" => "let _ = pre_prepare;";
    "show nothing prepared in a view change", "everything:4", "ordering/view_change.rs":
        "let prepared = prepared.map(|(proof, _)| proof);" => "let prepared = prepared.map(|(proof, _)| proof).take(0);";
    "ignore what view changes show", "everything:4", "ordering/view_change.rs":
        "for proof in view_changes.flat_map(|change| &change.prepared) {" => "for proof in view_changes.flat_map(|change| &change.prepared).take(0) {";
    "let the older view win in a new view", "unit", "ordering/view_change.rs":
        "if slot.view > known.0 {" => "if slot.view < known.0 {";
    "accept what the new view does not call for", "unit", "ordering/new_view.rs":
        "Some(expected) if expected != digest => {" => "Some(expected) if expected != digest && sequence.0 == u64::MAX => {";
    "name a server twice in a new view", "unit", "message/view_change.rs":
        "are_quorum(keyring.manifest(), &servers).map_err(|_: QuorumError| MessageError::BadNewView)" => "Ok(())";
    "let one view change stand for two", "unit", "message/view_change.rs":
        "let named = (*server, *digest) == (change.server(), change.digest());" => "let named = *digest == change.digest() && *server != ServerId(u8::MAX);";
    "begin a view with view changes to another", "unit", "message/view_change.rs":
        "named && (view, attempt, began) == (self.view, self.attempt, epoch_began)" => "named && (attempt, began) == (self.attempt, epoch_began) && view != View(u64::MAX)";
    "begin a view with view changes from elsewhere in the order", "unit", "message/view_change.rs":
        "named && (view, attempt, began) == (self.view, self.attempt, epoch_began)" => "named && (view, attempt) == (self.view, self.attempt) && began.0.max(epoch_began.0) < u64::MAX";
    "give nothing that a new view names", "each-another", "ordering/new_view.rs":
        "for change in digests.iter().filter_map(|digest| held.get(digest)) {" => "for change in digests.iter().filter_map(|digest| held.get(digest)).take(0) {";
    "wait for view changes that do not exist", "unit", "ordering/new_view.rs":
        "if gathering.is_some_and(|gathering| now.since_ms(gathering.advanced) < patience_ms) {" => "if gathering.is_some() && patience_ms > 0 {";
    "let others go before the primary whose view is to begin", "unit", "ordering/new_view.rs":
        "(gathering.from == from && changed) || (urgent && other)" => "(gathering.from == from && changed) || (urgent && other) || gathering.from != from";
    "check view changes that nobody asked for", "unit", "ordering/wants.rs":
        "&& self.changes_wanted.contains(&digest(&self.cluster, &evidence.0))" => "&& evidence.0.server.0 < u8::MAX";
    "follow proposals of a view that cannot begin here", "unit", "ordering/wants.rs":
        "self.waits_for(new_view.view) && new_view.view_changes.iter().all(held)" => "self.waits_for(new_view.view) || new_view.view_changes.iter().all(held)";
    "go on after a restart with less than a view began with", "unit", "ordering/restore.rs":
        "if !held.is_empty() && held != named {" => "if held.len() > named.len() {";
    "go on after a restart without knowing what the view calls for", "unit", "ordering/new_view.rs":
        "self.body().attempt < attempt || !self.changes.is_empty()" => "self.body().attempt <= attempt || !self.changes.is_empty()";
    "count votes under any number of keys", "unit", "ordering/agree.rs":
        "if of_server.len() >= KEYS_SHOWN && !of_server.contains_key(key) {" => "if of_server.len() >= usize::MAX && !of_server.contains_key(key) {";
    "take any number of keys in a view change", "unit", "message/view_change.rs":
        "of_one.len() <= KEYS_SHOWN" => "of_one.len() < usize::MAX";
    "take keys twice in a view change", "unit", "message/view_change.rs":
        "self.keys.is_sorted_by(|one, next| one < next)" => "self.keys.is_sorted_by(|one, next| one <= next)";
    "say the largest view changes four times a second", "unit", "ordering/view_change.rs":
        "RETRANSMIT_MS.max(bytes.saturating_mul(1_000) / VIEW_CHANGE_BYTES_PER_SECOND)" => "RETRANSMIT_MS.max(bytes / u64::MAX)";
    "believe a new view of an epoch that is over", "unit", "ordering/new_view.rs":
        "*attempt == current || (*attempt < current && vouching > self.manifest.thresholds.f())" => "*attempt <= current";
    "let old keys vouch for a new view", "unit", "ordering/new_view.rs":
        "*of == current && known >= view" => "*of <= current && known >= view";
    "do not check proofs in view changes", "unit", "message/view_change.rs":
        "keyring.verify_under(&keys[usize::from(vote.key)], statement, &vote.signature)?;" => "let _ = (&keys, statement, vote);";
    "leave a view on a single suspicion", "unit", "ordering/view_change.rs":
        "against.len() > self.manifest.thresholds.f()" => "!against.is_empty()";
    "never suspect", "dying", "ordering/view_change.rs":
        "if self.finds_fault(now, waited, self.changing.timeout_ms) {" =>
            "if self.finds_fault(now, waited, self.changing.timeout_ms) && self.id.0 > 200 {";
    "let a primary pass over what it was told of", "keeping-requests", "ordering/judge.rs":
        "if made.since_ms(since) >= passed_over_ms {" => "if made.since_ms(since) >= u64::MAX - passed_over_ms {";
    "excuse whatever comes in full batches", "unit", "ordering/judge.rs":
        "!(room || in_turn || before_later)" => "!(room || before_later)";
    "let later requests of a client overtake earlier ones", "unit", "ordering/judge.rs":
        "!(room || in_turn || before_later)" => "!(room || in_turn)";
    "forget late seconds", "unit", "ordering/judge.rs":
        "self.bad.insert(self.current);" => "self.bad = BTreeSet::from([self.current]);";
    "blame the primary for what it was not told", "telling-backups", "ordering/judge.rs":
        "self.pending.send(Target::One(primary), PeerMessage::Forward(request));" => "let _ = (primary, request);";
    "let a primary's clock lag", "lagging-time", "ordering/judge.rs":
        "accepted.since_ms(batch.time()) > LAG_MS" => "accepted.since_ms(batch.time()) > u64::MAX - LAG_MS";
    "let a primary fail attempts at epochs", "unit", "ordering/judge.rs":
        "self.conduct.failed = Some(now);" => "";
    "check proposals of those who are no primaries", "unit", "ordering/wants.rs":
        "primary && near && new" => "near && new";
    "check a known proposal again", "unit", "ordering/wants.rs":
        "primary && near && new" => "primary && near";
    "check batches that nobody asked for", "unit", "ordering/wants.rs":
        "!self.batches.is_empty() && self.batches.contains(&digest(&self.cluster, batch.as_ref()))" => "self.batches.len() <= batch.requests.len() + 2";
    "answer whatever is asked", "unit", "ordering/budget.rs":
        "Some(account) => account.now(now) > 0," => "Some(account) => account.now(now) > i64::MIN,";
    "let old keys take the server's help", "unit", "ordering/catch_up.rs":
        "other.then_some(status.attempt.epoch)" => "(other && false).then_some(status.attempt.epoch)";
    "forward the same few requests again and again", "unit", "ordering/catch_up.rs":
        "due.sort_by_key(|waiting| waiting.sent);" => "";
    "help whoever claims one more each time", "unit", "ordering/budget.rs":
        "|| executed >= *through" => "|| executed <= *through";
    "show a server only its votes for the highest place", "unit", "ordering/standing.rs":
        "self.highest.into_iter().chain(self.last)" => "self.highest.into_iter()";
    "wait for batches that only liars have", "hoarding", "ordering/view_change.rs":
        "changes.partition(|(lacking, _)| lacking.is_empty());" => "changes.partition(|(lacking, _)| lacking.len() < usize::MAX);";
    "judge every primary alike although all seem slow", "unit", "ordering/judge.rs":
        "(lenience.0 + 1).min(LENIENCE_MAX)" => "lenience.0.min(LENIENCE_MAX)";
    "give up on a view only where q name it exactly", "everything", "ordering/view_change.rs":
        "changes.filter(|change| change.body().view >= self.view)" => "changes.filter(|change| change.body().view == self.view)";
    "execute a request twice", "everything:4", "state/mod.rs":
        "if self.reply(id).is_some() {\n            return true;" => "if self.reply(id).is_some() && id.sequence == u64::MAX {\n            return true;";
    "let agreed time go back", "all", "state/mod.rs":
        "self.time = self.time.max(batch.time());" => "self.time = batch.time();";
    "accept any time", "lying:4", "ordering/propose.rs":
        "&& batch.time() > agreed && batch.time().since_ms(now) > CLOCK_BOUND_MS" => "&& batch.time() > agreed && batch.time().since_ms(now) > u64::MAX / 2 + CLOCK_BOUND_MS";
    "vote although votes are forgotten", "unit", "ordering/standing.rs":
        "let amnesia = estimation.amnesia.or_else(" => "let amnesia = None::<Amnesia>.or_else(";
    "do not look at what the others hold", "unit", "ordering/standing.rs":
        "let sequence = votes().map(" => "let sequence = votes().take(0).map(";
    "vote again in the epoch in which votes were forgotten", "unit", "ordering/standing.rs":
        "certificate.statement.epoch > through)" => "certificate.statement.epoch >= through)";
    "show readers what is older than what was said to be held", "unit", "ordering/standing.rs":
        "&& self.certified() >= self.shown_from" => "&& self.certified() >= self.shown_from.min(Sequence(0))";
    "keep from voting until nothing older is shown", "unit", "ordering/standing.rs":
        "matches!(self.standing, Standing::Voting) && !self.diverged && has_key" => "self.shows_readers() && !self.diverged && has_key";
    "take an older copy of the database for the newest", "unit", "ordering/restore.rs":
        "|| signer.voting > self.voting_key {" => "|| signer.voting > self.voting_key.saturating_add(100) {";
    "rely on what others have seen of a restored server", "forgetting-in-turn", "ordering/restore.rs":
        "|| signer.voting > self.voting_key {" => "|| signer.voting > self.voting_key.saturating_add(100) {";
    "certify two voting keys of one number", "unit", "signer.rs":
        "if asked <= last ||" => "if asked < last ||";
    "let one who has the server use up the numbers", "unit", "signer.rs":
        "|| asked - last > MAX_SKIPPED {" => "{";
    "take any part of a state", "lagging", "map/sync.rs":
        "match found == hash {" => "match found == hash || self.missing > 0 {";
    "offer no state to those far behind", "lagging", "ordering/catch_up.rs":
        "// The log no longer reaches back to there.\n            self.offer_state(asker, status.executed);" => "";
    "write only a part of a fetched state", "lagging", "ordering/transfer.rs":
        "leaves.entry(key).or_insert(value);" => "let _ = (key, value);";
    "keep nothing of the log below a fetched state", "lagging", "ordering/transfer.rs":
        "self.pending.write(Write::Trim { through: statement.sequence });" => "self.pending.write(Write::Reset);";
    "judge the primary while behind", "unit", "ordering/view_change.rs":
        "if self.executed() < self.certified_anywhere {" => "if self.executed() < self.certified_anywhere && self.id.0 > 200 {";
    "say what is held before it is durable", "all", "ordering/effects.rs":
        "match message.promises() {" => "match message.promises() && !matches!(message, PeerMessage::Held(_)) {";
    "commit before the proof is durable", "all", "ordering/effects.rs":
        "match message.promises() {" => "match message.promises() && !matches!(message, PeerMessage::Commit(_)) {";
    "take a late answer for one to a newer question", "unit", "ordering/transfer.rs":
        "let answers = |asked: &Asked| asked.question == answer.question;" => "let answers = |asked: &Asked| asked.question != u64::MAX - answer.question;";
    "forget replies as soon as their requests expire", "unit", "state/clients.rs":
        "expiry.plus_ms(REPLY_KEPT_MS) >= now" => "expiry >= now";
    "return what a single server says", "reading", "read.rs":
        "Consistency::Row => self.grid.read_is_complete(&answered)," => "Consistency::Row => !answered.is_empty(),";
    "ignore claims of newer versions", "reading-through-it", "read.rs":
        "enough && self.versions.values().all(|version| *version <= best.version)" => "enough";
    "return what is not complete", "reading", "read.rs":
        "if verifier.complete() >= self.last_change() {" => "if true {";
    "return less than was seen", "deceived", "read.rs":
        "if best.version < self.question.seen {" => "if best.version > u64::MAX - self.question.seen {";
    "believe any certificate", "deceived", "answer.rs":
        "certificate.verify(&mut self.keyring)?;\n        let before" => "let before";
    "believe answers of any age", "unit", "answer.rs":
        "if age_ms > max_age_ms {" => "if age_ms > u64::MAX - max_age_ms {";
    "believe any value on a true path", "reading", "answer.rs":
        "if sha256(&encode(value)) == hash =>" => "if hash != Hash([0; 32]) =>";
    "wait for ever for who is to prove a claim", "reading", "read.rs":
        "ask.1 == Ask::Full && !self.late.contains(ask.0);" => "ask.1 == Ask::Full;";
    "believe statements of completeness for less", "unit", "certificate.rs":
        "if held.body.sequence < self.sequence {" => "if held.body.sequence.0 == u64::MAX {";
    "a write needs no columns", "unit", "grid.rs":
        "&& self.full_columns(holders) >= usize::from(self.thresholds.columns)" => "";
    "seal an epoch with q-1 ready", "unit", "state/epochs.rs":
        "if attempt.ready.len() >= thresholds.q() && kept {" => "if attempt.ready.len() + 1 >= thresholds.q() && whole > 0 {";
    "seal an epoch on servers without shares", "unit", "state/epochs.rs":
        "let kept = whole >= thresholds.k() + thresholds.f() || !attempt.renews;" => "let kept = whole < 1_000;";
    "fix dealers that q-1 hold", "unit", "state/epochs.rs":
        ".count() >= thresholds.q()" => ".count() + 1 >= thresholds.q()";
    "fix fewer dealers than may be corrupt", "unit", "state/epochs.rs":
        "if fixed.len() >= thresholds.k().max(thresholds.f() + 1) {" => "if !fixed.is_empty() {";
    "let a dealer commit twice", "unit", "state/epochs.rs":
        "if known.deals.contains_key(server) || known.dealers.is_some() { taken }" => "if known.dealers.is_some() { taken }";
    "be ready without contributions", "keeping-lossy", "ordering/renew.rs":
        "if dealers.iter().all(held) && said" => "if said";
    "acknowledge before it is durable", "keeping", "ordering/effects.rs":
        "self.released.requests.push(request);" => "let request = Box::new(request.signed().clone());\n        self.free.push((Target::All, Arc::new(PeerMessage::Forward(request))));";
    "believe contributions that were not committed to", "keeping-lying", "ordering/renew.rs":
        "if seeds.root(dealer, &dealing) != Some(deal.root) {" => "if seeds.root(dealer, &dealing).is_none() {";
    "keep shares of an epoch that is over", "keeping-crashing", "shares.rs":
        "None => chunk.empty(u128::MAX)," => "None => {}";
    "keep keys of an epoch that is over", "keeping", "ordering/renew.rs":
        "self.pending.write(Write::Vault { key: VaultKey::Opening(epoch), value: None });" => "";
    "keep contributions", "keeping", "ordering/renew.rs":
        "self.pending.write(Write::Vault { key: VaultKey::Dealing(id, dealer), value: None });" => "";
    "give a member of a set its seed", "unit", "refresh.rs":
        "Part::Value(value) if set.members.contains(server) => Part::Hash" => "Part::Value(value) if set.members.contains(dealer) => Part::Hash";
    "a zero sharing that is not zero", "unit", "refresh.rs":
        "Coefficient { byte: gf256::multiply(i, byte), whole: i64::from(i) * whole }" => "Coefficient { byte, whole }";
    "accept a recovered share with k+f-2 answers", "unit", "recovery/verdict.rs":
        "self.thresholds.k() + self.thresholds.f() - 1" => "self.thresholds.k() + self.thresholds.f() - 2";
    "accept a recovered share although another one fits", "unit", "recovery/verdict.rs":
        "(wrong < f || (wrong == f" => "(wrong <= f || (wrong == f";
    "excuse slots because others lack their shares too", "unit", "recovery/verdict.rs":
        "has(answer.excused & !answer.filled)).count()" => "!has(answer.filled)).count()";
    "excuse slots on the word of f servers", "unit", "recovery/verdict.rs":
        "if excusing > f {" => "if excusing >= f {";
    "excuse slots that f liars can make look so", "unit", "recovery/verdict.rs":
        "f - excusing.max(usize::from(undecidable))" => "f - excusing.max(1)";
    "excuse slots about which too few say anything", "unit", "recovery/verdict.rs":
        "_ if 2 * bearable <= spare => Verdict::Excused," => "_ if bearable <= 2 * spare => Verdict::Excused,";
    "leave slots open that were dealt wrongly", "unit", "recovery/verdict.rs":
        "let undecidable = n - 1 < k + 2 * f;" => "let undecidable = n - 1 < k;";
    "believe those first who were wrong before", "unit", "recovery/verdict.rs":
        "let blame = self.blame.get(server).copied().unwrap_or_default();" => "let blame = usize::MAX - self.blame.get(server).copied().unwrap_or_default();";
    "keep an excuse although the share came back", "unit", "shares.rs":
        "self.excused &= !(1 << place);" => "";
    "find wrong values in the first column only", "unit", "decoding.rs":
        "for column in columns {" => "for column in columns.take(1) {";
    "make epochs as short as anyone likes", "unit", "state/epochs.rs":
        "now.since_ms(self.since) >= EARLY_EPOCH_MS" => "self.since <= now";
    "end epochs early as often as one asks", "unit", "state/epochs.rs":
        "now.since_ms(*last) >= EARLY_INTERVAL_MS)" => "now >= *last)";
    "leave a server that waits for an epoch waiting", "restored", "ordering/renew.rs":
        "if (self.renewing.holding.lacks_shares || waits_for_epoch) && on_record && !asked {" => "if self.renewing.holding.lacks_shares && self.may_vote() && on_record && !asked {";
    "give masked shares to anyone", "unit", "shares.rs":
        "filter(|_| helping.server == server && helping.attempt == attempt)?" => "filter(|_| helping.attempt == attempt || helping.server == server)?";
    "count a statement under a key of another epoch", "unit", "signing.rs":
        "keys.filter(|key| key.certificate.statement.attempt_id() == attempt)" => "keys.filter(|key| key.certificate.statement.attempt_id() >= attempt || attempt.attempt > 0)";
    "let keys of epochs that are over sign what is said now", "keeping-robbed", "signing.rs":
        "keys.filter(|key| key.certificate.statement.attempt_id() == attempt)" => "keys.filter(|key| key.certificate.statement.attempt_id() <= attempt)";
    "hear votes of epochs that are over", "unit", "ordering/barrier.rs":
        "said_in == current ||" => "said_in <= current ||";
    "vote beyond a batch that may seal an epoch", "unit", "ordering/barrier.rs":
        "of_attempt.len() >= self.quorum()" => "of_attempt.len() > 200";
    "let one server's word be a barrier", "unit", "ordering/barrier.rs":
        "of_attempt.len() >= self.quorum()" => "!of_attempt.is_empty()";
    "let one server fill the room of all", "unit", "ordering/pool.rs":
        "if in_share || room {" => "if room {";
    "let a primary's clock end the time for contributions", "unit", "ordering/renew.rs":
        "let both = agreed_ms >= DEALINGS_KEPT_MS && own_ms >= DEALINGS_KEPT_MS;" => "let both = agreed_ms >= DEALINGS_KEPT_MS;";
    "let a thief take keys for an attempt along", "keeping-robbed", "signer.rs":
        "if ask.attempt == self.counter.coming && ask.attempt.epoch > begun.epoch {" => "if ask.attempt.epoch.0 > begun.epoch.0 && ask.attempt.epoch.0 <= begun.epoch.0 + 2 {";
    "put statements of several epochs together", "unit", "certificate.rs":
        "if Some(held.body.attempt) != self.held.first().map(|first| first.body.attempt) {" => "if self.held.is_empty() {";
    "believe completeness under keys of epochs that are over", "unit", "answer.rs":
        "if oldest.next() >= current {" => "if oldest.next() >= current || oldest < current {";
    "certify keys for epochs to come", "unit", "signer.rs":
        "if ask.attempt.epoch > begun.epoch {\n            return Err" => "if ask.attempt.epoch > begun.epoch.next() {\n            return Err";
    "certify keys for attempts that nobody has seen", "unit", "signer.rs":
        "if ask.attempt == self.counter.coming && ask.attempt.epoch > begun.epoch {" => "if ask.attempt.epoch == begun.epoch.next() {";
    "certify keys for epochs that are over", "unit", "signer.rs":
        "        Ok(begun)\n    }" => "        Ok(begun.min(ask.attempt))\n    }";
    "let a signer believe what it is told of epochs", "unit", "signer.rs":
        "evidence.verify(&mut Keyring::of(Arc::clone(&self.membership)))?;" => "";
    "certify keys with an identity that is not the server's", "unit", "signer.rs":
        "if !ask.keys.is_empty()" => "if ask.keys.len() > 9";
    "take steps with keys of epochs that are over", "unit", "state/epochs.rs":
        "keys.voting.statement.attempt_id() == epochs.attempt_id() && " => "";
    "announce keys of epochs that are over", "unit", "state/server_keys.rs":
        "&& voting.statement.attempt_id() == current" => "";
    "let one administrator decide", "unit", "state/decisions.rs":
        "if approvals < needed {" => "if approvals < needed && approvals == 0 {";
    "count administrators who are none any more", "unit", "state/decisions.rs":
        "pending.approvals.retain(|key| layout::is_administrator(&self.map, key));" => "";
    "follow a change without its certificate", "unit", "membership.rs":
        "proof.certificate.verify(&mut Keyring::of(Arc::new(before)))?;" => "";
    "follow a change that was certified in any epoch", "unit", "membership.rs":
        "if proof.certificate.statement.epoch.next() != change.from {" => "if proof.certificate.statement.epoch > change.from {";
    "follow a change that is not in the certified state", "unit", "membership.rs":
        "_ => Err(MembershipError::NotThere(change.number))," => "_ => Ok(change.clone()),";
    "follow changes in any order", "unit", "membership.rs":
        ".filter(|change| change.number as usize == number)" => "";
    "let two servers have one identity, or a stolen one come back", "unit", "membership.rs":
        "&& !used.any(|used| *used == replacement.identity)" => "&& used.next().is_some()";
    "let a replaced identity certify keys", "unit", "membership.rs":
        ".find(|change| change.from <= epoch);" => ".find(|change| change.from < epoch);";
    "keep keys of a replaced identity", "unit", "signing.rs":
        "keys.retain(|key| identity(&before, key) == identity(membership, key));" => "keys.retain(|key| identity(&before, key).is_some());";
    "hand secrets to whoever has an old link key", "unit", "ids.rs":
        "self.attempt > 0 && self >= about" => "self.attempt > 0 && self.epoch.next() >= about.epoch";
    "hand secrets to an identity that has no epoch yet", "unit", "ids.rs":
        "self.attempt > 0 && self >= about" => "self >= about";
    "help whoever has a replaced identity", "unit", "signing.rs":
        "self.membership.is_replaced(signed.server, key.statement.epoch, self.current)" => "self.membership.is_replaced(signed.server, self.current, key.statement.epoch)";
    "begin an epoch that nobody could follow to", "unit", "state/epochs.rs":
        "_ if self.membership.unproved().is_some() => return," => "";
    "let a server deal that is about to be replaced", "unit", "state/replacements.rs":
        "epochs.give_up();" => "";
    "count the shares of a server that is about to be replaced", "unit", "state/epochs.rs":
        "**whole && stays(server)" => "**whole || stays(server)";
    "replace servers one after the other in one epoch", "unit", "state/replacements.rs":
        "last.is_some_and(|last| last.from > self.epoch())" => "last.is_some_and(|last| last.from < self.epoch())";
    "put on record what shows nothing", "unit", "state/replacements.rs":
        "membership.check(membership.proofs().len(), proof).is_ok_and(|change| change == *wanted)" => "proof.change.value.as_ref() == Some(wanted)";
    "show changes to nobody who slept", "unit", "ordering/catch_up.rs":
        "let some: Vec<_> = proofs.iter().take(CHANGES_TOGETHER).cloned().collect();" => "let some: Vec<_> = proofs.iter().take(0).cloned().collect();";
    "do not count guesses", "unit", "state/secrets.rs":
        "releases.guessed += u32::from(blinded.is_some());" => "";
    "give back guesses that came after the right one", "unit", "state/guesses.rs":
        "releases.guessed.min(since as u32)" => "releases.guessed.min(since as u32 - since as u32)";
    "let everyone guess", "unit", "state/guesses.rs":
        "self.readers.is_empty() || secrets::may_read(state, self, client)" => "self.readers.is_empty() || secrets::may_read(state, self, client) || true";
    "hand out shares of a passphrase's key", "unit", "state/secrets.rs":
        "if secret.passphrase.is_some() {\n            return Err(Refusal::OnlyByPassphrase);" => "if secret.passphrase.is_some() && secret.index == 0 {\n            return Err(Refusal::OnlyByPassphrase);";
    "believe an evaluation without its proof", "unit", "oprf.rs":
        "if result.is_proved(&self.element) =>" => "if result.key != result.element || result.is_proved(&self.element) =>";
    "put evaluations under any key together", "unit", "oprf.rs":
        "if key_at(0) == whole {" => "if key_at(0) == whole || got > needed {";
    "open shares under another passphrase's terms", "unit", "sealing.rs":
        "passphrase: deposit.passphrase.as_ref()," => "passphrase: None,";
    "a mask over scalars that its server cannot take off", "unit", "refresh.rs":
        "whole: product.whole * (i64::from(i) - i64::from(l.share_index()))," => "whole: product.whole * (i64::from(i) + i64::from(l.share_index())),";
    "rows and columns that meet in b servers", "unit", "thresholds.rs":
        "let columns = (masked + 1).div_ceil(rows);" => "let columns = masked.div_ceil(rows);";
    "accept any server's certificate", "unit", "certs/src/lib.rs":
        "if *self.certificate != **certificate {" => "if self.certificate.is_empty() {";
    "forget what was told", "unit", "kds-client/src/seen.rs":
        "*known = Told { since: known.since.max(told.since), ..told };" => "";
    "leave what was freed in memory", "unit", "kds-server/src/memory.rs":
        "static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);" => "static ALLOCATOR: System = System;";
    "leave calculations on the stack", "unit", "kds-server/src/memory.rs":
        "scrub_stack();\n    done" => "done";
    "remember the key of an attempt that is over", "unit", "kds-server/src/at_rest.rs":
        "attempts.extract_if(.., |attempt, _| over(*attempt))" => "attempts.extract_if(.., |attempt, _| over(*attempt) && attempt.attempt == u32::MAX)";
    "forget a key's file that could not be erased", "unit", "kds-server/src/at_rest.rs":
        "let Some(attempt) = lock(&self.condemned).first().copied()" => "let Some(attempt) = lock(&self.condemned).pop_first()";
    "let an IPv6 network have an allowance for each address", "unit", "kds-server/src/places.rs":
        "IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64))" => "IpAddr::V6(v6)";
    "let a flood push out whoever came first", "unit", "kds-server/src/places.rs":
        "let (_, Reverse(oldest)) = of.max()?;" => "let Reverse(oldest) = of.map(|(_, oldest)| oldest).max()?;";
    "give one address all places", "unit", "kds-server/src/places.rs":
        "(held == 0 || amount <= self.most_each.saturating_sub(held))" => "(held == 0 || amount <= self.most_each)";
    "let a byte now and then hold an answer", "unit", "kds-server/src/http/paced.rs":
        "let earned = Duration::from_secs(bytes as u64) / BYTES_PER_SECOND;" => "let earned = Duration::from_secs(bytes as u64) * BYTES_PER_SECOND;";
    "take limits that make no sense", "unit", "kds-server/src/http/limits.rs":
        "range.contains(&value)," => "range.contains(&value) || range.start() <= range.end(),";
    "let one server's refusal stand for the cluster's", "unit", "answer/shown.rs":
        "(servers.len() >= self.needed)" => "(!servers.is_empty())";
    "let a server refuse twice", "unit", "answer/shown.rs":
        "let reason = self.said.entry(server).or_insert(reason).clone();" => "self.said.insert(server, reason.clone());";
    "remember keys that no vote is signed with", "unit", "certificate.rs":
        "self.keys.iter().find(|key| key.statement.attempt_id() != attempt)" => "self.keys.iter().find(|key| key.statement.attempt_id() < AttemptId::default())";
    "name servers for what old keys sign", "unit", "evidence.rs":
        "&& one.attempt() != other.attempt() {" => "&& one.attempt() == other.attempt() && one.sequence.0 == u64::MAX {";
    "forget who the servers are until the log is executed", "unit", "ordering/restore.rs":
        "proofs.fold(Arc::clone(membership), |known, proof| known.follow([proof]).unwrap_or(known))" => "proofs.fold(Arc::clone(membership), |known, _| known)";
    "fetch whatever state is offered", "unit", "ordering/transfer.rs":
        "filter(|(sequence, _)| offering(sequence) >= needed)" => "filter(|(sequence, _)| offering(sequence) + needed >= needed)";
    "put what thieves ask to the server's account", "unit", "ordering/mod.rs":
        "self.asked_under = Some(of);" => "self.asked_under = Some(of).filter(|of| of.0 == u64::MAX);";
    "let waiting requests take any memory", "unit", "ordering/pool.rs":
        "&& self.bytes + bytes <= MAX_PENDING_BYTES;" => ";";
    "take more votes than q", "unit", "certificate.rs":
        "if voters.len() > thresholds.q() {" => "if voters.len() > thresholds.n() {";
    "take keys of those who did not sign", "unit", "certificate.rs":
        "if let Some(surplus) = surplus(&self.keys, &signers) {" => "if let Some(surplus) = surplus(&[], &signers) {";
    "take keys of those who state nothing", "unit", "certificate.rs":
        "if let Some(surplus) = surplus(&self.keys, &holders) {" => "if let Some(surplus) = surplus(&[], &holders) {";
    "take keys that no vote of evidence is signed with", "unit", "evidence.rs":
        "if keys.len() > 2 || keys.iter().any(|key| key.statement.server != first.server) {" => "if keys.len() > 200 {";
    "say that one server's answer is complete", "unit", "read.rs":
        "true if self.question.consistency == Consistency::Any => self.progress = Progress::Done," =>
            "true if self.question.consistency == Consistency::Any => (self.progress, self.complete) = (Progress::Done, true),";
    "forget what was told of a state", "unit", "kds-client/src/seen.rs":
        "inside.newest = inside.newest.max(state);" => "";
    "forget in which state something was refused", "unit", "kds-client/src/seen.rs":
        "(told.since, told.record) = (told.since.max(state), None);" => "let _ = told;";
    "let what others say steer a terminal", "unit", "kds-client/src/error.rs":
        "if steers(c) { '\\u{fffd}' } else { c }" => "c";
    "say all that a server says", "unit", "kds-client/src/error.rs":
        "said.chars().take(MOST_WORDS)" => "said.chars()";
    "let in whom an older sighting lets in", "unit", "kds-client/src/tls/standing.rs":
        ".max_by_key(Sighting::age)?" => ".min_by_key(Sighting::age)?";
    "let in who is known to be revoked by another call", "unit", "kds-client/src/tls/standing.rs":
        "newest.version() >= told &&" => "newest.version() + 100 >= told &&";
    "go by a clock that can be set back", "unit", "kds-client/src/tls/standing.rs":
        "by_clock.min(self.steady.saturating_duration_since(Instant::now()))" => "by_clock";
    "hand out a connection by what was known before the handshake", "unit", "kds-client/src/tls/mod.rs":
        "known.admits(name, certificate)?;" => "";
    "take votes of keys that nobody announced for evidence", "unit", "evidence.rs":
        "if keys.voting.statement.key == key.statement.key =>" => "if keys.voting.statement.server == server =>";
    "take votes under any key that is known for evidence", "unit", "evidence.rs":
        "if holds { Ok(()) } else {" => "if holds || keyring.verify(vote.server, &vote.body, &vote.signature).is_ok() { Ok(()) } else {";
    "take a key that was announced in another epoch for evidence", "unit", "evidence.rs":
        "if state.attempt() != key.statement.attempt_id() {" => "if state.attempt() < AttemptId::default() {";
    "keep an earlier version that nobody asked for", "unit", "answer.rs":
        "if version.is_none_or(is_current) && answer.earlier.is_some() {" => "if version.is_none_or(is_current) && answer.earlier.is_none() && false {";
    "pass over changes of the membership that are known", "unit", "membership.rs":
        "if *proof != *followed.proofs[number]" => "if number > followed.proofs.len() && *proof != *followed.proofs[number]";
    "take two attempts at one epoch for one", "unit", "evidence.rs":
        "earlier.epoch == later.epoch && earlier.attempt != later.attempt;" => "false;";
    "wait for a server as often as it says", "tests:puppets", "kds-client/src/lookup.rs":
        "if open[at].sent.is_none() {" => "if open[at].sent.is_none() || true {";
    "believe f+1 servers that may change their minds", "tests:puppets", "kds-client/src/submit.rs":
        "!by_state || said.servers().len() >=" => "true || said.servers().len() >=";
    "take a request to another cluster for one that never was", "tests:puppets", "kds-client/src/outcome.rs":
        "if ticket.cluster != beginning(&self.inner.manifest.cluster_id().0) {" => "if ticket.cluster == [0; 8] {";
    "ask nobody again who is a moment behind", "unit:kds-client", "kds-client/src/turns.rs":
        "if *times <= PATIENCE_WITH_THE_PAST {" => "if *times == 0 {";
    "ask for ever who is behind", "unit:kds-client", "kds-client/src/turns.rs":
        "if *times <= PATIENCE_WITH_THE_PAST {" => "if *times <= 1 + PATIENCE_WITH_THE_PAST {";
    "call what was deleted meanwhile absent", "unit:kds-client", "kds-client/src/secrets.rs":
        "Shown::Absent(absence) => Err(changed(Some(Box::new(absence))))," => "Shown::Absent(absence) => Err(absence.into()),";
    "give another secret for the one that was there", "unit:kds-client", "kds-client/src/secrets.rs":
        "Shown::There(secret) if secret.index == index => Ok(secret)," => "Shown::There(secret) if secret.index >= index => Ok(secret),";
    "say not found by word of mouth", "unit:kds-client", "kds-client/src/error.rs":
        "Self::RefusedByServers { .. } => ExitStatus::Refused," => "Self::RefusedByServers { .. } => ExitStatus::NotFound,";
    "take refusals without a receipt for what executing tells", "tests:lying_server", "kds-client/src/submit.rs":
        "        | ProblemKind::TooLarge) => Some(reason)," => "        | ProblemKind::TooLarge | ProblemKind::Conflict) => Some(reason),";
    "let an owner's requests take what they like", "unit", "state/space.rs":
        "if grows_beyond(used, needed, if by == payer { freed } else { 0 }, quota) {" => "if grows_beyond(used, needed, if by == payer { freed } else { 0 }, u64::MAX.max(quota)) {";
    "let all requests together take what they like", "unit", "state/space.rs":
        "match grows_beyond(space.used, needed, freed, quota) {" => "match grows_beyond(space.used, needed, freed, u64::MAX.max(quota)) {";
    "leave no space to administrators", "unit", "state/space.rs":
        "let quota = if payer.is_none() { space.total } else { space.for_owners() };" => "let quota = if payer.is_none() { space.total } else { space.total };";
    "give a quota to every key that a name is handed on to", "unit", "state/space.rs":
        "giver.map_or((to, false), |giver| (giver.account, giver.refuses_gifts));" => "giver.map_or((to, false), |giver| (to, giver.refuses_gifts));";
    "forget at the next key that gifts are refused", "unit", "state/space.rs":
        "giver.map_or((to, false), |giver| (giver.account, giver.refuses_gifts));" => "giver.map_or((to, false), |giver| (giver.account, false));";
    "give space to readers", "unit", "state/space.rs":
        ".ok_or(Refusal::OwnsNoName)\n    }\n\n    /// Whether something can take" => ".map_or(Ok(None), Ok)\n    }\n\n    /// Whether something can take";
    "give nothing back for a secret that is gone", "unit", "state/secrets.rs":
        "self.give_back_space(secret.account, secret.space);" => "";
    "refuse to revoke where there is no space", "unit", "state/names.rs":
        "Status::Revoked { .. } => self.payer(&client).unwrap_or_default()," => "Status::Revoked { .. } => { let payer = self.payer(&client)?; self.may_take(payer, needed, None)?; payer }";
    "do not count versions", "unit", "state/names.rs":
        "self.take_space(payer, needed);" => "let _ = (payer, needed);";
    "make somebody an owner against her will", "unit", "state/secrets.rs":
        "if deposit.owner != client {\n            self.takes_gifts(&deposit.owner)?;" => "if deposit.owner != client && deposit.owner == client {\n            self.takes_gifts(&deposit.owner)?;";
    "hand a name to somebody against her will", "unit", "state/names.rs":
        "new_owner.filter(|owner| payer.is_some() && *owner != client)" => "new_owner.filter(|owner| payer.is_none() && *owner != client)";
    "take an error of the disk for damage", "unit", "kds-server/src/storage/failure.rs":
        "code::CORRUPT | code::NOT_A_DATABASE => Self::Damaged," => "code::CORRUPT | code::NOT_A_DATABASE | code::IO => Self::Damaged,";
    "take a page that could not be read for damage", "unit", "kds-server/src/storage/failure.rs":
        "(_, Some(unread)) => Err(Unsound { failure: Failure::Passing," => "(_, Some(unread)) => Err(Unsound { failure: Failure::Damaged,";
    "do not have a database checked", "unit", "kds-server/src/storage/mod.rs":
        "failure::judge(&found)?;" => "let _ = failure::judge(&found);";
    "believe a stored value without its digest", "unit", "kds-server/src/storage/transaction.rs":
        "(digest(place, value) == *known).then(" => "(digest(place, value) == *known || true).then(";
    "do not count transactions", "unit", "kds-server/src/storage/mod.rs":
        "self.next_operation = next_operation;\n        self.count_to(number);" => "self.next_operation = next_operation;";
    "keep every damaged database", "unit", "kds-server/src/storage/aside.rs":
        "for old in all(folder)?.iter().rev().skip(KEPT) {" => "for old in all(folder)?.iter().rev().skip(KEPT + 9) {";
    "put a database aside without a note that it is lost", "unit", "kds-server/src/storage/aside.rs":
        "File::create(folder.join(LOST_DATABASE))?.sync_all()?;" => "";
    "trust a database that is known to be an older copy", "unit", "ordering/restore.rs":
        "if self.forgot || signer.voting > self.voting_key {" => "if signer.voting > self.voting_key {";
    "believe a signer's counter without its digest", "unit", "kds-server/src/signer.rs":
        "ensure!(to_remember(&counter)? == bytes," => "ensure!(to_remember(&counter)? == bytes || true,";
    "erase after a start has begun to serve", "tests:disks", "kds-server/src/share_store.rs":
        "storage.rotate(self.applied).await.context(\"the database does not take it\")?;\n        self.erase_others(number).await" => "storage.rotate(self.applied).await.context(\"the database does not take it\")";
    "break off the keeper of the shares at a stop", "tests:disks", "kds-server/src/server.rs":
        "drawing.abort();" => "drawing.abort();\n    keeping.abort();";
};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    kds_tests::mutants::check(MUTATIONS, &arguments)
}

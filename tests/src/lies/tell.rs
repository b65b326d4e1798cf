//! Turns an honest answer into a lie. Nothing is known here of what may be believed: only of how answers look.

use super::{Lie, Route};
use quorum::answer::ShareAnswer;
use quorum::sealing::HandOutContext;
use quorum::{Blob, ClusterId, Hash, ServerId};
use rand::Rng as _;
use serde_json::{Value, json};

/// Visits all objects of a document that have these fields; says whether there is any.
fn each(document: &mut Value, fields: &[&str], change: &mut dyn FnMut(&mut Value)) -> bool {
    let has = fields.iter().all(|field| document.get(field).is_some());
    if has {
        change(document);
    }
    let mut found = has;
    match document {
        Value::Object(object) => {
            for value in object.values_mut() {
                found |= each(value, fields, change);
            }
        }
        Value::Array(values) => {
            for value in values.iter_mut().take(64) {
                found |= each(value, fields, change);
            }
        }
        _ => {}
    }
    found
}

fn certificates(document: &mut Value, mut change: impl FnMut(&mut Value)) -> bool {
    each(document, &["statement", "votes", "keys"], &mut change)
}
fn proofs(document: &mut Value, mut change: impl FnMut(&mut Value)) -> bool {
    each(document, &["steps", "terminal"], &mut change)
}
fn ranges(document: &mut Value, mut change: impl FnMut(&mut Vec<Value>)) -> bool {
    let mut of_items = |range: &mut Value| {
        if let Some(items) = range["items"].as_array_mut() {
            change(items);
        }
    };
    each(document, &["items"], &mut of_items)
}
fn completions(document: &mut Value, mut change: impl FnMut(&mut Value)) -> bool {
    each(document, &["sequence", "held", "keys"], &mut change)
}
/// What stands there, with its proof: says whether the change took place anywhere.
fn values(document: &mut Value, mut change: impl FnMut(&mut Value) -> bool) -> bool {
    let mut changed = false;
    each(document, &["value", "proof"], &mut |proved| changed |= change(&mut proved["value"]));
    changed
}
fn push_first(list: &mut Value) {
    if let Some(list) = list.as_array_mut() {
        list.extend(list.first().cloned());
    }
}
fn pop(list: &mut Value) {
    list.as_array_mut().map(Vec::pop);
}
fn set(field: &mut Value, to: Value) -> bool {
    let there = !field.is_null();
    if there {
        *field = to;
    }
    there
}
fn add(number: &mut Value, more: u64) {
    *number = json!(number.as_u64().unwrap_or(0).saturating_add(more));
}

/// Changes an honest answer's document; false if it has nothing that this lie is about. `servers` is their number.
pub(super) fn change(lie: Lie, document: &mut Value, servers: usize) -> bool {
    let hash = |byte: u8| json!(Hash([byte; 32]));
    match lie {
        Lie::FewVotes => certificates(document, |of| {
            pop(&mut of["votes"]);
            pop(&mut of["keys"]);
        }),
        Lie::RepeatedVote => certificates(document, |of| of["votes"][0] = of["votes"][1].clone()),
        Lie::ForeignVote => certificates(document, |of| of["votes"][0]["server"] = json!(servers)),
        Lie::SurplusVote => certificates(document, |of| push_first(&mut of["votes"])),
        Lie::SurplusKey => certificates(document, |of| push_first(&mut of["keys"])),
        Lie::UncertifiedKey => certificates(document, |of| of["keys"][0]["statement"]["key"] = hash(7)),
        Lie::ForgedRoot => certificates(document, |of| of["statement"]["root"] = hash(7)),
        Lie::MadeYounger => certificates(document, |of| {
            of["statement"]["time"] = json!(kds_client::now());
            add(&mut of["statement"]["sequence"], 1_000_000);
        }),
        Lie::WrongPath => {
            proofs(document, |of| of["steps"][0] = json!({ "bit": 3, "sibling": Hash([5; 32]) }))
        }
        Lie::CutPath => proofs(document, |of| of["steps"] = json!([])),
        Lie::WrongLeaf => proofs(document, |of| of["terminal"]["leaf"]["value_hash"] = hash(1)),
        Lie::AbsentForPresent => values(document, |value| set(value, Value::Null)),
        Lie::ChangedValue => values(document, |value| {
            set(&mut value["version"], json!(99))
                || set(&mut value["owner"], hash(9))
                || set(&mut value["sequence"], json!(1))
                || set(&mut value["used"], json!(77))
        }),
        Lie::OtherOutcome => values(document, |value| {
            let refused = value["outcome"].get("refused").is_some();
            let other = if refused {
                json!({ "done": { "record": { "version": 1 } } })
            } else {
                json!({ "refused": "no-such-name" })
            };
            set(&mut value["outcome"], other)
        }),
        Lie::EntryLeftOut => {
            let mut left_out = false;
            ranges(document, |items| {
                let entry = items.iter().position(|item| item.get("entry").is_some());
                left_out |= entry.map(|place| items.remove(place)).is_some();
            });
            left_out
        }
        Lie::NeighbourForEntry => {
            let mut changed = false;
            ranges(document, |items| {
                let Some(item) = items.iter_mut().find(|item| item.get("entry").is_some()) else { return };
                let value: Blob = serde_json::from_value(item["entry"]["value"].clone()).unwrap_or_default();
                let value_hash = quorum::codec::sha256(&value);
                *item = json!({ "neighbour": { "key": item["entry"]["key"], "value_hash": value_hash } });
                changed = true;
            });
            changed
        }
        Lie::EmptyPage => ranges(document, Vec::clear),
        Lie::Pruned => ranges(document, |items| *items = vec![json!({ "pruned": Hash([3; 32]) })]),
        Lie::Nesting => ranges(document, |items| {
            *items = (0..9_000).map(|bit| json!({ "inner": bit })).collect();
        }),
        Lie::HigherVersion | Lie::LowerVersion => {
            let version = if lie == Lie::LowerVersion { 1 } else { 99 };
            let Some(versions) = document["versions"].as_array_mut() else { return false };
            versions.iter_mut().for_each(|said| *said = json!(version));
            !versions.is_empty()
        }
        Lie::FewerAnswers => {
            document["records"].as_array_mut().is_some_and(|records| records.pop().is_some())
        }
        Lie::NoCertificate => set(&mut document["certificate"], Value::Null),
        Lie::ClaimsMore => completions(document, |of| add(&mut of["sequence"], 1_000)),
        Lie::FewHold => completions(document, |of| {
            pop(&mut of["held"]);
            pop(&mut of["keys"]);
        }),
        Lie::HoldsTwice => completions(document, |of| push_first(&mut of["held"])),
        Lie::SurplusHeldKey => completions(document, |of| push_first(&mut of["keys"])),
        Lie::NoChanges => set(&mut document["changes"], json!([])),
        Lie::FalseChanges => set(&mut document["changes"], json!([{ "change": 1 }])),
        Lie::OddClock => {
            let far = kds_client::now().plus_ms(10 * 365 * 86_400_000);
            set(&mut document["time"], json!(far))
        }
        Lie::OtherRelease => {
            let there = document.get("release").is_some();
            add(&mut document["release"]["release"], 1);
            there
        }
        Lie::OtherIndex => {
            let there = document.get("index").is_some();
            add(&mut document["index"], 1);
            there
        }
        Lie::NoShare => set(&mut document["share"], Value::Null),
        Lie::NoCiphertext => set(&mut document["ciphertext"], Value::Null),
        Lie::WrongCiphertext => {
            let wrong = Blob(b"nothing of use".to_vec());
            set(&mut document["ciphertext"], json!(wrong))
        }
        Lie::BrokenSeal => {
            let Ok(mut share) = serde_json::from_value::<Blob>(document["share"].clone()) else {
                return false;
            };
            if let Some(byte) = share.0.last_mut() {
                *byte ^= 1;
            }
            set(&mut document["share"], json!(share))
        }
        _ => false,
    }
}

/// A share of the liar's own, sealed to the reader as it should be.
pub(super) fn share(lie: Lie, document: &mut Value, cluster: &ClusterId) -> bool {
    let Ok(answer) = serde_json::from_value::<ShareAnswer>(document.clone()) else { return false };
    let mut share = [0; 32];
    if lie == Lie::WrongShare {
        rand::rng().fill_bytes(&mut share);
    }
    let context = HandOutContext {
        epoch: answer.release.epoch,
        server: answer.server,
        index: answer.index,
        release: answer.release.release,
    };
    let sealed = context.seal(cluster, &answer.release.ephemeral, &share, &mut rand::rng());
    answer.share.is_some() && sealed.is_ok_and(|sealed| set(&mut document["share"], json!(sealed)))
}

/// The question that a lie gives the true answer to, instead of the one that was asked.
pub(super) fn other_question(lie: Lie, route: Route, path: &str, body: &[u8]) -> Option<(String, Vec<u8>)> {
    let (place, query) = path.split_once('?').unwrap_or((path, ""));
    let with = |name: &str, value: &str| {
        let kept = query.split('&').filter(|part| !part.is_empty() && !part.starts_with(&format!("{name}=")));
        let parts: Vec<_> = kept.map(ToOwned::to_owned).chain([format!("{name}={value}")]).collect();
        Some((format!("{place}?{}", parts.join("&")), vec![]))
    };
    match (lie, route) {
        (Lie::EmptyThatGoesOn, _) => {
            let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix="))?;
            // No name is there, and the next one is the first that was asked for.
            let (path, _) = with("prefix", &format!("{prefix}%01"))?;
            Some((path.replace(&format!("from={prefix}&"), ""), vec![]))
        }
        (Lie::StopsEarly, _) => with("limit", "1"),
        (Lie::OtherPage, Route::History) => with("from", "2"),
        (Lie::OtherPage, _) => with("from", "zzz"),
        (Lie::OtherName, Route::Bulk) => {
            let mut question: Value = serde_json::from_slice(body).ok()?;
            let names = question["names"].as_array_mut().filter(|names| !names.is_empty())?;
            names.iter_mut().for_each(|name| *name = json!("f-b"));
            question.as_object_mut()?.remove("known");
            Some((path.into(), question.to_string().into()))
        }
        (Lie::OtherName, Route::Outcome) => {
            let (place, _) = path.rsplit_once('/')?;
            Some((format!("{place}/12345"), vec![]))
        }
        (Lie::OtherName, Route::Space) => Some((format!("/v1/space/{}", "07".repeat(32)), vec![])),
        (Lie::OtherName, Route::Secret) => Some(("/v1/secrets/s-b".into(), vec![])),
        (Lie::OtherName, Route::Watch) => Some(("/v1/records/f-b".into(), vec![])),
        (Lie::OtherName, _) => {
            let name = place.strip_prefix("/v1/records/")?.split('/').next()?;
            Some((path.replacen(name, "f-b", 1), vec![]))
        }
        _ => None,
    }
}

/// An error document of a kind, as any server can make one up.
pub(super) fn problem(lie: Lie) -> Option<(u16, Value)> {
    let (status, kind) = match lie {
        Lie::NotFound => (404, "not-found"),
        Lie::Conflict => (409, "conflict"),
        Lie::EpochPassed => (409, "epoch-passed"),
        Lie::NotAllowed => (403, "not-allowed"),
        Lie::Malformed => (400, "malformed"),
        Lie::Expired => (400, "expiry"),
        Lie::TooLarge => (413, "too-large"),
        Lie::TooMany => (429, "too-many"),
        Lie::NotReady => (503, "not-ready"),
        Lie::Internal => (500, "internal"),
        Lie::NoSuchProblem => (418, "teapot"),
        _ => return None,
    };
    let document = json!({
        "type": format!("urn:kds:{kind}"), "title": "a lie", "status": status, "detail": "\u{1b}[2Jit is so",
    });
    Some((status, document))
}

/// The server that an answer about a share names.
pub(super) fn as_server(document: &mut Value, server: ServerId) -> bool {
    set(&mut document["server"], json!(server))
}

//! membership.

use super::output::print_json;
use super::{Failure, Session};
use quorum::ids::Epoch;
use serde_json::json;

pub(super) async fn membership(session: &Session) -> Result<(), Failure> {
    let membership = session.client.follow().await?;
    let places = membership.manifest().grid().servers().filter_map(|server| {
        let place = membership.place(server)?;
        Some((server, place, membership.since(server)))
    });
    if session.json {
        let places = places.map(|(server, place, since)| {
            json!({
                "id": server, "url": place.url, "peer": place.peer, "identity": place.identity, "since_epoch": since,
            })
        });
        let places: Vec<_> = places.collect();
        print_json(&json!({ "servers": places, "changes": membership.proofs() }));
        return Ok(());
    }
    for (server, place, since) in places {
        let since = match since {
            Epoch(0) => "the beginning".to_owned(),
            since => format!("epoch {since}"),
        };
        println!("server {server:>2}  {}  {}  since {since}", place.identity, place.url);
    }
    Ok(())
}

//! space and gifts: what the state takes, and whether others may add to what an owner has.

use super::admin::public_key;
use super::output::print_json;
use super::{Failure, Session};
use clap::{Args, ValueEnum};
use kds_client::api::SpaceStatus;
use quorum::ByteCount;
use serde_json::json;

#[derive(Args)]
pub(super) struct SpaceArgs {
    /// Whose part: a public key, or a file with it [default: yours]
    #[arg(long, value_name = "KEY|FILE")]
    of: Option<String>,
}

#[derive(Args)]
pub(super) struct GiftsArgs {
    /// What to do about them
    what: Gifts,
}

#[derive(Clone, Copy, ValueEnum)]
enum Gifts {
    /// Others may not
    Refuse,
    /// Others may, as from the start
    Accept,
    /// What is on record
    Show,
}

pub(super) async fn space(session: &Session, args: &SpaceArgs) -> Result<(), Failure> {
    let key = match &args.of {
        Some(whom) => public_key(whom)?,
        None => session.key()?.public(),
    };
    let (space, owner) = session.client.space(&key).await?;
    if session.json {
        let owner = owner.map(|(owner, account)| {
            json!({
                "key": key, "account": owner.account, "names": owner.names, "used": account.used,
                "quota": account.quota.unwrap_or(space.each), "refuses_gifts": owner.refuses_gifts,
            })
        });
        print_json(&json!({
            "used": space.used, "quota": space.total, "for_owners": space.for_owners(), "each": space.each,
            "alarm": space.alarm(), "owner": owner,
        }));
        return Ok(());
    }
    println!(
        "all: {} of {} are used, of which owners can use {}; each owner {} unless it is set otherwise",
        ByteCount(space.used),
        ByteCount(space.total),
        ByteCount(space.for_owners()),
        ByteCount(space.each)
    );
    match owner {
        None => println!("{key} owns no name: it has no quota of its own"),
        Some((owner, account)) => {
            println!(
                "{key}: {} of {} are used, by {} names and their history, and secrets",
                ByteCount(account.used),
                ByteCount(account.quota.unwrap_or(space.each)),
                owner.names
            );
            if owner.account != key {
                println!("  together with {}, from whom its first name came", owner.account);
            }
        }
    }
    let status = SpaceStatus { used: space.used, quota: space.total, each: space.each, alarm: space.alarm() };
    if let Some(warning) = status.warning() {
        println!("ALARM {warning}");
    }
    Ok(())
}

pub(super) async fn gifts(session: &Session, args: &GiftsArgs) -> Result<(), Failure> {
    let key = session.key()?;
    let refused = match args.what {
        Gifts::Show => {
            let (_, owner) = session.client.space(&key.public()).await?;
            owner.is_some_and(|(owner, _)| owner.refuses_gifts)
        }
        Gifts::Refuse | Gifts::Accept => {
            let refuse = matches!(args.what, Gifts::Refuse);
            session.client.refuse_gifts(&key, refuse).await?;
            refuse
        }
    };
    if session.json {
        print_json(&json!({ "refused": refused }));
    } else if refused {
        println!(
            "refused: nobody else can make you the owner of secrets, nor of names unless an administrator does"
        );
    } else {
        println!(
            "accepted: others can make you the owner of secrets and names; `secret list` says who deposited"
        );
    }
    Ok(())
}

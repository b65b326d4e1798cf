//! What noticed each mutation last: where to look first. Nothing is believed from it.

use super::suite::{Notice, Suite};
use std::collections::BTreeMap;
use std::fmt::Write as _;

const HEAD: &str = "# What notices each broken rule

Written by `cargo run --example mutations`, which breaks the rules one by one, looks here who noticed last time, and lets
it try again: whatever stands here is run again each time, once with the rule broken and once without.
`tests/examples/mutations.rs` has the rules and how they are broken.

| rule broken | noticed by |
|---|---|
";

/// Names of mutations, and what notices them.
pub type Record = BTreeMap<String, Notice>;

/// Reads what `write` wrote. What cannot be read is looked for again.
pub fn read(text: &str) -> Record {
    text.lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<(String, Notice)> {
    let (name, by) = line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | ")?;
    let parts: Vec<&str> = by.split('`').collect();
    let notice = match parts[..] {
        ["test ", suite, " ", test, ""] => Notice::Test(Suite::parse(suite)?, test.into()),
        ["run of ", scenario, seed] => {
            Notice::Run(scenario.into(), seed.strip_prefix(" with seed ")?.parse().ok()?)
        }
        _ => return None,
    };
    Some((name.into(), notice))
}

/// The record, in the order of `names`; of others nothing is kept.
pub fn write<'a>(record: &Record, names: impl Iterator<Item = &'a str>) -> String {
    let mut text = HEAD.to_owned();
    for name in names {
        let _ = match record.get(name) {
            Some(Notice::Test(suite, test)) => writeln!(text, "| {name} | test `{suite}` `{test}` |"),
            Some(Notice::Run(scenario, seed)) => {
                writeln!(text, "| {name} | run of `{scenario}` with seed {seed} |")
            }
            None => Ok(()),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let record = Record::from([
            ("a rule".into(), Notice::Test(Suite::Unit("quorum".into()), "a::b".into())),
            ("b".into(), Notice::Test(Suite::EndToEnd("library".into()), "c".into())),
            ("c".into(), Notice::Run("everything:4".into(), 17)),
        ]);
        let text = write(&record, ["c", "a rule", "b"].into_iter());
        assert!(text.ends_with("| b | test `tests:library` `c` |\n"));
        assert_eq!(read(&text), record);
        assert_eq!(read(&write(&record, ["b"].into_iter())).len(), 1);
    }
}

//! Programs that can notice a broken rule, and how one of them does.

use anyhow::{Context as _, bail};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read as _, Seek as _};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A crate: its folder, its name, the kind of target that has its unit tests.
type Crate = (&'static str, &'static str, &'static str);
const CRATES: &[Crate] = &[
    ("quorum", "quorum", "lib"),
    ("certs", "kds-certs", "lib"),
    ("kds-client", "kds-client", "lib"),
    ("kds-server", "kds-server", "bin"),
];

/// How long one program may take before it counts as one that never ends. The unit tests of the core take half a minute
/// on two idle cores.
const NEVER: Duration = Duration::from_secs(15 * 60);

/// A program with tests, or the hunt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Suite {
    /// Simulated runs, `quorum/examples/hunt.rs`.
    Hunt,
    /// The unit tests of a package.
    Unit(String),
    /// A file of end-to-end tests.
    EndToEnd(String),
}

impl Suite {
    /// The unit tests of the crate that a file is part of; the file's path in the workspace.
    pub fn of_file(path: &str) -> Option<Self> {
        let (folder, _) = path.split_once('/')?;
        let (_, package, _) = CRATES.iter().find(|(known, ..)| *known == folder)?;
        Some(Self::Unit((*package).into()))
    }

    /// The folder of its crate.
    fn folder(&self) -> &'static str {
        match self {
            Self::Hunt => "quorum",
            Self::Unit(package) => {
                CRATES.iter().find(|(_, name, _)| name == package).map_or("", |(folder, ..)| folder)
            }
            Self::EndToEnd(_) => "tests",
        }
    }

    /// What has to be built for it: cargo's commands, and what those call the targets.
    pub fn targets(&self) -> Vec<(&'static str, String)> {
        match self {
            // `cargo test` would make a program with tests of it.
            Self::Hunt => vec![("build", "--example=hunt".into())],
            Self::Unit(package) => {
                let of = CRATES.iter().find(|(_, name, _)| name == package);
                let program = of.is_some_and(|(_, _, kind)| *kind == "bin");
                vec![("test", if program { format!("--bin={package}") } else { "--lib".into() })]
            }
            Self::EndToEnd(name) => vec![("build", "--bins".into()), ("test", format!("--test={name}"))],
        }
    }

    /// Whether this is what cargo built: a target of this kind and name, for tests or not, of the crate in a folder.
    pub fn is(&self, folder: &str, kind: &str, tested: bool, target: &str) -> bool {
        match self {
            Self::Hunt => !tested && folder == "quorum" && kind == "example" && target == "hunt",
            Self::Unit(package) => tested && CRATES.contains(&(folder, package, kind)),
            Self::EndToEnd(name) => folder == "tests" && kind == "test" && target == name,
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hunt => out.write_str("hunt"),
            Self::Unit(package) => write!(out, "unit:{package}"),
            Self::EndToEnd(name) => write!(out, "tests:{name}"),
        }
    }
}

impl Suite {
    /// What stands in the table and in the record: `unit:PACKAGE` and `tests:NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("unit", package) => {
                CRATES.iter().any(|(_, name, _)| *name == package).then(|| Self::Unit(package.into()))
            }
            ("tests", name) => Some(Self::EndToEnd(name.into())),
            _ => None,
        }
    }
}

/// What notices a broken rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notice {
    /// A test.
    Test(Suite, String),
    /// A simulated run: `scenario:servers`, and its seed.
    Run(String, u64),
}

/// Which copy of the core runs: the whole one, or one in which a rule is broken.
#[derive(Clone, Copy)]
pub enum Which {
    /// As it stands in the workspace.
    Whole,
    /// The mutation with this number.
    Broken(usize),
}

/// What a program said, and whether it failed.
pub struct Said {
    /// Its status was not 0.
    pub failed: bool,
    /// Its standard output.
    pub text: String,
}

/// The programs that a build gave.
pub struct Programs {
    pub(super) found: BTreeMap<Suite, PathBuf>,
    /// The root of what was built.
    pub(super) root: PathBuf,
}

impl Programs {
    /// Runs one of them.
    pub fn run(
        &self,
        suite: &Suite,
        which: Which,
        arguments: &[&str],
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Said> {
        let program = self.found.get(suite).with_context(|| format!("{suite} was not built"))?;
        let mut output = tempfile::tempfile()?;
        let mut command = Command::new(program);
        // Where cargo runs tests: what they write beside the code goes into the copy.
        command.current_dir(self.root.join(suite.folder()));
        command.args(arguments).envs(settings.iter().copied()).env_remove("KDS_MUTANT");
        if let Which::Broken(number) = which {
            command.env("KDS_MUTANT", number.to_string());
        }
        let mut child = command.stdout(output.try_clone()?).stderr(std::process::Stdio::null()).spawn()?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > NEVER {
                child.kill()?;
                child.wait()?;
                bail!("{suite} {arguments:?} did not end within {NEVER:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut bytes = Vec::new();
        output.rewind()?;
        output.read_to_end(&mut bytes)?;
        Ok(Said { failed: !status.success(), text: String::from_utf8_lossy(&bytes).into_owned() })
    }

    /// Whether something fails: one test, one run.
    pub fn fails(&self, notice: &Notice, which: Which) -> anyhow::Result<bool> {
        let said = match notice {
            Notice::Test(suite, name) => self.run(suite, which, &["--exact", name], &[])?,
            Notice::Run(scenario, seed) => {
                let arguments = ["60", scenario, &seed.to_string()];
                self.run(&Suite::Hunt, which, &arguments, &[("KDS_HUNT_RUNS", "1")])?
            }
        };
        Ok(said.failed)
    }

    /// Hunts until a run fails, `minutes` at most.
    pub fn hunt(&self, which: Which, minutes: &str, scenario: &str) -> anyhow::Result<Option<Notice>> {
        let said = self.run(&Suite::Hunt, which, &[minutes, scenario], &[("KDS_HUNT_STOP", "1")])?;
        if !said.failed {
            return Ok(None);
        }
        // run 7: lying with 4 servers, seed 1000003: ...
        let run = said.text.lines().find_map(|line| {
            let (_, line) = line.strip_prefix("run ")?.split_once(": ")?;
            let (scenario, line) = line.split_once(" with ")?;
            let (servers, line) = line.split_once(" servers, seed ")?;
            let (seed, _) = line.split_once(':')?;
            Some(Notice::Run(format!("{scenario}:{servers}"), seed.parse().ok()?))
        });
        Ok(Some(run.with_context(|| format!("the hunt crashed: {}", said.text))?))
    }

    /// The tests that fail of those whose names contain `filter`.
    pub fn failing(&self, suite: &Suite, which: Which, filter: &str) -> anyhow::Result<Vec<Notice>> {
        let said = self.run(suite, which, &[filter], &[])?;
        if !said.failed {
            return Ok(Vec::new());
        }
        let mut names = failed(&said.text);
        if names.is_empty() {
            // The program crashed: in the test that was begun and not ended.
            let said = self.run(suite, which, &[filter, "--test-threads=1"], &[])?;
            names = failed(&said.text);
        }
        Ok(names.into_iter().map(|name| Notice::Test(suite.clone(), name)).collect())
    }
}

/// The tests that did not end well: `test NAME ... FAILED`, or nothing after the dots.
fn failed(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    let bad = lines.filter(|(_, end)| !end.starts_with("ok") && !end.starts_with("ignored"));
    bad.map(|(name, _)| name.trim_end_matches(" - should panic").to_owned()).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn failed_tests_are_found() {
        let text = "running 3 tests\ntest a::b ... ok\ntest c ... FAILED\ntest d - should panic ... FAILED\n\
            test result: FAILED. 1 passed\ntest e ... ";
        assert_eq!(super::failed(text), ["c", "d", "e"]);
    }
}

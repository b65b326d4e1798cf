//! The copy of the workspace that is broken and built.

use super::suite::{Programs, Suite};
use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A copy of the workspace. It stands at the same place each time, so that only what changed is built again.
pub struct Copy {
    source: PathBuf,
    /// Where the workspace itself is built: the copy uses the dependencies that were built there.
    target: PathBuf,
    folder: PathBuf,
    _one_at_a_time: fs::File,
}

/// What a build gave.
pub enum Built {
    /// The programs that were wanted.
    Programs(Programs),
    /// It does not build.
    Errors(Vec<Error>),
}

/// What is wrong, and the file and the line that it is about.
type Error = (String, PathBuf, usize);

impl Copy {
    /// A place for copies of `source`, whose builds go to `target`. Waits until nobody else works there.
    pub fn new(source: &Path, target: &Path) -> anyhow::Result<Self> {
        let folder = target.join("mutants");
        fs::create_dir_all(&folder)?;
        let one_at_a_time = fs::File::create(folder.join("lock"))?;
        one_at_a_time.lock()?;
        let (source, target) = (source.to_owned(), target.to_owned());
        Ok(Self { source, target, folder, _one_at_a_time: one_at_a_time })
    }

    fn root(&self) -> PathBuf {
        self.folder.join("workspace")
    }

    /// Makes the copy what the workspace is, but for these files.
    pub fn write(&self, instead: &BTreeMap<PathBuf, String>) -> anyhow::Result<()> {
        let mut instead = instead.clone();
        for name in ["Cargo.toml", "Cargo.lock"] {
            instead.insert(name.into(), other_version(&fs::read_to_string(self.source.join(name))?));
        }
        let copy = self.root();
        let mut wanted = BTreeSet::new();
        files(&self.source, Path::new(""), &self.target, &mut wanted)?;
        wanted.extend(instead.keys().cloned());
        for path in &wanted {
            let bytes = match instead.get(path) {
                Some(text) => text.clone().into_bytes(),
                None => fs::read(self.source.join(path))?,
            };
            let to = copy.join(path);
            // Who does not change keeps its time, and is not built again.
            if fs::read(&to).ok().as_ref() != Some(&bytes) {
                fs::create_dir_all(to.parent().context("files stand in folders")?)?;
                fs::write(&to, bytes)?;
            }
        }
        let mut there = BTreeSet::new();
        files(&copy, Path::new(""), &self.target, &mut there)?;
        for path in there.difference(&wanted) {
            fs::remove_file(copy.join(path))?;
        }
        Ok(())
    }

    /// Builds the programs that these suites need, and puts them into a folder called `name`.
    pub fn build(&self, suites: &BTreeSet<Suite>, name: &str) -> anyhow::Result<Built> {
        let mut commands = BTreeMap::<_, BTreeSet<_>>::new();
        for (command, target) in suites.iter().flat_map(Suite::targets) {
            commands.entry(command).or_default().insert(target);
        }
        let mut messages = Vec::new();
        for (command, targets) in commands {
            match self.cargo(command, &targets)? {
                Ok(more) => messages.extend(more),
                Err(errors) => return Ok(Built::Errors(errors)),
            }
        }
        // Away from where the next build writes. End-to-end tests look for the servers' programs one folder up.
        let (programs, tests) = (self.folder.join(name), self.folder.join(name).join("deps"));
        fs::create_dir_all(&tests)?;
        let mut found = BTreeMap::new();
        for message in messages.iter().filter(|message| message["executable"].is_string()) {
            let file = Path::new(message["executable"].as_str().unwrap_or_default());
            let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
            let tested = message["profile"]["test"].as_bool() == Some(true);
            let target = message["target"]["name"].as_str().unwrap_or_default();
            let package = Path::new(message["manifest_path"].as_str().unwrap_or_default());
            let package = package.parent().and_then(|path| path.file_name()).unwrap_or_default();
            let suite =
                suites.iter().find(|suite| suite.is(&package.to_string_lossy(), kind, tested, target));
            let to = match suite {
                Some(_) => tests.join(target),
                None if kind == "bin" && !tested => programs.join(target),
                None => continue,
            };
            if fs::exists(&to)? {
                fs::remove_file(&to)?;
            }
            fs::copy(file, &to)?;
            found.extend(suite.map(|suite| (suite.clone(), to)));
        }
        for suite in suites {
            ensure!(found.contains_key(suite), "the build gave no {suite}");
        }
        Ok(Built::Programs(Programs { found, root: self.root() }))
    }

    /// What cargo says of a build, or the compiler's errors.
    fn cargo(
        &self,
        command: &str,
        targets: &BTreeSet<String>,
    ) -> anyhow::Result<Result<Vec<Value>, Vec<Error>>> {
        let mut cargo = Command::new("cargo");
        // All members are chosen, whatever of them is built: dependencies have the same features then as in the
        // workspace's own build, and are there already.
        cargo.args([command, "--workspace", "--locked", "--message-format=json"]).args(targets);
        cargo.args((command == "test").then_some("--no-run"));
        // What is built here runs for seconds: optimising it longer than that costs more than it saves.
        for (key, value) in [("opt-level", "0"), ("debug", "false"), ("package.quorum.opt-level", "1")] {
            cargo.arg(format!("--config=profile.dev.{key}={value}"));
        }
        cargo.current_dir(self.root()).env("CARGO_TARGET_DIR", &self.folder);
        if std::env::var_os("CARGO_BUILD_BUILD_DIR").is_none() {
            cargo.env("CARGO_BUILD_BUILD_DIR", &self.target);
        }
        let output = cargo.output().context("cargo does not start")?;
        let messages = String::from_utf8_lossy(&output.stdout);
        let messages =
            messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect::<Vec<_>>();
        if output.status.success() {
            return Ok(Ok(messages));
        }
        let errors: Vec<_> = messages.iter().filter_map(error).collect();
        ensure!(!errors.is_empty(), "cargo: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Err(errors))
    }
}

/// An error of the compiler, and where it is.
fn error(message: &Value) -> Option<Error> {
    let message = message.get("message").filter(|message| message["level"] == "error")?;
    let text = message["rendered"].as_str()?.to_owned();
    let spans = message["spans"].as_array()?;
    let span = spans.iter().find(|span| span["is_primary"] == true)?;
    // What a macro wrote is about where it was called.
    let mut origin = span;
    while let Some(call) = origin["expansion"].get("span") {
        origin = call;
    }
    Some((text, PathBuf::from(origin["file_name"].as_str()?), origin["line_start"].as_u64()? as usize))
}

/// Manifest or lock file with another version for the workspace's own crates: what cargo builds of the copy has other
/// names then than what it builds of the workspace.
fn other_version(text: &str) -> String {
    let own = |block: &str| block.starts_with("[workspace.package]") || !block.contains("\nsource = ");
    let other = |block: &str| match block.split_once("\nversion = \"") {
        Some((start, rest)) if own(block) => {
            let (version, rest) = rest.split_once('"').unwrap_or_default();
            format!("{start}\nversion = \"{version}-mutants\"{rest}")
        }
        _ => block.to_owned(),
    };
    text.split("\n\n").map(other).collect::<Vec<_>>().join("\n\n")
}

/// All files below a folder but what is hidden or built.
fn files(root: &Path, folder: &Path, built: &Path, found: &mut BTreeSet<PathBuf>) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir(root.join(folder)) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        let name = entry.file_name();
        if name == "target" || entry.path() == built || name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        match entry.file_type()? {
            kind if kind.is_dir() => files(root, &path, built, found)?,
            kind if kind.is_file() => drop(found.insert(path)),
            _ => bail!("{} is neither file nor folder", path.display()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_own_crates_get_another_version() {
        let lock = "version = 4\n\n[[package]]\nname = \"quorum\"\nversion = \"0.1.0\"\ndependencies = [\n \"serde\",\n]\n\n\
            [[package]]\nname = \"serde\"\nversion = \"1.0.0\"\nsource = \"registry\"\n";
        let other = lock.replace("0.1.0", "0.1.0-mutants");
        assert_eq!(super::other_version(lock), other);
    }
}

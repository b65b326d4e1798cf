//! Breaks rules on purpose, and finds out what notices that.
//!
//! All mutations are built together, into one copy of each program, and the environment says which one is on
//! (`switch`), so that a mutation costs a test and not a build. What noticed it last time is tried first (`record`).

mod copy;
mod record;
mod suite;
mod switch;

use anyhow::{Context as _, bail, ensure};
use copy::{Built, Copy};
use record::Record;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use suite::{Notice, Programs, Suite, Which};
use switch::switch;

/// A rule, and how to break it: in `file`, `find` (which stands there once) becomes `replace`.
pub struct Mutation {
    /// The rule that is broken.
    pub name: &'static str,
    /// Who is to notice.
    pub scenario: &'static str,
    /// Path below `quorum/src`, or, where it begins with another crate's folder, in the workspace.
    pub file: &'static str,
    /// What stands there once.
    pub find: &'static str,
    /// What it becomes.
    pub replace: &'static str,
}

/// The core's root, which gets a module more in the copy.
const LIBRARY: &str = "quorum/src/lib.rs";
/// Where the record stands in the workspace.
const RECORD: &str = "tests/mutations.md";
/// Minutes that the hunt gets for one mutation at most: the slowest took half of one on two idle cores.
const MINUTES: &str = "3";

impl Mutation {
    fn path(&self) -> String {
        match Suite::of_file(self.file) {
            Some(_) => self.file.into(),
            None => format!("quorum/src/{}", self.file),
        }
    }
    /// Who is to notice: tests, or else the hunt and then the unit tests of the core.
    fn suites(&self) -> anyhow::Result<Vec<Suite>> {
        if self.scenario == "unit" {
            return Ok(vec![Suite::of_file(&self.path()).context("it stands in no crate")?]);
        }
        if self.scenario.starts_with("unit:") || self.scenario.starts_with("tests:") {
            return Ok(vec![Suite::parse(self.scenario).context("no such tests")?]);
        }
        Ok(vec![Suite::Hunt, Suite::Unit("quorum".into())])
    }
    /// Which tests stand beside the rule: most are noticed there, in a second.
    fn beside(&self) -> String {
        let path = self.path();
        let module = path.split_once("/src/").map_or("", |(_, module)| module);
        let module = module.split_once('/').map_or(module.trim_end_matches(".rs"), |(folder, _)| folder);
        if ["lib", "main"].contains(&module) { String::new() } else { format!("{module}::") }
    }
}

/// Checks that each mutation is noticed. `arguments` choose some by parts of their names; `--anew` forgets the record.
pub fn check(table: &[Mutation], arguments: &[String]) -> anyhow::Result<()> {
    // Cargo says where it runs this; what was built may have been built from another clone.
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let source = Path::new(&tests).parent().context("tests stand in the workspace")?;
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(3).context("examples stand in target/PROFILE/examples")?;
    let (options, only): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| argument.starts_with("--"));
    ensure!(options.iter().all(|option| *option == "--anew"), "there is no option but --anew");
    let names: BTreeSet<_> = table.iter().map(|mutation| mutation.name).collect();
    ensure!(names.len() == table.len(), "two mutations have one name");
    let numbered: Vec<(usize, &Mutation)> = (1..).zip(table).collect();
    let texts = texts(source, &numbered)?;

    let chosen = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let chosen: Vec<_> = numbered.iter().filter(|(_, mutation)| chosen(mutation.name)).copied().collect();
    let mut suites = BTreeSet::new();
    for (_, mutation) in &chosen {
        suites.extend(mutation.suites().with_context(|| mutation.name.to_owned())?);
    }
    let start = Instant::now();
    let copy = Copy::new(source, target)?;
    let (programs, alone) = together(&copy, &texts, &numbered, &suites)?;
    println!("built {} mutations together in {} s", table.len() - alone.len(), start.elapsed().as_secs());

    let file = source.join(RECORD);
    let old = std::fs::read_to_string(&file).unwrap_or_default();
    let known = if options.is_empty() { record::read(&old) } else { Record::new() };
    let search = Search { whole: &programs, sound: Mutex::default(), known, survivors: Mutex::default() };
    let (alone, together): (Vec<_>, Vec<_>) = chosen.iter().partition(|(number, _)| alone.contains(number));
    // Real servers want the machine for themselves.
    let (real, together): (Vec<_>, Vec<_>) =
        together.into_iter().partition(|(_, mutation)| mutation.scenario.starts_with("tests:"));
    let mut noticed = search.all(&together, &programs, std::thread::available_parallelism()?.get())?;
    noticed.extend(search.all(&real, &programs, 1)?);
    for (number, mutation) in alone {
        let mut broken = texts.clone();
        let text = broken.get_mut(Path::new(&mutation.path())).context("it is one of them")?;
        *text = text.replace(mutation.find, mutation.replace);
        copy.write(&with_switch(broken))?;
        match copy.build(&mutation.suites()?.into_iter().collect(), "alone")? {
            Built::Programs(programs) => noticed.extend(search.all(&[(number, mutation)], &programs, 1)?),
            Built::Errors(errors) => bail!("{} does not build: {}", mutation.name, errors[0].0),
        }
    }

    let mut record = record::read(&old);
    record.extend(noticed);
    let survivors = search.survivors.into_inner().unwrap_or_default();
    record.retain(|name, _| !survivors.contains(name));
    let new = record::write(&record, table.iter().map(|mutation| mutation.name));
    if new != old {
        std::fs::write(&file, new)?;
        println!("{RECORD} says now what noticed them; commit it, so that the next run looks there first");
    }
    println!("{} mutations in {} s", chosen.len(), start.elapsed().as_secs());
    ensure!(survivors.is_empty(), "nothing noticed: {survivors:?}");
    Ok(())
}

/// The files that are to be broken, and the core's root. Fails if a mutation no longer finds what it changes.
fn texts(source: &Path, mutations: &[(usize, &Mutation)]) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let library = (LIBRARY.into(), std::fs::read_to_string(source.join(LIBRARY))?);
    let (mut texts, mut outdated) = (BTreeMap::from([library]), Vec::new());
    for (_, mutation) in mutations {
        let path = PathBuf::from(mutation.path());
        let text = std::fs::read_to_string(source.join(&path)).unwrap_or_default();
        if text.matches(mutation.find).count() != 1 {
            outdated.push(mutation.name);
        }
        texts.insert(path, text);
    }
    ensure!(outdated.is_empty(), "these mutations no longer find what they change: {outdated:?}");
    Ok(texts)
}

/// Adds what says which mutation is on.
fn with_switch(mut texts: BTreeMap<PathBuf, String>) -> BTreeMap<PathBuf, String> {
    texts.insert("quorum/src/mutant.rs".into(), switch::MODULE.into());
    texts.entry(LIBRARY.into()).or_default().push_str("\npub mod mutant;\n");
    texts
}

/// Builds all mutations into one copy. Those that cannot be built so are told: they need a build each.
fn together(
    copy: &Copy,
    texts: &BTreeMap<PathBuf, String>,
    mutations: &[(usize, &Mutation)],
    suites: &BTreeSet<Suite>,
) -> anyhow::Result<(Programs, BTreeSet<usize>)> {
    let mut alone = BTreeSet::new();
    loop {
        let (mut switched, mut lines) = (BTreeMap::new(), BTreeMap::new());
        for (path, text) in texts {
            let here = |(number, mutation): &&(usize, &Mutation)| {
                Path::new(&mutation.path()) == path && !alone.contains(number)
            };
            let here: Vec<_> = mutations.iter().filter(here).copied().collect();
            let question =
                if path.starts_with("quorum") { "crate::mutant::is" } else { "::quorum::mutant::is" };
            let result = switch(text, &here, question);
            alone.extend(result.alone);
            lines.insert(path, result.lines);
            switched.insert(path.clone(), result.text);
        }
        copy.write(&with_switch(switched))?;
        let errors = match copy.build(suites, "together")? {
            Built::Programs(programs) => return Ok((programs, alone)),
            Built::Errors(errors) => errors,
        };
        let before = alone.len();
        for (_, path, line) in &errors {
            let there = lines.get(path).into_iter().flatten().filter(|(lines, _)| lines.contains(line));
            alone.extend(there.map(|(_, number)| *number));
        }
        ensure!(alone.len() > before, "the copy does not build: {}", errors[0].0);
    }
}

/// Who looks for what notices mutations.
struct Search<'a> {
    /// Programs in which no rule is broken unless one is named.
    whole: &'a Programs,
    /// What passes while nothing is broken.
    sound: Mutex<BTreeMap<Notice, bool>>,
    /// What noticed each of them before.
    known: Record,
    /// Those that nothing noticed.
    survivors: Mutex<BTreeSet<String>>,
}

impl Search<'_> {
    /// What notices each of these, some at a time.
    fn all(
        &self,
        mutations: &[(usize, &Mutation)],
        broken: &Programs,
        workers: usize,
    ) -> anyhow::Result<Record> {
        let (next, record) = (AtomicUsize::new(0), Mutex::new(Record::new()));
        let work = || -> anyhow::Result<()> {
            while let Some((number, mutation)) = mutations.get(next.fetch_add(1, Ordering::Relaxed)) {
                let start = Instant::now();
                let notice = self
                    .one(*number, mutation, broken)
                    .with_context(|| format!("with {:?} broken", mutation.name))?;
                let how = match &notice {
                    Some(Notice::Test(suite, name)) => format!("{suite} {name}"),
                    Some(Notice::Run(scenario, seed)) => format!("{scenario}, seed {seed}"),
                    None => "NOT AT ALL".into(),
                };
                println!("{:<60} {how} ({:.1} s)", mutation.name, start.elapsed().as_secs_f64());
                match notice {
                    Some(notice) => {
                        record.lock().expect("no worker panics").insert(mutation.name.into(), notice);
                    }
                    None => {
                        self.survivors.lock().expect("no worker panics").insert(mutation.name.into());
                    }
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("no worker panics"))
        })?;
        Ok(record.into_inner()?)
    }

    /// What notices this one.
    fn one(&self, number: usize, mutation: &Mutation, broken: &Programs) -> anyhow::Result<Option<Notice>> {
        let which = Which::Broken(number);
        let suites = mutation.suites()?;
        let shows = |notice: &Notice| -> anyhow::Result<bool> {
            Ok(broken.fails(notice, which)? && self.is_sound(notice)?)
        };
        if let Some(known) = self.known.get(mutation.name) {
            let wanted = match known {
                Notice::Test(suite, _) => suites.contains(suite),
                Notice::Run(..) => suites.contains(&Suite::Hunt),
            };
            if wanted && shows(known)? {
                return Ok(Some(known.clone()));
            }
        }
        for suite in &suites {
            if *suite == Suite::Hunt {
                match broken.hunt(which, MINUTES, mutation.scenario)? {
                    Some(run) if self.is_sound(&run)? => return Ok(Some(run)),
                    _ => continue,
                }
            }
            let beside = if matches!(suite, Suite::EndToEnd(_)) { String::new() } else { mutation.beside() };
            for filter in BTreeSet::from([beside.as_str(), ""]).into_iter().rev() {
                let mut fastest = None;
                for notice in broken.failing(suite, which, filter)?.into_iter().take(8) {
                    let start = Instant::now();
                    if shows(&notice)? {
                        fastest = fastest.into_iter().chain([(start.elapsed(), notice)]).min();
                    }
                }
                if let Some((_, notice)) = fastest {
                    return Ok(Some(notice));
                }
            }
        }
        Ok(None)
    }

    /// Whether it passes while nothing is broken: else it shows nothing.
    fn is_sound(&self, notice: &Notice) -> anyhow::Result<bool> {
        if let Some(known) = self.sound.lock().expect("no worker panics").get(notice) {
            return Ok(*known);
        }
        let sound = !self.whole.fails(notice, Which::Whole)?;
        if !sound {
            println!("{notice:?} fails without any mutation");
        }
        self.sound.lock().expect("no worker panics").insert(notice.clone(), sound);
        Ok(sound)
    }
}

//! Many mutations in one build: every function that is to be broken gets its broken bodies beside its own, and
//! the environment says which one runs.
//!
//! ```text
//! fn may(&self) -> bool {                fn may(&self) -> bool {
//!     self.votes >= self.quorum    =>        if crate::mutant::is(3) { self.votes >= self.quorum - 1 }
//! }                                          else { self.votes >= self.quorum }
//!                                        }
//! ```
//!
//! What stands in no function that can choose (a constant, `const fn`, `-> impl Trait`) is built by itself.

use super::Mutation;
use std::ops::Range;

/// What `mutant::is` asks; the environment is read once.
pub const MODULE: &str = "//! Which mutation is on.
static ON: std::sync::LazyLock<Option<usize>> =
    std::sync::LazyLock::new(|| std::env::var(\"KDS_MUTANT\").ok()?.parse().ok());
/// Whether it is this one.
pub fn is(number: usize) -> bool {
    *ON == Some(number)
}
";

/// A file with all its mutations in it.
pub struct Switched {
    /// What it says.
    pub text: String,
    /// The lines (from 1) that belong to one mutation only, and its number.
    pub lines: Vec<(Range<usize>, usize)>,
    /// Mutations that need a build of their own.
    pub alone: Vec<usize>,
}

/// Puts mutations into a file, each under its number. `find` of each stands in it once. `question` is the path of
/// the function that says which one is on.
pub fn switch(text: &str, mutations: &[(usize, &Mutation)], question: &str) -> Switched {
    let blocks = functions(text);
    let (mut alone, mut bodies) = (Vec::new(), Vec::<(Range<usize>, Vec<(usize, String)>)>::new());
    for (number, mutation) in mutations {
        let Some(at) = text.find(mutation.find) else { continue };
        let spot = at..at + mutation.find.len();
        // The outermost function: a function inside a function that is broken too is not met twice.
        let Some(body) = blocks.iter().find(|body| body.start <= spot.start && spot.end <= body.end) else {
            alone.push(*number);
            continue;
        };
        let broken = [&text[body.start..spot.start], mutation.replace, &text[spot.end..body.end]].concat();
        match bodies.iter_mut().find(|(known, _)| known == body) {
            Some((_, all)) => all.push((*number, broken)),
            None => bodies.push((body.clone(), vec![(*number, broken)])),
        }
    }
    bodies.sort_by_key(|(body, _)| body.start);
    let (mut result, mut lines, mut done) = (String::new(), Vec::new(), 0);
    let line = |text: &str| text.matches('\n').count() + 1;
    for (body, all) in bodies {
        result.push_str(&text[done..body.start]);
        for (number, broken) in all {
            result.push_str(&format!("if {question}({number}) {{"));
            let first = line(&result);
            result.push_str(&broken);
            lines.push((first..line(&result) + 1, number));
            result.push_str("} else ");
        }
        result.push_str(&format!("{{{}}}", &text[body.clone()]));
        done = body.end;
    }
    result.push_str(&text[done..]);
    Switched { text: result, lines, alone }
}

/// What stands between the braces of each function that can choose between bodies, outermost and first ones first.
fn functions(text: &str) -> Vec<Range<usize>> {
    let code = blank(text);
    let (mut open, mut found) = (Vec::new(), Vec::new());
    for (at, byte) in code.bytes().enumerate() {
        match byte {
            b'{' => open.push(at),
            b'}' => {
                let from = open.pop().unwrap_or_default();
                if can_choose(signature(&code[..from])) {
                    found.push(from + 1..at);
                }
            }
            _ => {}
        }
    }
    found.sort_by_key(|body| body.start);
    found
}

/// What stands before an opening brace since the last statement or block.
fn signature(before: &str) -> &str {
    let mut depth = 0u32;
    for (at, byte) in before.bytes().enumerate().rev() {
        match byte {
            b')' | b']' => depth += 1,
            b'(' | b'[' if depth == 0 => return &before[at + 1..],
            b'(' | b'[' => depth -= 1,
            b'{' | b'}' | b';' if depth == 0 => return &before[at + 1..],
            _ => {}
        }
    }
    before
}

/// Whether this is the signature of a function whose body may run code that is not `const`, and whose branches have
/// one type.
fn can_choose(signature: &str) -> bool {
    let words: Vec<&str> = signature.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let Some(at) = words.iter().position(|word| *word == "fn") else { return false };
    let named = words.get(at + 1).is_some_and(|name| !name.is_empty());
    let returned = signature.rsplit_once("->").map_or("", |(_, returned)| returned);
    let opaque = returned.split(|c: char| !c.is_alphanumeric()).any(|word| word == "impl");
    named && !opaque && !words[..at].contains(&"const")
}

/// The text with spaces instead of comments, strings and characters: what is left has the braces that count.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut result = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = at + literal(&bytes[at..], at.checked_sub(1).map(|before| bytes[before]));
        for byte in &mut result[at..end] {
            *byte = b' ';
        }
        at = end.max(at + 1);
    }
    String::from_utf8_lossy(&result).into_owned()
}

/// How long the comment, string or character is that begins here; 0 if none does.
fn literal(text: &[u8], before: Option<u8>) -> usize {
    let until = |end: &[u8]| text.windows(end.len()).position(|part| part == end).unwrap_or(text.len());
    match text {
        [b'/', b'/', ..] => until(b"\n"),
        [b'/', b'*', ..] => {
            let (mut depth, mut at) = (0u32, 0);
            while at < text.len() {
                match &text[at..] {
                    [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
                    [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
                    _ => at += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            at
        }
        [quote @ (b'"' | b'\''), rest @ ..] => {
            // 'a is a lifetime, 'a' a character.
            let character = matches!(rest, [b'\\', ..]) || {
                let long = std::str::from_utf8(rest).ok().and_then(|rest| rest.chars().next());
                rest.get(long.map_or(1, char::len_utf8)) == Some(&b'\'')
            };
            if *quote == b'\'' && !character {
                return 0;
            }
            let mut at = 1;
            while at < text.len() && text[at] != *quote {
                at += if text[at] == b'\\' { 2 } else { 1 };
            }
            (at + 1).min(text.len())
        }
        [b'r', rest @ ..]
            if !before.is_some_and(|byte| (byte.is_ascii_alphanumeric() && byte != b'b') || byte == b'_') =>
        {
            let hashes = rest.iter().take_while(|byte| **byte == b'#').count();
            if rest.get(hashes) != Some(&b'"') {
                return 0;
            }
            let end = [&b"\""[..], &rest[..hashes]].concat();
            let body = &text[hashes + 2..];
            let length = body.windows(end.len()).position(|part| part == end).unwrap_or(body.len());
            (hashes + 2 + length + end.len()).min(text.len())
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r##"
//! A { that is none, and fn none() {
const LIMIT: u32 = 3;
impl<'a> Rule<'a> {
    /// Doc with fn words() {
    fn may<T: Fn(u8) -> [u8; 2]>(&self, of: [u8; 4], f: fn(u8) -> u8) -> bool where T: Clone {
        let text = "} \" {"; let c = '{'; let d = '\''; let r = r#"}"}"#; /* { /* { */ */
        if of.len() > LIMIT { return true; }
        of.iter().any(|byte| { *byte == 7 })
    }
    const fn fixed() -> u32 { 5 }
    fn all(&self) -> impl Iterator<Item = u8> + '_ { self.votes.iter().copied() }
    fn outer() { fn inner() -> u8 { 8 } inner(); outer_too() }
}
"##;

    fn mutation(find: &'static str, replace: &'static str) -> Mutation {
        Mutation { name: find, scenario: "unit", file: "a.rs", find, replace }
    }

    #[test]
    fn functions_get_their_broken_bodies() {
        let all = [
            mutation("= 3;", "= 4;"),
            mutation("of.len() > LIMIT {", "of.len() > LIMIT + 1 {"),
            mutation("== 7", "!= 7"),
            mutation("{ 5 }", "{ 6 }"),
            mutation("copied()", "copied().skip(1)"),
            mutation("{ 8 }", "{ 9 }"),
            mutation("outer_too()", "()"),
        ];
        let numbered: Vec<_> = all.iter().enumerate().map(|(at, mutation)| (at + 1, mutation)).collect();
        let switched = switch(TEXT, &numbered, "crate::mutant::is");
        assert_eq!(switched.alone, [1, 4, 5]);
        let (start, end) = (TEXT.find("\n        let text").unwrap(), TEXT.find("\n    }\n").unwrap() + 5);
        let own = &TEXT[start..end];
        let first = own.replace("LIMIT {", "LIMIT + 1 {");
        let second = own.replace("== 7", "!= 7");
        let expected = format!(
            "{{if crate::mutant::is(2) {{{first}}} else if crate::mutant::is(3) {{{second}}} else {{{own}}}}}"
        );
        assert!(switched.text.contains(&expected), "{}", switched.text);
        let inner = "{if crate::mutant::is(6) { fn inner() -> u8 { 9 } inner(); outer_too() } else \
            if crate::mutant::is(7) { fn inner() -> u8 { 8 } inner(); () } else \
            { fn inner() -> u8 { 8 } inner(); outer_too() }}";
        assert!(switched.text.contains(inner), "{}", switched.text);
        // Lines are those of the new text.
        for (number, part) in [(2, "LIMIT + 1"), (3, "!= 7")] {
            let (lines, _) = switched.lines.iter().find(|(_, of)| *of == number).unwrap();
            let found: Vec<_> =
                (1..).zip(switched.text.lines()).filter(|(_, line)| line.contains(part)).collect();
            assert!(found.len() == 1 && lines.contains(&found[0].0), "{lines:?} {found:?}");
        }
    }

    #[test]
    fn without_mutations_nothing_changes() {
        assert_eq!(switch(TEXT, &[], "is").text, TEXT);
    }
}

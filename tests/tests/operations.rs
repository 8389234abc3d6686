//! Promise: `docs/operations.md` is true. Its commands are run as they stand, and print what it shows.
//!
//! How the document is read:
//! - all blocks fenced as `sh` are one session of `bash -eu`, in an empty folder, with `esker` on the `PATH`; a command that fails
//!   ends it. Only the ports are other ones: free ones;
//! - a block fenced as `text` behind one is what it prints, standard error included; one without prints nothing;
//! - `…` is any text, on a line of its own any lines or none; runs of spaces are one, and so are runs of dashes; a number is any
//!   number, but 0 is 0 and what is not 0 is not: nobody hits what was not there;
//! - metrics and options that the text names exist.
//!
//! Needs `openssl` and `curl`; without them it says that it is skipped.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use esker_tests::{esker, output, scratch, text_of};
use tempfile::TempDir;

/// Of the whole session.
const LIMIT_S: &str = "400";
/// The ports that the document names.
const PORTS: [&str; 2] = ["7410", "7411"];

/// A fenced block of commands, and what they print.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    commands: String,
    prints: Vec<String>,
}

fn document() -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
}

/// The fenced blocks of a document.
fn steps(document: &str) -> Result<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = (1..).zip(document.lines());
    let mut follows = false;
    while let Some((line, text)) = lines.next() {
        let Some(kind) = text.strip_prefix("```") else {
            follows &= text.is_empty();
            continue;
        };
        let block: Vec<String> =
            lines.by_ref().map(|(_, text)| text.to_owned()).take_while(|text| text != "```").collect();
        match (kind, steps.last_mut()) {
            ("sh", _) => {
                steps.push(Step { line, commands: block.join("\n") + "\n", prints: Vec::new() });
                follows = true;
            }
            ("text", Some(step)) if follows => {
                step.prints = block;
                follows = false;
            }
            _ => bail!("line {line}: a block of {kind:?} that is neither commands nor what they print"),
        }
    }
    ensure!(!steps.is_empty(), "the document has no commands");
    Ok(steps)
}

/// A line as it is compared.
fn plain(line: &str) -> String {
    let mut plain = String::new();
    let mut chars = line.trim_end().chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_ascii_digit() {
            let mut zero = c == '0';
            while let Some(&next) = chars.peek().filter(|next| next.is_ascii_digit() || ",.".contains(**next))
            {
                // A separator belongs to the number if it goes on behind it.
                let mut ahead = chars.clone();
                ahead.next();
                if !next.is_ascii_digit() && !ahead.peek().is_some_and(char::is_ascii_digit) {
                    break;
                }
                zero &= next == '0' || !next.is_ascii_digit();
                chars.next();
            }
            plain.push(if zero { '0' } else { '9' });
        } else if !(plain.ends_with(c) && (c == ' ' || c == '-')) {
            plain.push(c);
        }
    }
    plain
}

/// Whether a line is what was shown, both plain.
fn line_is(shown: &str, line: &str) -> bool {
    let mut parts = shown.split('…');
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn lines_are(shown: &[String], lines: &[String]) -> bool {
    match shown.split_first() {
        None => lines.is_empty(),
        Some((any, rest)) if any == "…" => {
            (0..=lines.len()).any(|skipped| lines_are(rest, &lines[skipped..]))
        }
        Some((first, rest)) => {
            lines.split_first().is_some_and(|(line, others)| line_is(first, line) && lines_are(rest, others))
        }
    }
}

/// What a session left behind.
struct Session {
    folder: TempDir,
}

impl Session {
    fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    fn printed(&self, number: usize) -> Option<String> {
        let bytes = std::fs::read(self.folder.path().join(number.to_string())).ok()?;
        Some(text_of(&bytes))
    }
}

/// Runs the commands of a document, and compares what they print.
fn follow(document: &str) -> Result<Session> {
    let steps = steps(document)?;
    let session = Session { folder: scratch() };
    let (folder, work) = (session.folder.path(), session.work());
    std::fs::create_dir(&work)?;
    std::fs::create_dir(folder.join("bin"))?;
    symlink(std::path::absolute(esker())?, folder.join("bin/esker"))?;
    let mut script = "trap 'jobs -p | xargs -r kill; wait' EXIT\n".to_owned();
    for (number, step) in steps.iter().enumerate() {
        script += &format!("exec > '{}' 2>&1\n{}", folder.join(number.to_string()).display(), step.commands);
    }
    // Both at once, so that they differ.
    let free = PORTS.map(|_| TcpListener::bind("127.0.0.1:0")).into_iter().collect::<Result<Vec<_>, _>>()?;
    for (shown, listener) in PORTS.iter().zip(&free) {
        script = script.replace(shown, &listener.local_addr()?.port().to_string());
    }
    drop(free);
    let file = folder.join("session.sh");
    std::fs::write(&file, &script)?;
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", LIMIT_S, "bash", "-eu"]).arg(&file).current_dir(&work);
    for name in
        ["ESKER_NODE", "ESKER_HTTP", "ESKER_CA", "ESKER_CERT", "ESKER_KEY", "ESKER_TOKEN", "ESKER_LOG"]
    {
        command.env_remove(name);
    }
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", folder.join("bin").display()));
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    for (number, step) in steps.iter().enumerate() {
        let last = session.printed(number + 1).is_none();
        let printed = session.printed(number).unwrap_or_default();
        if last && !status.success() {
            let log = std::fs::read_to_string(work.join("node.log")).unwrap_or_default();
            bail!(
                "the commands of line {} ended with {status}:\n{printed}\nlog of the node:\n{log}",
                step.line
            );
        }
        let shown: Vec<String> = step.prints.iter().map(|line| plain(line)).collect();
        let lines: Vec<String> = printed.lines().map(plain).collect();
        ensure!(
            lines_are(&shown, &lines),
            "the commands of line {} show\n{}\nbut print\n{printed}",
            step.line,
            step.prints.join("\n")
        );
    }
    Ok(session)
}

/// Whether the tools are there that the document needs.
fn has_tools() -> bool {
    let missing = ["openssl", "curl", "timeout", "bash"].into_iter().find(|tool| {
        let found = Command::new("sh").args(["-c", "command -v \"$0\"", tool]).stdout(Stdio::null()).status();
        !found.is_ok_and(|status| status.success())
    });
    if let Some(tool) = missing {
        println!("SKIPPED: the commands of docs/operations.md need {tool}, which is not on the PATH");
    }
    missing.is_none()
}

/// What stands between backticks outside of the fenced blocks.
fn named(document: &str) -> Vec<&str> {
    let text = document.split("```").step_by(2);
    text.flat_map(|text| text.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn the_commands_do_what_the_document_shows() -> Result<()> {
    if !has_tools() {
        return Ok(());
    }
    let document = document()?;
    let session = follow(&document)?;
    let metrics = std::fs::read_to_string(session.work().join("metrics.txt"))?;
    let names: Vec<&str> = named(&document).into_iter().filter(|name| name.starts_with("esker_")).collect();
    ensure!(names.len() > 5, "the document names few metrics: {names:?}");
    for name in names {
        // Refusals appear with the first one.
        let there =
            metrics.lines().any(|line| line.starts_with(name)) || name == "esker_quota_refusals_total";
        ensure!(there, "the document names {name}, which the node does not have");
    }
    Ok(())
}

#[test]
fn the_options_that_the_document_names_exist() -> Result<()> {
    let mut help = String::new();
    for command in ["serve", "fsck", "warmup", "usage", "tenants", "top"] {
        help += &text_of(&output([command, "--help"]).stdout);
    }
    help += &text_of(&output(["usage", "export", "--help"]).stdout);
    let known: BTreeSet<&str> = help.split_whitespace().filter(|word| word.starts_with("--")).collect();
    let document = document()?;
    let options: Vec<&str> = named(&document)
        .into_iter()
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with("--"))
        .collect();
    ensure!(options.len() > 4, "{options:?}");
    for option in options {
        ensure!(known.contains(option), "the document names {option}, which no command has");
    }
    Ok(())
}

/// The control: a document that is wrong anywhere does not pass.
#[test]
fn a_document_that_is_wrong_is_noticed() -> Result<()> {
    let step = |commands: &str, prints: &str| format!("```sh\n{commands}\n```\n```text\n{prints}\n```\n");
    assert!(follow(&step("echo hit 30 of 40; echo hit 0 >&2", "hit 20 of 1,300\n…\nhit 0")).is_ok());
    assert!(follow(&step("echo a; echo b; echo c d", "a\n…\nc …")).is_ok());
    assert!(
        follow(&step("echo \"$(basename \"$PWD\") $(esker --version | cut -c 1-7)\"", "work esker …"))
            .is_ok()
    );
    for (bad, why) in [
        (step("esker servee", "…"), "unknown command"),
        (step("echo a; false; echo b", "a\nb"), "a command fails"),
        (step("echo $NOBODY_SET_THIS", "…"), "a variable that is not set"),
        (step("echo hit 0 of 40", "hit 20 of 40"), "a hit that was none"),
        (step("echo hit 5 of 40", "hit 0 of 40"), "a hit that was not to be"),
        (step("echo 0.00", "0.01"), "an amount that was none"),
        (step("echo a; echo b", "a"), "more than is shown"),
        (step("echo a", "a\nb"), "less than is shown"),
        (step("echo abc", "a…d"), "another end"),
        ("```sh\necho a\n```\n".into(), "something where nothing is shown"),
        ("```sh\ntrue\n```\nWords.\n```text\n```\n".into(), "a text that belongs to nothing"),
        ("Nothing to run.".into(), "no commands"),
    ] {
        assert!(follow(&bad).is_err(), "passed: {why}");
    }
    // The document itself, with one word of it wrong.
    if has_tools() {
        let document = document()?;
        for (right, wrong) in [
            ("\"reader\", \"writer\"]", "\"reader\", \"writter\"]"),
            ("-CA tls/ca.pem", "-CA tls/node.pem"),
            ("export ESKER_CA=tls/ca.pem", "export ESKER_CA=tls/acme.pem"),
        ] {
            ensure!(document.contains(right), "{right} is not in the document any more");
            assert!(follow(&document.replace(right, wrong)).is_err(), "passed: {wrong}");
        }
    }
    Ok(())
}

//! `esker audit`.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::path::PathBuf;

use serde_json::json;

use super::print;
use crate::audit::{Audit, Event, Unverified};
use crate::usage::calendar::utc_ms;

/// Arguments of `esker audit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data folder of a node, which may be running
    data: PathBuf,
    /// How many of the newest lines to show
    #[arg(long, default_value_t = 20, value_name = "COUNT")]
    last: usize,
    /// Print JSON instead of text: the lines, then the check
    #[arg(long)]
    json: bool,
}

/// Reads the audit log of a data folder from its first line, checks that each line follows the one before it, and shows the newest.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = args.data.join("audit.jsonl");
    let mut newest: VecDeque<(u64, Event)> = VecDeque::new();
    let checked = Audit::verify(&path, |unix_ms, event| {
        newest.push_back((unix_ms, event.clone()));
        if newest.len() > args.last {
            newest.pop_front();
        }
    });
    for (unix_ms, event) in &newest {
        print(&(told(*unix_ms, event, args.json)? + "\n"))?;
    }
    let verified = checked.map_err(|error| {
        let meaning = meaning(&error);
        anyhow::Error::new(error).context(meaning)
    })?;
    let (lines, last) = (verified.lines, verified.last.to_hex());
    if args.json {
        say!("{}", json!({"lines": lines, "last": last.as_str()}));
    } else {
        say!("{lines} lines, each chained to the one before it; the last is {last}");
    }
    Ok(())
}

/// What somebody who asked for the check has to know first.
fn meaning(error: &Unverified) -> &'static str {
    match error {
        Unverified::Unreadable { source, .. } if source.kind() == ErrorKind::NotFound => {
            "there is no audit log: is it the data folder of a node?"
        }
        Unverified::Unreadable { .. } => {
            "the log could not be checked, which says nothing of what is written in it: see whether you may read the \
             file and whether its drive answers, and run this again"
        }
        Unverified::Changed { .. } => {
            "the log is not what was written: somebody has changed it, or a drive has"
        }
    }
}

fn told(unix_ms: u64, event: &Event, json: bool) -> anyhow::Result<String> {
    if json {
        let mut line = serde_json::to_value(event)?;
        line["unix_ms"] = unix_ms.into();
        return Ok(line.to_string());
    }
    let Event { who, operation, object, result, count } = event;
    let count = count.map_or(String::new(), |count| format!(" ({count})"));
    Ok(format!("{} {who} {operation} {object}: {result}{count}", utc_ms(unix_ms)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::principal::Principal;

    fn failure(data: &std::path::Path) -> String {
        format!("{:#}", run(&Args { data: data.to_owned(), last: 20, json: false }).unwrap_err())
    }

    #[test]
    fn a_log_that_cannot_be_read_is_not_said_to_be_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        assert!(failure(dir.path()).contains("there is no audit log"));
        // What opens and fails when it is read.
        std::fs::create_dir(&path).unwrap();
        let unreadable = failure(dir.path());
        assert!(!unreadable.contains("changed") && unreadable.contains("run this again"), "{unreadable}");
        assert!(unreadable.contains(path.to_str().unwrap()), "{unreadable}");
        assert!(unreadable.contains("Is a directory"), "{unreadable}");
        // The negative control.
        std::fs::remove_dir(&path).unwrap();
        Audit::open(&path).unwrap().record(&Event::new(&Principal::local(), "test", "a", "ok"));
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("test", "tset") + "{}\n")
            .unwrap();
        assert!(failure(dir.path()).contains("somebody has changed it"));
    }
}

//! `esker audit`.

use std::collections::VecDeque;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::json;

use super::print;
use crate::audit::{Audit, Event};
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
    if !path.is_file() {
        bail!("{} has no audit log: is it the data folder of a node?", args.data.display());
    }
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
    let verified =
        checked.context("the log is not what was written: somebody has changed it, or a drive has")?;
    let (lines, last) = (verified.lines, verified.last.to_hex());
    if args.json {
        say!("{}", json!({"lines": lines, "last": last.as_str()}));
    } else {
        say!("{lines} lines, each chained to the one before it; the last is {last}");
    }
    Ok(())
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

//! `esker top`: the essentials of a running node in a terminal, as its page tells them.

mod look;

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use serde_json::Value;

use self::look::Look;
use super::{CredentialArgs, is_taken, print};

/// Most lines of sessions, tenants, jobs and happenings each.
const MAX_LINES: usize = 8;
const BAR: usize = 24;

/// Arguments of `esker top`. Where the node asks who calls, the account needs the role admin.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the node listens for HTTP (its --http)
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7411", env = "ESKER_HTTP")]
    http: String,
    #[command(flatten)]
    credentials: CredentialArgs,
    /// Seconds between two looks
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
    /// Look once and end; the default where the output is no terminal
    #[arg(long)]
    once: bool,
}

/// Shows the node until it is interrupted.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let look = Look::new(&args.http, &args.credentials.read()?)?;
    let look = || look.overview().map(|seen| frame(&seen));
    if args.once || !std::io::stdout().is_terminal() {
        return print(&look()?);
    }
    // The first look tells at once whether this is a node.
    let mut shown = look()?;
    loop {
        // From the top left; each line is cleared behind its end, and then what is below the last.
        let text = shown.replace('\n', "\x1b[K\n");
        if !is_taken(&format!("\x1b[H{text}\x1b[J"))? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(args.every));
        shown = look().unwrap_or_else(|error| format!("the node does not answer: {error:#}\n"));
    }
}

/// One screen of text.
fn frame(seen: &Value) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write(seen, &mut text);
    text
}

fn write(seen: &Value, text: &mut String) -> std::fmt::Result {
    let now_ms = number(&seen["now_ms"]);
    let up_s = (now_ms - number(&seen["node"]["started_ms"])) / 1000.0;
    let model = seen["node"]["model"].as_str().unwrap_or("no model");
    writeln!(text, "Esker {}, {model}, up {}", string(&seen["node"]["version"]), span(up_s))?;
    writeln!(text)?;
    for (name, traffic) in [("last hour", &seen["traffic"]["hour"]), ("all", &seen["traffic"]["all"])] {
        let (hit, prompt) = (number(&traffic["hit_tokens"]), number(&traffic["prompt_tokens"]));
        writeln!(
            text,
            "{name:>10}  {} {:>6} of {} prompt tokens, {} requests; first token warm {}, cold {}",
            bar(hit, prompt),
            percent(hit, prompt),
            count(prompt),
            count(number(&traffic["requests"])),
            millis(&traffic["warm"]["p50_ms"]),
            millis(&traffic["cold"]["p50_ms"]),
        )?;
    }
    let store = &seen["store"];
    writeln!(
        text,
        "{:>10}  {} in {} objects, {} on disk, {} leased",
        "stored",
        bytes(number(&store["bytes"])),
        count(number(&store["objects"])),
        bytes(number(&store["disk_bytes"])),
        bytes(number(&store["leased_bytes"])),
    )?;
    writeln!(
        text,
        "{:>10}  {} read, {} written since the start",
        "drive",
        bytes(number(&seen["drive"]["read_bytes"])),
        bytes(number(&seen["drive"]["written_bytes"])),
    )?;
    section(text, "Kept for", &seen["kept"], |one| {
        format!(
            "{:<10} {:>9}  {:>8} objects",
            string(&one["class"]),
            bytes(number(&one["bytes"])),
            count(number(&one["objects"]))
        )
    })?;
    section(text, "Tenants", &seen["tenants"], |one| {
        let (hit, prompt) = (number(&one["hit_tokens"]), number(&one["prompt_tokens"]));
        let saved =
            one["saved"].as_str().map(|saved| format!(", saved {saved} {}", string(&seen["currency"])));
        format!(
            "{:<20} {} {:>6} of {} tokens, {} stored{}",
            string(&one["tenant"]),
            bar(hit, prompt),
            percent(hit, prompt),
            count(prompt),
            bytes(number(&one["stored_bytes"])),
            saved.unwrap_or_default(),
        )
    })?;
    section(text, "Sessions", &seen["sessions"], |one| {
        let name = format!("{}/{}", string(&one["tenant"]), string(&one["name"]));
        let (tokens, held) = (count(number(&one["tokens"])), bytes(number(&one["bytes"])));
        format!("{name:<30} {tokens:>8} tokens {held:>9}, ends in {}", span(number(&one["remaining_s"])))
    })?;
    section(text, "Warm-up jobs", &seen["warmups"], |one| {
        let (done, all) = (number(&one["tokens_done"]), number(&one["tokens"]));
        format!(
            "{:<20} {} {:>6} {}",
            string(&one["job"]),
            bar(done, all),
            percent(done, all),
            string(&one["state"])
        )
    })?;
    section(text, "Refusals and damage", &seen["recent"], |one| {
        let ago = span((now_ms - number(&one["at_ms"])) / 1000.0);
        format!("{ago:>8} ago  {:<8} {} {}", string(&one["kind"]), string(&one["what"]), string(&one["who"]))
    })
}

/// Nothing where there is nothing.
fn section(
    text: &mut String,
    name: &str,
    items: &Value,
    line: impl Fn(&Value) -> String,
) -> std::fmt::Result {
    let items = items.as_array().map_or(&[][..], Vec::as_slice);
    if items.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n{name}")?;
    for item in items.iter().take(MAX_LINES) {
        // Names come from tenants: nothing that a terminal would obey.
        let safe: String = line(item).chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        writeln!(text, "  {safe}")?;
    }
    match items.len().checked_sub(MAX_LINES) {
        None | Some(0) => Ok(()),
        Some(more) => writeln!(text, "  and {more} more"),
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn bar(part: f64, of: f64) -> String {
    let share = if of > 0.0 { (part / of).clamp(0.0, 1.0) } else { 0.0 };
    // Between 0 and BAR.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let full = (share * BAR as f64).round() as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(BAR - full))
}

fn percent(part: f64, of: f64) -> String {
    if of > 0.0 { format!("{:.1} %", 100.0 * part / of) } else { "–".into() }
}

fn millis(value: &Value) -> String {
    match value.as_f64() {
        None => "–".into(),
        Some(ms) if ms < 1000.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1000.0),
    }
}

fn bytes(value: f64) -> String {
    scaled(value, &["B", "kB", "MB", "GB", "TB", "PB"])
}

fn count(value: f64) -> String {
    scaled(value, &["", "k", "M", "G", "T"]).trim_end().to_owned()
}

fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut at = 0;
    while value >= 999.5 && at + 1 < units.len() {
        value /= 1000.0;
        at += 1;
    }
    let unit = units[at];
    if at == 0 || value >= 99.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

fn span(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.0} s"),
        s if s < 3600.0 => format!("{:.0} min", (s / 60.0).floor()),
        s if s < 48.0 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86400.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_frame_tells_the_essentials_and_obeys_no_name() {
        let traffic = json!({"requests": 3, "prompt_tokens": 4000, "hit_tokens": 3000,
            "warm": {"p50_ms": 12.0}, "cold": {"p50_ms": null}});
        let seen = json!({
            "now_ms": 7_200_000.0, "node": {"version": "0.1.0", "model": "m", "started_ms": 0},
            "traffic": {"hour": traffic, "all": traffic},
            "tenants": [{"tenant": "a\u{1b}[2J", "hit_tokens": 1, "prompt_tokens": 2, "saved": "0.12"}],
            "currency": "EUR",
            "sessions": (0..10).map(|n| json!({"tenant": "a", "name": format!("s{n}")})).collect::<Vec<_>>(),
        });
        let text = frame(&seen);
        for part in [
            "75.0 % of 4.0 k prompt tokens",
            "warm 12 ms, cold –",
            "up 2.0 h",
            "saved 0.12 EUR",
            "and 2 more",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains('\u{1b}') && !text.contains("Warm-up"));
    }
}

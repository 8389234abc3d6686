//! `esker bench replay`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use esker_benches::replay::{
    Policy, RealOptions, RealRun, Run, Table, Trace, human_bytes, replay_all, replay_real,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Shares of a trace's distinct blocks that are tried where no size is given, percent.
const SHARES_PERCENT: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Arguments of `esker bench replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A trace has one request per line, as JSON, zstd-compressed or not:
  {\"timestamp\": MS, \"input_length\": TOKENS, \"hash_ids\": [ID, ...]}
  {\"timestamp\": MS, \"input_length\": TOKENS, \"runs\": [[FIRST_ID, COUNT], ...]}
Ids name the blocks of the prompt in order; equal ids behind equal prefixes are one
block. Blocks have 512 tokens with hash_ids and 64 with runs, or what the line says as
\"block_tokens\": TOKENS. Other fields are ignored. Times may not go back.

A request finds the leading run of its blocks that are stored, and puts the rest. Without
--real no block is read or written: what is replayed is which blocks would be. With it the
policy esker is the store itself, in a new folder below DIR that is removed at the end:
durable puts, verified reads, eviction and expiry by the clock of the trace, and how many
bytes reached the device for each accepted one. A smaller --bytes-per-token or fewer
--requests keep what is written within what the drive has.

Examples:
  esker bench replay conversation_trace.jsonl
  esker bench replay trace.jsonl.zst --policy esker,lru-leaf --share 5
  esker bench replay trace.jsonl.zst --bytes 200GiB --bytes-per-token 35136 --json
  esker bench replay trace.jsonl.zst --real /mnt/ssd --share 5 --bytes-per-token 256 --ttl-s 3600")]
pub(super) struct Args {
    /// The trace
    trace: PathBuf,
    /// Policies, separated by commas: esker, lru-leaf, lru, fifo, s3-fifo, clairvoyant, infinite, or all
    #[arg(long, value_name = "POLICY", value_delimiter = ',', default_value = "all", value_parser = policies)]
    policy: Vec<Policies>,
    /// Size of the cache; may be repeated. K, M, G, T or KiB, MiB, GiB, TiB for powers of 1024; KB, MB, GB, TB of 1000
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = bytes)]
    bytes: Vec<u64>,
    /// Size of the cache as percent of the trace's distinct blocks; may be repeated [default: 1,2,5,10,20]
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', value_parser = percent)]
    share: Vec<f64>,
    /// Bytes that a token takes on the drive; the default is that of DeepSeek V4-Flash
    #[arg(long, value_name = "N", default_value_t = 3514, value_parser = clap::value_parser!(u32).range(1..))]
    bytes_per_token: u32,
    /// Only the first requests of the trace
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Replay against a real store on the drive of this folder, beside the policies asked for
    #[arg(long, value_name = "DIR")]
    real: Option<PathBuf>,
    /// With --real: how long blocks are kept after their last use, in seconds of the trace
    #[arg(long, value_name = "S", default_value_t = 24 * 3600, requires = "real")]
    ttl_s: u64,
    /// Print one JSON object per run instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug)]
struct Policies(Vec<Policy>);

/// Reads the trace, runs the policies, prints what came of it.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let mut trace = read(&args.trace)?;
    if let Some(requests) = args.requests {
        trace = trace.first(requests);
    }
    let capacities = capacities(&args, &trace)?;
    let policies: Vec<Policy> = Policy::ALL
        .into_iter()
        .filter(|policy| args.policy.iter().any(|named| named.0.contains(policy)))
        .collect();
    let finite = policies.iter().filter(|policy| **policy != Policy::Infinite).count();
    let runs = finite * capacities.len() + policies.len() - finite;
    let bar = progress_bar(runs * trace.requests.len(), "{bar:40} {pos}/{len} requests, {eta} left");
    let runs = replay_all(&trace, &policies, &capacities, || bar.inc(1));
    bar.finish_and_clear();
    let real = real_runs(&trace, &capacities, &args)?;
    if args.json {
        for run in &runs {
            say!("{}", line(run, &trace, &args));
        }
        for (capacity_bytes, run) in &real {
            say!("{}", real_line(*capacity_bytes, run, &trace, &args));
        }
        return Ok(());
    }
    say!(
        "{}: {} requests, {} tokens, {} distinct blocks of {} tokens",
        args.trace.display(),
        trace.requests.len(),
        trace.input_tokens(),
        trace.blocks(),
        trace.block_tokens
    );
    super::super::print(
        &Table { trace: &trace, runs: &runs, bytes_per_token: u64::from(args.bytes_per_token) }.to_string(),
    )?;
    for (capacity_bytes, run) in &real {
        let stats = &run.stats;
        say!(
            "{:>22}  real store  {:>9.2} {:>9} {:>12} {:>12} {:>10.2}",
            human_bytes(*capacity_bytes),
            run.hit_ratio() * 100.0,
            "",
            human_bytes(run.device_bytes),
            stats.evicted,
            run.wall_s
        );
        say!(
            "{:>22}  accepted {}, written/accepted {:.4}; {} expired, {} declined, {} given back; {} blocks read and compared",
            "",
            human_bytes(run.accepted_bytes),
            run.write_amplification(),
            stats.expired,
            stats.declined,
            human_bytes(stats.punched_bytes),
            run.read_blocks
        );
    }
    Ok(())
}

/// Runs against the store itself, one for each size.
fn real_runs(trace: &Trace, capacities: &[u32], args: &Args) -> anyhow::Result<Vec<(u64, RealRun)>> {
    let Some(dir) = &args.real else { return Ok(Vec::new()) };
    let block_bytes = u64::from(args.bytes_per_token) * u64::from(trace.block_tokens);
    let run = |blocks: &u32| {
        let capacity_bytes = u64::from(*blocks) * block_bytes;
        let (bytes_per_token, ttl) = (args.bytes_per_token, Duration::from_secs(args.ttl_s));
        let options = RealOptions { dir, capacity_bytes, bytes_per_token, ttl };
        let bar =
            progress_bar(trace.requests.len(), "the real store {bar:40} {pos}/{len} requests, {eta} left");
        let run = replay_real(trace, &options, || bar.inc(1))?;
        bar.finish_and_clear();
        Ok((capacity_bytes, run))
    };
    capacities.iter().map(run).collect()
}

fn real_line(capacity_bytes: u64, run: &RealRun, trace: &Trace, args: &Args) -> serde_json::Value {
    json!({
        "trace": args.trace.display().to_string(),
        "policy": "esker",
        "real": true,
        "capacity_bytes": capacity_bytes,
        "distinct_blocks": trace.blocks(),
        "block_tokens": trace.block_tokens,
        "input_tokens": run.input_tokens,
        "hit_tokens": run.hit_tokens,
        "token_hit_ratio": run.hit_ratio(),
        "accepted_bytes": run.accepted_bytes,
        "device_written_bytes": run.device_bytes,
        "segment_written_bytes": run.segment_bytes,
        "index_change_bytes": run.stats.index_change_bytes,
        "write_amplification": run.write_amplification(),
        "evicted_blocks": run.stats.evicted,
        "expired_blocks": run.stats.expired,
        "declined_blocks": run.stats.declined,
        "punched_bytes": run.stats.punched_bytes,
        "read_blocks": run.read_blocks,
        "seconds": run.wall_s,
    })
}

fn read(path: &Path) -> anyhow::Result<Trace> {
    let len = std::fs::metadata(path).with_context(|| format!("no trace at {}", path.display()))?.len();
    let bar = progress_bar(usize::try_from(len)?, "reading the trace {bar:40} {bytes}/{total_bytes}");
    let trace = Trace::read(path, |bytes| bar.set_position(bytes))?;
    bar.finish_and_clear();
    Ok(trace)
}

/// The sizes asked for, in blocks, each once.
fn capacities(args: &Args, trace: &Trace) -> anyhow::Result<Vec<u32>> {
    let block_bytes = u64::from(args.bytes_per_token) * u64::from(trace.block_tokens);
    let mut capacities = Vec::new();
    for bytes in &args.bytes {
        let blocks = bytes / block_bytes;
        if blocks == 0 {
            bail!("{bytes} bytes do not hold one block of {block_bytes} bytes");
        }
        capacities.push(u32::try_from(blocks).unwrap_or(u32::MAX));
    }
    let default = if args.bytes.is_empty() { &SHARES_PERCENT[..] } else { &[] };
    let shares = if args.share.is_empty() { default } else { &args.share };
    capacities.extend(shares.iter().map(|share| trace.share_blocks(*share)));
    capacities.sort_unstable();
    capacities.dedup();
    Ok(capacities)
}

fn line(run: &Run, trace: &Trace, args: &Args) -> serde_json::Value {
    let block_bytes = u64::from(args.bytes_per_token) * u64::from(trace.block_tokens);
    let bounded = run.policy != Policy::Infinite;
    json!({
        "trace": args.trace.display().to_string(),
        "policy": run.policy.name(),
        "capacity_blocks": bounded.then_some(run.capacity_blocks),
        "capacity_bytes": bounded.then_some(u64::from(run.capacity_blocks) * block_bytes),
        "distinct_blocks": trace.blocks(),
        "block_tokens": trace.block_tokens,
        "input_tokens": run.input_tokens,
        "hit_tokens": run.hit_tokens,
        "token_hit_ratio": run.hit_ratio(),
        "written_blocks": run.written_blocks,
        "written_bytes": run.written_blocks * block_bytes,
        "evicted_blocks": run.evicted_blocks,
        "seconds": run.wall_s,
    })
}

/// A bar on standard error; nothing where that is no terminal.
fn progress_bar(len: usize, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is fixed");
    ProgressBar::new(len as u64).with_style(style)
}

fn policies(text: &str) -> Result<Policies, String> {
    if text == "all" {
        return Ok(Policies(Policy::ALL.to_vec()));
    }
    let found = Policy::ALL.into_iter().find(|policy| policy.name() == text);
    found.map(|policy| Policies(vec![policy])).ok_or_else(|| {
        let names: Vec<&str> = Policy::ALL.iter().map(|policy| policy.name()).collect();
        format!("known are {}, all", names.join(", "))
    })
}

fn percent(text: &str) -> Result<f64, String> {
    let percent = text.trim_end_matches('%').trim().parse::<f64>().ok();
    percent
        .filter(|percent| *percent > 0.0 && *percent <= 100.0)
        .ok_or_else(|| "not above 0 and at most 100".into())
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| "not a number with a unit, such as 200GiB".to_owned())?;
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0_f64.powi(2),
        "g" | "gib" => 1024.0_f64.powi(3),
        "t" | "tib" => 1024.0_f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        other => return Err(format!("{other:?} is no unit of bytes")),
    };
    let bytes = number * factor;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err("out of range".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(bytes("200GiB"), Ok(200 << 30));
        assert_eq!(bytes("1.5 TB"), Ok(1_500_000_000_000));
        assert_eq!(bytes("4096"), Ok(4096));
        for wrong in ["", "GiB", "3 apples", "0", "1e40"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!(percent("5%"), Ok(5.0));
        assert!(percent("0").is_err() && percent("101").is_err());
    }
}

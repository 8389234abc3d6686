//! `esker stat`.

use std::path::PathBuf;

use anyhow::Context;
use esker_store::{AGE_BOUNDS_S, Amount, StoreStat};
use indicatif::{HumanBytes, HumanDuration};
use serde_json::{Map, Value, json};

use super::fsck::store_folder;

/// Arguments of `esker stat`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data folder; a server may have it open
    #[arg(value_name = "DIR")]
    data: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Tells what a data folder holds.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let dir = store_folder(&args.data);
    let found = esker_store::stat(&dir).with_context(|| format!("cannot read {}", args.data.display()))?;
    if args.json {
        say!("{}", to_json(&found));
    } else {
        tell(&found)?;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Raw bytes for each stored one.
fn ratio(amount: &Amount) -> f64 {
    if amount.stored_bytes == 0 { 1.0 } else { amount.raw_bytes as f64 / amount.stored_bytes as f64 }
}

/// Bytes written to the drive for each that was accepted; 0 if none was.
fn amplification(found: &StoreStat) -> f64 {
    match found.wear.accepted_bytes {
        0 => 0.0,
        accepted => found.wear.written_bytes as f64 / accepted as f64,
    }
}

/// The groups of objects, each with its title and its rows.
fn groups(found: &StoreStat) -> [(&'static str, Vec<(String, Amount)>); 4] {
    let age = |(bound, amount): (u32, Amount)| {
        let name = if bound == u32::MAX { "older".into() } else { format!("below {} h", bound / 3600) };
        (name, amount)
    };
    [
        ("namespaces", found.namespaces.iter().map(|(id, amount)| (hex(&id.0), *amount)).collect()),
        ("scopes", found.scopes.iter().map(|(tag, amount)| (hex(&tag.0), *amount)).collect()),
        ("classes", found.classes.iter().map(|(class, amount)| (class.0.to_string(), *amount)).collect()),
        ("ages", AGE_BOUNDS_S.into_iter().zip(found.ages).map(age).collect()),
    ]
}

fn tell(found: &StoreStat) -> anyhow::Result<()> {
    if found.in_use {
        say!("in use: this is how it was a moment ago; the server itself counts bytes written and read");
    }
    let line = |name: &str, amount: &Amount| -> anyhow::Result<()> {
        let (raw, stored) =
            (HumanBytes(amount.raw_bytes).to_string(), HumanBytes(amount.stored_bytes).to_string());
        say!(
            "{name:<64} {:>12} tokens {:>9} objects {raw:>12} raw {stored:>12} stored {:>6.2}x {:>9} hits of {:>12} tokens",
            amount.tokens,
            amount.objects,
            ratio(amount),
            amount.hits.count,
            amount.hits.tokens
        );
        Ok(())
    };
    line("all", &found.total)?;
    for (title, rows) in groups(found) {
        say!("{title}");
        for (name, amount) in rows.iter().filter(|(_, amount)| amount.objects > 0) {
            line(&format!("  {name}"), amount)?;
        }
    }
    say!("leases: {}", found.leases.len());
    for lease in &found.leases {
        let left = HumanDuration(std::time::Duration::from_secs(lease.remaining_s.into()));
        say!("  {} {} ends, {left} left", hex(&lease.id.0), lease.ends);
    }
    say!("erasures kept: {}", found.erasures);
    let sum = |part: fn(&esker_store::SegmentStat) -> u64| HumanBytes(found.segments.iter().map(part).sum());
    say!(
        "segments: {} of {} begun; {} long, {} live, {} dead, {} given back",
        found.segments.len(),
        found.segments_begun,
        sum(|segment| segment.len_bytes),
        sum(|segment| segment.live_bytes),
        sum(|segment| segment.dead_bytes),
        sum(|segment| segment.given_back_bytes)
    );
    say!(
        "written: {} ever, for {} accepted: {:.3} times",
        HumanBytes(found.wear.written_bytes),
        HumanBytes(found.wear.accepted_bytes),
        amplification(found)
    );
    say!(
        "index: {} on disk; {} of memory, {:.1} bytes an object",
        HumanBytes(found.index_bytes),
        HumanBytes(found.table_bytes),
        found.table_bytes as f64 / found.total.objects.max(1) as f64
    );
    Ok(())
}

fn to_json(found: &StoreStat) -> Value {
    let amount = |amount: &Amount| {
        json!({"tokens": amount.tokens, "objects": amount.objects, "raw_bytes": amount.raw_bytes,
               "stored_bytes": amount.stored_bytes, "compression_ratio": ratio(amount),
               "hits": amount.hits.count, "hit_tokens": amount.hits.tokens})
    };
    let mut whole = Map::new();
    whole.insert("in_use".into(), found.in_use.into());
    whole.insert("total".into(), amount(&found.total));
    for (title, rows) in groups(found) {
        let rows: Map<String, Value> = rows.iter().map(|(name, of)| (name.clone(), amount(of))).collect();
        whole.insert(title.into(), rows.into());
    }
    let leases = found
        .leases
        .iter()
        .map(|lease| json!({"id": hex(&lease.id.0), "ends": lease.ends, "remaining_s": lease.remaining_s}));
    whole.insert("leases".into(), leases.collect());
    whole.insert("erasures".into(), found.erasures.into());
    let segments = found.segments.iter().map(|segment| {
        json!({"number": segment.number, "sealed": segment.sealed, "len_bytes": segment.len_bytes,
               "live_bytes": segment.live_bytes, "dead_bytes": segment.dead_bytes,
               "given_back_bytes": segment.given_back_bytes})
    });
    whole.insert("segments".into(), segments.collect());
    whole.insert("segments_begun".into(), found.segments_begun.into());
    whole.insert("written_bytes".into(), found.wear.written_bytes.into());
    whole.insert("accepted_bytes".into(), found.wear.accepted_bytes.into());
    whole.insert("write_amplification".into(), amplification(found).into());
    whole.insert("index_bytes".into(), found.index_bytes.into());
    whole.insert("table_bytes".into(), found.table_bytes.into());
    whole.into()
}

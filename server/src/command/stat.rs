//! `esker stat`.

use std::path::PathBuf;

use anyhow::Context;
use esker_store::{AGE_BOUNDS_S, Amount, StoreSettings, StoreStat, TtlClass};
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

/// Objects by one of their properties.
struct Group {
    title: &'static str,
    rows: Vec<(String, Amount)>,
    /// Whether the store tells how often they were hit.
    tells_hits: bool,
}

fn groups(found: &StoreStat) -> [Group; 4] {
    let age = |(bound, amount): (u32, Amount)| {
        let name = if bound == u32::MAX { "older".into() } else { format!("below {} h", bound / 3600) };
        (name, amount)
    };
    let group = |title, rows| Group { title, rows, tells_hits: true };
    [
        group("namespaces", found.namespaces.iter().map(|(id, amount)| (hex(&id.0), *amount)).collect()),
        group("scopes", found.scopes.iter().map(|(tag, amount)| (hex(&tag.0), *amount)).collect()),
        group("classes", found.classes.iter().map(|(class, amount)| (class_name(*class), *amount)).collect()),
        Group {
            title: "ages",
            rows: AGE_BOUNDS_S.into_iter().zip(found.ages).map(age).collect(),
            tells_hits: false,
        },
    ]
}

/// As requests name it. The times are those of a server, which has no others.
fn class_name(class: TtlClass) -> String {
    let minutes = |ttl: &std::time::Duration| ttl.as_secs() / 60;
    match StoreSettings::default().ttl_classes.get(usize::from(class.0)).map(minutes) {
        _ if class == TtlClass::PERMANENT => "permanent".into(),
        Some(minutes) if minutes.is_multiple_of(60) => format!("{}h", minutes / 60),
        Some(minutes) => format!("{minutes}m"),
        None => format!("class {}", class.0),
    }
}

/// One row of text.
fn line(name: &str, amount: &Amount, tells_hits: bool) -> String {
    let (raw, stored) =
        (HumanBytes(amount.raw_bytes).to_string(), HumanBytes(amount.stored_bytes).to_string());
    let (tokens, objects, ratio) = (amount.tokens, amount.objects, ratio(amount));
    let row = format!(
        "{name:<64} {tokens:>12} tokens {objects:>9} objects {raw:>12} raw {stored:>12} stored {ratio:>6.2}x"
    );
    let (hits, of) = (amount.hits.count, amount.hits.tokens);
    if tells_hits { format!("{row} {hits:>9} hits of {of:>12} tokens") } else { row }
}

fn tell(found: &StoreStat) -> anyhow::Result<()> {
    if found.in_use {
        say!("in use: this is how it was a moment ago; the server itself counts bytes written and read");
    }
    say!("{}", line("all", &found.total, true));
    for Group { title, rows, tells_hits } in groups(found) {
        say!("{title}");
        for (name, amount) in rows.iter().filter(|(_, amount)| amount.objects > 0) {
            say!("{}", line(&format!("  {name}"), amount, tells_hits));
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
    let amount = |amount: &Amount, tells_hits: bool| {
        let mut fields = json!({"tokens": amount.tokens, "objects": amount.objects, "raw_bytes": amount.raw_bytes,
                                "stored_bytes": amount.stored_bytes, "compression_ratio": ratio(amount)});
        if tells_hits {
            fields["hits"] = amount.hits.count.into();
            fields["hit_tokens"] = amount.hits.tokens.into();
        }
        fields
    };
    let mut whole = Map::new();
    whole.insert("in_use".into(), found.in_use.into());
    whole.insert("total".into(), amount(&found.total, true));
    for Group { title, rows, tells_hits } in groups(found) {
        let rows: Map<String, Value> =
            rows.iter().map(|(name, of)| (name.clone(), amount(of, tells_hits))).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_their_names_and_ages_tell_no_hits() {
        let some = Amount { objects: 3, tokens: 384, ..Amount::default() };
        let classes = [TtlClass(0), TtlClass(1), TtlClass(2), TtlClass(3), TtlClass::PERMANENT, TtlClass(9)];
        let found = StoreStat {
            classes: classes.into_iter().map(|class| (class, some)).collect(),
            ages: [some; AGE_BOUNDS_S.len()],
            ..StoreStat::default()
        };
        let json = to_json(&found);
        let names: Vec<&String> = json["classes"].as_object().unwrap().keys().collect();
        assert!(
            ["5m", "1h", "24h", "72h", "permanent", "class 9"]
                .iter()
                .all(|name| json["classes"][name]["hits"] == 0),
            "{names:?}"
        );
        assert_eq!((names.len(), &json["total"]["hit_tokens"]), (6, &json!(0)));
        for (name, age) in json["ages"].as_object().unwrap() {
            assert_eq!(
                (&age["tokens"], age.get("hits"), age.get("hit_tokens")),
                (&json!(384), None, None),
                "{name}"
            );
        }
        assert!(line("24h", &some, true).ends_with("0 hits of            0 tokens"));
        assert!(!line("older", &some, false).contains("hits"));
    }
}

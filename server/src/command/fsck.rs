//! `esker fsck`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use esker_store::FsckReport;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

/// Arguments of `esker fsck`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data folder; no server may have it open
    #[arg(value_name = "DIR")]
    data: PathBuf,
    /// Mend what is wrong: build the index anew, take bad records out of it, give dead space back
    #[arg(long)]
    repair: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// The store's folder within a data folder, or the folder itself if it is one.
pub(super) fn store_folder(data: &Path) -> PathBuf {
    let inner = data.join("store");
    if inner.join("segments").is_dir() { inner } else { data.to_owned() }
}

/// Checks a data folder. Fails if there are problems that were not mended.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let dir = store_folder(&args.data);
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(
        "{wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
    )?);
    let report = esker_store::fsck(&dir, args.repair, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })
    .with_context(|| format!("cannot check {}", args.data.display()))?;
    bar.finish_and_clear();
    // Nothing mends a lease whose prefix is gone.
    let left = match report.repair {
        Some(_) => report.broken_leases + report.bad_segments.len() as u64,
        None => report.problems(),
    };
    if args.json {
        say!("{}", to_json(&report));
    } else {
        tell(&report)?;
    }
    Ok(if left == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell(report: &FsckReport) -> anyhow::Result<()> {
    let bytes = |bytes: u64| HumanBytes(bytes);
    say!("{} segments, {} verified", report.segments, bytes(report.read_bytes));
    say!("{:>12} sound records, {}", report.live, bytes(report.live_bytes));
    let notes = [
        (report.to_recover, "records that the next opening takes in"),
        (report.quarantined, "bad records in quarantine"),
        (report.orphans, "records whose parent is gone"),
        (report.leases, "leases"),
    ];
    let problems = [
        (report.bad.total(), "bad records"),
        (report.dangling, "index entries that point at nothing"),
        (report.missing, "sound records missing from the index"),
        (report.duplicates, "records that a later one replaces, still in the index"),
        (report.conflicting, "of them with other content"),
        (report.erased_present, "erased records still in the index"),
        (report.broken_leases, "leases whose prefix is gone"),
        (report.bad_segments.len() as u64, "segments without a sound page of their own"),
    ];
    for (count, what) in notes.iter().chain(&problems).filter(|(count, _)| *count > 0) {
        say!("{count:>12} {what}");
    }
    for (kind, count) in report.bad.iter() {
        say!("{count:>12}   {kind}");
    }
    if report.dead_bytes > 0 {
        say!("{:>12} neither live nor given back", bytes(report.dead_bytes).to_string());
    }
    if let Some(error) = &report.index_error {
        say!("the index cannot be read: {error}");
    }
    match (report.repair, report.problems()) {
        (_, 0) => say!("clean"),
        (None, problems) => say!("{problems} problems; --repair mends what can be mended"),
        (Some(repair), _) => say!(
            "mended: index {}, {} bad records taken out of it, {} given back",
            if repair.rebuilt { "built anew" } else { "kept" },
            repair.quarantined,
            bytes(repair.given_back_bytes)
        ),
    }
    Ok(())
}

fn to_json(report: &FsckReport) -> serde_json::Value {
    let bad: serde_json::Map<_, _> =
        report.bad.iter().map(|(kind, count)| (kind.name().to_owned(), count.into())).collect();
    let repair = report.repair.map(|repair| {
        json!({"rebuilt": repair.rebuilt, "quarantined": repair.quarantined,
               "given_back_bytes": repair.given_back_bytes})
    });
    json!({
        "problems": report.problems(), "segments": report.segments, "read_bytes": report.read_bytes,
        "live": report.live, "live_bytes": report.live_bytes, "given_back_bytes": report.given_back_bytes,
        "to_recover": report.to_recover, "quarantined": report.quarantined, "orphans": report.orphans,
        "leases": report.leases, "bad": bad, "dangling": report.dangling, "missing": report.missing,
        "duplicates": report.duplicates, "conflicting": report.conflicting,
        "erased_present": report.erased_present, "dead_bytes": report.dead_bytes,
        "broken_leases": report.broken_leases, "bad_segments": report.bad_segments,
        "index_error": report.index_error, "repair": repair,
    })
}

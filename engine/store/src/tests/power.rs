//! Power cuts on a real kernel: a store on ext4, on a drive that forgets half of what was not flushed.
//!
//! The drive is a network block device of ours (`power/nbd.rs`) behind nbdfuse and a loop device (`power/chain.rs`). A
//! process of its own writes to the store; at a random time the drive keeps a random half of its unflushed sectors and
//! answers no more. The file system is then mounted again from what is left. What was acknowledged is noted by the
//! test, outside.
//!
//! Needs root, /dev/fuse, loop devices and nbdfuse (`.ci/setup-power`); says so and passes where they are missing, unless
//! `ESKER_POWER_REQUIRED=1`. `ESKER_POWER_CUTS` says how many cuts, `ESKER_SEED` repeats their times and halves.

mod chain;
mod nbd;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::common::figures::{self, Watchdog};
use super::common::life::{Journal, NUMBERS, Verdict, Writer};
use super::common::settings;
use crate::io::sim::Random;
use crate::{Sabotage, Store, StoreSettings};
use chain::Chain;
use nbd::Drive;

const DIR: &str = "ESKER_POWER_DIR";
const FIRST: &str = "ESKER_POWER_FIRST";
const SKIP_FLUSH: &str = "ESKER_POWER_SKIP_FLUSH";

const CUTS: u64 = 20;
/// Cuts of one file system.
const CUTS_OF_DRIVE: u64 = 10;
const CONTROL_CUTS: u64 = 20;
const WRITERS: u64 = 6;
const LENS: [usize; 2] = [700, 9000];
const PATIENCE: Duration = Duration::from_secs(120);

fn powered(skip_flush: bool) -> StoreSettings {
    let sabotage = Sabotage { skip_flush, ..Sabotage::default() };
    StoreSettings { lock_wait: Duration::from_secs(10), sabotage, ..settings() }
}

/// Not a test of its own: the process whose power is cut.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let first = figures::number(FIRST, 0);
    let store = Store::open(dir.as_ref(), powered(figures::number(SKIP_FLUSH, 0) == 1)).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let writer = Writer { store: &store, lens: &LENS, first, writer, writers: WRITERS, lies: false };
            // No power, or no room: there is nothing more to do.
            scope.spawn(move || writer.live().unwrap_or_default());
        }
    });
}

#[derive(Default)]
struct Tally {
    cuts: u64,
    acked: u64,
    leased: u64,
    erased: u64,
    verdict: Verdict,
    forgotten_sectors: u64,
    reopen_ms_max: u64,
}

#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    let start = Instant::now();
    let Some(tally) = run(figures::number("ESKER_POWER_CUTS", CUTS), false) else {
        figures::report("power_cuts", &[("cuts", 0), ("skipped", 1)]);
        return;
    };
    let verdict = &tally.verdict;
    let report: [&[(&str, u64)]; 3] = [
        &[
            ("cuts", tally.cuts),
            ("acknowledged", tally.acked),
            ("leased", tally.leased),
            ("erased", tally.erased),
        ],
        &verdict.figures(),
        &[
            ("sectors_forgotten", tally.forgotten_sectors),
            ("reopen_ms_max", tally.reopen_ms_max),
            ("seconds", start.elapsed().as_secs()),
        ],
    ];
    figures::report("power_cuts", &report.concat());
    assert!(verdict.holds(), "{verdict:?}");
    let enough = tally.acked > tally.cuts && tally.leased > tally.cuts / 2 && tally.erased > tally.cuts / 2;
    assert!(enough, "too little was done to prove anything");
    assert!(tally.forgotten_sectors > 0, "the drive forgot nothing");
}

/// The control: without flushes something acknowledged is lost.
#[test]
fn without_the_flush_power_cuts_lose_acknowledged_blocks() {
    let Some(tally) = run(CONTROL_CUTS, true) else {
        figures::report("power_control", &[("cuts", 0), ("skipped", 1)]);
        return;
    };
    figures::report(
        "power_control",
        &[("cuts", tally.cuts), ("lost_found", tally.verdict.lost.len() as u64)],
    );
    assert!(!tally.verdict.lost.is_empty(), "the test is blind");
    assert!(tally.verdict.wrong.is_empty());
}

/// `None`, with the reason on standard output, where there can be no such drive. A control ends with the first loss.
fn run(cuts: u64, control: bool) -> Option<Tally> {
    let folder = tempfile::tempdir().unwrap();
    let blank = match chain::blank(folder.path()).and_then(|blank| {
        Chain::up(&Arc::new(Drive::new(blank.clone())), folder.path()).map(drop).map(|()| blank)
    }) {
        Ok(blank) => blank,
        Err(reason) => {
            assert!(
                std::env::var_os("ESKER_POWER_REQUIRED").is_none(),
                "power cuts are not possible: {reason}"
            );
            println!("SKIPPED: power cuts need root, /dev/fuse, loop devices and nbdfuse: {reason}");
            return None;
        }
    };
    let mut random = Random::new(figures::seed());
    let watchdog = Watchdog::start(PATIENCE);
    let mut tally = Tally::default();
    while tally.cuts < cuts && (!control || tally.verdict.lost.is_empty()) {
        let drive = Arc::new(Drive::new(blank.clone()));
        let mut journal = Journal::default();
        for cut in 0..CUTS_OF_DRIVE.min(cuts - tally.cuts) {
            cut_once(&drive, folder.path(), cut, control, &mut journal, &mut random, &mut tally);
            watchdog.progress();
        }
        let chain = Chain::up(&drive, folder.path()).unwrap();
        audit(&chain.store(), &mut journal, control, &mut tally);
        drop(chain);
    }
    Some(tally)
}

/// One life of the file system: mounted, looked at, written to, cut.
fn cut_once(
    drive: &Arc<Drive>,
    folder: &Path,
    cut: u64,
    control: bool,
    journal: &mut Journal,
    random: &mut Random,
    tally: &mut Tally,
) {
    let chain = Chain::up(drive, folder).unwrap();
    let dir = chain.store();
    if random.once_in(4) {
        let _ = std::fs::remove_dir_all(dir.join("index"));
    }
    audit(&dir, journal, control, tally);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::power::writer", "--nocapture", "--test-threads=1"])
        .env(DIR, &dir)
        .env(FIRST, (cut * NUMBERS).to_string())
        .env(SKIP_FLUSH, u64::from(control).to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (first, begun) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let said = lines.map_while(Result::ok).inspect(|line| {
            if line.contains("<acked") {
                let _ = first.send(());
            }
        });
        said.collect::<String>()
    });
    // Some cuts come while the store opens, most while it writes.
    if !random.once_in(6) {
        let _ = begun.recv_timeout(Duration::from_secs(10));
    }
    std::thread::sleep(Duration::from_micros(random.below(150_000)));
    tally.forgotten_sectors += drive.cut(random.number());
    child.kill().unwrap();
    child.wait().unwrap();
    let (acked, leased, erased) = (journal.acked.len(), journal.leased, journal.erased.len());
    journal.hear(&reader.join().unwrap(), WRITERS);
    tally.acked += (journal.acked.len() - acked) as u64;
    tally.leased += journal.leased - leased;
    tally.erased += (journal.erased.len() - erased) as u64;
    tally.cuts += 1;
}

/// Counts what is missing and what is wrong; forgets it, so that it is counted once.
fn audit(dir: &Path, journal: &mut Journal, control: bool, tally: &mut Tally) {
    let start = Instant::now();
    let store = Store::open(dir, powered(control)).unwrap();
    tally.reopen_ms_max = tally.reopen_ms_max.max(start.elapsed().as_millis() as u64);
    let verdict = journal.audit(&store, journal.acked.iter().copied(), &LENS);
    journal.forget(&verdict);
    tally.verdict.add(verdict);
}

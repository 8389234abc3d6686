//! A process killed while it opens, recovers, puts, leases or erases, again and again: everything it acknowledged is there, what
//! it leased is kept, also where the store evicts, what it erased is gone, and nothing wrong is. What it said is noted outside of
//! it, by the test.
//!
//! A kill leaves the page cache alone, so this tests recovery and order, not durability: that is the business of the
//! power cuts in `src/tests`. `ESKER_KILLS` says how many, `ESKER_SEED` repeats their times as far as a machine can.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::figures::{self, Watchdog};
use common::life::{Journal, NUMBERS, Verdict, Writer};
use common::settings;
use esker_store::io::IoEngine;
use esker_store::{Store, StoreSettings};

const DIR: &str = "ESKER_KILLED_DIR";
const FIRST: &str = "ESKER_KILLED_FIRST";
const SMALL: &str = "ESKER_KILLED_SMALL";
const LIES: &str = "ESKER_KILLED_LIES";

const KILLS: u64 = 500;
/// Stores that are killed at the same time, so that waiting for a disk or a delay costs less.
const LANES: u64 = 3;
/// Kills of one store before everything in it is read and the next one begins.
const KILLS_OF_STORE: u64 = 25;
/// From the start of the process to its end: from before the store is open to well into writing.
const LONGEST_LIFE: Duration = Duration::from_millis(120);
const WRITERS: u64 = 4;
const LENS: [usize; 3] = [300, 5000, 20_000];
const PATIENCE: Duration = Duration::from_secs(120);

/// A small store has room for what some lives put; what is leased stays, and the rest may go.
fn reopening(small: bool) -> StoreSettings {
    StoreSettings {
        lock_wait: Duration::from_secs(10),
        segment_bytes: 2 << 20,
        capacity_bytes: if small { 16 << 20 } else { u64::MAX },
        admission: false,
        ..settings()
    }
}

/// Not a test of its own: the process that is killed.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let (first, lies) = (figures::number(FIRST, 0), figures::number(LIES, 0) == 1);
    let store = Store::open(dir.as_ref(), reopening(figures::number(SMALL, 0) == 1)).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let writer = Writer { store: &store, lens: &LENS, first, writer, writers: WRITERS, lies };
            scope.spawn(move || writer.live().unwrap());
        }
    });
}

/// What the kills came to.
#[derive(Default)]
struct Tally {
    kills: u64,
    acked: u64,
    leased: u64,
    erased: u64,
    evicting: u64,
    verdict: Verdict,
    rebuilds: u64,
    reopen_us: Vec<u64>,
}

#[test]
fn what_a_killed_process_acknowledged_leased_or_erased_is_so() {
    let start = Instant::now();
    let mut tally = kill(figures::number("ESKER_KILLS", KILLS), false);
    tally.reopen_us.sort_unstable();
    let at = |percent: usize| tally.reopen_us[(tally.reopen_us.len() - 1) * percent / 100];
    let verdict = &tally.verdict;
    let report: [&[(&str, u64)]; 3] = [
        &[
            ("kills", tally.kills),
            ("acknowledged", tally.acked),
            ("leased", tally.leased),
            ("erased", tally.erased),
            ("checked", verdict.checked),
        ],
        &verdict.figures(),
        &[
            ("of_stores_that_evict", tally.evicting),
            ("index_deleted", tally.rebuilds),
            ("reopen_us_p50", at(50)),
            ("reopen_us_p99", at(99)),
            ("reopen_us_max", at(100)),
            ("seconds", start.elapsed().as_secs()),
        ],
    ];
    figures::report("kills", &report.concat());
    assert!(verdict.holds(), "{verdict:?}");
    let enough = tally.acked > tally.kills && tally.leased > tally.kills && tally.erased > tally.kills / 2;
    assert!(enough, "too little was done to prove anything");
}

/// The control: of a process that says what it does before it does it, blocks are lost, leases are missing and what was erased is
/// there, and the test sees it.
#[test]
fn what_was_acknowledged_too_early_is_missed() {
    let (mut kills, mut verdict) = (0, Verdict::default());
    let blind =
        |verdict: &Verdict| verdict.lost.is_empty() || verdict.back.is_empty() || verdict.unleased.is_empty();
    while blind(&verdict) && kills < 600 {
        let tally = kill(30, true);
        kills += tally.kills;
        verdict.add(tally.verdict);
    }
    figures::report(
        "kill_control",
        &[
            ("kills", kills),
            ("lost_found", verdict.lost.len() as u64),
            ("back_found", verdict.back.len() as u64),
            ("unleased_found", verdict.unleased.len() as u64),
        ],
    );
    assert!(!blind(&verdict), "the test is blind: {verdict:?}");
}

fn kill(kills: u64, lies: bool) -> Tally {
    let seed = figures::seed();
    let tally = Mutex::new(Tally::default());
    let watchdog = Watchdog::start(PATIENCE);
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            let (tally, watchdog) = (&tally, &watchdog);
            scope.spawn(move || {
                let mut random = Random(seed.wrapping_add(lane << 32));
                let mut longest = LONGEST_LIFE;
                let mut left = kills / LANES + u64::from(lane < kills % LANES);
                // One lane's stores evict: there, what is leased must stay.
                let small = lane == 0 && !lies;
                while left > 0 {
                    let some = left.min(KILLS_OF_STORE);
                    kill_one_store(some, small, lies, &mut longest, &mut random, tally, watchdog);
                    left -= some;
                }
            });
        }
    });
    tally.into_inner().unwrap()
}

fn kill_one_store(
    kills: u64,
    small: bool,
    lies: bool,
    longest: &mut Duration,
    random: &mut Random,
    tally: &Mutex<Tally>,
    watchdog: &Watchdog,
) {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::default();
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture", "--test-threads=1"])
            .env(DIR, dir.path())
            .env(FIRST, (kill * NUMBERS).to_string())
            .env(SMALL, u64::from(small).to_string())
            .env(LIES, u64::from(lies).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            out.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        std::thread::sleep(*longest * random.below(1000) as u32 / 1000);
        child.kill().unwrap();
        child.wait().unwrap();
        let (before, leased, erased) = (journal.acked.len(), journal.leased, journal.erased.len());
        journal.hear(&reader.join().unwrap(), WRITERS);
        // Half of them should come to something, also on a machine that has more to do.
        *longest = match journal.acked.len() == before {
            true => (*longest * 5 / 4).min(100 * LONGEST_LIFE),
            false => (*longest * 4 / 5).max(LONGEST_LIFE),
        };
        let index_deleted = random.below(4) == 0;
        if index_deleted {
            // Not there yet if the process was killed before it came to it.
            let _ = std::fs::remove_dir_all(dir.path().join("index"));
        }
        let opening = Instant::now();
        let store = Store::open(dir.path(), reopening(small)).unwrap();
        let reopen_us = opening.elapsed().as_micros() as u64;
        // What came last, and some of what came before; at the end all of it.
        let mut looked_at: BTreeSet<u64> = BTreeSet::new();
        match kill + 1 == kills {
            _ if small => {}
            true => looked_at.extend(&journal.acked),
            false => {
                looked_at.extend(&journal.acked[before..]);
                let older = |_| journal.acked[random.below(before as u64) as usize];
                looked_at.extend((0..if before > 0 { 20 } else { 0 }).map(older));
            }
        }
        let verdict = journal.audit(&store, looked_at, &LENS);
        if !verdict.holds() && !lies {
            println!("kill {kill}, index deleted {index_deleted}: {verdict:?}; {:?}", store.open_report());
        }
        let mut tally = tally.lock().unwrap();
        tally.kills += 1;
        tally.evicting += u64::from(small);
        tally.acked += (journal.acked.len() - before) as u64;
        tally.leased += journal.leased - leased;
        tally.erased += (journal.erased.len() - erased) as u64;
        tally.rebuilds += u64::from(index_deleted);
        tally.reopen_us.push(reopen_us);
        tally.verdict.add(verdict);
        watchdog.progress();
    }
    // The folder must still be good with another engine than the one that wrote it.
    let engines = vec![IoEngine::PositionalBuffered];
    let settings = StoreSettings { io_engines: engines, ..reopening(small) };
    let store = Store::open(Path::new(dir.path()), settings).unwrap();
    let newest = journal.acked.iter().rev().take(if small { 0 } else { 20 }).copied();
    let verdict = journal.audit(&store, newest, &LENS);
    tally.lock().unwrap().verdict.add(verdict);
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % bound
    }
}

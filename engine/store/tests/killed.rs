//! A process killed while it opens, recovers or writes, again and again: everything it acknowledged is there, and nothing
//! wrong is. What was acknowledged is noted outside of it, by the test.
//!
//! A kill leaves the page cache alone, so this tests recovery and order, not durability: that is the business of the
//! power cuts in `src/tests`. `ESKER_KILLS` says how many, `ESKER_SEED` repeats their times as far as a machine can.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::figures::{self, Watchdog};
use common::{all, fetch, id, object, planes, settings};
use esker_store::io::IoEngine;
use esker_store::{Store, StoreSettings};

const DIR: &str = "ESKER_KILLED_DIR";
const FIRST: &str = "ESKER_KILLED_FIRST";
const LIES: &str = "ESKER_KILLED_LIES";

const KILLS: u64 = 500;
/// Stores that are killed at the same time, so that waiting for a disk or a delay costs less.
const LANES: u64 = 3;
/// Kills of one store before everything in it is read and the next one begins.
const KILLS_OF_STORE: u64 = 25;
/// From the start of the process to its end: from before the store is open to well into writing.
const LONGEST_LIFE: Duration = Duration::from_millis(120);
const WRITERS: u64 = 4;
/// Numbers of objects that one life may use.
const NUMBERS: u64 = 1_000_000;
const LENS: [usize; 3] = [300, 5000, 20_000];
const PATIENCE: Duration = Duration::from_secs(120);

fn reopening() -> StoreSettings {
    StoreSettings { lock_wait: Duration::from_secs(10), segment_bytes: 2 << 20, ..settings() }
}

/// Not a test of its own: the process that is killed.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let first = figures::number(FIRST, 0);
    let lies = figures::number(LIES, 0) == 1;
    let store = Store::open(dir.as_ref(), reopening()).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let store = &store;
            scope.spawn(move || {
                let mut number = first + writer * NUMBERS / WRITERS;
                for turn in 0.. {
                    let count = 1 + (turn + writer) % 4;
                    let batch =
                        (number..number + count).map(|number| object(number, number, &LENS)).collect();
                    if lies {
                        acknowledge(number..number + count);
                    }
                    assert!(store.put(batch).iter().all(Result::is_ok));
                    if !lies {
                        acknowledge(number..number + count);
                    }
                    number += count;
                }
            });
        }
    });
}

/// In one write, so that a kill cannot cut a number short.
fn acknowledge(numbers: std::ops::Range<u64>) {
    let lines: String = numbers.map(|number| format!("acked {number}.\n")).collect();
    let mut out = std::io::stdout().lock();
    out.write_all(lines.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// What the kills came to.
#[derive(Default)]
struct Tally {
    kills: u64,
    acked: u64,
    checked: u64,
    lost: BTreeSet<u64>,
    wrong: BTreeSet<u64>,
    rebuilds: u64,
    reopen_us: Vec<u64>,
}

#[test]
fn what_a_killed_process_acknowledged_is_there() {
    let start = Instant::now();
    let mut tally = kill(figures::number("ESKER_KILLS", KILLS), false);
    tally.reopen_us.sort_unstable();
    let at = |percent: usize| tally.reopen_us[(tally.reopen_us.len() - 1) * percent / 100];
    figures::report(
        "kills",
        &[
            ("kills", tally.kills),
            ("acknowledged", tally.acked),
            ("checked", tally.checked),
            ("lost", tally.lost.len() as u64),
            ("wrong", tally.wrong.len() as u64),
            ("index_deleted", tally.rebuilds),
            ("reopen_us_p50", at(50)),
            ("reopen_us_p99", at(99)),
            ("reopen_us_max", at(100)),
            ("seconds", start.elapsed().as_secs()),
        ],
    );
    assert!(tally.lost.is_empty(), "lost: {:?}", tally.lost);
    assert!(tally.wrong.is_empty(), "wrong: {:?}", tally.wrong);
    assert!(tally.acked > tally.kills, "too little was put to prove anything");
}

/// The control: of a process that acknowledges before it puts, blocks are lost, and the test sees it.
#[test]
fn what_was_acknowledged_too_early_is_missed() {
    let (mut kills, mut lost) = (0, 0);
    while lost == 0 && kills < 300 {
        let tally = kill(30, true);
        kills += tally.kills;
        lost += tally.lost.len() as u64;
    }
    figures::report("kill_control", &[("kills", kills), ("lost_found", lost)]);
    assert!(lost > 0, "the test is blind");
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
                while left > 0 {
                    let some = left.min(KILLS_OF_STORE);
                    kill_one_store(some, lies, &mut longest, &mut random, tally, watchdog);
                    left -= some;
                }
            });
        }
    });
    tally.into_inner().unwrap()
}

fn kill_one_store(
    kills: u64,
    lies: bool,
    longest: &mut Duration,
    random: &mut Random,
    tally: &Mutex<Tally>,
    watchdog: &Watchdog,
) {
    let dir = tempfile::tempdir().unwrap();
    let mut acked: Vec<u64> = Vec::new();
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture", "--test-threads=1"])
            .env(DIR, dir.path())
            .env(FIRST, (kill * NUMBERS).to_string())
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
        let text = reader.join().unwrap();
        // The harness prints the name of the test on the same line as the first acknowledgement.
        let numbers =
            text.split("acked ").skip(1).filter_map(|rest| rest.split_once('.')?.0.parse::<u64>().ok());
        let before = acked.len();
        acked.extend(numbers);
        // Half of them should come to something, also on a machine that has more to do.
        *longest = match acked.len() == before {
            true => (*longest * 5 / 4).min(100 * LONGEST_LIFE),
            false => (*longest * 4 / 5).max(LONGEST_LIFE),
        };
        let index_deleted = random.below(4) == 0;
        if index_deleted {
            // Not there yet if the process was killed before it came to it.
            let _ = std::fs::remove_dir_all(dir.path().join("index"));
        }
        let opening = Instant::now();
        let store = Store::open(dir.path(), reopening()).unwrap();
        let reopen_us = opening.elapsed().as_micros() as u64;
        // What came last, and some of what came before; at the end all of it.
        let mut looked_at: BTreeSet<u64> = acked[before..].iter().copied().collect();
        match kill + 1 == kills {
            true => looked_at.extend(&acked),
            false if before > 0 => {
                looked_at.extend((0..20).map(|_| acked[random.below(before as u64) as usize]))
            }
            false => {}
        }
        let (lost, wrong) = audit(&store, &looked_at.iter().copied().collect::<Vec<_>>());
        if !lost.is_empty() && !lies {
            println!("kill {kill}, index deleted {index_deleted}: lost {lost:?}; {:?}", store.open_report());
        }
        let mut tally = tally.lock().unwrap();
        tally.kills += 1;
        tally.acked += (acked.len() - before) as u64;
        tally.checked += looked_at.len() as u64;
        tally.rebuilds += u64::from(index_deleted);
        tally.reopen_us.push(reopen_us);
        tally.lost.extend(lost);
        tally.wrong.extend(wrong);
        watchdog.progress();
    }
    // The folder must still be good with another engine than the one that wrote it.
    let engines = vec![IoEngine::PositionalBuffered];
    let store =
        Store::open(Path::new(dir.path()), StoreSettings { io_engines: engines, ..reopening() }).unwrap();
    let (lost, wrong) = audit(&store, &acked[acked.len().saturating_sub(20)..]);
    let mut tally = tally.lock().unwrap();
    tally.lost.extend(lost);
    tally.wrong.extend(wrong);
}

/// Which of these objects are missing, and which have other bytes.
fn audit(store: &Store, numbers: &[u64]) -> (Vec<u64>, Vec<u64>) {
    let (mut lost, mut wrong) = (Vec::new(), Vec::new());
    for some in numbers.chunks(200) {
        let found = store.get(&some.iter().map(|&number| id(number)).collect::<Vec<_>>());
        let there: Vec<u64> =
            some.iter().zip(&found).filter(|(_, found)| found.is_some()).map(|(&number, _)| number).collect();
        lost.extend(some.iter().filter(|number| !there.contains(number)));
        for (got, number) in fetch(store, all(found.into_iter().flatten().collect())).into_iter().zip(there) {
            match got {
                Ok(bytes) if bytes == planes(&object(number, number, &LENS)) => {}
                Ok(_) => wrong.push(number),
                Err(_) => lost.push(number),
            }
        }
    }
    (lost, wrong)
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % bound
    }
}

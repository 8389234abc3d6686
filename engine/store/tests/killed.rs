//! A process killed while it writes: everything it acknowledged is there, and nothing wrong is.
//!
//! A kill leaves the page cache alone, so this tests recovery and order, not durability: that is the business of
//! the trace oracle in `src/tests/faults.rs`.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{all, fetch, id, object, planes, settings};
use esker_store::{Store, StoreSettings};

const DIR: &str = "ESKER_KILLED_DIR";
const KILLS: u64 = 12;
const LENS: [usize; 3] = [300, 5000, 70_000];

fn reopening() -> StoreSettings {
    StoreSettings { lock_wait: Duration::from_secs(10), segment_bytes: 4 << 20, ..settings() }
}

/// Not a test of its own: the process that is killed.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = Store::open(dir.as_ref(), reopening()).unwrap();
    let first: u64 = std::env::var("ESKER_KILLED_FIRST").unwrap().parse().unwrap();
    for number in (first..).step_by(4) {
        let batch = (number..number + 4).map(|number| object(number, number, &LENS)).collect();
        for (offset, outcome) in store.put(batch).into_iter().enumerate() {
            outcome.unwrap();
            println!("acked {}", number + offset as u64);
        }
        std::io::stdout().flush().unwrap();
    }
}

#[test]
fn what_a_killed_process_acknowledged_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut acked: Vec<u64> = Vec::new();
    for kill in 0..KILLS {
        let first = kill * 100_000;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture", "--test-threads=1"])
            .env(DIR, dir.path())
            .env("ESKER_KILLED_FIRST", first.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wanted = 1 + (kill * 37) % 90;
        let mut numbers = lines.map_while(Result::ok).filter_map(|line| {
            // The harness prints the name of the test on the same line as the first acknowledgement.
            line.rsplit_once("acked ").and_then(|(_, number)| number.parse::<u64>().ok())
        });
        acked.extend(numbers.by_ref().take(wanted as usize));
        child.kill().unwrap();
        // Acknowledged before the kill, read after it.
        acked.extend(numbers);
        child.wait().unwrap();

        let store = Store::open(dir.path(), reopening()).unwrap();
        if kill % 3 == 2 {
            drop(store);
            std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
    }
    assert!(acked.len() as u64 > KILLS);
    let store = Store::open(dir.path(), reopening()).unwrap();
    let ids: Vec<_> = acked.iter().map(|&number| id(number)).collect();
    let found: Vec<_> = store.get(&ids).into_iter().map(|found| found.expect("acknowledged")).collect();
    for (got, number) in fetch(&store, all(found)).into_iter().zip(acked) {
        assert_eq!(got, Ok(planes(&object(number, number, &LENS))), "object {number}");
    }
}

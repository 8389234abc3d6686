//! A device that fails to read costs misses, and nothing that is stored.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffered;
use super::common::{all, chain, fetch, id};
use crate::io::faulty::{Fault, FaultyDisk, Plan};
use crate::io::{IoEngine, OpKind};
use crate::{MissKind, Sabotage, Store, StoreSettings};

const BLOCKS: u64 = 60;

fn open(dir: &std::path::Path, skip_breaker: bool) -> (Store, Arc<FaultyDisk>) {
    let segments = dir.join("segments");
    std::fs::create_dir_all(&segments).unwrap();
    let (disk, _) = crate::io::choose(&segments, &[IoEngine::PositionalBuffered]).unwrap();
    let disk = FaultyDisk::new(disk);
    let sabotage = Sabotage { skip_breaker, ..Sabotage::default() };
    // A read for each record, so that each can fail by itself.
    let settings = StoreSettings { sabotage, read_merge_bytes: 1, ..buffered() };
    let store = Store::open_on(dir, settings, disk.clone()).unwrap();
    assert!(store.put(chain(0, BLOCKS, &[700, 4500])).iter().all(Result::is_ok));
    (store, disk)
}

/// Asks for each block by itself, as many callers would; what came of each.
fn ask(store: &Store, ids: &[esker_prefix::ObjectId]) -> Vec<Option<MissKind>> {
    let found: Vec<_> = store.get(ids).into_iter().flatten().collect();
    found.into_iter().map(|found| fetch(store, all(vec![found])).remove(0).err()).collect()
}

#[test]
fn a_sick_device_does_not_empty_the_index() {
    for skip_breaker in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (store, disk) = open(dir.path(), skip_breaker);
        let ids: Vec<_> = (0..BLOCKS).map(id).collect();
        let broken = Fault::Errno(libc::EIO);
        disk.arm(&[Plan { kind: OpKind::Read, first: 0, count: u64::MAX, fault: broken }]);
        let started = Instant::now();
        let misses = ask(&store, &ids);
        assert!(misses.iter().all(|miss| matches!(miss, Some(MissKind::ReadError | MissKind::Unavailable))));
        let (reads, probes) = (disk.seen(OpKind::Read), 2 + started.elapsed().as_millis() as u64 / 50);
        let left = store.get(&ids).iter().flatten().count() as u64;
        let stats = store.stats();
        assert!(stats.breaker_trips >= 1);
        if skip_breaker {
            // The control: record by record.
            assert_eq!((left, reads), (0, 2 * BLOCKS));
            continue;
        }
        assert_eq!(left, BLOCKS, "nothing is lost: {stats:?}");
        assert_eq!(stats.quarantined, 0, "the index forgets nothing for a failed read");
        assert!(stats.reinstated >= 1);
        assert!(reads <= 8 + probes, "{reads} reads");

        // The device recovers, and so does the store, without help.
        disk.arm(&[]);
        let until = Instant::now() + Duration::from_secs(20);
        while ask(&store, &ids).iter().any(Option::is_some) {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(20));
        }
        // A single bad record is still its own fault.
        disk.arm(&[Plan { kind: OpKind::Read, first: 0, count: 2, fault: broken }]);
        assert_eq!(ask(&store, &ids[..2]), [Some(MissKind::ReadError), None]);
        assert!(store.get(&ids[..1])[0].is_none());
        // The index has kept all: the device may read after a restart what it does not read now.
        drop(store);
        let store = Store::open(dir.path(), buffered()).unwrap();
        assert_eq!(store.get(&ids).iter().flatten().count() as u64, BLOCKS);
    }
}

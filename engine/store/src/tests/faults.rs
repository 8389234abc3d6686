//! A disk that fails: no acknowledgement without a flush, no bytes but the right ones, and reads go on.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::common::{all, chain, fetch, id, object, planes, settings};
use crate::io::faulty::{Fault, FaultyDisk, Plan, Trace};
use crate::io::{FileId, IoEngine, OpKind, PAGE};
use crate::{
    Erase, ErrorKind, FetchEvent, FetchOrder, FetchRequest, LeaseId, MissKind, PutOutcome, Sabotage, Store,
    StoreError, StoreSettings, TtlClass,
};

const LENS: [usize; 2] = [700, 4500];
const SEGMENT_BYTES: u64 = 64 << 10;
/// Last page of a segment.
const SEAL_AT: u64 = SEGMENT_BYTES - PAGE as u64;

fn open(dir: &Path, settings: StoreSettings) -> (Store, Arc<FaultyDisk>) {
    let segments = dir.join("segments");
    std::fs::create_dir_all(&segments).unwrap();
    let (disk, _) = crate::io::choose(&segments, &[IoEngine::PositionalBuffered]).unwrap();
    let disk = FaultyDisk::new(disk);
    (Store::open_on(dir, settings, disk.clone()).unwrap(), disk)
}

fn once(kind: OpKind, first: u64, fault: Fault) -> [Plan; 1] {
    [Plan { kind, first, count: 1, fault }]
}

fn always(kind: OpKind, fault: Fault) -> [Plan; 1] {
    [Plan { kind, first: 0, count: u64::MAX, fault }]
}

/// Every acknowledgement comes after a successful flush of every write before it, abandoned files apart.
fn every_ack_is_flushed(trace: &[Trace]) -> Result<(), String> {
    let mut dirty: HashSet<FileId> = HashSet::new();
    let mut failed: HashSet<FileId> = HashSet::new();
    let mut flushed_since_ack = false;
    for (position, event) in trace.iter().enumerate() {
        match *event {
            // A seal is written beside the commits, and no acknowledgement rests on it.
            Trace::Done(OpKind::Write, _, SEAL_AT, true) => {}
            Trace::Done(OpKind::Write, file, _, true) if failed.contains(&file) => {
                return Err(format!("{position}: a write into a file after it failed"));
            }
            Trace::Done(OpKind::Write, file, _, true) => drop(dirty.insert(file)),
            Trace::Done(OpKind::Write | OpKind::Sync, file, _, false) => {
                dirty.remove(&file);
                failed.insert(file);
            }
            Trace::Done(OpKind::Sync, file, _, true) => flushed_since_ack |= dirty.remove(&file),
            Trace::Done(OpKind::Read, ..) => {}
            Trace::Acknowledged(number) => {
                if !dirty.is_empty() || !flushed_since_ack {
                    return Err(format!("put {number} was acknowledged without a flush"));
                }
                flushed_since_ack = false;
            }
        }
    }
    Ok(())
}

fn put_and_trace(
    store: &Store,
    disk: &FaultyDisk,
    numbers: std::ops::Range<u64>,
) -> Vec<Result<PutOutcome, StoreError>> {
    numbers
        .map(|number| {
            let outcome = store.put(vec![object(number, number, &LENS)]).remove(0);
            if outcome.is_ok() {
                disk.note(Trace::Acknowledged(number));
            }
            outcome
        })
        .collect()
}

#[test]
fn no_put_is_acknowledged_before_its_flush() {
    for skip_flush in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let sabotage = Sabotage { skip_flush, ..Sabotage::default() };
        let (store, disk) =
            open(dir.path(), StoreSettings { sabotage, segment_bytes: SEGMENT_BYTES, ..settings() });
        assert!(put_and_trace(&store, &disk, 0..20).iter().all(Result::is_ok));
        let verdict = every_ack_is_flushed(&disk.trace());
        // The control: without the flush the oracle must object.
        assert_eq!(verdict.is_err(), skip_flush, "{verdict:?}");
    }
}

fn every_acknowledged_is_served(store: &Store, outcomes: &[Result<PutOutcome, StoreError>]) {
    for (number, _) in outcomes.iter().enumerate().filter(|(_, outcome)| outcome.is_ok()) {
        let put = object(number as u64, number as u64, &LENS);
        let found = store.lookup(&[put.id]);
        assert_eq!(fetch(store, all(found)), [Ok(planes(&put))]);
    }
}

/// Fails the n-th write or flush, for every n until none is left to fail.
#[test]
fn any_one_failed_write_or_flush_loses_nothing_that_was_acknowledged() {
    let faults = [
        (OpKind::Sync, Fault::Errno(libc::EIO)),
        (OpKind::Write, Fault::Errno(libc::EIO)),
        (OpKind::Write, Fault::Short(512)),
        (OpKind::Write, Fault::Short(0)),
    ];
    for (kind, fault) in faults {
        for number in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let small = StoreSettings { segment_bytes: SEGMENT_BYTES, ..settings() };
            let (store, disk) = open(dir.path(), small.clone());
            disk.arm(&once(kind, number, fault));
            let outcomes = put_and_trace(&store, &disk, 0..12);
            let met = disk.seen(kind) > number;
            every_ack_is_flushed(&disk.trace()).unwrap();
            let refused = outcomes.iter().filter(|outcome| outcome.is_err()).count();
            // A batch is written again elsewhere; only a segment that could not be made refuses its put.
            assert!(refused <= 1, "{kind:?} {number}: {outcomes:?}");
            every_acknowledged_is_served(&store, &outcomes);
            // As after a kill: the files as they are, without a clean close.
            let copy = tempfile::tempdir().unwrap();
            super::copy_dir(dir.path(), copy.path());
            every_acknowledged_is_served(&Store::open(copy.path(), small).unwrap(), &outcomes);
            if !met {
                break;
            }
            assert!(number < 100, "no end");
        }
    }
}

#[test]
fn a_segment_whose_flush_failed_is_abandoned_and_after_three_writes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = open(dir.path(), settings());
    assert!(store.put(chain(0, 3, &LENS)).iter().all(Result::is_ok));
    // One failure: the put goes elsewhere.
    disk.arm(&once(OpKind::Sync, 0, Fault::Errno(libc::EIO)));
    assert_eq!(*store.put(vec![object(10, 10, &LENS)])[0].as_ref().unwrap(), PutOutcome::Stored);
    assert_eq!(super::entry(&store, id(10)).spot.segment.0, 2);
    assert_eq!(store.stats().suspect_segments, 1);
    // Two more: the device is not trusted any longer, even though it would work again.
    disk.arm(&always(OpKind::Sync, Fault::Errno(libc::EIO)));
    let outcome = store.put(vec![object(11, 11, &LENS)]).remove(0);
    assert!(matches!(outcome, Err(StoreError::WritesRefused { failures: 3 })), "{outcome:?}");
    disk.arm(&[]);
    let error = store.put(vec![object(12, 12, &LENS)]).remove(0).unwrap_err();
    assert_eq!(error.to_string(), "writes are refused after 3 failed writes or flushes; reads go on");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let found = store.lookup(&[id(0), id(1), id(2)]);
    assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
    assert!(store.lookup(&[id(11)]).is_empty());
    // After a restart writes are tried again; what a failed flush left behind is written again and flushed before it is taken in.
    drop((store, disk));
    let (store, disk) = open(dir.path(), settings());
    assert!(disk.trace().iter().any(|event| matches!(event, Trace::Done(OpKind::Sync, .., true))));
    assert_eq!(store.lookup(&[id(0), id(1), id(2)]).len(), 3);
    assert_eq!(fetch(&store, all(store.lookup(&[id(11)]))), [Ok(planes(&object(11, 11, &LENS)))]);
    assert!(store.put(vec![object(12, 12, &LENS)])[0].is_ok());
}

/// Its record is on the drive and holds as soon as the index is gone. What is put in between is not answered with what was there.
#[test]
fn an_erasure_that_failed_does_not_undo_what_is_put_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = open(dir.path(), settings());
    assert!(store.put(chain(0, 2, &LENS)).iter().all(Result::is_ok));
    disk.arm(&always(OpKind::Sync, Fault::Errno(libc::EIO)));
    assert!(store.erase(Erase::Object(id(1))).is_err());
    disk.arm(&[]);
    assert_eq!(store.lookup(&[id(0), id(1)]).len(), 1);
    drop((store, disk));
    let (store, disk) = open(dir.path(), settings());
    let outcome = store.put(chain(0, 2, &LENS));
    assert!(matches!(outcome[..], [Ok(PutOutcome::Present), Ok(PutOutcome::Stored)]), "{outcome:?}");
    drop((store, disk));
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let (store, _disk) = open(dir.path(), settings());
    assert_eq!(store.lookup(&[id(0), id(1)]).len(), 2);
}

#[test]
fn a_full_disk_refuses_puts_and_serves_reads_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = open(dir.path(), settings());
    assert!(store.put(chain(0, 3, &LENS)).iter().all(Result::is_ok));
    let _pins = store.pin(&[id(2)]);
    disk.fail_create(Some(libc::ENOSPC));
    // What fits in the open segment still goes in.
    let outcomes = store.put((10..20).map(|number| object(number, number, &[200_000])).collect());
    let stored = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!((1..10).contains(&stored), "{stored}");
    for outcome in &outcomes[stored..] {
        assert_eq!(outcome.as_ref().unwrap_err().kind(), ErrorKind::Full, "{outcome:?}");
    }
    let found = store.lookup(&[id(0), id(1), id(2)]);
    assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
    assert_eq!(store.stats().suspect_segments, 0);
    disk.fail_create(None);
    assert!(store.put(vec![object(19, 19, &[200_000])])[0].is_ok());
    // A file system without preallocation runs full on the write.
    disk.arm(&always(OpKind::Write, Fault::Errno(libc::ENOSPC)));
    for _ in 0..5 {
        let error = store.put(vec![object(30, 30, &LENS)]).remove(0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    }
    disk.arm(&[]);
    assert!(store.put(vec![object(30, 30, &LENS)])[0].is_ok());
}

#[test]
fn a_store_keeps_to_its_capacity() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreSettings { capacity_bytes: 2 << 20, ..settings() }).unwrap();
    // Of what is never evicted.
    let permanent = |number| object(number, number, &[300_000]).with_class(TtlClass::PERMANENT);
    let outcomes = store.put((0..12).map(permanent).collect());
    let stored = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(stored, 6);
    let error = outcomes[6].as_ref().unwrap_err();
    assert_eq!(
        error.to_string(),
        "store is full: no space for another segment: 2097152 of 2097152 bytes are in segments"
    );
    assert_eq!(store.stats().segment_bytes, 2 << 20);
}

#[test]
fn a_read_that_fails_once_is_repeated_and_one_that_keeps_failing_is_a_miss() {
    let faults = [
        (Fault::Errno(libc::EIO), MissKind::ReadError),
        (Fault::Short(512), MissKind::Truncated),
        (Fault::FlipBit(8 * 400), MissKind::Digest),
        (Fault::FlipBit(8 * 100), MissKind::HeaderChecksum),
    ];
    for (fault, kind) in faults {
        let dir = tempfile::tempdir().unwrap();
        let (store, disk) = open(dir.path(), settings());
        let put = object(1, 1, &LENS);
        assert!(store.put(vec![put.clone()])[0].is_ok());
        let found = store.lookup(&[id(1)]);
        disk.arm(&once(OpKind::Read, 0, fault));
        assert_eq!(fetch(&store, all(found.clone())), [Ok(planes(&put))], "{fault:?}");
        assert_eq!(disk.seen(OpKind::Read), 2);
        disk.arm(&always(OpKind::Read, fault));
        assert_eq!(fetch(&store, all(found)), [Err(kind)]);
        assert_eq!(disk.seen(OpKind::Read), 2, "no retry storm");
        assert_eq!(store.stats().misses.get(kind), 1);
        assert!(store.lookup(&[id(1)]).is_empty());
    }
}

/// Random faults under fetches in both orders: right bytes or one miss, nothing after it, and no end without one.
#[test]
fn fetches_on_a_failing_disk_never_give_wrong_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let merging = StoreSettings { read_merge_bytes: 64 << 10, fetch_window_bytes: 256 << 10, ..settings() };
    let (store, disk) = open(dir.path(), merging);
    let objects = chain(0, 30, &[300, 20_000, 70_000, 9000]);
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    let faults = [
        Fault::Errno(libc::EIO),
        Fault::Short(4096),
        Fault::FlipBit(12_345),
        Fault::FlipBit(999_999),
        Fault::Misdirected(4096),
    ];
    let mut misses = 0;
    for round in 0..200_u64 {
        disk.arm(&[]);
        assert!(store.put(objects.clone()).iter().all(Result::is_ok), "whole again");
        let found = store.lookup(&ids);
        let fault = faults[(round % 5) as usize];
        // Every third read or so, so that some of the repeated ones fail as well.
        let bad = (0..500_u64).filter(|read| (read * 2_654_435_761 + round * 40_503) % 1000 < 330);
        disk.arm(&bad.flat_map(|first| once(OpKind::Read, first, fault)).collect::<Vec<_>>());
        let order = if round % 2 == 0 { FetchOrder::ByObject } else { FetchOrder::ByPlane };
        let mut seen = vec![(0, false); objects.len()];
        for event in store.fetch(FetchRequest { order, ..all(found) }) {
            match event {
                FetchEvent::Plane { object, plane, bytes, .. } => {
                    assert!(!seen[object].1, "nothing follows a miss");
                    assert_eq!((plane, &bytes), (seen[object].0, &objects[object].planes[plane].bytes));
                    seen[object].0 += 1;
                }
                FetchEvent::Miss { object, .. } => {
                    assert!(!std::mem::replace(&mut seen[object].1, true), "one miss for an object");
                    misses += 1;
                }
            }
        }
        assert!(seen.iter().all(|&(planes, missed)| missed || planes == 4), "{fault:?}");
        assert_eq!(store.shared.reading.used_bytes(), 0);
    }
    assert!(misses > 0, "the faults were met");
}

/// Fails the n-th read and the one after it while the index is built anew, for every n.
#[test]
fn reads_that_fail_during_recovery_lose_nothing_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let small = StoreSettings { segment_bytes: 128 << 10, ..settings() };
    let (store, disk) = open(dir.path(), small.clone());
    let objects = chain(0, 12, &[20_000, 3000]);
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    drop((store, disk));
    for number in 0.. {
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        let (disk, _) =
            crate::io::choose(&dir.path().join("segments"), &[IoEngine::PositionalBuffered]).unwrap();
        let disk = FaultyDisk::new(disk);
        disk.arm(&[Plan { kind: OpKind::Read, first: number, count: 2, fault: Fault::Errno(libc::EIO) }]);
        let store = Store::open_on(dir.path(), small.clone(), disk.clone()).unwrap();
        let met = disk.seen(OpKind::Read) > number;
        disk.arm(&[]);
        let found: Vec<_> = store.get(&ids).into_iter().flatten().collect();
        assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
        drop((store, disk));
        let (store, _disk) = open(dir.path(), small.clone());
        assert_eq!(store.lookup(&ids).len(), 12, "read {number}");
        if !met {
            break;
        }
    }
}

/// Fails the n-th read and the one after it at an opening, for every n: the record of a lease is read again.
#[test]
fn a_lease_whose_record_cannot_be_read_at_an_opening_holds_once_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = open(dir.path(), settings());
    assert!(store.put(chain(0, 3, &LENS)).iter().all(Result::is_ok));
    let lease = store.lease(LeaseId([1; 32]), &[id(2)], Duration::from_secs(3600)).unwrap();
    drop((store, disk));
    let mut late = 0;
    for number in 0.. {
        let (disk, _) =
            crate::io::choose(&dir.path().join("segments"), &[IoEngine::PositionalBuffered]).unwrap();
        let disk = FaultyDisk::new(disk);
        disk.arm(&[Plan { kind: OpKind::Read, first: number, count: 2, fault: Fault::Errno(libc::EIO) }]);
        let store = Store::open_on(dir.path(), settings(), disk.clone()).unwrap();
        let met = disk.seen(OpKind::Read) > number;
        late += usize::from(store.leases().is_empty());
        disk.arm(&[]);
        store.keep_house();
        assert_eq!(store.leases(), std::slice::from_ref(&lease), "read {number}");
        if !met {
            break;
        }
    }
    assert!(late > 0, "the record was read each time");
}

#[test]
fn writes_that_the_disk_lost_or_put_elsewhere_are_misses() {
    for fault in [Fault::Lost, Fault::Misdirected(8192), Fault::FlipBit(8 * 1000)] {
        let dir = tempfile::tempdir().unwrap();
        let (store, disk) = open(dir.path(), settings());
        assert!(store.put(vec![object(0, 0, &LENS)])[0].is_ok());
        disk.arm(&once(OpKind::Write, 0, fault));
        assert!(store.put(vec![object(1, 1, &LENS)])[0].is_ok(), "the disk said so");
        assert!(store.put(vec![object(2, 2, &LENS)])[0].is_ok());
        let found = store.lookup(&[id(0), id(1), id(2)]);
        let got = fetch(&store, all(found));
        assert_eq!(got[0], Ok(planes(&object(0, 0, &LENS))));
        assert!(got[1].is_err(), "{fault:?}");
        assert_eq!(got[2], Ok(planes(&object(2, 2, &LENS))), "{fault:?}");
    }
}

/// A parent that was judged to be there stays until its child is stored, whether it is stored itself by then or not.
#[test]
fn a_child_that_is_acknowledged_has_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = open(dir.path(), settings());
    let waits = |count| {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while disk.waiting() < count {
            assert!(std::time::Instant::now() < until, "no flush");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let evict = || store.shared.table.evict(u64::MAX, store.now_s()).len();
    let objects = chain(0, 4, &LENS);
    assert!(store.put(objects[..1].to_vec())[0].is_ok());
    disk.hold(Some(OpKind::Sync));
    // Behind one that is stored, then each behind one that is still being flushed.
    let mut submitted = Vec::new();
    for object in &objects[1..] {
        let writes = disk.seen(OpKind::Write);
        submitted.push(store.submit(vec![object.clone()]));
        while disk.seen(OpKind::Write) == writes {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // The second flush is of the last two.
    let went = [(); 2].map(|()| {
        waits(1);
        let evicted = evict();
        disk.let_go();
        evicted
    });
    disk.hold(None);
    assert_eq!(went, [0, 0]);
    for outcome in submitted.into_iter().flat_map(crate::Submitted::wait) {
        assert_eq!(outcome.unwrap(), PutOutcome::Stored);
    }
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    assert_eq!(store.lookup(&ids).len(), 4);
    // Nothing is held for long.
    let mut evicted = 0;
    while evicted < 4 {
        evicted += evict();
    }
}

/// Whatever failed of a segment: what it holds goes when its time is over, and the segment with it.
#[test]
fn what_a_failed_segment_holds_expires_like_the_rest() {
    let failing = [
        // The flush of a record behind the first one.
        (OpKind::Sync, 0, 1, 10_000),
        // Where the second does not fit behind it: two headers, the record, the seal of the first segment; and the seal's flush.
        (OpKind::Write, 3, 0, 30_000),
        (OpKind::Sync, 1, 0, 30_000),
    ];
    for (kind, first, suspects, len) in failing {
        let dir = tempfile::tempdir().unwrap();
        let clock = super::common::ManualClock::new();
        let segments = dir.path().join("segments");
        std::fs::create_dir_all(&segments).unwrap();
        let (disk, _) = crate::io::choose(&segments, &[IoEngine::PositionalBuffered]).unwrap();
        let disk = FaultyDisk::new(disk);
        let small = StoreSettings { segment_bytes: SEGMENT_BYTES, ..settings() };
        let store = Store::open_on_at(dir.path(), small, disk.clone(), clock.clone()).unwrap();
        let short = |number, len| object(number, number, &[len]).with_class(TtlClass(0));
        assert!(store.put(vec![short(0, 30_000)])[0].is_ok());
        disk.arm(&once(kind, first, Fault::Errno(libc::EIO)));
        assert!(store.put(vec![short(1, len)])[0].is_ok());
        // Seals are written beside.
        store.keep_house();
        assert!(disk.seen(kind) > first, "{kind:?} {first} was not met");
        assert!(store.put(vec![object(2, 2, &LENS).with_class(TtlClass(3))])[0].is_ok());
        assert_eq!(store.stats().suspect_segments, suspects);
        assert_eq!(store.get(&[id(0), id(1), id(2)]).iter().flatten().count(), 3);
        // Half of its time closes the last one.
        for _ in 0..4 {
            clock.pass(Duration::from_secs(200));
            store.keep_house();
        }
        assert_eq!(store.get(&[id(0), id(1), id(2)]).iter().flatten().count(), 1, "{kind:?} {first}");
        assert_eq!(store.stats().segments, 1, "{kind:?} {first}");
    }
}

/// A store full of what is leased has room for another segment of its own: it goes on to lease and erase.
#[test]
fn a_store_full_of_leases_leases_and_erases() {
    const SEGMENT: u64 = 9 << 20;
    // In memory: thousands of flushes.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let full = StoreSettings {
        segment_bytes: SEGMENT,
        capacity_bytes: 4 * SEGMENT,
        leased_bytes: Some(u64::MAX),
        admission: false,
        zstd_level: None,
        ..settings()
    };
    let disk = crate::io::sim::SimDisk::open(crate::io::sim::Image::default(), u64::MAX);
    let store = Store::open_on(dir.path(), full, disk).unwrap();
    let mut leased: Vec<u64> = Vec::new();
    for number in 0..100 {
        if matches!(store.put(vec![object(number, number, &[900_000])])[0], Ok(PutOutcome::Stored))
            && store.lease(LeaseId([number as u8; 32]), &[id(number)], Duration::from_secs(3600)).is_ok()
        {
            leased.push(number);
        }
    }
    let stored = leased.len() as u64;
    assert!((18..40).contains(&stored), "{stored} fit");
    // More than one segment of the store's own has room for, all of them live.
    const LEASES: u64 = 3000;
    const { assert!(LEASES * 4096 > 8 << 20) };
    for number in 0..LEASES {
        let mut name = [0xee; 32];
        name[..8].copy_from_slice(&number.to_le_bytes());
        let object = id(leased[number as usize % leased.len()]);
        let more = store.lease(LeaseId(name), &[object], Duration::from_secs(3600));
        more.unwrap_or_else(|error| panic!("lease {number}: {error}"));
    }
    for number in leased {
        assert_eq!(store.erase(Erase::Object(id(number))).unwrap(), 1);
    }
}

#[test]
fn leases_leave_a_fifth_of_the_capacity_unless_they_are_told_otherwise() {
    const CAPACITY_BYTES: u64 = 10 << 20;
    let dir = tempfile::tempdir().unwrap();
    // Three of these objects fill a segment.
    let small = StoreSettings { capacity_bytes: CAPACITY_BYTES, segment_bytes: 256 << 10, ..settings() };
    let (store, _disk) = open(dir.path(), small);
    let lease = |number: u8| {
        assert!(store.put(vec![object(number.into(), number.into(), &[79_000])])[0].is_ok());
        store.lease(LeaseId([number; 32]), &[id(number.into())], Duration::from_secs(60))
    };
    let granted = (1..=200).map(lease).take_while(Result::is_ok).count() as u64;
    assert_eq!(granted, CAPACITY_BYTES / 5 * 4 / store.path_bytes(&[id(1)]));
    assert_eq!(lease(201).unwrap_err().kind(), ErrorKind::Full);
}

/// Where parts of a file cannot be given back, evicting records makes no room: segments go as a whole.
#[test]
fn a_full_store_on_a_file_system_without_holes_stays_full() {
    let dir = tempfile::tempdir().unwrap();
    let capacity_bytes = 16 * SEGMENT_BYTES;
    let small = StoreSettings {
        segment_bytes: SEGMENT_BYTES,
        capacity_bytes,
        admission: false,
        zstd_level: None,
        ..settings()
    };
    let (store, disk) = open(dir.path(), small);
    disk.refuse_holes();
    let kept = chain(0, 5, &[10_000]);
    assert!(store.put(kept.clone()).iter().all(Result::is_ok));
    store.lease(LeaseId([1; 32]), &[id(4)], Duration::from_secs(3600)).unwrap();
    for prefix in 1..60 {
        let outcomes = store.put(chain(prefix * 100, 5, &[10_000]));
        assert!(
            outcomes.iter().all(|outcome| matches!(outcome, Ok(PutOutcome::Stored))),
            "{prefix}: {outcomes:?}"
        );
        // The next segment is made ahead: what goes for it has gone when this returns.
        store.keep_house();
        // What is left of a path is its beginning.
        for earlier in 0..=prefix {
            let ids: Vec<_> = (earlier * 100..earlier * 100 + 5).map(id).collect();
            let there = store.get(&ids).iter().flatten().count();
            assert_eq!(store.lookup(&ids).len(), there, "prefix {earlier} after {prefix}");
            assert!(earlier > 0 || there == 5, "what is leased went");
        }
        let stats = store.stats();
        assert!(stats.segment_bytes <= capacity_bytes);
        assert!(prefix < 16 || stats.live_bytes > capacity_bytes / 2, "{} bytes are left", stats.live_bytes);
    }
    drop((store, disk));
    // The same in the next life.
    let (store, disk) = open(
        dir.path(),
        StoreSettings { capacity_bytes, admission: false, segment_bytes: SEGMENT_BYTES, ..settings() },
    );
    disk.refuse_holes();
    assert!(store.put(chain(9000, 5, &[10_000])).iter().all(Result::is_ok));
    assert!(store.stats().live_bytes > capacity_bytes / 2);
}

/// Others have filled the disk: what is worth least goes for what comes, and not more than that if nothing comes of it.
#[test]
fn a_disk_that_others_have_filled_costs_what_is_worth_least() {
    let dir = tempfile::tempdir().unwrap();
    let disk = crate::io::sim::SimDisk::open(crate::io::sim::Image::default(), u64::MAX);
    let small = StoreSettings { segment_bytes: SEGMENT_BYTES, zstd_level: None, ..settings() };
    let store = Store::open_on(dir.path(), small, disk.clone()).unwrap();
    let objects = |first| (first..first + 6).map(|number| object(number, number, &[25_000])).collect();
    for first in (0..600).step_by(100) {
        assert!(store.put(objects(first)).iter().all(Result::is_ok));
    }
    let stored = |store: &Store| store.stats().objects;
    let before = stored(&store);
    disk.arm(&[]);
    disk.fail_creates(0..1, libc::ENOSPC);
    assert!(store.put(objects(1000)).iter().all(Result::is_ok));
    assert!(disk.creates() > 1, "it was tried again");
    let evicted = store.stats().evicted;
    assert!(evicted > 0, "nothing was evicted");
    // No room comes of it, however often it is tried: it is not tried often.
    assert!(store.put(objects(1100)).iter().all(Result::is_ok));
    let _pins = store.pin(&(1000..1106).map(id).collect::<Vec<_>>());
    disk.arm(&[]);
    disk.fail_creates(0..u64::MAX, libc::ENOSPC);
    for first in (2000..3000).step_by(100) {
        let _ = store.put(objects(first));
    }
    assert!(store.stats().evicted - evicted <= before, "more went than for one try");
}

/// A device that fails one read and hangs on the next.
#[test]
fn a_repeated_read_keeps_to_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = open(dir.path(), settings());
    let put = object(1, 1, &LENS);
    assert!(store.put(vec![put.clone()])[0].is_ok());
    let found = store.lookup(&[id(1)]);
    disk.arm(&once(OpKind::Read, 0, Fault::Errno(libc::EIO)));
    disk.hold(Some(OpKind::Read));
    let (started, over) = (std::time::Instant::now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while disk.waiting() == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            disk.let_go();
            while !over.load(Ordering::Relaxed) && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(1));
            }
            disk.hold(None);
            disk.let_go();
        });
        let deadline = Some(started + Duration::from_millis(500));
        let got = fetch(&store, FetchRequest { deadline, ..all(found.clone()) });
        let waiting = disk.waiting();
        over.store(true, Ordering::Relaxed);
        assert_eq!(got, [Err(MissKind::Deadline)]);
        assert_eq!(waiting, 1, "it was not read again");
    });
    assert_eq!(fetch(&store, all(found)), [Ok(planes(&put))], "it stays stored");
}

/// What is forgotten for a failed read is erased like the rest: it does not come back when the device turns out to be at fault.
#[test]
fn what_was_forgotten_for_a_failed_read_can_be_erased() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _disk) = open(dir.path(), settings());
    assert!(store.put(chain(0, 2, &LENS)).iter().all(Result::is_ok));
    let entry = super::entry(&store, id(1));
    let located = store.shared.table.get(id(1)).unwrap();
    store.shared.quarantine(id(1), &located, MissKind::ReadError);
    assert!(store.lookup(&[id(0), id(1)]).len() == 1 && store.shared.breaker.suspects().len() == 1);
    assert_eq!(store.erase(Erase::Object(id(1))).unwrap(), 1);
    assert_eq!(store.shared.index.get(entry.spot).unwrap(), None);
    assert!(store.shared.breaker.suspects().is_empty());
    // What was not erased comes back as before.
    let located = store.shared.table.get(id(0)).unwrap();
    store.shared.quarantine(id(0), &located, MissKind::ReadError);
    assert_eq!(store.erase(Erase::Object(id(7))).unwrap(), 0);
    assert_eq!(store.shared.breaker.suspects().len(), 1);
}

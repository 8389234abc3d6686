//! Erasures that lapse: when they do, and what makes them stay.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use esker_prefix::ObjectId;

use super::common::{ManualClock, all, fetch, id, object, planes};
use super::{buffered, entry, segment_path};
use crate::io::faulty::{Fault, Plan};
use crate::io::sim::{Image, SimDisk};
use crate::io::{OpKind, PAGE};
use crate::segment::{PageKind, SegmentId, SegmentPage};
use crate::{Erase, PutObject, Store, StoreSettings, TtlClass};

/// Longer than half of what the longest class lives, and than all of what the shortest does.
const DAYS: Duration = Duration::from_secs(40 * 3600);
const LENS: [usize; 1] = [700];

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn open(dir: &Path, clock: &Arc<ManualClock>) -> Store {
    Store::open_at(dir, buffered(), clock.clone()).unwrap()
}

fn short_lived(number: u64) -> PutObject {
    object(number, number, &LENS).with_class(TtlClass(0))
}

fn permanent(number: u64) -> PutObject {
    object(number, number, &LENS).with_class(TtlClass::PERMANENT)
}

fn put(store: &Store, objects: Vec<PutObject>) {
    assert!(store.put(objects).iter().all(Result::is_ok));
}

fn is_there(store: &Store, put: &PutObject) -> bool {
    let found = store.lookup(&[put.id]);
    !found.is_empty() && fetch(store, all(found))[0].as_ref().is_ok_and(|bytes| *bytes == planes(put))
}

fn entries(store: &Store) -> usize {
    store.shared.index.entries().count()
}

/// Keeps house until no erasure is left, or as often as any of these tests needs. How many are left.
fn settle(store: &Store) -> u64 {
    for _ in 0..64 {
        store.keep_house();
        if store.stats().erasures == 0 {
            break;
        }
    }
    store.stats().erasures
}

#[test]
fn ten_thousand_erasures_leave_neither_disk_nor_memory_nor_work_at_the_opening() {
    const OBJECTS: u64 = 10_000;
    let (dir, clock) = (scratch(), ManualClock::new());
    let store = open(dir.path(), &clock);
    // What is never erased lies among the erasures, as a layout does.
    let kept: Vec<PutObject> = (0..3).map(|number| permanent(1_000_000 + number)).collect();
    put(&store, kept[..1].to_vec());
    let (fresh_bytes, fresh_table_bytes) = (store.stats().segment_bytes, store.stats().table_bytes);
    for first in (0..OBJECTS).step_by(500) {
        put(&store, (first..first + 500).map(short_lived).collect());
    }
    for number in 0..OBJECTS {
        assert_eq!(store.erase(Erase::Object(id(number))).unwrap(), 1);
        if number == OBJECTS / 2 {
            put(&store, kept[1..].to_vec());
        }
    }
    assert_eq!(store.stats().erasures, OBJECTS);
    clock.pass(DAYS);
    assert_eq!(settle(&store), 0);
    let stats = store.stats();
    assert_eq!((stats.erasures_lapsed, stats.objects, stats.live_bytes), (OBJECTS, 3, 3 * 4096));
    // Two pages of its own for each segment that something stays in.
    assert!(stats.segments <= 3, "{} segments", stats.segments);
    assert!(stats.segment_bytes <= fresh_bytes, "{} bytes, {fresh_bytes} at first", stats.segment_bytes);
    assert_eq!(entries(&store), 3);
    // With its index and without: nothing is back, and nothing else is gone.
    store.close().unwrap();
    for lost in [false, true] {
        if lost {
            fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        let store = open(dir.path(), &clock);
        assert_eq!(entries(&store), 3, "index lost: {lost}");
        assert!(store.stats().table_bytes <= fresh_table_bytes);
        assert!(store.lookup(&(0..OBJECTS).map(id).collect::<Vec<ObjectId>>()).is_empty());
        assert!(kept.iter().all(|put| is_there(&store, put)));
        store.close().unwrap();
    }
}

/// A segment in use for ever does not keep erasures: what was erased of it is gone for good all the same.
#[test]
fn an_erasure_lapses_while_an_older_segment_stays_in_use() {
    let (dir, clock) = (scratch(), ManualClock::new());
    let store = open(dir.path(), &clock);
    let (hot, erased) = (permanent(1), permanent(2));
    put(&store, vec![hot.clone(), erased.clone()]);
    store.erase(Erase::Object(erased.id)).unwrap();
    assert_eq!(settle(&store), 1, "its own segment is open, and holds what it means");
    clock.pass(DAYS);
    assert_eq!(settle(&store), 0);
    assert!(is_there(&store, &hot));
    assert_eq!(store.stats().segments, 1);
    // An erasure of what is put again is a new one.
    put(&store, vec![erased.clone()]);
    assert!(is_there(&store, &erased));
    store.erase(Erase::Object(erased.id)).unwrap();
    drop(store);
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = open(dir.path(), &clock);
    assert!(is_there(&store, &hot) && !is_there(&store, &erased));
}

#[test]
fn an_erasure_stays_while_there_is_a_file_that_nobody_can_read() {
    let (dir, clock) = (scratch(), ManualClock::new());
    let garbage = segment_path(dir.path(), 77);
    let store = open(dir.path(), &clock);
    put(&store, vec![short_lived(1), short_lived(2)]);
    store.close().unwrap();
    fs::write(&garbage, vec![0x5a; 64 << 10]).unwrap();
    let store = open(dir.path(), &clock);
    assert_eq!(store.open_report().unreadable_segments.len(), 1);
    store.erase(Erase::Object(id(1))).unwrap();
    clock.pass(DAYS);
    assert_eq!(settle(&store), 1);
    store.close().unwrap();
    fs::remove_file(&garbage).unwrap();
    let store = open(dir.path(), &clock);
    clock.pass(DAYS);
    assert_eq!(settle(&store), 0);
}

/// What is forgotten for a failed read is passed over by an erasure, and found again at the next opening.
#[test]
fn an_erasure_stays_until_what_was_forgotten_for_a_failed_read_is_gone() {
    let (dir, clock) = (scratch(), ManualClock::new());
    let store = open(dir.path(), &clock);
    let forgotten = permanent(1);
    put(&store, vec![forgotten.clone(), permanent(2)]);
    let spot = store.shared.table.get(forgotten.id).unwrap().spot;
    assert!(store.shared.table.remove_if(forgotten.id, spot));
    assert_eq!(store.erase(Erase::Object(forgotten.id)).unwrap(), 0);
    clock.pass(DAYS);
    assert_eq!(settle(&store), 1);
    drop(store);
    let store = open(dir.path(), &clock);
    assert!(!is_there(&store, &forgotten));
    clock.pass(DAYS);
    assert_eq!(settle(&store), 0);
    drop(store);
    assert!(!is_there(&open(dir.path(), &clock), &forgotten));
}

/// After a failed flush nobody knows what is gone for good; the next opening gives back and flushes again.
#[test]
fn an_erasure_stays_when_the_flush_of_a_sweep_fails() {
    let (dir, clock) = (scratch(), ManualClock::new());
    let disk = SimDisk::open(Image::default(), u64::MAX);
    let open = || {
        let settings = StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() };
        let settings = StoreSettings { segment_bytes: 64 << 10, ..settings };
        Store::open_on_at(dir.path(), settings, disk.clone(), clock.clone()).unwrap()
    };
    let store = open();
    put(&store, vec![permanent(1), permanent(2)]);
    store.erase(Erase::Object(id(1))).unwrap();
    clock.pass(DAYS);
    // The first flush is the seal's, the second the sweep's.
    disk.arm(&[Plan { kind: OpKind::Sync, first: 1, count: 1, fault: Fault::Errno(libc::EIO) }]);
    assert_eq!(settle(&store), 1);
    assert!(disk.seen(OpKind::Sync) >= 2, "no flush failed");
    drop(store);
    let store = open();
    assert_eq!(settle(&store), 0);
    assert!(is_there(&store, &permanent(2)) && !is_there(&store, &permanent(1)));
}

/// A segment that was begun and never written to, whose header outlived what was put before it.
#[test]
fn nothing_is_appended_that_is_earlier_than_the_header_says() {
    let (dir, clock) = (scratch(), ManualClock::new());
    let store = open(dir.path(), &clock);
    put(&store, vec![short_lived(1)]);
    store.close().unwrap();
    let (id, class, len_bytes) = (SegmentId(9), TtlClass(1), 1 << 20);
    let mut bytes = vec![0; len_bytes];
    let header = SegmentPage { id, class, generation: 5, extent_bytes: len_bytes as u64, sequence: 50 };
    header.encode(PageKind::Header, &mut bytes[..PAGE]);
    header.encode(PageKind::Header, &mut bytes[len_bytes - PAGE..]);
    fs::write(segment_path(dir.path(), 9), bytes).unwrap();
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = open(dir.path(), &clock);
    let later = object(2, 2, &LENS).with_class(class);
    put(&store, vec![later.clone()]);
    let entry = entry(&store, later.id);
    assert_eq!((entry.spot.segment, entry.sequence), (SegmentId(9), 50));
}

/// A sweep speaks for the erasures that were carried out when it began, and for no others.
#[test]
fn an_erasure_under_way_keeps_all_later_ones() {
    let (dir, clock) = (scratch(), ManualClock::new());
    let store = open(dir.path(), &clock);
    put(&store, vec![permanent(1), permanent(2), permanent(3)]);
    let begun = store.shared.lapses.begin();
    store.erase(Erase::Object(id(1))).unwrap();
    clock.pass(DAYS);
    assert_eq!(settle(&store), 1, "another one, which began before it, may have any sequence since");
    store.shared.lapses.done(begun);
    assert_eq!(settle(&store), 0);
}

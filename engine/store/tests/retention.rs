//! What goes, what stays, and what never comes back.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{ManualClock, all, chain, fetch, id, object, planes, settings};
use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, ScopeTag, WriterId};
use esker_store::{
    Change, Erase, ErrorKind, LeaseId, Observer, PutObject, PutOutcome, Removal, Store, StoreSettings,
    TtlClass,
};

const LENS: [usize; 2] = [30_000, 9000];
const HOUR: Duration = Duration::from_secs(3600);

fn ids(objects: &[PutObject]) -> Vec<ObjectId> {
    objects.iter().map(|object| object.id).collect()
}

/// Room for some thirty objects in eight segments.
fn small() -> StoreSettings {
    StoreSettings { segment_bytes: 256 << 10, capacity_bytes: 2 << 20, zstd_level: None, ..settings() }
}

/// What became of each object last.
#[derive(Default)]
struct Seen(Mutex<HashMap<ObjectId, Option<Removal>>>);

impl Observer for Seen {
    fn changed(&self, changes: Vec<Change>) {
        self.0.lock().unwrap().extend(changes.into_iter().map(|change| (change.id, change.removal)));
    }
}

fn drop_index(dir: &std::path::Path) {
    std::fs::remove_dir_all(dir.join("index")).unwrap();
}

#[test]
fn a_full_store_makes_room_from_the_ends_of_prefixes_and_stays_within_its_capacity() {
    let dir = tempfile::tempdir().unwrap();
    let settings = StoreSettings { admission: false, ..small() };
    let clock = ManualClock::new();
    let store = Store::open_at(dir.path(), settings.clone(), clock.clone()).unwrap();
    for prefix in 0..40 {
        clock.pass(Duration::from_secs(10));
        let objects = chain(prefix * 100, 10, &LENS);
        let outcomes = store.put(objects.clone());
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(PutOutcome::Stored))), "{outcomes:?}");
        // The newest is whole; of every older one what is left is a prefix.
        assert_eq!(store.lookup(&ids(&objects)).len(), 10);
        for earlier in 0..prefix {
            let objects = chain(earlier * 100, 10, &LENS);
            let present = store.get(&ids(&objects)).iter().filter(|found| found.is_some()).count();
            let found = store.lookup(&ids(&objects));
            assert_eq!(found.len(), present, "prefix {earlier} after {prefix} has a hole");
        }
        assert!(store.stats().segment_bytes <= settings.capacity_bytes + settings.segment_bytes);
    }
    let stats = store.stats();
    assert!(stats.evicted > 300 && stats.misses.total() == 0, "{stats:?}");
    // Nothing was moved: what was written is what was put, and headers.
    assert!(stats.written_bytes < 40 * 10 * 40_960 * 11 / 10, "{}", stats.written_bytes);
    for prefix in 0..40 {
        let objects = chain(prefix * 100, 10, &LENS);
        let found = store.lookup(&ids(&objects));
        for (got, put) in fetch(&store, all(found)).into_iter().zip(&objects) {
            assert_eq!(got, Ok(planes(put)));
        }
    }
    let before = stats.objects;
    store.close().unwrap();
    // On the device, too.
    let blocks = |entry: std::io::Result<std::fs::DirEntry>| {
        std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512
    };
    let taken: u64 = std::fs::read_dir(dir.path().join("segments")).unwrap().map(blocks).sum();
    assert!(taken <= settings.capacity_bytes + settings.segment_bytes, "{taken} bytes on the device");
    let store = Store::open_at(dir.path(), settings, clock).unwrap();
    assert_eq!(store.stats().objects, before);
}

#[test]
fn what_is_leased_stays_whatever_comes_and_a_store_full_of_leases_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let store = open();
    let kept = chain(0, 10, &LENS);
    assert!(store.put(kept.clone()).iter().all(Result::is_ok));
    let lease = store.lease(LeaseId([1; 32]), &[id(9)], HOUR).unwrap();
    assert_eq!(lease.bytes, 10 * 40_960);
    for prefix in 1..40 {
        clock.pass(Duration::from_secs(10));
        store.put(chain(prefix * 100, 10, &LENS));
        assert_eq!(store.lookup(&ids(&kept)).len(), 10, "after prefix {prefix}");
    }
    // It holds across a crash and the loss of the index, and ends when it should.
    drop(store);
    drop_index(dir.path());
    let store = open();
    assert_eq!(store.leases(), std::slice::from_ref(&lease));
    for prefix in 40..60 {
        store.put(chain(prefix * 100, 10, &LENS));
        assert_eq!(store.lookup(&ids(&kept)).len(), 10, "after prefix {prefix}");
    }
    clock.pass(HOUR);
    store.keep_house();
    assert_eq!(store.leases(), []);
    for prefix in 60..160 {
        clock.pass(Duration::from_secs(100));
        store.put(chain(prefix * 100, 10, &LENS));
    }
    assert!(store.lookup(&ids(&kept)).len() < 10, "nothing holds it any more");
    store.close().unwrap();
    assert_eq!(open().leases(), []);
}

#[test]
fn a_lease_is_refused_beyond_the_budget_and_for_what_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let settings = StoreSettings { leased_bytes: Some(6 * 40_960), ..small() };
    let store = Store::open_at(dir.path(), settings, ManualClock::new()).unwrap();
    assert!(store.put(chain(0, 10, &LENS)).iter().all(Result::is_ok));
    assert!(store.put(vec![object(50, 50, &LENS)])[0].is_ok());
    let refused = store.lease(LeaseId([1; 32]), &[id(6)], HOUR).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Full);
    assert_eq!(
        refused.to_string(),
        "a lease of 286720 bytes more does not fit: 0 of 245760 bytes are leased"
    );
    store.lease(LeaseId([1; 32]), &[id(5)], HOUR).unwrap();
    assert_eq!(store.lease(LeaseId([2; 32]), &[id(50)], HOUR).unwrap_err().kind(), ErrorKind::Full);
    // Renewing counts once, and moving it frees what it held.
    store.lease(LeaseId([1; 32]), &[id(5)], HOUR).unwrap();
    store.lease(LeaseId([1; 32]), &[id(2)], HOUR).unwrap();
    store.lease(LeaseId([2; 32]), &[id(50)], HOUR).unwrap();
    let missing = store.lease(LeaseId([3; 32]), &[id(0), id(77)], HOUR).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Invalid);
    assert!(missing.to_string().ends_with("is not stored, so it cannot be leased"), "{missing}");
    assert!(store.release(LeaseId([1; 32])).unwrap());
    assert!(!store.release(LeaseId([9; 32])).unwrap());
    assert_eq!(store.leases().len(), 1);
    assert_eq!(store.stats().leased_bytes, 40_960);
}

/// Many sessions begin with one prompt: it takes its room once.
#[test]
fn what_leases_share_counts_once_against_the_budget() {
    const RECORD_BYTES: u64 = 40_960;
    let dir = tempfile::tempdir().unwrap();
    let settings = StoreSettings { leased_bytes: Some(14 * RECORD_BYTES), ..small() };
    let open = || Store::open_at(dir.path(), settings.clone(), ManualClock::new()).unwrap();
    let store = open();
    assert!(store.put(chain(0, 10, &LENS)).iter().all(Result::is_ok));
    let turn = |number| PutObject { parent: Some(id(9)), tokens: 11 * 128, ..object(number, number, &LENS) };
    assert!(store.put((100..105).map(turn).collect()).iter().all(Result::is_ok));
    let lease = |store: &Store, session: u8, end| store.lease(LeaseId([session; 32]), &[id(end)], HOUR);
    for session in 0..4 {
        let granted = lease(&store, session, 100 + u64::from(session)).unwrap();
        assert_eq!(granted.bytes, 11 * RECORD_BYTES, "whoever pays for it pays for all of its path");
    }
    let leased_bytes = |store: &Store| store.stats().leased_bytes / RECORD_BYTES;
    assert_eq!(leased_bytes(&store), 14);
    let refused = lease(&store, 4, 104).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "a lease of 40960 bytes more does not fit: 573440 of 573440 bytes are leased"
    );
    assert_eq!(leased_bytes(&store), 14, "what is refused holds nothing");
    // Moved to another end, and one more on the same.
    lease(&store, 3, 104).unwrap();
    lease(&store, 4, 104).unwrap();
    assert_eq!(leased_bytes(&store), 14);
    // What is erased in between holds nothing, and what it hangs on until a restart; put again it is all there.
    assert_eq!(store.erase(Erase::Object(id(5))).unwrap(), 1);
    assert_eq!(leased_bytes(&store), 13);
    store.close().unwrap();
    let store = open();
    assert_eq!(leased_bytes(&store), 8, "what lies behind the gap");
    assert!(store.put(chain(0, 10, &LENS)).iter().all(Result::is_ok));
    assert_eq!(leased_bytes(&store), 14);
    for session in 0..4 {
        store.release(LeaseId([session; 32])).unwrap();
        assert_eq!(leased_bytes(&store), 13 - u64::from(session).min(2), "after {session}");
    }
    store.release(LeaseId([4; 32])).unwrap();
    assert_eq!(leased_bytes(&store), 0);
}

#[test]
fn clocks_that_jump_and_machines_that_reboot_neither_end_nor_stretch_a_lease() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let store = open();
    store.put(chain(0, 3, &LENS));
    store.lease(LeaseId([1; 32]), &[id(2)], HOUR).unwrap();
    for _ in 0..5 {
        clock.pass(HOUR / 10);
    }
    store.close().unwrap();
    // Down for a while, machine on.
    clock.pass(HOUR / 10);
    let store = open();
    assert_eq!(store.leases()[0].deadline_s - store.now_s(), 3600 * 4 / 10);
    store.close().unwrap();
    clock.reboot();
    let store = open();
    assert_eq!(store.leases()[0].deadline_s - store.now_s(), 3600 * 4 / 10);
    clock.pass(HOUR * 4 / 10);
    assert_eq!(store.leases(), []);
}

#[test]
fn a_class_goes_when_its_time_is_over_unless_it_was_used_or_is_leased() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let settings = StoreSettings { capacity_bytes: u64::MAX, ..small() };
    let open = || Store::open_at(dir.path(), settings.clone(), clock.clone()).unwrap();
    let store = open();
    let class = |first, class| {
        let objects = chain(first, 30, &LENS);
        objects.into_iter().map(|object| object.with_class(TtlClass(class))).collect::<Vec<_>>()
    };
    let (minutes, hours) = (class(0, 0), class(100, 1));
    assert!(store.put(minutes.clone()).iter().chain(&store.put(hours.clone())).all(Result::is_ok));
    let segments = store.stats().segments;
    clock.pass(Duration::from_secs(299));
    store.keep_house();
    assert_eq!(store.lookup(&ids(&minutes)).len(), 30);
    // A use keeps all of its path, across a restart.
    let found = store.lookup(&ids(&minutes));
    fetch(&store, all(found));
    store.close().unwrap();
    let store = open();
    clock.pass(Duration::from_secs(299));
    store.keep_house();
    assert_eq!(store.lookup(&ids(&minutes)).len(), 30);
    store.lease(LeaseId([1; 32]), &[id(29)], HOUR / 2).unwrap();
    clock.pass(Duration::from_secs(600));
    store.keep_house();
    assert_eq!(store.lookup(&ids(&minutes)).len(), 30, "leased");
    assert!(store.release(LeaseId([1; 32])).unwrap());
    store.keep_house();
    assert_eq!(store.lookup(&ids(&minutes)).len(), 0);
    assert_eq!(store.lookup(&ids(&hours)).len(), 30);
    assert!(store.stats().segments < segments);
    assert_eq!(store.stats().expired, 30);
    assert!(store.put(class(200, 0)).iter().all(Result::is_ok));
    clock.pass(HOUR);
    store.keep_house();
    assert_eq!(store.stats().expired, 90);
    // What is left is the store's own.
    assert_eq!(store.stats().segments, 1);
}

/// A chat of a short class behind a prompt of a long one, whose segment is newer: entries are read by place, children first.
#[test]
fn a_path_is_whole_after_a_restart_wherever_its_blocks_lie() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let settings = StoreSettings { admission: false, ..small() };
    let open = || Store::open_at(dir.path(), settings.clone(), clock.clone()).unwrap();
    let mut store = open();
    assert!(store.put(vec![object(1000, 1, &LENS).with_class(TtlClass(1))])[0].is_ok());
    let class = |(number, object): (usize, PutObject)| {
        object.with_class(if number == 3 || number == 5 { TtlClass(1) } else { TtlClass(3) })
    };
    let objects: Vec<PutObject> = chain(0, 6, &LENS).into_iter().enumerate().map(class).collect();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    let lease = store.lease(LeaseId([1; 32]), &[id(5)], HOUR).unwrap();
    for round in 0..2 {
        drop(store);
        if round == 1 {
            drop_index(dir.path());
        }
        store = open();
        assert_eq!(store.path_bytes(&[id(5)]), lease.bytes);
        assert_eq!(store.leases(), std::slice::from_ref(&lease));
        for prefix in 1..20 {
            store.put(chain((round * 100 + prefix) * 100, 10, &LENS));
            assert_eq!(store.lookup(&ids(&objects)).len(), 6, "round {round}, after prefix {prefix}");
        }
        assert!(store.stats().evicted > 100);
    }
}

/// What comes back after a restart is what its children hang on, and holes that stood for it are gone with them.
#[test]
fn a_parent_that_is_put_again_after_a_restart_is_the_parent_of_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let objects = chain(0, 4, &LENS);
    let store = open();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    let bytes = store.path_bytes(&[id(3)]);
    store.erase(Erase::Object(id(1))).unwrap();
    drop(store);
    let store = open();
    assert_eq!((store.path_bytes(&[id(3)]), store.stats().objects), (bytes / 2, 4));
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    assert_eq!((store.path_bytes(&[id(3)]), store.stats().objects), (bytes, 5));
    store.erase(Erase::Object(id(1))).unwrap();
    drop(store);
    let store = open();
    for number in [3, 2, 0] {
        store.erase(Erase::Object(id(number))).unwrap();
    }
    assert_eq!(store.lookup(&ids(&objects)).len(), 0);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    assert_eq!(store.path_bytes(&[id(3)]), bytes);
}

/// Nobody makes such names by hashing; whoever makes them up must not make paths without an end.
#[test]
fn parents_that_name_each_other_are_no_path_without_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), small()).unwrap();
    let behind =
        |number, parent: Option<u64>| PutObject { parent: parent.map(id), ..object(number, 1, &LENS) };
    assert!(store.put(vec![behind(0, None), behind(1, Some(0))]).iter().all(Result::is_ok));
    store.erase(Erase::Object(id(0))).unwrap();
    assert!(store.put(vec![behind(0, Some(1))])[0].is_ok());
    for _ in 0..2 {
        drop(store.fetch(all(store.get(&[id(0), id(1)]).into_iter().flatten().collect())));
        let (first, second) = (store.path_bytes(&[id(0)]), store.path_bytes(&[id(1)]));
        assert!(first + second >= 3 * 40_960, "{first} {second}");
    }
    drop(store);
    let store = Store::open(dir.path(), small()).unwrap();
    let (first, second) = (store.path_bytes(&[id(0)]), store.path_bytes(&[id(1)]));
    assert_eq!(first + second, 3 * 40_960);
    // A record of its own makes the circle one that was stored as such.
    store.erase(Erase::Object(id(1))).unwrap();
    assert!(store.put(vec![behind(1, Some(0))])[0].is_ok());
    drop(store);
    drop_index(dir.path());
    let store = Store::open(dir.path(), small()).unwrap();
    let (first, second) = (store.path_bytes(&[id(0)]), store.path_bytes(&[id(1)]));
    assert_eq!(first + second, 3 * 40_960);
    assert!(store.lease(LeaseId([1; 32]), &[id(0), id(1)], HOUR).is_ok());
}

/// Segments are begun and sealed all the time, several in each interval between two rounds of housekeeping.
#[test]
fn what_is_over_goes_while_others_are_written_without_a_pause() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = StoreSettings { capacity_bytes: u64::MAX, ..small() };
    settings.ttl_classes[0] = Duration::from_secs(1);
    let store = Store::open(dir.path(), settings).unwrap();
    let class = |first, class| -> Vec<_> {
        chain(first, 10, &LENS).into_iter().map(|object| object.with_class(TtlClass(class))).collect()
    };
    let (short, long) = (class(0, 0), class(100, 1));
    assert!(store.put(short.clone()).iter().chain(&store.put(long.clone())).all(Result::is_ok));
    let started = Instant::now();
    let mut written = 0;
    while !store.lookup(&ids(&short)).is_empty() {
        assert!(started.elapsed() < Duration::from_secs(20), "still there, {written} segments later");
        assert!(store.put(class(200 + written * 10, 1)).iter().all(Result::is_ok));
        written += 1;
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(written > 5, "it went before its time");
    assert_eq!(store.lookup(&ids(&long)).len(), 10, "its time is not over");
}

/// A class that is written now and then, never enough to fill a segment.
#[test]
fn what_comes_later_does_not_keep_what_came_first() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let settings = StoreSettings { segment_bytes: 64 << 20, capacity_bytes: u64::MAX, ..small() };
    let store = Store::open_at(dir.path(), settings, clock.clone()).unwrap();
    let at = |minute: u64| object(1000 + minute, 0, &LENS).with_class(TtlClass(0));
    let mut most = 0;
    for minute in 0..60 {
        assert!(store.put(vec![at(minute)])[0].is_ok());
        clock.pass(Duration::from_secs(60));
        store.keep_house();
        // Five minutes, half of them again, and the minute between two looks.
        let kept: Vec<u64> =
            (0..=minute).filter(|&minute| store.get(&[at(minute).id])[0].is_some()).collect();
        assert!(kept.iter().all(|kept| minute - kept <= 9), "{kept:?} after {minute} minutes");
        assert!(
            (0..4.min(minute)).all(|ago| kept.contains(&(minute - ago))),
            "{kept:?} after {minute} minutes"
        );
        most = most.max(store.stats().segment_bytes);
    }
    assert!(most < 130 << 20, "the rest of what is closed early stays: {most} bytes");
}

/// A parent that was put again lies behind its children, and neither its place nor its tokens tell that it comes first.
#[test]
fn a_prefix_goes_from_its_end_wherever_its_blocks_lie() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let settings = StoreSettings { capacity_bytes: u64::MAX, ..small() };
    let store = Store::open_at(dir.path(), settings, clock.clone()).unwrap();
    let same = |object: PutObject| PutObject { tokens: 128, ..object }.with_class(TtlClass(0));
    let objects: Vec<PutObject> = chain(0, 4, &[5000]).into_iter().map(same).collect();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    for again in [1, 0] {
        store.erase(Erase::Object(id(again))).unwrap();
        let outcome = store.put(vec![objects[again as usize].clone()]).remove(0);
        assert!(matches!(outcome, Ok(PutOutcome::Stored)), "{outcome:?}");
    }
    assert_eq!(store.lookup(&ids(&objects)).len(), 4);
    clock.pass(HOUR);
    store.keep_house();
    assert_eq!(store.stats().expired, 4);
    assert!(store.get(&ids(&objects)).iter().all(Option::is_none));
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    assert_eq!(store.lookup(&ids(&objects)).len(), 4);
}

#[test]
fn what_ran_out_meanwhile_goes_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let objects: Vec<_> =
        chain(0, 5, &LENS).into_iter().map(|object| object.with_class(TtlClass(0))).collect();
    let store = open();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    drop(store);
    clock.pass(HOUR);
    let (store, started) = (open(), Instant::now());
    while !store.lookup(&ids(&objects)).is_empty() {
        assert!(started.elapsed() < Duration::from_secs(3), "it waits for a round of housekeeping");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_lease_keeps_what_it_holds_and_not_the_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let store = Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let seen = Arc::new(Seen::default());
    assert!(store.observe(seen.clone()));
    let class = |first| {
        let objects = chain(first, 6, &LENS);
        objects.into_iter().map(|object| object.with_class(TtlClass(0))).collect::<Vec<_>>()
    };
    let (kept, loose) = (class(0), class(100));
    // By turns, so that they lie in the same segments.
    for (kept, loose) in kept.iter().zip(&loose) {
        assert!(store.put(vec![kept.clone(), loose.clone()]).iter().all(Result::is_ok));
    }
    store.lease(LeaseId([1; 32]), &[id(3)], HOUR).unwrap();
    clock.pass(Duration::from_secs(600));
    store.keep_house();
    // Another segment is begun, so that all of these are sealed.
    assert!(store.put(class(200)).iter().all(Result::is_ok));
    clock.pass(Duration::from_secs(600));
    store.keep_house();
    assert_eq!(store.lookup(&ids(&loose)).len(), 0);
    let found = store.lookup(&ids(&kept));
    assert_eq!(found.len(), 4, "what is leased, and nothing behind it");
    // Whoever follows the store hears of each.
    let expired =
        |object: &PutObject| seen.0.lock().unwrap().get(&object.id) == Some(&Some(Removal::Expired));
    assert!(loose.iter().chain(&kept[4..]).all(expired) && !kept[..4].iter().any(expired));
    for (got, put) in fetch(&store, all(found)).into_iter().zip(&kept) {
        assert_eq!(got, Ok(planes(put)));
    }
}

#[test]
fn what_is_erased_never_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || {
        Store::open_at(dir.path(), StoreSettings { capacity_bytes: u64::MAX, ..small() }, clock.clone())
            .unwrap()
    };
    let store = open();
    let scoped = |first, scope, namespace| {
        let objects = chain(first, 10, &LENS).into_iter();
        let owned = |object| PutObject {
            scope: ScopeTag([scope; 16]),
            namespace: NamespaceId([namespace; 32]),
            ..object
        };
        objects.map(owned).collect::<Vec<_>>()
    };
    let (one, two, three) = (scoped(0, 1, 1), scoped(100, 2, 1), scoped(200, 2, 2));
    for objects in [&one, &two, &three] {
        assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    }
    store.lease(LeaseId([1; 32]), &[id(9)], HOUR).unwrap();
    assert_eq!(store.erase(Erase::Object(id(5))).unwrap(), 1);
    assert_eq!(store.lookup(&ids(&one)).len(), 5);
    assert_eq!(store.erase(Erase::Scope(ScopeTag([1; 16]))).unwrap(), 9);
    assert_eq!(store.erase(Erase::Namespace(NamespaceId([2; 32]))).unwrap(), 10);
    let gone = |store: &Store| {
        let left = |objects: &[PutObject]| store.get(&ids(objects)).iter().flatten().count();
        (left(&one), left(&two), left(&three))
    };
    assert_eq!(gone(&store), (0, 10, 0));
    // Put again afterwards, it is new.
    assert!(store.put(one[..3].to_vec()).iter().all(Result::is_ok));
    assert_eq!(gone(&store), (3, 10, 0));
    drop(store);
    drop_index(dir.path());
    let store = open();
    assert_eq!(gone(&store), (3, 10, 0));
    // No byte of it is on the device.
    let needle = &one[7].planes[0].bytes[..4096];
    for entry in std::fs::read_dir(dir.path().join("segments")).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(bytes.chunks_exact(4096).all(|page| !page.windows(64).any(|window| window == &needle[..64])));
    }
}

#[test]
fn a_writers_word_can_be_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let store = open();
    let (one, two) = (WriterId(1), WriterId(2));
    let by = |objects: &[PutObject], writer| {
        objects.iter().map(|object| object.clone().by(writer)).collect::<Vec<_>>()
    };
    let objects = chain(0, 6, &LENS);
    assert!(store.put(by(&objects[..3], one)).iter().all(Result::is_ok));
    assert!(store.put(by(&objects[3..], two)).iter().all(Result::is_ok));
    let stored_bytes: u64 = store.realms().iter().map(|(_, _, bytes)| bytes).sum();
    assert_eq!(store.scope_bytes(objects[0].scope), stored_bytes);
    let bytes_of = |store: &Store, part: &[PutObject]| {
        store.get(&ids(part)).into_iter().flatten().map(|found| found.stored_bytes).sum::<u64>()
    };
    let by_writer = |store: &Store| [one, two].map(|writer| store.writer_bytes(writer));
    let expected = [bytes_of(&store, &objects[..3]), bytes_of(&store, &objects[3..])];
    assert_eq!(by_writer(&store), expected);
    // Who puts the same changes nothing by that.
    assert!(store.put(by(&objects, two)).iter().all(|put| matches!(put, Ok(PutOutcome::Present))));
    assert_eq!(by_writer(&store), expected);
    drop(store);
    drop_index(dir.path());
    let store = open();
    assert_eq!(by_writer(&store), expected, "records say who put them");
    assert_eq!(store.erase(Erase::Writer(one)).unwrap(), 3);
    assert_eq!(by_writer(&store), [0, expected[1]]);
    let left = |store: &Store| store.get(&ids(&objects)).iter().map(Option::is_some).collect::<Vec<_>>();
    assert_eq!(left(&store), [false, false, false, true, true, true]);
    assert!(store.lookup(&ids(&objects)).is_empty(), "what hangs on it is no prefix any more");
    // What it puts from now on is new.
    assert!(store.put(by(&objects[..1], one)).iter().all(Result::is_ok));
    let after = [true, false, false, true, true, true];
    assert_eq!(left(&store), after);
    drop(store);
    drop_index(dir.path());
    assert_eq!(left(&open()), after, "nothing that was taken back comes back");
}

#[test]
fn whether_bytes_are_stored_can_be_asked_under_any_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), small()).unwrap();
    let objects = chain(0, 2, &LENS);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    let names = ids(&objects);
    assert!(store.holds(&objects[1], &[id(77), names[1]]));
    assert!(!store.holds(&objects[1], &names[..1]), "other bytes");
    assert!(!store.holds(&objects[1], &[id(77)]));
    let mut elsewhere = objects[1].clone();
    elsewhere.id = id(77);
    assert!(store.holds(&elsewhere, &names), "its own name says nothing");
}

#[test]
fn an_erasure_of_no_one_is_refused_and_erases_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), small()).unwrap();
    let nobody = PutObject { scope: ScopeTag([0; 16]), ..chain(0, 1, &LENS).remove(0) };
    assert!(store.put(vec![nobody.clone()])[0].is_ok());
    for (none, what) in
        [(Erase::Writer(WriterId::UNNAMED), "writer"), (Erase::Scope(ScopeTag([0; 16])), "scope")]
    {
        let error = store.erase(none).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(what), "{error}");
        assert!(store.get(&[nobody.id])[0].is_some(), "{what}");
    }
    assert_eq!(store.erase(Erase::Object(nobody.id)).unwrap(), 1);
}

#[test]
fn a_full_store_declines_what_is_not_worth_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let store = Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    // A conversation that is read again and again, beside prompts that never are.
    let hot = chain(0, 10, &LENS);
    assert!(store.put(hot.clone()).iter().all(Result::is_ok));
    let mut declined = 0;
    for prefix in 1..2000 {
        clock.pass(Duration::from_secs(1));
        let outcomes = store.put(chain(prefix * 100, 3, &LENS));
        assert!(
            outcomes.iter().all(Result::is_ok),
            "what hangs on a declined object is declined: {outcomes:?}"
        );
        declined += outcomes.iter().filter(|outcome| matches!(outcome, Ok(PutOutcome::Declined))).count();
        let found = store.lookup(&ids(&hot));
        assert_eq!(found.len(), 10, "after {prefix}");
        drop(store.fetch(all(found)));
    }
    assert_eq!(store.stats().declined, declined as u64);
    println!("{declined} of {} declined", 2000 * 3);
    assert!(store.put(vec![object(7_000_000, 1, &LENS).with_class(TtlClass::PERMANENT)])[0].is_ok());
}

#[test]
fn what_is_used_all_the_time_is_not_taken_for_old_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), small(), clock.clone()).unwrap();
    let store = open();
    let objects: Vec<_> =
        chain(0, 5, &LENS).into_iter().map(|object| object.with_class(TtlClass(0))).collect();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    // Each use soon after the last, for longer than the class lives.
    for _ in 0..60 {
        clock.pass(Duration::from_secs(10));
        fetch(&store, all(store.lookup(&ids(&objects))));
    }
    drop(store);
    let store = open();
    store.keep_house();
    assert_eq!(store.lookup(&ids(&objects)).len(), 5);
}

/// A lease that held something before it was erased, and holds it again since it was put again, does not let go of it.
#[test]
fn a_lease_holds_what_was_erased_and_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreSettings { admission: false, ..small() }).unwrap();
    let kept = object(7, 7, &LENS);
    let lease = || store.lease(LeaseId([7; 32]), &[kept.id], HOUR).unwrap();
    assert!(store.put(vec![kept.clone()])[0].is_ok());
    lease();
    let pins = store.pin(&[kept.id]);
    assert_eq!(store.erase(Erase::Object(kept.id)).unwrap(), 1);
    assert!(store.lookup(&[kept.id]).is_empty());
    assert!(store.put(vec![kept.clone()])[0].is_ok());
    lease();
    drop(pins);
    for prefix in 1..40 {
        assert!(store.put(chain(prefix * 100, 10, &LENS)).iter().all(Result::is_ok));
    }
    assert!(store.stats().evicted > 100);
    assert_eq!(store.lookup(&[kept.id]).len(), 1, "what is leased was evicted");
}

/// The housekeeping removes the records of many leases, one after another, while they are renewed: what is renewed is the newest
/// of its name, and stays.
#[test]
fn a_lease_that_is_renewed_while_it_ends_holds_after_a_restart() {
    const LEASES: u8 = 100;
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let settings = StoreSettings { leased_bytes: Some(u64::MAX), ..small() };
    let open = || Store::open_at(dir.path(), settings.clone(), clock.clone()).unwrap();
    let store = open();
    assert!(store.put(chain(0, 10, &LENS)).iter().all(Result::is_ok));
    let name = |lease| LeaseId([lease; 32]);
    for round in 0..5 {
        (0..LEASES).for_each(|lease| drop(store.lease(name(lease), &[id(9)], HOUR).unwrap()));
        clock.pass(HOUR);
        std::thread::scope(|scope| {
            scope.spawn(|| store.keep_house());
            (0..LEASES).for_each(|lease| drop(store.lease(name(lease), &[id(9)], HOUR).unwrap()));
        });
        assert_eq!(store.leases().len(), usize::from(LEASES), "round {round}");
        let found: Vec<ObjectId> = (0..LEASES)
            .map(|lease| ObjectId { kind: ObjectKind::Lease, hash: BlockHash(name(lease).0) })
            .collect();
        let there = store.get(&found).into_iter().flatten().count();
        assert_eq!(there, usize::from(LEASES), "round {round}: records that are gone");
    }
    store.close().unwrap();
    assert_eq!(open().leases().len(), usize::from(LEASES));
}

//! Fetches that end early, wait, or are given up.

use std::time::{Duration, Instant};

use super::common::{all, chain, fetch, id, settings};
use crate::{FetchEvent, FetchOrder, FetchRequest, MissKind, PlaneSelection, Store, StoreSettings};

fn store(dir: &std::path::Path, settings: StoreSettings) -> (Store, Vec<crate::Found>) {
    let store = Store::open(dir, settings).unwrap();
    assert!(store.put(chain(0, 60, &[3000, 60_000, 80_000])).iter().all(Result::is_ok));
    let found = store.lookup(&(0..60).map(id).collect::<Vec<_>>());
    assert_eq!(found.len(), 60);
    (store, found)
}

fn settles(what: impl Fn() -> usize) -> bool {
    (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        what() == 0
    })
}

#[test]
fn a_dropped_fetch_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let small = StoreSettings { read_bytes_in_flight: 2 << 20, fetch_window_bytes: 1 << 20, ..settings() };
    let (store, found) = store(dir.path(), small);
    for taken in [0, 1, 2, 50] {
        for order in [FetchOrder::ByObject, FetchOrder::ByPlane] {
            let mut fetch = store.fetch(FetchRequest { order, ..all(found.clone()) });
            let events = fetch.by_ref().take(taken).count();
            assert_eq!(events, taken);
            assert!(taken == 0 || store.shared.reading.used_bytes() > 0);
            assert!(store.shared.reading.used_bytes() <= 2 << 20);
            drop(fetch);
            assert!(settles(|| store.shared.reading.used_bytes()), "after {taken} events");
        }
    }
    assert_eq!(store.stats().misses.total(), 0);
}

#[test]
fn stalled_fetches_do_not_starve_others() {
    let dir = tempfile::tempdir().unwrap();
    let small = StoreSettings { read_bytes_in_flight: 1 << 20, fetch_window_bytes: 1 << 20, ..settings() };
    let (store, found) = store(dir.path(), small);
    let mut stalled = store.fetch(all(found.clone()));
    assert!(stalled.next().is_some());
    assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
    assert_eq!(stalled.count(), 60 * 3 - 1);
    assert_eq!(store.shared.reading.used_bytes(), 0);
}

#[test]
fn bytes_outlive_fetch_and_store() {
    let dir = tempfile::tempdir().unwrap();
    let (store, found) = store(dir.path(), settings());
    let held: Vec<_> = store.fetch(all(found)).take(10).collect();
    store.close().unwrap();
    for event in held {
        let FetchEvent::Plane { object, plane, bytes, .. } = event else { panic!("{event:?}") };
        assert_eq!(bytes, chain(0, 60, &[3000, 60_000, 80_000])[object].planes[plane].bytes);
    }
}

#[test]
fn after_the_deadline_what_is_left_is_a_miss_and_stays_stored() {
    let dir = tempfile::tempdir().unwrap();
    let (store, found) = store(dir.path(), settings());
    let past = Some(Instant::now());
    let got = fetch(&store, FetchRequest { deadline: past, ..all(found.clone()) });
    assert!(got.iter().all(|object| *object == Err(MissKind::Deadline)));
    assert_eq!(store.stats().misses.get(MissKind::Deadline), 60);
    assert_eq!(store.stats().quarantined, 0);
    let soon = Some(Instant::now() + Duration::from_secs(60));
    assert!(fetch(&store, FetchRequest { deadline: soon, ..all(found) }).iter().all(Result::is_ok));
}

#[test]
fn a_selection_reads_less_than_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (store, found) = store(dir.path(), settings());
    let before = store.stats().read_bytes;
    let planes = PlaneSelection::Layers(vec![(0, 0..1)]);
    let request = FetchRequest { planes, order: FetchOrder::ByPlane, ..all(found.clone()) };
    assert_eq!(store.fetch(request).count(), 60);
    let partial = store.stats().read_bytes - before;
    let whole: u64 = found.iter().map(|found| found.stored_bytes).sum();
    assert!(partial * 4 < whole, "{partial} of {whole}");
    // Nothing of an object is nothing to wait for.
    let none = FetchRequest { planes: PlaneSelection::Layers(vec![(0, 5..9)]), ..all(found) };
    assert_eq!(store.fetch(none).count(), 0);
}

#[test]
fn ranks_say_which_planes_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let (store, found) = store(dir.path(), settings());
    come_by_rank(&store, &found, false);
}

#[test]
fn of_small_records_each_byte_is_read_once_in_the_order_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    // The second has no room to keep what it reads.
    for (keeps, read_bytes_in_flight) in [(true, 64 << 20), (false, 64 << 10)] {
        let settings = StoreSettings { read_bytes_in_flight, ..settings() };
        let store = Store::open(&dir.path().join(keeps.to_string()), settings).unwrap();
        assert!(store.put(chain(0, 100, &[300, 5000, 9000])).iter().all(Result::is_ok));
        let found = store.lookup(&(0..100).map(id).collect::<Vec<_>>());
        let record_bytes: usize = found.iter().map(|found| found.located.record_bytes()).sum();
        let read_bytes = come_by_rank(&store, &found, keeps);
        assert_eq!(read_bytes.iter().all(|&read| read <= record_bytes as u64), keeps, "{read_bytes:?}");
        // A damaged record is a miss, and read once more before that.
        let spot = found[7].located.spot;
        let segment = dir.path().join(keeps.to_string()).join("segments").join(spot.segment.file_name());
        let file = std::fs::File::options().write(true).open(segment).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 64], spot.offset + 8000).unwrap();
        let order = FetchOrder::ByRank([0, 1, 2].into());
        let events: Vec<_> = store.fetch(FetchRequest { order, ..all(found.clone()) }).collect();
        let missed = |event: &FetchEvent| matches!(event, FetchEvent::Miss { object: 7, .. });
        assert_eq!(events.iter().filter(|event| missed(event)).count(), 1);
        let planes = events.iter().filter(|event| matches!(event, FetchEvent::Plane { .. })).count();
        assert!((3 * 99..3 * 100).contains(&planes), "{planes}");
    }
}

/// Fetches in several orders. Bytes read by each fetch.
fn come_by_rank(store: &Store, found: &[crate::Found], keeps: bool) -> Vec<u64> {
    let plain = fetch(store, all(found.to_vec()));
    let mut read_bytes = Vec::new();
    // Those without a rank come last. The first plane comes with the header where that is read alone.
    for (ranks, strict, first_early) in [
        (vec![5, 2, 1], vec![vec![2], vec![1], vec![0]], vec![vec![0], vec![2], vec![1]]),
        (vec![0, 1, 1], vec![vec![0], vec![1, 2]], vec![vec![0], vec![1, 2]]),
        (vec![3, 2], vec![vec![1], vec![0], vec![2]], vec![vec![0], vec![1], vec![2]]),
        (vec![], vec![vec![0, 1, 2]], vec![vec![0], vec![1, 2]]),
    ] {
        let expected = if keeps { strict } else { first_early };
        let before = store.stats().read_bytes;
        let order = FetchOrder::ByRank(ranks.clone().into());
        let mut events = store.fetch(FetchRequest { order, ..all(found.to_vec()) });
        for planes in expected {
            for wanted in 0..found.len() {
                for &position in &planes {
                    let Some(FetchEvent::Plane { object, plane, bytes, .. }) = events.next() else {
                        panic!("{ranks:?}: a plane is missing");
                    };
                    assert_eq!((object, plane), (wanted, position), "{ranks:?}");
                    assert_eq!(bytes, plain[object].as_ref().unwrap()[plane], "{ranks:?}");
                }
            }
        }
        assert!(events.next().is_none());
        read_bytes.push(store.stats().read_bytes - before);
    }
    read_bytes
}

/// A mebibyte of zeros is a record of a page: what is bounded is what they become.
#[test]
fn what_waits_to_be_taken_is_bounded_however_well_it_was_compressed() {
    const PLANE_BYTES: usize = 1 << 20;
    const WINDOW_BYTES: usize = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let settings = StoreSettings { fetch_window_bytes: WINDOW_BYTES, segment_bytes: 4 << 20, ..settings() };
    let store = Store::open(dir.path(), settings).unwrap();
    let zeros = |mut object: crate::PutObject| {
        object
            .planes
            .iter_mut()
            .for_each(|plane| plane.bytes = vec![0; plane.spec.len_bytes as usize].into());
        object
    };
    let mut orders = vec![FetchOrder::ByObject, FetchOrder::ByPlane];
    for (first, lens) in [(0, vec![PLANE_BYTES]), (1000, vec![PLANE_BYTES / 8; 8])] {
        let objects: Vec<_> = chain(first, 64, &lens).into_iter().map(zeros).collect();
        assert!(store.put(objects.clone()).iter().all(Result::is_ok));
        let found = store.lookup(&objects.iter().map(|object| object.id).collect::<Vec<_>>());
        assert!(found.iter().all(|found| found.stored_bytes < 10_000), "{found:?}");
        orders.push(FetchOrder::ByRank((0..lens.len() as u16).rev().collect()));
        for order in &orders {
            let mut fetch = store.fetch(FetchRequest { order: order.clone(), ..all(found.clone()) });
            let (mut planes, mut most) = (0, 0);
            while let Some(event) = fetch.next() {
                assert!(matches!(event, FetchEvent::Plane { .. }));
                planes += 1;
                most = most.max(fetch.waiting_bytes());
            }
            assert_eq!(planes, 64 * lens.len());
            // It was read ahead all the same.
            let bounds = PLANE_BYTES / 8..=WINDOW_BYTES;
            assert!(bounds.contains(&most), "{most} bytes wait in {order:?}");
        }
    }
    assert_eq!(store.shared.reading.used_bytes(), 0);
}

#[test]
fn the_drive_is_asked_for_a_few_mebibytes_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (store, found) = store(dir.path(), StoreSettings { read_merge_bytes: 64 << 10, ..settings() });
    let limit = super::super::fetch::READ_BYTES_AT_ONCE;
    let found: Vec<_> = std::iter::repeat_n(found, 40).flatten().collect();
    let bytes: usize = found.iter().map(|found| found.located.record_bytes()).sum();
    assert!(bytes > 4 * limit, "{bytes} bytes");
    let mut most = 0;
    let mut fetch = store.fetch(all(found));
    while let Some(event) = fetch.next() {
        assert!(matches!(event, FetchEvent::Plane { .. }));
        most = most.max(fetch.asked_bytes());
    }
    assert!((1..=limit).contains(&most), "{most} bytes");
    assert_eq!(fetch.asked_bytes(), 0);
}

#[test]
fn a_remembered_header_is_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, found) = store(dir.path(), settings());
    let found: Vec<crate::Found> = found.into_iter().map(crate::Found::remembering).collect();
    let read = |planes: Vec<(u16, std::ops::Range<u16>)>| {
        let before = store.stats().read_bytes;
        let request = FetchRequest { planes: PlaneSelection::Layers(planes), ..all(found.clone()) };
        let planes: Vec<_> = store.fetch(request).collect();
        (planes, store.stats().read_bytes - before)
    };
    let (first, with_headers) = read(vec![(2, 0..1)]);
    let (again, without) = read(vec![(2, 0..1)]);
    assert_eq!((first.len(), &first), (60, &again));
    assert!(without < with_headers, "{without} of {with_headers}");
    // Other planes of the same records, and nothing of them.
    assert_eq!(read(vec![(0, 0..1), (1, 0..1)]).0.len(), 120);
    assert_eq!(read(vec![(7, 0..1)]), (Vec::new(), 0));
    assert_eq!(store.stats().misses.total(), 0);
}

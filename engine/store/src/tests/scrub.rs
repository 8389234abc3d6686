//! Scrubbing finds what nobody reads, spares what is sound, and goes on where it was.

use std::sync::Arc;

use super::common::{all, chain, fetch, id};
use super::{buffered, entry, flip, segment};
use crate::scrub::{Scrub, Step};
use crate::{MissKind, Store, StoreSettings};

/// Scrubs to the end of the round; the bytes verified.
fn round(scrub: &mut Scrub) -> u64 {
    let mut bytes = 0;
    loop {
        match scrub.step().unwrap() {
            Step::Verified(more) => bytes += more,
            Step::Round => return bytes,
            Step::GaveWay => std::thread::yield_now(),
        }
    }
}

/// A store of some sealed segments, which are not scrubbed unless a test does it.
fn store(dir: &std::path::Path) -> Store {
    let settings = StoreSettings { scrub_bytes_per_s: 0, ..buffered() };
    let store = Store::open(dir, settings.clone()).unwrap();
    assert!(store.put(chain(0, 60, &[60_000, 3000, 30_000])).iter().all(Result::is_ok));
    // Whatever is to be sealed is sealed when it opens again.
    store.close().unwrap();
    Store::open(dir, settings).unwrap()
}

#[test]
fn damage_is_found_and_only_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut scrub = Scrub::new(Arc::clone(&store.shared));
    // The control: nothing is wrong, and nothing is found.
    let bytes = round(&mut scrub);
    assert!(bytes > 3 << 20, "{bytes} bytes in sealed segments");
    assert_eq!((store.stats().scrub_bad, store.stats().quarantined), (0, 0));
    assert_eq!(store.stats().scrubbed_bytes, bytes);

    let (header, plane) = (entry(&store, id(3)), entry(&store, id(20)));
    assert!(store.shared.segments.get(plane.spot.segment).unwrap().sealed);
    flip(&segment(dir.path(), header.spot.segment.0), header.spot.offset + 50, 1);
    flip(&segment(dir.path(), plane.spot.segment.0), plane.spot.offset + 70_000, 4);
    assert_eq!(round(&mut scrub), bytes);
    assert_eq!((store.stats().scrub_bad, store.stats().quarantined), (2, 2));
    assert_eq!(store.stats().misses.get(MissKind::Digest), 0, "nobody asked for them");
    let ids: Vec<_> = (0..60).map(id).collect();
    let found = store.get(&ids);
    let missing: Vec<usize> = (0..60).filter(|&number| found[number].is_none()).collect();
    assert_eq!(missing, [3, 20]);
    assert!(fetch(&store, all(found.into_iter().flatten().collect())).iter().all(Result::is_ok));
}

#[test]
fn a_restart_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut scrub = Scrub::new(Arc::clone(&store.shared));
    let all_bytes = round(&mut scrub);
    while scrub.position().segment.0 < 3 {
        scrub.step().unwrap();
    }
    scrub.remember();
    let before = scrub.position();
    drop(scrub);
    store.close().unwrap();
    let store = Store::open(dir.path(), StoreSettings { scrub_bytes_per_s: 0, ..buffered() }).unwrap();
    let mut scrub = Scrub::new(Arc::clone(&store.shared));
    assert_eq!(scrub.position(), before);
    let rest = round(&mut scrub);
    assert!(rest < all_bytes * 3 / 4, "{rest} of {all_bytes} were left");
    assert_eq!(round(&mut scrub), all_bytes);
}

#[test]
fn it_gives_way_to_fetches() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut scrub = Scrub::new(Arc::clone(&store.shared));
    let held = store.shared.reading.force(store.shared.settings.read_bytes_in_flight / 2 + 1);
    assert_eq!(scrub.step().unwrap(), Step::GaveWay);
    drop(held);
    assert!(matches!(scrub.step().unwrap(), Step::Verified(_)));
}

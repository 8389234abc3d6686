//! The offline check finds what is wrong, and nothing else; a repair mends it and loses nothing that is sound.

use std::path::Path;
use std::time::Duration;

use super::common::{all, chain, fetch, id, object, planes};
use super::{buffered, entry, flip, segment};
use crate::index::Changes;
use crate::segment::Spot;
use crate::{FsckReport, LeaseId, MissKind, PutObject, Store, StoreError, fsck, stat};

const BLOCKS: u64 = 40;

fn filled(dir: &Path) -> (Store, Vec<PutObject>) {
    let store = Store::open(dir, buffered()).unwrap();
    let objects = chain(0, BLOCKS, &[60_000, 3000]);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    store.lease(LeaseId([1; 32]), &[id(BLOCKS - 1)], Duration::from_secs(1000)).unwrap();
    (store, objects)
}

fn check(dir: &Path, repair: bool) -> FsckReport {
    fsck(dir, repair, &|done, total| assert!(done <= total)).unwrap()
}

#[test]
fn a_sound_store_is_clean_and_one_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = filled(dir.path());
    assert!(matches!(fsck(dir.path(), false, &|_, _| {}), Err(StoreError::Locked { .. })));
    let told = stat(dir.path()).unwrap();
    assert!(told.in_use);
    assert_eq!((told.total.objects, told.total.tokens), (BLOCKS, 128 * BLOCKS));
    store.close().unwrap();
    let report = check(dir.path(), false);
    assert_eq!(report.problems(), 0, "{report:?}");
    assert_eq!((report.live, report.leases, report.orphans), (BLOCKS + 1, 1, 0));
    assert!(report.read_bytes > 2 << 20);
    let told = stat(dir.path()).unwrap();
    assert!(!told.in_use);
    assert_eq!(told.total.raw_bytes, BLOCKS * 63_000);
    assert_eq!((told.leases.len(), told.leases[0].ends), (1, 1));
    assert!(told.leases[0].remaining_s > 900);
    assert_eq!(told.segments.iter().map(|segment| segment.live_bytes).sum::<u64>(), report.live_bytes);
}

#[test]
fn each_kind_of_damage_is_told_and_mended() {
    let dir = tempfile::tempdir().unwrap();
    let (store, objects) = filled(dir.path());
    let (bad, lost, header) = (entry(&store, id(3)), entry(&store, id(7)), entry(&store, id(20)));
    let mut changes = Changes::default();
    // An entry that is gone, and one that points at nothing.
    changes.remove(lost.spot);
    let mut dangling = entry(&store, id(9));
    dangling.spot = Spot { offset: dangling.spot.offset + 4096, ..dangling.spot };
    changes.put(&dangling);
    store.shared.index.write(changes).unwrap();
    store.close().unwrap();
    flip(&segment(dir.path(), bad.spot.segment.0), bad.spot.offset + 5000, 1);
    flip(&segment(dir.path(), header.spot.segment.0), header.spot.offset + 100, 1);

    let report = check(dir.path(), false);
    assert_eq!((report.bad.total(), report.bad.get(MissKind::Digest)), (2, 1), "{report:?}");
    assert_eq!((report.dangling, report.missing, report.duplicates), (1, 1, 0));
    // What hung on the two is there, and can no longer be reached; the lease on the last of them is broken.
    assert_eq!((report.orphans, report.broken_leases), (2, 1));
    assert_eq!(check(dir.path(), false), report, "a check changes nothing");

    let repair = check(dir.path(), true).repair.unwrap();
    assert!(repair.rebuilt);
    let after = check(dir.path(), false);
    assert_eq!((after.problems(), after.broken_leases, after.quarantined), (1, 1, 2), "{after:?}");
    let store = Store::open(dir.path(), buffered()).unwrap();
    for (number, object) in objects.iter().enumerate() {
        let found: Vec<_> = store.get(&[object.id]).into_iter().flatten().collect();
        let got = fetch(&store, all(found));
        match number {
            3 | 20 => assert!(got.is_empty()),
            _ => assert_eq!(got, [Ok(planes(object))], "{number}"),
        }
    }
}

#[test]
fn dead_space_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = filled(dir.path());
    // A bad record that was put again, and came back: two of one name, of which the earlier is needed by nobody.
    let old = entry(&store, id(5));
    assert!(store.shared.table.remove_if(id(5), old.spot));
    let mut changes = Changes::default();
    changes.remove(old.spot);
    store.shared.index.write(changes).unwrap();
    let mut again = object(5, 5, &[60_000, 3000]);
    again.parent = Some(id(4));
    assert!(store.put(vec![again])[0].is_ok());
    store.close().unwrap();
    let report = check(dir.path(), false);
    assert_eq!((report.dead_bytes, report.problems()), (old.end() - old.spot.offset, 1), "{report:?}");
    let repair = check(dir.path(), true).repair.unwrap();
    assert_eq!((repair.rebuilt, repair.given_back_bytes), (false, report.dead_bytes));
    let after = check(dir.path(), false);
    assert_eq!(after.problems(), 0, "{after:?}");
    assert_eq!(after.live, report.live);
}

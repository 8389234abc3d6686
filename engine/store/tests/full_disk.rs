//! A file system that really runs full: puts are refused as full, reads go on, and room helps without a restart.
//!
//! Needs a small file system: `ESKER_SMALL_FS` names a folder on one of 64 to 256 MiB. Without it nothing is tested
//! here; `src/tests/faults.rs` does the same on a disk that only says that it is full.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::{all, fetch, id, object, planes, settings};
use esker_store::{ErrorKind, Store, StoreSettings};

const LENS: [usize; 2] = [200_000, 100_000];

#[test]
fn a_full_file_system_refuses_puts_and_serves_reads() {
    let Ok(small) = std::env::var("ESKER_SMALL_FS") else {
        eprintln!("left out: ESKER_SMALL_FS is not set");
        return;
    };
    let dir = tempfile::tempdir_in(&small).unwrap();
    let settings = StoreSettings { segment_bytes: 8 << 20, zstd_level: None, ..settings() };
    for round in 0..3 {
        let ballast = std::path::Path::new(&small).join("ballast");
        std::fs::write(&ballast, vec![1; 20 << 20]).unwrap();
        let store = Store::open(dir.path(), settings.clone()).unwrap();
        println!("{:?}", store.open_report().engine);
        let first = round * 10_000;
        let mut stored = 0;
        let refused = loop {
            match store.put(vec![object(first + stored, first + stored, &LENS)]).remove(0) {
                Ok(_) => stored += 1,
                Err(error) => break error,
            }
            assert!(stored < 10_000, "never full");
        };
        assert_eq!(refused.kind(), ErrorKind::Full, "{refused}");
        let check = |store: &Store| {
            let ids: Vec<_> = (first..first + stored).map(id).collect();
            let found = store.lookup(&ids).unwrap();
            assert_eq!(found.len() as u64, stored);
            for (got, number) in fetch(store, all(found)).into_iter().zip(first..) {
                assert_eq!(got, Ok(planes(&object(number, number, &LENS))));
            }
        };
        check(&store);
        std::fs::remove_file(&ballast).unwrap();
        assert!(store.put(vec![object(first + 9000, 1, &LENS)])[0].is_ok(), "room helps");
        assert_eq!(store.stats().suspect_segments, 0);
        drop(store);
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        check(&Store::open(dir.path(), settings.clone()).unwrap());
        std::fs::remove_dir_all(dir.path().join("segments")).unwrap();
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    }
}

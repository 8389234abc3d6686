//! Hits are told across restarts, and go with what is erased.

mod common;

use std::path::Path;
use std::time::Duration;

use common::{ManualClock, all, chain, fetch, id, settings};
use esker_store::{Erase, Hits, Store, stat};

const TOKENS: u64 = 128;

/// Restores the first blocks, a while after whatever was before.
fn read(store: &Store, clock: &ManualClock, blocks: u64) {
    clock.pass(Duration::from_secs(2));
    let found = store.lookup(&(0..blocks).map(id).collect::<Vec<_>>());
    assert!(fetch(store, all(found)).iter().all(Result::is_ok));
}

fn hits(dir: &Path) -> Hits {
    let told = stat(dir).expect("the store was made");
    let sum = |all: Vec<Hits>| {
        all.iter().fold((0, 0), |(count, tokens), hits| (count + hits.count, tokens + hits.tokens))
    };
    let total = (told.total.hits.count, told.total.hits.tokens);
    assert_eq!(sum(told.namespaces.values().map(|amount| amount.hits).collect()), total);
    assert_eq!(sum(told.scopes.values().map(|amount| amount.hits).collect()), total);
    assert_eq!(sum(told.classes.values().map(|amount| amount.hits).collect()), total);
    told.total.hits
}

#[test]
fn hits_are_told_across_restarts_and_go_with_what_is_erased() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new();
    let open = || Store::open_at(dir.path(), settings(), clock.clone()).unwrap();
    let store = open();
    let blocks = chain(0, 4, &[3000]);
    let namespace = blocks[0].namespace;
    assert!(store.put(blocks).iter().all(Result::is_ok));
    (0..3).for_each(|_| read(&store, &clock, 4));
    store.close().unwrap();
    assert_eq!(hits(dir.path()), Hits { count: 3, tokens: 3 * 4 * TOKENS });
    let wear = stat(dir.path()).unwrap().wear;
    assert!(wear.accepted_bytes == 4 * 3000 && wear.written_bytes > wear.accepted_bytes, "{wear:?}");

    let store = open();
    read(&store, &clock, 2);
    // Also of a store that is open, as of its last housekeeping.
    store.keep_house();
    assert_eq!(hits(dir.path()), Hits { count: 4, tokens: 3 * 4 * TOKENS + 2 * TOKENS });
    assert_eq!(store.erase(Erase::Namespace(namespace)).unwrap(), 4);
    assert_eq!(hits(dir.path()), Hits::default());
    store.close().unwrap();
    drop(open());
    assert_eq!(hits(dir.path()), Hits::default());
}

//! Many writers: one copy of each key, whoever comes first, and everybody hears the truth.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::HashMap;

use common::{all, chain, fetch, id, object, planes, settings};
use esker_store::{PutOutcome, Store, StoreError};

const WRITERS: u64 = 16;
const KEYS: u64 = 60;

#[test]
fn writers_of_one_key_agree_on_one_copy() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    // Half of the writers bring bytes of their own.
    let seed =
        |writer: u64, key: u64| if writer.is_multiple_of(2) { key } else { 10_000 + writer * 100 + key };
    let lens = [400, 9000];
    let winners: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let store = &store;
                scope.spawn(move || {
                    let mut won = Vec::new();
                    for step in 0..KEYS {
                        // Even and odd writers run against each other.
                        let key = if writer % 4 < 2 { step } else { KEYS - 1 - step };
                        match store.put(vec![object(key, seed(writer, key), &lens)]).remove(0) {
                            Ok(PutOutcome::Stored) => won.push((key, writer)),
                            Ok(PutOutcome::Declined) => panic!("there is room"),
                            Ok(PutOutcome::Present) => {
                                assert_eq!(writer % 2, 0, "only equal bytes are present")
                            }
                            Err(StoreError::ContentMismatch { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                        // What was answered holds at once, for readers too.
                        let found = store.lookup(&[id(key)]);
                        assert!(fetch(store, all(found))[0].is_ok());
                    }
                    won
                })
            })
            .collect();
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
    });
    let owners: HashMap<u64, u64> = winners.iter().copied().collect();
    assert_eq!((winners.len() as u64, owners.len() as u64), (KEYS, KEYS), "each key stored once");
    for (&key, &writer) in &owners {
        let found = store.lookup(&[id(key)]);
        assert_eq!(fetch(&store, all(found)), [Ok(planes(&object(key, seed(writer, key), &lens)))]);
    }
    let stats = store.stats();
    assert_eq!(stats.stored, KEYS);
    assert_eq!(stats.stored + stats.present + stats.content_mismatch, WRITERS * KEYS);
    assert!(stats.commits < stats.stored + 1);
    assert_eq!((stats.put_errors, stats.misses.total(), stats.unknown_completions), (0, 0, 0));
}

#[test]
fn batches_that_continue_each_other_may_be_under_way_together() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let objects = chain(1, 60, &[400, 9000]);
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    let batches: Vec<_> = objects.chunks(7).map(|batch| store.submit(batch.to_vec())).collect();
    // Asked in any order: a batch does not wait for anybody to wait for it.
    for batch in batches.into_iter().rev() {
        assert!(batch.wait().iter().all(|outcome| matches!(outcome, Ok(PutOutcome::Stored))));
    }
    assert_eq!(store.lookup(&ids).len(), 60);
    // The control: a child that is submitted before its parent is an orphan.
    let mut orphans = chain(1_000, 2, &[400]);
    let child = store.submit(vec![orphans.remove(1)]).wait().remove(0);
    assert!(matches!(child, Err(StoreError::MissingParent { .. })), "{child:?}");
}

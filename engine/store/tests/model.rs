//! Random calls against an in-memory model. A failure prints its seed; `ESKER_SEED` repeats it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::HashMap;
use std::fs;

use bytes::Bytes;
use common::{fetch, id, planes, settings};
use esker_prefix::ObjectId;
use esker_store::{
    FetchOrder, FetchRequest, PlaneSelection, PutObject, PutOutcome, Store, StoreError, StoreSettings,
};

const RUNS: u64 = 8;
const STEPS: u32 = 120;
const IDS: u64 = 40;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % bound
    }
}

#[test]
fn the_store_behaves_as_a_map() {
    let seeds: Vec<u64> = match std::env::var("ESKER_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..RUNS).map(|run| 0x5eed_0001 + run * 7919).collect(),
    };
    for seed in seeds {
        println!("ESKER_SEED={seed}");
        run(seed);
    }
}

fn run(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let settings = StoreSettings {
        segment_bytes: [64 << 10, 256 << 10, 1 << 20][random.below(3) as usize],
        zstd_level: [None, Some(1)][random.below(2) as usize],
        fetch_window_bytes: 64 << 10,
        read_merge_bytes: 32 << 10,
        ..settings()
    };
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path(), settings.clone()).unwrap();
    let mut model: HashMap<ObjectId, Vec<Bytes>> = HashMap::new();
    for step in 0..STEPS {
        match random.below(10) {
            0..5 => put(&store, &mut model, &mut random),
            5..8 => fetch_some(&store, &model, &mut random),
            8 => look_up(&store, &model, &mut random),
            _ => {
                let rebuild = random.below(2) == 0;
                if random.below(2) == 0 {
                    store.close().unwrap();
                } else {
                    drop(store);
                }
                if rebuild {
                    fs::remove_dir_all(dir.path().join("index")).unwrap();
                }
                store = Store::open(dir.path(), settings.clone()).unwrap();
                let report = store.open_report();
                assert_eq!(report.records_dropped.total(), 0, "step {step}: {report:?}");
                assert_eq!(report.rebuilt, rebuild && !model.is_empty());
                let expected = if rebuild { model.len() as u64 } else { 0 };
                assert_eq!(report.records_indexed, expected, "step {step}");
            }
        }
    }
    assert_eq!(store.stats().misses.total(), 0);
}

fn random_object(random: &mut Random) -> PutObject {
    let number = random.below(IDS);
    let lens: Vec<usize> = (0..number % 5)
        .map(|plane| match (number + plane) % 3 {
            0 => 50,
            1 => 5000,
            _ => 10_000 + number as usize * 10,
        })
        .collect();
    // One in eight has other bytes than usual under its id.
    let odd = u64::from(random.below(8) == 0) * 1000;
    let mut object = common::object(number, number + odd, &lens);
    object.parent = (!number.is_multiple_of(4)).then(|| id(number - 1));
    object
}

fn put(store: &Store, model: &mut HashMap<ObjectId, Vec<Bytes>>, random: &mut Random) {
    let objects: Vec<PutObject> = (0..1 + random.below(6)).map(|_| random_object(random)).collect();
    for (outcome, object) in store.put(objects.clone()).into_iter().zip(objects) {
        let expected = match (model.get(&object.id), object.parent) {
            (Some(known), _) if *known == planes(&object) => "present",
            (Some(_), _) => "mismatch",
            (None, Some(parent)) if !model.contains_key(&parent) => "orphan",
            (None, _) => {
                model.insert(object.id, planes(&object));
                "stored"
            }
        };
        let got = match outcome {
            Ok(PutOutcome::Stored) => "stored",
            Ok(PutOutcome::Present) => "present",
            Ok(PutOutcome::Declined) => "declined",
            Err(StoreError::ContentMismatch { .. }) => "mismatch",
            Err(StoreError::MissingParent { .. }) => "orphan",
            Err(error) => panic!("{error}"),
        };
        assert_eq!(got, expected, "{:?}", object.id);
    }
}

fn fetch_some(store: &Store, model: &HashMap<ObjectId, Vec<Bytes>>, random: &mut Random) {
    let ids: Vec<ObjectId> = (0..1 + random.below(20)).map(|_| id(random.below(IDS))).collect();
    let found: Vec<_> = store.get(&ids);
    for (found, id) in found.iter().zip(&ids) {
        assert_eq!(found.is_some(), model.contains_key(id));
    }
    let objects: Vec<_> = found.into_iter().flatten().collect();
    let order = if random.below(2) == 0 { FetchOrder::ByObject } else { FetchOrder::ByPlane };
    let request =
        FetchRequest { objects: objects.clone(), planes: PlaneSelection::All, order, deadline: None };
    for (got, found) in fetch(store, request).into_iter().zip(&objects) {
        assert_eq!(got.as_ref(), Ok(&model[&found.id]));
    }
}

fn look_up(store: &Store, model: &HashMap<ObjectId, Vec<Bytes>>, random: &mut Random) {
    let first = random.below(IDS);
    let ids: Vec<ObjectId> = (first..IDS).map(id).collect();
    let run = ids.iter().take_while(|id| model.contains_key(id)).count();
    let found = store.lookup(&ids);
    assert_eq!(found.iter().map(|found| found.id).collect::<Vec<_>>(), ids[..run]);
}

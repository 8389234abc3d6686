//! What was put is found and comes back, across segments, orders, selections and openings.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use bytes::Bytes;
use common::{all, chain, fetch, id, object, planes, settings};
use esker_prefix::{
    BlockObject, Dtype, Family, Field, Group, KvLayout, NamespaceId, ObjectKind, PlaneSpec, RowFormat,
    ScopeTag,
};
use esker_store::io::IoEngine;
use esker_store::{
    ErrorKind, FetchEvent, FetchOrder, FetchRequest, PlaneSelection, PutObject, PutOutcome, Store,
    StoreError, StoreSettings,
};

const LENS: [usize; 5] = [3000, 5000, 70_000, 100_000, 10];

#[test]
fn a_chain_comes_back_in_both_orders_and_after_reopening() {
    for engine in [IoEngine::UringDirect, IoEngine::PositionalDirect, IoEngine::PositionalBuffered] {
        let settings = StoreSettings { io_engines: vec![engine, IoEngine::PositionalBuffered], ..settings() };
        round_trip(&settings);
    }
}

#[test]
fn only_planes_from_a_length_on_are_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let from = StoreSettings::default().compressed_from_bytes;
    let store = Store::open(dir.path(), StoreSettings { compressed_from_bytes: from, ..settings() }).unwrap();
    for (number, len, is_shorter) in [(1, from - 1, false), (2, from, true)] {
        // The second plane is one that zstd can shrink.
        let put = object(number, number, &[10, len]);
        assert_eq!(store.put(vec![put.clone()]).pop().unwrap().unwrap(), PutOutcome::Stored);
        let found = store.lookup(&[put.id]).pop().unwrap();
        assert_eq!(found.stored_bytes < len as u64, is_shorter, "{} of {len}", found.stored_bytes);
        assert_eq!(fetch(&store, all(vec![found])), [Ok(planes(&put))]);
    }
}

fn round_trip(settings: &StoreSettings) {
    let dir = tempfile::tempdir().unwrap();
    let objects = chain(0, 40, &LENS);
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    let mut store = Store::open(dir.path(), settings.clone()).unwrap();
    for outcome in store.put(objects.clone()) {
        assert_eq!(outcome.unwrap(), PutOutcome::Stored);
    }
    assert!(store.stats().segments > 3, "{:?}", store.stats());
    for reopened in [false, true] {
        if reopened {
            store.close().unwrap();
            store = Store::open(dir.path(), settings.clone()).unwrap();
            assert!(!store.open_report().rebuilt);
            assert_eq!(store.open_report().records_indexed, 0);
        }
        let found = store.lookup(&ids);
        assert_eq!(found.len(), 40);
        assert_eq!(found[3].tokens, 512);
        assert_eq!(found[3].raw_bytes, LENS.iter().sum::<usize>() as u64);
        for (got, put) in fetch(&store, all(found.clone())).into_iter().zip(&objects) {
            assert_eq!(got.unwrap(), planes(put));
        }
        let request = FetchRequest { order: FetchOrder::ByPlane, ..all(found.clone()) };
        let order: Vec<_> = store
            .fetch(request)
            .map(|event| match event {
                FetchEvent::Plane { object, plane, bytes, spec } => {
                    assert_eq!(bytes, objects[object].planes[plane].bytes);
                    assert_eq!(spec, objects[object].planes[plane].spec);
                    (plane, object)
                }
                FetchEvent::Miss { .. } => panic!("{event:?}"),
            })
            .collect();
        assert_eq!(order.len(), 200);
        assert!(order.is_sorted());
        let request =
            FetchRequest { planes: PlaneSelection::Layers(vec![(1, 1..2), (4, 0..9)]), ..all(found) };
        let got: Vec<_> = store
            .fetch(request)
            .map(|event| match event {
                FetchEvent::Plane { object, plane, .. } => (object, plane),
                FetchEvent::Miss { .. } => panic!("{event:?}"),
            })
            .collect();
        assert_eq!(got, (0..40).flat_map(|object| [(object, 1), (object, 4)]).collect::<Vec<_>>());
        assert_eq!(store.stats().misses.total(), 0);
    }
}

#[test]
fn lookup_stops_at_the_first_hole_and_get_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    store.put(chain(0, 5, &[100])).into_iter().for_each(|outcome| assert!(outcome.is_ok()));
    store.put(chain(6, 5, &[100])).into_iter().for_each(|outcome| assert!(outcome.is_ok()));
    let ids: Vec<_> = (0..11).map(id).collect();
    assert_eq!(store.lookup(&ids).len(), 5);
    assert!(store.lookup(&[id(77)]).is_empty());
    let got = store.get(&ids);
    assert_eq!(got.iter().filter(|found| found.is_some()).count(), 10);
    assert!(got[5].is_none());
}

#[test]
fn a_second_put_is_present_and_other_bytes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let first = object(1, 1, &LENS);
    let outcomes = store.put(vec![first.clone(), first.clone(), object(1, 2, &LENS)]);
    assert_eq!(*outcomes[0].as_ref().unwrap(), PutOutcome::Stored);
    assert_eq!(*outcomes[1].as_ref().unwrap(), PutOutcome::Present);
    assert_eq!(outcomes[2].as_ref().unwrap_err().kind(), ErrorKind::ContentMismatch);
    let outcomes = store.put(vec![first.clone(), object(1, 3, &LENS)]);
    assert_eq!(*outcomes[0].as_ref().unwrap(), PutOutcome::Present);
    assert!(matches!(outcomes[1], Err(StoreError::ContentMismatch { .. })));
    let stats = store.stats();
    assert_eq!((stats.stored, stats.present, stats.content_mismatch), (1, 2, 2));
    let found = store.lookup(&[id(1)]);
    assert_eq!(fetch(&store, all(found))[0].as_ref().unwrap(), &planes(&first));
}

#[test]
fn a_chain_with_a_hole_is_refused_behind_the_hole() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let mut objects = chain(0, 4, &[64]);
    objects.remove(1);
    let outcomes = store.put(objects);
    assert!(outcomes[0].is_ok());
    match outcomes[1].as_ref().unwrap_err() {
        StoreError::MissingParent { id: child, parent } => assert_eq!((*child, *parent), (id(2), id(1))),
        other => panic!("{other}"),
    }
    assert_eq!(outcomes[2].as_ref().unwrap_err().kind(), ErrorKind::MissingParent);
    // With the hole filled the rest goes in.
    assert!(store.put(chain(0, 4, &[64])).iter().all(Result::is_ok));
}

#[test]
fn planes_of_another_length_than_their_spec_and_objects_larger_than_a_segment_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let mut short = object(1, 1, &[100, 100]);
    short.planes[1].bytes = short.planes[1].bytes.slice(..99);
    let large = object(2, 2, &[1 << 20]);
    let many = object(3, 3, &[0; 5000]);
    let outcomes = store.put(vec![short, large, many]);
    let messages: Vec<String> =
        outcomes.iter().map(|outcome| outcome.as_ref().unwrap_err().to_string()).collect();
    assert_eq!(messages[0], format!("{:?}: plane 1 has 99 bytes, its spec says 100", id(1)));
    assert!(messages[1].contains("a record has at most 1040384"), "{}", messages[1]);
    assert!(messages[2].contains("5000 planes"), "{}", messages[2]);
    assert!(outcomes.iter().all(|outcome| outcome.as_ref().unwrap_err().kind() == ErrorKind::Invalid));
    assert!(store.lookup(&[id(1)]).is_empty());
    assert_eq!(store.stats().segments, 0);
    // The largest that fits.
    assert!(store.put(vec![object(4, 4, &[(1 << 20) - 3 * 4096])])[0].is_ok());
}

#[test]
fn objects_without_planes_or_with_empty_ones_are_objects() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(vec![object(1, 1, &[]), object(2, 2, &[0, 5, 0])]).iter().all(Result::is_ok));
    let found = store.lookup(&[id(1), id(2)]);
    let got = fetch(&store, all(found));
    assert_eq!(got[0], Ok(Vec::new()));
    assert_eq!(got[1].as_ref().unwrap().iter().map(|plane| plane.len()).collect::<Vec<_>>(), [0, 5, 0]);
}

#[test]
fn layouts_are_stored_beside_the_blocks() {
    let group = Group {
        name: "kv".into(),
        family: Family::History,
        layers: vec![0, 1],
        rows: 4,
        fields: vec![Field { name: "k".into(), dtype: Dtype::Bf16, count: 8 }],
        restore_order: 0,
        plane_layers: 1,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    };
    let layout = KvLayout::new("test", 4, vec![group]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.layouts().is_empty());
    let namespaces = [NamespaceId([1; 32]), NamespaceId([2; 32])];
    let objects = namespaces.map(|namespace| PutObject::layout(namespace, &layout)).to_vec();
    assert!(store.put(objects).iter().all(Result::is_ok));
    assert_eq!(store.layouts(), namespaces.map(|namespace| (namespace, layout.clone())));
    let spec = PlaneSpec { group: 0, first_layer: 0, layers: 1, len_bytes: 64 };
    assert_eq!(layout.planes(esker_prefix::ObjectKind::Block)[0], spec);
}

#[test]
fn a_folder_in_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let error = Store::open(dir.path(), settings()).err().unwrap();
    assert!(matches!(error, StoreError::Locked { .. }));
    assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    store.close().unwrap();
    Store::open(dir.path(), settings()).unwrap();
}

/// Layers of rows of BF16 numbers with exponents as activations have them.
#[test]
fn planes_of_known_shape_shrink_and_come_back() {
    let config = r#"{"model_type":"deepseek_v32","num_hidden_layers":3,"kv_lora_rank":128,"qk_rope_head_dim":16,
        "index_head_dim":64}"#;
    let layout = KvLayout::from_config(config, RowFormat::Bf16, 128).unwrap();
    let specs = layout.planes(ObjectKind::Block);
    let planes: Vec<Bytes> = (1..)
        .zip(specs)
        .map(|(seed, spec)| {
            let noise = common::content(seed, spec.len_bytes as usize, false);
            noise
                .chunks_exact(2)
                .flat_map(|pair| [pair[0], 0x3c | pair[1] & 0x83])
                .collect::<Vec<u8>>()
                .into()
        })
        .collect();
    let (namespace, scope) = (NamespaceId([7; 32]), ScopeTag([9; 16]));
    let block =
        BlockObject::new(&layout, namespace, scope, id(0).hash, id(1).hash, 128, planes.clone()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert_eq!(store.put(vec![PutObject::block(&layout, block)])[0].as_ref().unwrap(), &PutOutcome::Stored);
    let found = store.lookup(&[id(1)]);
    assert!(found[0].stored_bytes * 4 < found[0].raw_bytes * 3, "{found:?}");
    assert_eq!(fetch(&store, all(found))[0].as_ref().unwrap(), &planes);
}

#[test]
fn a_put_that_fills_many_segments_survives_the_loss_of_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let small = StoreSettings { segment_bytes: 64 << 10, ..settings() };
    let store = Store::open(dir.path(), small.clone()).unwrap();
    let objects = chain(0, 300, &[700, 4500]);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    assert!(store.stats().segments > 15);
    store.close().unwrap();
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), small).unwrap();
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    let found = store.lookup(&ids);
    assert_eq!(found.len(), 300);
    assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
}

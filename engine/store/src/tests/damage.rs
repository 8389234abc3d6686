//! Damaged files: always a miss or the right bytes, never an error at opening.

use std::fs;
use std::os::unix::fs::FileExt;

use esker_prefix::Dtype;

use super::common::{all, chain, fetch, id, object, planes, settings};
use super::{buffered, copy_dir, entry, flip, segment, segment_path, set_entry};
use crate::codec::{Column, PlaneShape};
use crate::io::PAGE;
use crate::segment::{PageKind, RECORDS_AT, SegmentPage};
use crate::{MissKind, PutObject, PutOutcome, Sabotage, Store, StoreError, StoreSettings};

const LENS: [usize; 2] = [700, 4500];

/// Flips each byte of one stored record in turn; gives the kinds of misses and how often other bytes came back.
fn flip_every_byte(settings: StoreSettings, put: &PutObject) -> (Vec<MissKind>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings).unwrap();
    assert!(store.put(vec![put.clone()])[0].is_ok());
    let found = store.lookup(&[id(1)]);
    let entry = entry(&store, id(1));
    let file = segment(dir.path(), 1);
    let (mut kinds, mut wrong) = (Vec::new(), 0);
    for offset in entry.spot.offset..entry.end() {
        let mask = 1 << (offset % 8);
        flip(&file, offset, mask);
        match &fetch(&store, all(found.clone()))[0] {
            Ok(bytes) => wrong += usize::from(*bytes != planes(put)),
            Err(kind) => {
                kinds.push(*kind);
                assert!(store.lookup(&[id(1)]).is_empty(), "quarantined");
                set_entry(&store, id(1), &entry);
            }
        }
        flip(&file, offset, mask);
    }
    assert_eq!(fetch(&store, all(found))[0].as_ref().unwrap(), &planes(put), "whole again");
    assert_eq!(store.stats().misses.total(), kinds.len() as u64);
    assert_eq!(store.stats().quarantined, kinds.len() as u64);
    (kinds, wrong)
}

#[test]
fn every_byte_of_a_record_flipped_gives_a_miss_or_the_right_bytes() {
    for zstd_level in [None, Some(1)] {
        let (kinds, wrong) =
            flip_every_byte(StoreSettings { zstd_level, ..buffered() }, &object(1, 1, &LENS));
        assert_eq!(wrong, 0);
        let header = 256 + 2 * 64;
        assert_eq!(kinds.iter().filter(|kind| **kind == MissKind::HeaderChecksum).count(), header);
        let payload: usize = if zstd_level.is_some() { LENS[0] } else { LENS.iter().sum() };
        assert_eq!(kinds.iter().filter(|kind| **kind == MissKind::Digest).count(), payload);
        // What zstd made of the second plane.
        let compressed = kinds.iter().filter(|kind| **kind == MissKind::PlaneChecksum).count();
        assert_eq!(kinds.len(), header + payload + compressed);
        assert_eq!(compressed > 0, zstd_level.is_some());
    }
}

#[test]
fn every_byte_of_columns_flipped_gives_a_miss_or_the_right_bytes() {
    let mut put = object(1, 1, &[4096]);
    // Exponents of activations: few, and so worth encoding.
    let numbers = put.planes[0].bytes.chunks_exact(2).flat_map(|pair| [pair[0], 0x3c | pair[1] & 0x83]);
    put.planes[0].bytes = numbers.collect::<Vec<u8>>().into();
    let columns = [Column { dtype: Dtype::Bf16, count: 32 }];
    put.planes[0].shape = Some(PlaneShape::new(1, 64, &columns));
    let (kinds, wrong) = flip_every_byte(buffered(), &put);
    assert_eq!(wrong, 0);
    let stored = kinds.iter().filter(|kind| **kind == MissKind::PlaneChecksum).count();
    assert!((2000..4000).contains(&stored), "{stored} stored bytes");
    assert_eq!(kinds.len(), 256 + 64 + stored);
}

/// The control: without verification the same test must see wrong bytes, or it could not fail.
#[test]
fn without_verification_flipped_bytes_are_served() {
    let sabotage = Sabotage { skip_verification: true, ..Sabotage::default() };
    let (_, wrong) =
        flip_every_byte(StoreSettings { zstd_level: None, sabotage, ..buffered() }, &object(1, 1, &LENS));
    assert_eq!(wrong, LENS.iter().sum::<usize>());
}

#[test]
fn flipped_bytes_under_a_rebuild_never_become_other_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), buffered()).unwrap();
    let objects = chain(0, 3, &LENS);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    let end = entry(&store, id(2)).end();
    store.close().unwrap();
    let file = segment(dir.path(), 1);
    // A step prime to everything meets all fields.
    for offset in (0..end).step_by(211) {
        flip(&file, offset, 0x10);
        fs::remove_dir_all(dir.path().join("index")).unwrap();
        let store = Store::open(dir.path(), buffered()).unwrap();
        for (number, object) in objects.iter().enumerate() {
            let found: Vec<_> = store.get(&[id(number as u64)]).into_iter().flatten().collect();
            for got in fetch(&store, all(found)).into_iter().flatten() {
                assert_eq!(got, planes(object), "byte {offset}");
            }
        }
        drop(store);
        flip(&file, offset, 0x10);
        // The scan may have sealed the segment; take that back.
        let last_page = file.metadata().unwrap().len() - PAGE as u64;
        file.write_all_at(&[0; PAGE], last_page).unwrap();
    }
}

#[test]
fn an_entry_that_points_at_another_sound_record_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(vec![object(1, 1, &LENS), object(2, 2, &LENS)]).iter().all(Result::is_ok));
    let (one, two) = (entry(&store, id(1)), entry(&store, id(2)));
    // Wholly the other's entry, and an entry of its own with the other's place.
    let mut misplaced = one;
    misplaced.spot = two.spot;
    for wrong in [two, misplaced] {
        set_entry(&store, id(1), &wrong);
        let found = store.lookup(&[id(1)]);
        assert_eq!(fetch(&store, all(found)), [Err(MissKind::WrongRecord)]);
    }
    // Quarantine left the sound record's own entry alone.
    assert!(fetch(&store, all(store.lookup(&[id(2)])))[0].is_ok());
}

#[test]
fn quarantine_spares_an_entry_that_has_come_to_mean_another_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let put = object(1, 1, &LENS);
    assert!(store.put(vec![put.clone()])[0].is_ok());
    let old = store.lookup(&[id(1)]);
    flip(&segment(dir.path(), 1), old[0].located.spot.offset + 400, 1);
    assert_eq!(fetch(&store, all(old.clone())), [Err(MissKind::Digest)]);
    // The block is usable again after it was put again, and the old handle cannot harm it.
    assert!(store.put(vec![put.clone()])[0].is_ok());
    assert_eq!(fetch(&store, all(old)), [Err(MissKind::Absent)]);
    let found = store.lookup(&[id(1)]);
    assert_eq!(fetch(&store, all(found)), [Ok(planes(&put))]);
    // Also to a rebuild the later record is the one that counts.
    store.close().unwrap();
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let found = store.lookup(&[id(1)]);
    assert_eq!(fetch(&store, all(found)), [Ok(planes(&put))]);
}

#[test]
fn a_segment_cut_anywhere_keeps_exactly_its_whole_records() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), buffered()).unwrap();
    let objects = chain(0, 3, &LENS);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    let ends: Vec<u64> = (0..3).map(|number| entry(&store, id(number)).end()).collect();
    store.close().unwrap();
    for cut in (0..=ends[2] + 512).step_by(512) {
        for keep_index in [true, false] {
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            segment(copy.path(), 1).set_len(cut).unwrap();
            if !keep_index {
                fs::remove_dir_all(copy.path().join("index")).unwrap();
            }
            let store = Store::open(copy.path(), buffered()).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count();
            let found = store.lookup(&[id(0), id(1), id(2)]);
            assert_eq!(found.len(), whole, "cut at {cut}, index kept: {keep_index}");
            // Looking at it does not make it look whole. One of which nothing is left may go.
            if let Ok(file) = fs::metadata(segment_path(copy.path(), 1)) {
                assert_eq!(file.len(), cut);
            }
            for (got, put) in fetch(&store, all(found)).into_iter().zip(&objects) {
                assert_eq!(got, Ok(planes(put)));
            }
            // What was lost can be put again.
            assert!(store.put(objects.clone()).iter().all(Result::is_ok));
            assert_eq!(store.lookup(&[id(0), id(1), id(2)]).len(), 3);
        }
    }
}

#[test]
fn a_cut_under_an_open_store_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(chain(0, 3, &LENS)).iter().all(Result::is_ok));
    let found = store.lookup(&[id(0), id(1), id(2)]);
    segment(dir.path(), 1).set_len(entry(&store, id(1)).end() - 512).unwrap();
    let got = fetch(&store, all(found));
    assert!(got[0].is_ok());
    assert_eq!(got[1..], [Err(MissKind::Truncated), Err(MissKind::Truncated)]);
}

/// A power cut may leave a record half given back, whole by its header, and an index that still names it.
#[test]
fn what_is_half_given_back_answers_for_nothing_that_is_put() {
    let second_page = |gone: bool| {
        let dir = tempfile::tempdir().unwrap();
        let put = object(1, 1, &[20_000]);
        let store = Store::open(dir.path(), buffered()).unwrap();
        assert!(store.put(vec![put.clone(), object(2, 2, &LENS)]).iter().all(Result::is_ok));
        let (spot, page) = (entry(&store, id(1)).spot, PAGE as u64);
        if gone {
            let file = store.shared.segments.get(spot.segment).unwrap().file;
            store.shared.disk.punch(file, spot.offset + page, page).unwrap();
        } else {
            segment(dir.path(), 1).write_all_at(&[0; PAGE], spot.offset + page).unwrap();
        }
        store.close().unwrap();
        let store = Store::open(dir.path(), buffered()).unwrap();
        assert_eq!(store.lookup(&[id(2)]).len(), 1, "the other one stays");
        let (dropped, outcome) =
            (store.open_report().entries_dropped, store.put(vec![put.clone()]).remove(0).ok());
        let found = store.lookup(&[id(1)]);
        let right = fetch(&store, all(found))[0].as_ref().is_ok_and(|bytes| *bytes == planes(&put));
        (dropped, outcome, right)
    };
    assert_eq!(second_page(true), (1, Some(PutOutcome::Stored), true));
    // The control: damage without a hole shows only when it is read, and then as a miss.
    assert_eq!(second_page(false), (0, Some(PutOutcome::Present), false));
}

#[test]
fn a_damaged_record_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put((0..6).map(|n| object(n, n, &LENS)).collect()).iter().all(Result::is_ok));
    let file = segment(dir.path(), 1);
    flip(&file, entry(&store, id(1)).spot.offset + 3, 1); // magic
    flip(&file, entry(&store, id(2)).spot.offset + 90, 1); // header
    flip(&file, entry(&store, id(4)).spot.offset + 400, 1); // payload
    store.close().unwrap();
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let report = store.open_report();
    assert!(report.rebuilt);
    assert_eq!(report.records_indexed, 3);
    assert_eq!(report.records_dropped.get(MissKind::HeaderChecksum), 1);
    assert_eq!(report.records_dropped.get(MissKind::Digest), 1);
    let ids: Vec<_> = (0..6).map(id).collect();
    let present: Vec<bool> = store.get(&ids).iter().map(Option::is_some).collect();
    assert_eq!(present, [true, false, false, true, false, true]);
}

#[test]
fn an_index_that_is_gone_or_garbage_costs_a_rebuild() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let objects = chain(0, 30, &[100_000, 3000]);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    assert!(store.stats().segments > 2);
    store.close().unwrap();
    let index = dir.path().join("index");
    let damage: [fn(&std::path::Path); 5] = [
        |index| fs::remove_dir_all(index).unwrap(),
        |index| fs::write(index.join("CURRENT"), b"nonsense").unwrap(),
        |index| fs::remove_file(index.join("CURRENT")).unwrap(),
        |index| {
            for item in fs::read_dir(index).unwrap().map(Result::unwrap) {
                if item.file_name().to_string_lossy().starts_with("MANIFEST") {
                    fs::write(item.path(), [0x5a; 300]).unwrap();
                }
            }
        },
        |index| {
            for item in fs::read_dir(index).unwrap().map(Result::unwrap) {
                let name = item.file_name().to_string_lossy().into_owned();
                if name.ends_with(".log") || name.ends_with(".sst") {
                    fs::write(item.path(), [0x5a; 5000]).unwrap();
                }
            }
        },
    ];
    for (number, damage) in damage.iter().enumerate() {
        damage(&index);
        let store = Store::open(dir.path(), settings()).unwrap();
        let found = store.lookup(&objects.iter().map(|object| object.id).collect::<Vec<_>>());
        assert_eq!(found.len(), 30, "damage {number}");
        for (got, put) in fetch(&store, all(found)).into_iter().zip(&objects) {
            assert_eq!(got, Ok(planes(put)));
        }
        // Writing goes on where it ended.
        assert!(store.put(vec![object(1000 + number as u64, 1, &LENS)])[0].is_ok());
        store.close().unwrap();
    }
}

/// Overwrites part of the data blocks of each of RocksDB's tables.
fn damage_tables(dir: &std::path::Path) -> usize {
    let items = fs::read_dir(dir.join("index")).unwrap().map(Result::unwrap);
    let tables: Vec<_> = items.filter(|item| item.file_name().to_string_lossy().ends_with(".sst")).collect();
    for table in &tables {
        let table = fs::File::options().write(true).open(table.path()).unwrap();
        table.write_all_at(&[0x5a; 64], 1000).unwrap();
    }
    tables.len()
}

#[test]
fn an_index_that_cannot_be_read_to_its_end_is_built_anew_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let objects = chain(0, 30, &LENS);
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    store.close().unwrap();
    // Opening turns the log into a table.
    Store::open(dir.path(), settings()).unwrap().close().unwrap();
    assert!(damage_tables(dir.path()) > 0);
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.open_report().rebuilt);
    assert_eq!(store.open_report().records_indexed, 30);
    let found = store.lookup(&ids);
    assert_eq!(fetch(&store, all(found)).into_iter().filter(Result::is_ok).count(), 30);
}

/// Whichever block of the index is bad, whatever it holds: entries, segments, their use, hits.
#[test]
fn one_bad_block_of_the_index_never_keeps_a_store_from_opening() {
    const STORED: u64 = 1000;
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<_> = (0..STORED).map(id).collect();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put((0..STORED).map(|n| object(n, n, &[100])).collect()).iter().all(Result::is_ok));
    drop(store.fetch(all(store.lookup(&ids[..1]))));
    store.close().unwrap();
    // Opening turns the log into a table.
    Store::open(dir.path(), settings()).unwrap().close().unwrap();
    let items = fs::read_dir(dir.path().join("index")).unwrap().map(|item| item.unwrap().path());
    let tables: Vec<_> = items.filter(|path| path.extension().is_some_and(|kind| kind == "sst")).collect();
    let (mut blocks, mut rebuilt) = (0, 0);
    for table in &tables {
        for offset in (100..fs::metadata(table).unwrap().len()).step_by(3000) {
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            let table = copy.path().join("index").join(table.file_name().unwrap());
            flip(&fs::File::options().read(true).write(true).open(table).unwrap(), offset, 1);
            let report = crate::fsck(copy.path(), false, &|_, _| {}).unwrap();
            assert!(!copy.path().join(crate::index::DAMAGED_MARK).exists(), "a check changes nothing");
            let store = Store::open(copy.path(), settings()).unwrap();
            assert_eq!(store.lookup(&ids[..1]).len(), 1);
            assert_eq!(store.get(&ids).iter().flatten().count() as u64, STORED, "byte {offset}");
            // What a check finds an opening mends, and the other way round.
            assert_eq!(
                report.index_error.is_some(),
                store.open_report().rebuilt,
                "byte {offset}: {report:?}"
            );
            rebuilt += u64::from(store.open_report().rebuilt);
            blocks += 1;
            store.close().unwrap();
            assert_eq!(crate::fsck(copy.path(), false, &|_, _| {}).unwrap().index_error, None);
        }
    }
    assert!(blocks > 60 && rebuilt > blocks * 9 / 10, "{rebuilt} of {blocks} blocks were missed");
}

/// What cannot be read of one segment does not keep the others from expiring.
#[test]
fn a_bad_block_of_the_index_keeps_no_other_segment_from_expiring() {
    let dir = tempfile::tempdir().unwrap();
    let clock = super::common::ManualClock::new();
    let open = || Store::open_at(dir.path(), settings(), clock.clone()).unwrap();
    let objects: Vec<_> = (0..300).map(|n| object(n, n, &[10_000]).with_class(crate::TtlClass(0))).collect();
    let store = open();
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    store.close().unwrap();
    open().close().unwrap();
    let store = open();
    assert!(store.stats().segments >= 3);
    for item in fs::read_dir(dir.path().join("index")).unwrap().map(Result::unwrap) {
        if item.file_name().to_string_lossy().ends_with(".sst") {
            // Of the newest segment, which is looked at first.
            let table = fs::File::options().read(true).write(true).open(item.path()).unwrap();
            let at = table.metadata().unwrap().len() * 9 / 10;
            flip(&table, at, 1);
        }
    }
    clock.pass(std::time::Duration::from_secs(1000));
    (0..3).for_each(|_| store.keep_house());
    let left = store.get(&objects.iter().map(|object| object.id).collect::<Vec<_>>());
    let left = left.iter().flatten().count();
    assert!(left > 0 && left < 150, "{left} are left");
    drop(store);
    let store = open();
    assert!(store.open_report().rebuilt, "it was marked");
}

#[test]
fn an_index_that_is_damaged_while_open_costs_nothing_that_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let objects = chain(0, 30, &LENS);
    let ids: Vec<_> = objects.iter().map(|object| object.id).collect();
    Store::open(dir.path(), settings()).unwrap().put(objects.clone());
    Store::open(dir.path(), settings()).unwrap().close().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(damage_tables(dir.path()) > 0);
    // The digests of known objects come from their records then, and a conflict is still a conflict.
    let again = store.put(objects.clone());
    assert!(again.iter().all(|outcome| matches!(outcome, Ok(PutOutcome::Present))), "{again:?}");
    let other = object(1, 99, &LENS);
    assert!(matches!(store.put(vec![other])[0], Err(StoreError::ContentMismatch { .. })));
    let found = store.lookup(&ids);
    assert_eq!(fetch(&store, all(found)).into_iter().filter(Result::is_ok).count(), 30);
}

#[test]
fn what_lies_in_a_segment_that_cannot_be_opened_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let objects = chain(0, 3, &LENS);
    assert!(store.put(objects.clone()).iter().all(Result::is_ok));
    store.close().unwrap();
    fs::remove_file(segment_path(dir.path(), 1)).unwrap();
    fs::create_dir(segment_path(dir.path(), 1)).unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert_eq!(store.open_report().unreadable_segments, ["00000001.seg"]);
    assert!(store.lookup(&[id(0)]).is_empty());
    for outcome in store.put(objects.clone()) {
        assert_eq!(outcome.unwrap(), crate::PutOutcome::Stored);
    }
    let found = store.lookup(&[id(0), id(1), id(2)]);
    assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
}

#[test]
fn lost_segments_and_foreign_files_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let objects = chain(0, 30, &[100_000, 3000]);
    assert!(store.put(objects).iter().all(Result::is_ok));
    store.close().unwrap();
    fs::remove_file(segment_path(dir.path(), 2)).unwrap();
    fs::write(segment_path(dir.path(), 900), super::common::content(5, 50_000, false)).unwrap();
    fs::write(segment_path(dir.path(), 901), [0; 8192]).unwrap();
    fs::write(segment_path(dir.path(), 902), b"").unwrap();
    fs::write(dir.path().join("segments/notes.txt"), b"hello").unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    let report = store.open_report().clone();
    assert!(!report.rebuilt);
    assert!(report.entries_dropped > 0);
    assert_eq!(report.unreadable_segments, ["00000900.seg"]);
    for number in [901, 902] {
        assert!(!segment_path(dir.path(), number).exists(), "segment {number} was never written to");
    }
    let ids: Vec<_> = (0..30).map(id).collect();
    let found: Vec<_> = store.get(&ids).into_iter().flatten().collect();
    assert_eq!(found.len() as u64 + report.entries_dropped, 30);
    assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
    assert!(store.put(chain(0, 30, &[100_000, 3000])).iter().all(Result::is_ok));
    assert_eq!(store.lookup(&ids).len(), 30);
}

#[test]
fn a_segment_that_cannot_be_opened_once_is_all_there_when_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), buffered()).unwrap();
    let objects = chain(0, 30, &[100_000, 3000]);
    assert!(store.put(objects).iter().all(Result::is_ok));
    store.close().unwrap();
    let (place, aside) = (segment_path(dir.path(), 1), dir.path().join("aside"));
    fs::rename(&place, &aside).unwrap();
    fs::create_dir(&place).unwrap();
    let ids: Vec<_> = (0..30).map(id).collect();
    let found = |store: &Store| store.get(&ids).into_iter().flatten().count();
    let store = Store::open(dir.path(), buffered()).unwrap();
    assert_eq!(store.open_report().unreadable_segments, ["00000001.seg"]);
    assert!(found(&store) < 30);
    store.close().unwrap();
    fs::remove_dir(&place).unwrap();
    fs::rename(&aside, &place).unwrap();
    let store = Store::open(dir.path(), buffered()).unwrap();
    assert_eq!(found(&store), 30);
    assert!(fetch(&store, all(store.lookup(&ids))).iter().all(Result::is_ok));
}

#[test]
fn a_record_smuggled_in_as_content_is_not_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreSettings { zstd_level: None, ..settings() }).unwrap();
    assert!(store.put(vec![object(1, 1, &[100])])[0].is_ok());
    let victim = entry(&store, id(1));
    let mut image = vec![0; victim.record_pages as usize * 4096];
    segment(dir.path(), 1).read_exact_at(&mut image, victim.spot.offset).unwrap();
    // A client that knows the format but not the generation, and hits the place by luck.
    let mut forged = crate::record::PlacedHeader::decode(&image).unwrap();
    forged.header.id = id(666);
    let place =
        crate::segment::Place { generation: 1, offset: victim.end() + 4096, segment: victim.spot.segment };
    forged.header.encode(place, 1000, 0, &mut image);
    let mut carrier = object(2, 2, &[64 << 10]);
    let mut bytes = carrier.planes[0].bytes.to_vec();
    // Where a page of the segment starts: behind the header of one plane.
    let page_at = 4096 - crate::record::header_bytes(1);
    bytes[page_at..page_at + image.len()].copy_from_slice(&image);
    carrier.planes[0].bytes = bytes.into();
    assert!(store.put(vec![carrier])[0].is_ok());
    let carrier = entry(&store, id(2));
    assert_eq!(carrier.spot.offset + 4096, place.offset);
    flip(&segment(dir.path(), 1), carrier.spot.offset, 1);
    store.close().unwrap();
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert_eq!(store.open_report().records_dropped.get(MissKind::WrongRecord), 1);
    assert!(store.lookup(&[id(666)]).is_empty());
    assert_eq!(store.lookup(&[id(1)]).len(), 1);
}

#[test]
fn a_store_of_a_newer_format_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(vec![object(1, 1, &LENS)])[0].is_ok());
    store.close().unwrap();
    let file = segment(dir.path(), 1);
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0).unwrap();
    page[8] = 2;
    let digest = blake3::hash(&page[..48]);
    page[48..64].copy_from_slice(&digest.as_bytes()[..16]);
    file.write_all_at(&page, 0).unwrap();
    let error = Store::open(dir.path(), settings()).err().unwrap();
    assert!(matches!(error, StoreError::NewerFormat { found: 2, supported: 1, .. }));
    assert!(error.to_string().contains("00000001.seg has format version 2"), "{error}");
}

#[test]
fn a_lost_header_page_loses_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(chain(0, 3, &LENS)).iter().all(Result::is_ok));
    store.close().unwrap();
    let file = segment(dir.path(), 1);
    let last_page_at = file.metadata().unwrap().len() - PAGE as u64;
    // The copy of the header stands in for it, and mends it.
    let (mut header, mut copy) = ([0; PAGE], [0; PAGE]);
    file.read_exact_at(&mut header, 0).unwrap();
    file.write_all_at(&[0; PAGE], 0).unwrap();
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(vec![object(40, 1, &LENS)])[0].is_ok());
    assert_eq!(entry(&store, id(40)).spot.segment.0, 1);
    store.close().unwrap();
    file.read_exact_at(&mut copy, 0).unwrap();
    assert_eq!(header, copy);
    // Without either of them.
    file.write_all_at(&[0; PAGE], 0).unwrap();
    file.write_all_at(&[0; PAGE], last_page_at).unwrap();
    for keep_index in [true, false] {
        if !keep_index {
            fs::remove_dir_all(dir.path().join("index")).unwrap();
        }
        let store = Store::open(dir.path(), settings()).unwrap();
        let found = store.lookup(&[id(0), id(1), id(2)]);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].located.spot.offset, RECORDS_AT);
        assert!(fetch(&store, all(found)).iter().all(Result::is_ok));
        // Not appended to: what cannot be read as a header is not built upon.
        assert!(store.put(vec![object(50 + u64::from(keep_index), 1, &LENS)])[0].is_ok());
        assert_ne!(entry(&store, id(50 + u64::from(keep_index))).spot.segment.0, 1);
    }
}

#[test]
fn a_full_segment_is_sealed_and_rebuilt_from_headers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert!(store.put(chain(0, 8, &[300_000])).iter().all(Result::is_ok));
    let first = entry(&store, id(0));
    store.close().unwrap();
    let file = segment(dir.path(), 1);
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, (1 << 20) - PAGE as u64).unwrap();
    let seal = SegmentPage::decode(PageKind::Seal, &page, dir.path()).unwrap().unwrap();
    assert_eq!((seal.id.0, seal.extent_bytes % PAGE as u64), (1, 0));
    // Damage in the payload of a sealed segment is not looked for at opening, and still never served.
    flip(&file, first.end() - 5000, 1);
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = Store::open(dir.path(), settings()).unwrap();
    assert_eq!(store.open_report().records_indexed, 8);
    let found = store.lookup(&(0..8).map(id).collect::<Vec<_>>());
    let got = fetch(&store, all(found));
    assert_eq!(got[0], Err(MissKind::Digest));
    assert!(got[1..].iter().all(Result::is_ok));
}

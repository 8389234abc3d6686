//! The parsers, fed with the fuzzers' corpus and random mutations of it: no panic, and some of it is accepted, so that the
//! mutations get past the first check. `make fuzz` goes further.
//!
//! `ESKER_WRITE_CORPUS=1` writes the sound examples to the corpus.

use std::path::PathBuf;

use esker_prefix::{Dtype, ObjectId, ObjectKind};

use super::common::{figures, id, object, settings};
use crate::codec::{self, Column, PlaneShape};
use crate::fuzzing;
use crate::io::sim::{Image, Random, SimDisk};
use crate::io::{BufferPool, Disk, read_exact};
use crate::lease;
use crate::{LeaseId, Store};

/// Of each file of the corpus.
const MUTATIONS: u64 = 1000;

type Parser = fn(&[u8]) -> bool;

const PARSERS: [(&str, Parser); 5] = [
    ("record_header", fuzzing::record_header),
    ("segment_page", fuzzing::segment_page),
    ("index_entry", fuzzing::index_entry),
    ("plane_columns", fuzzing::plane_columns),
    ("lease", fuzzing::lease),
];

#[test]
fn parsers_stand_the_corpus_and_mutations_of_it() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    if std::env::var_os("ESKER_WRITE_CORPUS").is_some() {
        write(&corpus);
    }
    let mut random = Random::new(figures::seed());
    for (name, parser) in PARSERS {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(corpus.join(name)).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        let seeds: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
        assert!(seeds.iter().filter(|seed| parser(seed)).count() > 0, "{name}: nothing sound in the corpus");
        let (mut fed, mut accepted) = (0, 0);
        for seed in &seeds {
            for _ in 0..MUTATIONS {
                let bytes = mutate(seed, &seeds, &mut random);
                fed += 1;
                accepted += u64::from(parser(&bytes));
            }
        }
        figures::report(&format!("parser_{name}"), &[("fed", fed), ("accepted", accepted)]);
        assert!(accepted > 0 && accepted < fed, "{name}: {accepted} of {fed} were accepted");
    }
}

fn mutate(seed: &[u8], seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.index(bytes.len().max(1));
        match random.below(7) {
            _ if bytes.is_empty() => bytes.push(0),
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.one_of(&[0, 1, 0x7f, 0x80, 0xff]),
            3 => {
                let word = random.one_of(&[0, 1, u32::MAX, 1 << 31, 4096, 1 << 20]).to_le_bytes();
                let end = bytes.len().min(at + 4);
                bytes[at..end].copy_from_slice(&word[..end - at]);
            }
            4 => bytes.truncate(at),
            5 => {
                let other = &seeds[random.index(seeds.len())];
                let from = random.index(other.len().max(1)).min(other.len());
                let len = random.index(64).min(other.len() - from).min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&other[from..from + len]);
            }
            _ => drop(bytes.splice(at..at, (0..random.below(16)).map(|byte| byte as u8))),
        }
    }
    bytes
}

/// What a small store leaves on its disk and in its index.
fn write(corpus: &std::path::Path) {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::open(Image::default(), u64::MAX);
    let small = crate::StoreSettings { segment_bytes: 64 << 10, ..settings() };
    let store = Store::open_on(dir.path(), small, disk.clone()).unwrap();
    let mut child = object(1, 1, &[40, 600, 3000]);
    child.parent = Some(id(0));
    assert!(
        store.put(vec![object(0, 0, &[]), child, object(2, 2, &[100, 40_000])]).iter().all(Result::is_ok)
    );
    assert!(store.put(vec![object(3, 3, &[30_000])])[0].is_ok());
    let entries: Vec<_> = store.shared.index.entries().map(Result::unwrap).collect();
    let states = store.shared.index.segments().unwrap();
    drop(store);
    let pool = BufferPool::new(0);
    let read = |segment: u64, offset: u64, len: usize| {
        let (file, _) = disk.open(&format!("{segment:08}.seg")).unwrap();
        read_exact(disk.as_ref(), &pool, file, offset, len).unwrap().to_vec()
    };
    let save = |target: &str, name: String, bytes: &[u8]| {
        std::fs::create_dir_all(corpus.join(target)).unwrap();
        std::fs::write(corpus.join(target).join(name), bytes).unwrap();
    };
    for (number, entry) in entries.iter().enumerate() {
        let len = (entry.record_pages as usize * 4096).min(12 << 10);
        let record = read(entry.spot.segment.0, entry.spot.offset, len);
        save("record_header", format!("record-{number}"), &record);
        save("index_entry", format!("entry-{number}"), &entry.encode());
    }
    for (number, (_, state)) in states.iter().enumerate() {
        save("index_entry", format!("state-{number}"), &state.encode());
    }
    let ends = [id(1), ObjectId { kind: ObjectKind::State, ..id(2) }];
    for (name, ends) in [("two", &ends[..]), ("given-up", &[])] {
        save("lease", name.into(), &lease::object(LeaseId([7; 32]), ends, 3600).planes[0].bytes);
    }
    save("segment_page", "header".into(), &read(1, 0, 4096)[..128]);
    save("segment_page", "seal".into(), &read(1, (64 << 10) - 4096, 4096)[..128]);
    for (name, dtype) in [("bf16", Dtype::Bf16), ("fp8", Dtype::F8E4m3), ("f32", Dtype::F32)] {
        let shape = PlaneShape::new(2, 64, &[Column { dtype, count: 16 }]);
        let width = usize::from(dtype == Dtype::Bf16) + 1 + 3 * usize::from(dtype == Dtype::F32);
        // Numbers near one: what the codec is made for.
        let raw: Vec<u8> = (0..2 * 64 * 16 * width)
            .map(|at| if at % width + 1 == width { 0x3f } else { (at * 37 % 64) as u8 })
            .collect();
        let mut stored = vec![0; raw.len()];
        let len = codec::encode(&shape, &raw, &mut stored).unwrap();
        let length = u16::try_from(raw.len()).unwrap().to_le_bytes();
        save("plane_columns", name.into(), &[&length, &stored[..len]].concat());
    }
}

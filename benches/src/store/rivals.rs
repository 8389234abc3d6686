//! Side by side: this store, RocksDB alone with its blob files (BlobDB), and the crate `foyer`, a hybrid cache with a disk
//! engine. The same blocks of V4-Flash, the same drive, one run, round about; what each is told is chosen for its good.
//!
//! | | a put is acknowledged when | a get proves |
//! |---|---|---|
//! | esker | its segment is flushed (`fdatasync`) and its entry is in the index | BLAKE3 of every plane, and that it is the block asked for |
//! | rocksdb, synced | RocksDB's log is flushed (`sync`), which writes it twice: log, later blob file | CRC32C of the blob |
//! | rocksdb, no log | never; what a round has put is flushed to blob files at its end, and that counts | the same |
//! | foyer | its writes are completed (O_DIRECT); it never flushes, and its files are flushed once at the end of a round | XXH3-64 of the entry, and the key |
//!
//! Eight writers put turns of 16 blocks and wait for each. Gets are cold: everything was closed and opened again, nothing reads
//! through the page cache, and foyer's memory holds next to nothing. Esker fetches whole prefixes, one after another, as its
//! callers do; the others, which know no prefixes, are asked for the same blocks in the same order, eight at a time.

mod blobdb;
#[cfg(feature = "foyer")]
mod foyer;

use std::path::Path;

use anyhow::{Context, ensure};
use bytes::Bytes;
use esker_prefix::ObjectId;
use esker_store::{PutObject, Store, StoreSettings};
use serde_json::{Map, Value};

use super::fetching::fetch_all;
use crate::measure::Rate;
use crate::{prefix, v4_flash};
use blobdb::BlobDb;

/// Callers at a time: of puts, and of gets of those that take one block at a time.
const CALLERS: usize = 8;
/// Blocks of one put.
const TURN_BLOCKS: usize = 16;
/// Blocks that a caller puts in one round.
const ROUND_BLOCKS: u32 = 64;
const ROUNDS: u32 = 3;

/// A block: its name and all its bytes, in one piece for those that know no planes.
#[derive(Clone)]
struct Blob {
    key: [u8; 32],
    bytes: Bytes,
}

/// Something that stores blocks by key.
trait Rival {
    /// Puts what each caller has, all callers at once, and returns when all of it is as durable as it gets.
    fn put(&self, callers: &[Vec<Blob>]) -> anyhow::Result<()>;
    /// Gets blocks, [`CALLERS`] at a time, and returns how many bytes came.
    fn get(&self, keys: &[[u8; 32]]) -> anyhow::Result<u64>;
    /// Closes and opens again, with nothing in memory.
    fn reopen(&mut self) -> anyhow::Result<()>;
}

pub(super) fn run(dir: &Path, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let mut rivals: Vec<(&str, Box<dyn Rival>)> = vec![
        ("rocksdb_blob", Box::new(BlobDb::open(&dir.join("blobdb"), true)?)),
        ("rocksdb_blob_no_log", Box::new(BlobDb::open(&dir.join("blobdb-no-log"), false)?)),
    ];
    #[cfg(feature = "foyer")]
    rivals.push(("foyer", Box::new(foyer::Foyer::open(&dir.join("foyer"))?)));
    let settings = StoreSettings { zstd_level: None, scrub_bytes_per_s: 0, ..StoreSettings::default() };
    let own = dir.join("esker");
    let store = Store::open(&own, settings.clone())?;

    let layout = v4_flash();
    let mut put = vec![Rate::default(); rivals.len() + 1];
    let mut ids: Vec<Vec<ObjectId>> = vec![Vec::new(); CALLERS];
    for round in 0..ROUNDS {
        let blocks = round * ROUND_BLOCKS..(round + 1) * ROUND_BLOCKS;
        let objects: Vec<Vec<PutObject>> =
            (0..CALLERS).map(|caller| prefix(&layout, 100 + caller as u32, blocks.clone())).collect();
        for (ids, objects) in ids.iter_mut().zip(&objects) {
            ids.extend(objects.iter().map(|object| object.id));
        }
        let bytes: u64 = objects.iter().flatten().map(PutObject::len_bytes).sum();
        let blobs: Vec<Vec<Blob>> =
            objects.iter().map(|objects| objects.iter().map(blob).collect()).collect();
        for (rate, (name, rival)) in put[1..].iter_mut().zip(&rivals) {
            rate.measure(|| {
                rival.put(&blobs).map(|()| bytes).with_context(|| format!("putting into {name}"))
            })?;
        }
        drop(blobs);
        put[0].measure(|| put_own(&store, objects).map(|()| bytes))?;
    }
    store.close()?;
    let store = Store::open(&own, settings)?;
    rivals.iter_mut().try_for_each(|(_, rival)| rival.reopen())?;

    let mut get = vec![Rate::default(); rivals.len() + 1];
    let expected = u64::from(ROUND_BLOCKS * ROUNDS) * layout_bytes();
    for ids in &ids {
        let keys: Vec<[u8; 32]> = ids.iter().map(|id| id.hash.0).collect();
        for (rate, (name, rival)) in get[1..].iter_mut().zip(&rivals) {
            let mut bytes = 0;
            rate.measure(|| {
                bytes = rival.get(&keys).with_context(|| format!("getting from {name}"))?;
                anyhow::Ok(bytes)
            })?;
            ensure!(bytes == expected, "{name} gave {bytes} of {expected} bytes");
        }
        let found = store.lookup(ids);
        ensure!(found.len() == ids.len(), "{} of {} blocks found", found.len(), ids.len());
        get[0].measure(|| fetch_all(&store, found))?;
    }
    store.close()?;

    let names = std::iter::once("esker").chain(rivals.iter().map(|(name, _)| *name));
    for ((name, put), get) in names.zip(&put).zip(&get) {
        figures.insert(format!("rivals_{name}_put_mb_s"), put.mb_s().into());
        figures.insert(format!("rivals_{name}_put_cpu_s_per_gib"), put.cpu_s_per_gib().into());
        figures.insert(format!("rivals_{name}_cold_get_mb_s"), get.mb_s().into());
        figures.insert(format!("rivals_{name}_cold_get_cpu_s_per_gib"), get.cpu_s_per_gib().into());
    }
    let best = |rates: &[Rate]| rates[1..].iter().map(Rate::mb_s).fold(0.0, f64::max);
    figures.insert("put_vs_best_rival".into(), (put[0].mb_s() / best(&put)).into());
    figures.insert("cold_get_vs_best_rival".into(), (get[0].mb_s() / best(&get)).into());
    if cfg!(not(feature = "foyer")) {
        figures.insert(
            "rivals_foyer".into(),
            "not built in: cargo build --release -p esker-server --features rivals".into(),
        );
    }
    Ok(())
}

/// Bytes of the planes of a block.
fn layout_bytes() -> u64 {
    v4_flash().planes(esker_prefix::ObjectKind::Block).iter().map(|plane| plane.len_bytes).sum()
}

fn blob(object: &PutObject) -> Blob {
    let planes: Vec<&[u8]> = object.planes.iter().map(|plane| &plane.bytes[..]).collect();
    Blob { key: object.id.hash.0, bytes: planes.concat().into() }
}

fn put_own(store: &Store, callers: Vec<Vec<PutObject>>) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let callers: Vec<_> = callers
            .into_iter()
            .map(|objects| {
                scope.spawn(move || {
                    let mut objects = objects.into_iter().peekable();
                    while objects.peek().is_some() {
                        let turn = objects.by_ref().take(TURN_BLOCKS).collect();
                        store.put(turn).into_iter().try_for_each(|outcome| outcome.map(drop))?;
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        callers.into_iter().try_for_each(|caller| caller.join().expect("a caller"))
    })
}

//! Opening a store of many blocks, with its index and without.

use std::path::Path;
use std::time::Instant;

use esker_prefix::ObjectId;
use esker_store::{Store, StoreSettings};
use serde_json::{Map, Value, json};

use super::{Bed, chain};
use crate::measure::Rate;
use crate::{floor, identity, v4_flash};

/// Blocks of one conversation.
const CHAIN_BLOCKS: u32 = 1000;
/// Conversations put at once.
const WRITERS: u32 = 8;
/// Reads in flight while headers are read without anything else.
const HEADER_DEPTH: usize = 32;

/// Opens a store of `blocks` small blocks.
pub(super) fn open(dir: &Path, blocks: u64, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let layout = v4_flash();
    let (scope, namespace) = identity(&layout);
    let store = Store::open(dir, StoreSettings::default())?;
    let chains = u32::try_from(blocks / u64::from(CHAIN_BLOCKS))?.max(1);
    let started = Instant::now();
    for first in (0..chains).step_by(WRITERS as usize) {
        std::thread::scope(|threads| {
            let writers: Vec<_> = (first..chains.min(first + WRITERS))
                .map(|seed| {
                    let (store, layout, scope) = (&store, &layout, &scope);
                    threads.spawn(move || {
                        let links = chain(layout, scope, namespace, seed, CHAIN_BLOCKS);
                        let empty = links.iter().map(|link| link.empty()).collect();
                        store.put(empty).into_iter().try_for_each(|outcome| outcome.map(drop))
                    })
                })
                .collect();
            writers.into_iter().try_for_each(|writer| writer.join().expect("a writer"))
        })?;
    }
    let objects = store.stats().objects;
    figures.insert("small_puts_per_s".into(), (objects as f64 / started.elapsed().as_secs_f64()).into());
    store.close()?;
    let million = 1e6 / objects as f64;

    // The first opening writes out RocksDB's log; the second is what a restart sees.
    Store::open(dir, StoreSettings::default())?.close()?;
    let started = Instant::now();
    let store = Store::open(dir, StoreSettings::default())?;
    figures.insert("open_s_per_million_blocks".into(), (started.elapsed().as_secs_f64() * million).into());
    let stats = store.stats();
    anyhow::ensure!(stats.objects == objects, "{} of {objects} blocks after opening", stats.objects);
    figures.insert("index_bytes_per_block".into(), (stats.table_bytes as f64 / objects as f64).into());
    figures.insert("open_blocks".into(), json!(objects));
    store.close()?;

    std::fs::remove_dir_all(dir.join("index"))?;
    let started = Instant::now();
    let store = Store::open(dir, StoreSettings::default())?;
    figures.insert(
        "rebuild_s_per_million_small_blocks".into(),
        (started.elapsed().as_secs_f64() * million).into(),
    );
    anyhow::ensure!(store.stats().objects == objects, "blocks were lost in the rebuild");
    Ok(())
}

/// Rebuilds the index of V4-Flash blocks, against plain reads of the pages that hold their headers.
pub(super) fn rebuild(
    bed: Bed,
    prefixes: &[Vec<ObjectId>],
    figures: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    let Bed { dir, settings, store, disk } = bed;
    let blocks = prefixes.iter().map(Vec::len).sum::<usize>();
    store.close()?;
    // Seals the last segment, so that only headers need to be read of any.
    let (mut rebuild, mut floor) = (Rate::default(), Rate::default());
    for _ in 0..3 {
        std::fs::remove_dir_all(dir.join("index"))?;
        let mut read_bytes = 0;
        rebuild.measure(|| {
            let store = Store::open(&dir, settings.clone())?;
            read_bytes = store.stats().read_bytes;
            anyhow::ensure!(store.open_report().records_indexed as usize >= blocks, "blocks were lost");
            store.close()?;
            anyhow::Ok(read_bytes)
        })?;
        let count = usize::try_from(read_bytes)? / REBUILD_READ_BYTES;
        let all = floor::segment_extents(&*disk, u64::MAX)?;
        let step = (all.len() / count.max(1)).max(1);
        let extents: Vec<_> = (0..count)
            .map(|read| {
                let (file, offset, _) = all[read * step % all.len()];
                (
                    file,
                    offset + (read * step / all.len()) as u64 * REBUILD_READ_BYTES as u64,
                    REBUILD_READ_BYTES,
                )
            })
            .collect();
        floor.measure(|| floor::read(&*disk, &extents, HEADER_DEPTH))?;
    }
    figures.insert("rebuild_mb_s".into(), rebuild.mb_s().into());
    figures.insert("rebuild_vs_floor".into(), (rebuild.mb_s() / floor.mb_s()).into());
    figures
        .insert("rebuild_read_bytes_per_block".into(), (rebuild.bytes as f64 / 3.0 / blocks as f64).into());
    figures.insert("rebuild_s_per_100_gb".into(), {
        let stored: f64 = blocks as f64 * 450e3;
        (rebuild.wall_s / 3.0 / (stored / 1e11)).into()
    });
    Ok(())
}

/// Bytes that a rebuild reads at once.
const REBUILD_READ_BYTES: usize = 64 << 10;

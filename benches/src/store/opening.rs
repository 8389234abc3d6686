//! Opening a store of many blocks, with its index and without.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use esker_store::io::{Disk, FileId, IoEngine, Op, OpKind, Region};
use esker_store::{REBUILD_SCANS, Store, StoreSettings};
use serde_json::{Map, Value, json};

use super::{BLOCKS, Bed, chain};
use crate::floor::Extent;
use crate::measure::Rate;
use crate::{floor, identity, prefix, v4_flash};

/// Rebuilds.
const ROUNDS: u32 = 9;
/// Put at once to fill the segment that is being written.
const FILLING_BLOCKS: u32 = 32;
/// Blocks of one conversation.
const CHAIN_BLOCKS: u32 = 1000;
/// So much shorter than usual are the segments of a store that is rebuilt.
const SHORTER: u64 = 8;
/// Conversations put at once.
const WRITERS: u32 = 8;

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

    // The floor: the very reads of the rebuild, as for large records below.
    std::fs::remove_dir_all(dir.join("index"))?;
    let settings = StoreSettings::default();
    let (disk, _) = esker_store::io::choose(&dir.join("segments"), &settings.io_engines)?;
    let disk = Recording::new(disk);
    let started = Instant::now();
    let store = Store::open_on(dir, settings, disk.clone())?;
    let rebuild_s = started.elapsed().as_secs_f64();
    figures.insert("rebuild_s_per_million_small_blocks".into(), (rebuild_s * million).into());
    let extents = disk.take();
    let mut floor = Rate::default();
    floor.measure(|| floor::read(&*disk, &extents, REBUILD_SCANS))?;
    figures.insert("rebuild_small_vs_floor".into(), (floor.wall_s / rebuild_s).into());
    figures.insert("rebuild_small_floor_mb_s".into(), floor.mb_s().into());
    anyhow::ensure!(store.stats().objects == objects, "blocks were lost in the rebuild");
    Ok(())
}

/// Rebuilds the index of V4-Flash blocks. The floor reads the very same stretches of the same files, in the same order,
/// through the same disk, with as many in flight as the rebuild has at most, and does nothing with them. What the rebuild
/// does besides is in its time and not in the floor's: writing RocksDB, verifying what is not sealed. Of that, the one
/// segment that is being filled, which is written again as well, there is little: it would be much of a store as short as this one.
/// Likewise its segments are short, so that there are as many as in a store of [`SHORTER`] times its length: of few, those
/// scanned last leave most of the drive idle.
pub(super) fn rebuild(dir: &Path, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let settings = StoreSettings { zstd_level: None, ..StoreSettings::default() };
    let segment_bytes = settings.segment_bytes / SHORTER;
    let Bed { settings, store, disk } = Bed::with(dir, StoreSettings { segment_bytes, ..settings })?;
    for seed in 0..WRITERS {
        for first in (0..BLOCKS).step_by(FILLING_BLOCKS as usize) {
            let blocks = prefix(&v4_flash(), seed, first..BLOCKS.min(first + FILLING_BLOCKS));
            store.put(blocks).into_iter().try_for_each(|outcome| outcome.map(drop))?;
        }
    }
    let blocks = (WRITERS * BLOCKS) as usize;
    let begun = store.stats().segments;
    for seed in 5000.. {
        store
            .put(prefix(&v4_flash(), seed, 0..FILLING_BLOCKS))
            .into_iter()
            .try_for_each(|outcome| outcome.map(drop))?;
        if store.stats().segments > begun {
            break;
        }
    }
    store.close()?;
    let disk = Recording::new(disk);
    let (mut rebuild, mut floor, mut empty_s, mut records) = (Rate::default(), Rate::default(), 0.0, 0);
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let before = (rebuild.wall_s, floor.wall_s);
        let empty = dir.join(format!("empty-{round}"));
        let started = Instant::now();
        Store::open(&empty, settings.clone())?.close()?;
        let made_s = started.elapsed().as_secs_f64();
        empty_s += made_s;
        std::fs::remove_dir_all(empty)?;
        std::fs::remove_dir_all(dir.join("index"))?;
        disk.take();
        rebuild.measure(|| {
            let store = Store::open_on(dir, settings.clone(), disk.clone())?;
            let read_bytes = store.stats().read_bytes;
            records = store.open_report().records_indexed;
            anyhow::ensure!(records as usize >= blocks, "blocks were lost");
            store.close()?;
            anyhow::Ok(read_bytes)
        })?;
        let extents = disk.take();
        floor.measure(|| floor::read(&*disk, &extents, REBUILD_SCANS))?;
        ratios.push((floor.wall_s - before.1) / (rebuild.wall_s - before.0 - made_s));
    }
    ratios.sort_by(f64::total_cmp);
    let records = records as f64;
    figures.insert("rebuild_mb_s".into(), rebuild.mb_s().into());
    figures.insert("rebuild_floor_mb_s".into(), floor.mb_s().into());
    // Making RocksDB and closing it takes the same time for a store of any length, and most of it for one as short as this. The
    // median round: a flush that the drive takes its time for is as long as the rest.
    figures.insert("rebuild_vs_floor".into(), ratios[ratios.len() / 2].into());
    figures.insert("rebuild_vs_floor_each_round".into(), json!(ratios));
    figures.insert("rebuild_and_empty_opening_vs_floor".into(), (floor.wall_s / rebuild.wall_s).into());
    figures.insert("empty_opening_ms".into(), (1e3 * empty_s / f64::from(ROUNDS)).into());
    figures.insert("rebuild_blocks".into(), records.into());
    let bytes_per_block = rebuild.bytes as f64 / f64::from(ROUNDS) / records;
    figures.insert("rebuild_read_bytes_per_block".into(), bytes_per_block.into());
    figures.insert("rebuild_s_per_100_gb".into(), {
        let stored = records * 450e3;
        ((rebuild.wall_s - empty_s) / f64::from(ROUNDS) / (stored / 1e11)).into()
    });
    Ok(())
}

/// A disk that remembers what was read.
struct Recording {
    inner: Arc<dyn Disk>,
    read: Mutex<Vec<Extent>>,
}

impl Recording {
    fn new(inner: Arc<dyn Disk>) -> Arc<Self> {
        Arc::new(Self { inner, read: Mutex::default() })
    }

    fn take(&self) -> Vec<Extent> {
        std::mem::take(&mut self.read.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Disk for Recording {
    fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId> {
        self.inner.create(name, len_bytes)
    }

    fn open(&self, name: &str) -> io::Result<(FileId, u64)> {
        self.inner.open(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn punch(&self, file: FileId, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.inner.punch(file, offset, len_bytes)
    }

    fn allocated_bytes(&self, file: FileId) -> io::Result<u64> {
        self.inner.allocated_bytes(file)
    }

    fn next_data(&self, file: FileId, offset: u64) -> u64 {
        self.inner.next_data(file, offset)
    }

    fn next_hole(&self, file: FileId, offset: u64) -> u64 {
        self.inner.next_hole(file, offset)
    }

    fn read_now(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Option<io::Result<usize>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).push((file, offset, buf.len()));
        self.inner.read_now(file, offset, buf)
    }

    fn register(&self, region: &Arc<Region>) -> io::Result<()> {
        self.inner.register(region)
    }

    fn in_flight(&self) -> u64 {
        self.inner.in_flight()
    }

    fn submit(&self, op: Op) {
        if op.kind == OpKind::Read {
            let extent = (op.file, op.offset, op.len_bytes());
            self.read.lock().unwrap_or_else(PoisonError::into_inner).push(extent);
        }
        self.inner.submit(op);
    }

    fn engine(&self) -> IoEngine {
        self.inner.engine()
    }
}

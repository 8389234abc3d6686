//! Put and cold fetch of V4-Flash blocks, against the drive itself: the same files read and written through the
//! same io_uring disk in one-mebibyte transfers, sixteen in flight, nothing else.
//!
//! Machines are shared, so the figures that count are ratios of one run. Prints one JSON object. The store is made in
//! `$ESKER_BENCH_DIR`, the current folder by default: it must lie on the drive to be measured.

use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, bail};
use esker_benches::{prefix, v4_flash};
use esker_store::io::{self, BufferPool, Disk, Op};
use esker_store::{FetchEvent, FetchOrder, FetchRequest, PlaneSelection, Store, StoreSettings};
use serde_json::json;

/// 100,096 tokens.
const BLOCKS: u32 = 782;
const PREFIXES: u32 = 4;
const ROUNDS: usize = 3;
const TRANSFER_BYTES: usize = 1 << 20;
const DEPTH: usize = 16;

fn main() -> anyhow::Result<()> {
    let parent = std::env::var("ESKER_BENCH_DIR").unwrap_or_else(|_| ".".into());
    let dir = tempfile::tempdir_in(&parent).with_context(|| format!("cannot make a folder in {parent}"))?;
    let settings = StoreSettings { zstd_level: None, ..StoreSettings::default() };
    let segments = dir.path().join("store/segments");
    let store = Store::open(&dir.path().join("store"), settings.clone())?;
    let (disk, _) = io::choose(&segments, &settings.io_engines)?;

    let layout = v4_flash();
    let mut prefixes = Vec::new();
    let mut put = Rate::default();
    for seed in 0..PREFIXES {
        let objects = prefix(&layout, seed, BLOCKS);
        prefixes.push(objects.iter().map(|object| object.id).collect::<Vec<_>>());
        let bytes = objects.iter().map(esker_store::PutObject::len_bytes).sum::<u64>();
        put.measure(|| {
            store.put(objects).into_iter().try_for_each(|outcome| outcome.map(drop)).map(|()| bytes)
        })?;
    }
    let write_floor = write_floor(&*disk, put.bytes)?;

    let mut fetch = Rate::default();
    let mut read_floor = Rate::default();
    for round in 0..ROUNDS {
        // Alternating, so that a busy neighbour meets both.
        read_floor.measure(|| read_all(&*disk, put.bytes))?;
        for ids in &prefixes {
            let objects = store.lookup(ids)?;
            if objects.len() != ids.len() {
                bail!("round {round}: {} of {} blocks found", objects.len(), ids.len());
            }
            fetch.measure(|| fetch_all(&store, objects))?;
        }
    }
    let report = json!({
        "io": store.open_report().engine.to_string(),
        "put_mb_s": put.mb_s(),
        "put_durable_vs_floor": put.mb_s() / write_floor.mb_s(),
        "fetch_mb_s": fetch.mb_s(),
        "fetch_raw_vs_floor": fetch.mb_s() / read_floor.mb_s(),
        "fetch_cpu_s_per_gib": fetch.cpu_s / (fetch.bytes as f64 / f64::from(1 << 30)),
        "read_floor_mb_s": read_floor.mb_s(),
        "read_floor_cpu_s_per_gib": read_floor.cpu_s / (read_floor.bytes as f64 / f64::from(1 << 30)),
        "write_floor_mb_s": write_floor.mb_s(),
    });
    println!("{report:#}");
    Ok(())
}

/// Fetches and verifies all planes.
fn fetch_all(store: &Store, objects: Vec<esker_store::Found>) -> anyhow::Result<u64> {
    let request =
        FetchRequest { objects, planes: PlaneSelection::All, order: FetchOrder::ByObject, deadline: None };
    let mut bytes = 0;
    for event in store.fetch(request) {
        match event {
            FetchEvent::Plane { bytes: plane, .. } => bytes += plane.len() as u64,
            FetchEvent::Miss { object, kind } => bail!("object {object} is missing: {kind}"),
        }
    }
    Ok(bytes)
}

/// Reads the store's segments from end to end, up to `limit` bytes.
fn read_all(disk: &dyn Disk, limit: u64) -> anyhow::Result<u64> {
    let mut names = disk.list()?;
    names.retain(|name| name.ends_with(".seg"));
    names.sort();
    let mut places = Vec::new();
    for name in names {
        let (file, len) = disk.open(&name)?;
        places.extend((0..len / TRANSFER_BYTES as u64).map(|index| (file, index * TRANSFER_BYTES as u64)));
    }
    places.truncate(usize::try_from(limit)? / TRANSFER_BYTES);
    let pool = BufferPool::new(2 * DEPTH * TRANSFER_BYTES);
    transfer(disk, places.len(), |index, tag, reply| {
        let (file, offset) = places[index];
        Op::read(file, offset, pool.take(TRANSFER_BYTES), tag, reply)
    })
}

/// Writes `bytes` to a preallocated file and flushes it, as often as the store commits.
fn write_floor(disk: &dyn Disk, bytes: u64) -> anyhow::Result<Rate> {
    const NAME: &str = "write-floor.tmp";
    let count = usize::try_from(bytes)? / TRANSFER_BYTES;
    let file = disk.create(NAME, (count * TRANSFER_BYTES) as u64)?;
    let pool = BufferPool::new(2 * DEPTH * TRANSFER_BYTES);
    let per_commit = StoreSettings::default().commit_bytes / TRANSFER_BYTES;
    let mut rate = Rate::default();
    rate.measure(|| {
        let mut written = 0;
        for start in (0..count).step_by(per_commit) {
            written += transfer(disk, per_commit.min(count - start), |index, tag, reply| {
                let offset = ((start + index) * TRANSFER_BYTES) as u64;
                Op::write(file, offset, pool.take(TRANSFER_BYTES), tag, reply)
            })?;
            let (reply, completions) = mpsc::channel();
            disk.submit(Op::sync(file, 0, &reply));
            completions.recv()?.full()?;
        }
        anyhow::Ok(written)
    })?;
    disk.remove(NAME)?;
    Ok(rate)
}

/// Runs `count` transfers, [`DEPTH`] at a time.
fn transfer(
    disk: &dyn Disk,
    count: usize,
    op: impl Fn(usize, u64, &mpsc::Sender<io::Completion>) -> Op,
) -> anyhow::Result<u64> {
    let (reply, completions) = mpsc::channel();
    let mut bytes = 0;
    for index in 0..count + DEPTH {
        if index < count {
            disk.submit(op(index, index as u64, &reply));
        }
        if index >= DEPTH.min(count) && bytes < (count * TRANSFER_BYTES) as u64 {
            let completion = completions.recv()?;
            bytes += completion.wanted_bytes as u64;
            completion.full()?;
        }
    }
    Ok(bytes)
}

/// Bytes, and the time and CPU they took.
#[derive(Default)]
struct Rate {
    bytes: u64,
    wall_s: f64,
    cpu_s: f64,
}

impl Rate {
    fn measure<E>(&mut self, work: impl FnOnce() -> Result<u64, E>) -> Result<(), E> {
        let (started, cpu) = (Instant::now(), cpu_s());
        self.bytes += work()?;
        self.wall_s += started.elapsed().as_secs_f64();
        self.cpu_s += cpu_s() - cpu;
        Ok(())
    }

    fn mb_s(&self) -> f64 {
        self.bytes as f64 / self.wall_s / 1e6
    }
}

/// User and system time of this process, all threads; in Linux's ticks of 10 ms.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

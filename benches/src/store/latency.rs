//! Times of single calls: lookups, the first plane of a fetch, and fetches while others write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use esker_prefix::{ObjectId, ObjectKind};
use esker_store::{FetchEvent, FetchOrder, FetchRequest, PlaneSelection};
use serde_json::{Map, Value};

use super::fetching::fetch_all;
use super::{Bed, chain};
use crate::measure::{percentile_us, times};
use crate::{floor, identity, prefix, v4_flash};

const LOOKUP_BLOCKS: u32 = 8192;
/// Of the longest chain that a lookup takes.
const LONGEST_BLOCKS: u32 = 65_536;
const CHAINS: u32 = 4;
const LOOKUPS: usize = 2000;
const FIRST_PLANES: usize = 200;
/// Between two reads that are timed alone.
const SETTLE: Duration = Duration::from_millis(20);
/// Blocks of a fetch that is timed beside writers: some 8,000 tokens.
const MIXED_BLOCKS: usize = 64;
const MIXED_FETCHES: usize = 150;
/// Blocks of one put of the writer beside them.
const TURN_BLOCKS: u32 = 16;
const WRITERS: u32 = 8;

pub(super) fn run(
    bed: &Bed,
    prefixes: &[Vec<ObjectId>],
    figures: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    lookup(bed, figures)?;
    first_plane(bed, prefixes, figures)?;
    mixed(bed, prefixes, figures)
}

/// Chains of blocks without planes, put turn by turn among each other, so that neighbours do not lie side by side: their
/// first blocks, and the longest that a lookup takes.
fn lookup(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let layout = v4_flash();
    let (scope, namespace) = identity(&layout);
    let chains: Vec<_> =
        (4000..4000 + CHAINS).map(|seed| chain(&layout, &scope, namespace, seed, LONGEST_BLOCKS)).collect();
    for first in (0..LONGEST_BLOCKS as usize).step_by(TURN_BLOCKS as usize) {
        let turn = chains.iter().flat_map(|links| &links[first..first + TURN_BLOCKS as usize]);
        let turn = turn.map(|link| link.empty()).collect();
        bed.store.put(turn).into_iter().try_for_each(|outcome| outcome.map(drop))?;
    }
    let ids: Vec<ObjectId> =
        chains[0].iter().map(|link| ObjectId { kind: ObjectKind::Block, hash: link.hash }).collect();
    let mut some = times(LOOKUPS, || bed.found(&ids[..LOOKUP_BLOCKS as usize]).map(drop))?;
    figures.insert("lookup_p50_us".into(), percentile_us(&mut some, 0.5).into());
    figures.insert("lookup_p99_us".into(), percentile_us(&mut some, 0.99).into());
    let mut all = times(LOOKUPS / 10, || bed.found(&ids).map(drop))?;
    figures.insert("lookup_of_65536_p99_us".into(), percentile_us(&mut all, 0.99).into());
    Ok(())
}

/// From the call to the first verified plane, against one raw read of the same size.
fn first_plane(
    bed: &Bed,
    prefixes: &[Vec<ObjectId>],
    figures: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    let plane_bytes = v4_flash().planes(ObjectKind::Block)[0].len_bytes;
    let read_bytes = usize::try_from(plane_bytes)?.next_multiple_of(esker_store::io::PAGE);
    let places = floor::segment_extents(&*bed.disk, u64::MAX)?;
    let (mut raw, mut first) = (Vec::new(), Vec::new());
    for round in 0..FIRST_PLANES {
        // Steps that visit all of the drive in an order that no read-ahead foresees.
        let (file, offset, _) = places[round * 7919 % places.len()];
        raw.extend(times(1, || floor::read(&*bed.disk, &[(file, offset, read_bytes)], 1).map(drop))?);
        std::thread::sleep(SETTLE);
        let ids = &prefixes[round * 31 % prefixes.len()];
        let from = round * 17 % (ids.len() - MIXED_BLOCKS);
        let objects = bed.found(&ids[from..from + MIXED_BLOCKS])?;
        // Its end, when what was used is written down, is not timed.
        let mut fetch = None;
        first.extend(times(1, || {
            let request = FetchRequest {
                objects: objects.clone(),
                planes: PlaneSelection::All,
                order: FetchOrder::ByObject,
                deadline: None,
            };
            let event = fetch.insert(bed.store.fetch(request)).next();
            anyhow::ensure!(matches!(event, Some(FetchEvent::Plane { .. })), "a plane is missing");
            Ok(())
        })?);
        drop(fetch);
        // What is still being read ahead would delay the next one.
        std::thread::sleep(SETTLE);
    }
    let (raw, first) = (percentile_us(&mut raw, 0.5), percentile_us(&mut first, 0.5));
    figures.insert("first_plane_raw_read_us_p50".into(), raw.into());
    figures.insert("first_plane_us_p50".into(), first.into());
    figures.insert("first_plane_vs_raw_read".into(), (first / raw).into());
    Ok(())
}

/// p99 of fetches while puts run at half of what the drive can write, against the p99 without them. Fetches come at the same
/// times in both: as often as leaves the drive idle for two thirds of the time, since a drive that reads all it can has
/// nothing left for puts.
fn mixed(bed: &Bed, prefixes: &[Vec<ObjectId>], figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let fetch = |round: usize| {
        let ids = &prefixes[round * 31 % prefixes.len()];
        let from = round * 17 % (ids.len() - MIXED_BLOCKS);
        fetch_all(&bed.store, bed.found(&ids[from..from + MIXED_BLOCKS])?).map(drop)
    };
    let mut rounds = 0..;
    let mut alone = times(MIXED_FETCHES / 4, || fetch(rounds.next().unwrap_or(0)))?;
    let period = Duration::from_secs_f64(percentile_us(&mut alone, 0.5) * 3.0 / 1e6);
    let fetches = || -> anyhow::Result<Vec<Duration>> {
        let started = Instant::now();
        let mut taken = Vec::new();
        for round in 0..MIXED_FETCHES {
            let due = period * u32::try_from(round)?;
            std::thread::sleep(due.saturating_sub(started.elapsed()));
            taken.extend(times(1, || fetch(round))?);
        }
        Ok(taken)
    };
    let mut idle = fetches()?;
    let floor_mb_s = figures.get("write_floor_mb_s").and_then(Value::as_f64).unwrap_or(f64::INFINITY);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut busy, elapsed_s) = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (stop, written) = (&stop, &written);
                let mb_s = floor_mb_s / 2.0 / f64::from(WRITERS);
                scope.spawn(move || write_at(bed, 2000 + writer * 250, mb_s, stop, written))
            })
            .collect();
        // The writers reach their speed.
        std::thread::sleep(Duration::from_millis(300));
        written.store(0, Ordering::Relaxed);
        let started = Instant::now();
        let busy = fetches();
        let elapsed_s = started.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer"))?;
        anyhow::Ok((busy?, elapsed_s))
    })?;
    let (idle, busy) = (percentile_us(&mut idle, 0.99), percentile_us(&mut busy, 0.99));
    figures.insert("idle_read_p99_us".into(), idle.into());
    figures.insert("mixed_read_p99_us".into(), busy.into());
    figures.insert("mixed_read_p99_vs_idle".into(), (busy / idle).into());
    let share = written.load(Ordering::Relaxed) as f64 / elapsed_s / 1e6 / floor_mb_s;
    figures.insert("mixed_write_share_of_floor".into(), share.into());
    Ok(())
}

/// Puts new blocks at `mb_s` until told to stop.
fn write_at(
    bed: &Bed,
    first_seed: u32,
    mb_s: f64,
    stop: &AtomicBool,
    written: &AtomicU64,
) -> anyhow::Result<()> {
    let layout = v4_flash();
    let (scope, namespace) = identity(&layout);
    // The same bytes under other names, so that only the store's own work meets the fetches.
    let planes: Vec<Vec<bytes::Bytes>> = prefix(&layout, first_seed, 0..TURN_BLOCKS)
        .into_iter()
        .map(|object| object.planes.into_iter().map(|plane| plane.bytes).collect())
        .collect();
    let started = Instant::now();
    let mut mine = 0;
    for seed in first_seed + 1.. {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let links = chain(&layout, &scope, namespace, seed, TURN_BLOCKS);
        let turn: Vec<_> =
            links.iter().zip(&planes).map(|(link, planes)| link.object(&layout, planes.clone())).collect();
        let bytes: u64 = turn.iter().map(esker_store::PutObject::len_bytes).sum();
        bed.store.put(turn).into_iter().try_for_each(|outcome| outcome.map(drop))?;
        written.fetch_add(bytes, Ordering::Relaxed);
        mine += bytes;
        let due = Duration::from_secs_f64(mine as f64 / mb_s / 1e6);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    Ok(())
}

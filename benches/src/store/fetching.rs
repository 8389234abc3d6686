//! Cold fetches of whole prefixes, verified, against plain reads of the same segments.

use std::path::Path;

use esker_prefix::ObjectId;
use esker_store::{FetchEvent, FetchOrder, FetchRequest, Found, PlaneSelection, Store};
use serde_json::{Map, Value};

use super::{BLOCKS, Bed, RealBlocks, real_prefix};
use crate::floor::{self, Floor};
use crate::measure::Rate;

const ROUNDS: usize = 4;
const REAL_PREFIXES: u32 = 8;

pub(super) fn raw(
    bed: &Bed,
    prefixes: &[Vec<ObjectId>],
    figures: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    let (fetch, floor, depth) = alternate(bed, prefixes)?;
    figures.insert("read_floor_in_flight".into(), depth.into());
    figures.insert("fetch_mb_s".into(), fetch.mb_s().into());
    figures.insert("read_floor_mb_s".into(), floor.mb_s().into());
    figures.insert("fetch_raw_vs_floor".into(), (fetch.mb_s() / floor.mb_s()).into());
    figures.insert("fetch_cpu_s_per_gib".into(), fetch.cpu_s_per_gib().into());
    figures.insert("read_floor_cpu_s_per_gib".into(), floor.cpu_s_per_gib().into());
    Ok(())
}

/// The same with real latents, compressed on disk: decoded bytes against what the drive can give of stored ones.
pub(super) fn decoded(dir: &Path, real: &RealBlocks, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let bed = Bed::new(dir, Some(1))?;
    let mut prefixes = Vec::new();
    for seed in 0..REAL_PREFIXES {
        let objects = real_prefix(real, seed, BLOCKS);
        prefixes.push(objects.iter().map(|object| object.id).collect::<Vec<_>>());
        bed.store.put(objects).into_iter().try_for_each(|outcome| outcome.map(drop))?;
    }
    let (fetch, floor, _) = alternate(&bed, &prefixes)?;
    figures.insert("fetch_decoded_mb_s".into(), fetch.mb_s().into());
    figures.insert("fetch_decoded_floor_mb_s".into(), floor.mb_s().into());
    figures.insert("fetch_decoded_vs_floor".into(), (fetch.mb_s() / floor.mb_s()).into());
    figures.insert("fetch_decoded_cpu_s_per_gib".into(), fetch.cpu_s_per_gib().into());
    Ok(())
}

/// Fetches and plain reads in turn, either first in every other round; and how many of the reads were in flight.
fn alternate(bed: &Bed, prefixes: &[Vec<ObjectId>]) -> anyhow::Result<(Rate, Rate, usize)> {
    let (mut fetch, mut plain) = (Rate::default(), Rate::default());
    let stored: u64 =
        prefixes.iter().flat_map(|ids| bed.store.lookup(ids)).map(|found| found.stored_bytes).sum();
    let extents = floor::segment_extents(&*bed.disk, stored)?;
    let mut floor = Floor::new(&bed.disk);
    floor.warm(&extents)?;
    let share = extents.len().div_ceil(prefixes.len());
    for round in 0..ROUNDS {
        for (ids, extents) in prefixes.iter().zip(extents.chunks(share)) {
            let objects = bed.found(ids)?;
            let mut read = || plain.measure(|| floor.read(extents));
            let mut fetch = || fetch.measure(|| fetch_all(&bed.store, objects.clone()));
            if round % 2 == 0 {
                read()?;
                fetch()?;
            } else {
                fetch()?;
                read()?;
            }
        }
    }
    Ok((fetch, plain, floor.depth()))
}

/// Fetches and verifies all planes.
pub(super) fn fetch_all(store: &Store, objects: Vec<Found>) -> anyhow::Result<u64> {
    let request =
        FetchRequest { objects, planes: PlaneSelection::All, order: FetchOrder::ByObject, deadline: None };
    let mut bytes = 0;
    for event in store.fetch(request) {
        match event {
            FetchEvent::Plane { bytes: plane, .. } => bytes += plane.len() as u64,
            FetchEvent::Miss { object, kind } => anyhow::bail!("object {object} is missing: {kind}"),
        }
    }
    Ok(bytes)
}

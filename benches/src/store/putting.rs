//! Acknowledged durable puts of eight writers, against preallocated writes and flushes of the same bytes.

use esker_prefix::ObjectId;
use serde_json::{Map, Value, json};

use super::{BLOCKS, Bed};
use crate::floor::Floor;
use crate::measure::Rate;
use crate::{prefix, v4_flash};

const WRITERS: u32 = 8;
/// Blocks of one put: a turn of some two thousand tokens.
const BLOCKS_PER_PUT: usize = 16;
/// Each writes its share of the blocks in this many rounds, each beside a measurement of the floor.
const ROUNDS: u32 = 4;

/// Writes one prefix for each writer; returns the names of their blocks.
pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<Vec<Vec<ObjectId>>> {
    let layout = v4_flash();
    let (mut put, mut write_floor) = (Rate::default(), Rate::default());
    let mut prefixes = vec![Vec::new(); WRITERS as usize];
    let mut floor = Floor::new(&bed.disk);
    // Touches its buffers.
    floor.write(64 << 20)?;
    for round in 0..ROUNDS {
        let share = BLOCKS.div_ceil(ROUNDS);
        let blocks = round * share..BLOCKS.min((round + 1) * share);
        let made: Vec<_> = (0..WRITERS).map(|writer| prefix(&layout, writer, blocks.clone())).collect();
        for (ids, objects) in prefixes.iter_mut().zip(&made) {
            ids.extend(objects.iter().map(|object| object.id));
        }
        let bytes: u64 = made.iter().flatten().map(esker_store::PutObject::len_bytes).sum();
        put.measure(|| {
            std::thread::scope(|scope| {
                let writers: Vec<_> = made
                    .into_iter()
                    .map(|objects| {
                        scope.spawn(move || {
                            let mut objects = objects.into_iter().peekable();
                            while objects.peek().is_some() {
                                let turn = objects.by_ref().take(BLOCKS_PER_PUT).collect();
                                for outcome in bed.store.put(turn) {
                                    outcome?;
                                }
                            }
                            anyhow::Ok(())
                        })
                    })
                    .collect();
                writers.into_iter().try_for_each(|writer| writer.join().expect("a writer"))
            })
            .map(|()| bytes)
        })?;
        let wrote = floor.write(bytes)?;
        write_floor.bytes += wrote.bytes;
        write_floor.wall_s += wrote.wall_s;
    }
    figures.insert("put_mb_s".into(), put.mb_s().into());
    figures.insert("write_floor_mb_s".into(), write_floor.mb_s().into());
    figures.insert("put_durable_vs_floor".into(), (put.mb_s() / write_floor.mb_s()).into());
    figures.insert("put_cpu_s_per_gib".into(), put.cpu_s_per_gib().into());
    let stats = bed.store.stats();
    figures.insert("put_written_vs_accepted".into(), json!(stats.written_bytes as f64 / put.bytes as f64));
    Ok(prefixes)
}

//! What the drive itself gives: the same files read and written through the same disk in one-mebibyte transfers, nothing else.
//!
//! A floor that is slower than what stands on it is none. So it has what the store has: buffers that the disk has registered
//! and that were touched before, as many transfers in flight as suit the drive best, and flushes beside the next writes.

use std::sync::{Arc, mpsc};

use esker_store::StoreSettings;
use esker_store::io::{BufferPool, Completion, Disk, FileId, IoEngine, Op, Region};

use crate::measure::Rate;

/// Bytes of a transfer.
pub(crate) const TRANSFER_BYTES: usize = 1 << 20;
/// Transfers in flight that are tried.
const DEPTHS: [usize; 3] = [8, 16, 32];
/// Bytes that a depth is tried with.
const TRIAL_BYTES: usize = 256 << 20;

/// A stretch of a file.
pub(crate) type Extent = (FileId, u64, usize);

/// The segments' bytes from start to end, in transfers, up to `limit` bytes.
pub(crate) fn segment_extents(disk: &dyn Disk, limit: u64) -> anyhow::Result<Vec<Extent>> {
    let mut names = disk.list()?;
    names.retain(|name| name.ends_with(".seg"));
    names.sort();
    let mut extents = Vec::new();
    for name in names {
        let (file, len) = disk.open(&name)?;
        let count = len / TRANSFER_BYTES as u64;
        extents.extend((0..count).map(|index| (file, index * TRANSFER_BYTES as u64, TRANSFER_BYTES)));
    }
    extents.truncate(usize::try_from(limit)? / TRANSFER_BYTES);
    Ok(extents)
}

/// Reads all of `extents`, `depth` at a time.
pub(crate) fn read(disk: &dyn Disk, extents: &[Extent], depth: usize) -> anyhow::Result<u64> {
    let longest = extents.iter().map(|(_, _, len)| *len).max().unwrap_or(0);
    read_into(disk, &BufferPool::new(2 * depth * longest.next_power_of_two()), extents, depth)
}

fn read_into(
    disk: &dyn Disk,
    pool: &Arc<BufferPool>,
    extents: &[Extent],
    depth: usize,
) -> anyhow::Result<u64> {
    let op = |index: usize, tag, reply: &_| {
        let (file, offset, len) = extents[index];
        Op::read(file, offset, pool.take(len), tag, reply)
    };
    transfer(disk, extents.len(), depth, op, |_| ())
}

/// A drive, and what its fastest transfers need.
pub(crate) struct Floor {
    disk: Arc<dyn Disk>,
    pool: Arc<BufferPool>,
    depth: usize,
    written: u32,
}

impl Floor {
    /// Registers buffers, where that can be.
    pub(crate) fn new(disk: &Arc<dyn Disk>) -> Self {
        let most = DEPTHS[DEPTHS.len() - 1];
        let pool = BufferPool::new(2 * most * TRANSFER_BYTES);
        if disk.engine() == IoEngine::UringDirect
            && let Some(region) = Region::map(most * TRANSFER_BYTES)
            && disk.register(&region).is_ok()
        {
            pool.add_region(&region, TRANSFER_BYTES);
        }
        Self { disk: Arc::clone(disk), pool, depth: most, written: 0 }
    }

    /// Reads `extents` once for nothing, since below a virtual drive there may be a cache that the first reader fills, and finds
    /// out how many transfers in flight read fastest.
    pub(crate) fn warm(&mut self, extents: &[Extent]) -> anyhow::Result<()> {
        self.read(extents)?;
        let trial = &extents[..extents.len().min(TRIAL_BYTES / TRANSFER_BYTES)];
        let mut best = 0.0;
        for depth in DEPTHS {
            let mut rate = Rate::default();
            for _ in 0..3 {
                rate.measure(|| read_into(&*self.disk, &self.pool, trial, depth))?;
            }
            if rate.mb_s() > best {
                (best, self.depth) = (rate.mb_s(), depth);
            }
        }
        Ok(())
    }

    /// Transfers in flight.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Reads all of `extents`, each of a transfer's length.
    pub(crate) fn read(&self, extents: &[Extent]) -> anyhow::Result<u64> {
        read_into(&*self.disk, &self.pool, extents, self.depth)
    }

    /// Writes `bytes` to a preallocated file and flushes it, as often as the store commits when it has much to write, beside
    /// the writes that follow. The file stays: where removing one has the drive forget its blocks, whatever is measured next
    /// would pay for that.
    pub(crate) fn write(&mut self, bytes: u64) -> anyhow::Result<Rate> {
        self.written += 1;
        let name = format!("write-floor.{}.tmp", self.written);
        let count = usize::try_from(bytes)? / TRANSFER_BYTES;
        let file = self.disk.create(&name, (count * TRANSFER_BYTES) as u64)?;
        let per_commit = (StoreSettings::default().commit_bytes / TRANSFER_BYTES).max(1);
        let mut rate = Rate::default();
        rate.measure(|| {
            let (flushed, flushes) = mpsc::channel();
            let mut unwritten = vec![per_commit; count / per_commit];
            unwritten.extend((!count.is_multiple_of(per_commit)).then_some(count % per_commit));
            let commits = unwritten.len();
            let write = |index: usize, tag, reply: &_| {
                let offset = (index * TRANSFER_BYTES) as u64;
                Op::write(file, offset, self.pool.take(TRANSFER_BYTES), tag, reply)
            };
            let bytes = transfer(&*self.disk, count, self.depth, write, |tag| {
                let left = &mut unwritten[usize::try_from(tag).unwrap_or(0) / per_commit];
                *left -= 1;
                if *left == 0 {
                    self.disk.submit(Op::sync(file, 0, &flushed));
                }
            })?;
            for _ in 0..commits {
                let flush: Completion = flushes.recv()?;
                flush.full()?;
            }
            anyhow::Ok(bytes)
        })?;
        Ok(rate)
    }
}

/// `count` ops, `depth` at a time; tells the tag of each that is done. Gives the bytes moved.
fn transfer(
    disk: &dyn Disk,
    count: usize,
    depth: usize,
    op: impl Fn(usize, u64, &mpsc::Sender<Completion>) -> Op,
    mut done: impl FnMut(u64),
) -> anyhow::Result<u64> {
    let (reply, completions) = mpsc::channel();
    let mut bytes = 0;
    let mut settle = || -> anyhow::Result<()> {
        let completion: Completion = completions.recv()?;
        let tag = completion.tag;
        bytes += completion.wanted_bytes as u64;
        completion.full()?;
        done(tag);
        Ok(())
    };
    for index in 0..count {
        if index >= depth {
            settle()?;
        }
        disk.submit(op(index, index as u64, &reply));
    }
    for _ in 0..depth.min(count) {
        settle()?;
    }
    Ok(bytes)
}

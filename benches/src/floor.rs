//! What the drive itself gives: the same files read and written through the same disk in one-mebibyte transfers,
//! sixteen in flight, nothing else.

use std::sync::mpsc;

use esker_store::StoreSettings;
use esker_store::io::{BufferPool, Completion, Disk, FileId, Op};

use crate::measure::Rate;

/// Bytes of a transfer.
pub(crate) const TRANSFER_BYTES: usize = 1 << 20;
/// Transfers in flight.
pub(crate) const DEPTH: usize = 16;

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
    let pool = BufferPool::new(2 * depth * longest.next_power_of_two());
    transfer(disk, extents.len(), depth, |index, tag, reply| {
        let (file, offset, len) = extents[index];
        Op::read(file, offset, pool.take(len), tag, reply)
    })
}

/// Writes `bytes` to a preallocated file and flushes it, as often as the store commits when it has much to write.
pub(crate) fn write(disk: &dyn Disk, bytes: u64) -> anyhow::Result<Rate> {
    const NAME: &str = "write-floor.tmp";
    let count = usize::try_from(bytes)? / TRANSFER_BYTES;
    let file = disk.create(NAME, (count * TRANSFER_BYTES) as u64)?;
    let pool = BufferPool::new(2 * DEPTH * TRANSFER_BYTES);
    let per_commit = StoreSettings::default().commit_bytes / TRANSFER_BYTES;
    let mut rate = Rate::default();
    rate.measure(|| {
        let mut written = 0;
        for start in (0..count).step_by(per_commit) {
            written += transfer(disk, per_commit.min(count - start), DEPTH, |index, tag, reply| {
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

fn transfer(
    disk: &dyn Disk,
    count: usize,
    depth: usize,
    op: impl Fn(usize, u64, &mpsc::Sender<Completion>) -> Op,
) -> anyhow::Result<u64> {
    let (reply, completions) = mpsc::channel();
    let mut bytes = 0;
    let mut settle = || -> anyhow::Result<()> {
        let completion: Completion = completions.recv()?;
        bytes += completion.wanted_bytes as u64;
        completion.full()?;
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

//! Which disk works here, found out by using it: a ring that can be made may still fail every transfer, and a file
//! system may take O_DIRECT at open and refuse it at the first read.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use super::positional::PositionalDisk;
use super::uring::UringDisk;
use super::{AlignedBuf, BufferPool, Disk, IoEngine, Op, PAGE};

/// A transfer of a few pages that takes longer than this is a disk that hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the probe writes; its length shares no factor with the page size, so that no two pages are equal.
const PATTERN: std::ops::Range<u8> = 0..251;

/// A disk, and the engines that were tried before it.
pub type Chosen = (Arc<dyn Disk>, Vec<(IoEngine, io::Error)>);

/// The first of `engines` that writes, flushes and reads back in `dir`, and why those before it did not.
pub fn choose(dir: &Path, engines: &[IoEngine]) -> io::Result<Chosen> {
    let mut refused = Vec::new();
    for &engine in engines {
        match open(dir, engine).and_then(|disk| probe(disk.as_ref()).map(|()| disk)) {
            Ok(disk) => return Ok((disk, refused)),
            Err(error) => refused.push((engine, error)),
        }
    }
    match refused.pop() {
        Some((_, error)) => Err(error),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "no I/O engine to choose from")),
    }
}

/// A disk of one engine, unprobed.
pub(super) fn open(dir: &Path, engine: IoEngine) -> io::Result<Arc<dyn Disk>> {
    Ok(match engine {
        IoEngine::UringDirect => Arc::new(UringDisk::open(dir)?),
        IoEngine::PositionalDirect => Arc::new(PositionalDisk::open(dir, true)?),
        IoEngine::PositionalBuffered => Arc::new(PositionalDisk::open(dir, false)?),
    })
}

/// Writes three pages, flushes, reads them back.
fn probe(disk: &dyn Disk) -> io::Result<()> {
    let name = format!(".probe-{}", std::process::id());
    let _ = disk.remove(&name);
    let file = match disk.create(&name, 4 * PAGE as u64) {
        Ok(file) => file,
        // Nothing can be written on a full disk, but what is there must be served.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => return probe_read(disk, error),
        Err(error) => return Err(error),
    };
    let result = (|| {
        let pool = BufferPool::new(0);
        let mut buf = pool.take(3 * PAGE);
        buf.iter_mut().zip(PATTERN.cycle()).for_each(|(byte, value)| *byte = value);
        run(disk, |reply| Op::write(file, PAGE as u64, buf, 0, reply))?;
        run(disk, |reply| Op::sync(file, 0, reply))?;
        let read = run(disk, |reply| Op::read(file, PAGE as u64, pool.take(3 * PAGE), 0, reply))?;
        let same = read
            .is_some_and(|read| read.iter().copied().zip(PATTERN.cycle()).all(|(byte, value)| byte == value));
        if same { Ok(()) } else { Err(io::Error::other("the probe read other bytes than it wrote")) }
    })();
    disk.remove(&name)?;
    result
}

/// Reads a page of any file that is there; `full` if there is none.
fn probe_read(disk: &dyn Disk, full: io::Error) -> io::Result<()> {
    for name in disk.list()? {
        if let Ok((file, len_bytes)) = disk.open(&name)
            && len_bytes >= PAGE as u64
        {
            return run(disk, |reply| Op::read(file, 0, BufferPool::new(0).take(PAGE), 0, reply)).map(drop);
        }
    }
    Err(full)
}

fn run(
    disk: &dyn Disk,
    op: impl FnOnce(&mpsc::Sender<super::Completion>) -> Op,
) -> io::Result<Option<AlignedBuf>> {
    let (reply, completions) = mpsc::channel();
    disk.submit(op(&reply));
    completions.recv_timeout(PATIENCE).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?.full()
}

//! How bytes move: the [`Disk`] and its implementations. Where they lie is the business of `segment.rs`.
//!
//! A disk is completion based, so that one thread can keep many transfers in flight. An [`Op`] owns its buffer
//! and its permit until it completes; whoever submitted it may lose interest at any time by dropping the receiver.

pub(crate) mod buffer;
#[cfg(any(test, feature = "testing"))]
pub mod faulty;
mod files;
mod gate;
mod positional;
mod probe;
#[cfg(any(test, feature = "testing"))]
pub mod sim;
mod sys;
mod uring;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests;

use std::fmt;
use std::io;
use std::sync::mpsc::{self, Sender};

pub(crate) use buffer::page_ceil;
pub use buffer::{AlignedBuf, BufferPool, PAGE, Region};
pub(crate) use files::headroom_bytes;
pub use gate::{ByteGate, Permit};
pub use probe::{Chosen, choose};

/// A file of a disk, valid until the disk is dropped or the file removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub u32);

/// A flat folder of preallocated files and the transfers on them.
///
/// Contract: every submitted op completes exactly once, whatever happens, and no later than the device answers. A
/// completion reports the bytes moved; fewer than asked for means end of file or a device that gave up, and is never
/// success. Transfers may be reordered; only a [`OpKind::Sync`] submitted after a write's completion was seen makes
/// that write durable. After a failed sync nothing written since the last good one may be trusted.
pub trait Disk: Send + Sync + 'static {
    /// Makes a file of exactly `len_bytes`, space reserved, the file and its name durable. `StorageFull` if the
    /// space is not there, in which case nothing is left behind; `AlreadyExists` if the name is taken.
    fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId>;
    /// Opens a file and tells its length in bytes.
    fn open(&self, name: &str) -> io::Result<(FileId, u64)>;
    /// Names of all files, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Removes a file, durably. Ops in flight on it still complete.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Gives back the space of `[offset, offset + len)`, whole pages, which reads as zeros from then on. `Unsupported` if
    /// the file system cannot do that.
    fn punch(&self, file: FileId, offset: u64, len_bytes: u64) -> io::Result<()>;
    /// Bytes that a file takes on the device; less than its length where it was punched.
    fn allocated_bytes(&self, file: FileId) -> io::Result<u64>;
    /// First page at or behind `offset` that may hold anything but zeros; `u64::MAX` if there is none. A disk that knows no
    /// holes answers `offset`.
    fn next_data(&self, _file: FileId, offset: u64) -> u64 {
        offset
    }
    /// First byte at or behind `offset` that was given back, or never written; `u64::MAX` if there is none. A disk that knows no
    /// holes knows of none.
    fn next_hole(&self, _file: FileId, _offset: u64) -> u64 {
        u64::MAX
    }
    /// Reads on this thread, without handing an op over and waiting for it: for who has nothing else to do meanwhile. Bytes read,
    /// fewer at the end of the file. `None` if this disk reads by ops only.
    fn read_now(&self, _file: FileId, _offset: u64, _buf: &mut [u8]) -> Option<io::Result<usize>> {
        None
    }
    /// Registers memory that ops will mostly use, once. Without it everything works, at a little more of the processor for
    /// each transfer; `Unsupported` if this disk knows no such thing.
    fn register(&self, _region: &std::sync::Arc<Region>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Starts an op. Blocks only while the disk's bound on ops in flight is reached.
    fn submit(&self, op: Op);
    /// Starts ops together, in order, so that what is next to each other in a file may reach the device as one transfer.
    fn submit_all(&self, ops: Vec<Op>) {
        ops.into_iter().for_each(|op| self.submit(op));
    }
    /// Which engine this is.
    fn engine(&self) -> IoEngine;
    /// Ops that were submitted and did not complete yet, if the disk knows.
    fn in_flight(&self) -> u64 {
        0
    }
    /// Completions that belonged to no op; they were dropped.
    fn unknown_completions(&self) -> u64 {
        0
    }
}

/// How a disk moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring with O_DIRECT.
    UringDirect,
    /// Threads with `pread` and `pwrite`, O_DIRECT.
    PositionalDirect,
    /// Threads with `pread` and `pwrite` through the page cache: for file systems that refuse O_DIRECT.
    PositionalBuffered,
}

impl fmt::Display for IoEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UringDirect => "io_uring, O_DIRECT",
            Self::PositionalDirect => "positional, O_DIRECT",
            Self::PositionalBuffered => "positional, page cache",
        })
    }
}

/// What an op does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Fills the whole buffer from `offset`.
    Read,
    /// Writes the whole buffer at `offset`.
    Write,
    /// Makes all writes that completed before it was submitted durable (`fdatasync`).
    Sync,
}

/// A transfer. Offset and buffer length are multiples of [`PAGE`].
pub struct Op {
    /// The file.
    pub file: FileId,
    /// What to do.
    pub kind: OpKind,
    /// Position in the file, in bytes.
    pub offset: u64,
    /// The buffer; `None` for a sync.
    pub buf: Option<AlignedBuf>,
    /// Returned with the completion.
    pub tag: u64,
    /// Share of a byte budget, held until the completion is dropped.
    pub permit: Option<Permit>,
    /// Where the completion goes; `None` once it went.
    pub reply: Option<Box<dyn Deliver>>,
}

/// Where completions go.
pub trait Deliver: Send {
    /// Takes a completion, on a thread of the disk; must not block.
    fn deliver(&self, completion: Completion);
}

impl Deliver for Sender<Completion> {
    fn deliver(&self, completion: Completion) {
        // A requester that went away loses the buffer back to its pool.
        let _ = self.send(completion);
    }
}

impl Op {
    /// Reads `buf.len()` bytes at `offset`.
    pub fn read(
        file: FileId,
        offset: u64,
        buf: AlignedBuf,
        tag: u64,
        reply: &(impl Deliver + Clone + 'static),
    ) -> Self {
        Self::transfer(OpKind::Read, file, offset, buf, tag, reply)
    }

    /// Writes `buf` at `offset`.
    pub fn write(
        file: FileId,
        offset: u64,
        buf: AlignedBuf,
        tag: u64,
        reply: &(impl Deliver + Clone + 'static),
    ) -> Self {
        Self::transfer(OpKind::Write, file, offset, buf, tag, reply)
    }

    /// Flushes `file`.
    pub fn sync(file: FileId, tag: u64, reply: &(impl Deliver + Clone + 'static)) -> Self {
        let reply: Option<Box<dyn Deliver>> = Some(Box::new(reply.clone()));
        Self { file, kind: OpKind::Sync, offset: 0, buf: None, tag, permit: None, reply }
    }

    fn transfer(
        kind: OpKind,
        file: FileId,
        offset: u64,
        buf: AlignedBuf,
        tag: u64,
        reply: &(impl Deliver + Clone + 'static),
    ) -> Self {
        assert!(offset.is_multiple_of(PAGE as u64), "offset {offset} is not page-aligned");
        assert!(buf.len().is_multiple_of(PAGE), "length {} is not whole pages", buf.len());
        Self { file, kind, offset, buf: Some(buf), tag, permit: None, reply: Some(Box::new(reply.clone())) }
    }

    /// Bytes to move.
    pub fn len_bytes(&self) -> usize {
        self.buf.as_ref().map_or(0, |buf| buf.len())
    }

    /// Reports the outcome. A requester that went away loses the buffer back to its pool.
    pub fn complete(mut self, result: io::Result<usize>) {
        self.finish(result);
    }

    fn finish(&mut self, result: io::Result<usize>) {
        let wanted_bytes = self.len_bytes();
        let Some(reply) = self.reply.take() else { return };
        let (buf, permit) = (self.buf.take(), self.permit.take());
        reply.deliver(Completion { tag: self.tag, wanted_bytes, result, buf, permit });
    }
}

/// An op that its disk loses, by a panic say, completes as well: nobody waits for ever.
impl Drop for Op {
    fn drop(&mut self) {
        self.finish(Err(io::Error::other("the disk dropped an op")));
    }
}

/// The end of an op.
#[derive(Debug)]
pub struct Completion {
    /// The op's tag.
    pub tag: u64,
    /// Bytes that were to be moved.
    pub wanted_bytes: usize,
    /// Bytes that were moved.
    pub result: io::Result<usize>,
    /// The op's buffer. `None` for a sync, and for a transfer whose buffer the kernel may still hold.
    pub buf: Option<AlignedBuf>,
    pub(crate) permit: Option<Permit>,
}

impl Completion {
    /// The buffer, if every byte was moved.
    pub fn full(self) -> io::Result<Option<AlignedBuf>> {
        match self.result {
            Ok(moved) if moved == self.wanted_bytes => Ok(self.buf),
            Ok(moved) => Err(short(moved, self.wanted_bytes)),
            Err(error) => Err(error),
        }
    }
}

/// A transfer that moved too little.
pub(crate) fn short(moved: usize, wanted: usize) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("short transfer: {moved} of {wanted} bytes"))
}

/// Bytes free on the file system of a folder.
pub fn free_bytes(dir: &std::path::Path) -> io::Result<u64> {
    sys::free_bytes(&std::fs::File::open(dir)?)
}

/// Runs one op and waits for its end.
pub(crate) fn wait(
    disk: &dyn Disk,
    op: impl FnOnce(&Sender<Completion>) -> Op,
) -> io::Result<Option<AlignedBuf>> {
    let (reply, completions) = mpsc::channel();
    disk.submit(op(&reply));
    drop(reply);
    completions.recv().map_err(|_| io::Error::other("the disk dropped an op"))?.full()
}

/// Reads `len` bytes (rounded up to pages) at `offset`. All of them or an error.
pub(crate) fn read_exact(
    disk: &dyn Disk,
    pool: &std::sync::Arc<BufferPool>,
    file: FileId,
    offset: u64,
    len: usize,
) -> io::Result<AlignedBuf> {
    let mut buf = pool.take(len);
    match disk.read_now(file, offset, &mut buf) {
        Some(Ok(moved)) if moved == buf.len() => Ok(buf),
        Some(Ok(moved)) => Err(short(moved, buf.len())),
        Some(Err(error)) => Err(error),
        None => {
            let buf = wait(disk, |reply| Op::read(file, offset, buf, 0, reply))?;
            buf.ok_or_else(|| io::Error::other("a read without its buffer"))
        }
    }
}

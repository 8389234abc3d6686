//! Disk on io_uring with O_DIRECT: the submitting thread enters the kernel itself, one reaper thread collects.
//!
//! Invariants:
//! - An op sits in its slot, buffer and file included, from before its entry is pushed until its completion is seen.
//! - `user_data` is slot and generation; a completion that matches no occupied slot is counted and dropped.
//! - The submission queue is touched only under the `slots` mutex, the completion queue only by the reaper.
//! - Ops in flight never exceed the submission queue, which is half the completion queue, so neither overflows.
//! - A short transfer is continued; only end of file, or no progress, ends it short.
//!
//! Memory is registered once (`IORING_REGISTER_BUFFERS`), where the limit on locked memory allows: an op whose buffer lies in
//! it is a fixed one, any other an ordinary one. The ring keeps the memory for as long as it lives.
//!
//! SQPOLL and IOPOLL stay off: the first burns a core that verification needs, the second works on few disks.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use super::files::Files;
use super::{Disk, FileId, IoEngine, Op, OpKind, PAGE, Region};

/// Ops in flight; submitters of more wait.
const DEPTH: u16 = 128;
/// Times that one op is continued after an interruption that moved nothing.
const MAX_RETRIES: u8 = 16;
/// Times that the kernel may say "busy" to one submission before it counts as broken; 1 ms apart.
const MAX_BUSY: u32 = 2_000;
/// `user_data` of the entry that tells the reaper to end. Generations start at 1, so no op has it.
const WAKE: u64 = 0;
/// `IORING_ENTER_GETEVENTS` of the kernel's interface.
const ENTER_GETEVENTS: u32 = 1;

/// See the module.
pub(super) struct UringDisk {
    files: Files,
    ring: Arc<Ring>,
    reaper: Option<JoinHandle<()>>,
}

struct Ring {
    uring: IoUring,
    slots: Mutex<Slots>,
    slot_freed: Condvar,
    unknown: AtomicU64,
    /// Buffer 0 of the kernel's table.
    region: OnceLock<Arc<Region>>,
}

struct Slots {
    ops: Vec<Option<InFlight>>,
    free: Vec<u16>,
    generation: u64,
}

struct InFlight {
    op: Op,
    file: Arc<File>,
    generation: u64,
    done: usize,
    retries: u8,
}

impl UringDisk {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let slots = Slots {
            ops: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            generation: 0,
        };
        let ring = Arc::new(Ring {
            // One entry more than ops, for the wake-up.
            uring: IoUring::new(u32::from(DEPTH) * 2)?,
            slots: Mutex::new(slots),
            slot_freed: Condvar::new(),
            unknown: AtomicU64::new(0),
            region: OnceLock::new(),
        });
        let reaper = std::thread::Builder::new().name("esker-io-uring".into()).spawn({
            let ring = Arc::clone(&ring);
            move || ring.reap()
        })?;
        Ok(Self { files: Files::new(dir, true), ring, reaper: Some(reaper) })
    }
}

impl Disk for UringDisk {
    fn create(&self, name: &str, len_bytes: u64) -> io::Result<FileId> {
        self.files.create(name, len_bytes)
    }

    fn open(&self, name: &str) -> io::Result<(FileId, u64)> {
        self.files.open(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.files.list()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files.remove(name)
    }

    fn punch(&self, file: FileId, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.files.punch(file, offset, len_bytes)
    }

    fn allocated_bytes(&self, file: FileId) -> io::Result<u64> {
        self.files.allocated_bytes(file)
    }

    fn next_data(&self, file: FileId, offset: u64) -> u64 {
        self.files.next_data(file, offset)
    }

    fn next_hole(&self, file: FileId, offset: u64) -> u64 {
        self.files.next_hole(file, offset)
    }

    fn read_now(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Option<io::Result<usize>> {
        Some(self.files.read_now(file, offset, buf))
    }

    fn register(&self, region: &Arc<Region>) -> io::Result<()> {
        self.ring.register(region)
    }

    fn submit(&self, op: Op) {
        match self.files.get(op.file) {
            Ok(file) => self.ring.submit([(op, file)]),
            Err(error) => op.complete(Err(error)),
        }
    }

    fn submit_all(&self, ops: Vec<Op>) {
        let mut known = Vec::with_capacity(ops.len());
        for op in ops {
            match self.files.get(op.file) {
                Ok(file) => known.push((op, file)),
                Err(error) => op.complete(Err(error)),
            }
        }
        self.ring.submit(known);
    }

    fn engine(&self) -> IoEngine {
        IoEngine::UringDirect
    }

    fn in_flight(&self) -> u64 {
        (usize::from(DEPTH) - self.ring.lock().free.len()) as u64
    }

    fn unknown_completions(&self) -> u64 {
        self.ring.unknown.load(Ordering::Relaxed)
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        let mut slots = self.ring.lock();
        while slots.free.len() < usize::from(DEPTH) {
            slots = self.ring.slot_freed.wait(slots).unwrap_or_else(PoisonError::into_inner);
        }
        let woken = self.ring.push(&slots, &[opcode::Nop::new().build().user_data(WAKE)]);
        drop(slots);
        match (woken, self.reaper.take()) {
            (Ok(()), Some(reaper)) => drop(reaper.join()),
            (woken, _) => {
                tracing::error!(?woken, "the io_uring reaper could not be woken and is left behind")
            }
        }
    }
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, region: &Arc<Region>) -> io::Result<()> {
        // Held, so that no two callers register at once.
        let _slots = self.lock();
        if self.region.get().is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let (start, len) = region.extent();
        let extent = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: the memory is mapped for as long as `region` is held, which the ring does from here on.
        unsafe { self.uring.submitter().register_buffers(&[extent]) }?;
        let _ = self.region.set(Arc::clone(region));
        Ok(())
    }

    fn submit(&self, ops: impl IntoIterator<Item = (Op, Arc<File>)>) {
        let mut slots = self.lock();
        let mut taken = Vec::new();
        for (op, file) in ops {
            let slot = loop {
                match slots.free.pop() {
                    Some(slot) => break slot,
                    None => {
                        // What waits here goes first: it may be what is to free a slot.
                        self.start(&mut slots, &std::mem::take(&mut taken));
                        slots = self.slot_freed.wait(slots).unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            // The generation fills the upper 48 bits; at a million ops a second it returns after nine years.
            slots.generation += 1;
            let generation = slots.generation;
            slots.ops[usize::from(slot)] = Some(InFlight { op, file, generation, done: 0, retries: 0 });
            taken.push(slot);
        }
        self.start(&mut slots, &taken);
    }

    /// Hands the kernel entries for what is left of the ops of some slots: together, for then it joins neighbours.
    fn start(&self, slots: &mut MutexGuard<'_, Slots>, started: &[u16]) {
        if started.is_empty() {
            return;
        }
        let entries = started.iter().filter_map(|&slot| {
            let in_flight = slots.ops[usize::from(slot)].as_mut()?;
            let entry = in_flight.entry(self.region.get());
            Some(entry.user_data(in_flight.generation << 16 | u64::from(slot)))
        });
        let entries: Vec<squeue::Entry> = entries.collect();
        let Err(error) = self.push(slots, &entries) else { return };
        // The kernel may or may not have taken them, and may yet: buffers and files can never be used for anything else.
        for &slot in started {
            if let Some(mut in_flight) = self.vacate(slots, slot) {
                tracing::error!(%error, "io_uring refused a submission; its buffer and file are leaked");
                std::mem::forget(in_flight.op.buf.take());
                std::mem::forget(Arc::clone(&in_flight.file));
                in_flight.op.complete(Err(io::Error::new(error.kind(), error.to_string())));
            }
        }
    }

    fn vacate(&self, slots: &mut MutexGuard<'_, Slots>, slot: u16) -> Option<InFlight> {
        let in_flight = slots.ops[usize::from(slot)].take()?;
        slots.free.push(slot);
        self.slot_freed.notify_all();
        Some(in_flight)
    }

    /// Hands entries to the kernel. The guard proves that the caller holds the mutex.
    fn push(&self, _slots: &MutexGuard<'_, Slots>, entries: &[squeue::Entry]) -> io::Result<()> {
        let pushed = || {
            // SAFETY: the mutex makes this the only submission queue alive. Buffers and files of the entries live in their slots until
            // the completion is seen, or are leaked.
            unsafe { self.uring.submission_shared().push_multiple(entries) }.is_ok()
        };
        // What an earlier failure has left in it may go now.
        if !pushed() && (self.uring.submitter().submit().is_err() || !pushed()) {
            return Err(io::Error::other("submission queue is full"));
        }
        for _ in 0..MAX_BUSY {
            match self.uring.submitter().submit() {
                // SAFETY: as above. The kernel may take some and leave the rest for the next call.
                Ok(_) if unsafe { self.uring.submission_shared() }.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// The reaper: waits for completions until told to end.
    fn reap(&self) {
        let mut seen: Vec<(u64, i32)> = Vec::new();
        loop {
            // SAFETY: the arguments submit nothing and pass no memory.
            let waited = unsafe { self.uring.submitter().enter::<()>(0, 1, ENTER_GETEVENTS, None) };
            if let Err(error) = waited
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                tracing::error!(%error, "waiting for io_uring completions failed");
                std::thread::sleep(Duration::from_millis(10));
            }
            // SAFETY: only this thread ever makes a completion queue.
            seen.extend(
                unsafe { self.uring.completion_shared() }.map(|entry| (entry.user_data(), entry.result())),
            );
            for (user_data, result) in seen.drain(..) {
                if user_data == WAKE {
                    return;
                }
                self.settle(user_data, result);
            }
        }
    }

    /// Continues or ends the op of one completion.
    fn settle(&self, user_data: u64, result: i32) {
        let slot = (user_data & 0xffff) as u16;
        let mut slots = self.lock();
        let Some(in_flight) = slots
            .ops
            .get_mut(usize::from(slot))
            .and_then(Option::as_mut)
            .filter(|in_flight| in_flight.generation == user_data >> 16)
        else {
            self.unknown.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(user_data, result, "dropped an io_uring completion that belongs to no op");
            return;
        };
        match in_flight.advance(result) {
            Step::Again => self.start(&mut slots, &[slot]),
            Step::End(result) => {
                let ended = self.vacate(&mut slots, slot);
                drop(slots);
                if let Some(ended) = ended {
                    ended.op.complete(result);
                }
            }
        }
    }
}

enum Step {
    Again,
    End(io::Result<usize>),
}

impl InFlight {
    /// What is left of the op, with a fixed buffer if it lies in `region`.
    fn entry(&mut self, region: Option<&Arc<Region>>) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let done = self.done;
        let offset = self.op.offset + done as u64;
        let Some(buf) = self.op.buf.as_mut() else {
            return opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        };
        // One entry moves at most 1 GiB; the loop moves the rest.
        let len = u32::try_from(buf.len() - done).unwrap_or(u32::MAX).min(1 << 30);
        let fixed = region.is_some_and(|region| region.contains(buf));
        let start = buf[done..].as_mut_ptr();
        match self.op.kind {
            OpKind::Read if fixed => opcode::ReadFixed::new(fd, start, len, 0).offset(offset).build(),
            _ if fixed => opcode::WriteFixed::new(fd, start, len, 0).offset(offset).build(),
            OpKind::Read => opcode::Read::new(fd, start, len).offset(offset).build(),
            _ => opcode::Write::new(fd, start, len).offset(offset).build(),
        }
    }

    fn advance(&mut self, result: i32) -> Step {
        let Ok(moved) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(-result);
            let again = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
            if again && self.retries < MAX_RETRIES {
                self.retries += 1;
                return Step::Again;
            }
            return Step::End(Err(error));
        };
        self.done += moved;
        // After an odd count nothing more can be moved with O_DIRECT; at the end of a file nothing is left.
        if moved == 0 || self.done >= self.op.len_bytes() || !self.done.is_multiple_of(PAGE) {
            return Step::End(Ok(self.done));
        }
        Step::Again
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
mod tests {
    use super::*;
    use crate::io::BufferPool;
    use std::sync::mpsc;

    fn in_flight(op: Op) -> InFlight {
        InFlight { op, file: Arc::new(File::open("/dev/null").unwrap()), generation: 1, done: 0, retries: 0 }
    }

    #[test]
    fn a_completion_of_no_op_is_counted_and_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let Ok(disk) = UringDisk::open(dir.path()) else { return };
        disk.ring.settle(77 << 16 | 3, 4096);
        disk.ring.settle(77 << 16 | 0xffff, 4096);
        assert_eq!(disk.unknown_completions(), 2);
        let file = disk.create("a", PAGE as u64).unwrap();
        assert!(crate::io::read_exact(&disk, &BufferPool::new(0), file, 0, PAGE).is_ok());
    }

    #[test]
    fn more_ops_than_there_is_room_for_go_together_and_all_complete() {
        let dir = tempfile::tempdir().unwrap();
        let Ok(disk) = UringDisk::open(dir.path()) else { return };
        let pages = 3 * u64::from(DEPTH);
        let file = disk.create("a", pages * PAGE as u64).unwrap();
        let pool = BufferPool::new(0);
        let (reply, completions) = mpsc::channel();
        let write = |page: u64| {
            let mut buf = pool.take(PAGE);
            buf.fill(page as u8);
            Op::write(file, page * PAGE as u64, buf, page, &reply)
        };
        // One of them is of no file.
        let nowhere = Op::write(FileId(99), 0, pool.take(PAGE), u64::MAX, &reply);
        disk.submit_all((0..pages).map(write).chain([nowhere]).collect());
        let mut tags: Vec<(u64, bool)> =
            completions.iter().take(pages as usize + 1).map(|done| (done.tag, done.full().is_ok())).collect();
        tags.sort_unstable();
        assert_eq!(tags.pop(), Some((u64::MAX, false)));
        assert!(tags.into_iter().eq((0..pages).map(|page| (page, true))));
        let read = crate::io::read_exact(&disk, &pool, file, 0, pages as usize * PAGE).unwrap();
        assert!(read.chunks(PAGE).zip(0..).all(|(page, at)| page.iter().all(|&byte| byte == at as u8)));
    }

    #[test]
    fn registered_and_other_buffers_move_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let Ok(disk) = UringDisk::open(dir.path()) else { return };
        let region = Region::map(2 << 20).unwrap();
        if let Err(error) = disk.register(&region) {
            println!("SKIPPED: no memory can be registered here: {error}");
            return;
        }
        assert_eq!(disk.register(&region).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let (fixed, other) = (BufferPool::new(0), BufferPool::new(0));
        fixed.add_region(&region, 256 << 10);
        let file = disk.create("a", 1 << 20).unwrap();
        for (round, (writer, reader)) in
            [(&fixed, &fixed), (&other, &fixed), (&fixed, &other)].into_iter().enumerate()
        {
            let mut buf = writer.take(256 << 10);
            assert_eq!(region.contains(&buf), std::ptr::eq(writer, &fixed));
            buf.iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = (at * 7 + round as u32) as u8);
            let expected = buf.to_vec();
            crate::io::wait(&disk, |reply| Op::write(file, 256 << 10, buf, 0, reply)).unwrap();
            let read = crate::io::read_exact(&disk, reader, file, 256 << 10, 256 << 10).unwrap();
            assert!(read[..] == expected[..], "round {round}");
        }
        // Beyond the end of the file, a fixed read ends short as any other does.
        let past = crate::io::read_exact(&disk, &fixed, file, (1 << 20) - 4096, 256 << 10);
        assert_eq!(past.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn short_transfers_go_on_and_interruptions_are_bounded() {
        let (reply, _completions) = mpsc::channel();
        let buf = || BufferPool::new(0).take(4 * PAGE);
        let mut op = in_flight(Op::read(FileId(0), 0, buf(), 0, &reply));
        assert!(matches!(op.advance(2 * PAGE as i32), Step::Again));
        assert!(matches!(op.advance(-libc::EINTR), Step::Again));
        assert!(matches!(op.advance(2 * PAGE as i32), Step::End(Ok(moved)) if moved == 4 * PAGE));
        let mut op = in_flight(Op::read(FileId(0), 0, buf(), 0, &reply));
        assert!(matches!(op.advance(PAGE as i32), Step::Again));
        assert!(matches!(op.advance(0), Step::End(Ok(PAGE))), "end of file");
        let mut op = in_flight(Op::read(FileId(0), 0, buf(), 0, &reply));
        assert!(matches!(op.advance(512), Step::End(Ok(512))), "cannot go on from there");
        let mut op = in_flight(Op::write(FileId(0), 0, buf(), 0, &reply));
        let again = (0..100).take_while(|_| matches!(op.advance(-libc::EAGAIN), Step::Again)).count();
        assert_eq!(again, usize::from(MAX_RETRIES));
        assert!(matches!(op.advance(-libc::EIO), Step::End(Err(_))));
    }
}

//! Scanning a segment for records, without an index and past any damage.
//!
//! How much is read at once follows what is found: of large records the pages that hold their headers, of small ones
//! all, a mebibyte at a time and some of them ahead. Holes are passed over without a read. What is bad is read once
//! more before it is believed to be.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use crate::index::Entry;
use crate::io::{AlignedBuf, BufferPool, Completion, Disk, FileId, Op, PAGE, page_ceil, read_exact, wait};
use crate::record::{MAGIC, MAX_HEADER_BYTES, NotAHeader, PlacedHeader};
use crate::segment::{Place, RECORDS_AT, SegmentId};
use crate::shared::miss_of;
use crate::stats::{Counter, MissCounts};
use crate::{MissKind, TtlClass, verify};

/// Read at once, at most, where all is read, in bytes.
const STREAM_READ_BYTES: usize = 1 << 20;
/// Such reads in flight ahead of the one that is looked at.
const READS_AHEAD: usize = 3;
/// Read first of a segment of which nothing is known.
const FIRST_READ_BYTES: usize = 16 << 10;
/// Records of this length and more are leapt over: their payload costs more than another read.
const LEAP_RECORD_BYTES: usize = 64 << 10;

/// A scan to be run.
pub(crate) struct Scan<'a> {
    pub(crate) disk: &'a dyn Disk,
    pub(crate) pool: &'a Arc<BufferPool>,
    pub(crate) read_bytes: &'a Counter,
    pub(crate) file: FileId,
    pub(crate) id: SegmentId,
    /// If not known, the first record is trusted with it, provided that nothing but holes lies before it: content made
    /// to look like a record lies in one, behind its header.
    pub(crate) generation: Option<u64>,
    pub(crate) verify_payload: bool,
    /// Whether what was verified is written again, for a flush to cover it.
    pub(crate) write_again: bool,
}

/// What a scan meets, in order. Handed over and not kept, so its size does not matter.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Met {
    /// A sound record.
    Record(Entry),
    /// What looks like a record and is none, or cannot be read.
    Bad(u64, MissKind),
}

/// What a scan found.
#[derive(Default)]
pub(crate) struct Scanned {
    /// End of the last sound record; where the scan started if there was none.
    pub(crate) end: u64,
    /// Whether everything behind `end` is zero.
    pub(crate) clean: bool,
    /// Whether anything before `end` is not a sound record: by its header alone a torn one would pass for whole, and a
    /// write that failed may show only after the power has, too.
    pub(crate) torn: bool,
    pub(crate) dropped: MissCounts,
    /// First place that the device failed to read: there may be sound records from there on.
    pub(crate) unread_at: Option<u64>,
    pub(crate) generation: Option<u64>,
    /// That of its records.
    pub(crate) class: Option<TtlClass>,
}

impl Scanned {
    fn pass_over(&mut self, at: &mut u64, kind: MissKind, met: &mut dyn FnMut(Met)) {
        met(Met::Bad(*at, kind));
        self.dropped.add(kind);
        self.clean = false;
        if kind == MissKind::ReadError {
            self.unread_at.get_or_insert(*at);
        }
        *at += PAGE as u64;
    }
}

impl Scan<'_> {
    /// Scans `[from, to)`, both multiples of the page size except for the end of a cut file.
    pub(crate) fn run(&self, from: u64, to: u64, met: &mut dyn FnMut(Met)) -> Scanned {
        let mut window = Window::new(self, to);
        let mut scanned =
            Scanned { end: from, clean: true, generation: self.generation, ..Scanned::default() };
        let (mut at, mut torn) = (from, false);
        // Nothing but blank pages so far.
        let mut first = from == RECORDS_AT;
        // Up to here it is known that there is no hole.
        let mut data_until = from;
        while at + PAGE as u64 <= to {
            let page = match window.bytes(at, PAGE) {
                Ok(page) => page,
                Err(kind) => {
                    first = false;
                    scanned.pass_over(&mut at, kind, met);
                    continue;
                }
            };
            if !page.starts_with(MAGIC) {
                let blank = page.iter().all(|&byte| byte == 0);
                scanned.clean &= blank;
                first &= blank;
                torn = true;
                window.search();
                at += PAGE as u64;
                if blank && at >= data_until {
                    let next = self.disk.next_data(self.file, at);
                    data_until = next.saturating_add(STREAM_READ_BYTES as u64);
                    at = next.min(to.next_multiple_of(PAGE as u64)).max(at);
                }
                continue;
            }
            let belongs = |generation| scanned.generation.map_or(first, |known| known == generation);
            let record = self.record(&mut window, at, belongs).or_else(|kind| match kind {
                MissKind::Truncated => Err(kind),
                _ => {
                    window.forget();
                    self.record(&mut window, at, belongs)
                }
            });
            first = false;
            match record {
                Ok(found) => {
                    at += found.record_bytes as u64;
                    scanned.end = at;
                    scanned.clean = true;
                    scanned.torn = torn;
                    scanned.generation = Some(found.place.generation);
                    scanned.class.get_or_insert(found.header.class);
                    window.found(&found);
                    met(Met::Record(Entry::of(&found)));
                }
                Err(kind) => {
                    torn = true;
                    window.search();
                    scanned.pass_over(&mut at, kind, met);
                }
            }
        }
        scanned
    }

    /// The record at `at`, if it is sound, whole and belongs there: to this segment, and to one of this generation.
    fn record(
        &self,
        window: &mut Window<'_>,
        at: u64,
        belongs: impl Fn(u64) -> bool,
    ) -> Result<PlacedHeader, MissKind> {
        let found = match PlacedHeader::decode(window.bytes(at, PAGE)?) {
            Err(NotAHeader::NeedsBytes(needed)) => {
                PlacedHeader::decode(window.bytes(at, page_ceil(needed.min(MAX_HEADER_BYTES)))?)
            }
            decoded => decoded,
        };
        let found = found.map_err(|_| MissKind::HeaderChecksum)?;
        let Place { segment, generation, offset } = found.place;
        if segment != self.id || offset != at || !belongs(generation) {
            return Err(MissKind::WrongRecord);
        }
        if at + found.record_bytes as u64 > window.to {
            return Err(MissKind::Truncated);
        }
        if self.verify_payload {
            let record = window.bytes(at, found.record_bytes)?;
            verify::stored_record(&found.header, record, self.pool)?;
            if self.write_again {
                self.write_again(at, record)?;
            }
        }
        Ok(found)
    }
}

impl Scan<'_> {
    /// Writes what is there already. A flush that failed in an earlier process may have left it behind for good, and
    /// then no later flush would cover it: a flush proves only what was written since the last one.
    fn write_again(&self, at: u64, record: &[u8]) -> Result<(), MissKind> {
        let mut buf = self.pool.take(record.len());
        buf.copy_from_slice(record);
        let written = wait(self.disk, |reply| Op::write(self.file, at, buf, 0, reply));
        written.map(drop).map_err(|_| MissKind::ReadError)
    }
}

/// The part of the segment that is in memory, and reads under way of what follows it.
struct Window<'a> {
    scan: &'a Scan<'a>,
    /// Nothing is read from here on.
    to: u64,
    start: u64,
    buf: Option<AlignedBuf>,
    /// Bytes to read at once.
    read_bytes: usize,
    ahead: VecDeque<Ahead>,
}

/// A read under way.
struct Ahead {
    start: u64,
    len_bytes: usize,
    completion: Receiver<Completion>,
}

impl<'a> Window<'a> {
    fn new(scan: &'a Scan<'a>, to: u64) -> Self {
        let read_bytes = if scan.verify_payload { STREAM_READ_BYTES } else { FIRST_READ_BYTES };
        Self { scan, to, start: 0, buf: None, read_bytes, ahead: VecDeque::new() }
    }

    /// The next record is expected to be like this one.
    fn found(&mut self, record: &PlacedHeader) {
        if self.scan.verify_payload || record.record_bytes < LEAP_RECORD_BYTES {
            self.search();
        } else {
            self.read_bytes = page_ceil(record.header.header_bytes());
            self.ahead.clear();
        }
    }

    /// All is looked at from here on.
    fn search(&mut self) {
        self.read_bytes = (self.read_bytes * 2).min(STREAM_READ_BYTES);
    }

    /// Lets go of what was read.
    fn forget(&mut self) {
        self.buf = None;
        self.ahead.clear();
    }

    fn end(&self) -> u64 {
        self.start + self.buf.as_ref().map_or(0, |buf| buf.len() as u64)
    }

    /// `len` bytes at `at`, both whole pages.
    fn bytes(&mut self, at: u64, len: usize) -> Result<&[u8], MissKind> {
        let end = at + len as u64;
        if end > self.to {
            return Err(MissKind::Truncated);
        }
        if at < self.start || end > self.end() {
            if !self.take_ahead(at, end) {
                self.forget();
                let rest = usize::try_from((self.to - at) / PAGE as u64 * PAGE as u64).unwrap_or(usize::MAX);
                // A bad sector in the bytes behind must not hide the sound ones before it.
                let read =
                    self.read(at, len.max(self.read_bytes.min(rest))).or_else(|_| self.read(at, len))?;
                (self.start, self.buf) = (at, Some(read));
            }
            self.read_ahead();
        }
        let skip = usize::try_from(at - self.start).unwrap_or(usize::MAX);
        self.buf.as_ref().and_then(|buf| buf.get(skip..skip + len)).ok_or(MissKind::ReadError)
    }

    /// Makes the window `[at, end)` or more out of what is held and what was read ahead, if that holds it.
    fn take_ahead(&mut self, at: u64, end: u64) -> bool {
        while self.ahead.front().is_some_and(|read| read.start + read.len_bytes as u64 <= at) {
            self.ahead.pop_front();
        }
        let reach = self.ahead.back().map_or(0, |read| read.start + read.len_bytes as u64);
        let Some(first) = self.ahead.front().filter(|_| end <= reach) else { return false };
        let held = match &self.buf {
            Some(buf) if self.end() == first.start && at >= self.start => {
                &buf[usize::try_from(at - self.start).unwrap_or(usize::MAX).min(buf.len())..]
            }
            _ if at >= first.start => &[],
            _ => return false,
        };
        let (start, mut parts, mut covered) = (first.start - held.len() as u64, Vec::new(), first.start);
        while covered < end {
            let Some(read) = self.ahead.pop_front() else { return false };
            let Some(Ok(Some(part))) = read.completion.recv().ok().map(Completion::full) else {
                return false;
            };
            self.scan.read_bytes.add(part.len() as u64);
            covered += part.len() as u64;
            parts.push(part);
        }
        let window = match (held, parts.len()) {
            ([], 1) => parts.pop(),
            _ => {
                let len = held.len() + parts.iter().map(|part| part.len()).sum::<usize>();
                let mut joined = self.scan.pool.take(len);
                let mut filled = 0;
                for part in [held].into_iter().chain(parts.iter().map(|part| &part[..])) {
                    joined[filled..filled + part.len()].copy_from_slice(part);
                    filled += part.len();
                }
                Some(joined)
            }
        };
        (self.start, self.buf) = (start, window);
        true
    }

    /// Keeps reads of what follows in flight, where all of it is looked at.
    fn read_ahead(&mut self) {
        if self.read_bytes < STREAM_READ_BYTES {
            return;
        }
        let mut start = self.ahead.back().map_or(self.end(), |read| read.start + read.len_bytes as u64);
        while self.ahead.len() < READS_AHEAD && start + PAGE as u64 <= self.to {
            let rest = usize::try_from((self.to - start) / PAGE as u64 * PAGE as u64).unwrap_or(usize::MAX);
            let len_bytes = STREAM_READ_BYTES.min(rest);
            let (reply, completion) = mpsc::channel();
            self.scan.disk.submit(Op::read(self.scan.file, start, self.scan.pool.take(len_bytes), 0, &reply));
            self.ahead.push_back(Ahead { start, len_bytes, completion });
            start += len_bytes as u64;
        }
    }

    fn read(&self, at: u64, len: usize) -> Result<AlignedBuf, MissKind> {
        let Scan { disk, pool, file, read_bytes, .. } = self.scan;
        let read = read_exact(*disk, pool, *file, at, len);
        read.inspect(|buf| read_bytes.add(buf.len() as u64)).map_err(|error| match miss_of(&error) {
            // What is scanned lies within the file: a short read is the device's failure, and may succeed next time.
            MissKind::Truncated => MissKind::ReadError,
            kind => kind,
        })
    }
}

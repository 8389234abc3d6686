//! Scanning a segment for records, without an index and past any damage.

use crate::index::Entry;
use crate::io::{AlignedBuf, FileId, Op, PAGE, page_ceil, read_exact, wait};
use crate::record::{MAGIC, MAX_HEADER_BYTES, NotAHeader, PlacedHeader};
use crate::segment::{RECORDS_AT, SegmentId};
use crate::shared::{Shared, miss_of};
use crate::stats::MissCounts;
use crate::{MissKind, verify};

/// Read at once where payload is verified, in bytes.
const PAYLOAD_READ_BYTES: usize = 1 << 20;
/// Read at once where only headers are, in bytes: small records come many at a time, large ones are leapt over.
const HEADER_READ_BYTES: usize = 64 << 10;

/// A scan to be run.
pub(crate) struct Scan<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) file: FileId,
    pub(crate) id: SegmentId,
    /// If not known, the record right behind the header page is trusted with it.
    pub(crate) generation: Option<u64>,
    pub(crate) verify_payload: bool,
}

/// What a scan found.
#[derive(Default)]
pub(crate) struct Scanned {
    pub(crate) records: Vec<Entry>,
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
}

impl Scanned {
    fn pass_over(&mut self, at: &mut u64, kind: MissKind) {
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
    pub(crate) fn run(&self, from: u64, to: u64) -> Scanned {
        let mut window = Window { scan: self, start: 0, buf: None };
        let mut scanned =
            Scanned { end: from, clean: true, generation: self.generation, ..Scanned::default() };
        let (mut at, mut torn) = (from, false);
        while at + PAGE as u64 <= to {
            let page = match window.bytes(at, PAGE, to) {
                Ok(page) => page,
                Err(kind) => {
                    scanned.pass_over(&mut at, kind);
                    continue;
                }
            };
            if !page.starts_with(MAGIC) {
                scanned.clean &= page.iter().all(|&byte| byte == 0);
                torn = true;
                at += PAGE as u64;
                continue;
            }
            match self.record(&mut window, at, to, scanned.generation) {
                Ok(found) => {
                    at += found.record_bytes as u64;
                    scanned.end = at;
                    scanned.clean = true;
                    scanned.torn = torn;
                    scanned.generation = Some(found.place.generation);
                    scanned.records.push(Entry::of(&found));
                }
                Err(kind) => {
                    torn = true;
                    scanned.pass_over(&mut at, kind);
                }
            }
        }
        scanned
    }

    /// The record at `at`, if it is sound, whole and belongs there.
    fn record(
        &self,
        window: &mut Window<'_>,
        at: u64,
        to: u64,
        generation: Option<u64>,
    ) -> Result<PlacedHeader, MissKind> {
        let found = match PlacedHeader::decode(window.bytes(at, PAGE, to)?) {
            Err(NotAHeader::NeedsBytes(needed)) => {
                PlacedHeader::decode(window.bytes(at, page_ceil(needed.min(MAX_HEADER_BYTES)), to)?)
            }
            decoded => decoded,
        };
        let found = found.map_err(|_| MissKind::HeaderChecksum)?;
        let belongs = match generation {
            Some(generation) => found.place.generation == generation,
            None => at == RECORDS_AT,
        };
        if found.place.segment != self.id || found.place.offset != at || !belongs {
            return Err(MissKind::WrongRecord);
        }
        if at + found.record_bytes as u64 > to {
            return Err(MissKind::Truncated);
        }
        if self.verify_payload {
            let record = window.bytes(at, found.record_bytes, to)?;
            for plane in &found.header.planes {
                verify::plane(plane, &record[plane.range()], &self.shared.pool)?;
            }
            self.write_again(at, record)?;
        }
        Ok(found)
    }
}

impl Scan<'_> {
    /// Writes what is there already. A flush that failed in an earlier process may have left it behind for good, and
    /// then no later flush would cover it: a flush proves only what was written since the last one.
    fn write_again(&self, at: u64, record: &[u8]) -> Result<(), MissKind> {
        let Shared { disk, pool, .. } = self.shared;
        let mut buf = pool.take(record.len());
        buf.copy_from_slice(record);
        let written = wait(disk.as_ref(), |reply| Op::write(self.file, at, buf, 0, reply));
        written.map(drop).map_err(|_| MissKind::ReadError)
    }
}

/// The part of the segment that is in memory.
struct Window<'a> {
    scan: &'a Scan<'a>,
    start: u64,
    buf: Option<AlignedBuf>,
}

impl Window<'_> {
    /// `len` bytes at `at`, both whole pages, none of them behind `to`.
    fn bytes(&mut self, at: u64, len: usize, to: u64) -> Result<&[u8], MissKind> {
        if at + len as u64 > to {
            return Err(MissKind::Truncated);
        }
        let held = self.buf.as_ref().map_or(0, |buf| buf.len() as u64);
        if at < self.start || at + len as u64 > self.start + held {
            self.buf = None;
            let ahead = if self.scan.verify_payload { PAYLOAD_READ_BYTES } else { HEADER_READ_BYTES };
            let rest = usize::try_from((to - at) / PAGE as u64 * PAGE as u64).unwrap_or(usize::MAX);
            // A bad sector in the bytes ahead must not hide the sound ones before it.
            let read = self.read(at, len.max(ahead.min(rest))).or_else(|_| self.read(at, len))?;
            self.start = at;
            self.buf = Some(read);
        }
        let skip = usize::try_from(at - self.start).unwrap_or(usize::MAX);
        self.buf.as_ref().and_then(|buf| buf.get(skip..skip + len)).ok_or(MissKind::ReadError)
    }

    fn read(&self, at: u64, len: usize) -> Result<AlignedBuf, MissKind> {
        let Shared { disk, pool, counters, .. } = self.scan.shared;
        let read = read_exact(disk.as_ref(), pool, self.scan.file, at, len);
        read.inspect(|buf| counters.read_bytes.add(buf.len() as u64)).map_err(|error| match miss_of(&error) {
            // What is scanned lies within the file: a short read is the device's failure, and may succeed next time.
            MissKind::Truncated => MissKind::ReadError,
            kind => kind,
        })
    }
}

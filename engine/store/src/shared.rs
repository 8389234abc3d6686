//! What the parts of an open store have in common.

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use esker_prefix::{ObjectId, ObjectKind};

use crate::breaker::Breaker;
use crate::clock::StoreTime;
use crate::commit::Tail;
use crate::erasure::Lapses;
use crate::fetch::Verifiers;
use crate::hits::HitCounts;
use crate::index::{Changes, Entry, Index, Phase};
use crate::io::{AlignedBuf, BufferPool, ByteGate, Disk, FileId, Op, PAGE, page_ceil, read_exact, wait};
use crate::lease::Leases;
use crate::observer::{Observed, Removal};
use crate::record::ContentDigest;
use crate::sealing::Sealer;
use crate::segment::{PageKind, SegmentPage, SegmentTable, Spot, last_page};
use crate::stats::Counters;
use crate::table::{Located, Table};
use crate::verify;
use crate::wear::WearFile;
use crate::{MissKind, PutOutcome, Result, StoreError, StoreSettings};

/// The rest of a sealed segment is given back from this share of its length on, an eighth: less is not worth the call.
const REST_SHARE: u64 = 8;

pub(crate) struct Shared {
    pub(crate) settings: StoreSettings,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) pool: Arc<BufferPool>,
    pub(crate) verifiers: Verifiers,
    /// Encrypts what is secret, where this store keeps secrets.
    pub(crate) sealer: Option<Arc<dyn Sealer>>,
    pub(crate) index: Index,
    pub(crate) table: Table,
    pub(crate) time: StoreTime,
    pub(crate) leases: Leases,
    pub(crate) lapses: Lapses,
    pub(crate) segments: SegmentTable,
    pub(crate) counters: Counters,
    pub(crate) hits: HitCounts,
    pub(crate) wear: WearFile,
    pub(crate) breaker: Arc<Breaker>,
    pub(crate) observed: Observed,
    /// Held by evictions, expiries and erasures from when they choose until the space is given back: what two chose would be given
    /// back twice, and a segment that still holds something counted as empty.
    pub(crate) reclaiming: Mutex<()>,
    /// Whether the file system cannot give back parts of a file.
    pub(crate) holeless: AtomicBool,
    pub(crate) reading: Arc<ByteGate>,
    pub(crate) putting: Arc<ByteGate>,
    /// The folder's lock; the kernel drops it with the file.
    pub(crate) _lock: File,
}

impl Shared {
    /// Keeps others from choosing what goes.
    pub(crate) fn reclaim(&self) -> MutexGuard<'_, ()> {
        self.reclaiming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The digest of what is stored under a name. Of what the store writes about itself the newest holds, so nothing
    /// counts as stored.
    pub(crate) fn stored_digest(&self, id: ObjectId) -> Option<ContentDigest> {
        let located = self.table.get(id).filter(|_| !is_own(id))?;
        self.digest_of(id, &located)
    }

    /// The digest of a stored object's content: from the index, or from the record if the index cannot tell. `None` if
    /// the record is bad; it is in quarantine then.
    pub(crate) fn digest_of(&self, id: ObjectId, located: &Located) -> Option<ContentDigest> {
        if let Ok(Some(entry)) = self.index.get(located.spot)
            && entry.id == id
        {
            return Some(entry.digest);
        }
        let segment = self.segments.get(located.spot.segment)?;
        let read = || {
            let bytes = self.read(located, 0, page_ceil(located.header_bytes as usize))?;
            verify::header(&bytes, id, located, segment.generation)
        };
        // Once more before it is declared bad.
        read()
            .or_else(|_| read())
            .map(|header| header.content_digest())
            .inspect_err(|&kind| self.quarantine(id, located, kind))
            .ok()
    }

    /// Reads part of a record: `len` bytes from `start`, both in bytes of the record, rounded outward to pages by
    /// the caller.
    pub(crate) fn read(
        &self,
        located: &Located,
        start: usize,
        len: usize,
    ) -> std::result::Result<AlignedBuf, MissKind> {
        self.read_until(located, start, len, None)
    }

    /// As [`Shared::read`], up to a deadline, if there is one.
    pub(crate) fn read_until(
        &self,
        located: &Located,
        start: usize,
        len: usize,
        deadline: Option<Instant>,
    ) -> std::result::Result<AlignedBuf, MissKind> {
        let segment = self.segments.get(located.spot.segment).ok_or(MissKind::Absent)?;
        if !self.admits_read() {
            return Err(MissKind::Unavailable);
        }
        let offset = located.spot.offset + start as u64;
        let read = match deadline {
            None => read_exact(self.disk.as_ref(), &self.pool, segment.file, offset, len),
            Some(deadline) => {
                let (reply, completions) = mpsc::channel();
                self.disk.submit(Op::read(segment.file, offset, self.pool.take(len), 0, &reply));
                let left = deadline.saturating_duration_since(Instant::now());
                // What comes later goes back to the pool.
                let completion = completions.recv_timeout(left).map_err(|_| MissKind::Deadline)?;
                completion
                    .full()
                    .and_then(|buf| buf.ok_or_else(|| io::Error::other("a read without its buffer")))
            }
        };
        match &read {
            Ok(_) => self.breaker.worked(),
            Err(error) if miss_of(error) == MissKind::ReadError => self.breaker.failed(),
            Err(_) => {}
        }
        read.inspect(|buf| self.counters.read_bytes.add(buf.len() as u64)).map_err(|error| miss_of(&error))
    }

    /// Whether the device may be asked for anything.
    pub(crate) fn admits_read(&self) -> bool {
        self.settings.skips_breaker() || self.breaker.admits()
    }

    /// Forgets a bad record, unless its name has come to mean another one, or the device is at fault.
    pub(crate) fn quarantine(&self, id: ObjectId, located: &Located, kind: MissKind) {
        let Spot { segment, offset } = located.spot;
        if kind == MissKind::Unavailable {
            return;
        }
        let unread = kind == MissKind::ReadError && !self.settings.skips_breaker();
        let mut suspects = unread.then(|| self.breaker.suspects());
        if let Some(suspects) = &mut suspects
            && self.breaker.is_open()
        {
            suspects.drain(..).for_each(|entry| self.reinstate(&entry));
            return;
        }
        if !self.table.remove_if(id, located.spot) {
            return;
        }
        if let Some(suspects) = &mut suspects {
            suspects.extend(self.index.get(located.spot).ok().flatten());
        }
        drop(suspects);
        self.observed.went(&self.entries_at([located.spot]), Removal::Damaged);
        // The device may read it next time: a miss until the next opening, and no reason to forget it.
        if matches!(kind, MissKind::ReadError | MissKind::Truncated) {
            return;
        }
        // The space stays taken until the segment goes: whoever looks into the damage finds it.
        self.counters.quarantined.add(1);
        tracing::warn!(?id, %kind, %segment, offset, "bad record quarantined");
        let mut changes = Changes::default();
        changes.remove(located.spot);
        if let Err(error) = self.index.write(changes) {
            tracing::error!(?id, %error, "the index still names a bad record");
        }
    }

    /// What the index says of these places, if anybody wants to be told. What it cannot say is left out.
    pub(crate) fn entries_at(&self, spots: impl IntoIterator<Item = Spot>) -> Vec<Entry> {
        if !self.observed.is_watched() {
            return Vec::new();
        }
        spots.into_iter().filter_map(|spot| self.index.get(spot).ok().flatten()).collect()
    }

    /// Takes a record back that was forgotten for a failed read.
    pub(crate) fn reinstate(&self, entry: &Entry) {
        if self.segments.get(entry.spot.segment).is_none() || self.table.get(entry.id).is_some() {
            return;
        }
        // The index has kept it, unless it was evicted or erased meanwhile.
        if !self.index.get(entry.spot).is_ok_and(|kept| kept == Some(*entry)) {
            return;
        }
        self.observed.came([entry]);
        self.table.insert(entry);
        self.counters.reinstated.add(1);
    }

    pub(crate) fn write_segment_page(
        &self,
        file: FileId,
        offset: u64,
        kind: PageKind,
        page: &SegmentPage,
    ) -> io::Result<()> {
        let mut buf = self.pool.take(PAGE);
        page.encode(kind, &mut buf);
        wait(self.disk.as_ref(), |reply| Op::write(file, offset, buf, 0, reply))?;
        self.counters.written_bytes.add(PAGE as u64);
        Ok(())
    }

    /// Writes a segment's header and the copy of it, where the seal will go.
    pub(crate) fn write_headers(&self, file: FileId, header: &SegmentPage) -> io::Result<()> {
        self.write_segment_page(file, 0, PageKind::Header, header)?;
        self.write_segment_page(file, last_page(header.extent_bytes), PageKind::Header, header)
    }

    /// Closes a segment whose records are all flushed. If that fails nothing is added to it all the same.
    pub(crate) fn seal(&self, tail: &Tail, sequence: u64) -> Result<()> {
        self.write_seal(tail, sequence).inspect_err(|_| {
            self.segments.update(tail.id, |segment| segment.sealed = true);
        })
    }

    fn write_seal(&self, tail: &Tail, sequence: u64) -> Result<()> {
        let &Tail { id, class, generation, published_at, .. } = tail;
        let page = SegmentPage { id, class, generation, extent_bytes: published_at, sequence };
        self.write_segment_page(tail.file, tail.records_end(), PageKind::Seal, &page)
            .and_then(|()| wait(self.disk.as_ref(), |reply| Op::sync(tail.file, 0, reply)))
            .map_err(StoreError::io("sealing", tail.id.file_name()))?;
        let mut changes = Changes::default();
        changes.put_segment(tail.id, &tail.state(Phase::Sealed, sequence));
        self.index.write(changes)?;
        self.segments.update(tail.id, |segment| (segment.sealed, segment.complete) = (true, true));
        // Of one that was closed early.
        let rest_bytes = tail.records_end().saturating_sub(published_at);
        if rest_bytes > tail.len_bytes / REST_SHARE {
            self.give_back(id, tail.file, published_at, rest_bytes);
        }
        Ok(())
    }

    pub(crate) fn count_put(&self, outcome: &Result<PutOutcome>) {
        let counter = match outcome {
            Ok(PutOutcome::Stored) => &self.counters.stored,
            Ok(PutOutcome::Present) => &self.counters.present,
            Ok(PutOutcome::Declined) => &self.counters.declined,
            Err(StoreError::ContentMismatch { .. }) => &self.counters.content_mismatch,
            Err(_) => &self.counters.put_errors,
        };
        counter.add(1);
    }
}

/// Whether an object is one that the store writes about itself.
pub(crate) fn is_own(id: ObjectId) -> bool {
    matches!(id.kind, ObjectKind::Lease | ObjectKind::Erasure)
}

/// What a failed read means for the record.
pub(crate) fn miss_of(error: &io::Error) -> MissKind {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => MissKind::Truncated,
        io::ErrorKind::NotFound => MissKind::Absent,
        _ => MissKind::ReadError,
    }
}

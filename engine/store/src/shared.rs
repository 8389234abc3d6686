//! What the parts of an open store have in common.

use std::fs::File;
use std::io;
use std::sync::Arc;

use esker_prefix::ObjectId;

use crate::commit::Tail;
use crate::index::{Changes, Entry, Index, Phase};
use crate::io::{AlignedBuf, BufferPool, ByteGate, Disk, FileId, Op, PAGE, read_exact, wait};
use crate::segment::{PageKind, SegmentPage, SegmentTable};
use crate::stats::Counters;
use crate::{MissKind, PutOutcome, Result, StoreError, StoreSettings};

pub(crate) struct Shared {
    pub(crate) settings: StoreSettings,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) pool: Arc<BufferPool>,
    pub(crate) index: Index,
    pub(crate) segments: SegmentTable,
    pub(crate) counters: Counters,
    pub(crate) reading: Arc<ByteGate>,
    pub(crate) putting: Arc<ByteGate>,
    /// The folder's lock; the kernel drops it with the file.
    pub(crate) _lock: File,
}

impl Shared {
    /// The entries of objects whose segments can be read. What lies in one that cannot is not stored, so that it
    /// can be put again.
    pub(crate) fn known(&self, ids: &[ObjectId]) -> Vec<Result<Option<Entry>>> {
        let readable = |entry: &Entry| self.segments.get(entry.place.segment).is_some();
        let entries = self.index.get_many(ids).into_iter();
        entries.map(|entry| entry.map(|entry| entry.filter(readable))).collect()
    }

    /// Reads part of a record: `len` bytes from `start`, both in bytes of the record, rounded outward to pages by
    /// the caller.
    pub(crate) fn read(
        &self,
        entry: &Entry,
        start: usize,
        len: usize,
    ) -> std::result::Result<AlignedBuf, MissKind> {
        let segment = self.segments.get(entry.place.segment).ok_or(MissKind::Absent)?;
        let offset = entry.place.offset + start as u64;
        let read = read_exact(self.disk.as_ref(), &self.pool, segment.file, offset, len);
        read.inspect(|buf| self.counters.read_bytes.add(buf.len() as u64)).map_err(|error| miss_of(&error))
    }

    /// Takes a bad record out of the index, unless the entry has come to mean another one.
    pub(crate) fn quarantine(&self, id: ObjectId, entry: &Entry, kind: MissKind) {
        match self.index.remove_if(id, entry) {
            Ok(true) => {
                self.counters.quarantined.add(1);
                let place = entry.place;
                tracing::warn!(?id, %kind, segment = %place.segment, offset = place.offset, "bad record quarantined");
            }
            Ok(false) => {}
            Err(error) => tracing::error!(?id, %kind, %error, "a bad record could not be quarantined"),
        }
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

    /// Closes a segment whose records are all flushed.
    pub(crate) fn seal(&self, tail: &Tail, sequence: u64) -> Result<()> {
        let page =
            SegmentPage { id: tail.id, generation: tail.generation, extent_bytes: tail.append_at, sequence };
        self.write_segment_page(tail.file, tail.len_bytes - PAGE as u64, PageKind::Seal, &page)
            .and_then(|()| wait(self.disk.as_ref(), |reply| Op::sync(tail.file, 0, reply)))
            .map_err(StoreError::io("sealing", tail.id.file_name()))?;
        let mut changes = Changes::default();
        changes.put_segment(tail.id, &tail.state(Phase::Sealed, sequence));
        self.index.write(changes)
    }

    pub(crate) fn count_put(&self, outcome: &Result<PutOutcome>) {
        let counter = match outcome {
            Ok(PutOutcome::Stored) => &self.counters.stored,
            Ok(PutOutcome::Present) => &self.counters.present,
            Err(StoreError::ContentMismatch { .. }) => &self.counters.content_mismatch,
            Err(_) => &self.counters.put_errors,
        };
        counter.add(1);
    }
}

/// What a failed read means for the record.
pub(crate) fn miss_of(error: &io::Error) -> MissKind {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => MissKind::Truncated,
        io::ErrorKind::NotFound => MissKind::Absent,
        _ => MissKind::ReadError,
    }
}

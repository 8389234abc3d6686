//! Recovery: bringing the index to what the segments hold.
//!
//! The index knows for each segment up to where it knows it (the watermark). Behind that, records are searched page by
//! page, so that a torn or damaged one ends nothing; of two with one id the one with the higher sequence holds. What
//! lies in an unsealed segment may never have been flushed, so its payload is verified and the segment flushed before
//! anything of it is indexed; a sealed segment's headers are enough. Damage never prevents a start.

use std::collections::HashMap;
use std::path::Path;

use esker_prefix::{ObjectId, ObjectKind};

use crate::commit::{Position, Tail};
use crate::index::{Changes, Entry, Phase, SegmentState};
use crate::io::{Op, PAGE, read_exact, wait};
use crate::scan::{Scan, Scanned};
use crate::segment::{OpenSegment, PageKind, RECORDS_AT, SegmentId, SegmentPage};
use crate::shared::Shared;
use crate::stats::MissCounts;
use crate::{Result, StoreError};

/// Entries compared and written at a time.
const APPLY_ENTRIES: usize = 1024;

/// What recovery did.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    pub(crate) records_indexed: u64,
    pub(crate) records_dropped: MissCounts,
    pub(crate) entries_dropped: u64,
    pub(crate) unreadable_segments: Vec<String>,
}

/// Opens all segments, brings the index up to date and finds where writing goes on.
pub(crate) fn recover(shared: &Shared, dir: &Path) -> Result<(Position, Recovery)> {
    let mut known: HashMap<SegmentId, SegmentState> = shared.index.segments()?.into_iter().collect();
    let names = shared.disk.list().map_err(StoreError::io("listing", dir))?;
    let mut ids: Vec<SegmentId> = names.iter().filter_map(|name| SegmentId::from_file_name(name)).collect();
    ids.sort_unstable();

    let mut work = Worker { shared, dir, report: Recovery::default(), sequence: 0 };
    let mut tail = None;
    let mut shrunk = false;
    for &id in &ids {
        let state = known.remove(&id);
        work.sequence = work.sequence.max(state.map_or(0, |state| state.sequence));
        let (file, len_bytes) = match shared.disk.open(&id.file_name()) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::error!(segment = %id, %error, "a segment cannot be opened");
                work.report.unreadable_segments.push(id.file_name());
                continue;
            }
        };
        let found = Found { id, segment: OpenSegment { file, len_bytes }, state };
        shrunk |= state.is_some_and(|state| state.watermark > len_bytes);
        // Only the newest segment may be appended to; an older one that was left open is closed.
        if let Some(open) = tail.take() {
            work.seal(&open);
        }
        tail = work.segment(&found)?;
    }
    shrunk |= !known.is_empty();
    if shrunk {
        work.drop_unreachable(known.into_keys())?;
    }
    let last = ids.last().map_or(0, |id| id.0);
    let position = Position { tail, next_segment: SegmentId(last + 1), next_sequence: work.sequence + 1 };
    Ok((position, work.report))
}

struct Worker<'a> {
    shared: &'a Shared,
    dir: &'a Path,
    report: Recovery,
    /// Highest seen.
    sequence: u64,
}

struct Found {
    id: SegmentId,
    segment: OpenSegment,
    state: Option<SegmentState>,
}

impl Worker<'_> {
    /// Takes one segment in. Returns it as the tail if it may be appended to.
    fn segment(&mut self, found: &Found) -> Result<Option<Tail>> {
        let &Found { id, segment, state } = found;
        let header = self.page(found, 0, PageKind::Header)?;
        // Only of a segment known to have its full length is it known where its seal is or goes.
        let whole = header.is_some_and(|header| header.extent_bytes == segment.len_bytes);
        let last_page = segment.len_bytes.saturating_sub(PAGE as u64) / PAGE as u64 * PAGE as u64;
        let seal = self.page(found, last_page, PageKind::Seal)?;
        let seal = seal.filter(|seal| header.is_none_or(|header| header.generation == seal.generation));
        let generation = header.or(seal).map(|page| page.generation).or(state.map(|state| state.generation));
        let suspect = state.is_some_and(|state| state.phase == Phase::Suspect);

        let from = state.map_or(RECORDS_AT, |state| state.watermark);
        let to = match seal {
            Some(seal) => seal.extent_bytes.min(last_page),
            None if suspect => from,
            None if whole => last_page,
            None => segment.len_bytes,
        };
        let scan = Scan { shared: self.shared, segment, id, generation, verify_payload: seal.is_none() };
        let scanned = scan.run(from, to);
        for (kind, count) in scanned.dropped.iter() {
            tracing::warn!(segment = %id, %kind, count, "bad records passed over");
        }
        self.report.records_dropped.merge(&scanned.dropped);

        let Some(generation) = scanned.generation else {
            if scanned.clean && header.is_none() && segment.len_bytes > 0 && self.is_blank(found) {
                // Made, and never written to.
                let removed = self.shared.disk.remove(&id.file_name());
                removed.map_err(StoreError::io("removing", self.dir.join(id.file_name())))?;
            } else {
                tracing::error!(segment = %id, "nothing in this segment can be recognised; it is left alone");
                self.report.unreadable_segments.push(id.file_name());
            }
            return Ok(None);
        };
        self.shared.segments.insert(id, segment);
        let append_at = scanned.end;
        let mut tail = Tail { id, generation, file: segment.file, len_bytes: segment.len_bytes, append_at };
        if suspect {
            return Ok(None);
        }
        if seal.is_none()
            && !scanned.records.is_empty()
            && let Err(error) = wait(self.shared.disk.as_ref(), |reply| Op::sync(segment.file, 0, reply))
        {
            tracing::error!(segment = %id, %error, "a segment cannot be flushed; what it may have lost is not indexed");
            tail.append_at = from;
            self.remember(&tail, Phase::Suspect)?;
            return Ok(None);
        }
        self.apply(&scanned)?;
        if let Some(unread_at) = scanned.unread_at {
            // The device may read it next time: scanned again from there, neither appended to nor sealed.
            tail.append_at = unread_at;
            self.remember(&tail, Phase::Open)?;
            return Ok(None);
        }
        let Some(seal) = seal else {
            tail.append_at = tail.append_at.min(to.max(from));
            self.remember(&tail, Phase::Open)?;
            let appendable = whole && scanned.clean;
            if !appendable && whole {
                self.seal(&tail);
            }
            return Ok(appendable.then_some(tail));
        };
        self.sequence = self.sequence.max(seal.sequence);
        tail.append_at = seal.extent_bytes;
        self.remember(&tail, Phase::Sealed)?;
        Ok(None)
    }

    /// A header or seal page, if it is there, sound and this segment's.
    fn page(&self, found: &Found, offset: u64, kind: PageKind) -> Result<Option<SegmentPage>> {
        let Found { id, segment, .. } = found;
        let path = self.dir.join(id.file_name());
        let read = read_exact(self.shared.disk.as_ref(), &self.shared.pool, segment.file, offset, PAGE);
        let Ok(page) = read else { return Ok(None) };
        Ok(SegmentPage::decode(kind, &page, &path)?.filter(|page| page.id == *id))
    }

    fn is_blank(&self, found: &Found) -> bool {
        let read = read_exact(self.shared.disk.as_ref(), &self.shared.pool, found.segment.file, 0, PAGE);
        read.is_ok_and(|page| page.iter().all(|&byte| byte == 0))
    }

    /// Adds what a scan found to the index, unless a later record of the same id is there.
    fn apply(&mut self, scanned: &Scanned) -> Result<()> {
        for some in scanned.records.chunks(APPLY_ENTRIES) {
            let mut newest: HashMap<ObjectId, &Entry> = HashMap::with_capacity(some.len());
            for (id, entry) in some {
                let holder = newest.entry(*id).or_insert(entry);
                if holder.sequence < entry.sequence {
                    *holder = entry;
                }
                self.sequence = self.sequence.max(entry.sequence);
            }
            let ids: Vec<ObjectId> = newest.keys().copied().collect();
            let mut changes = Changes::default();
            for (id, known) in ids.iter().zip(self.shared.index.get_many(&ids)) {
                let entry = newest[id];
                // An entry that cannot be read is replaced, and the index marked for a rebuild.
                if known.ok().flatten().is_none_or(|known| known.sequence < entry.sequence) {
                    changes.put(*id, entry);
                    self.report.records_indexed += 1;
                }
            }
            self.shared.index.write(changes)?;
        }
        Ok(())
    }

    fn remember(&self, tail: &Tail, phase: Phase) -> Result<()> {
        let mut changes = Changes::default();
        changes.put_segment(tail.id, &tail.state(phase, self.sequence));
        self.shared.index.write(changes)
    }

    fn seal(&self, tail: &Tail) {
        if let Err(error) = self.shared.seal(tail, self.sequence) {
            tracing::warn!(segment = %tail.id, %error, "a segment could not be sealed");
        }
    }

    /// Removes entries that point behind the end of a segment or into a missing one.
    fn drop_unreachable(&mut self, missing: impl Iterator<Item = SegmentId>) -> Result<()> {
        for kind in [ObjectKind::Block, ObjectKind::State, ObjectKind::Layout] {
            let mut changes = Changes::default();
            for item in self.shared.index.of_kind(kind) {
                let (id, entry) = item?;
                let segment = self.shared.segments.get(entry.place.segment);
                if segment.is_none_or(|segment| entry.end() > segment.len_bytes) {
                    changes.remove(id);
                    self.report.entries_dropped += 1;
                }
            }
            self.shared.index.write(changes)?;
        }
        let mut changes = Changes::default();
        missing.for_each(|id| changes.remove_segment(id));
        self.shared.index.write(changes)
    }
}

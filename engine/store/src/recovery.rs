//! Recovery: bringing the index to what the segments hold.
//!
//! The index knows for each segment up to where it knows it (the watermark). Behind that, records are searched page by
//! page, so that a torn or damaged one ends nothing; of two with one id the one with the higher sequence holds. What
//! lies in an unsealed segment may never have been flushed, so its payload is verified and the segment flushed before
//! anything of it is indexed; a sealed segment's headers are enough. Damage never prevents a start.
//!
//! When the index is right, the resident table is filled from it.

use std::collections::HashMap;
use std::path::Path;

use esker_prefix::ObjectKind;

use crate::commit::{Position, Tail};
use crate::erasure::Erase;
use crate::index::{Changes, Entry, Phase, SegmentState};
use crate::io::{FileId, Op, PAGE, read_exact, wait};
use crate::scan::{Scan, Scanned};
use crate::segment::{OpenSegment, PageKind, RECORDS_AT, SegmentId, SegmentPage};
use crate::shared::Shared;
use crate::stats::MissCounts;
use crate::{Result, StoreError, TtlClass};

/// What a segment takes at most when everything in it was given back: its own two pages, and what a file system keeps.
const EMPTY_BYTES: u64 = 16 * PAGE as u64;

/// Entries compared and written at a time.
const APPLY_ENTRIES: usize = 1024;

/// What recovery did.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    pub(crate) records_indexed: u64,
    pub(crate) records_dropped: MissCounts,
    pub(crate) entries_dropped: u64,
    pub(crate) unreadable_segments: Vec<String>,
    /// The index could not be read to its end, and is marked for it.
    pub(crate) index_damaged: bool,
    /// Leases and erasures.
    pub(crate) own: Vec<Entry>,
}

/// Opens all segments, brings the index up to date and finds where writing goes on.
pub(crate) fn recover(shared: &Shared, dir: &Path) -> Result<(Position, Recovery)> {
    let mut known: HashMap<SegmentId, SegmentState> = shared.index.segments()?.into_iter().collect();
    let names = shared.disk.list().map_err(StoreError::io("listing", dir))?;
    let mut ids: Vec<SegmentId> = names.iter().filter_map(|name| SegmentId::from_file_name(name)).collect();
    ids.sort_unstable();

    let mut work = Worker { shared, dir, report: Recovery::default(), sequence: 0 };
    let mut tails: Vec<Tail> = Vec::new();
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
        let found = Found { id, file, len_bytes, state };
        let Some(tail) = work.segment(&found)? else { continue };
        // Of each class only the newest segment may be appended to; an older one that was left open is closed.
        if let Some(open) = tails.iter_mut().find(|open| open.class == tail.class) {
            work.seal(&std::mem::replace(open, tail));
        } else {
            tails.push(tail);
        }
    }
    let mut changes = Changes::default();
    known.into_keys().for_each(|missing| changes.remove_segment(missing));
    work.load(changes)?;
    let last = ids.last().map_or(0, |id| id.0);
    let position = Position { tails, next_segment: SegmentId(last + 1), next_sequence: work.sequence + 1 };
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
    file: FileId,
    len_bytes: u64,
    state: Option<SegmentState>,
}

impl Worker<'_> {
    /// Takes one segment in. Returns it as the tail if it may be appended to.
    fn segment(&mut self, found: &Found) -> Result<Option<Tail>> {
        let &Found { id, file, len_bytes, state } = found;
        let header = self.page(found, 0, PageKind::Header)?;
        // Only of a segment known to have its full length is it known where its seal is or goes.
        let whole = header.is_some_and(|header| header.extent_bytes == len_bytes);
        let last_page = len_bytes.saturating_sub(PAGE as u64) / PAGE as u64 * PAGE as u64;
        let seal = self.page(found, last_page, PageKind::Seal)?;
        let seal = seal.filter(|seal| header.is_none_or(|header| header.generation == seal.generation));
        let generation = header.or(seal).map(|page| page.generation).or(state.map(|state| state.generation));
        let suspect = state.is_some_and(|state| state.phase == Phase::Suspect);

        let from = state.map_or(RECORDS_AT, |state| state.watermark);
        let to = match seal {
            Some(seal) => seal.extent_bytes.min(last_page),
            None if suspect => from,
            None if whole => last_page,
            None => len_bytes,
        };
        let scan = Scan { shared: self.shared, file, id, generation, verify_payload: seal.is_none() };
        let scanned = scan.run(from, to);
        for (kind, count) in scanned.dropped.iter() {
            tracing::warn!(segment = %id, %kind, count, "bad records passed over");
        }
        self.report.records_dropped.merge(&scanned.dropped);

        let Some(generation) = scanned.generation else {
            if scanned.clean && header.is_none() && len_bytes > 0 && self.is_blank(found, 0) {
                // Made, and never written to.
                let removed = self.shared.disk.remove(&id.file_name());
                removed.map_err(StoreError::io("removing", self.dir.join(id.file_name())))?;
            } else {
                tracing::error!(segment = %id, "nothing in this segment can be recognised; it is left alone");
                self.report.unreadable_segments.push(id.file_name());
            }
            return Ok(None);
        };
        let class = header.or(seal).map_or(TtlClass::default(), |page| page.class);
        // Who does not know when it was used takes it for used now.
        let used_s = self.shared.index.last_use(id)?.unwrap_or_else(|| self.shared.time.now_s());
        self.shared.segments.insert(id, OpenSegment::new(file, len_bytes, generation, class, used_s));
        let mut tail = Tail { id, class, generation, file, len_bytes, append_at: 0, published_at: 0 };
        tail.end_at(scanned.end);
        if suspect {
            // Nothing will be added to it, and its space returns with its last record.
            self.shared.segments.update(id, |segment| segment.sealed = true);
            return Ok(None);
        }
        if seal.is_none()
            && !scanned.records.is_empty()
            && let Err(error) = self.flush(found, header.as_ref())
        {
            tracing::error!(segment = %id, %error, "a segment cannot be flushed; what it may have lost is not indexed");
            // Some of it may have been acknowledged, by a process whose index is gone: scanned and flushed again next
            // time, neither appended to nor sealed until then.
            tail.end_at(from);
            self.remember(&tail, Phase::Open)?;
            return Ok(None);
        }
        self.apply(&scanned)?;
        if let Some(unread_at) = scanned.unread_at {
            // The device may read it next time: scanned again from there, neither appended to nor sealed.
            tail.end_at(unread_at);
            self.remember(&tail, Phase::Open)?;
            return Ok(None);
        }
        if scanned.torn {
            // A seal would vouch for what is torn. Without one all payload is verified whenever the index is built anew.
            self.remember(&tail, Phase::Suspect)?;
            return Ok(None);
        }
        let Some(seal) = seal else {
            tail.end_at(scanned.end.min(to.max(from)));
            self.remember(&tail, Phase::Open)?;
            // A seal that could not be read just now would cut off, one day, what is appended behind it.
            let appendable = whole && scanned.clean && self.is_blank(found, last_page);
            if !appendable && whole {
                self.seal(&tail);
            }
            return Ok(appendable.then_some(tail));
        };
        self.sequence = self.sequence.max(seal.sequence);
        tail.end_at(seal.extent_bytes);
        self.remember(&tail, Phase::Sealed)?;
        Ok(None)
    }

    /// Makes what the scan has written again durable, and the header with it.
    fn flush(&self, found: &Found, header: Option<&SegmentPage>) -> std::io::Result<()> {
        if let Some(header) = header {
            self.shared.write_segment_page(found.file, 0, PageKind::Header, header)?;
        }
        wait(self.shared.disk.as_ref(), |reply| Op::sync(found.file, 0, reply)).map(drop)
    }

    /// A header or seal page, if it is there, sound and this segment's.
    fn page(&self, found: &Found, offset: u64, kind: PageKind) -> Result<Option<SegmentPage>> {
        let Found { id, file, .. } = found;
        let path = self.dir.join(id.file_name());
        let read = read_exact(self.shared.disk.as_ref(), &self.shared.pool, *file, offset, PAGE);
        let Ok(page) = read else { return Ok(None) };
        Ok(SegmentPage::decode(kind, &page, &path)?.filter(|page| page.id == *id))
    }

    fn is_blank(&self, found: &Found, page_at: u64) -> bool {
        let read = read_exact(self.shared.disk.as_ref(), &self.shared.pool, found.file, page_at, PAGE);
        read.is_ok_and(|page| page.iter().all(|&byte| byte == 0))
    }

    /// Adds what a scan found to the index. Which of two records with one name holds is decided when the table is
    /// filled.
    fn apply(&mut self, scanned: &Scanned) -> Result<()> {
        for some in scanned.records.chunks(APPLY_ENTRIES) {
            let mut changes = Changes::default();
            for entry in some {
                changes.put(entry);
                self.sequence = self.sequence.max(entry.sequence);
            }
            self.shared.index.write(changes)?;
        }
        self.report.records_indexed += scanned.records.len() as u64;
        Ok(())
    }

    fn remember(&self, tail: &Tail, phase: Phase) -> Result<()> {
        let mut changes = Changes::default();
        changes.put_segment(tail.id, &tail.state(phase, self.sequence));
        self.shared.segments.update(tail.id, |segment| segment.sealed = phase != Phase::Open);
        self.shared.index.write(changes)
    }

    fn seal(&self, tail: &Tail) {
        if let Err(error) = self.shared.seal(tail, self.sequence) {
            tracing::warn!(segment = %tail.id, %error, "a segment could not be sealed");
        }
    }

    /// Fills the table, and removes entries from the index that point behind the end of a segment, into a missing one,
    /// or at a record that a later one replaces.
    fn load(&mut self, mut changes: Changes) -> Result<()> {
        let mut erasures = Vec::new();
        let mut live_bytes: HashMap<SegmentId, u64> = HashMap::new();
        let mut newest_s = 0;
        for entry in self.shared.index.entries() {
            let Ok(entry) = entry else {
                self.report.index_damaged = true;
                break;
            };
            let segment = self.shared.segments.get(entry.spot.segment);
            if segment.is_none_or(|segment| entry.end() > segment.len_bytes) {
                changes.remove(entry.spot);
                self.report.entries_dropped += 1;
                continue;
            }
            newest_s = newest_s.max(entry.time_s);
            *live_bytes.entry(entry.spot.segment).or_default() += entry.end() - entry.spot.offset;
            if let Some(before) = self.shared.table.insert(&entry, None) {
                let earlier = self.shared.index.get(before.spot)?;
                let earlier = earlier.filter(|before| before.sequence > entry.sequence);
                if let Some(later) = earlier {
                    self.shared.table.insert(&later, None);
                }
                let (loser, len_bytes) = match earlier {
                    Some(_) => (entry.spot, entry.end() - entry.spot.offset),
                    None => (before.spot, before.record_bytes),
                };
                changes.remove(loser);
                *live_bytes.entry(loser.segment).or_default() -= len_bytes;
                self.report.records_indexed = self.report.records_indexed.saturating_sub(1);
            }
            match entry.id.kind {
                ObjectKind::Lease => self.report.own.push(entry),
                ObjectKind::Erasure => {
                    erasures.extend(Erase::of(&entry).map(|erase| (erase, entry.sequence)))
                }
                _ => {}
            }
        }
        self.shared.index.write(changes)?;
        self.shared.time.advance_to(newest_s);
        for (id, bytes) in live_bytes {
            self.shared.segments.update(id, |segment| segment.live_bytes = bytes);
        }
        self.report.own.retain(|entry| self.shared.table.is_at(entry.id, entry.spot));
        for (erase, sequence) in erasures {
            self.shared.erase(erase, sequence)?;
        }
        self.account()
    }

    /// Learns how much of each segment was given back before, and gives back those of which nothing is left.
    fn account(&self) -> Result<()> {
        for (id, segment) in self.shared.segments.all() {
            // Without an answer the segment counts in full.
            let taken = self.shared.disk.allocated_bytes(segment.file).unwrap_or(segment.len_bytes);
            // One that holds something is not empty for want of entries: they may have been lost by mistake.
            if segment.sealed && segment.live_bytes == 0 && taken <= EMPTY_BYTES {
                self.shared.remove_segment(id);
                continue;
            }
            self.shared.segments.update(id, |open| open.punched_bytes = open.len_bytes.saturating_sub(taken));
        }
        Ok(())
    }
}

impl Tail {
    fn end_at(&mut self, end: u64) {
        (self.append_at, self.published_at) = (end, end);
    }
}

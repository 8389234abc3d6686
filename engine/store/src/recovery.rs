//! Recovery: bringing the index to what the segments hold.
//!
//! The index knows for each segment up to where it knows it (the watermark). Behind that, records are searched page by
//! page, so that a torn or damaged one ends nothing; of two with one id the one with the higher sequence holds. What
//! lies in an unsealed segment may never have been flushed, so its payload is verified and the segment flushed before
//! anything of it is indexed; a sealed segment's headers are enough. Damage never prevents a start.
//!
//! Segments are examined several at a time, since one alone waits for its own reads, and taken in one after another, in
//! their order. What was found and waits to be taken in is bounded ([`SCANS`], [`WAITING_CHUNKS`], [`CHUNK_ENTRIES`]).
//!
//! When the index is right, the resident table is filled from it. An index that was lost and built anew, or is older than the
//! segments, may name what was given back since: if some of it is gone it is no record any more, however whole its header is,
//! and must neither answer for what is put nor stand in the way of an older one. Holes tell, without a read.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};

use esker_prefix::ObjectKind;

use crate::commit::{Position, Tail};
use crate::erasure::{Erase, Erasures};
use crate::index::{Bulk, Changes, Entry, Index, Phase, SegmentState};
use crate::io::{FileId, Op, PAGE, read_exact, wait};
use crate::record::PlacedHeader;
use crate::scan::{Met, Scan, Scanned};
use crate::segment::{Ends, OpenSegment, PageKind, RECORDS_AT, SegmentId, SegmentPage, Spot, last_page};
use crate::shared::{Shared, is_own};
use crate::stats::MissCounts;
use crate::{Result, StoreError, TtlClass, verify};

/// What a segment takes at most when everything in it was given back: its own two pages, and what a file system keeps.
const EMPTY_BYTES: u64 = 16 * PAGE as u64;

/// Segments examined at a time; each has one read in flight, or a few where all of it is read. Fewer in tests, which open
/// thousands of stores a minute on a disk that never waits.
pub const SCANS: usize = if cfg!(test) { 3 } else { 16 };
/// Entries handed over at a time.
const CHUNK_ENTRIES: usize = 1024;
/// Such chunks of one segment that wait to be taken in.
const WAITING_CHUNKS: usize = 8;
/// Segments examined ahead of the one that is taken in.
const SEGMENTS_AHEAD: usize = 4 * SCANS;

/// What recovery did.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    pub(crate) records_indexed: u64,
    pub(crate) records_dropped: MissCounts,
    pub(crate) entries_dropped: u64,
    pub(crate) unreadable_segments: Vec<String>,
    /// Leases and erasures.
    pub(crate) own: Vec<Entry>,
}

/// Opens all segments, brings the index up to date and finds where writing goes on.
pub(crate) fn recover(shared: &Shared, dir: &Path) -> Result<(Position, Recovery)> {
    let mut known: HashMap<SegmentId, SegmentState> = shared.index.segments()?.into_iter().collect();
    let known_last = known.keys().map(|id| id.0).max().unwrap_or(0);
    let names = shared.disk.list().map_err(StoreError::io("listing", dir))?;
    let mut ids: Vec<SegmentId> = names.iter().filter_map(|name| SegmentId::from_file_name(name)).collect();
    ids.sort_unstable();

    let mut work =
        Worker { shared, dir, report: Recovery::default(), sequence: 0, passed_over: HashSet::new() };
    let (mut found, mut unopened) = (Vec::with_capacity(ids.len()), Vec::new());
    for &id in &ids {
        let state = known.remove(&id);
        work.sequence = work.sequence.max(state.map_or(0, |state| state.sequence));
        match shared.disk.open(&id.file_name()) {
            Ok((file, len_bytes)) => found.push(Found { id, file, len_bytes, state }),
            Err(error) => {
                tracing::error!(segment = %id, %error, "a segment cannot be opened");
                work.report.unreadable_segments.push(id.file_name());
                unopened.extend(state.map(|state| (id, SegmentState { watermark: RECORDS_AT, ..state })));
            }
        }
    }
    let mut tails: Vec<Tail> = Vec::new();
    examine_all(shared, dir, &found, |found, messages| {
        let Some(tail) = work.segment(found, messages)? else { return Ok(()) };
        // Of each class only the newest segment may be appended to; an older one that was left open is closed.
        if let Some(open) = tails.iter_mut().find(|open| open.class == tail.class) {
            work.seal(&std::mem::replace(open, tail));
        } else {
            tails.push(tail);
        }
        Ok(())
    })?;
    let mut changes = Changes::default();
    known.into_keys().for_each(|missing| changes.remove_segment(missing));
    // Of one that cannot be opened the index names nothing from here on: all of it is scanned once it can be.
    unopened.iter().for_each(|(id, state)| changes.put_segment(*id, state));
    work.load(changes)?;
    // Nobody knows what is in them.
    work.report.unreadable_segments.iter().for_each(|_| shared.lapses.file_leaves());
    // Never a number that an index, this one or one that a power cut brings back, knows another segment by: its watermark
    // and its entries would be taken for the new one's.
    let last = ids.last().map_or(0, |id| id.0).max(shared.index.highest_segment()?.0).max(known_last);
    let position = Position { tails, next_segment: SegmentId(last + 1), next_sequence: work.sequence + 1 };
    Ok((position, work.report))
}

/// Examines segments, several at a time, and has each taken in, in order.
fn examine_all(
    shared: &Shared,
    dir: &Path,
    all: &[Found],
    mut take_in: impl FnMut(&Found, &Receiver<Message>) -> Result<()>,
) -> Result<()> {
    let (senders, receivers): (Vec<_>, Vec<_>) = all
        .iter()
        .map(|_| sync_channel(WAITING_CHUNKS))
        .map(|(to, from)| (Mutex::new(Some(to)), from))
        .unzip();
    let (next, taken_in, moved_on) = (AtomicUsize::new(0), Mutex::new(0_usize), Condvar::new());
    std::thread::scope(|threads| {
        let scan = || {
            threads.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(found) = all.get(number) else { return };
                    let mut done = taken_in.lock().unwrap_or_else(PoisonError::into_inner);
                    while number >= done.saturating_add(SEGMENTS_AHEAD) {
                        done = moved_on.wait(done).unwrap_or_else(PoisonError::into_inner);
                    }
                    if *done == usize::MAX {
                        return;
                    }
                    drop(done);
                    let sender = senders[number].lock().unwrap_or_else(PoisonError::into_inner).take();
                    sender.into_iter().for_each(|sender| found.examine(shared, dir, &sender));
                }
            })
        };
        let scans: Vec<_> = (0..SCANS.min(all.len())).map(|_| scan()).collect();
        let advance = |to: usize| {
            *taken_in.lock().unwrap_or_else(PoisonError::into_inner) = to;
            moved_on.notify_all();
        };
        let mut result = Ok(());
        for (number, (found, messages)) in all.iter().zip(receivers).enumerate() {
            // After an error the others are only let go of: a scan that nobody listens to ends soon.
            result = result.and_then(|()| take_in(found, &messages));
            advance(if result.is_ok() { number + 1 } else { usize::MAX });
        }
        // Not left to the scope: glibc's pthread_detach looks at a thread that may have freed itself (its bug 19951), and
        // these end at once where there is little to examine.
        for scan in scans {
            if let Err(panicked) = scan.join() {
                std::panic::resume_unwind(panicked);
            }
        }
        result
    })
}

/// What examining a segment tells, in order.
enum Message {
    /// Some of its records.
    Records(Vec<Entry>),
    /// The rest, last.
    Examined(Box<Result<Examined>>),
}

/// A segment that was examined.
struct Examined {
    header: Option<SegmentPage>,
    seal: Option<SegmentPage>,
    /// Certainly not sealed.
    open: bool,
    /// Known to have its full length.
    whole: bool,
    from: u64,
    to: u64,
    scanned: Scanned,
    /// Of an unrecognisable one: never written to.
    blank: bool,
}

struct Worker<'a> {
    shared: &'a Shared,
    dir: &'a Path,
    report: Recovery,
    /// Highest seen.
    sequence: u64,
    /// Segments with bad records.
    passed_over: HashSet<SegmentId>,
}

struct Found {
    id: SegmentId,
    file: FileId,
    len_bytes: u64,
    state: Option<SegmentState>,
}

impl Found {
    /// Reads what is to be known of the segment. Changes nothing, but writes what was never known to be flushed again.
    fn examine(&self, shared: &Shared, dir: &Path, to: &SyncSender<Message>) {
        let mut chunk = Vec::new();
        let examined = self.look(shared, dir, &mut |entry| {
            chunk.push(entry);
            if chunk.len() == CHUNK_ENTRIES {
                let _ = to.send(Message::Records(std::mem::take(&mut chunk)));
            }
        });
        let _ = to.send(Message::Records(chunk));
        // Who does not listen has met an error.
        let _ = to.send(Message::Examined(Box::new(examined)));
    }

    fn look(&self, shared: &Shared, dir: &Path, met: &mut dyn FnMut(Entry)) -> Result<Examined> {
        let &Self { id, file, len_bytes, state } = self;
        let read = |at| read_exact(shared.disk.as_ref(), &shared.pool, file, at, PAGE).ok();
        let Ends { header, seal, open, .. } = Ends::read(id, len_bytes, &dir.join(id.file_name()), read)?;
        // Only of a segment known to have its full length is it known where its seal is or goes.
        let whole = header.is_some_and(|header| header.extent_bytes == len_bytes);
        let last_page = last_page(len_bytes);
        let generation = header.or(seal).map(|page| page.generation).or(state.map(|state| state.generation));
        let from = state.map_or(RECORDS_AT, |state| state.watermark);
        let to = match seal {
            Some(seal) => seal.extent_bytes.min(last_page),
            // Of a suspect one too: what failed to be acknowledged, an erasure for one, may be found once the index is gone, and then
            // must not undo what was acknowledged without knowing of it.
            None if whole => last_page,
            None => len_bytes,
        };
        let scan = Scan {
            disk: shared.disk.as_ref(),
            pool: &shared.pool,
            read_bytes: &shared.counters.read_bytes,
            file,
            id,
            generation,
            verify_payload: seal.is_none(),
            write_again: seal.is_none(),
        };
        let scanned = scan.run(from, to, &mut |found| {
            if let Met::Record(entry) = found {
                met(entry);
            }
        });
        let unknown = scanned.generation.is_none();
        // A file may be there before its length is.
        let unmade = unknown && len_bytes == 0 && state.is_none();
        let blank =
            unmade || unknown && scanned.clean && header.is_none() && len_bytes > 0 && self.is_blank(shared);
        Ok(Examined { header, seal, open, whole, from, to, scanned, blank })
    }

    fn is_suspect(&self) -> bool {
        self.state.is_some_and(|state| state.phase == Phase::Suspect)
    }

    fn is_blank(&self, shared: &Shared) -> bool {
        let read = read_exact(shared.disk.as_ref(), &shared.pool, self.file, 0, PAGE);
        read.is_ok_and(|page| page.iter().all(|&byte| byte == 0))
    }
}

impl Worker<'_> {
    /// Takes one segment in. Returns it as the tail if it may be appended to.
    fn segment(&mut self, found: &Found, messages: &Receiver<Message>) -> Result<Option<Tail>> {
        let &Found { id, file, len_bytes, .. } = found;
        let mut records = Gathered::new(&self.shared.index, self.shared.settings.bulk_entries());
        let examined = loop {
            match messages.recv() {
                Ok(Message::Records(some)) => records.add(some)?,
                Ok(Message::Examined(examined)) => break (*examined)?,
                Err(_) => {
                    let gone = std::io::Error::other("its scan ended early");
                    return Err(StoreError::io("scanning", self.dir.join(id.file_name()))(gone));
                }
            }
        };
        let suspect = found.is_suspect();
        let Examined { header, seal, open, whole, from, to, scanned, blank } = examined;
        for (kind, count) in scanned.dropped.iter() {
            tracing::warn!(segment = %id, %kind, count, "bad records passed over");
            self.passed_over.insert(id);
        }
        self.report.records_dropped.merge(&scanned.dropped);

        let Some(generation) = scanned.generation else {
            if blank {
                // Made, and never written to.
                let removed = self.shared.disk.remove(&id.file_name());
                removed.map_err(StoreError::io("removing", self.dir.join(id.file_name())))?;
            } else {
                tracing::error!(segment = %id, "nothing in this segment can be recognised; it is left alone");
                self.report.unreadable_segments.push(id.file_name());
            }
            return Ok(None);
        };
        let class = header.or(seal).map(|page| page.class).or(scanned.class).unwrap_or_default();
        // Who does not know when it was used takes it for used now.
        let used_s = self.shared.index.last_use(id)?.unwrap_or_else(|| self.shared.time.now_s());
        let lowest = header.map_or(0, |header| header.sequence);
        self.shared.segments.insert(id, OpenSegment::new(file, len_bytes, generation, class, used_s, lowest));
        // What is appended may not be earlier than the header says.
        self.sequence = self.sequence.max(lowest.saturating_sub(1));
        let mut tail =
            Tail { id, class, generation, file, len_bytes, append_at: 0, published_at: 0, begun_s: used_s };
        tail.end_at(scanned.end);
        // Nothing will be added to a suspect one, and its space returns with its last record.
        let open_or_suspect = if suspect { Phase::Suspect } else { Phase::Open };
        let flushed = if seal.is_none() && records.count > 0 {
            // A header that is gone, or never came to be, is written from what the index knows: without one nothing could be
            // told once the index is gone, too.
            let unknown = SegmentPage { id, class, generation, extent_bytes: 0, sequence: 0 };
            self.flush(file, &header.unwrap_or(unknown))
        } else if found.state.is_none() && class == TtlClass::PERMANENT {
            // An erasure that was given back, and comes back with a power cut, must not be later than what is put from here on.
            self.sync(file)
        } else {
            Ok(())
        };
        if let Err(error) = flushed {
            tracing::error!(segment = %id, %error, "a segment cannot be flushed; what it may have lost is not indexed");
            // Some of it may have been acknowledged, by a process whose index is gone: scanned and flushed again next
            // time, neither appended to nor sealed until then.
            tail.end_at(from);
            // No later record may have a sequence that one of them has. What the store wrote about itself is in force all the same.
            self.sequence = self.sequence.max(records.sequence);
            let mut changes = Changes::default();
            records.own.iter().for_each(|entry| changes.put(entry));
            self.shared.index.write(changes)?;
            return self.put_off(&tail, open_or_suspect);
        }
        self.apply(records)?;
        if let Some(unread_at) = scanned.unread_at {
            // The device may read it next time: scanned again from there, neither appended to nor sealed.
            tail.end_at(unread_at);
            return self.put_off(&tail, open_or_suspect);
        }
        let unsealed_end = seal.is_none() && !scanned.clean;
        if suspect || scanned.torn || unsealed_end {
            // A seal would vouch for what is torn, and cut off for good what could not be read only this time. Without one all
            // payload is verified whenever the index is built anew.
            self.remember(&tail, Phase::Suspect)?;
            self.shared.segments.update(id, |segment| segment.complete = whole);
            return Ok(None);
        }
        let Some(seal) = seal else {
            tail.end_at(scanned.end.min(to.max(from)));
            self.remember(&tail, Phase::Open)?;
            // A seal that could not be read just now would cut off, one day, what is appended behind it. So would one that an
            // earlier process failed to write and that may still reach the device: both headers are written again, the copy
            // where the seal goes, and the next flush rules that out.
            let appendable = whole
                && scanned.clean
                && open
                && header.is_some_and(|header| self.shared.write_headers(file, &header).is_ok());
            if !appendable && whole {
                self.seal(&tail);
            }
            return Ok(appendable.then_some(tail));
        };
        self.sequence = self.sequence.max(seal.sequence);
        tail.end_at(seal.extent_bytes);
        self.remember(&tail, Phase::Sealed)?;
        self.shared.segments.update(id, |segment| segment.complete = true);
        Ok(None)
    }

    /// Makes what the scan has written again durable, and the header with it.
    fn flush(&self, file: FileId, header: &SegmentPage) -> std::io::Result<()> {
        self.shared.write_segment_page(file, 0, PageKind::Header, header)?;
        self.sync(file)
    }

    fn sync(&self, file: FileId) -> std::io::Result<()> {
        wait(self.shared.disk.as_ref(), |reply| Op::sync(file, 0, reply)).map(drop)
    }

    /// Adds what a scan found to the index. Which of two records with one name holds is decided when the table is
    /// filled.
    fn apply(&mut self, records: Gathered<'_>) -> Result<()> {
        self.report.records_indexed += records.count;
        self.sequence = self.sequence.max(records.sequence);
        records.finish()
    }

    fn remember(&self, tail: &Tail, phase: Phase) -> Result<()> {
        let mut changes = Changes::default();
        changes.put_segment(tail.id, &tail.state(phase, self.sequence));
        self.shared.segments.update(tail.id, |segment| segment.sealed = phase != Phase::Open);
        self.shared.index.write(changes)
    }

    /// Leaves a segment, which may hold more than the index names, to the next opening.
    fn put_off(&self, tail: &Tail, phase: Phase) -> Result<Option<Tail>> {
        self.remember(tail, phase)?;
        self.shared.segments.update(tail.id, |segment| segment.unread = true);
        Ok(None)
    }

    fn seal(&self, tail: &Tail) {
        if let Err(error) = self.shared.seal(tail, self.sequence) {
            tracing::warn!(segment = %tail.id, %error, "a segment could not be sealed");
        }
    }

    /// Fills the table, and removes entries from the index that point behind the end of a segment, into a missing one,
    /// or at a record that a later one replaces.
    fn load(&mut self, mut changes: Changes) -> Result<()> {
        let mut erasures = Erasures::default();
        let mut live_bytes: HashMap<SegmentId, u64> = HashMap::new();
        let mut newest_s = 0;
        let (mut holes, mut given_back) = (Holes::default(), Vec::new());
        for entry in self.shared.index.entries() {
            let entry = entry?;
            let segment = self.shared.segments.get(entry.spot.segment);
            if segment.is_none_or(|segment| entry.end() > segment.len_bytes) {
                changes.remove(entry.spot);
                self.report.entries_dropped += 1;
                continue;
            }
            if let Some(segment) = segment
                && holes.touch(self.shared, segment.file, &entry)
                && self.is_gone(segment.file, segment.generation, &entry)
            {
                changes.remove(entry.spot);
                given_back.push((entry.spot, segment.file, entry.end() - entry.spot.offset));
                self.report.entries_dropped += 1;
                continue;
            }
            newest_s = newest_s.max(entry.time_s);
            *live_bytes.entry(entry.spot.segment).or_default() += entry.end() - entry.spot.offset;
            if let Some(before) = self.shared.table.load(&entry) {
                let earlier = self.shared.index.get(before.spot)?;
                let earlier = earlier.filter(|before| before.sequence > entry.sequence);
                if let Some(later) = earlier {
                    self.shared.table.load(&later);
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
                    self.shared.lapses.note(entry.sequence);
                    Erase::of(&entry).into_iter().for_each(|erase| erasures.add(erase, entry.sequence))
                }
                _ => {}
            }
        }
        self.shared.table.loaded();
        self.shared.index.write(changes)?;
        for (spot, file, len_bytes) in given_back {
            self.shared.give_back(spot.segment, file, spot.offset, len_bytes);
        }
        self.shared.time.advance_to(newest_s);
        for (id, bytes) in live_bytes {
            self.shared.segments.update(id, |segment| segment.live_bytes = bytes);
        }
        self.report.own.retain(|entry| self.shared.table.is_at(entry.id, entry.spot));
        self.shared.erase_all(&erasures)?;
        self.account()
    }

    /// Whether a record with a hole in it is none any more: there are file systems that make holes of zeros.
    fn is_gone(&self, file: FileId, generation: u64, entry: &Entry) -> bool {
        let Shared { disk, pool, .. } = self.shared;
        let len = usize::try_from(entry.end() - entry.spot.offset).unwrap_or(usize::MAX);
        // What cannot be read just now may be there.
        let Ok(record) = read_exact(disk.as_ref(), pool, file, entry.spot.offset, len) else { return false };
        let Ok(found) = PlacedHeader::decode(&record) else { return true };
        let same = found.place == entry.spot.in_generation(generation) && found.record_bytes == len;
        !(same && verify::stored_record(&found.header, &record, pool).is_ok())
    }

    /// Learns how much of each segment was given back before, and gives back those of which nothing is left.
    fn account(&self) -> Result<()> {
        for (id, segment) in self.shared.segments.all() {
            // Without an answer the segment counts in full.
            let taken = self.shared.disk.allocated_bytes(segment.file).unwrap_or(segment.len_bytes);
            // One that holds something is not empty for want of entries: they may have been lost by mistake, and what was passed over
            // as bad just now may be sound.
            let empty = segment.live_bytes == 0 && taken <= EMPTY_BYTES && !segment.unread;
            if segment.sealed && empty && !self.passed_over.contains(&id) {
                self.shared.remove_segment(id);
                continue;
            }
            self.shared.segments.update(id, |open| open.punched_bytes = open.len_bytes.saturating_sub(taken));
        }
        Ok(())
    }
}

/// Where segments have holes, asked for as entries come, in order: once for a segment without any.
#[derive(Default)]
struct Holes {
    segment: Option<SegmentId>,
    /// From the first to the second there is none, and there is one at the second.
    solid: Range<u64>,
}

impl Holes {
    fn touch(&mut self, shared: &Shared, file: FileId, entry: &Entry) -> bool {
        let Spot { segment, offset } = entry.spot;
        if self.segment != Some(segment) || !self.solid.contains(&offset) {
            (self.segment, self.solid) = (Some(segment), offset..shared.disk.next_hole(file, offset));
        }
        self.solid.end < entry.end()
    }
}

/// What a scan found of one segment, on its way to the index and not in it.
struct Gathered<'a> {
    index: &'a Index,
    few: Vec<Entry>,
    /// So many and no more.
    few_entries: usize,
    bulk: Option<Bulk<'a>>,
    count: u64,
    sequence: u64,
    /// Those of them that the store wrote about itself.
    own: Vec<Entry>,
}

impl<'a> Gathered<'a> {
    fn new(index: &'a Index, few_entries: usize) -> Self {
        Self { index, few: Vec::new(), few_entries, bulk: None, count: 0, sequence: 0, own: Vec::new() }
    }

    fn add(&mut self, some: Vec<Entry>) -> Result<()> {
        self.count += some.len() as u64;
        self.sequence = some.iter().map(|entry| entry.sequence).fold(self.sequence, u64::max);
        self.own.extend(some.iter().filter(|entry| is_own(entry.id)));
        self.few.extend(some);
        if self.bulk.is_none() && self.few.len() > self.few_entries {
            self.bulk = Some(self.index.bulk()?);
        }
        match &mut self.bulk {
            Some(bulk) => self.few.drain(..).try_for_each(|entry| bulk.put(&entry)),
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<()> {
        match self.bulk {
            Some(bulk) => bulk.finish(),
            None if self.few.is_empty() => Ok(()),
            None => {
                let mut changes = Changes::default();
                self.few.iter().for_each(|entry| changes.put(entry));
                self.index.write(changes)
            }
        }
    }
}

impl Tail {
    fn end_at(&mut self, end: u64) {
        (self.append_at, self.published_at) = (end, end);
    }
}

//! When an erasure lapses: as soon as nothing is left that it could mean.
//!
//! An erasure means records of a lower sequence. It is kept for as long as the bytes of one may lie in any segment file, named by
//! the index or not: what was given back comes back with a power cut, what a failed write left behind with a lost index. So each
//! segment says below which sequence no erasure is needed for it ([`OpenSegment::clear_below`]):
//!
//! - A new segment: the next sequence to be given, which its header keeps. Everything in it is later.
//! - A segment that is complete is *swept*. What the index does not name is given back, again where it was before, for a failed
//!   flush may have lost that; then the file is flushed. From there on nothing comes back that an erasure had removed when the
//!   sweep began. Nothing is moved: what lives among erasures, a layout, stays where it is.
//! - A segment that is gone does not count, from when its file is durably gone.
//!
//! An erasure below the mark of all segments lapses: out of the index, durably, then out of its segment. A crash in between may
//! leave it, and an index that is built anew finds it again: it means nothing, and lapses again. Sequences never fall below it,
//! since whatever may bring it back is read or flushed away before the first sequence of an opening is given (recovery.rs).
//!
//! Nothing lapses while there may be a segment file that is not in the table: one that could not be read or not be removed. A
//! segment into which a write or flush failed is not swept before the next opening, nor is one with a record that is forgotten
//! for a failed read; where the file system makes no holes, none is, and erasures stay until everything older is gone.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use esker_prefix::ObjectKind;

use crate::index::Entry;
use crate::io::{Op, wait};
use crate::segment::{OpenSegment, RECORDS_AT, SegmentId, last_page};
use crate::shared::Shared;
use crate::table::Victim;
use crate::{Result, TtlClass};

/// Segments swept in one round of housekeeping.
const SWEEPS: usize = 4;
/// Entries looked at in one round of housekeeping; the last segment is looked at to its end.
const LOOKED_AT: usize = 4096;

/// How far erasures have come.
#[derive(Default)]
pub(crate) struct Lapses {
    /// No record is given a lower sequence from now on. May lag behind.
    next_sequence: AtomicU64,
    /// Highest sequence of any erasure that is known.
    newest: AtomicU64,
    /// Erasures that are being carried out, by the sequence that was next when they began. One that fails stays here: what it
    /// means is not gone.
    under_way: Mutex<BTreeMap<u64, u64>>,
    /// Segment files that are there, or may come back, and are not in the table of segments.
    unknown_files: AtomicU64,
    /// Of the housekeeping alone.
    round: Mutex<Round>,
}

/// Where the housekeeping goes on.
#[derive(Default)]
struct Round {
    /// Segment swept last.
    swept: Option<SegmentId>,
    /// Below this sequence erasures have lapsed in all segments.
    lapsed_below: u64,
    /// Below which they do in this round, and the segment to look at next; `None` between two rounds.
    lapsing: Option<(u64, SegmentId)>,
}

impl Lapses {
    /// The next record will have this sequence, or a higher one.
    pub(crate) fn next_is(&self, sequence: u64) {
        self.next_sequence.store(sequence, Ordering::SeqCst);
    }

    /// There is an erasure of this sequence.
    pub(crate) fn note(&self, sequence: u64) {
        self.newest.fetch_max(sequence, Ordering::SeqCst);
    }

    /// An erasure begins. To be called before its record is put; what is returned goes to [`Lapses::done`].
    pub(crate) fn begin(&self) -> u64 {
        let mut under_way = self.under_way();
        let bound = self.next_sequence.load(Ordering::SeqCst);
        *under_way.entry(bound).or_default() += 1;
        bound
    }

    /// What it means is gone.
    pub(crate) fn done(&self, bound: u64) {
        let mut under_way = self.under_way();
        if let Some(count) = under_way.get_mut(&bound) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&bound);
            }
        }
    }

    /// A segment leaves the table before its file is durably gone.
    pub(crate) fn file_leaves(&self) {
        self.unknown_files.fetch_add(1, Ordering::SeqCst);
    }

    /// Its file is durably gone.
    pub(crate) fn file_is_gone(&self) {
        self.unknown_files.fetch_sub(1, Ordering::SeqCst);
    }

    /// Every erasure of a lower sequence has been carried out.
    fn carried_out_below(&self) -> u64 {
        let under_way = self.under_way();
        let next = self.next_sequence.load(Ordering::SeqCst);
        under_way.first_key_value().map_or(next, |(&bound, _)| bound.min(next))
    }

    fn under_way(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Removes erasures that mean nothing any more: a part of what is to be done for it, each time.
    pub(crate) fn let_erasures_lapse(&self) -> Result<()> {
        if self.table.erasures() == 0 {
            return Ok(());
        }
        let mut round = self.lapses.round.lock().unwrap_or_else(PoisonError::into_inner);
        let carried_out_below = self.lapses.carried_out_below();
        self.sweep_some(&mut round, carried_out_below)?;
        let needless_below = self.needless_below(carried_out_below);
        self.lapse_some(&mut round, needless_below)
    }

    /// Below which sequence no erasure is needed.
    fn needless_below(&self, carried_out_below: u64) -> u64 {
        let segments = self.segments.all();
        // Looked at after the table: a segment that it has no more is counted here until its file is gone.
        if self.lapses.unknown_files.load(Ordering::SeqCst) > 0 {
            return 0;
        }
        if self.settings.lapses_early() {
            return carried_out_below;
        }
        segments.iter().map(|(_, segment)| segment.clear_below).fold(carried_out_below, u64::min)
    }

    /// Sweeps the next few of the segments that an erasure waits for.
    fn sweep_some(&self, round: &mut Round, carried_out_below: u64) -> Result<()> {
        let newest = self.lapses.newest.load(Ordering::SeqCst);
        let mut waiting = self.segments.all();
        waiting.retain(|(_, segment)| {
            segment.complete && segment.clear_below <= newest && segment.clear_below < carried_out_below
        });
        // Round and round: one that cannot be swept now does not keep the others waiting.
        waiting.sort_unstable_by_key(|(id, _)| (round.swept >= Some(*id), *id));
        for (id, segment) in waiting.into_iter().take(SWEEPS) {
            round.swept = Some(id);
            self.sweep(id, &segment, carried_out_below)?;
        }
        Ok(())
    }

    /// Sees to it that nothing of a segment comes back but what the index names.
    fn sweep(&self, id: SegmentId, segment: &OpenSegment, carried_out_below: u64) -> Result<()> {
        let entries = self.index.entries_of(id).collect::<Result<Vec<Entry>>>()?;
        if entries.is_empty() {
            self.remove_segment(id);
            return Ok(());
        }
        // One that is forgotten for a failed read was passed over by erasures, and is found again at the next opening.
        if !entries.iter().all(|entry| self.table.is_at(entry.id, entry.spot)) {
            return Ok(());
        }
        if let Err(error) = self.give_back_gaps(segment, &entries) {
            // Unless an erasure has just removed the segment itself.
            self.segments.update(id, |segment| {
                segment.complete = false;
                if error.kind() != io::ErrorKind::Unsupported {
                    tracing::warn!(segment = %id, %error, "a segment cannot be swept; older erasures stay");
                }
            });
            return Ok(());
        }
        self.segments.update(id, |segment| segment.clear_below = carried_out_below);
        Ok(())
    }

    /// Gives back everything between, before and behind some records, for good.
    fn give_back_gaps(&self, segment: &OpenSegment, entries: &[Entry]) -> io::Result<()> {
        let (mut from, end) = (RECORDS_AT, last_page(segment.len_bytes));
        for (gap_end, next) in
            entries.iter().map(|entry| (entry.spot.offset, entry.end())).chain([(end, end)])
        {
            if from < gap_end {
                self.disk.punch(segment.file, from, gap_end - from)?;
            }
            from = from.max(next);
        }
        wait(self.disk.as_ref(), |reply| Op::sync(segment.file, 0, reply)).map(drop)
    }

    /// Lets erasures below `needless_below` lapse, where the last call has ended.
    fn lapse_some(&self, round: &mut Round, needless_below: u64) -> Result<()> {
        let (below, from) = match round.lapsing.take() {
            Some(going_on) => going_on,
            None if needless_below > round.lapsed_below => (needless_below, SegmentId(0)),
            None => return Ok(()),
        };
        let mut segments = self.segments.all();
        segments.retain(|(id, segment)| segment.class == TtlClass::PERMANENT && *id >= from);
        segments.sort_unstable_by_key(|(id, _)| *id);
        let mut looked_at = 0;
        for (id, _) in segments {
            if looked_at >= LOOKED_AT {
                round.lapsing = Some((below, id));
                return Ok(());
            }
            let entries = self.index.entries_of(id).collect::<Result<Vec<Entry>>>()?;
            looked_at += entries.len();
            self.lapse(entries.iter().filter(|entry| entry.sequence < below))?;
        }
        round.lapsed_below = below;
        Ok(())
    }

    fn lapse<'a>(&self, entries: impl Iterator<Item = &'a Entry>) -> Result<()> {
        let erasures = entries.filter(|entry| entry.id.kind == ObjectKind::Erasure);
        // Not one that was repeated meanwhile: its newer record has its name.
        let lapsed = erasures.filter(|entry| self.table.remove_if(entry.id, entry.spot));
        let record_bytes = |entry: &Entry| entry.end() - entry.spot.offset;
        let lapsed: Vec<Victim> =
            lapsed.map(|entry| Victim { spot: entry.spot, record_bytes: record_bytes(entry) }).collect();
        self.counters.erasures_lapsed.add(lapsed.len() as u64);
        self.free(&lapsed)
    }
}

//! Giving space back: eviction, expiry and erasure.
//!
//! Records are never moved. What goes is punched out of its segment (`fallocate(2)` with a hole), which frees its pages
//! exactly and writes nothing; a sealed segment of which nothing is left is removed. Where the file system cannot punch,
//! only whole segments are given back, and evicted: the one that was not used for longest, with what hangs on it. The order is: index durably without the entries, then the space: after a crash
//! between the two, space is lost until its segment goes, and nothing points at holes. Erasures go the same way once they lapse
//! (erasure/lapse.rs).

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use esker_prefix::{ObjectId, ObjectKind};

use crate::erasure::{Erase, Erasures};
use crate::index::{Changes, Entry};
use crate::io::FileId;
use crate::lease::Lease;
use crate::observer::Removal;
use crate::segment::{SegmentId, Spot};
use crate::shared::Shared;
use crate::table::{Located, Victim};
use crate::{Result, TtlClass};

/// Of the time to live, this part may pass before a use of a segment is written down again.
const USE_LAG_PART: u32 = 16;

impl Shared {
    /// Whether another segment of a class fits into the capacity.
    pub(crate) fn has_capacity(&self, class: TtlClass) -> bool {
        self.missing_bytes(class) == 0
    }

    /// By how much it does not.
    fn missing_bytes(&self, class: TtlClass) -> u64 {
        let (_, used_bytes) = self.segments.totals();
        let wanted_bytes = self.settings.segment_bytes_of(class) + self.settings.reserve_bytes(class);
        used_bytes.saturating_add(wanted_bytes).saturating_sub(self.settings.capacity_bytes)
    }

    /// Sees to it that another segment of a class fits, if anything may go for it.
    pub(crate) fn make_room(&self, class: TtlClass) -> Result<()> {
        match self.missing_bytes(class) {
            0 => Ok(()),
            bytes if self.makes_holes() => {
                self.evict(bytes)?;
                // Only now it may be known that nothing came of that.
                if self.makes_holes() { Ok(()) } else { self.evict_segments(self.missing_bytes(class)) }
            }
            bytes => self.evict_segments(bytes),
        }
    }

    /// Gives so many bytes back to the file system, if anything may go for it.
    pub(crate) fn free_space(&self, bytes: u64) -> Result<()> {
        if self.makes_holes() { self.evict(bytes) } else { self.evict_segments(bytes) }
    }

    /// Removes what is worth least, from the ends of prefixes on.
    fn evict(&self, bytes: u64) -> Result<()> {
        let _reclaiming = self.reclaim();
        self.evicted(&self.table.evict(bytes, self.time.now_s()))
    }

    /// Removes whole segments until they have so many bytes, those first that were not used for longest. One that holds something
    /// that may not go, or on which such a thing hangs, is passed over.
    fn evict_segments(&self, bytes: u64) -> Result<()> {
        let _reclaiming = self.reclaim();
        let mut segments = self.segments.all();
        segments
            .retain(|(_, segment)| segment.sealed && !segment.unread && segment.class != TtlClass::PERMANENT);
        segments.sort_unstable_by_key(|(id, segment)| (segment.used_s, *id));
        let mut freed_bytes = 0;
        for (id, segment) in segments {
            if freed_bytes >= bytes {
                break;
            }
            let Some(victims) = self.table.evict_segment(id) else { continue };
            self.evicted(&victims)?;
            if self.segments.get(id).is_some() {
                self.remove_rest(id)?;
            }
            freed_bytes += segment.len_bytes;
        }
        Ok(())
    }

    /// Removes a segment of which the table names nothing, with what the index names all the same.
    fn remove_rest(&self, id: SegmentId) -> Result<()> {
        let mut changes = Changes::default();
        for entry in self.index.entries_of(id) {
            changes.remove(entry?.spot);
        }
        self.index.write_durably(changes)?;
        self.remove_segment(id);
        Ok(())
    }

    fn evicted(&self, victims: &[Victim]) -> Result<()> {
        self.counters.evicted.add(victims.len() as u64);
        self.counters.evicted_bytes.add(victims.iter().map(|victim| victim.record_bytes).sum());
        let entries = self.entries_at(victims.iter().map(|victim| victim.spot));
        self.observed.went(&entries, Removal::Evicted);
        self.free(victims)
    }

    /// Whether space can be given back in parts, as far as is known.
    fn makes_holes(&self) -> bool {
        !self.holeless.load(Ordering::Relaxed)
    }

    /// Removes records from the index, durably, and gives back their space.
    pub(crate) fn free(&self, records: &[Victim]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut changes = Changes::default();
        records.iter().for_each(|record| changes.remove(record.spot));
        self.index.write_durably(changes)?;
        for record in records {
            self.punch(record.spot, record.record_bytes);
        }
        Ok(())
    }

    /// Gives back the space of a record that nothing points at any more.
    pub(crate) fn punch(&self, Spot { segment: id, offset }: Spot, len_bytes: u64) {
        let Some(segment) = self.segments.get(id) else { return };
        let empty = self.segments.update(id, |segment| {
            let left_bytes = segment.live_bytes.checked_sub(len_bytes);
            assert!(!cfg!(test) || left_bytes.is_some(), "{id} at {offset}: given back twice");
            // Counted wrongly it may hold something: it stays.
            segment.live_bytes = left_bytes.unwrap_or_else(|| {
                tracing::error!(segment = %id, offset, "space was given back twice; the segment stays until a restart");
                u64::MAX
            });
            segment.sealed && segment.live_bytes == 0 && !segment.unread
        });
        if empty == Some(true) {
            self.remove_segment(id);
            return;
        }
        self.give_back(id, segment.file, offset, len_bytes);
    }

    /// Gives back the space of a part of a segment.
    pub(crate) fn give_back(&self, id: SegmentId, file: FileId, offset: u64, len_bytes: u64) {
        match self.disk.punch(file, offset, len_bytes) {
            Ok(()) => {
                self.segments.update(id, |segment| segment.punched_bytes += len_bytes);
                self.counters.punched_bytes.add(len_bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                if !self.holeless.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "this file system cannot give back parts of a file; space returns by whole segments only"
                    );
                }
            }
            Err(error) => {
                tracing::warn!(segment = %id, offset, len_bytes, %error, "space could not be given back")
            }
        }
    }

    /// Removes a segment of which nothing is needed. Its file goes first: an index that names a missing segment is
    /// put right at the next opening.
    pub(crate) fn remove_segment(&self, id: SegmentId) {
        self.lapses.file_leaves();
        self.segments.remove(id);
        match self.disk.remove(&id.file_name()) {
            Ok(()) => self.lapses.file_is_gone(),
            // Whoever removed it says when it is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.lapses.file_is_gone(),
            Err(error) => tracing::warn!(segment = %id, %error, "an empty segment could not be removed"),
        }
        let mut changes = Changes::default();
        changes.remove_segment(id);
        if let Err(error) = self.index.write(changes) {
            tracing::error!(segment = %id, %error, "the index still names a removed segment");
        }
    }

    /// Removes the sealed segments whose last use is longer ago than their class allows. Where something in one is leased or
    /// still carries something outside, that stays and the rest goes.
    pub(crate) fn expire(&self) -> Result<()> {
        let _reclaiming = self.reclaim();
        let mut segments = self.segments.all();
        segments.retain(|(id, segment)| segment.sealed && !segment.unread && self.is_expired(*id));
        // The newest first: what they hold hangs on what older ones hold.
        segments.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(*id));
        for (id, _) in segments {
            // One that cannot be read keeps no other: the next opening builds the index anew.
            let entries = match self.index.entries_of(id).collect::<Result<Vec<Entry>>>() {
                Ok(entries) => entries,
                Err(error) => {
                    tracing::error!(segment = %id, %error, "the entries of a segment that is over cannot be read");
                    continue;
                }
            };
            if !self.table.remove_all(&entries) {
                let loose = self.table.remove_loose(&entries);
                self.counters.expired.add(loose.len() as u64);
                let gone = self.entries_at(loose.iter().map(|record| record.spot));
                self.observed.went(&gone, Removal::Expired);
                self.free(&loose)?;
                continue;
            }
            self.counters.expired.add(entries.len() as u64);
            self.observed.went(&entries, Removal::Expired);
            let mut changes = Changes::default();
            entries.iter().for_each(|entry| changes.remove(entry.spot));
            self.index.write_durably(changes)?;
            self.remove_segment(id);
        }
        Ok(())
    }

    /// Removes what an erasure with this sequence means. Returns how many objects.
    pub(crate) fn erase(&self, erase: Erase, sequence: u64) -> Result<u64> {
        let mut erasures = Erasures::default();
        erasures.add(erase, sequence);
        if let Erase::Object(id) = erase {
            let _reclaiming = self.reclaim();
            // Held until it is gone: what a failed read takes out of the table meanwhile is among them or still there.
            let suspects = self.breaker.suspects();
            let located = self.table.get(id);
            let stored = located.map_or(Ok(None), |located| self.index.get(located.spot))?;
            let mut entries: Vec<Entry> = stored.into_iter().chain(suspects.iter().copied()).collect();
            entries.retain(|entry| erasures.cover(entry));
            // One that is just being forgotten is both.
            entries.sort_unstable_by_key(|entry| entry.spot);
            entries.dedup_by_key(|entry| entry.spot);
            return self.erase_entries(entries, suspects);
        }
        let mut changes = Changes::default();
        self.hits.erase(erase, &mut changes);
        self.index.write_durably(changes)?;
        self.erase_all(&erasures)
    }

    /// Removes what any of these means. Looks at every entry once.
    pub(crate) fn erase_all(&self, erasures: &Erasures) -> Result<u64> {
        if erasures.is_empty() {
            return Ok(0);
        }
        let covered = |entry: &Result<Entry>| entry.as_ref().map_or(true, |entry| erasures.cover(entry));
        let entries = self.index.entries().filter(covered).collect::<Result<Vec<Entry>>>()?;
        // Nobody who needs room waits for a look at everything: what went meanwhile is passed over, and only that.
        let _reclaiming = self.reclaim();
        let mut there = Vec::with_capacity(entries.len());
        for entry in entries {
            there.extend(self.index.get(entry.spot)?.filter(|kept| *kept == entry));
        }
        self.erase_entries(there, self.breaker.suspects())
    }

    /// Removes these from table and index, while nothing that was forgotten for a failed read comes back.
    fn erase_entries(&self, entries: Vec<Entry>, mut suspects: MutexGuard<'_, Vec<Entry>>) -> Result<u64> {
        if entries.is_empty() {
            return Ok(0);
        }
        let mut changes = Changes::default();
        for entry in &entries {
            self.table.remove_if(entry.id, entry.spot);
            changes.remove(entry.spot);
        }
        let gone: HashSet<Spot> = entries.iter().map(|entry| entry.spot).collect();
        suspects.retain(|suspect| !gone.contains(&suspect.spot));
        self.index.write_durably(changes)?;
        drop(suspects);
        self.counters.erased.add(entries.len() as u64);
        self.observed.went(&entries, Removal::Erased);
        for entry in &entries {
            self.punch(entry.spot, entry.end() - entry.spot.offset);
        }
        Ok(entries.len() as u64)
    }

    /// What is done every few seconds. What fails keeps nothing else from being done.
    pub(crate) fn keep_house(self: &Arc<Self>) {
        type Step = fn(&Shared) -> Result<()>;
        let steps: [(&str, Step); 4] = [
            ("expiry", Self::expire),
            ("the clock", |shared| shared.time.save()),
            ("the counts of hits", Self::save_hits),
            ("the lapse of erasures", Self::let_erasures_lapse),
        ];
        for (what, step) in steps {
            if let Err(error) = step(self) {
                tracing::error!(%error, what, "housekeeping failed");
            }
        }
        self.wear.save(&self.counters);
        self.restore_unread_leases();
        self.end_leases();
    }

    /// Lets go of what leases held whose time is over.
    fn end_leases(&self) {
        let now_s = self.time.now_s();
        // With the places of their records: what has the same name later is a renewal, and stays.
        let over: Vec<(Lease, Option<Located>)> = {
            let mut held = self.leases.held();
            let over: Vec<_> =
                held.values().filter(|lease| lease.deadline_s <= now_s).map(|lease| lease.id).collect();
            let over = over.into_iter().filter_map(|id| self.set_lease(&mut held, id, None));
            over.map(|lease| {
                let located = self.table.get(lease.id.object());
                (lease, located)
            })
            .collect()
        };
        for (lease, located) in over {
            lease.ends.iter().for_each(|&end| self.let_go(end));
            // Nothing needs the record of a lease that is over.
            if let Some(located) = located
                && self.table.remove_if(lease.id.object(), located.spot)
            {
                let record = Victim { spot: located.spot, record_bytes: located.record_bytes() as u64 };
                if let Err(error) = self.free(&[record]) {
                    tracing::warn!(%error, "the record of a lease that is over stays");
                }
            }
        }
    }

    pub(crate) fn save_hits(&self) -> Result<()> {
        let mut changes = Changes::default();
        self.hits.save(&mut changes);
        self.index.write(changes)
    }

    /// The prefix that ends in `tip` was read.
    pub(crate) fn used(&self, tip: ObjectId) {
        let now_s = self.time.now_s();
        let segments = self.table.touch(tip, now_s);
        if matches!(tip.kind, ObjectKind::Block | ObjectKind::State)
            && !segments.is_empty()
            && let Some(Located { spot, namespace, scope, tokens, .. }) = self.table.get(tip)
            && let Some(segment) = self.segments.get(spot.segment)
        {
            self.hits.add((namespace, scope, segment.class), tokens);
        }
        for id in segments {
            let Some(segment) = self.segments.get(id) else { continue };
            self.segments.update(id, |segment| segment.used_s = segment.used_s.max(now_s));
            let lag_s = self.ttl_s(segment.class).map_or(u32::MAX, |ttl_s| ttl_s / USE_LAG_PART);
            if now_s.saturating_sub(segment.written_use_s) > lag_s {
                self.remember_use(id, now_s);
            }
        }
    }

    fn remember_use(&self, id: SegmentId, used_s: u32) {
        let mut changes = Changes::default();
        changes.put_use(id, used_s);
        match self.index.write(changes) {
            Ok(()) => drop(self.segments.update(id, |segment| segment.written_use_s = used_s)),
            Err(error) => {
                tracing::warn!(segment = %id, %error, "the use of a segment could not be written down")
            }
        }
    }

    /// Whether the time to live of everything in a segment is over.
    pub(crate) fn is_expired(&self, id: SegmentId) -> bool {
        let Some(segment) = self.segments.get(id) else { return false };
        let now_s = self.time.now_s();
        self.ttl_s(segment.class).is_some_and(|ttl_s| segment.used_s.saturating_add(ttl_s) < now_s)
    }

    /// Whether half of the time that objects of a class are kept has passed since then. What is kept for ever counts as the class
    /// that is kept longest where there are erasures: none lapses before its segment is closed.
    pub(crate) fn is_half_over(&self, class: TtlClass, since_s: u32) -> bool {
        let classes = 0..u8::try_from(self.settings.ttl_classes.len()).unwrap_or(u8::MAX);
        let ttl_s = match class {
            TtlClass::PERMANENT if self.table.erasures() > 0 => {
                classes.filter_map(|class| self.ttl_s(TtlClass(class))).max()
            }
            class => self.ttl_s(class),
        };
        ttl_s.is_some_and(|ttl_s| since_s.saturating_add(ttl_s / 2) < self.time.now_s())
    }

    /// Seconds that objects of a class are kept; `None` for ever.
    fn ttl_s(&self, class: TtlClass) -> Option<u32> {
        let ttl = self.settings.ttl_classes.get(usize::from(class.0))?;
        Some(u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX))
    }
}
